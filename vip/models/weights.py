"""Weights from elsewhere: finding them in a checkpoint's wrapping, and loading them or saying why they do not fit.

Pure functions over dictionaries that were already read; they serve timm's networks as well as ours.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from timm.models import clean_state_dict
from torch import Tensor, nn

_EMA_KEYS = ("state_dict_ema", "model_ema")
_RAW_KEYS = ("state_dict", "model")


def unwrap_state_dict(checkpoint: Mapping[str, Any], use_ema: bool = True) -> dict[str, Tensor]:
    """The name -> tensor dictionary inside a checkpoint, its names free of `module.` and `_orig_mod.`.

    Understands a bare dictionary and one under `state_dict`, `model`, `state_dict_ema` or `model_ema`. When a file
    holds both, the averaged weights are taken, or the raw ones if not `use_ema`.

    Raises:
        ValueError: no weights are found there.
    """
    keys = _EMA_KEYS + _RAW_KEYS if use_ema else _RAW_KEYS + _EMA_KEYS
    found = next((checkpoint[key] for key in keys if isinstance(checkpoint.get(key), Mapping)), checkpoint)
    if not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(
            f"no weights among the checkpoint's entries ({_some(list(checkpoint))}): expected a dictionary of tensors, "
            f"bare or under one of {', '.join(keys)}"
        )
    return clean_state_dict(dict(found))


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Loads all weights or none.

    Raises:
        ValueError: names or shapes differ; the message names them, and says how to build a network that fits.
    """
    own = model.state_dict()
    head = _head_names(model)
    missing = [name for name in own if name not in state_dict]
    unexpected = [name for name in state_dict if name not in own]
    if not {*missing, *unexpected} <= head:
        raise ValueError(
            f"the weights are not those of this {type(model).__name__}: missing {_some(missing)}; "
            f"unexpected {_some(unexpected)}; build the variant that the checkpoint was made from"
        )
    _check_head(head, own, state_dict)
    unlike = [name for name in own if own[name].shape != state_dict[name].shape]
    if unlike:
        name = unlike[0]
        raise ValueError(
            f"{len(unlike)} weights have other shapes, the first {name}: {_shape(state_dict[name])} in the checkpoint, "
            f"{_shape(own[name])} here; build the network with the checkpoint's variant, img_size and in_chans"
        )
    model.load_state_dict(state_dict)


def keep_own_head(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state_dict` with the classifier of `model` in place of one for another number of classes."""
    own = model.state_dict()
    other = {
        name
        for name in _head_names(model) & own.keys()
        if getattr(state_dict.get(name), "shape", None) != own[name].shape
    }
    return dict(state_dict) | {name: own[name] for name in other}


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The hook by which timm's own loading (`pretrained=True` with a file or a URL) unwraps a checkpoint."""
    return unwrap_state_dict(state_dict)


def _head_names(model: nn.Module) -> set[str]:
    """Names of the classifier's parameters, as timm's pretrained_cfg knows it (some networks have two)."""
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    modules = (classifier,) if isinstance(classifier, str) else classifier
    return {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}


def _check_head(head: set[str], own: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> None:
    """A head of another class count is the commonest misfit, and the one with the simplest remedy."""
    for name in sorted(head):
        num_theirs, num_own = (len(tensors[name]) if name in tensors else 0 for tensors in (state_dict, own))
        if num_theirs != num_own:
            raise ValueError(
                f"{name.rpartition('.')[0]} has {num_theirs} classes in the checkpoint and {num_own} here: build the network "
                f"with num_classes={num_theirs}, and call reset_classifier({num_own}) after loading to train another head"
            )


def _some(names: Sequence[str], limit: int = 4) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + rest


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
