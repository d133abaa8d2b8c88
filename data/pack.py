"""Packs: a split's images in a few large files that are read at random, made by scripts/pack.py.

    <split>/data-00000.bin ...   the records, one after another, about 1 GiB to a file
    <split>/index.npy            RECORD for each image, in the order of the class-folder tree that it was made from
    <split>/names.bin            the images' paths below the split's folder, one after another
    <split>/pack.json            what it is, and size and checksum of the other files; it is written last

A record is an ordinary image file: a JPEG in segments (data/native/frame.h), of which the native loader reads and decodes
only what a crop covers; a PPM in a raw pack; or, where neither would do, the file that it was. The index is mapped, not read,
so that opening a million images costs nothing and the processes of a node share it. Forked processes and threads share the files.
"""

import json
import os
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from PIL import Image

from data.decode import LASTING, RETRY_WAITS_S, TURNED, ImageReadError, decode_rgb

VERSION = 1
ABOUT, INDEX, NAMES = "pack.json", "index.npy", "names.bin"
RECORD = np.dtype(
    [
        ("offset", "<i8"),  # in its data file
        ("length", "<i8"),  # bytes
        ("checksum", "<u8"),  # XXH3, 64 bits, of the record
        ("name_end", "<i8"),  # where the image's path ends in NAMES
        ("label", "<i8"),
        ("file", "<i4"),  # number of the data file
        ("head", "<i4"),  # bytes before the pixels of a JPEG in segments or a PPM; 0 for any other file
        ("height", "<i4"),  # pixels as stored, before it is turned upright; 0 for an image that cannot be decoded
        ("width", "<i4"),
        ("orientation", "<i4"),  # as in EXIF; 1 is upright
        ("reserved", "<i4"),
    ]
)


@dataclass(frozen=True)
class About:
    """What pack.json says.

    Attributes:
        kind: lossless, short-side or raw.
        parameters: those of the kind, and of what it was made from.
        files: by name, [bytes, checksum (XXH3, 64 bits, in hexadecimal)] of the pack's other files.
        counts: images in all, and how many of them are special in which way.
    """

    kind: str
    parameters: dict[str, Any]
    class_names: tuple[str, ...]
    files: dict[str, tuple[int, str]]
    counts: dict[str, int]


def encode_about(about: About) -> str:
    """The text of pack.json."""
    fields = {"version": VERSION, **about.__dict__}
    return json.dumps(fields | {"checksum": _checksum(fields)}, indent=1) + "\n"


def read_about(folder: Path) -> About:
    """Raises ValueError where pack.json is damaged, of another version or missing."""
    path = folder / ABOUT
    try:
        fields = json.loads(path.read_bytes())
        if fields["version"] != VERSION:
            raise ValueError(f"version {fields['version']}, and this program reads {VERSION}")
        if fields.pop("checksum") != _checksum(fields):
            raise ValueError("its checksum differs")
        files = {name: (size, checksum) for name, (size, checksum) in fields["files"].items()}
        return About(fields["kind"], fields["parameters"], tuple(fields["class_names"]), files, fields["counts"])
    except FileNotFoundError:
        raise ValueError(f"{path} not found: the pack is not whole, make it by scripts/pack.py") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no pack's ({error}): make the pack anew by scripts/pack.py") from error


def data_file(number: int) -> str:
    return f"data-{number:05d}.bin"


class PackSource:
    """The images of a packed split (`data.sources.EncodedSource`); what follows is indexed like them.

    Attributes:
        fds: open file that holds the record: int32; offsets, lengths, heads: as in RECORD.
        heights, widths: pixels as stored; 0 for an image that cannot be decoded.
        orientations: as in EXIF.

    Raises:
        ValueError: a file is missing, too short, damaged or of another version.
    """

    def __init__(self, folder: Path, exif: bool = False) -> None:
        self.folder = Path(folder)
        self.exif = exif
        self.about = read_about(self.folder)
        self.class_names = self.about.class_names
        index = self._index()
        self._names = _mapped(self.folder / NAMES, *self.about.files[NAMES])
        self._name_ends = index["name_end"]
        self.labels = index["label"]
        self.checksums = index["checksum"]
        self.files = index["file"]
        self.fds = np.array(self._open_files(), np.int32)[self.files]
        self.offsets, self.lengths, self.heads = index["offset"], index["length"], index["head"]
        self.heights, self.widths, self.orientations = index["height"], index["width"], index["orientation"]

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> bytes:
        """Path below the split's folder, as the tree had it."""
        start = self._name_ends[index - 1] if index else 0
        return self._names[start : self._name_ends[index]].tobytes()

    def name(self, index: int) -> str:
        return self.path(index).decode("utf-8", "backslashreplace")

    def holds_pixels(self, index: int) -> bool:
        """Whether the record is `heads[index]` bytes and then the pixels, the right way up."""
        is_ppm = self.about.kind == "raw" and self.heads[index] > 0
        return bool(is_ppm and not (self.exif and self.orientations[index] != 1))

    def read(self, index: int) -> bytes:
        """The record. Raises ImageReadError, after a few attempts where waiting may help."""
        length = int(self.lengths[index])
        for wait in (*RETRY_WAITS_S, None):
            try:
                record = os.pread(self.fds[index], length, self.offsets[index])
                if len(record) == length:
                    return record
                raise ImageReadError(self._full_name(index), f"{self._data_name(index)} has become shorter")
            except OSError as error:
                if isinstance(error, ImageReadError):
                    raise
                if error.errno in LASTING or wait is None:
                    raise ImageReadError(self._full_name(index), error.strerror or str(error)) from error
                time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def load(self, index: int) -> Image.Image:
        image = decode_rgb(self.read(index), self._full_name(index), self.exif)
        turn = int(self.orientations[index])
        is_turned = self.about.kind == "raw" and self.exif and turn in TURNED  # a PPM cannot say what is up
        return image.transpose(TURNED[turn]) if is_turned else image

    def _full_name(self, index: int) -> str:
        return f"{self.folder}/{self.name(index)}"

    def _data_name(self, index: int) -> str:
        return data_file(int(self.files[index]))

    def _index(self) -> np.ndarray:
        path = self.folder / INDEX
        content = _mapped(path, *self.about.files[INDEX])
        index = np.load(path, mmap_mode="r")
        if index.dtype != RECORD or index.shape != (self.about.counts["images"],):
            raise ValueError(f"{path} is no index of version {VERSION}: make the pack anew by scripts/pack.py")
        del content
        return index.view(np.ndarray)

    def _open_files(self) -> list[int]:
        fds: list[int] = []
        weakref.finalize(self, _close, fds)
        for name in sorted(set(self.about.files) - {INDEX, NAMES}):
            path, size = self.folder / name, self.about.files[name][0]
            try:
                fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            except OSError as error:
                raise ValueError(f"cannot open {path} ({error.strerror}): copy it again, or pack anew") from error
            if (found := os.fstat(fds[-1]).st_size) != size:
                raise ValueError(f"{path} has {found:,} bytes instead of {size:,}: copy it again, or pack anew")
        return fds


def _mapped(path: Path, size: int, checksum: str) -> np.ndarray:
    """The bytes of a file that is what it was written as; raises ValueError otherwise."""
    try:
        content = np.memmap(path, np.uint8, "r").view(np.ndarray)
    except (OSError, ValueError) as error:  # numpy maps no empty file
        raise ValueError(f"cannot read {path} ({error}): copy it again, or pack anew") from error
    if len(content) != size or xxhash.xxh3_64_hexdigest(content.data) != checksum:
        raise ValueError(f"{path} is damaged: its checksum differs; copy it again, or pack anew")
    return content


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _checksum(fields: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(fields, sort_keys=True).encode())
