"""Random streams as functions: a stream is named by its purpose and a few integers, never by what was drawn before."""

import hashlib
import struct

import numpy as np


def stream_key(purpose: str, *parts: int) -> int:
    """63-bit key of the stream `purpose` at the coordinates `parts` (64-bit integers); equal on every machine."""
    packed = struct.pack(f"<{len(parts)}q", *parts)
    digest = hashlib.blake2b(packed, digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "little") >> 1


def sample_key(seed: int, epoch: int, index: int, repeat: int = 0) -> int:
    """Key of one augmented sample: image `index` in `epoch`, its copy number `repeat` under repeated augmentation."""
    return stream_key("sample", seed, epoch, index, repeat)


def uniforms(keys: np.ndarray, num: int) -> np.ndarray:
    """The first `num` numbers of each key's stream: float64 (len(keys), num) in [0, 1), by SplitMix64 (Steele et al., 2014)."""
    counters = np.arange(1, num + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = keys.astype(np.uint64)[:, None] + counters
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((bits ^ (bits >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
