"""The weighted sum of the three branches of a Permute-MLP, and the gate that has the weights.

Autograd would give each branch two gradients, one by the sum and one by the mean that the gate looks at, and add them in a
pass of its own. The function here knows both before it writes either. A compiler fuses plain operations as well by itself.
"""

# ruff: noqa: N806 (capital letters are dimensions: see vip/models/permutator.py)

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vip.models.recompute import Mlp, autocast, may_bypass


def weighted_sum(x_h: Tensor, x_w: Tensor, x_c: Tensor, reweight: Mlp) -> Tensor:
    """The branches, each scaled per sample and channel by a gate that sees their mean: (B, H, W, N, S) -> the same."""
    if may_bypass(reweight) and all(may_bypass(fc) and fc.bias is not None for fc in (reweight.fc1, reweight.fc2)):
        fc1, fc2 = reweight.fc1, reweight.fc2
        return _WeightedSum.apply(*autocast(x_h, x_w, x_c, fc1.weight, fc1.bias, fc2.weight, fc2.bias))[0]
    return scaled_sum(x_h, x_w, x_c, gate_of(reweight(mean_of_sum(x_h, x_w, x_c))))


def mean_of_sum(x_h: Tensor, x_w: Tensor, x_c: Tensor) -> Tensor:
    """The mean of x_h + x_w + x_c over the grid. (B, H, W, N, S) each -> (B, C)."""
    total = _over_grid(x_h) + _over_grid(x_w) + _over_grid(x_c)
    return (total / (x_c.shape[1] * x_c.shape[2])).to(x_c.dtype)


def gate_of(logits: Tensor) -> Tensor:
    """The weights of x_h, x_w and x_c: (B, C * 3) -> (3, B, C)."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32  # as autocast has it
    return logits.view(logits.shape[0], -1, 3).permute(2, 0, 1).contiguous().softmax(0, dtype=dtype)


def scaled_sum(x_h: Tensor, x_w: Tensor, x_c: Tensor, gate: Tensor) -> Tensor:
    """(B, H, W, N, S) each, (3, B, C) -> (B, H, W, N, S)."""
    gate = _like_tokens(gate, x_c)
    return (x_c * gate[2]).addcmul_(x_h, gate[0]).addcmul_(x_w, gate[1])


class _WeightedSum(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x_h: Tensor, x_w: Tensor, x_c: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        mean = mean_of_sum(x_h, x_w, x_c)
        gate, _ = _gate(mean, *weights)
        return scaled_sum(x_h, x_w, x_c, gate), mean

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[1], *inputs)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        mean, x_h, x_w, x_c, fc1, bias1, fc2, bias2 = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            mean = mean_of_sum(x_h, x_w, x_c)
        gate, hidden = _gate(mean, fc1, bias1, fc2, bias2)
        of_gate = torch.stack([_over_grid(grad * x) for x in (x_h, x_w, x_c)])
        of_mean, *of_weights = _gate_backward(of_gate, gate, hidden, mean, fc1, fc2)
        B, H, W, N, S = x_c.shape
        of_token = (of_mean / (H * W)).view(B, 1, 1, N, S)
        gate = _like_tokens(gate, x_c)
        return (*(torch.addcmul(of_token, grad, gate[branch]) for branch in range(3)), *of_weights)


def _gate(mean: Tensor, fc1: Tensor, bias1: Tensor, fc2: Tensor, bias2: Tensor) -> tuple[Tensor, Tensor]:
    """The weights (3, B, C), and the hidden layer (B, C / 4) before its GELU."""
    hidden = F.linear(mean, fc1, bias1)
    return gate_of(F.linear(F.gelu(hidden), fc2, bias2)), hidden


def _gate_backward(
    of_gate: Tensor, gate: Tensor, hidden: Tensor, mean: Tensor, fc1: Tensor, fc2: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of what `_gate` takes, in its order."""
    of_logits = gate * (of_gate - (gate * of_gate).sum(0))
    of_logits = of_logits.permute(1, 2, 0).flatten(1).to(fc2.dtype)
    of_hidden = torch.ops.aten.gelu_backward(of_logits @ fc2, hidden)
    return (
        of_hidden @ fc1,
        of_hidden.mT @ mean,
        of_hidden.sum(0),
        of_logits.mT @ F.gelu(hidden),
        of_logits.sum(0),
    )


def _like_tokens(gate: Tensor, x: Tensor) -> Tensor:
    """(3, B, C) -> (3, B, 1, 1, N, S), in the format of x."""
    return gate.to(x.dtype).view(3, x.shape[0], 1, 1, x.shape[3], x.shape[4])


def _over_grid(x: Tensor) -> Tensor:
    """The sum over all tokens: (B, H, W, N, S) -> (B, C)."""
    # One of float16 may exceed its range. Those of bfloat16 stay narrow: a CPU takes three times as long to widen them.
    return x.sum((1, 2), dtype=torch.float32 if x.dtype == torch.float16 else x.dtype).flatten(1)
