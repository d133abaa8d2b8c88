"""Datasets of the `datasets` library (Arrow): saved by its save_to_disk, or a folder of Parquet files as a hub has them.

    <root>/train/, <root>/validation/                      what DatasetDict.save_to_disk writes
    <root>/train-*.parquet, <root>/validation-*.parquet    or below <root>/data; val and test are taken for validation too

Columns `image` (encoded) and `label` (ClassLabel, which names the classes). Arrow files are mapped into memory, so that
processes and threads share them. Parquet cannot be read at random: the library copies it to Arrow files first, once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.decode import MAX_BYTES, BadImageError, decode_rgb, read_file

SPLITS = {"train": ("train",), "val": ("validation", "val", "test")}


class ArrowSource:
    """One split (`data.sources.EncodedSource`).

    Args:
        cache: where Arrow files made of Parquet go; None: the library's own place ($HF_DATASETS_CACHE).

    Raises:
        ValueError: no dataset, other columns, rows without a class, or the library is not installed.
    """

    def __init__(self, root: Path, split: str, exif: bool = False, cache: str | None = None) -> None:
        self.exif = exif
        self._where = f"{root}, {split}"
        dataset = _open(root, split, cache)
        self.class_names = _class_names(dataset, self._where)
        table = dataset.with_format("arrow")[:]  # maps, copies nothing
        self._images = table["image"]
        labels = table["label"].fill_null(-1).to_numpy().astype(np.int64)
        unknown = np.flatnonzero((labels < 0) | (labels >= len(self.class_names)))
        if len(unknown):
            raise ValueError(
                f"{self._where}: {len(unknown):,} rows have no class (row {unknown[0]}: {labels[unknown[0]]}); a split without "
                "labels can neither train nor validate"
            )
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        path = self._field(index, "path")
        return f"{self.class_names[self.labels[index]]}/{Path(path).name if path else index}"

    def read(self, index: int) -> bytes:
        """The image's bytes, or those of the file that the row names. Raises as `data.decode.read_file`."""
        content, name = self._field(index, "bytes"), self._full_name(index)
        if content is None and (path := self._field(index, "path")):
            return read_file(path, f"{path} ({name})")
        if content is None or len(content) > MAX_BYTES:
            raise BadImageError(name, "the row is empty" if content is None else f"more than {MAX_BYTES:,} bytes")
        return bytes(content)

    def load(self, index: int) -> Image.Image:
        return decode_rgb(self.read(index), self._full_name(index), self.exif)

    def _field(self, index: int, name: str) -> Any:
        """`bytes` or `path` of a row; a column may also be bytes alone."""
        row = self._images[index]
        if hasattr(row, "keys"):
            return row[name].as_py() if name in row.keys() and row.is_valid else None  # noqa: SIM118 - no dict
        return row.as_py() if name == "bytes" else None

    def _full_name(self, index: int) -> str:
        return f"{self._where}, row {index} ({self.name(index)})"


def _open(root: Path, split: str, cache: str | None) -> Any:
    """The split as a `datasets.Dataset`."""
    try:
        from datasets import Dataset, load_from_disk
    except ImportError:  # also where ./datasets, a folder of data, is all there is of that name
        raise ValueError(
            "data=arrow needs datasets, which is not installed: pip install datasets (the extra `arrow`)"
        ) from None
    try:
        for name in SPLITS[split]:
            if (root / name / "state.json").is_file():
                return load_from_disk(str(root / name))
            for folder in (root, root / "data"):
                if files := sorted(map(str, folder.glob(f"{name}-*.parquet"))):
                    return Dataset.from_parquet(files, cache_dir=cache)
    except Exception as error:  # the library has a dozen kinds
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"{root} cannot be opened ({said}): restore it, or save it again by save_to_disk") from error
    names = " or ".join(SPLITS[split])
    raise ValueError(
        f"{root} has no split {names}: data=arrow takes a DatasetDict saved by save_to_disk, or {SPLITS[split][0]}-*.parquet"
    )


def _class_names(dataset: Any, where: str) -> tuple[str, ...]:
    features = dataset.features
    names: Sequence[str] | None = getattr(features.get("label"), "names", None)
    if "image" not in features or names is None:
        raise ValueError(
            f"{where} has columns {', '.join(features)}: needed are image and label, a ClassLabel that names the classes"
        )
    return tuple(names)
