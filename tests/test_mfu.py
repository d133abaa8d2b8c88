"""Operations are counted by the formula of each layer, and counting changes nothing."""

import copy

import pytest
import timm
import torch
from torch import nn

import vip  # noqa: F401 (registers the models)
from vip.mfu import matrix_rate, step_flops
from vip.models.build import compile_model


class Pooled(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).mean((1, 2, 3))


def test_products_count_twice_backward_and_the_first_one_once() -> None:
    network = Pooled(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False))
    pixels = 10 * 12
    first, grouped = 2 * pixels * 3 * 8, 2 * pixels * 8 * 2 * 9
    assert step_flops(network, (10, 12)) == 2 * first + 3 * grouped


@pytest.mark.parametrize(("name", "size", "gflop"), [("vip_s7", 224, 41.4), ("convnext_tiny", 224, 26.7)])
def test_known_networks_count_what_is_known_of_them(name: str, size: int, gflop: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert step_flops(model, (size, size)) / 1e9 == pytest.approx(gflop, rel=0.015)


def test_counting_sees_neither_compilation_nor_checkpointing_and_leaves_the_model_alone() -> None:
    model = timm.create_model("vip_tiny").eval()
    plain = step_flops(model, (32, 32))
    before = copy.deepcopy(model.state_dict())
    compile_model(model)
    model.set_grad_checkpointing()
    assert step_flops(model, (32, 32)) == plain
    assert not model.training
    assert model.grad_checkpointing
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_rate_of_products_is_measured_without_drawing_from_torchs_generator() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert 1e8 < matrix_rate(torch.float32, torch.device("cpu")) < 1e15
    assert torch.equal(torch.rand(3), expected)
