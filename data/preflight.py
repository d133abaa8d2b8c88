"""Decoding every image of a source once before anything counts on them: a validation set must be whole."""

import mmap

import numpy as np

from data.decode import BadImageError, ImageReadError
from data.loader import name_images
from data.sources import Source
from data.workers import Workers

CHUNK = 32  # images in one task
NUM_NAMED = 3


class DecodeJob:
    """Tries the images `indices`, a chunk at a time; gives the index and the reason of those that are no good."""

    slot_bytes = 0

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source = source
        self.chunks = [indices[first : first + CHUNK] for first in range(0, len(indices), CHUNK)]

    def __len__(self) -> int:
        return len(self.chunks)

    def try_chunk(self, task: int) -> list[tuple[int, str]]:
        bad = []
        for index in self.chunks[task].tolist():
            try:
                self.source.load(index)
            except (BadImageError, ImageReadError) as error:
                bad.append((index, error.reason))
        return bad

    def work(self, task: int, slot: mmap.mmap) -> list[tuple[int, str]]:
        return self.try_chunk(task)

    def collect(self, reply: list[tuple[int, str]], slot: mmap.mmap) -> list[tuple[int, str]]:
        return reply

    def describe(self, task: int) -> str:
        return name_images(self.source, self.chunks[task])


def undecodable(source: Source, workers: int, rank: int = 0, world: int = 1) -> list[tuple[str, str]]:
    """Printable name and reason of each image in this rank's share that cannot be read or decoded, in index order.

    Args:
        workers: processes that decode; 0 decodes in this one.
    """
    job = DecodeJob(source, np.arange(len(source))[rank::world])
    results = Workers(job, workers) if workers else map(job.try_chunk, range(len(job)))
    return [(source.name(index), reason) for bad in results for index, reason in bad]


def check_validation(source: Source, workers: int, rank: int = 0, world: int = 1) -> None:
    """Raises ValueError, in one line, if this rank's share of the validation images is not whole."""
    bad = undecodable(source, workers, rank, world)
    if bad:
        named = ", ".join(f"{name} ({reason})" for name, reason in bad[:NUM_NAMED])
        share = "" if world == 1 else f" in the share of rank {rank}"
        raise ValueError(
            f"{len(bad)} of {len(source):,} validation images cannot be decoded{share}: {named}"
            f"{' ...' if len(bad) > NUM_NAMED else ''}; replace them, for figures without them compare with no others"
        )
