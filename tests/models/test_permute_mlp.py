"""The fast layer against a literal one: the paper's equations with loops, channels first."""

# ruff: noqa: N806 (capital letters are dimensions: see vip/models/permutator.py)

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vip.models import Stage, VisionPermutator
from vip.models.permutator import PatchProjection, PermuteMlp

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.06}


def literal_permute_mlp(layer: PermuteMlp, x: Tensor) -> Tensor:
    """Permute-MLP and Weighted Permute-MLP, one projected vector at a time. x: (B, C, H, W), and so is the result."""
    B, C, H, W = x.shape
    S = layer.segment_dim
    x_h, x_w, x_c = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)
    for start in range(0, C, S):
        segment = slice(start, start + S)
        for column in range(W):  # all S channels of all H rows make one vector
            vector = x[:, segment, :, column].transpose(1, 2).reshape(B, H * S)
            x_h[:, segment, :, column] = (vector @ layer.mlp_h.weight.T).view(B, H, S).transpose(1, 2)
        for row in range(H):
            vector = x[:, segment, row, :].transpose(1, 2).reshape(B, W * S)
            x_w[:, segment, row, :] = (vector @ layer.mlp_w.weight.T).view(B, W, S).transpose(1, 2)
    for row in range(H):
        for column in range(W):
            x_c[:, :, row, column] = x[:, :, row, column] @ layer.mlp_c.weight.T
    mixed = x_h + x_w + x_c
    if layer.reweight is not None:
        mean = mixed.sum((2, 3)) / (H * W)
        hidden = F.gelu(mean @ layer.reweight.fc1.weight.T + layer.reweight.fc1.bias)
        scores = (hidden @ layer.reweight.fc2.weight.T + layer.reweight.fc2.bias).view(B, C, 3).exp()
        gates = (scores / scores.sum(2, keepdim=True))[:, :, :, None, None]
        mixed = gates[:, :, 0] * x_h + gates[:, :, 1] * x_w + gates[:, :, 2] * x_c
    return torch.einsum("oc,bchw->bohw", layer.proj.weight, mixed) + layer.proj.bias[:, None, None]


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    num_segments=st.integers(1, 4),
    segment_dim=st.integers(4, 6),
    mixer=st.sampled_from(["weighted", "plain"]),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 2**16),
)
def test_layer_equals_the_literal_one(batch, grid, num_segments, segment_dim, mixer, dtype, seed):
    torch.manual_seed(seed)
    C = num_segments * segment_dim
    autocast, full = dtype == torch.bfloat16, torch.float64 if dtype == torch.float64 else torch.float32
    layer = PermuteMlp(C, segment_dim, grid, mixer, dtype=full)
    x = torch.randn(batch, *grid, C, dtype=full, requires_grad=True)
    direction = torch.randn_like(x)
    inputs = [x, *layer.parameters()]

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        fast = layer(x)
    fast_gradients = torch.autograd.grad(fast, inputs, direction.to(fast.dtype))
    slow = literal_permute_mlp(layer, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    slow_gradients = torch.autograd.grad(slow, inputs, direction)

    for one, other in zip((fast, *fast_gradients), (slow, *slow_gradients), strict=True):
        tolerance = TOLERANCE[dtype]
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(one.to(full), other, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("patch_size", [2, 3])
def test_patch_projection_equals_the_strided_convolution(patch_size: int, memory_format: torch.memory_format) -> None:
    layer = PatchProjection(3, 8, patch_size, dtype=torch.float64)
    images = torch.randn(2, 3, 4 * patch_size, 5 * patch_size, dtype=torch.float64).to(memory_format=memory_format)
    tokens = layer(images.permute(0, 2, 3, 1))
    assert tokens.shape == (2, 4, 5, 8)
    assert tokens.is_contiguous()
    torch.testing.assert_close(tokens.permute(0, 3, 1, 2), layer.proj(images))


@pytest.mark.parametrize("mixer", ["weighted", "plain"])
def test_tokens_stay_contiguous_and_the_mix_is_never_copied(mixer: str) -> None:
    model = VisionPermutator([Stage(2, 8, 4), Stage(1, 16, 4)], patch_size=2, img_size=(8, 12), mixer=mixer)
    contiguous, mixed_is_view = [], []
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, inputs: contiguous.append(inputs[0].is_contiguous()))
        if isinstance(module, PermuteMlp):
            module.proj.register_forward_pre_hook(lambda _, inputs: mixed_is_view.append(inputs[0]._is_view()))
    model(torch.randn(2, 3, 8, 12))
    assert contiguous == [True] * 7
    assert mixed_is_view == [True] * 3


@pytest.mark.parametrize("mixer", ["weighted", "plain"])
def test_compiler_sees_the_network_whole(mixer: str) -> None:
    torch.manual_seed(0)
    stages = [Stage(1, 8, 4), Stage(2, 16, 4)]
    model = VisionPermutator(stages, patch_size=2, img_size=(8, 12), mixer=mixer, num_classes=5, drop_path_rate=0.3)
    images = torch.randn(2, 3, 8, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(images).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    torch.testing.assert_close(compiled(images), model(images))


def test_mixed_precision_stays_close() -> None:
    torch.manual_seed(0)
    model = VisionPermutator([Stage(1, 16, 4), Stage(2, 32, 8)], patch_size=2, img_size=16, num_classes=5)
    images = torch.randn(4, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(images), rtol=0.05, atol=0.02)
    logits.float().logsumexp(1).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
