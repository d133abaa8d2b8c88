"""The network against its literal form: the same values and gradients, fewer bytes moved."""

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import vip  # noqa: F401 (registers the models)
from scripts.bench.literal import make_literal
from scripts.bench.traffic import count
from vip.models.build import ModelConfig, build_model
from vip.models.permutator import PermutatorBlock, PermuteMlp
from vip.stochastic_depth import DropPath, StochasticDepthConfig

MEGABYTES = {"vip_s7": 700, "vip_l7": 1866}  # 0.62 of what the literal form moves
TOLERANCE = {torch.float64: (1e-10, 1e-10), torch.float32: (1e-4, 1e-4), torch.bfloat16: (0.1, 0.04)}


def make_block(
    num_segments: int, grid: tuple[int, int], mixer: str, dtype: torch.dtype = torch.float32
) -> PermutatorBlock:
    dim = 4 * num_segments
    attn = PermuteMlp(dim, 4, grid, mixer, dtype=dtype)  # type: ignore[arg-type]
    return PermutatorBlock(dim, attn, 3.0, DropPath(0.4), dtype=dtype)


def step(block: nn.Module, x: Tensor, direction: Tensor, autocast: bool) -> list[Tensor]:
    """The output and all gradients."""
    torch.manual_seed(1)  # the same samples are dropped
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = block(x)
    return [out, *torch.autograd.grad(out, [x, *block.parameters()], direction.to(out.dtype))]


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    num_segments=st.integers(1, 4),
    mixer=st.sampled_from(["weighted", "plain"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    training=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_block_equals_the_literal_one(batch, grid, num_segments, mixer, dtype, training, seed):
    torch.manual_seed(seed)
    autocast = dtype == torch.bfloat16
    full = torch.float32 if autocast else dtype
    block = make_block(num_segments, grid, mixer, full).train(training)
    literal = make_literal(copy.deepcopy(block))
    x = torch.randn(batch, *grid, 4 * num_segments, dtype=full, requires_grad=True)
    direction = torch.randn_like(x)
    rtol, atol = TOLERANCE[dtype]
    for fast, slow in zip(step(block, x, direction, autocast), step(literal, x, direction, autocast), strict=True):
        scale = max(1.0, slow.abs().max().item())
        torch.testing.assert_close(fast.to(full), slow.to(full), rtol=rtol, atol=atol * scale)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_block_is_whole_and_equal(autocast: bool) -> None:
    torch.manual_seed(0)
    block = make_block(2, (3, 5), "weighted")
    x, direction = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(2))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    rtol, atol = TOLERANCE[torch.bfloat16 if autocast else torch.float32]
    for one, other in zip(step(compiled, x, direction, autocast), step(block, x, direction, autocast), strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol * max(1.0, other.abs().max().item()))


def test_norms_stay_narrow_under_autocast_alone() -> None:
    block = make_block(2, (3, 5), "weighted")
    seen: list[torch.dtype] = []
    block.norm1.register_forward_hook(lambda _, inputs, out: seen.append(out.dtype))
    x = torch.randn(2, 3, 5, 8)
    block(x)
    with torch.autocast("cpu", torch.bfloat16):
        block(x)
    assert seen == [torch.float32, torch.bfloat16]
    assert block.norm1.weight.dtype == torch.float32


@pytest.mark.parametrize("name", MEGABYTES)
def test_a_training_step_moves_few_bytes(name: str) -> None:
    assert sum(count(lambda: timm.create_model(name), 32, torch.float16).values()) <= MEGABYTES[name] * 1e6


@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_by_configuration_keeps_every_bit(autocast: bool) -> None:
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build_model(ModelConfig("vip_tiny", StochasticDepthConfig(0.4), checkpointing=checkpointing), 10)
        torch.manual_seed(1)  # the same blocks are dropped, again in the backward pass
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(torch.randn(4, 3, 32, 32)).float().logsumexp(1).sum()
        loss.backward()
        results.append([loss.detach(), torch.rand(1), *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_network_that_cannot_checkpoint_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.checkpointing=true: convit_tiny cannot .* model.checkpointing=false"):
        build_model(ModelConfig("convit_tiny", StochasticDepthConfig(), checkpointing=True), 10)
