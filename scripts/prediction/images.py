"""The images that were named: files, and those below folders; and where the cards about them go."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data.decode import BadImageError, ImageReadError, decode_rgb, read_file
from data.folder import IMAGE_SUFFIXES, printable


@dataclass(frozen=True)
class Given:
    """A file, and what to call it: its path below the folder that was named, or its own name."""

    path: Path
    name: Path


def list_images(arguments: Sequence[str]) -> list[Given]:
    """Files as they were named, folders with all that is below them, sorted; each file once.

    Raises ValueError for what is not there, folders without images, and where nothing was named at all.
    """
    if not arguments:
        raise ValueError("no images given: name files or folders, as in predict.py checkpoint=runs/x cat.jpg photos/")
    found: dict[Path, Given] = {}
    for path in map(Path, arguments):
        inside = [Given(path, Path(path.name))] if path.is_file() else _below(path)
        if not inside:
            missing = "no images in this folder" if path.is_dir() else "no such file or folder"
            raise ValueError(f"{printable(str(path))}: {missing} ({b' '.join(IMAGE_SUFFIXES).decode()})")
        for image in inside:
            found.setdefault(image.path.absolute(), image)
    return list(found.values())


def _below(folder: Path) -> list[Given]:
    """Without hidden files and folders, as data sets are listed; links are followed, but not in circles."""
    found, visited = [], set()
    for inner, folders, files in os.walk(folder, followlinks=True):
        if (real := Path(inner).resolve()) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(inner, name) for name in files if not name.startswith(".")]
        found += [path for path in paths if os.fsencode(path).lower().endswith(IMAGE_SUFFIXES)]
    return [Given(path, path.relative_to(folder)) for path in sorted(found)]


def place_cards(images: Iterable[Given], folder: Path) -> dict[Path, Path]:
    """A PNG in `folder` for each image's path, named after it; never the same twice, and never one of the images."""
    images = list(images)
    taken = {image.path.absolute() for image in images}
    places = {}
    for image in images:
        place, number = folder / image.name.with_suffix(".png"), 1
        while place.absolute() in taken:
            number += 1
            place = folder / image.name.with_name(f"{image.name.stem}-{number}.png")
        taken.add(place.absolute())
        places[image.path] = place
    return places


class Encoded:
    """A few images in memory, as they were on the disk: a `data.sources.EncodedSource`.

    A file that cannot be read is left out, and `warn` hears why. `exif` turns images upright.
    """

    class_names: tuple[str, ...] = ()

    def __init__(self, images: Sequence[Given], exif: bool, warn: Callable[[str], object]) -> None:
        self.exif = exif
        self.images: list[Given] = []
        self._contents: list[bytes] = []
        for image in images:
            try:
                self._contents.append(read_file(image.path, printable(str(image.path))))
                self.images.append(image)
            except (BadImageError, ImageReadError) as error:
                warn(f"warning: {error.name} is left out ({error.reason})")
        self.labels = np.zeros(len(self.images), np.int64)  # nobody asks for them

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return printable(str(self.images[index].path))

    def read(self, index: int) -> bytes:
        return self._contents[index]

    def load(self, index: int) -> Image.Image:
        return decode_rgb(self.read(index), self.name(index), self.exif)
