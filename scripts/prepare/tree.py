"""A class-folder tree that exists already, as parts: each class of each split. Nothing of it is written."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import xxhash

from scripts.prepare.images import SPLITS, Part, Source, printable
from scripts.prepare.manifest import list_images


@dataclass(frozen=True)
class ClassFolder:
    """Images of one class in one split; `state` stands for their names, sizes and time stamps."""

    folder: Path
    name: str
    paths: tuple[str, ...]
    state: str

    @property
    def key(self) -> str:
        return f"tree-{self.state}"  # of a folder that has changed, what was done counts no more

    @property
    def num_images(self) -> int:
        return len(self.paths)

    def images(self) -> Iterator[tuple[str, bytes]]:
        for path in self.paths:
            try:
                yield path, (self.folder / path).read_bytes()
            except OSError as error:
                raise ValueError(
                    f"cannot read {printable(str(self.folder / path))} ({error.strerror or error}): check the file and its disk; "
                    "the same command then goes on"
                ) from error


def open_tree(folder: Path) -> Source:
    """Raises ValueError unless `folder` holds train/ and val/ with images in the same class folders."""
    by_class = {name: tuple(paths) for name, paths in groupby(list_images(folder), _class_of)}
    train, val = ({name.partition("/")[2] for name in by_class if name.startswith(f"{split}/")} for split in SPLITS)
    if not train or train != val:
        differing = ", ".join(printable(name) for name in sorted(train ^ val)[:5]) or "no class folder has images"
        raise ValueError(
            f"{folder} needs train/ and val/ with images in the same class folders, which these are not: {differing}"
        )
    with ThreadPoolExecutor(max_workers=16) as threads:  # on network file systems this is all waiting
        states = list(threads.map(partial(_state, folder), by_class.values()))
    parts: list[Part] = [
        ClassFolder(folder, name, paths, state) for (name, paths), state in zip(by_class.items(), states, strict=True)
    ]
    return Source(parts, tuple(sorted(train)), {}, {})


def _class_of(path: str) -> str:
    return "/".join(path.split("/")[:2])


def _state(folder: Path, paths: tuple[str, ...]) -> str:
    state = xxhash.xxh3_128()
    for path in paths:
        status = (folder / path).stat()
        state.update(os.fsencode(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0"))
    return state.hexdigest()
