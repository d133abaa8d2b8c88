"""One image file to 8-bit RGB, through Pillow, whatever its mode.

The bytes are read first and decoded from memory, so that trouble with a disk is told apart from bad content: what is bad
today is bad tomorrow, and another image may stand in for it; what could not be read now may be there in a minute, and a
run that went on without it could not be repeated. Animated files give their first frame.
"""

import io
import os
import stat
import struct
import time
import warnings
from errno import EACCES, EISDIR, ELOOP, ENAMETOOLONG, ENOENT, ENOTDIR, EPERM

import numpy as np
from PIL import ExifTags, Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")  # Pillow knows more; one of them starts Ghostscript
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
MAX_BYTES = 1 << 30
RETRY_WAITS_S = (0.1, 0.5, 2.0)  # before each new attempt to read; network file systems recover in seconds
LASTING = {ENOENT, ENOTDIR, EACCES, EPERM, EISDIR, ELOOP, ENAMETOOLONG}  # no wait helps against these

TURNED = {  # how to put an image upright, by its EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class _ImageError(Exception):
    """`name` (printable) and `reason`, in one line with what to do."""

    text = "{name}: {reason}"

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(self.text.format(name=name, reason=reason))
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.name, self.reason)


class BadImageError(_ImageError, ValueError):
    """A file whose content is no image that can be decoded."""

    text = "cannot decode {name} ({reason}): replace or remove the file"


class ImageReadError(_ImageError, OSError):
    """A file whose bytes could not be had; they may be good."""

    text = "cannot read {name} ({reason}): check the file and the disk or network that holds it, then start again"


def decode_rgb(data: bytes, name: str, exif: bool = False) -> Image.Image:
    """The image that `data` holds, in mode RGB; `exif` turns it upright as its EXIF orientation says.

    Raises:
        BadImageError: truncated, too large, or no image at all; it names `name`.
        ImageReadError: too little memory.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images and odd metadata, which change no pixel
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS:,}")
                upright = to_rgb(image)
                return upright.transpose(TURNED[turn]) if exif and (turn := _orientation(image)) in TURNED else upright
    except MemoryError as error:  # of this machine, now: not a property of the file
        raise ImageReadError(name, "not enough memory to decode it") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise BadImageError(name, _reason(error, len(data))) from error


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of an 8-bit gray or three-colour JPEG that has an end; None for whatever only Pillow should judge."""
    if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":
        return None
    start = 2
    while start + 10 <= len(data) and data[start] == 0xFF:
        marker, length = data[start + 1], int.from_bytes(data[start + 2 : start + 4])
        if marker in (0xC0, 0xC1, 0xC2):  # the frame: baseline, extended, progressive
            precision, height, width, num_colours = struct.unpack(">BHHB", data[start + 4 : start + 10])
            fits = 0 < height * width <= MAX_PIXELS
            return (height, width) if precision == 8 and num_colours in (1, 3) and fits else None
        if marker == 0xFF:  # fill byte
            start += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return None
        else:
            start += 2 + length
    return None


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


def read_file(path: str | bytes | os.PathLike[str], name: str) -> bytes:
    """All bytes of a regular file.

    Raises:
        ImageReadError: missing or unreadable, after a few attempts where waiting may help; it names `name`.
        BadImageError: more than MAX_BYTES.
    """
    for wait in (*RETRY_WAITS_S, None):
        try:
            with open(path, "rb", buffering=0, opener=_open_without_waiting) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise ImageReadError(name, "not a regular file")
                if status.st_size > MAX_BYTES:
                    raise BadImageError(name, f"{status.st_size:,} bytes are more than {MAX_BYTES:,}")
                return file.read()
        except OSError as error:
            if isinstance(error, ImageReadError):
                raise
            if error.errno in LASTING:
                raise ImageReadError(name, error.strerror or str(error)) from error
            if wait is None:
                attempts = len(RETRY_WAITS_S) + 1
                raise ImageReadError(name, f"{error.strerror or error}, in each of {attempts} attempts") from error
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _open_without_waiting(path: str, flags: int) -> int:
    """A FIFO that nobody writes to would never open; regular files take no notice of the flag."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata is no damage to the image
        return 1


def _reason(error: Exception, num_bytes: int) -> str:
    if isinstance(error, Image.UnidentifiedImageError):  # its text names an object in memory
        return f"not one of {', '.join(FORMATS)}" if num_bytes else "empty file"
    return " ".join(str(error).split())[:300] or type(error).__name__
