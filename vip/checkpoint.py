"""Checkpoints: the only file that writes or reads them.

One file is one checkpoint: safetensors, with everything that is not a tensor as JSON in its header and a 128-bit checksum
over both, so that a file is whole or refused and reading one never runs code. It is written under a temporary name in the
same folder, flushed to the disk and renamed. The newest is found by looking, not by a pointer that could be stale.

    runs/x/checkpoints/step_0000000625.safetensors    the newest `keep`
    runs/x/checkpoints/best.safetensors               the best validation so far
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FORMAT = "vip-checkpoint-1"
STEP_FILE = "step_{:010d}.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another network; the text is one line with the remedy."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: a tree of dicts, lists, numbers, strings and tensors, and the path it came from."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])


def fingerprint(model_name: str, num_classes: int, model: nn.Module) -> dict[str, Any]:
    """What a checkpoint's tensors belong to: the network, its classes, and the names and shapes of its parameters."""
    names = ";".join(f"{name}{tuple(parameter.shape)}" for name, parameter in model.named_parameters())
    return {"model": model_name, "num_classes": num_classes, "parameters": xxhash.xxh3_64_hexdigest(names.encode())}


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` (a tree of dicts, lists, tensors and JSON values) to `path`: whole, or not at all."""
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_take_tensors(dict(state), "", tensors))
    # Shared and strided storage would not survive the file; a checkpoint holds each tensor once, contiguous, on the host.
    tensors = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    header = {"format": FORMAT, "tree": tree, "checksum": _checksum(tree, tensors)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(tensors, temporary, header)
        temporary.chmod(0o644)  # safetensors leaves it to the owner alone
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> Checkpoint:
    """Read and verify one checkpoint. Raises CheckpointError where it is missing, damaged or not one of ours."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise CheckpointError(f"{path}: not a checkpoint of this program (format {header.get('format')!r})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); delete it") from error
    if _checksum(header.get("tree", ""), tensors) != header.get("checksum"):
        raise CheckpointError(f"{path}: damaged (its checksum differs); delete it")
    return Checkpoint(path, _put_tensors(json.loads(header["tree"]), tensors))


def newest(folder: Path, warn: Callable[[str], object]) -> Checkpoint | None:
    """The newest whole checkpoint in `folder`, or None; `warn` hears of damaged ones that are passed over."""
    for path in sorted(folder.glob(STEP_FILE.format(0).replace("0" * 10, "[0-9]" * 10)), reverse=True):
        try:
            return read(path)
        except CheckpointError as error:
            warn(f"warning: passed over {error}")
    return None


def save(folder: Path, state: Mapping[str, Any], keep: int, is_best: bool) -> Path:
    """Write the checkpoint of `state["step"]`, make it the best one if it is, and keep the `keep` newest up to it."""
    path = folder / STEP_FILE.format(state["step"])
    for left in (*folder.glob(".*.tmp"), *folder.glob(".tmp*")):  # by a kill in mid-write: ours, and safetensors'
        left.unlink()
    write(path, state)
    if is_best:
        link = folder / f".best.{os.getpid()}.tmp"
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, link)
        link.replace(folder / "best.safetensors")
        _flush(folder)
    # Files beyond this step were passed over as damaged: they must not push out the one just written.
    for old in sorted(other for other in folder.glob("step_*.safetensors") if other <= path)[:-keep]:
        old.unlink()
    return path


def find(path: Path) -> Path:
    """The file meant by a run folder, a folder of checkpoints or a file: in a folder the best, else the newest."""
    if path.is_file():
        return path
    for folder in (path / "checkpoints", path):
        candidates = [folder / "best.safetensors", *sorted(folder.glob("step_*.safetensors"), reverse=True)]
        for candidate in candidates:
            if candidate.is_file():
                return candidate
    raise CheckpointError(
        f"checkpoint={path}: {'no checkpoint in this folder' if path.is_dir() else 'no such file or folder'}"
    )


def read_weights(path: Path) -> Any:
    """What a published or foreign weights file holds: safetensors, or a .pth read with `weights_only=True` (no code runs)."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path}: not a readable weights file, or one that holds more than tensors ({reason})"
        ) from error


def is_ours(path: Path) -> bool:
    """Whether a file is a checkpoint of this program rather than bare or published weights."""
    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return False


def _take_tensors(node: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The tree as JSON values, its tensors moved to `tensors` by name; dicts become lists of pairs (keys may be ints)."""
    if isinstance(node, Tensor):
        while name in tensors or name == "__metadata__":  # "a/b" beside a -> b; safetensors keeps that one for itself
            name += "'"
        tensors[name] = node
        return {"tensor": name}
    if isinstance(node, Mapping):
        return {
            "dict": [[key, _take_tensors(value, f"{name}/{key}".lstrip("/"), tensors)] for key, value in node.items()]
        }
    if isinstance(node, list | tuple):
        return [_take_tensors(value, f"{name}/{i}", tensors) for i, value in enumerate(node)]
    return node


def _put_tensors(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_put_tensors(value, tensors) for value in node]
    if isinstance(node, dict):
        if "tensor" in node:
            return tensors[node["tensor"]]
        return {key: _put_tensors(value, tensors) for key, value in node["dict"]}
    return node


def _checksum(tree: str, tensors: Mapping[str, Tensor]) -> str:
    digest = xxhash.xxh3_128(tree.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
