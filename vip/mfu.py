"""Model FLOPs utilisation: the share of what the device can do in products that goes into the network's own operations.

The operations of a training step are counted, multiplication and addition apart; what the device can do is measured, as
the rate of a large product in the same number format. Operations done twice to save memory count once.
"""

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from vip.models.products import linear

SIDE = {"cuda": 8192, "cpu": 1024}  # rows and columns of the product
BUDGET_S = 0.2
Shape = list[int]


def step_flops(model: nn.Module, image_size: tuple[int, int], in_chans: int = 3) -> int:
    """Floating-point operations of a training step of one image of (height, width) pixels: forward and backward pass.

    Nothing is computed and `model`, on whatever device and compiled or not, is left as it is.
    """
    known: dict[int, object] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    known |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    shadow = copy.deepcopy(model, known).train()  # without values, and without its compiled forms
    for path, module in list(shadow.named_modules()):
        if getattr(module, "grad_checkpointing", False):
            module.grad_checkpointing = False
        if type(module).__module__.startswith("apex."):  # its kernels are norms, which have no products
            shadow.set_submodule(path, nn.Identity())
    with FlopCounterMode(display=False, custom_mapping=COUNTED_HERE) as counter:
        shadow(torch.empty(1, in_chans, *image_size, device="meta")).sum().backward()
    return counter.get_total_flops()


def _convolution_backward(gradient: Shape, x: Shape, weight: Shape, *others: Any, **out: Any) -> int:
    """As many operations for the input's and the weights' gradients each as forward; torch forgets the groups here."""
    *_, transposed, _, _, wanted = others
    return conv_flop_count(x, weight, gradient, transposed) * sum(wanted[:2])


COUNTED_HERE = {torch.ops.aten.convolution_backward: _convolution_backward}


def matrix_rate(dtype: torch.dtype, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Floating-point operations per second of a large product, the most that a network can have; takes about 0.3 s."""
    side = SIDE.get(device.type, SIDE["cpu"])
    noise = torch.Generator(device).manual_seed(0)  # leaves torch's own generators alone
    one, other = (torch.randn(side, side, generator=noise, device=device, dtype=dtype) for _ in range(2))
    linear(one, other)  # loads and chooses the kernel
    _wait(device)
    seconds: list[float] = []
    while len(seconds) < 3 or (sum(seconds) < BUDGET_S and len(seconds) < 100):
        begun = clock()
        linear(one, other)
        _wait(device)
        seconds.append(clock() - begun)
    return 2 * side**3 / statistics.median(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
