"""Sources of images: which one a configuration means, what all of them offer, and synthetic images.

    <root>/train/<class>/**.jpg      the classes are train's folder names, sorted: that is the label map
    <root>/val/<class>/**.jpg        must have the same folders
    <root>/train/pack.json           or either split as a pack (`data.pack`), whatever the kind

Class-folder trees are in `data.folder`, datasets of the `datasets` library in `data.arrow`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from data import remote
from data.arrow import ArrowSource
from data.config import DataConfig
from data.digits import prepare_digits
from data.folder import FolderSource, class_folders, printable
from data.pack import ABOUT, PackSource, read_about
from data.randomness import stream_key

Split = Literal["train", "val"]

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
        """The decoded RGB image; raises what `data.decode` does, which names the file."""


@runtime_checkable
class EncodedSource(Source, Protocol):
    """A source whose images are encoded: `load` decodes what `read` gives. Threads and forked processes may share it."""

    exif: bool  # whether `load` turns images upright

    def read(self, index: int) -> bytes:
        """The file's bytes. Raises ImageReadError where they cannot be had, BadImageError where no image is that large."""


def open_sources(config: DataConfig) -> tuple[Source, Source]:
    """The training and the validation images.

    Raises:
        ValueError: folders are missing or empty, or the classes do not fit; the message says what to do.
        OSError: what is behind a URL cannot be reached.
    """
    train, val = open_source(config, "train"), open_source(config, "val")
    _check_same_classes(train.class_names, val.class_names, str(config.root))
    return train, val


def open_source(config: DataConfig, split: Split) -> Source:
    """One split; "val" lists train's class folders but none of its files. Raises as `open_sources`."""
    if config.kind == "synthetic":
        num_images = config.num_images if split == "train" else max(1, config.num_images // 10)
        return SyntheticSource(num_images, config.num_classes or SYNTHETIC_CLASSES, split)
    root = _root(config)
    if config.kind == "arrow":
        if remote.is_url(root):
            raise ValueError(f"data.root={root}: data=arrow reads a folder; copy the dataset to one first")
        source = ArrowSource(Path(root).expanduser(), split, config.exif, config.cache)
        _check_count(config, source.class_names, root)
        return source
    folder = _split_folder(config, root, split)
    train = folder.with_name("train")
    if split == "val" and (
        (is_pack(folder) and not is_pack(train)) or (config.kind == "imagenet" and not train.is_dir())
    ):
        train = folder  # enough to evaluate: the count below makes sure that the sorted folders are the same
    class_names = _class_names(train, config)
    _check_count(config, class_names, str(train))
    if split == "val":
        _check_same_classes(class_names, _class_names(folder, config), str(folder.parent))
    return PackSource(folder, config.exif) if is_pack(folder) else FolderSource(folder, class_names, config.exif)


def is_pack(folder: Path) -> bool:
    """Whether a split's folder holds a pack rather than class folders."""
    return (folder / ABOUT).is_file()


def _root(config: DataConfig) -> str:
    if config.root is not None:
        return config.root
    if config.kind == "digits":
        return "datasets/digits"
    if config.kind == "imagenet" and os.environ.get("IMAGENET_DIR"):
        return os.environ["IMAGENET_DIR"]
    unset = "data.root and IMAGENET_DIR are not set" if config.kind == "imagenet" else "data.root is not set"
    raise ValueError(
        f"{unset}: set data.root to the folder that holds train/ and val/ with one folder per class"
        f"{PREPARE if config.kind == 'imagenet' else ''} (experiment=digits runs without a download)"
    )


def _split_folder(config: DataConfig, root: str, split: Split) -> Path:
    """Where the split is on this node, perhaps from now on."""
    if config.cache is not None or remote.is_url(root):
        return remote.local_copy(root, split, config.cache)
    folder = Path(root).expanduser() / split
    if config.kind == "digits" and not is_pack(folder):
        prepare_digits(folder.parent)
    return folder


def _class_names(folder: Path, config: DataConfig) -> tuple[str, ...]:
    if is_pack(folder):
        return read_about(folder).class_names
    if not folder.is_dir():
        is_imagenet = config.kind == "imagenet"
        raise ValueError(
            f"{folder} not found: put one folder per class there, or set data.root"
            f"{' or IMAGENET_DIR' if is_imagenet else ''} to the folder that holds train/ and val/"
            f"{PREPARE if is_imagenet else ''} (experiment=digits runs without a download)"
        )
    return class_folders(folder)


def _check_count(config: DataConfig, class_names: Sequence[str], where: str) -> None:
    num_classes = config.num_classes or NUM_CLASSES.get(config.kind)
    if num_classes is not None and len(class_names) != num_classes:
        hint = "use data=folder" if config.num_classes is None else "set data.num_classes to that or to null"
        raise ValueError(
            f"data={config.kind} needs {num_classes} class folders but {where} has {len(class_names)}: {hint}"
        )


def _check_same_classes(train: Sequence[str], val: Sequence[str], root: str) -> None:
    missing, added = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    problems = [
        f"{what} {', '.join(map(printable, names[:5]))}{' ...' if len(names) > 5 else ''} ({len(names)})"
        for what, names in (("lacks", missing), ("adds", added))
        if names
    ]
    if not problems and tuple(train) != tuple(val):  # the numbers of a dataset's classes need not follow their names
        problems = ["has train's classes in another order"]
    if problems:
        raise ValueError(
            f"{root}/val {' and '.join(problems)} compared with train/, whose folders are the classes: make the two agree"
        )


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
