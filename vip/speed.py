"""What one process takes for a step: its speed, measured on noise, and its memory, measured on a GPU or else counted.

The steps are the trainer's own, without other ranks and without a loader.
"""

import dataclasses
import itertools
import math
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from data.batch import Batch
from data.sources import Source
from vip.config import ConfigError, RunConfig
from vip.distributed import World
from vip.engine import SUMS, Trainer
from vip.metrics import DeviceSums
from vip.models.build import build_model, input_spec
from vip.parts import build
from vip.plan import make_plan
from vip.precision import DTYPES

WARM_UP_STEPS = 3  # compilation, and the choice of kernels
STEPS_S = 1.0
MAX_STEPS = 30
CPU_PARAMETERS = 2_000_000  # of a network that a CPU trains


@dataclass(frozen=True)
class Speed:
    """Of one process, in `num_steps` optimizer steps of `batch` images each."""

    images_per_s: float
    batch: int
    num_steps: int
    optimizer_bytes: int  # of its state
    gpu_bytes: int | None  # that torch took at most; None on a CPU


@dataclass(frozen=True)
class Network:
    """What a network needs, counted without running it. Bytes are those on a GPU in the run's precision."""

    num_parameters: int
    cast_bytes: int  # copies of the weights in fp16 or bf16
    image_bytes: int  # kept for the backward pass, of each image of a pass


def measure(run: RunConfig, batch: int, images: Source, device: torch.device, is_long: bool = False) -> Speed:
    """Make steps of `batch` images; where each takes long, no more than two. Leaves nothing behind.

    Raises ConfigError where they are too much for the GPU's memory.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _measure(dataclasses.replace(run, runs_dir=folder), batch, images, device, is_long)
    except torch.OutOfMemoryError:
        remedy = f"micro_batch={max(1, batch // 2)} keeps the global batch by accumulation"
        raise ConfigError(f"micro_batch={batch}: too much for the GPU's memory; {remedy}") from None
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def count(run: RunConfig, num_classes: int) -> Network:
    """Run the network on tensors that have shapes and no values: no GPU is needed to learn what one would hold."""
    config = dataclasses.replace(run.model, fused_norm=False)  # apex keeps the same tensors, and need not be here
    model, dtype = build_model(config, num_classes).train(), DTYPES[run.precision.name]
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype != torch.float32)  # torch.autocast would refuse where there is no GPU
    torch.set_autocast_dtype("cuda", dtype)
    try:
        kept = [_kept_bytes(model, input_spec(config, model).size, num_images) for num_images in (2, 4)]
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
    per_image = (kept[1] - kept[0]) // 2
    casts = 0 if dtype == torch.float32 else max(0, kept[0] - 2 * per_image)
    return Network(sum(p.numel() for p in model.parameters()), casts, per_image)


def _kept_bytes(model: nn.Module, size: tuple[int, int], num_images: int) -> int:
    """What a forward pass keeps for the backward pass, beside the parameters themselves."""
    kept: list[Tensor] = []  # all of them held, or storages would be met twice

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with FakeTensorMode():
        on_gpu: dict[str, Any] = {"device": "cuda"}
        own = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad, **on_gpu)
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        }
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = torch.func.functional_call(model, own, torch.empty(num_images, 3, *size, **on_gpu))
            nn.functional.cross_entropy(logits.float(), torch.empty(logits.shape, **on_gpu))
    torch.clear_autocast_cache()
    known = {tensor.untyped_storage()._cdata for tensor in own.values()}
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(num_bytes for storage, num_bytes in storages.items() if storage not in known)


def _measure(run: RunConfig, batch: int, images: Source, device: torch.device, is_long: bool) -> Speed:
    world = World(0, 1, device)
    plan = make_plan(batch, None, 1, len(images), run.total_epochs, None)
    parts = build(run, plan, world, images, images, None, print)
    trainer = Trainer(run, plan, world, parts)
    batches = itertools.repeat(_noise(batch, parts.image_size, len(images.class_names), device.type == "cuda"))
    sums, steps = DeviceSums(SUMS, world), itertools.count()

    def seconds(num_steps: int) -> float:
        begun = time.perf_counter()
        for step in itertools.islice(steps, num_steps):
            trainer.train_step(batches, step, sums)
        sums.reduce()  # waits for the device
        return time.perf_counter() - begun

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds(1 if is_long else WARM_UP_STEPS)
    num_steps = 1 if is_long else min(MAX_STEPS, max(3, math.ceil(STEPS_S / seconds(1))))
    speed = num_steps * batch / seconds(num_steps)
    moments = [value for state in parts.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    gpu_bytes = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    return Speed(speed, batch, num_steps, _num_bytes(moments), gpu_bytes)


def _noise(num_images: int, size: tuple[int, int], num_classes: int, pin: bool) -> Batch:
    pixels = torch.randint(0, 256, (num_images, *size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    zeros = torch.zeros(num_images, dtype=torch.int64)
    labels = torch.arange(num_images) % num_classes
    return Batch(
        pixels.pin_memory() if pin else pixels, labels, zeros, torch.zeros(num_images, 4, dtype=torch.int64), zeros
    )


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
