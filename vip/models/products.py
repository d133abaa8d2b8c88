"""Linear layers in float32 on CPUs that torch's own choice of kernels leaves at half their speed.

torch hands these products to MKL, which has AVX-512 kernels for Intel's processors alone. oneDNN, which comes with torch
as well, has them for every processor that can run them (scripts/benchmark.py model shows what that brings).
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST = 1 << 22  # multiplications; fewer take less time than finding the other kernel


class Linear(nn.Linear):
    """nn.Linear by the faster kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C_in) -> (..., C_out)."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear by the faster kernel: (..., C_in), (C_out, C_in), (C_out) -> (..., C_out)."""
    if torch.jit.is_scripting():
        return F.linear(x, weight, bias)
    return _onednn_linear(x, weight, bias) if _suits(x, weight) else F.linear(x, weight, bias)


def _suits(x: Tensor, weight: Tensor) -> bool:
    if not ONEDNN_IS_FASTER or x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    if (
        torch.compiler.is_dynamo_compiling()
    ):  # whatever the size, which would be guarded; is_exporting() is always true there
        return True
    is_exported = torch.jit.is_tracing() or torch.compiler.is_exporting()  # to where this operation is unknown
    is_transformed = (
        torch._C._functorch.maybe_current_level() is not None
    )  # by torch.func, which cannot differentiate it
    return not (is_exported or is_transformed) and x.numel() * weight.shape[0] >= LEAST


def _onednn_is_faster() -> bool:
    try:
        vendor_is_amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return vendor_is_amd and libraries and torch.backends.cpu.get_cpu_capability() == "AVX512"


ONEDNN_IS_FASTER = _onednn_is_faster()


@torch.library.custom_op("vip::linear", mutates_args=(), device_types="cpu")
def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@_onednn_linear.register_fake
def _shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    rows = grad.flatten(0, -2)
    return (
        linear(grad, weight.mT) if ctx.needs_input_grad[0] else None,
        linear(rows.mT, x.flatten(0, -2).mT) if ctx.needs_input_grad[1] else None,
        rows.sum(0) if ctx.needs_input_grad[2] else None,
    )


_onednn_linear.register_autograd(_gradients, setup_context=_keep)
