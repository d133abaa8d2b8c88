"""JPEGs of random content with any sampling factors and restart intervals, which Pillow's own encoder cannot write."""

from collections.abc import Iterator, Sequence

import numpy as np

SIZES = range(12)  # of DC differences: bits behind the code
AC_SYMBOLS = [0x00, 0xF0] + [run << 4 | size for run in range(16) for size in range(1, 7)]


def made_jpeg(
    height: int,
    width: int,
    factors: Sequence[tuple[int, int]],
    restart: int = 0,
    seed: int = 0,
    adobe: int | None = None,
    smoothness: int = 3,
) -> bytes:
    """A baseline JPEG; `factors` are (horizontal, vertical) of each component, `restart` counts MCUs between markers.

    Codes have fixed lengths: 4 bits for a DC symbol, 8 for an AC symbol. `adobe` is the transform of an Adobe marker.
    """
    random = np.random.default_rng(seed)
    most_h, most_v = max(h for h, _ in factors), max(v for _, v in factors)
    if len(factors) == 1:  # one component alone is not interleaved: its factors mean nothing
        most_h, most_v, per_mcu = 1, 1, [1]
    else:
        per_mcu = [h * v for h, v in factors]
    num_mcus = -(-height // (8 * most_v)) * -(-width // (8 * most_h))
    head = b"\xff\xd8"
    if adobe is not None:
        head += _segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([adobe]))
    head += _segment(0xDB, b"\0" + bytes(1 + smoothness * k // 8 for k in range(64)))
    components = b"".join(bytes([i + 1, h << 4 | v, 0]) for i, (h, v) in enumerate(factors))
    size = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    head += _segment(0xC0, b"\x08" + size + bytes([len(factors)]) + components)
    head += _segment(0xC4, b"\0" + bytes([0, 0, 0, len(SIZES)] + [0] * 12) + bytes(SIZES))
    head += _segment(0xC4, b"\x10" + bytes([0] * 7 + [len(AC_SYMBOLS)] + [0] * 8) + bytes(AC_SYMBOLS))
    if restart:
        head += _segment(0xDD, restart.to_bytes(2, "big"))
    selectors = b"".join(bytes([i + 1, 0]) for i in range(len(factors)))
    head += _segment(0xDA, bytes([len(factors)]) + selectors + b"\0\x3f\0")
    pieces = []
    for start in range(0, num_mcus, restart or num_mcus):
        num = min(restart or num_mcus, num_mcus - start)
        marker = bytes([0xFF, 0xD0 + (start // restart - 1) % 8]) if start else b""
        pieces.append(marker + _pack("".join(_interval(random, num, per_mcu))))
    return head + b"".join(pieces) + b"\xff\xd9"


def _segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content


def _interval(random: np.random.Generator, num_mcus: int, per_mcu: list[int]) -> Iterator[str]:
    before = [0] * len(per_mcu)
    for _ in range(num_mcus):
        for component, num_blocks in enumerate(per_mcu):
            for _ in range(num_blocks):
                value = int(random.integers(-700, 700))
                yield _value(f"{(value - before[component]).__abs__().bit_length():04b}", value - before[component])
                before[component] = value
                for run in random.integers(0, 16, 3).tolist():
                    value = int(random.integers(1, 60)) * (-1 if random.random() < 0.5 else 1)
                    yield _value(f"{AC_SYMBOLS.index(run << 4 | abs(value).bit_length()):08b}", value)
                yield f"{0:08b}"


def _value(code: str, value: int) -> str:
    """A code and the bits of a value behind it: negative ones less one, as JPEG has it."""
    size = abs(value).bit_length()
    bits = value if value > 0 else value + (1 << size) - 1
    return code + (f"{bits:0{size}b}" if size else "")


def _pack(bits: str) -> bytes:
    padded = bits + "1" * (-len(bits) % 8)
    return int(padded, 2).to_bytes(len(padded) // 8, "big").replace(b"\xff", b"\xff\0")
