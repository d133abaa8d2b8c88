"""The native core of the loader: JPEGs to augmented samples in C, many at a call, without Python's lock.

It is an optional part of the installation (setup.py): where it was not built, `available` is False and `reason` names what
is missing. A JPEG is anything with the buffer interface. n: images of a call, H, W: height and width of the samples.
"""

import ctypes
import os
import shutil
from collections.abc import Sequence
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np

from data.ops import OP, SAMPLE

OK, ODD, UNREADABLE = range(3)  # of native.h: ODD images go through Pillow, UNREADABLE files through data.decode
Buffer = bytes | bytearray | memoryview | np.ndarray
FOLDER = Path(__file__).parent
GROWTH = 1 << 20  # bytes; arenas grow by whole steps


def available() -> bool:
    """Whether the library was built and can be loaded."""
    return isinstance(_load(), ctypes.CDLL)


def reason() -> str:
    """Why it is not available, and the remedy, in one line; empty where it is."""
    return "" if isinstance(outcome := _load(), ctypes.CDLL) else outcome


def sizes(jpegs: Sequence[Buffer]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(heights, widths, status), int32 (n,) each: pixels, from the headers alone. Sizes are 0 where the status is not OK."""
    views, addresses, lengths = _addresses(jpegs)
    heights, widths, status = np.empty((3, len(views)), np.int32)
    _library().vip_sizes(len(views), *_pointers(addresses, lengths, heights, widths, status))
    return heights, widths, status


def load(jpegs: Sequence[Buffer], samples: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Decodes what each sample needs of its JPEG, resizes, mirrors and operates.

    Args:
        jpegs: n of them.
        samples: (n,) of type SAMPLE.
        out: uint8 (n, H, W, 3), written in place; RGB. Where the status is not OK it says nothing.

    Returns:
        status, int32 (n,): OK, or ODD for what Pillow should decode, or for a sample that its image cannot give.
    """
    views, addresses, lengths = _addresses(jpegs)
    samples = np.ascontiguousarray(samples, SAMPLE)
    _check(out, (len(views), *out.shape[1:3], 3))
    if samples.shape != (len(views),):
        raise ValueError(f"{samples.shape} samples for {len(views)} JPEGs: one for each is needed")
    status = np.empty(len(views), np.int32)
    height, width = out.shape[1:3]
    *jpegs_and_samples, pixels, outcome = _pointers(addresses, lengths, samples, out, status)
    _library().vip_load(len(views), *jpegs_and_samples, height, width, pixels, outcome)
    return status


def render(rgb: np.ndarray, sample: np.ndarray | np.void, out: np.ndarray) -> None:
    """One sample, of type SAMPLE, of decoded pixels, uint8 (height, width, 3), into `out`, uint8 (H, W, 3).

    Raises:
        ValueError: the sample's box or window does not fit.
    """
    rgb = np.ascontiguousarray(rgb)
    _check(rgb, (*rgb.shape[:2], 3))
    _check(out, (*out.shape[:2], 3))
    sampled = np.ascontiguousarray(sample, SAMPLE)
    image, box, pixels = _pointers(rgb, sampled, out)
    if _library().vip_render(image, *rgb.shape[:2], box, *out.shape[:2], pixels) != OK:
        raise ValueError(f"the sample {sample} does not fit {rgb.shape[:2]} pixels: its box and window must lie inside")


def apply_ops(rgb: np.ndarray, ops: np.ndarray, fill: tuple[int, int, int]) -> None:
    """The operations, (n,) of type OP, on uint8 (H, W, 3) in place; `fill` colours what AFFINE leaves empty."""
    _check(rgb, (*rgb.shape[:2], 3))
    ops, colours = np.ascontiguousarray(ops, OP), np.array([*fill, 0], np.uint8)
    pixels, operations, colour = _pointers(rgb, ops, colours)
    _library().vip_apply_ops(pixels, *rgb.shape[:2], operations, len(ops), colour)


class Arena:
    """Memory for whole files, kept from read to read. Not for several threads at once."""

    def __init__(self) -> None:
        self._memory = np.empty(GROWTH, np.uint8)

    def read(self, paths: Sequence[str | bytes | os.PathLike[str]]) -> tuple[list[np.ndarray], np.ndarray]:
        """The files' bytes, each uint8 (length,), valid until the next read, and their status, int32 (n,).

        UNREADABLE files are empty here: missing, no regular file, empty, over 1 GiB, or in trouble; `data.decode` waits for
        the disk where that may help, and says what is wrong.
        """
        names = [os.fsencode(path) for path in paths]
        if any(b"\0" in name for name in names):
            raise ValueError("a path holds a null byte: no file can have that name")
        offsets, lengths = np.empty((2, len(names)), np.int64)
        status = np.empty(len(names), np.int32)
        listed = (ctypes.c_char_p * len(names))(*names)
        where = _pointers(offsets, lengths, status)
        read = _library().vip_read_files
        while (
            needed := read(len(names), listed, self._memory.ctypes.data, self._memory.size, *where)
        ) > self._memory.size:
            self._memory = np.empty((needed // GROWTH + 1) * GROWTH, np.uint8)
        lengths[status != OK] = 0
        return [self._memory[at : at + length] for at, length in zip(offsets, lengths, strict=True)], status


def _addresses(jpegs: Sequence[Buffer]) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Views that keep the memory alive, its addresses, its lengths."""
    views = [np.frombuffer(jpeg, np.uint8) for jpeg in jpegs]
    addresses = np.array([view.__array_interface__["data"][0] for view in views], np.uintp)
    return views, addresses, np.array([view.size for view in views], np.int64)


def _pointers(*arrays: np.ndarray) -> list[int]:
    return [array.ctypes.data for array in arrays]


def _check(pixels: np.ndarray, shape: tuple[int, ...]) -> None:
    if pixels.dtype != np.uint8 or pixels.shape != shape or not pixels.flags.c_contiguous:
        wanted = f"contiguous uint8 {shape}"
        raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}, strides {pixels.strides}: {wanted} is needed")


def _library() -> ctypes.CDLL:
    if isinstance(outcome := _load(), ctypes.CDLL):
        return outcome
    raise ValueError(outcome)


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or why not."""
    built = next((path for suffix in EXTENSION_SUFFIXES if (path := FOLDER / f"_core{suffix}").exists()), None)
    if built is None:
        missing = "libjpeg-turbo's headers" if shutil.which("cc") or shutil.which("gcc") else "a C compiler"
        return f"the native library was not built, {missing} may be missing: {_packages()}, then make setup"
    try:
        library = ctypes.CDLL(str(built))
        library.vip_sample_size.restype = library.vip_read_files.restype = ctypes.c_int64
        if library.vip_sample_size() != SAMPLE.itemsize:
            return f"{built.name} was built from other sources: make setup"
    except (OSError, AttributeError) as error:  # libjpeg-turbo has gone since, or a function is missing
        return f"{built.name} cannot be loaded ({error}): {_packages()}, then make setup"
    _declare(library)
    return library


def _packages() -> str:
    return "apt install gcc libjpeg62-turbo-dev (macOS: brew install jpeg-turbo)"


def _declare(library: ctypes.CDLL) -> None:
    number, pointer = ctypes.c_int32, ctypes.c_void_p
    library.vip_sizes.argtypes = [number, *[pointer] * 5]
    library.vip_load.argtypes = [number, pointer, pointer, pointer, number, number, pointer, pointer]
    library.vip_render.argtypes = [pointer, number, number, pointer, number, number, pointer]
    library.vip_apply_ops.argtypes = [pointer, number, number, pointer, number, pointer]
    library.vip_read_files.argtypes = [number, pointer, pointer, ctypes.c_int64, pointer, pointer, pointer]
    for function in (library.vip_sizes, library.vip_load, library.vip_apply_ops):
        function.restype = None
