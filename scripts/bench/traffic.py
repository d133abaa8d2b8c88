"""Bytes that a training step moves, counted without a GPU: fake tensors, every aten operation's inputs and outputs.

What a GPU's memory sees of eager mode, nearly: caches that hold a small tensor between two operations are not counted
on. Views are free, broadcast inputs count once. A network of linear layers is bound by this figure, not by its products.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CATEGORIES = {
    "products": ("mm", "addmm", "bmm", "baddbmm", "convolution", "mkldnn_convolution", "convolution_backward"),
    "norms": ("native_layer_norm", "native_layer_norm_backward"),
    "GELU": ("gelu", "gelu_backward"),
    "copies": ("clone", "copy_", "_to_copy", "cat", "stack"),
    "mixing": ("mul", "addcmul", "addcmul_", "sum", "mean", "div", "_softmax", "_softmax_backward_data"),
}
ATTENTION, REST = "attention", "rest"
_FREE = (
    "detach",
    "_unsafe_view",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "lift_fresh",
)


def category(name: str) -> str:
    """That of an aten operation, `name` without its namespace and overload; sums of tensors, mostly, are the rest."""
    if "attention" in name:  # one kernel of many names: products and a softmax
        return ATTENTION
    return next((found for found, names in CATEGORIES.items() if name in names), REST)


def count(
    build: Callable[[], nn.Module], batch: int, dtype: torch.dtype, size: tuple[int, int] = (224, 224)
) -> Counter[str]:
    """Bytes per image and category of a forward and a backward pass, in CUDA's autocast to `dtype` unless that is float32."""
    model = without_values(build)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu").train()
        images = torch.empty(batch, 3, *size)
        with _Traffic() as traffic:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), CudaRules():
                logits = model(images)
            F.cross_entropy(logits.float(), torch.empty(logits.shape)).backward()
    return Counter({name: num_bytes // batch for name, num_bytes in traffic.num_bytes.items()})


def without_values(build: Callable[[], nn.Module]) -> nn.Module:
    """A network on the meta device, since building it on fake tensors fails where values are read, as timm's do."""
    with torch.device("meta"):
        return build()


class _Traffic(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: Counter[str] = Counter()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "aten" and not func.is_view and name not in _FREE:
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            if func._schema.is_mutable and not name.endswith("_"):  # out=: written, not read
                read = [tensor for tensor in read if all(tensor is not other for other in written)]
            moved = sum(map(_size, read)) + sum(map(_size, written))
            self.num_bytes[category(name)] += moved
            self.ops[name] += moved
        return out


def _size(tensor: Tensor) -> int:
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride else 1
    return size


class CudaRules(TorchFunctionMode):
    """The rules that CUDA's autocast has beyond the CPU's: norms, softmax and sums in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.is_autocast_enabled("cpu"):
            name = func.__name__
            if name == "layer_norm":
                args = tuple(arg.float() if isinstance(arg, Tensor) else arg for arg in args)
            elif name in ("sum", "softmax") and kwargs.get("dtype") is None:
                kwargs["dtype"] = torch.float32
        return func(*args, **kwargs)
