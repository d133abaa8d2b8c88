"""Class-folder trees: the folders that are the classes, and the images in them.

File names are kept in one array per source rather than a million python objects: loader processes forked from this one then
share the memory, as no reference count in it ever changes.
"""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data import index_cache, node
from data.decode import decode_rgb, read_file
from data.index_cache import Listing
from data.parent import die_with_parent

IMAGE_SUFFIXES = (b".jpg", b".jpeg", b".png", b".webp", b".bmp", b".gif", b".ppm", b".pgm", b".tif", b".tiff")
QUICK_S = 0.25  # a tree that takes longer is listed by several processes, and its listing is kept
NUM_LISTERS = 16  # even on a few cores: on network file systems listing is all waiting


def class_folders(folder: Path) -> tuple[str, ...]:
    """Names of the class folders in a split, sorted. Raises ValueError where there are none, or links to nothing."""
    own_chain = _identities(folder)
    names, broken = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_symlink() and not Path(entry.path).exists():  # left out, it would shift the labels
                broken.append((os.fsencode(entry.name), "link to nothing"))
            elif entry.is_dir() and _identity(entry.path) not in own_chain:
                names.append(entry.name)
    _refuse(folder, broken)
    if not names:
        raise ValueError(f"{folder} has no class folders: put one folder of images per class there")
    return tuple(sorted(names))


class FolderSource:
    """The images of one split, sorted by path within each class.

    Raises:
        ValueError: a class folder without images, or files that cannot be read, by name.
    """

    def __init__(self, folder: Path, class_names: Sequence[str], exif: bool = False) -> None:
        self.folder = os.fsencode(folder)
        self.exif = exif
        self.class_names = tuple(map(printable, class_names))
        listing = index_cache.read(folder, class_names) or _list(folder, class_names)
        self.labels = np.repeat(np.arange(len(class_names)), listing.counts)
        self._class_folders = [self.folder + b"/" + os.fsencode(name) for name in class_names]
        self._paths = listing.paths
        self._ends = np.cumsum(listing.lengths, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> bytes:
        """The whole path of the file, as the system takes it."""
        start = self._ends[index - 1] if index else 0
        return self._class_folders[self.labels[index]] + b"/" + self._paths[start : self._ends[index]].tobytes()

    def name(self, index: int) -> str:
        return printable(self.path(index)[len(self.folder) + 1 :])

    def read(self, index: int) -> bytes:
        path = self.path(index)
        return read_file(path, printable(path))

    def load(self, index: int) -> Image.Image:
        return decode_rgb(self.read(index), printable(self.path(index)), self.exif)


class _Found(NamedTuple):
    """In one class folder: paths below it, sorted; whole paths of what cannot be read, each with the reason; stamps."""

    files: list[bytes]
    broken: list[tuple[bytes, str]]
    stamps: list[bytes]


def _list(folder: Path, class_names: Sequence[str]) -> Listing:
    """Lists a split: a small one at once, a large one in many processes, and of those of a node only one does."""
    began_ns, quick_until = time.time_ns(), time.monotonic() + QUICK_S
    found: list[_Found] = []
    while len(found) < len(class_names) and time.monotonic() < quick_until:
        found.append(_list_class(folder, class_names[len(found)]))
    if len(found) == len(class_names):
        return _joined(folder, class_names, found)
    kept = index_cache.place(folder)
    with node.turn(kept.with_suffix(".lock")) if kept else contextlib.nullcontext():
        if listing := index_cache.read(folder, class_names):
            return listing
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(NUM_LISTERS, context, _begin_listing, (os.getpid(),)) as pool:
            found += pool.map(partial(_list_class, folder), class_names[len(found) :])
        listing = _joined(folder, class_names, found)
        index_cache.write(folder, class_names, listing, began_ns)
        return listing


def _begin_listing(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that started it
    die_with_parent(parent)


def _joined(folder: Path, class_names: Sequence[str], found: list[_Found]) -> Listing:
    """Raises ValueError for what cannot be read, and for classes without images."""
    skip = len(os.fsencode(folder)) + 1
    _refuse(folder, [(path[skip:], reason) for part in found for path, reason in part.broken])
    for name, part in zip(class_names, found, strict=True):
        if not part.files:
            raise ValueError(
                f"{printable(str(folder / name))} has no images ({b' '.join(IMAGE_SUFFIXES).decode()}): "
                "fill or remove the folder, in train/ and val/ alike"
            )
    return Listing(
        counts=np.array([len(part.files) for part in found]),
        paths=np.frombuffer(b"".join(path for part in found for path in part.files), np.uint8),
        lengths=np.array([len(path) for part in found for path in part.files], np.uint16),
        stamps=[stamp for part in found for stamp in part.stamps],
    )


def _list_class(folder: Path, class_name: str) -> _Found:
    """Without hidden and foreign files and every link that leads back or up; for a regular file that takes one system call."""
    top = os.fsencode(folder / class_name)
    visited = _identities(top)
    found = _Found([], [], [])
    pending = [top]
    while pending:
        inner = pending.pop()
        try:
            found.stamps.append(index_cache.stamp(folder, inner[len(os.fsencode(folder)) + 1 :]))  # before it is read
            entries = list(os.scandir(inner))
        except OSError as error:
            found.broken.append((inner, error.strerror or str(error)))
            continue
        for entry in entries:
            if entry.name.startswith(b"."):  # .DS_Store, ._image.JPEG and the like
                continue
            is_image = entry.name.lower().endswith(IMAGE_SUFFIXES)
            try:
                if is_image and entry.is_file():
                    found.files.append(entry.path[len(top) + 1 :])
                    if not os.access(entry.path, os.R_OK):
                        found.broken.append((entry.path, "no permission to read"))
                elif entry.is_dir():
                    if (identity := _identity(entry.path)) not in visited:
                        visited.add(identity)
                        pending.append(entry.path)
                elif is_image:
                    exists = Path(os.fsdecode(entry.path)).exists()
                    found.broken.append((entry.path, "not a regular file" if exists else "link to nothing"))
            except OSError as error:  # links in a circle, targets out of reach
                found.broken.append((entry.path, error.strerror or str(error)))
    found.files.sort()
    return found


def _refuse(folder: Path, broken: list[tuple[bytes, str]]) -> None:
    if broken:
        named = ", ".join(f"{printable(path)} ({reason})" for path, reason in sorted(broken)[:5])
        raise ValueError(
            f"{printable(str(folder))} has {len(broken)} files that cannot be read: {named}{' ...' if len(broken) > 5 else ''}; "
            "repair or remove them"
        )


def _identity(path: str | bytes | Path) -> tuple[int, int]:
    status = Path(os.fsdecode(path)).stat()
    return status.st_dev, status.st_ino


def _identities(folder: Path | bytes) -> set[tuple[int, int]]:
    """The folder and all that contain it: where a link must not lead."""
    resolved = Path(os.fsdecode(folder)).resolve()
    return {_identity(path) for path in (resolved, *resolved.parents)}


def printable(name: str | bytes) -> str:
    """File names need not be valid UTF-8; bytes that are not come out as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
