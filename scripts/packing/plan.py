"""What is to be packed: the splits of a tree, which of their images share a data file, and what that will take."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data.config import DataConfig
from data.folder import FolderSource, class_folders
from data.sources import is_pack, open_sources
from scripts.packing.records import Recipe
from scripts.prepare.images import SPLITS

UNFINISHED = "unfinished"
FILE_BYTES = 1 << 30  # of a data file, about
LEAST_FILE_BYTES = 4 << 20  # of a small data set, which is cut into NUM_FILES, so that all processes have work
NUM_FILES = 64
BYTES_PER_PIXEL = {"short-side": 0.5, "raw": 3.0}  # of a record, about
ASPECT = 1.45  # longer side over shorter, about


@dataclass(frozen=True)
class Plan:
    """One split on its way into a pack.

    Attributes:
        bounds: data file number k holds the images bounds[k] to bounds[k + 1]; follows from the tree alone.
        num_bytes: what the pack will take, about.
        parameters: what was packed and how, as the pack will say.
        stamps: a checksum of the files' time stamps: work that was begun on other ones is not continued.
    """

    source: FolderSource
    out: Path
    recipe: Recipe
    bounds: list[int]
    num_bytes: int
    parameters: dict[str, Any]
    stamps: str

    @property
    def unfinished(self) -> Path:
        return self.out / UNFINISHED

    @property
    def numbers(self) -> range:
        """Of the data files."""
        return range(len(self.bounds) - 1)

    def rows(self, number: int) -> Path:
        """The index of a data file that is being written."""
        return self.unfinished / f"{number:05d}.rows"

    def done(self, number: int) -> Path:
        """There once a data file is whole: its size and checksum."""
        return self.unfinished / f"{number:05d}.json"

    def path(self, index: int) -> bytes:
        """An image's path below the split's folder."""
        return self.source.path(index)[len(self.source.folder) + 1 :]


def open_splits(root: Path) -> dict[str, FolderSource]:
    """train and val, or the one that is there. Raises ValueError as `data.sources.open_sources`, or for a pack."""
    there = [split for split in SPLITS if (root / split).is_dir()]
    if not there:
        raise ValueError(f"{root} has neither train/ nor val/: give the folder that holds them")
    if packs := [split for split in there if is_pack(root / split)]:
        raise ValueError(f"{root / packs[0]} is a pack already: --unpack it, and pack the tree in another way")
    if len(there) == 1:
        return {there[0]: FolderSource(root / there[0], class_folders(root / there[0]))}
    config = DataConfig(kind="folder", root=str(root))
    opened = zip(SPLITS, open_sources(config), strict=True)
    return {split: source for split, source in opened if isinstance(source, FolderSource)}


def make_plan(source: FolderSource, out: Path, recipe: Recipe, has_segments: bool) -> Plan:
    """Looks at every file, but into none. Raises ValueError for one that is gone."""

    def look(index: int) -> tuple[int, int]:
        try:
            status = os.stat(source.path(index))  # noqa: PTH116 - names need not be text
        except OSError as error:
            raise ValueError(
                f"cannot read {source.name(index)} ({error.strerror}): check the file and its disk"
            ) from error
        return status.st_size, status.st_mtime_ns

    with ThreadPoolExecutor(max_workers=16) as threads:  # on network file systems this is all waiting
        sizes, times = np.array(list(threads.map(look, range(len(source)))), np.int64).T.copy()
    listing = xxhash.xxh3_128(sizes)
    for index in range(len(source)):
        listing.update(source.path(index)[len(source.folder) :])
    expected = _expected(sizes, recipe)
    made_from = {"images": len(sizes), "bytes": int(sizes.sum()), "names_and_sizes": listing.hexdigest()}
    parameters = {**recipe.parameters, "segments": has_segments, "made_from": made_from}
    stamps = xxhash.xxh3_128_hexdigest(times)
    return Plan(source, out, recipe, _cut(expected), int(expected.sum()), parameters, stamps)


def _expected(sizes: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Bytes of each record, about: int64 (images,)."""
    if recipe.kind == "lossless":
        return sizes
    shrunk = int(recipe.short_side**2 * ASPECT * BYTES_PER_PIXEL[recipe.kind])
    return np.minimum(sizes, shrunk) if recipe.kind == "short-side" else np.full_like(sizes, shrunk)


def _cut(expected: np.ndarray) -> list[int]:
    total = int(expected.sum())
    per_file = min(FILE_BYTES, max(LEAST_FILE_BYTES, total // NUM_FILES))
    num_files = max(1, round(total / per_file))
    cuts = np.searchsorted(np.cumsum(expected), np.arange(1, num_files) * (total / num_files))
    return [int(cut) for cut in np.unique([0, *cuts, len(expected)])]
