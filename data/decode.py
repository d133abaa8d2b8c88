"""One image file to 8-bit RGB, through Pillow, whatever its mode.

EXIF orientation is ignored, as ImageNet's published results do; animated files give their first frame.
"""

import os

import numpy as np
from PIL import Image


class BadImageError(ValueError):
    """An image file that cannot be decoded; the message names it."""


def open_rgb(path: str | bytes | os.PathLike[str]) -> Image.Image:
    """The decoded image in mode RGB.

    Raises:
        BadImageError: missing, unreadable, truncated or no image at all.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        name = os.fsencode(path).decode("utf-8", "backslashreplace")
        cause = str(error).replace("\n", " ") or type(error).__name__
        raise BadImageError(f"cannot decode {name} ({cause}): replace or remove the file") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: 16-bit values are scaled rather than clipped, transparency is laid over white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.convert("RGB")  # loads it; the file may be closed afterwards
    if image.mode.startswith("I"):  # 16 bits per pixel, in 16- or 32-bit integers
        values = np.asarray(image).astype(np.float32).clip(0, 65535)
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, colours).convert("RGB")
    return image.convert("RGB")
