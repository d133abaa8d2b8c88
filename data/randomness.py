"""Random streams as functions: a stream is named by its purpose and a few integers, never by what was drawn before.

The libraries that augment draw from three global generators (python's, numpy's, torch's), so a sample is made
reproducible by seeding all three from its key, and the caller's own state is put back afterwards.
"""

import hashlib
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def stream_key(purpose: str, *parts: int) -> int:
    """63-bit key of the stream `purpose` at the coordinates `parts` (64-bit integers); equal on every machine."""
    packed = struct.pack(f"<{len(parts)}q", *parts)
    digest = hashlib.blake2b(packed, digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "little") >> 1


def sample_key(seed: int, epoch: int, index: int, repeat: int = 0) -> int:
    """Key of one augmented sample: image `index` in `epoch`, its copy number `repeat` under repeated augmentation."""
    return stream_key("sample", seed, epoch, index, repeat)


def seed_generators(key: int) -> None:
    """Seeds python's, numpy's and torch's CPU generator from `key`, about 10 us.

    `torch.manual_seed` would also visit every CUDA device, which costs more than it all and must not happen in workers.
    """
    random.seed(key)
    np.random.seed((key & 0xFFFFFFFF, key >> 32))
    torch.default_generator.manual_seed(key)


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Puts python's, numpy's and torch's CPU generator back to where they were, about 0.1 ms."""
    python_state, numpy_state, torch_state = (
        random.getstate(),
        np.random.get_state(),
        torch.default_generator.get_state(),
    )
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.default_generator.set_state(torch_state)
