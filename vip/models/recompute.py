"""Linear layers that store less: what they multiply is computed again in the backward pass.

A linear layer keeps its input for the gradient of its weights. Where that input is a cheap function of a tensor that is kept
anyway (GELU of the hidden layer, which GELU keeps itself; a regrouping of the tokens, which three branches share) the
layers below keep that tensor alone. A compiler makes such choices by itself and sees plain operations.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.forward_ad import unpack_dual

from vip.models.products import Linear, linear, weight_gradient

# Of each size in bytes, a type to copy by.
WORDS = {word.itemsize: word for word in (torch.int8, torch.int16, torch.int32, torch.int64, torch.complex128)}


class Mlp(nn.Module):
    """Two linear layers with GELU between them, which is not stored; as wide at the end as at the beginning unless told."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int | None = None, **factory: Any) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim, **factory)
        self.fc2 = Linear(hidden_dim, out_dim or dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        x = self.fc1(x)
        if torch.jit.is_scripting():
            return self.fc2(F.gelu(x))
        return gelu_linear(x, self.fc2)


def gelu_linear(x: Tensor, layer: nn.Linear | nn.Conv2d) -> Tensor:
    """layer(gelu(x)): (..., C_in) -> (..., C_out)."""
    if may_bypass(layer):
        return _GeluLinear.apply(*autocast(x, layer.weight, layer.bias))
    return layer(F.gelu(x))


def regrouped_linear(x: Tensor, layer: nn.Linear, axes: list[int]) -> Tensor:
    """`layer` on the last two of `axes` as one: 5-D -> the same shape."""
    if may_bypass(layer):
        return _RegroupedLinear.apply(*autocast(x, layer.weight), axes)
    return regroup_back(layer(regroup(x, axes)), x, axes)


def regroup(x: Tensor, axes: list[int]) -> Tensor:
    """The 5-D x with its axes in another order, the last two as one."""
    return _in_order(x, axes).flatten(3)


def regroup_back(y: Tensor, x: Tensor, axes: list[int]) -> Tensor:
    """The inverse: y in the shape of x, contiguous."""
    inverse = [axes.index(axis) for axis in range(5)]
    return _in_order(y.view([x.shape[axis] for axis in axes]), inverse).contiguous()


def _in_order(x: Tensor, axes: list[int]) -> Tensor:
    """x.permute(axes), the last axis where it was: where nothing looks on, a copy, made by the largest words of that axis.

    A copy takes its time by the element: 6 numbers of bfloat16 take half of it as 3 words of 4 bytes, 8 as one of 16.
    """
    if torch.jit.is_scripting():
        return x.permute(axes)
    if _is_watched(x) or x.device.type not in ("cpu", "cuda") or not x.is_contiguous():
        return x.permute(axes)
    size = x.element_size()
    word = WORDS[math.gcd(16, x.shape[-1] * size, x.storage_offset() * size)]
    return x.view(word).permute(axes).contiguous().view(x.dtype)


def _is_watched(x: Tensor) -> bool:
    """Whether derivatives, transforms or traces follow what is done to x, none of which see through words."""
    if torch.is_grad_enabled() or _is_traced() or is_functorch_wrapped_tensor(x):
        return True
    return unpack_dual(x).tangent is not None


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def may_bypass(layer: nn.Module) -> bool:
    """Whether `layer` may be left uncalled for its weights: not where anybody watches or has replaced it, nor when traced."""
    is_plain = type(layer) in (Linear, nn.Linear, Mlp) and not (
        layer._forward_pre_hooks or layer._forward_hooks or layer._backward_hooks
    )
    return torch.is_grad_enabled() and not _is_traced() and is_plain


class _GeluLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(F.gelu(x), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_weight = weight_gradient(grad, F.gelu(x), weight)  # first, so that the memory of GELU is free for the rest
        of_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        of_x = linear(grad, weight.mT)
        if torch.is_grad_enabled():  # to be differentiated again
            return torch.ops.aten.gelu_backward(of_x, x), of_weight, of_bias
        return torch.ops.aten.gelu_backward.grad_input(of_x, x, grad_input=of_x), of_weight, of_bias


class _RegroupedLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, axes: list[int]) -> Tensor:
        return regroup_back(linear(regroup(x, axes), weight), x, axes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, list[int]], output: Tensor) -> None:
        x, weight, ctx.axes = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad = regroup(grad, ctx.axes)
        of_weight = weight_gradient(grad, regroup(x, ctx.axes), weight)
        return regroup_back(linear(grad, weight.mT), x, ctx.axes), of_weight, None


def autocast(x: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """All in the format that autocast computes products in: cast here, where autograd sees it, not inside the function."""
    device = x.device.type
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return [x, *others]
    dtype = torch.get_autocast_dtype(device)
    return [x.to(dtype), *(None if other is None else other.to(dtype) for other in others)]
