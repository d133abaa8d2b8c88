"""JPEGs in segments that decode independently of one another (frame.c, cut.c), and samples straight from packs of them."""

import ctypes

import numpy as np

from data.native import OK, _check, _library, _pointers
from data.ops import SAMPLE

SEGMENT_PIXELS = 64


def reframe(jpeg: bytes, segment_pixels: int = SEGMENT_PIXELS) -> tuple[bytes, int] | None:
    """The JPEG with restart markers about every `segment_pixels` of a row, and the bytes that come before its first segment.

    Decoded, it gives the same pixels. None for what is better kept as it is: no JPEG of 8 bits, gray or in three colours,
    or the least bit damaged. Colour profiles and comments are left out.
    """
    out, length, head = ctypes.c_void_p(), ctypes.c_int64(), ctypes.c_int32()
    references = map(ctypes.byref, (out, length, head))
    if _library().vip_reframe(jpeg, ctypes.c_int64(len(jpeg)), segment_pixels, *references) != OK:
        return None
    return ctypes.string_at(out.value or 0, length.value), head.value


def cut(record: bytes, top: int, left: int, height: int, width: int) -> tuple[bytes, int, int] | None:
    """Of what `reframe` gave, a smaller JPEG that covers a box (pixels), and the box's top and left in it.

    Within the box its pixels are those of the whole. None where the record was not re-framed, or the box begins outside.
    """
    out, length, corner = ctypes.c_void_p(), ctypes.c_int64(), (ctypes.c_int32(top), ctypes.c_int32(left))
    arguments = (*map(ctypes.byref, corner), height, width, ctypes.byref(out), ctypes.byref(length))
    if _library().vip_cut(record, ctypes.c_int64(len(record)), *arguments) != OK:
        return None
    return ctypes.string_at(out.value or 0, length.value), corner[0].value, corner[1].value


def load_pack(
    fds: np.ndarray, offsets: np.ndarray, lengths: np.ndarray, heads: np.ndarray, samples: np.ndarray, out: np.ndarray
) -> np.ndarray:
    """As `data.native.load`, of the records of a pack: reads and decodes no more of each than its sample needs.

    Args:
        fds, offsets, lengths, heads: (n,) each: of the records, as `data.pack.PackSource` has them.
        samples: (n,) of type SAMPLE.
        out: uint8 (n, H, W, 3), written in place; RGB. Where the status is not OK it says nothing.

    Returns:
        status, int32 (n,): OK, ODD as for `load`, or UNREADABLE for bytes that could not be had.
    """
    num = len(samples)
    _check(out, (num, *out.shape[1:3], 3))
    fields = (fds, np.int32), (offsets, np.int64), (lengths, np.int64), (heads, np.int32), (samples, SAMPLE)
    arrays = [np.ascontiguousarray(field, kind) for field, kind in fields]
    if any(array.shape != (num,) for array in arrays):
        raise ValueError(f"{[array.shape for array in arrays]}: one record for each of {num} samples is needed")
    status = np.empty(num, np.int32)
    *records, pixels, outcome = (ctypes.c_void_p(address) for address in _pointers(*arrays, out, status))
    _library().vip_load_pack(num, *records, *out.shape[1:3], pixels, outcome)
    return status
