"""Linear layers in float32 on CPUs that torch's own choice of kernels leaves at half their speed.

torch hands these products to MKL, which has AVX-512 kernels for Intel's processors alone, and convolutions to oneDNN,
which has them for every processor that can run them. A linear layer is a convolution of 1 x 1 on tokens as they lie
(scripts/benchmark.py model shows what that brings).
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

IMAGES = 32  # to cut the tokens into: torch's own kernels convolve 16 and fewer
LEAST = 1 << 22  # multiplications; fewer take no longer by torch's own choice


class Linear(nn.Linear):
    """nn.Linear by the faster kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C_in) -> (..., C_out)."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear by the faster kernel: (..., C_in), (C_out, C_in), (C_out) -> (..., C_out)."""
    if torch.jit.is_scripting():
        return F.linear(x, weight, bias)
    if not _suits(x, weight):
        return F.linear(x, weight, bias)
    y = F.conv2d(_as_images(x), weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """That of linear(x, weight): (..., C_out), (..., C_in), (C_out, C_in) -> (C_out, C_in)."""
    if not _suits(x, weight):
        return grad.flatten(0, -2).mT @ x.flatten(0, -2)
    _, of_weight, _ = torch.ops.aten.convolution_backward(
        _as_images(grad), _as_images(x), weight[:, :, None, None], None,
        [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False],
    )  # fmt: skip
    return of_weight.view(weight.shape)


def _as_images(x: Tensor) -> Tensor:
    """(..., C) -> (IMAGES, C, 1, W), channels last."""
    # A plain view of what is not in memory yet would have inductor write it channels first (vip/models/build.py).
    num_pixels = x.numel() // x.shape[-1] // IMAGES
    return torch.ops.aten._unsafe_view(x.contiguous(), [IMAGES, 1, num_pixels, x.shape[-1]]).permute(0, 3, 1, 2)


def _suits(x: Tensor, weight: Tensor) -> bool:
    if not ONEDNN_IS_FASTER or x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    is_exported = torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
    if is_exported or torch.jit.is_tracing():  # to run elsewhere
        return False
    num_tokens = math.prod(x.shape[:-1])
    is_worth_it = (num_tokens % IMAGES == 0) & (num_tokens * weight.numel() >= LEAST)
    if torch.compiler.is_dynamo_compiling():  # a size that varies must not be guarded: each would be compiled again
        is_worth_it = statically_known_true(is_worth_it)
    return is_worth_it and not torch.is_autocast_enabled("cpu")


def _onednn_is_faster() -> bool:
    try:
        vendor_is_amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return vendor_is_amd and libraries and torch.backends.cpu.get_cpu_capability() == "AVX512"


ONEDNN_IS_FASTER = _onednn_is_faster()
