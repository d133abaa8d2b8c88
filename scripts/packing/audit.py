"""Packs read back: every record against its checksum, and into a class-folder tree."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from data.decode import ImageReadError
from data.pack import ABOUT, PackSource, data_file
from scripts.prepare import pool
from scripts.prepare.images import SPLITS
from scripts.prepare.report import Report

CHUNK = 256  # records that a process takes at a time
SUFFIXES = {"raw": (b".ppm",), "short-side": (b".jpg", b".jpeg")}  # what fits the records of a pack that changes them

_packs: dict[str, PackSource] = {}  # forked processes find them here, open


@dataclass(frozen=True)
class Chunk:
    split: str
    start: int
    stop: int
    folder: Path | None = None  # of the tree, for unpacking

    def records(self) -> Iterator[tuple[int, bytes, str]]:
        """Index, record, and what is wrong with it, if anything."""
        source = _packs[self.split]
        for index in range(self.start, self.stop):
            try:
                record = source.read(index)
                is_good = xxhash.xxh3_64_intdigest(record) == int(source.checksums[index])
                yield index, record, "" if is_good else "its checksum differs"
            except ImageReadError as error:
                yield index, b"", error.reason
            pool.advance()


def verify(out: Path, num_workers: int, report: Report) -> list[str]:
    """One line for each damaged record of the pack, in the pack's order. Raises ValueError where it cannot be opened."""
    chunks = _open(out)
    with report.progress("verifying", sum(map(len, _packs.values())), "images") as bar:
        found = list(pool.share(_damaged, chunks, num_workers, bar.update))
    return [line for _, line in sorted(pair for pairs in found for pair in pairs)]


def _damaged(chunk: Chunk) -> list[tuple[tuple[str, int], str]]:
    source = _packs[chunk.split]
    return [
        (
            (chunk.split, index),
            f"{chunk.split}/{source.name(index)} ({reason}: {length:,} bytes at {source.offsets[index]:,} of "
            f"{data_file(int(source.files[index]))})",
        )
        for index, _, reason in chunk.records()
        if reason and (length := int(source.lengths[index]))
    ]


def unpack(out: Path, folder: Path, num_workers: int, report: Report) -> int:
    """Writes the tree of a pack; the number of its images. What is there already is left alone if it is the same.

    Raises ValueError for a damaged record, a file that is there and differs, and a disk that cannot be written to.
    """
    chunks = _open(out, folder)
    with report.progress("unpacking", sum(map(len, _packs.values())), "images") as bar:
        for _ in pool.share(_write_tree, chunks, num_workers, bar.update):
            pass
    return sum(map(len, _packs.values()))


def _write_tree(chunk: Chunk) -> None:
    source = _packs[chunk.split]
    assert chunk.folder is not None
    for index, record, reason in chunk.records():
        if reason:
            raise ValueError(f"{chunk.split}/{source.name(index)} is damaged ({reason}): copy the pack again")
        name = source.path(index)
        if name.startswith(b"/") or {b"..", b"."} & set(name.split(b"/")):
            raise ValueError(
                f"{source.name(index)} would lie outside of the tree: the pack is not one of scripts/pack.py"
            )
        suffixes = SUFFIXES.get(source.about.kind, ())
        if suffixes and source.heads[index] and not name.lower().endswith(suffixes):
            name += suffixes[0]  # another format under the same name would confuse other programs
        _write(Path(os.fsdecode(os.fsencode(chunk.folder / chunk.split) + b"/" + name)), record)


def _write(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        if path.exists():
            if path.read_bytes() != content:
                raise ValueError(f"{path} is there already and differs: choose another folder")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except OSError as error:
        raise ValueError(
            f"cannot write {path} ({error.strerror or error}): see to the disk; the same command then goes on"
        ) from error


def _open(out: Path, folder: Path | None = None) -> list[Chunk]:
    _packs.clear()
    _packs.update({split: PackSource(out / split) for split in SPLITS if (out / split / ABOUT).exists()})
    if not _packs:
        raise ValueError(f"{out} has no pack in train/ or val/: give the folder that scripts/pack.py has finished")
    return [
        Chunk(split, start, min(start + CHUNK, len(source)), folder)
        for split, source in _packs.items()
        for start in range(0, len(source), CHUNK)
    ]
