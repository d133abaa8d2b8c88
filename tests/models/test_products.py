"""float32 products as convolutions: the values, gradients and graphs of torch's own linear layer."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vip  # noqa: F401 (registers the models)
from vip.models import products

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the processor and the size."""
    monkeypatch.setattr(products, "ONEDNN_IS_FASTER", True)
    monkeypatch.setattr(products, "LEAST", 0)
    monkeypatch.setattr(products, "IMAGES", 2)


def operands(lead: tuple[int, ...], c_in: int, c_out: int, bias: bool) -> list[Tensor | None]:
    leaves = [torch.randn(*lead, c_in), torch.randn(c_out, c_in), torch.randn(c_out) if bias else None]
    return [leaf if leaf is None else leaf.requires_grad_() for leaf in leaves]


def came_by_convolution(out: Tensor) -> bool:
    node = out.grad_fn
    while node is not None and not node.name().startswith("Convolution"):
        node = node.next_functions[0][0] if node.next_functions else None
    return node is not None


@settings(max_examples=40, deadline=None)
@given(
    lead=st.sampled_from([(2,), (8,), (2, 3), (2, 3, 4), (3, 1, 2, 4)]),
    c_in=st.integers(1, 70),
    c_out=st.integers(1, 70),
    bias=st.booleans(),
    permuted=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_values_and_gradients_are_those_of_torchs_layer(lead, c_in, c_out, bias, permuted, seed) -> None:
    torch.manual_seed(seed)
    leaves = operands(lead, c_in, c_out, bias)
    given = [leaf for leaf in leaves if leaf is not None]
    results = []
    for layer in (products.linear, F.linear):
        x, *weights = leaves
        out = layer(x.mT.contiguous().mT if permuted and x.dim() > 1 else x, *weights)
        first = torch.autograd.grad(out.square().sum(), given, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), given)
        results.append([out, *first, *second])
    assert came_by_convolution(results[0][0]), "the other kernel was not taken"
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-5 * max(1.0, torchs.abs().max().item()))


def test_each_sample_has_its_gradient() -> None:
    x, weight, bias = operands((5, 2, 3), 4, 6, True)

    def loss(layer, weight: Tensor, x: Tensor) -> Tensor:
        return layer(x, weight, bias).square().sum()

    ours, torchs = (
        torch.vmap(torch.func.grad(lambda w, x, layer=layer: loss(layer, w, x)), (None, 0))(weight, x)
        for layer in (products.linear, F.linear)
    )
    torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_formats_have_torchs_bits(dtype: torch.dtype) -> None:
    x, weight = torch.randn(8, 5, dtype=dtype), torch.randn(7, 5, dtype=dtype)
    assert torch.equal(products.linear(x, weight), F.linear(x, weight))


def test_a_gradient_of_the_weights_is_that_of_torchs_layer() -> None:
    x, weight, _ = operands((4, 3), 7, 5, False)
    grad = torch.randn(4, 3, 5)
    (expected,) = torch.autograd.grad(F.linear(x, weight), weight, grad)
    torch.testing.assert_close(products.weight_gradient(grad, x, weight), expected, rtol=1e-5, atol=1e-5)


def test_a_network_has_the_gradients_of_torchs_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, images = timm.create_model("vip_tiny", img_size=16, num_classes=3), torch.randn(2, 3, 16, 16)
    parameters, results = list(model.parameters()), []
    for is_faster in (True, False):
        monkeypatch.setattr(products, "ONEDNN_IS_FASTER", is_faster)
        logits = model(images)
        results.append([logits, *torch.autograd.grad(logits.square().sum(), parameters)])
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-3, atol=1e-4 * torchs.abs().max().item())


@pytest.mark.parametrize("tokens", [2, 3])
def test_tokens_that_cannot_be_cut_have_torchs_layer(tokens: int) -> None:
    x, weight, bias = operands((tokens,), 64, 64, True)
    assert came_by_convolution(products.linear(x, weight, bias)) == (tokens % products.IMAGES == 0)


def test_what_leaves_torch_has_linear_layers() -> None:
    model = timm.create_model("vip_tiny", img_size=8, num_classes=3).eval()
    images = torch.randn(2, 3, 8, 8)
    graphs = [
        torch.export.export(model, (images,)).graph,
        torch.jit.script(model).inlined_graph,
        torch.jit.trace(model, images).inlined_graph,
    ]
    for graph in graphs:
        assert "linear" in str(graph)
        assert not re.search(r"aten[.:]+_?conv", str(graph))


def test_a_compiled_layer_takes_it_too() -> None:
    graphs = []
    layer = products.Linear(16, 16)
    torch.compile(layer, backend=lambda graph, inputs: graphs.append(str(graph.graph)) or graph, fullgraph=True)(
        torch.randn(4, 16)
    )
    assert len(graphs) == 1
    assert "conv2d" in graphs[0]
