"""Sources of images: class-folder trees on disk, and synthetic images.

    <root>/train/<class>/**.jpg      the classes are train's folder names, sorted: that is the label map
    <root>/val/<class>/**.jpg        must have the same folders

File names are kept in one byte string per source rather than a million python objects: loader processes forked from
this one then share the memory, as no reference count in it ever changes.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from data.config import DataConfig
from data.decode import open_rgb
from data.digits import prepare_digits
from data.randomness import stream_key

Split = Literal["train", "val"]

IMAGE_SUFFIXES = (b".jpg", b".jpeg", b".png", b".webp", b".bmp", b".gif", b".ppm", b".pgm", b".tif", b".tiff")
SYNTHETIC_PIXELS = 256  # height and width
SYNTHETIC_CLASSES = 1000
PREPARE = "; scripts/prepare_imagenet.py makes it from the archives or from Parquet files"
NUM_CLASSES = {"imagenet": 1000, "digits": 10}


class Source(Protocol):
    """Labelled images by index."""

    class_names: tuple[str, ...]
    labels: np.ndarray  # int64 (len,)

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Printable name of an image: its path below the split's folder."""

    def load(self, index: int) -> Image.Image:
        """The decoded RGB image; raises what `data.decode.open_rgb` does, which names the file."""


def open_sources(config: DataConfig) -> tuple[Source, Source]:
    """The training and the validation images.

    Raises:
        ValueError: folders are missing or empty, or the class folders do not fit; the message says what to do.
    """
    return open_source(config, "train"), open_source(config, "val")


def open_source(config: DataConfig, split: Split) -> Source:
    """One split; "val" lists train's class folders but none of its files. Raises as `open_sources`."""
    if config.kind == "synthetic":
        num_images = config.num_images if split == "train" else max(1, config.num_images // 10)
        return SyntheticSource(num_images, config.num_classes or SYNTHETIC_CLASSES, split)
    root = _root(config)
    if config.kind == "digits":
        prepare_digits(root)
    train = root / "train"
    if config.kind == "imagenet" and split == "val" and not train.is_dir():
        train = root / "val"  # enough to evaluate: the count below makes sure that the sorted folders are the same
    class_names = _class_folders(train, config.kind)
    num_classes = config.num_classes or NUM_CLASSES.get(config.kind)
    if num_classes is not None and len(class_names) != num_classes:
        hint = "use data=folder" if config.num_classes is None else "set data.num_classes to that or to null"
        raise ValueError(
            f"data={config.kind} needs {num_classes} class folders but {train} has {len(class_names)}: {hint}"
        )
    if split == "val":
        _check_same_classes(class_names, _class_folders(root / "val", config.kind), root)
    return FolderSource(root / split, class_names, config.exif)


def _root(config: DataConfig) -> Path:
    if config.root is not None:
        return Path(config.root).expanduser()
    if config.kind == "digits":
        return Path("datasets/digits")
    if config.kind == "imagenet" and os.environ.get("IMAGENET_DIR"):
        return Path(os.environ["IMAGENET_DIR"]).expanduser()
    unset = "data.root and IMAGENET_DIR are not set" if config.kind == "imagenet" else "data.root is not set"
    raise ValueError(
        f"{unset}: set data.root to the folder that holds train/ and val/ with one folder per class"
        f"{PREPARE if config.kind == 'imagenet' else ''} (experiment=digits runs without a download)"
    )


def _class_folders(folder: Path, kind: str) -> tuple[str, ...]:
    """Names of the class folders in a split, sorted."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder} not found: put one folder per class there, or set data.root"
            f"{' or IMAGENET_DIR' if kind == 'imagenet' else ''} to the folder that holds train/ and val/"
            f"{PREPARE if kind == 'imagenet' else ''} (experiment=digits runs without a download)"
        )
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


def _check_same_classes(train: Sequence[str], val: Sequence[str], root: Path) -> None:
    missing, added = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    problems = [
        f"{what} {', '.join(map(_printable, names[:5]))}{' ...' if len(names) > 5 else ''} ({len(names)})"
        for what, names in (("lacks", missing), ("adds", added))
        if names
    ]
    if problems:
        raise ValueError(
            f"{root / 'val'} {' and '.join(problems)} compared with train/, whose folders are the classes: "
            "make the two agree"
        )


class FolderSource:
    """The images of one split, sorted by path within each class.

    Raises:
        ValueError: a class folder without images, or files that cannot be read, by name.
    """

    def __init__(self, folder: Path, class_names: tuple[str, ...], exif: bool = False) -> None:
        self.folder = os.fsencode(folder)
        self.exif = exif
        self.class_names = tuple(map(_printable, class_names))
        # Threads, because on network file systems the scan is all waiting.
        with ThreadPoolExecutor(max_workers=16) as pool:
            listed = list(pool.map(lambda name: _image_files(os.fsencode(folder / name)), class_names))
        _refuse(folder, [(path[len(self.folder) + 1 :], reason) for _, broken in listed for path, reason in broken])
        files = [names for names, _ in listed]
        for name, names in zip(class_names, files, strict=True):
            if not names:
                raise ValueError(
                    f"{_printable(str(folder / name))} has no images ({b' '.join(IMAGE_SUFFIXES).decode()}): "
                    "fill or remove the folder, in train/ and val/ alike"
                )
        paths = [
            os.fsencode(name) + b"/" + file for name, names in zip(class_names, files, strict=True) for file in names
        ]
        self.labels = np.repeat(np.arange(len(class_names)), [len(names) for names in files])
        self._paths = b"".join(paths)
        self._ends = np.cumsum([len(path) for path in paths])

    def __len__(self) -> int:
        return len(self.labels)

    def _path(self, index: int) -> bytes:
        start = self._ends[index - 1] if index else 0
        return self._paths[start : self._ends[index]]

    def name(self, index: int) -> str:
        return _printable(os.fsdecode(self._path(index)))

    def load(self, index: int) -> Image.Image:
        return open_rgb(self.folder + b"/" + self._path(index), self.exif)


def _image_files(class_folder: bytes) -> tuple[list[bytes], list[tuple[bytes, str]]]:
    """Paths below a class folder, sorted, without hidden and foreign files and every link that leads back or up.

    And the whole paths of what cannot be read, each with the reason; for a regular file that takes one system call.
    """
    visited = _identities(class_folder)
    files: list[bytes] = []
    broken: list[tuple[bytes, str]] = []
    pending = [class_folder]
    while pending:
        folder = pending.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            broken.append((folder, error.strerror or str(error)))
            continue
        for entry in entries:
            if entry.name.startswith(b"."):  # .DS_Store, ._image.JPEG and the like
                continue
            is_image = entry.name.lower().endswith(IMAGE_SUFFIXES)
            try:
                if is_image and entry.is_file():
                    files.append(entry.path)
                    if not os.access(entry.path, os.R_OK):
                        broken.append((entry.path, "no permission to read"))
                elif entry.is_dir():
                    if (identity := _identity(entry.path)) not in visited:
                        visited.add(identity)
                        pending.append(entry.path)
                elif is_image:
                    exists = Path(os.fsdecode(entry.path)).exists()
                    broken.append((entry.path, "not a regular file" if exists else "link to nothing"))
            except OSError as error:  # links in a circle, targets out of reach
                broken.append((entry.path, error.strerror or str(error)))
    return sorted(path[len(class_folder) + 1 :] for path in files), broken


def _refuse(folder: Path, broken: list[tuple[bytes, str]]) -> None:
    if broken:
        named = ", ".join(f"{_printable(os.fsdecode(path))} ({reason})" for path, reason in sorted(broken)[:5])
        raise ValueError(
            f"{_printable(str(folder))} has {len(broken)} files that cannot be read: {named}{' ...' if len(broken) > 5 else ''}; "
            "repair or remove them"
        )


def _identity(path: str | bytes | Path) -> tuple[int, int]:
    status = Path(os.fsdecode(path)).stat()
    return status.st_dev, status.st_ino


def _identities(folder: Path | bytes) -> set[tuple[int, int]]:
    """The folder and all that contain it: where a link must not lead."""
    resolved = Path(os.fsdecode(folder)).resolve()
    return {_identity(path) for path in (resolved, *resolved.parents)}


def _printable(name: str) -> str:
    """File names need not be valid UTF-8; bytes that are not come out as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


class SyntheticSource:
    """Noise around one colour per class: learnable, and costs little to make, so that the rest can be measured."""

    def __init__(self, num_images: int, num_classes: int, split: Split) -> None:
        self.class_names = tuple(f"class{label}" for label in range(num_classes))
        self.labels = np.arange(num_images) % num_classes
        self.split = split

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"{self.class_names[self.labels[index]]}/{index}"

    def load(self, index: int) -> Image.Image:
        colour = np.random.default_rng(stream_key("colour", int(self.labels[index]))).integers(
            128, size=3, dtype=np.uint8
        )
        stream = np.random.default_rng(stream_key("synthetic", self.split == "val", index))
        noise = stream.integers(128, size=(SYNTHETIC_PIXELS, SYNTHETIC_PIXELS, 3), dtype=np.uint8)
        return Image.fromarray(noise + colour)
