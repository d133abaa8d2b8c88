"""The Parquet files of a hub's copy as parts: columns `image` (`bytes` and `path`) and `label`, a file is a part."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.config import IMAGENET
from scripts.prepare.archives import WNID
from scripts.prepare.images import Part, Source, fingerprint

SHARD = re.compile(r"(train|val|validation)-(\d+)(?:-of-(\d+))?(?:-\w+)?\.parquet", re.ASCII)
TRAIN_NAME = re.compile(rf"(({WNID})_\d+)(?:_({WNID}))?\.JPEG", re.ASCII)
VAL_NAME = re.compile(rf"(ILSVRC2012_val_\d{{8}})()(?:_({WNID}))?\.JPEG", re.ASCII)
ROWS = 64  # read at a time


@dataclass(frozen=True)
class Shard:
    """One file; the i-th of `classes` has label i."""

    file: Path
    split: str
    classes: tuple[str, ...]
    num_images: int

    @property
    def key(self) -> str:
        return self.file.stem

    def images(self) -> Iterator[tuple[str, bytes]]:
        row = 0
        with pyarrow_parquet().ParquetFile(self.file) as table:
            for batch in table.iter_batches(ROWS, columns=["image", "label"], use_threads=False):
                for image, label in zip(*(batch.column(name).to_pylist() for name in ("image", "label")), strict=True):
                    yield self._path(image, label, row), image["bytes"]
                    row += 1

    def _path(self, image: Any, label: Any, row: int) -> str:
        """In the tree; an image whose name is not ImageNet's is named for its row."""
        where = f"{self.file}, row {row}"
        if not isinstance(image, dict) or not isinstance(image.get("bytes"), bytes) or not isinstance(label, int):
            raise ValueError(
                f"{where} has no image.bytes or no label: needed are columns image (bytes, path) and label"
            )
        if not 0 <= label < len(self.classes):
            raise ValueError(f"{where} has label {label}, but there are {len(self.classes)} classes: give their list")
        wnid = self.classes[label]
        named = (TRAIN_NAME if self.split == "train" else VAL_NAME).fullmatch(image.get("path") or "")
        if named is None:
            return f"{self.split}/{wnid}/{self.file.stem}_{row}.JPEG"
        if others := {named[2], named[3]} - {wnid, "", None}:
            raise ValueError(
                f"{where} is {named[0]} of {others.pop()}, but label {label} is {wnid}: the classes are not in this copy's order"
            )
        return f"{self.split}/{wnid}/{named[1]}.JPEG"


def read_classes(folder: Path) -> list[str]:
    """The classes by label, from the names of the training images, which begin with their class; no image is read.

    Raises ValueError where names or labels do not tell.
    """
    classes: dict[int, str] = {}
    for file in sorted(folder.glob("train-*.parquet")):
        with pyarrow_parquet().ParquetFile(file) as shard:
            rows = shard.read(["image.path", "label"]).to_pylist()
        for row in rows:
            named = TRAIN_NAME.fullmatch((row.get("image") or {}).get("path") or "")
            if named is None or classes.setdefault(row.get("label"), named[2]) != named[2]:
                raise ValueError(
                    f"{file} has {row}, which does not tell the class of its label: give --devkit or --classes"
                )
    if not classes or set(classes) != set(range(len(classes))):
        raise ValueError(
            f"{folder} has training images of {len(classes)} labels, with gaps: give --devkit or --classes"
        )
    return [classes[label] for label in range(len(classes))]


def open_parquet(folder: Path, classes: Sequence[str], expected: dict[str, int]) -> Source:
    """The files train-*.parquet and validation-*.parquet (or val-*) of `folder`; `classes` by label.

    Raises ValueError for files that are missing or hold something else, and without pyarrow.
    """
    parquet = pyarrow_parquet()
    found = [(path, match) for path in sorted(folder.glob("*.parquet")) if (match := SHARD.fullmatch(path.name))]
    parts: list[Part] = []
    for split, word in (("train", "train"), ("val", "val(?:idation)?")):
        shards = [(path, match) for path, match in found if re.fullmatch(word, match[1])]
        totals = {int(match[3]) for _, match in shards if match[3]}
        if not shards or len(totals) > 1 or (totals and {int(match[2]) for _, match in shards} != set(range(*totals))):
            raise ValueError(
                f"{folder} has {len(shards)} files of {split} (of {max(totals, default='any')}): needed are all of "
                f"{'train' if split == 'train' else 'validation'}-*.parquet; download what is missing"
            )
        for path, _ in shards:
            rows = parquet.read_metadata(path).num_rows
            parts.append(Shard(path, split, tuple(classes), rows))
    files = [path for path, _ in found]
    known = expected or (IMAGENET if len(classes) == 1000 else {})
    return Source(parts, tuple(sorted(classes)), fingerprint(files), known, sum(path.stat().st_size for path in files))


def pyarrow_parquet() -> Any:
    """The module pyarrow.parquet. Raises ValueError where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            "--parquet needs pyarrow, which is not installed: pip install pyarrow (the extra `parquet`)"
        ) from None
    return pyarrow.parquet
