"""The list of a split's files, kept from one run to the next: a million files are listed once, not by every process.

A kept list counts for as long as every folder that it was read from has the same time stamp and inode: these change when a
name comes, goes or is replaced. What happens inside a file, or behind a link, is found when it is read. A list that is
damaged is made anew, and one that cannot be kept costs nothing but time.
"""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data import node

VERSION = b"1"
RACY_NS = 2_000_000_000  # time stamps are coarse: a folder younger than that may change again and keep its own


@dataclass(frozen=True)
class Listing:
    """The images of a split, ordered by class and path, and the folders that they were found in.

    Attributes:
        counts: images of each class: int64 (classes,).
        paths: their paths below the folder of their class, one after another: uint8.
        lengths: bytes of each path: uint16 (images,).
        stamps: of each folder that was listed, as `stamp` gave it before.
    """

    counts: np.ndarray
    paths: np.ndarray
    lengths: np.ndarray
    stamps: list[bytes]


def stamp(folder: Path, name: bytes) -> bytes:
    """Time stamp (ns), inode and name of the folder `name` below `folder`. Raises OSError."""
    status = os.stat(os.fsencode(folder) + b"/" + name)  # noqa: PTH116 - names need not be text
    return b"%d %d %s" % (status.st_mtime_ns, status.st_ino, name)


def place(folder: Path) -> Path | None:
    """The file that keeps the listing of `folder`; None where nothing is kept."""
    caches = node.cache_folder()
    name = xxhash.xxh3_128_hexdigest(os.fsencode(folder.absolute()))
    return caches and caches / "index" / f"{name}.npz"


def read(folder: Path, class_names: Sequence[str]) -> Listing | None:
    """What is kept of `folder`, if it still holds; that takes a system call for each folder in it."""
    path = place(folder)
    try:
        if path is None or not path.exists():
            return None
        with np.load(path, allow_pickle=False) as file:
            fields = dict(file)
        checksum = fields.pop("checksum")
        stamps = fields["stamps"].tobytes().split(b"\0")
        holds = (
            checksum == _checksum(fields)
            and fields["classes"].tobytes() == _joined(class_names)
            and all(kept == stamp(folder, kept.split(b" ", 2)[2]) for kept in stamps)
        )
        return Listing(fields["counts"], fields["paths"], fields["lengths"], stamps) if holds else None
    except Exception:  # zipfile and numpy have a dozen kinds for damage; a folder that is gone is an OSError
        return None


def write(folder: Path, class_names: Sequence[str], listing: Listing, began_ns: int) -> None:
    """Keeps a listing, whole or not at all, unless a folder changed since or shortly before it began (`time.time_ns`)."""
    path = place(folder)
    if path is None or any(int(kept.split(b" ", 1)[0]) > began_ns - RACY_NS for kept in listing.stamps):
        return
    fields = {
        "classes": np.frombuffer(_joined(class_names), np.uint8),
        "counts": listing.counts,
        "paths": listing.paths,
        "lengths": listing.lengths,
        "stamps": np.frombuffer(b"\0".join(listing.stamps), np.uint8),
    }
    unfinished = path.with_suffix(".tmp")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with unfinished.open("wb") as file:
                np.savez(file, checksum=_checksum(fields), allow_pickle=False, **fields)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def _joined(class_names: Sequence[str]) -> bytes:
    return b"\0".join([VERSION, *map(os.fsencode, class_names)])


def _checksum(fields: dict[str, np.ndarray]) -> np.ndarray:
    digest = xxhash.xxh3_64()
    for name in sorted(fields):
        digest.update(f"{name} {fields[name].dtype} {fields[name].shape} ".encode())
        digest.update(fields[name].tobytes())
    return np.array(digest.intdigest(), np.uint64)
