"""From an image file to its record in a pack, decoded once more before it counts."""

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import ExifTags, Image

from data import native
from data.decode import FORMATS, BadImageError, decode_rgb
from data.native import frames

UPRIGHT = 1


@dataclass(frozen=True)
class Recipe:
    """What becomes of the images.

    Attributes:
        kind: lossless keeps every pixel; short-side shrinks what is larger and codes anew what gets smaller by that; raw shrinks
            and does not code.
        short_side: pixels of the shorter side, at most; 0 for lossless.
        quality: of the JPEGs of short-side.
    """

    kind: Literal["lossless", "short-side", "raw"] = "lossless"
    short_side: int = 0
    quality: int = 0

    @property
    def parameters(self) -> dict[str, int]:
        """As the pack will say."""
        of_kind = {"short-side": ("short_side", "quality"), "raw": ("short_side",)}
        return {name: getattr(self, name) for name in of_kind.get(self.kind, ())}


@dataclass(frozen=True)
class Record:
    """Fields of data.pack.RECORD that follow from the image."""

    content: bytes
    head: int = 0
    height: int = 0
    width: int = 0
    orientation: int = UPRIGHT


def make(content: bytes, name: str, recipe: Recipe) -> Record:
    """The record of the file `content`; of one that cannot be decoded, the file itself, without a size."""
    try:
        image = decode_rgb(content, name)
    except BadImageError:
        return Record(content)
    orientation = _orientation(content)
    if recipe.kind == "raw":
        image = _shrunk(image, recipe.short_side)
        record, head = _raw(image)
        if not np.array_equal(np.asarray(decode_rgb(record, name)), np.asarray(image)):
            raise AssertionError(f"{name}: its pixels do not come back")
        return Record(record, head, image.height, image.width, orientation)
    if recipe.kind == "short-side":
        smaller = _shrunk(image, recipe.short_side)
        coded = _encoded(smaller, recipe.quality, orientation)
        if smaller is not image or len(coded) < len(content):  # what is poor already becomes no better
            content, image = coded, decode_rgb(coded, name)
    record, head = _framed(content)
    if head and not np.array_equal(np.asarray(decode_rgb(record, name)), np.asarray(image)):
        record, head = content, 0  # an incomplete progressive file, which decoders smooth
    return Record(record, head, image.height, image.width, orientation)


def _framed(content: bytes) -> tuple[bytes, int]:
    return (frames.reframe(content) if native.available() else None) or (content, 0)


def _raw(image: Image.Image) -> tuple[bytes, int]:
    head = b"P6\n%d %d\n255\n" % image.size
    return head + image.tobytes(), len(head)


def _shrunk(image: Image.Image, short_side: int) -> Image.Image:
    """The image itself where it is not larger."""
    scale = short_side / min(image.size)
    if scale >= 1:
        return image
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def _encoded(image: Image.Image, quality: int, orientation: int) -> bytes:
    exif = Image.Exif()
    if orientation != UPRIGHT:
        exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, exif=exif.tobytes() if orientation != UPRIGHT else b"")
    return buffer.getvalue()


def _orientation(content: bytes) -> int:
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return int(image.getexif().get(ExifTags.Base.Orientation, UPRIGHT))
    except Exception:  # damaged metadata is no damage to the image
        return UPRIGHT
