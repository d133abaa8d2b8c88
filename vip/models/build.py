"""From configuration to network: ours and timm's by name, through timm's own factory, so that there is one way."""

import difflib
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Annotated, Any

import timm
import torch
from pydantic import Field
from torch import Tensor, fx, nn
from torch._prims_common import infer_size, make_contiguous_strides_for

from vip import apex_kernels
from vip.models.permutator import PermutatorBlock, VisionPermutator
from vip.models.variants import VARIANTS
from vip.stochastic_depth import StochasticDepthConfig, SubsetDropPath

ROWS = 32  # to sum at a time


@dataclass(frozen=True)
class ModelConfig:
    name: Annotated[str, Field(description="any name timm.create_model knows; vip_* are registered there")]
    drop_path: Annotated[StochasticDepthConfig, Field(description="stochastic depth")]
    img_size: Annotated[
        int | tuple[int, int] | None, Field(description="side, or [height, width], in pixels; null: the network's own")
    ] = None
    mixer: Annotated[
        str | None,
        Field(pattern="^(weighted|plain)$", description="how the branches are fused: weighted or plain (ViP alone)"),
    ] = None
    drop_rate: Annotated[float, Field(ge=0, lt=1, description="dropout before the classifier")] = 0.0
    fused_norm: Annotated[
        bool,
        Field(description="NVIDIA apex's kernel in place of torch's for every LayerNorm; the weights are the same"),
    ] = False
    checkpointing: Annotated[
        bool, Field(description="activation checkpointing: blocks run again in the backward pass, for less memory")
    ] = False


@dataclass(frozen=True)
class InputSpec:
    """What a network wants to see: `size` (H, W) in pixels, channel `mean` and `std` of images in [0, 1], test crop."""

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float


def build_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """The network, on the CPU, initialised from torch's current seed.

    Raises ValueError for an unknown name (with near ones), for options that the network does not take, and where
    `fused_norm` has no kernel or nothing to replace.
    """
    if not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name, timm.list_models(), n=3)
        raise ValueError(
            f"model.name={config.name}: no such network; near: {', '.join(near) or 'none (see timm.list_models())'}"
        )
    options: dict[str, Any] = {"num_classes": num_classes, "drop_rate": config.drop_rate}
    if config.drop_path.rate:
        options["drop_path_rate"] = config.drop_path.rate
    if config.drop_path.mode == "subset":
        if config.name not in VARIANTS:
            raise ValueError(
                f"model.drop_path.mode=subset: {config.name} computes what it drops, only vip_* can skip it; "
                "set model.drop_path.mode=bernoulli"
            )
        options["drop_path_mode"] = "subset"
    if config.mixer is not None:
        options["mixer"] = config.mixer
    if config.img_size is not None and _takes_img_size(config.name):
        options["img_size"] = config.img_size
    try:
        model = timm.create_model(config.name, **options)
    except TypeError as error:
        raise ValueError(f"model.name={config.name}: does not take {sorted(options)} ({error})") from error
    if config.fused_norm:
        _fuse_norms(model, config.name)
    if config.checkpointing:
        _checkpoint_blocks(model, config.name)
    return model


def input_spec(config: ModelConfig, model: nn.Module) -> InputSpec:
    """Input size and evaluation crop from the network's `pretrained_cfg`; `img_size`, where given, sets the size."""
    found = timm.data.resolve_model_data_config(model)
    size = config.img_size or found["input_size"][-2:]
    height, width = (size, size) if isinstance(size, int) else size
    return InputSpec(
        (height, width), tuple(found["mean"]), tuple(found["std"]), found["interpolation"], found["crop_pct"]
    )


def compile_model(model: nn.Module) -> None:
    """torch.compile in place: a Vision Permutator block by block, so that one compilation serves every equal block."""
    how: dict[str, Any] = {"dynamic": False}
    if next(model.parameters()).device.type == "cpu":
        # Kernels are compiled for what the CPU says it has. To try that first, inductor starts a program that imports
        # torch for each set of instructions, one after the other, in every process. It still tries the newer sets.
        how |= {"backend": inductor_for_cpus, "options": {"cpp.vec_isa_ok": True}}
    if not isinstance(model, VisionPermutator):
        model.compile(**how)
        return
    if "options" in how:
        # Products may be convolutions (vip/models/products.py), but (B, H, W, C) is not to become "channels last".
        how["options"]["layout_optimization"] = False
        # A loop over segments that writes where it reads waits, at each, for the store that it just made.
        how["options"]["inplace_buffers"] = False
    # Blocks of one stage differ only in weights and drop rate, but each stage has its own shapes to compile for.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
    for module in model.modules():
        if isinstance(module, PermutatorBlock):
            skips = isinstance(module.drop_path, SubsetDropPath)
            (module.drop_path if skips else module).compile(**how)


def inductor_for_cpus(graph: fx.GraphModule, inputs: list[Tensor], options: dict[str, Any]) -> Any:
    """A backend of torch.compile: inductor, but GELU and softmax are left to torch's own kernels.

    Inductor's loops call a library's exponential, slower than the rest of them by far, and draw the gate's softmax, over
    elements that are not neighbours, into the loop that mixes the branches, which is not vectorised then. Views and sums
    are put so that its loops are vectorised and stay in the cache (`_view`, `_sum_of_rows`).
    """
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.lowering import FALLBACK_ALLOW_LIST

    aten = torch.ops.aten
    whole = (aten.gelu.default, aten.gelu_backward.default, aten._softmax.default)
    FALLBACK_ALLOW_LIST.update(operation.name() for operation in whole)  # else it insists on taking them apart
    table = {operation: parts for operation, parts in select_decomp_table().items() if operation not in whole}
    table |= {aten.view.default: _view, aten._unsafe_view.default: _view_of_copy, aten.sum.dim_IntList: _sum_of_rows}
    return compile_fx(graph, inputs, config_patches=options, decompositions=table)


def _view(x: Tensor, size: list[int]) -> Tensor:
    """aten.view, as `_view_of_copy` unless it only cuts axes."""
    inferred = infer_size(size, x.numel())
    before, after = (set(accumulate(reversed(shape), mul)) for shape in (x.shape, inferred))
    return NotImplemented if before <= after else _view_of_copy(x, inferred)


def _view_of_copy(x: Tensor, size: list[int] | tuple[int, ...]) -> Tensor:
    """aten._unsafe_view, a view of the copy that reshaping took, which inductor does not look through.

    Else it writes what is seen through a view in the shape of the view. Where that joins axes that come from different
    places, as when tokens are regrouped, each element's place takes divisions, and no loop is vectorised.
    """
    return x.as_strided(size, make_contiguous_strides_for(size)) if x.is_contiguous() else NotImplemented


def _sum_of_rows(
    x: Tensor, dim: list[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    """aten.sum over all axes but the last, as gradients of biases and norms are: axis by axis, the rows' in pieces.

    Inductor takes such a sum column after column, each through all of memory.
    """
    if not dim or list(dim) != list(range(x.dim() - 1)) or not x.is_floating_point():
        return NotImplemented
    pieces = x if dtype is None else x.to(dtype)
    if x.dim() == 2:
        if len(x) < ROWS**2 or len(x) % ROWS:
            return NotImplemented
        pieces = pieces.view(-1, ROWS, x.shape[-1])
    wide = torch.promote_types(pieces.dtype, torch.float32)
    total = pieces.sum(-2, dtype=wide).sum(list(range(pieces.dim() - 2))).to(pieces.dtype)
    return total.view([1] * len(dim) + [-1]) if keepdim else total


def _fuse_norms(model: nn.Module, name: str) -> None:
    """Give every LayerNorm apex's kernel, in place: parameters stay as they are, and keep their names."""
    apex_kernels.require("model.fused_norm=true", apex_kernels.LAYER_NORM, "model.fused_norm=false")
    from apex.normalization import FusedLayerNorm

    # timm's 2d kinds normalise the channels of (B, C, H, W); apex has the last dimensions alone, with both weights or none.
    plain = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        and "2d" not in type(module).__name__
        and (module.bias is not None or not module.elementwise_affine)
    ]
    if not plain:
        raise ValueError(f"model.fused_norm=true: {name} has no LayerNorm; set model.fused_norm=false")
    for path, module in plain:
        fused = FusedLayerNorm(module.normalized_shape, module.eps, module.elementwise_affine)
        fused.load_state_dict(module.state_dict())
        model.set_submodule(path, fused)


def _checkpoint_blocks(model: nn.Module, name: str) -> None:
    try:
        model.set_grad_checkpointing()  # type: ignore[operator]
    except (
        AttributeError,
        AssertionError,
    ) as error:  # timm: no method at all, or one that asserts that it is not asked
        raise ValueError(f"model.checkpointing=true: {name} cannot do it; set model.checkpointing=false") from error


def _takes_img_size(name: str) -> bool:
    found = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    return found is not None and found.fixed_input_size
