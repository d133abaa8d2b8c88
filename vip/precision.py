"""Number formats of a training step: fp32, fp16 with loss scaling (V100 and later), bf16 (Ampere and later, CPU).

torch's own autocast and GradScaler do the work; here is the check that the device has the format, in one line instead of
a night of emulated or overflowing steps.
"""

import contextlib
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class PrecisionConfig:
    name: Annotated[Literal["fp32", "fp16", "bf16"], Field(description="number format of the matrix products")]
    tf32: Annotated[bool, Field(description="TF32 for the float32 products that remain (Ampere and later)")] = True


class Precision:
    """Autocast and loss scaling for one device.

    Raises ValueError where the device lacks the format: fp16 off CUDA, bf16 before Ampere.
    """

    def __init__(self, config: PrecisionConfig, device: torch.device) -> None:
        if config.name == "fp16" and device.type != "cuda":
            raise ValueError(f"precision=fp16: needs a CUDA device, this is {device.type}; take precision=fp32 or bf16")
        if config.name == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            name = torch.cuda.get_device_name(device)
            raise ValueError(f"precision=bf16: {name} has no bf16 (Ampere and later have it); take precision=fp16")
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = config.tf32
        self.device = device
        self.dtype = DTYPES[config.name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.name == "fp16")

    def drawback(self) -> str | None:
        """What speaks against the format on this device, in one line; None if nothing does."""
        if self.device.type != "cpu" or self.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
            return None
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return None
        return (
            "precision=bf16: this CPU has no instructions for it (AVX-512 and later have), which makes products "
            "several times slower than float32's; take precision=fp32"
        )

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)
