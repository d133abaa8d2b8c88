"""Regional compilation: as many graphs as there are kinds of block, whatever comes after the first step; inductor on a CPU."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.profiler import ProfilerActivity, profile

import vip  # noqa: F401 (registers the models)
from vip.models import products
from vip.models.build import compile_model
from vip.models.permutator import Stage, VisionPermutator
from vip.stochastic_depth import set_drop_path_rate


def step(model: nn.Module, images: Tensor, autocast: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(images)
    logits.float().logsumexp(1).sum().backward()


@pytest.mark.parametrize(
    ("name", "size", "checkpointing", "autocast"),
    [("vip_l7", 28, False, False), ("vip_tiny", 32, False, True), ("vip_tiny", 32, True, False)],
)
def test_equal_blocks_share_a_graph_and_later_steps_add_none(
    graphs: list[torch.fx.GraphModule], name: str, size: int, checkpointing: bool, autocast: bool
) -> None:
    model = timm.create_model(name, num_classes=3, img_size=size, drop_path_rate=0.3).train()
    model.set_grad_checkpointing(checkpointing)
    images = torch.randn(3, 3, size, size)
    compile_model(model)
    step(model, images, autocast)
    assert len(graphs) == 2  # two widths of blocks, 8 and 28 of them in vip_l7
    set_drop_path_rate(model, 0.1, "uniform")
    step(model, images, autocast)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():  # as evaluate does
        model.eval()(torch.randn(5, 3, size, size))
    step(model.train(), images, autocast)
    assert len(graphs) == 2


def test_another_number_of_images_is_the_only_thing_that_compiles_again(graphs: list[torch.fx.GraphModule]) -> None:
    model = timm.create_model("vip_tiny", num_classes=3, drop_path_rate=0.1).train()
    compile_model(model)
    for batch, num_graphs in ((4, 2), (4, 2), (3, 4), (4, 4), (3, 4)):
        step(model, torch.randn(batch, 3, 32, 32), autocast=False)
        assert len(graphs) == num_graphs


def test_on_a_cpu_gelu_and_softmax_are_left_to_torchs_own_kernels() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)

    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(super().forward(x)).softmax(1)

    model = Layer(5, 6)
    x = torch.randn(4, 5, requires_grad=True)

    def results() -> list[Tensor]:
        out = model(x)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])]

    expected = results()
    compile_model(model)
    results()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        compiled = results()
    for one, other in zip(compiled, expected, strict=True):
        torch.testing.assert_close(one, other)
    kernels = {event.name for event in seen.events()}
    assert {"aten::gelu", "aten::gelu_backward", "aten::_softmax"} <= kernels
    assert "aten::_softmax_backward_data" not in kernels, "it ran as it is"


@pytest.mark.parametrize("convolved", [False, True])
def test_on_a_cpu_loops_neither_divide_nor_transpose_nor_wait(monkeypatch: pytest.MonkeyPatch, convolved: bool) -> None:
    monkeypatch.setattr(products, "ONEDNN_IS_FASTER", convolved)
    monkeypatch.setattr(products, "LEAST", 0)
    torch._dynamo.reset()
    model = VisionPermutator([Stage(1, 48, 6)], patch_size=4, img_size=32, num_classes=3)
    compile_model(model)
    with fresh_cache():  # what is cached shows no code
        _, programs = run_and_get_code(step, model, torch.randn(8, 3, 32, 32), autocast=False)
    assert len(programs) == 2, "forward and backward"
    for program in programs:
        assert ("ops.aten.convolution" in program) == convolved
        assert "div_floor_integer" not in program
        assert program.count("transpose_mxn") <= 1, "that of the gate's logits alone"
        assert not re.search(r"in_out_ptr\d+ \+ .*6L\)", program), "segments written over others"


class Normed(nn.Linear):
    def __init__(self) -> None:
        super().__init__(64, 48)
        self.norm = nn.LayerNorm(48)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


def test_on_a_cpu_gradients_summed_over_many_rows_stay_in_the_cache() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Normed()
    x = torch.randn(32, 64, 64)

    def gradients(x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(x).square().sum(), list(model.parameters()))

    expected = gradients(x)
    compile_model(model)
    with fresh_cache():
        found, (_, backward) = run_and_get_code(gradients, x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-2)
    assert "x1<static_cast<int64_t>(2048L)" not in backward, "a loop over all rows within one over columns"


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = x * self.scale
        y = x.view(-1, 1, 2, x.shape[1] // 2)
        whole = [x.sum(), x.sum(None), x[:, 0].sum(())]
        rows = [x.sum(0), x.sum(0, keepdim=True), x.sum(0, dtype=torch.float64), x.sum(1), (x > 0.5).sum(0)]
        narrow = [x.bfloat16().sum(0), x.bfloat16().sum(0, dtype=torch.float32)]
        grids = [y.sum((0, 1, 2)), y.sum((0, 1, 2), keepdim=True), y.sum((0, 2)), y.sum((0, 1)), y.sum(-1)]
        return whole + rows + narrow + grids


@pytest.mark.parametrize("rows", [1, 2048, 2047])
def test_on_a_cpu_sums_are_those_of_torch(rows: int) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Sums(), torch.rand(rows, 8)
    with torch.no_grad(), fresh_cache():
        expected = model(x)
        compile_model(model)
        found = model(x)
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        torch.testing.assert_close(one, other, rtol=5e-3, atol=0)
