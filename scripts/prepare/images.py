"""Parts of the work, and what is noted of every image: its checksum, its size and what is odd about it."""

import contextlib
import io
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import xxhash
from PIL import ExifTags, Image

from data.decode import FORMATS, BadImageError, decode_rgb

SPLITS = ("train", "val")
JPEG_SUFFIXES = (".jpg", ".jpeg")
YCCK = 2  # the colour transform of Adobe's marker


class Part(Protocol):
    """Images that are prepared together, by one process: a part is done as a whole or begun anew."""

    @property
    def key(self) -> str:
        """Names its journal: characters of a file name, and no other part's."""

    @property
    def num_images(self) -> int: ...

    def images(self) -> Iterator[tuple[str, bytes]]:
        """Path below the folder of the tree (`train/n01440764/n01440764_1.JPEG`) and content of each.

        Raises ValueError or OSError, in one line, for what is not as it should be.
        """


@dataclass(frozen=True)
class Source:
    """Where the images of a tree come from.

    Attributes:
        files: name to size and time stamp of what is read; work that was begun on other files is not continued.
        expected: images in a split (`train`) or a class (`train/n01440764`) where that is known beforehand.
        num_bytes: room that the tree will need.
    """

    parts: list[Part]
    classes: tuple[str, ...]
    files: dict[str, list[int]]
    expected: dict[str, int]
    num_bytes: int = 0


def printable(name: str) -> str:
    """File names need not be valid UTF-8; bytes that are not come out as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def fingerprint(paths: list[Path]) -> dict[str, list[int]]:
    """Size and time stamp (ns) by name."""
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


def examine(path: str, content: bytes) -> str:
    """Decodes an image; the line of the manifest on it, without line break.

    One that cannot be decoded has the oddity `undecodable`, a `reason`, and no size.
    """
    entry = {"path": path, "bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
    try:
        decode_rgb(content, path)
        size, odd = _look(path, content)
        return json.dumps(entry | size | ({"odd": odd} if odd else {}))
    except BadImageError as error:
        return json.dumps(entry | {"width": None, "height": None, "odd": ["undecodable"], "reason": error.reason})


def _look(path: str, content: bytes) -> tuple[dict[str, int], list[str]]:
    """Size and oddities of an image that decodes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            try:
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
            except Exception:  # damaged metadata is no damage to the image
                turned = False
            adobe = image.info.get("adobe_transform") if image.mode == "CMYK" else None
            odd = {
                "not_jpeg": image.format != "JPEG" and path.lower().endswith(JPEG_SUFFIXES),
                "ycck": adobe == YCCK,
                "cmyk": image.mode == "CMYK" and adobe != YCCK,
                "gray": image.mode in ("1", "L", "LA") or image.mode.startswith("I"),
                "exif_orientation": turned,
            }
            return {"width": image.width, "height": image.height}, [kind for kind, found in odd.items() if found]


def write(path: Path, content: bytes) -> None:
    """Raises ValueError, in one line, where there is no room or no permission."""
    with _named(path):
        try:
            path.write_bytes(content)
        except FileNotFoundError:  # the first image of its class
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def write_whole(path: Path, text: str) -> None:
    """Under a temporary name, flushed, renamed, and the folder flushed: the file is whole or absent.

    Raises ValueError as `write`.
    """
    unfinished = path.with_name(f"{path.name}.tmp")
    with _named(path):
        with unfinished.open("w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
        sync_folder(path.parent)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"cannot write {path} ({error.strerror or error}): see to the disk; the same command then goes on"
        ) from error


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
