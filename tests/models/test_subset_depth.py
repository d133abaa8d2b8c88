"""Stochastic depth that skips what it drops: what is kept, what it computes, and that nothing else changes."""

import copy
import dataclasses
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import vip  # noqa: F401 (registers the models)
from scripts.bench.literal import make_literal
from tests.test_engine import CLASSES, parameters, settings, sums, trainer_of
from vip.models.build import ModelConfig, build_model, compile_model
from vip.models.permutator import PermutatorBlock, PermuteMlp
from vip.stochastic_depth import StochasticDepthConfig, SubsetDropPath, set_drop_path_rate


def tiny(rate: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vip_tiny", num_classes=10, drop_path_rate=rate, drop_path_mode="subset").train()


def make_block(rate: float, dtype: torch.dtype = torch.float32) -> PermutatorBlock:
    torch.manual_seed(0)
    attn = PermuteMlp(8, 4, (2, 3), "weighted", dtype=dtype)
    return PermutatorBlock(8, attn, 3.0, SubsetDropPath(rate), dtype=dtype)


def step(model: nn.Module, images: Tensor, autocast: bool = False) -> list[Tensor]:
    """Logits and all gradients, of the same draw each time."""
    model.zero_grad()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(images)
    logits.float().logsumexp(1).sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("batch", "rate", "num_kept"),
    [(16, 0.1, 14), (16, 0.3, 11), (10, 0.05, 10), (10, 0.25, 8), (2, 0.99, 1), (1, 0.5, 1)],
)
def test_as_many_samples_go_through_the_layers_as_the_rate_says(batch: int, rate: float, num_kept: int) -> None:
    block, seen = make_block(rate), []
    for layer in (block.attn, block.mlp):
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[0]))
    x = torch.randn(batch, 2, 3, 8)
    out = block(x)
    assert seen == [num_kept] * 2
    assert block.drop_path.num_kept(batch) == num_kept
    untouched = (out == x).flatten(1).all(1).sum().item()  # by neither branch
    assert untouched <= batch - num_kept


@pytest.mark.parametrize("autocast", [False, True])
def test_it_equals_the_literal_form_that_computes_all_and_masks(autocast: bool) -> None:
    model = tiny()
    literal = make_literal(copy.deepcopy(model))
    images = torch.randn(9, 3, 32, 32)
    for fast, slow in zip(step(model, images, autocast), step(literal, images, autocast), strict=True):
        error = (fast - slow).norm() / slow.norm()
        assert error < (0.05 if autocast else 1e-5)


def test_gradients_in_float64() -> None:
    block = make_block(0.4, torch.float64)

    def fixed_draw(x: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(1)
        return block(x)

    x = torch.randn(4, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fixed_draw, (x, *block.parameters()), fast_mode=True)


def test_expectation_is_that_of_the_branch() -> None:
    """One branch: the mean over draws nears the output without drops, for every sample."""
    block = make_block(0.4)
    x = torch.randn(5, 2, 3, 8)
    with torch.no_grad():
        mean = torch.stack([block.drop_path.add(x, block.norm1, block.attn) for _ in range(3000)]).mean(0)
        branch = block.attn(block.norm1(x))
    torch.testing.assert_close(mean - x, branch, rtol=0.1, atol=0.02 * branch.abs().max().item())


def test_blocks_and_branches_draw_apart_and_follow_the_seed() -> None:
    drop_path = SubsetDropPath(0.5)
    draws = [drop_path.draw(torch.empty(32, 1)).tolist() for _ in range(20)]
    assert all(len(set(draw)) == 16 for draw in draws)
    assert len({tuple(draw) for draw in draws}) == 20
    images = torch.randn(8, 3, 32, 32)
    model = tiny()
    assert all(torch.equal(one, other) for one, other in zip(step(model, images), step(model, images), strict=True))


def test_evaluation_and_rate_zero_change_nothing() -> None:
    model, plain = tiny(), timm.create_model("vip_tiny", num_classes=10)
    plain.load_state_dict(model.state_dict())
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(model.eval()(images), plain.eval()(images))
    set_drop_path_rate(model, 0.0)
    assert torch.equal(model.train()(images), plain.train()(images))


@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointed_blocks_keep_every_bit(autocast: bool) -> None:
    model, images = tiny(), torch.randn(8, 3, 32, 32)
    stored = [tensor.clone() for tensor in step(model, images, autocast)]
    model.set_grad_checkpointing()
    assert all(torch.equal(one, other) for one, other in zip(stored, step(model, images, autocast), strict=True))


def test_scripted_network_drops_the_same_samples() -> None:
    model, images = tiny(), torch.randn(8, 3, 32, 32)
    scripted = torch.jit.script(model)
    torch.manual_seed(3)
    expected = model(images)
    torch.manual_seed(3)
    torch.testing.assert_close(scripted.train()(images), expected, rtol=1e-4, atol=1e-5)


def test_rates_follow_the_depth_and_every_image_counts() -> None:
    model = tiny(0.5)
    set_drop_path_rate(model, 0.4, "uniform")
    rates = [module.rate for module in model.modules() if isinstance(module, SubsetDropPath)]
    assert rates == [0.4] * 6
    step(model, torch.randn(3, 3, 32, 32))
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("over_training", ["constant", "ramp"])
def test_resumed_run_ends_with_the_same_bits(tmp_path: Path, over_training: str) -> None:
    run = settings("model.drop_path.rate=0.4", "model.drop_path.mode=subset", "max_steps=4",
                   f"model.drop_path.over_training={over_training}", runs_dir=tmp_path)  # fmt: skip

    def network() -> nn.Module:
        return build_model(dataclasses.replace(run.model, name="vip_tiny"), CLASSES)

    torch.manual_seed(0)
    whole, _ = trainer_of(run, network())
    torch.manual_seed(0)
    cut, _ = trainer_of(run, network())
    batches = whole.parts.batches(0, 0)
    for number in range(4):
        whole.train_step(batches, number, sums())
    batches = cut.parts.batches(0, 0)
    for number in range(2):
        cut.train_step(batches, number, sums())
    torch.manual_seed(99)  # a fresh process, which drew other numbers before
    resumed, _ = trainer_of(run, network())
    resumed.parts.model.load_state_dict(cut.parts.model.state_dict())
    resumed.parts.optimizer.load_state_dict(copy.deepcopy(cut.parts.optimizer.state_dict()))
    batches = resumed.parts.batches(2, 0)
    for number in (2, 3):
        resumed.train_step(batches, number, sums())
    assert torch.equal(parameters(whole), parameters(resumed))
    assert not torch.equal(parameters(whole), parameters(cut))


def test_network_of_timm_is_refused() -> None:
    config = ModelConfig("resnet18", StochasticDepthConfig(0.1, mode="subset"))
    with pytest.raises(
        ValueError, match=r"^model.drop_path.mode=subset: resnet18 .* set model.drop_path.mode=bernoulli$"
    ):
        build_model(config, 10)


def test_each_shape_of_block_is_compiled_once_whatever_the_rate(graphs: list[torch.fx.GraphModule]) -> None:
    model, images = tiny(), torch.randn(16, 3, 32, 32)
    eager = [tensor.clone() for tensor in step(model, images)]
    compile_model(model)
    for one, other in zip(step(model, images), eager, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * max(1.0, other.abs().max().item()))
    assert len(graphs) == 4  # two branches in each of two stages
    for rate in (0.0, 0.1, 0.3, 0.8):
        set_drop_path_rate(model, rate)
        step(model, images)
        step(model, images[:8])
    assert len(graphs) == 4
    averaged = copy.deepcopy(model).eval()
    with torch.no_grad():
        averaged.network[0][0].mlp.fc2.weight.mul_(2)
    with torch.compiler.set_stance("force_eager"):
        assert not torch.equal(averaged(images), model.eval()(images))
    assert len(graphs) == 4
