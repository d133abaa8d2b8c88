"""Checkpoints: the only file that writes or reads them.

One file is one checkpoint: safetensors, with everything that is not a tensor as JSON in its header and a 128-bit checksum
over both, so that a file is whole or refused and reading one never runs code. It is written under a temporary name in the
same folder, flushed to the disk and renamed. The newest is found by looking, not by a pointer that could be stale.

    runs/x/checkpoints/step_0000000625.safetensors            the newest `keep`
    runs/x/checkpoints/best.safetensors                       the best validation so far
    runs/x/checkpoints/step_0000000500.safetensors.damaged    one that was found damaged, and passed over
"""

import contextlib
import io
import json
import mmap
import os
import pickle
import re
import shutil
import struct
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

FORMAT = "vip-checkpoint-1"
STEP_FILE = "step_{:010d}.safetensors"
DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another network; the text is one line with the remedy."""


class DamagedError(CheckpointError):
    """A checkpoint file whose content is not what was written."""


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


@dataclass(frozen=True)
class Snapshot:
    """A state at one moment, in host memory that nobody else changes; `ready()` waits until the device has filled it."""

    step: int
    tree: str
    tensors: dict[str, Tensor]
    ready: Callable[[], object]

    @property
    def num_bytes(self) -> int:
        return len(self.tree) + sum(tensor.nbytes for tensor in self.tensors.values())


class HostMemory:
    """One buffer for the tensors of a state, used again: only the first copy pays for its pages."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def copy(self, state: Mapping[str, Any]) -> Snapshot:
        """Copy `state` (a tree of dicts, lists, tensors and JSON values); the one before it is overwritten."""
        tensors: dict[str, Tensor] = {}
        tree = json.dumps(_take_tensors(dict(state), "", tensors))
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self.buffer.numel() < size:
            self.buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True) if on_gpu else _private_memory(size)
        copies, start = {}, 0
        for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):  # which aligns them all
            tensor = tensors[name].detach()
            part = self.buffer[start : start + tensor.nbytes]
            copies[name] = part.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)
            start += tensor.nbytes
        if not on_gpu:
            return Snapshot(state.get("step", 0), tree, copies, lambda: None)
        copied = torch.cuda.Event()
        copied.record()
        return Snapshot(state.get("step", 0), tree, copies, copied.synchronize)


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` (a tree of dicts, lists, tensors and JSON values) to `path`: whole, or not at all."""
    _write(path, HostMemory().copy(state))


def _write(path: Path, snapshot: Snapshot) -> None:
    """safetensors' format, by hand: its own writer copies every tensor once more and stops all threads meanwhile."""
    snapshot.ready()
    checksum = _checksum(snapshot.tree, snapshot.tensors)
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "tree": snapshot.tree, "checksum": checksum}}
    start = 0
    for name, tensor in snapshot.tensors.items():
        end = start + tensor.nbytes
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb", buffering=0) as file:
            start_of_file = memoryview(struct.pack("<Q", len(encoded)) + encoded)
            for view in (start_of_file, *map(_bytes_of, snapshot.tensors.values())):
                while len(view):  # a raw file may take less than it is given
                    view = view[file.write(view) :]
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        DamagedError: the file is not what was written, or not one of ours.
        CheckpointError: it is missing or may not be read.
    """
    try:
        path.open("rb").close()
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise DamagedError(f"{path}: not a checkpoint of this program (format {header.get('format')!r})")
            # Copies: what is mapped into memory would keep the file's space on the disk after it is deleted.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except SafetensorError as error:
        raise DamagedError(f"{path}: damaged ({error}); delete it") from error
    if _checksum(header.get("tree", ""), tensors) != header.get("checksum"):
        raise DamagedError(f"{path}: damaged (its checksum differs); delete it")
    try:
        found = Checkpoint(path, _put_tensors(json.loads(header["tree"]), tensors))
        misnamed = path.name.startswith("step_") and path.name != STEP_FILE.format(found.step)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise DamagedError(f"{path}: not a state of this program ({type(error).__name__} in its header)") from error
    if misnamed:
        raise DamagedError(f"{path}: holds step {found.step}, which is not what its name says")
    return found


def newest(folder: Path, warn: Callable[[str], object]) -> Checkpoint | None:
    """The newest whole checkpoint in `folder`, the best one if no other is; None where there never was one.

    Damaged ones before it are renamed to `*.damaged`, out of the way, and `warn` hears of each. Raises CheckpointError where
    nothing whole is left, and where one cannot be read for another reason (rights, a disk's error): to begin anew, or from
    an older one, would lose steps unasked.
    """
    steps = sorted(folder.glob(STEP_FILE.format(0).replace("0" * 10, "[0-9]" * 10)), reverse=True)
    for path in (*steps, *folder.glob("best.safetensors")):
        try:
            return read(path)
        except DamagedError as error:
            quarantine = path.with_name(f"{path.name}.damaged")
            with contextlib.suppress(OSError):  # on a disk that cannot be written there is no harm in leaving it
                path.replace(quarantine)
            warn(
                f"warning: {str(error).removesuffix('; delete it')}; renamed to {quarantine.name}, the one before it is used"
            )
    if any(folder.glob("*.damaged")):
        raise CheckpointError(
            f"{folder}: no whole checkpoint is left; delete that folder to begin anew, or choose another name=..."
        )
    return None


def newest_for_all(
    folder: Path, is_main: bool, share: Callable[[str], str], warn: Callable[[str], object]
) -> Checkpoint | None:
    """`newest` on rank 0, because it may rename; the other ranks read the path that `share` brings from there."""
    found = newest(folder, warn) if is_main else None
    path = share(str(found.path) if found else "")
    return read(Path(path)) if path and not is_main else found


class Writer:
    """Saves the checkpoints of one run while it trains on.

    `save` copies the state to host memory and returns; a thread writes it, one at a time. A disk that is full or fails
    costs that checkpoint, not the run: `warn` hears of it, the files before stay as they are, and the next save tries again.
    """

    def __init__(self, folder: Path, keep: int, warn: Callable[[str], object]) -> None:
        self.folder = folder
        self.keep = keep
        self.warn = warn
        self.saved_step = 0
        self.memory = HostMemory()
        self.thread = threading.Thread()

    def save(self, state: Mapping[str, Any], is_best: bool) -> None:
        """Keep `state`, and make it the best one if it is; waits for the save before, if that is not done yet."""
        self.wait()
        self.thread = threading.Thread(target=self._save, args=(self.memory.copy(state), is_best), name="checkpoint")
        self.thread.start()

    @property
    def busy(self) -> bool:
        return self.thread.is_alive()

    def wait(self) -> int:
        """Wait for a save that is under way; the step of the newest checkpoint that this writer has on the disk."""
        if self.thread.ident is not None:
            self.thread.join()
        return self.saved_step

    def _save(self, snapshot: Snapshot, is_best: bool) -> None:
        try:
            _keep(self.folder, snapshot, self.keep, is_best)
            self.saved_step = snapshot.step
        except OSError as error:
            free = shutil.disk_usage(next(path for path in (self.folder, *self.folder.parents) if path.exists())).free
            room = f"it takes {size_in_words(snapshot.num_bytes)}, {size_in_words(free)} are free in {self.folder}"
            self.warn(
                f"warning: checkpoint of step {snapshot.step} not written ({error.strerror}; {room}); training goes on, and the "
                "next save tries again"
            )


def sweep(folder: Path) -> None:
    """Remove what a kill in mid-write left behind."""
    for left in folder.glob(".*.tmp"):
        left.unlink(missing_ok=True)


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
        with warnings.catch_warnings(action="ignore"):  # torch warns of formats that it then refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, OSError) as error:
        reason = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().partition("\n")[0][:200] or type(error).__name__
        raise CheckpointError(
            f"{path}: not a readable weights file, or one that holds more than tensors ({reason})"
        ) from error


def encode_weights(weights: Mapping[str, Tensor], suffix: str) -> bytes:
    """Bare weights as a file of others: `.safetensors` or `.pth`."""
    if suffix == ".safetensors":
        return safetensors.torch.save(dict(weights), {"format": "pt"})
    buffer = io.BytesIO()
    torch.save(dict(weights), buffer)
    return buffer.getvalue()


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
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _private_memory(size: int) -> Tensor:
    """Host memory that forked loader workers do not share: else the next copy would have to copy its pages first."""
    if not hasattr(mmap, "MADV_DONTFORK") or not size:
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _keep(folder: Path, snapshot: Snapshot, keep: int, is_best: bool) -> None:
    """Write the checkpoint of `snapshot.step`, make it the best one if it is, and keep the `keep` newest up to it."""
    path = folder / STEP_FILE.format(snapshot.step)
    sweep(folder)
    _write(path, snapshot)
    if is_best:
        link = folder / f".best.{os.getpid()}.tmp"
        try:
            os.link(path, link)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, link)
        link.replace(folder / "best.safetensors")
        _flush(folder)
    # Files beyond this step are not of its past: they must not push out the one just written.
    for old in sorted(other for other in folder.glob("step_*.safetensors") if other <= path)[:-keep]:
        old.unlink()


def size_in_words(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:,.1f} GB"


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
