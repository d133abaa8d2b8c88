"""Damaged image files without end, and the decoder's answers to them."""

import gc
import io
import resource
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data.decode import BadImageError, decode_rgb

WARM_UP = 200  # mutations until memory has settled


@dataclass(frozen=True)
class FuzzResult:
    """What became of the files: `decoded` to RGB or refused as `bad`; seconds; growth of resident memory in MiB."""

    decoded: int
    bad: int
    seconds: float
    slowest_s: float
    growth_mib: float


def fuzz_decoder(count: int, seed: int = 0) -> FuzzResult:
    """Decode `count` damaged files. Whatever the decoder raises beside BadImageError goes up: it is what is looked for."""
    files = mutations(seed)
    decoded = bad = 0
    slowest, settled = 0.0, 0.0
    started = time.perf_counter()
    for number in range(count):
        data = next(files)
        before = time.perf_counter()
        try:
            image = decode_rgb(data, f"mutation {number} of seed {seed}")
            assert image.mode == "RGB", f"mutation {number} of seed {seed} decodes to {image.mode}"
            np.asarray(image)
            decoded += 1
        except BadImageError:
            bad += 1
        slowest = max(slowest, time.perf_counter() - before)
        if number == min(WARM_UP, count - 1):
            settled = _resident_mib()
    return FuzzResult(decoded, bad, time.perf_counter() - started, slowest, _resident_mib() - settled)


def mutations(seed: int) -> Iterator[bytes]:
    """Damaged JPEG and PNG files: flipped bits, cut, zeroed, inserted and repeated ranges, edited headers and sizes."""
    originals = _originals()
    kinds = (_flip, _cut, _zero, _insert, _repeat, _edit_header, _edit_size)
    draw = np.random.default_rng(seed)
    while True:
        data = bytearray(originals[draw.integers(len(originals))])
        for _ in range(draw.integers(1, 4)):
            kinds[draw.integers(len(kinds))](data, draw)
        yield bytes(data)


def _originals() -> list[bytes]:
    """Small images in the shapes that JPEG and PNG files come in."""
    noise = np.random.default_rng(0).integers(256, size=(40, 56, 4), dtype=np.uint8)
    smooth = np.add.outer(np.arange(40) * 3, np.arange(56) * 2).astype(np.uint8)
    colour = Image.fromarray(np.stack([smooth, smooth.T.reshape(40, 56), noise[..., 0]], axis=-1))
    exif = Image.Exif()
    exif[0x0112] = 6
    variants: list[tuple[Image.Image, str, dict]] = [
        (colour, "JPEG", {"quality": 90}),
        (colour, "JPEG", {"progressive": True, "exif": exif, "icc_profile": bytes(400)}),
        (colour, "JPEG", {"subsampling": 0, "restart_marker_rows": 1}),
        (Image.fromarray(smooth), "JPEG", {}),
        (colour.convert("CMYK"), "JPEG", {}),
        (colour, "PNG", {"exif": exif}),
        (Image.fromarray(noise), "PNG", {"icc_profile": bytes(400)}),
        (colour.convert("P"), "PNG", {"transparency": 3}),
        (Image.fromarray(smooth.astype(np.uint16) * 257), "PNG", {}),
        (Image.fromarray(smooth > 100), "PNG", {}),
    ]
    files = []
    for image, kind, options in variants:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        files.append(buffer.getvalue())
    return files


def _flip(data: bytearray, draw: np.random.Generator) -> None:
    for _ in range(draw.integers(1, 9)):
        if data:
            data[draw.integers(len(data))] ^= 1 << int(draw.integers(8))


def _cut(data: bytearray, draw: np.random.Generator) -> None:
    del data[draw.integers(len(data) + 1) :]


def _range(data: bytearray, draw: np.random.Generator) -> slice:
    start = int(draw.integers(len(data) + 1))
    return slice(start, min(len(data), start + int(draw.integers(1, 200))))


def _zero(data: bytearray, draw: np.random.Generator) -> None:
    part = _range(data, draw)
    data[part] = bytes(len(data[part]))


def _insert(data: bytearray, draw: np.random.Generator) -> None:
    place = int(draw.integers(len(data) + 1))
    data[place:place] = draw.bytes(int(draw.integers(1, 100)))


def _repeat(data: bytearray, draw: np.random.Generator) -> None:
    part = _range(data, draw)
    data[part.start : part.start] = data[part]


def _edit_header(data: bytearray, draw: np.random.Generator) -> None:
    for _ in range(draw.integers(1, 6)):
        if data:
            data[draw.integers(min(len(data), 200))] = int(draw.integers(256))


def _edit_size(data: bytearray, draw: np.random.Generator) -> None:
    """Another height and width, small or absurd, which the rest of the file does not know of."""
    height, width = (int(2 ** draw.uniform(0, 15)) - 1 for _ in range(2))
    if data[12:16] == b"IHDR" and len(data) >= 33:
        struct.pack_into(">II", data, 16, width, height)
        struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))  # else the checksum alone would give it away
    for marker in (b"\xff\xc0", b"\xff\xc2"):
        place = data.find(marker)
        if 0 <= place < len(data) - 9:
            struct.pack_into(">HH", data, place + 5, height, width)


def _resident_mib() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20
