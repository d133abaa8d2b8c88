"""Bytes that a compiled training step moves: inductor's own count of the kernels it would make, without a GPU.

The blocks of a Vision Permutator are traced, split into a forward and a backward graph, lowered and fused as for Triton
on a GPU of Hopper's properties; before any code is written the kernels' inputs and outputs are summed, products included. What
lies between the blocks stays eager, as in `compile_model`, and is counted as eager operations are (scripts/bench/traffic.py).
"""

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from scripts.bench import traffic
from vip.models.permutator import PermutatorBlock


def can_count() -> bool:
    """Whether inductor can be asked here: it needs triton, which comes with torch's builds for CUDA."""
    return importlib.util.find_spec("triton") is not None


def count(
    build: Callable[[], nn.Module], batch: int, dtype: torch.dtype, size: tuple[int, int] = (224, 224)
) -> tuple[int, int]:
    """Bytes per image of a forward and a backward pass in autocast to `dtype`: of compiled blocks, and of the rest.

    Args:
        build: makes a Vision Permutator.
        batch: images; a batch shares the weights' bytes.
    """
    blocks = _Blocks()
    torch._dynamo.reset()
    model = traffic.without_values(build)
    with FakeTensorMode(allow_non_fake_inputs=True), torch._dynamo.config.patch(cache_size_limit=64):
        model.to_empty(device="cpu").train()
        for block in _paths(model).values():
            block.compile(backend=blocks.compile, fullgraph=True, dynamic=False)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), traffic.CudaRules():
            model(torch.empty(batch, 3, *size))
    torch._dynamo.reset()
    rest = traffic.count(lambda: _without_blocks(build()), batch, dtype, size)
    return blocks.num_bytes // batch, sum(rest.values())


def _paths(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if isinstance(module, PermutatorBlock)}


def _without_blocks(model: nn.Module) -> nn.Module:
    for path in _paths(model):
        model.set_submodule(path, nn.Identity())
    return model


class _Blocks:
    """A backend of torch.compile that counts: what each graph moves is added whenever a block runs it."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def compile(self, graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        from torch._functorch import config
        from torch._inductor.compile_fx import compile_fx

        counted: list[
            int
        ] = []  # of the forward graph, and of the backward graph, which else would wait for its first use

        def lower(part: fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
            counted.append(_fused_bytes(part, inputs, options))
            return part

        with config.patch(force_non_lazy_backward_lowering=True):
            compile_fx(graph, _like(inputs), inner_compile=lower)

        def run(*args: Any) -> Any:
            self.num_bytes += sum(counted)
            return graph(*args)

        return run


class _Counted(BaseException):
    """Ends a compilation before it writes code: no Exception, so that nobody on the way takes it for a failure."""


def _fused_bytes(graph: fx.GraphModule, inputs: list[Any], options: dict[str, Any]) -> int:
    """What the kernels of a graph of aten operations read and write, moved to a GPU that need not be there."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    found: list[int] = []

    def stop(lowered: GraphLowering) -> None:
        lowered._update_scheduler()  # which fuses
        found.append(lowered.count_bytes()[0])
        raise _Counted

    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    moved = _like(inputs, "cuda:0")
    FakeTensorProp(graph, torch._guards.detect_fake_mode(moved)).propagate_dont_convert_inputs(*moved)
    with (
        _as_on_a_gpu(),
        config.patch(force_disable_caches=True),
        mock.patch.object(GraphLowering, "codegen", stop),
        warnings.catch_warnings(action="ignore"),  # inductor's hints about reductions
        suppress(_Counted),
    ):
        compile_fx_inner(graph, moved, **options)
    return found[0]


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Inductor asks the device for the number of its processors, to split reductions; it does not reach for a GPU otherwise."""
    from torch._inductor.runtime.hints import DeviceProperties

    hopper = DeviceProperties("cuda", 0, 132, 90, 9, 65536, 2048, 1024, 32)
    with (
        mock.patch.object(DeviceProperties, "create", return_value=hopper),
        mock.patch("torch._inductor.scheduler.has_triton", return_value=True),
    ):
        yield


def _like(inputs: list[Any], device: str | None = None) -> list[Any]:
    """Tensors of the same layout that belong to the compilation that is under way."""
    context = torch._guards.TracingContext.try_get()
    assert context is not None
    assert context.fake_mode is not None
    with context.fake_mode:
        return [
            torch.empty_strided(
                each.shape, each.stride(), dtype=each.dtype, device=device, requires_grad=each.requires_grad
            )
            if isinstance(each, Tensor)
            else each
            for each in inputs
        ]
