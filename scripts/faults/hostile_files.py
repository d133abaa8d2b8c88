"""The files of hostile.py: pickles that run something when loaded, tars that leave their folder, headers that lie."""

import builtins
import io
import json
import os
import pickle
import runpy
import shutil
import struct
import subprocess
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

Members = Callable[[tarfile.TarFile, Path], None]
"""Adds members to a tar; the second argument is the canary's path."""


class Call:
    """Pickles as a call: `function(*arguments)` happens when it is loaded, unless the loader forbids it."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def calls(work: Path, canary: Path) -> dict[str, Call]:
    """Ways to make the canary."""
    script = work / "script.py"
    script.write_text(f"open({str(canary)!r}, 'w')\n")
    code = f"open({str(canary)!r}, 'w')"
    return {
        "system": Call(os.system, f"touch {canary}"),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "runpy": Call(runpy.run_path, str(script)),
        "subprocess": Call(subprocess.check_call, ["touch", str(canary)]),
        "import": Call(getattr(builtins, "__import__"), "script"),  # noqa: B009 - the function is what is wanted
        "copy": Call(shutil.copyfile, str(script), str(canary)),
        "open": Call(open, str(canary), "w"),
        "mkdir": Call(os.mkdir, str(canary)),
    }


def zip_pth(path: Path, content: Any, **more: bytes) -> Path:
    """torch's own format of today: a zip of a pickle and storages."""
    with zipfile.ZipFile(path, "w") as file:
        members = {"data.pkl": pickle.dumps(content, 2), "byteorder": b"little", "version": b"3\n"}
        for name, data in (members | more).items():
            file.writestr(f"archive/{name}", data)
    return path


def _bare(path: Path, content: Any) -> Path:
    path.write_bytes(pickle.dumps(content))
    return path


def _legacy(path: Path, content: Any) -> Path:
    """torch's format before 1.6: pickles in a row."""
    head: tuple[Any, ...] = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True})
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in (*head, content, [])))
    return path


def _legacy_tar(path: Path, content: Any) -> Path:
    """torch's format before 0.1.10."""
    with tarfile.open(path, "w") as file:
        for name in ("storages", "tensors", "pickle"):
            _add(file, name, pickle.dumps(content, 2))
    return path


def _torchscript(path: Path, content: Any) -> Path:
    return zip_pth(path, content, **{"constants.pkl": pickle.dumps(content, 2), "code/__torch__.py": b"import os\n"})


def _numpy(path: Path, content: Any) -> Path:
    return zip_pth(path, {"w": np.array([content], dtype=object)})


def _hooks(path: Path, content: Any) -> Path:
    """A tensor whose hooks are the call."""
    storage = torch.zeros(4).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    return _bare(path, {"w": Call(torch._utils._rebuild_tensor_v2, typed, 0, (4,), (1,), False, content)})


def _ordered(path: Path, content: Any) -> Path:
    """In the order of a dictionary that weights come in."""
    return zip_pth(
        path, {"state_dict": OrderedDict([("patch_embed.proj.weight", torch.Size([1])), ("head.bias", content)])}
    )


def _pickle(
    wrap: Callable[[Path, Any], Path], call: str = "system", name: str = "weights.pth"
) -> Callable[[Path, Path], Path]:
    return lambda work, canary: wrap(work / name, calls(work, canary)[call])


PICKLES: dict[str, Callable[[Path, Path], Path]] = {
    **{call: _pickle(zip_pth, call) for call in (
        "system", "eval", "exec", "runpy", "subprocess", "import", "copy", "open", "mkdir")},
    "in_state_dict": _pickle(lambda path, call: zip_pth(path, {"state_dict": {"head.weight": call}})),
    "in_model": _pickle(lambda path, call: zip_pth(path, {"model": {"head.weight": call}, "epoch": 3})),
    "in_ordered_dict": _pickle(_ordered),
    "beside_the_weights": _pickle(lambda path, call: zip_pth(path, {"state_dict": {}, "args": call})),
    "as_a_key": _pickle(lambda path, call: zip_pth(path, {"state_dict": [(call, 1)]})),
    "bare": _pickle(_bare),
    "bare_state_dict": _pickle(lambda path, call: _bare(path, {"state_dict": {"w": call}})),
    "legacy": _pickle(_legacy),
    "legacy_tar": _pickle(_legacy_tar),
    "torchscript": _pickle(_torchscript),
    "numpy_object": _pickle(_numpy),
    "hooks_of_a_tensor": _pickle(_hooks),
    "named_bin": _pickle(zip_pth, name="pytorch_model.bin"),
    "named_safetensors": _pickle(_bare, name="model.safetensors"),
    "zip_named_safetensors": _pickle(zip_pth, name="step_0000000001.safetensors"),
}  # fmt: skip


def _add(
    file: tarfile.TarFile, name: str, content: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    member.size = len(content) if kind == tarfile.REGTYPE else 0
    member.devmajor, member.devminor = 1, 3  # of a device: /dev/null
    member.mode = 0o4755
    file.addfile(member, io.BytesIO(content[: member.size]))


def _symlink(file: tarfile.TarFile, canary: Path) -> None:
    """A link to the canary's folder under an image's name, and a file through it."""
    _add(file, "n01440764_1.JPEG", kind=tarfile.SYMTYPE, link=str(canary.parent))
    _add(file, f"n01440764_1.JPEG/{canary.name}")


def _hardlink(file: tarfile.TarFile, canary: Path) -> None:
    """The canary as a second name of a file that may be there."""
    _add(file, "n01440764_1.JPEG")
    _add(file, str(canary), kind=tarfile.LNKTYPE, link="n01440764_1.JPEG")


MEMBERS: dict[str, Members] = {
    "dots": lambda file, canary: _add(file, f"../../{canary.name}"),
    "many_dots": lambda file, canary: _add(file, "../" * 30 + str(canary).lstrip("/")),
    "absolute": lambda file, canary: _add(file, str(canary)),
    "symlink": _symlink,
    "hardlink": _hardlink,
    "hardlink_from": lambda file, canary: _add(file, "n01440764_1.JPEG", kind=tarfile.LNKTYPE, link=str(canary)),
    "device": lambda file, canary: _add(file, str(canary), kind=tarfile.CHRTYPE),
    "fifo": lambda file, canary: _add(file, str(canary), kind=tarfile.FIFOTYPE),
    "folder": lambda file, canary: _add(file, str(canary), kind=tarfile.DIRTYPE),
    "line_break": lambda file, canary: _add(file, f"../../{canary.name}\n.JPEG"),
}


def tar(path: Path, add: Members, canary: Path, nested: bool = False) -> Path:
    """A tar of hostile members, or one that holds such a tar under a class's name."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as file:
        add(file, canary)
    if not nested:
        path.write_bytes(content.getvalue())
        return path
    with tarfile.open(path, "w") as outer:
        _add(outer, "n01440764.tar", content.getvalue())
    return path


def _safetensors(header: bytes, body: bytes = b"", length: int | None = None) -> Callable[[Path], Path]:
    return lambda work: _written(work, struct.pack("<Q", len(header) if length is None else length) + header + body)


def _written(work: Path, content: bytes) -> Path:
    path = work / "step_0000000001.safetensors"
    path.write_bytes(content)
    return path


def _tensors(**entries: Any) -> Callable[[Path], Path]:
    metadata = {"format": "vip-checkpoint-1", "tree": "{}", "checksum": ""}
    return _safetensors(json.dumps({"__metadata__": metadata, **entries}).encode(), bytes(16))


def _tree(text: str) -> Callable[[Path], Path]:
    """A checkpoint of no tensors whose checksum is right and whose tree is not."""
    metadata = {"format": "vip-checkpoint-1", "tree": text, "checksum": xxhash.xxh3_128_hexdigest(text.encode())}
    return _safetensors(json.dumps({"__metadata__": metadata}).encode())


def _entry(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS: dict[str, Callable[[Path], Path]] = {
    "header_of_exabytes": _safetensors(b"{}", length=2**63),
    "header_longer_than_file": _safetensors(b"{}", length=90_000_000),
    "header_nested_deeply": _safetensors(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "header_of_a_list": _safetensors(b"[" * 50_000 + b"]" * 50_000),
    "header_not_text": _safetensors(b"\xff\xfe" * 40),
    "offsets_past_the_end": _tensors(w=_entry([4], [0, 2**40])),
    "offsets_backwards": _tensors(w=_entry([4], [16, 0])),
    "offsets_negative": _tensors(w=_entry([4], [-16, 0])),
    "offsets_shared": _tensors(v=_entry([4], [0, 16]), w=_entry([4], [0, 16])),
    "shape_overflows": _tensors(w=_entry([2**32, 2**32], [0, 16])),
    "shape_negative": _tensors(w=_entry([-4], [0, 16])),
    "type_unknown": _tensors(w=_entry([4], [0, 16], "os.system")),
    "checksum_wrong": _tensors(w=_entry([4], [0, 16])),
    "tree_nested_deeply": _tree("[" * 100_000 + "]" * 100_000),
    "tree_of_deep_states": _tree('{"dict":[["step",' * 5_000 + "1" + "]]}" * 5_000),
    "tree_not_json": _tree("__import__('os').system('true')"),
    "tree_of_missing_tensors": _tree('{"dict": [["step", 1], ["model", {"tensor": "none"}]]}'),
    "tree_of_lists": _tree("[1, 2]"),
    "tree_of_a_number": _tree("1e999"),
    "tree_without_step": _tree('{"dict": []}'),
    "tree_of_unhashable_keys": _tree('{"dict": [[{"dict": []}, 1]]}'),
}


def hub_folder(work: Path, canary: Path) -> Path:
    """A folder as a hub would hold it: a configuration and weights that are a pickle."""
    (work / "config.json").write_text(
        json.dumps({"architecture": "resnet10t", "pretrained_cfg": {}, "num_classes": 10})
    )
    zip_pth(work / "pytorch_model.bin", calls(work, canary)["system"])
    return work
