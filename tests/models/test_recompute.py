"""Layers with gradients of their own: their values, number formats, and what a network keeps for its backward pass."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import vip  # noqa: F401 (registers the models)
from scripts.bench.literal import make_literal
from scripts.bench.traffic import CudaRules
from vip.models.fusion import mean_of_sum, weighted_sum
from vip.models.recompute import Mlp, gelu_linear, regroup, regroup_back, regrouped_linear

ROWS, COLUMNS = [0, 2, 3, 1, 4], [0, 1, 3, 2, 4]


def plain_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(F.gelu(x), weight, bias)


def plain_rows(x: Tensor, weight: Tensor) -> Tensor:
    B, H, W, N, S = x.shape  # noqa: N806
    y = F.linear(x.permute(0, 2, 3, 1, 4).reshape(B, W, N, H * S), weight)
    return y.view(B, W, N, H, S).permute(0, 3, 1, 2, 4)


def of_gelu(dtype: torch.dtype = torch.float64, rows: int = 6) -> list[Tensor]:
    shapes = [(2, rows, 5), (3, 5), (3,)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def of_rows(dtype: torch.dtype = torch.float64, rows: int = 3) -> list[Tensor]:
    shapes = [(2, rows, 4, 2, 3), (3 * rows, 3 * rows)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def fast_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return gelu_linear(x, layer_of(weight, bias))


def fast_rows(x: Tensor, weight: Tensor) -> Tensor:
    return regrouped_linear(x, layer_of(weight), ROWS)


def of_sum(dtype: torch.dtype = torch.float64, rows: int = 3) -> list[Tensor]:
    shapes = [(3, 2, rows, 2, 2, 3), (4, 6), (4,), (18, 4), (18,)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def fast_sum(x: Tensor, *weights: Tensor) -> Tensor:
    return weighted_sum(*x, mlp_of(*weights))


def plain_sum(x: Tensor, *weights: Tensor) -> Tensor:
    mlp = mlp_of(*weights)
    mlp.register_forward_hook(lambda *_: None)  # so that it is called
    return weighted_sum(*x, mlp)


def mlp_of(fc1: Tensor, bias1: Tensor, fc2: Tensor, bias2: Tensor) -> Mlp:
    mlp = Mlp(6, 4, 18)
    mlp.fc1, mlp.fc2 = layer_of(fc1, bias1), layer_of(fc2, bias2)
    return mlp


def layer_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """With these very tensors, so that gradients reach them."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    del layer.weight, layer.bias
    layer.weight, layer.bias = weight, bias
    return layer


PAIRS = [(fast_gelu, plain_gelu, of_gelu), (fast_rows, plain_rows, of_rows), (fast_sum, plain_sum, of_sum)]


@pytest.mark.parametrize(("layer", "plain", "inputs"), PAIRS)
def test_first_and_second_derivatives(layer, plain, inputs) -> None:
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(layer, inputs())
    assert torch.autograd.gradgradcheck(layer, inputs(rows=2))


@settings(max_examples=30, deadline=None)
@given(
    pair=st.sampled_from(PAIRS),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    autocast=st.sampled_from([None, torch.bfloat16, torch.float16]),
    rows=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)
def test_outputs_have_the_bits_of_the_stored_form_and_gradients_its_values(pair, dtype, autocast, rows, seed):
    layer, plain, inputs = pair
    torch.manual_seed(seed)
    leaves = inputs(dtype, rows)
    narrow = dtype if autocast is None or dtype == torch.float64 else autocast  # as the product before it gives x
    results = []
    for form in (layer, plain):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            out = form(leaves[0].to(narrow), *leaves[1:])
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for recomputed, stored in zip(*results, strict=True):
        assert recomputed.dtype == stored.dtype
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(narrow, 2e-2)
        torch.testing.assert_close(recomputed, stored, rtol=tolerance, atol=tolerance * stored.abs().max().item())
    assert torch.equal(results[0][0], results[1][0])


@settings(max_examples=100, deadline=None)
@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    segment=st.integers(1, 40),
    offset=st.integers(0, 9),
    axes=st.sampled_from([ROWS, COLUMNS]),
    seed=st.integers(0, 2**16),
)
def test_regrouping_moves_any_bits_there_and_back(dtype, segment, offset, axes, seed) -> None:
    torch.manual_seed(seed)
    shape = (2, 3, 4, 5, segment)
    numbers = torch.randint(256, ((offset + math.prod(shape)) * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    x = numbers[offset:].view(shape)  # NaN of all kinds among them
    with torch.no_grad():
        there = regroup(x, axes)
        back = regroup_back(there, x, axes)
    assert torch.equal(bits(there), bits(x.permute(axes).flatten(3)))
    assert torch.equal(bits(back), bits(x))


def bits(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize(
    ("dtype", "segment", "offset", "word"),
    [
        (torch.bfloat16, 6, 0, torch.int32),
        (torch.bfloat16, 8, 0, torch.complex128),
        (torch.bfloat16, 8, 4, torch.int64),
        (torch.bfloat16, 7, 0, torch.int16),
        (torch.float32, 6, 0, torch.int64),
        (torch.float32, 7, 0, torch.int32),
    ],
)
def test_regrouping_copies_the_largest_words_of_a_segment(dtype, segment, offset, word) -> None:
    x = torch.randn(2 * 3 * 4 * 5 * segment + offset, dtype=dtype)[offset:].view(2, 3, 4, 5, segment)
    with torch.no_grad(), Copies() as copies:
        regroup(x, ROWS)
    assert copies.dtypes == [word]


class Copies(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.clone.default:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_regrouping_where_derivatives_and_transforms_look_on() -> None:
    x = torch.randn(2, 3, 4, 5, 6)
    expected = x.permute(ROWS).flatten(3)

    def doubled(x: Tensor) -> Tensor:
        return regroup(x, ROWS) * 2

    assert torch.autograd.functional.jacobian(lambda x: doubled(x).sum(), x).eq(2).all()
    with torch.no_grad():
        assert torch.equal(doubled(x.expand(2, 2, 3, 4, 5, 6)[1]), expected * 2)
        assert torch.equal(doubled(x.mT.contiguous().mT), expected * 2)
        assert torch.equal(torch.vmap(doubled)(x[None])[0], expected * 2)
        with forward_ad.dual_level():
            assert torch.equal(forward_ad.unpack_dual(doubled(forward_ad.make_dual(x, x))).tangent, expected * 2)
        assert torch.equal(torch.func.jvp(doubled, (x,), (x,))[1], expected * 2)
        assert "complex" not in str(torch.jit.trace(doubled, x).graph)


def test_weights_cast_for_the_layer_still_learn_from_another_use() -> None:
    """Autocast keeps casts for a step; one made without a graph would cut off every later use of the weights."""
    x, weight = of_rows(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        fast_rows(x, weight)
        alone = F.linear(torch.ones(1, len(weight)), weight)
    alone.sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


def test_sums_over_the_grid_may_exceed_float16() -> None:
    branches = [torch.full((1, 32, 32, 2, 3), 100, dtype=torch.float16, requires_grad=True) for _ in range(3)]
    assert mean_of_sum(*branches).unique().item() == 300
    weights = [weight.detach().half().requires_grad_() for weight in of_sum()[1:]]
    fast_sum(branches, *weights).backward(torch.full_like(branches[0], 100))
    assert all(leaf.grad.isfinite().all() for leaf in (*branches, *weights))


def test_frozen_weights_and_inputs_are_left_alone() -> None:
    mlp = Mlp(4, 8)
    mlp.fc2.requires_grad_(False)
    mlp(torch.randn(3, 4)).sum().backward()
    assert mlp.fc2.weight.grad is None
    assert mlp.fc1.weight.grad is not None
    mlp.requires_grad_(False)
    assert not mlp(torch.randn(3, 4)).requires_grad


def test_layers_that_are_watched_or_replaced_are_called() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vip_tiny", num_classes=3, img_size=8)
    block = model.network[0][0]
    expected, called = model(torch.ones(2, 3, 8, 8)), []
    watched = [block.mlp.fc2, block.attn.mlp_h, block.attn.mlp_w, block.attn.reweight.fc1, block.attn.reweight]
    for layer in watched:
        layer.register_forward_hook(lambda layer, inputs, out: called.append(layer))
    assert torch.equal(model(torch.ones(2, 3, 8, 8)), expected)
    assert set(called) == set(watched)
    for owner, name in ((block.mlp, "fc2"), (block.attn, "reweight")):
        layer = getattr(owner, name)
        setattr(owner, name, nn.Sequential(layer, nn.Sigmoid()))  # as adapters do
        assert not torch.equal(model(torch.ones(2, 3, 8, 8)), expected)
        setattr(owner, name, layer)
    block.attn.reweight.fc1 = nn.Linear(*block.attn.reweight.fc1.weight.T.shape, bias=False)
    model(torch.ones(2, 3, 8, 8)).sum().backward()
    assert block.attn.reweight.fc1.weight.grad is not None


def test_gradients_of_each_sample_by_function_transforms() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vip_tiny", num_classes=3, img_size=8).eval()
    parameters, images = dict(model.named_parameters()), torch.randn(2, 3, 8, 8)

    def loss(values: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (image[None],)).logsumexp(1).sum()

    of_each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, images)
    model(images).logsumexp(1).sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(of_each[name].sum(0), parameter.grad, rtol=1e-4, atol=1e-5)


def test_traced_network_holds_no_python() -> None:
    model = timm.create_model("vip_tiny", num_classes=3, img_size=8).eval()
    images = torch.randn(2, 3, 8, 8)
    traced = torch.jit.trace(model, images)
    assert "PythonOp" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(images), model(images))


def stored_mebibytes(name: str, is_literal: bool, dtype: torch.dtype) -> float:
    """What a forward pass of 8 images keeps for the backward pass, beside the parameters, in a GPU's formats."""
    kept: list[Tensor] = []  # all of them held, or storages would be met twice

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with FakeTensorMode():
        model: nn.Module = timm.create_model(name, drop_path_rate=0.1).train()
        model = make_literal(model) if is_literal else model
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), CudaRules():
                logits = model(torch.empty(8, 3, 224, 224))
            F.cross_entropy(logits.float(), torch.empty(logits.shape))
        own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        sizes = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for storage, size in sizes.items() if storage not in own) / 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_training_step_stores_seven_tenths_of_the_literal_form(dtype: torch.dtype) -> None:
    literal = stored_mebibytes("vip_s7", True, dtype)
    assert stored_mebibytes("vip_s7", False, dtype) <= 0.70 * literal
    if dtype == torch.float32:
        assert literal == pytest.approx(1071.5, abs=1), "another yardstick"
