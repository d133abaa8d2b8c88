"""The Vision Permutator as its equations are usually written down: the yardstick that the shape of `vip.models` is held to.

Same parameters, same results, other memory traffic: patches by convolution, so that the residual stream lies channels-first
behind a permuted view; every branch copied to its regrouped order and back; the sum of the branches built to be averaged;
linear layers, GELU, norm and residual sum as torch and autocast have them.

B batch, H rows, W columns, C channels = N segments of S.
"""

# ruff: noqa: N806 (capital letters are dimensions)

from collections.abc import Callable
from types import MethodType

import torch.nn.functional as F
from torch import Tensor, nn

from vip.models.permutator import LayerNorm, Linear, Mlp, PatchProjection, PermutatorBlock, PermuteMlp


def make_literal(model: nn.Module) -> nn.Module:
    """Replace the forward passes of `model`'s layers, in place, by the literal ones; its parameters stay."""
    forwards: dict[type, Callable[..., Tensor]] = {
        PatchProjection: _project_patches,
        PermuteMlp: _permute_mlp,
        Mlp: _mlp,
        LayerNorm: nn.LayerNorm.forward,
        Linear: nn.Linear.forward,
        PermutatorBlock: _block,
    }
    for module in model.modules():
        if type(module) in forwards:
            module.forward = MethodType(forwards[type(module)], module)
    return model


def _project_patches(layer: PatchProjection, x: Tensor) -> Tensor:
    """(B, H*P, W*P, C_in) -> (B, H, W, C), a view of (B, C, H, W)."""
    return layer.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _permute_mlp(layer: PermuteMlp, x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, H, W, C)."""
    B, H, W, C = x.shape
    S = layer.segment_dim
    N = C // S
    segments = x.reshape(B, H, W, N, S)
    h = layer.mlp_h(segments.permute(0, 3, 2, 1, 4).reshape(B, N, W, H * S))
    h = h.reshape(B, N, W, H, S).permute(0, 3, 2, 1, 4).reshape(B, H, W, C)
    w = layer.mlp_w(segments.permute(0, 1, 3, 2, 4).reshape(B, H, N, W * S))
    w = w.reshape(B, H, N, W, S).permute(0, 1, 3, 2, 4).reshape(B, H, W, C)
    c = layer.mlp_c(x)
    if layer.reweight is None:
        return layer.proj(h + w + c)
    mean = (h + w + c).permute(0, 3, 1, 2).flatten(2).mean(2)
    gate = layer.reweight(mean).reshape(B, C, 3).permute(2, 0, 1).softmax(dim=0)[:, :, None, None, :]
    return layer.proj(h * gate[0] + w * gate[1] + c * gate[2])


def _mlp(layer: Mlp, x: Tensor) -> Tensor:
    return layer.fc2(F.gelu(layer.fc1(x)))


def _block(layer: PermutatorBlock, x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, H, W, C)."""
    x = x + layer.drop_path(layer.attn(layer.norm1(x)))
    return x + layer.drop_path(layer.mlp(layer.norm2(x)))
