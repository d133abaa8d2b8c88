"""Optimizers: which parameters decay, timm's by name, apex only where its kernels are, and the learning rate."""

import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import vip  # noqa: F401 - registers vip_tiny
from vip.optim import OptimizerConfig, build_optimizer, peak_lr, set_lr

CPU = torch.device("cpu")


def settings(name: str = "adamw", **options: object) -> OptimizerConfig:
    return OptimizerConfig(**{"name": name, "lr": 1e-3, "lr_batch": 1024, "weight_decay": 0.05, **options})  # type: ignore[arg-type]


@pytest.fixture
def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


@pytest.mark.parametrize("name", ["vip_tiny", "test_vit"])
def test_biases_norms_and_what_the_network_lists_are_not_decayed(name: str) -> None:
    model = timm.create_model(name, num_classes=10)
    exempt: set[str] = getattr(model, "no_weight_decay", set)()
    decay = {
        id(p): group["weight_decay"]
        for group in build_optimizer(settings(), model, CPU).param_groups
        for p in group["params"]
    }
    assert len(decay) == len(list(model.parameters()))
    for parameter_name, parameter in model.named_parameters():
        free = parameter.ndim <= 1 or parameter_name in exempt
        assert decay[id(parameter)] == (0.0 if free else 0.05), parameter_name


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adamw", "AdamW"), ("sgd", "SGD"), ("momentum", "SGD"), ("lamb", "Lamb"), ("lion", "Lion"), ("rmsprop", "RMSprop")],
)  # fmt: skip
def test_timm_s_optimizers_by_name_take_a_step(small_net: nn.Module, name: str, kind: str) -> None:
    optimizer = build_optimizer(settings(name), small_net, CPU)
    assert type(optimizer).__name__ == kind
    before = [p.detach().clone() for p in small_net.parameters()]
    small_net(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(one, other) for one, other in zip(before, small_net.parameters(), strict=True))


def test_options_reach_the_optimizer(small_net: nn.Module) -> None:
    adamw = build_optimizer(settings(betas=(0.8, 0.95), eps=1e-6), small_net, CPU)
    assert [(group["betas"], group["eps"]) for group in adamw.param_groups] == [((0.8, 0.95), 1e-6)] * 2
    sgd = build_optimizer(settings("sgd", momentum=0.7), small_net, CPU)
    assert {(group["momentum"], group["nesterov"]) for group in sgd.param_groups} == {(0.7, True)}
    with pytest.raises(ValueError, match=r"optimizer.betas=\(0.9, 0.99\): sgd has no betas; set it to null"):
        build_optimizer(settings("sgd", betas=(0.9, 0.99)), small_net, CPU)


def test_a_value_that_the_optimizer_refuses_names_it(small_net: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"optimizer.name=adamw: .*beta.*; change its keys"):
        build_optimizer(settings(betas=(0.9, 2.0)), small_net, CPU)


def test_second_order_optimizers_are_refused(small_net: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"optimizer.name=adahessian: needs second derivatives"):
        build_optimizer(settings("adahessian"), small_net, CPU)


def test_an_unknown_name_lists_the_known(small_net: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"optimizer.name=adamv: unknown; known are .*adamw.*apex_lamb.*sgd"):
        build_optimizer(settings("adamv"), small_net, CPU)


@pytest.mark.parametrize("name", ["fusedadamw", "bnbadamw8bit"])
def test_a_timm_optimizer_that_needs_what_is_not_here_is_a_value_error(small_net: nn.Module, name: str) -> None:
    with pytest.raises(ValueError, match=f"optimizer.name={name}: "):
        build_optimizer(settings(name), small_net, CPU)


@pytest.mark.parametrize("name", ["apex_adam", "apex_lamb"])
@pytest.mark.parametrize("without_kernels", [False, True])
def test_apex_without_its_kernels_says_how_to_get_it(
    small_net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, without_kernels: bool
) -> None:
    for module in ("apex", "apex.optimizers", "amp_C"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    if without_kernels:  # what a Python-only build leaves
        (tmp_path / "apex" / "optimizers").mkdir(parents=True)
        (tmp_path / "apex" / "__init__.py").touch()
        (tmp_path / "apex" / "optimizers" / "__init__.py").write_text("class FusedAdam: ...\nclass FusedLAMB: ...\n")
        monkeypatch.syspath_prepend(tmp_path)
    missing = "amp_C" if without_kernels else "apex"
    with pytest.raises(
        ValueError, match=rf"optimizer={name}: NVIDIA apex .*{missing}.*APEX_CUDA_EXT=1.*take optimizer="
    ) as refused:
        build_optimizer(settings(name), small_net, CPU)
    assert "\n" not in str(refused.value)


def test_peak_lr_grows_with_the_batch() -> None:
    assert peak_lr(settings(), 2048) == 2e-3
    assert peak_lr(settings(), 256) == 2.5e-4
    assert peak_lr(settings(lr_batch=None), 2048) == 1e-3


def test_set_lr_keeps_layer_scales(small_net: nn.Module) -> None:
    optimizer = build_optimizer(settings(), small_net, CPU)
    optimizer.param_groups[0]["lr_scale"] = 0.5
    set_lr(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
