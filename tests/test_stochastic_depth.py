"""Stochastic depth: the rate over the run and over the blocks, and what a dropped block does."""

import pytest
import timm
import torch
from timm.layers import DropPath as TimmDropPath
from torch import nn

import vip  # noqa: F401 (registers the models)
from vip.stochastic_depth import DropPath, StochasticDepthConfig, depth_rates, rate_at, set_drop_path_rate


def vip_rates(model: nn.Module) -> list[float]:
    return [module.rate.item() for module in model.modules() if isinstance(module, DropPath)]


@pytest.mark.parametrize(
    ("over_training", "expected"),
    [
        ("constant", [0.2] * 5),
        ("ramp", [0.0, 0.05, 0.1, 0.15, 0.2]),
        ("early", [0.2, 0.2, 0.0, 0.0, 0.0]),
        ("late", [0.0, 0.0, 0.2, 0.2, 0.2]),
    ],
)
def test_rate_over_training(over_training: str, expected: list[float]) -> None:
    config = StochasticDepthConfig(0.2, over_training=over_training, switch_at=0.4)
    assert [rate_at(config, step, 5) for step in range(5)] == pytest.approx(expected)


@pytest.mark.parametrize("over_training", ["constant", "ramp", "early", "late"])
def test_early_and_late_share_the_run_and_one_step_is_a_run(over_training: str) -> None:
    config = StochasticDepthConfig(0.3, over_training=over_training, switch_at=1.0 if over_training == "early" else 0.0)
    assert rate_at(config, 0, 1) == 0.3


def test_rate_over_depth() -> None:
    assert depth_rates(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert depth_rates(0.3, 3, "uniform") == [0.3] * 3
    assert depth_rates(0.3, 1) == [0.3]


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_impossible_rates_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=f"rate {rate} is impossible: give a rate from 0 to below 1"):
        timm.create_model("vip_tiny", drop_path_rate=rate)


def test_branches_are_dropped_whole_per_sample_and_keep_their_mean() -> None:
    torch.manual_seed(0)
    dropped = DropPath(0.25)(torch.ones(4000, 2, 3, 4)).flatten(1)
    assert (dropped == dropped[:, :1]).all()
    assert sorted(set(dropped[:, 0].tolist())) == pytest.approx([0.0, 1 / 0.75])
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.04)


def test_evaluation_and_rate_zero_change_nothing() -> None:
    x = torch.randn(8, 2, 2, 3)
    assert torch.equal(DropPath(0.9).eval()(x), x)
    assert torch.equal(DropPath(0.0)(x), x)


def test_half_precision_stays_half() -> None:
    assert DropPath(0.5)(torch.ones(4, 1, 1, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_network_built_without_has_no_modules_for_it() -> None:
    model = timm.create_model("vip_tiny")
    assert not vip_rates(model)
    set_drop_path_rate(model, 0.0)
    with pytest.raises(ValueError, match="no block to act on: build VisionPermutator with drop_path_rate above 0"):
        set_drop_path_rate(model, 0.1)


def test_rates_of_our_networks() -> None:
    model = timm.create_model("vip_tiny", drop_path_rate=0.1)
    assert vip_rates(model) == pytest.approx([0.02 * i for i in range(6)])
    set_drop_path_rate(model, 0.5)
    assert vip_rates(model) == pytest.approx([0.1 * i for i in range(6)])
    set_drop_path_rate(model, 0.3, "uniform")
    assert vip_rates(model) == pytest.approx([0.3] * 6)
    set_drop_path_rate(model, 0.0)
    assert vip_rates(model) == [0.0] * 6


@pytest.mark.parametrize(
    ("name", "num_blocks"), [("convnext_atto", 12), ("swin_tiny_patch4_window7_224", 12), ("resnet18", 8)]
)
def test_rates_of_timm_networks_follow_the_depth(name: str, num_blocks: int) -> None:
    """One DropPath a block, two a block, and a first block that has None."""
    model = timm.create_model(name, drop_path_rate=0.1, device="meta")
    built = [m.drop_prob for m in model.modules() if isinstance(m, TimmDropPath)]
    set_drop_path_rate(model, 0.2)
    doubled = [m.drop_prob for m in model.modules() if isinstance(m, TimmDropPath)]
    assert doubled == pytest.approx([2 * rate for rate in built])
    assert max(doubled) == pytest.approx(0.2)
    assert len(set(doubled)) == num_blocks - 1
    set_drop_path_rate(model, 0.2, "uniform")
    assert {m.drop_prob for m in model.modules() if isinstance(m, TimmDropPath)} == {0.2}


def test_rates_of_the_mixer_become_linear() -> None:
    """timm builds it with one rate throughout."""
    model = timm.create_model("mixer_s32_224", drop_path_rate=0.1, device="meta")
    set_drop_path_rate(model, 0.7)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, TimmDropPath)]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


def test_network_without_stochastic_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="no block to act on: build VGG with drop_path_rate"):
        set_drop_path_rate(timm.create_model("vgg11", device="meta"), 0.1)


def test_schedule_changes_what_a_compiled_network_drops_without_compiling_again() -> None:
    model = timm.create_model("vip_tiny", num_classes=4, drop_path_rate=0.1).train()
    compilations = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        compilations.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    images = torch.randn(16, 3, 32, 32)
    set_drop_path_rate(model, 0.0)
    undropped = compiled(images)
    torch.testing.assert_close(undropped, model.eval()(images))
    model.train()
    set_drop_path_rate(model, 0.9, "uniform")
    assert not torch.allclose(compiled(images), undropped)
    assert len(compilations) == 1
