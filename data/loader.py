"""Loaders: batches in the order that data.order dictates, made by threads, by worker processes or by the caller's own.

Who makes a batch is told no more than its number, so how many there are and how far they run ahead changes nothing. One
iterator serves the whole rest of a run: loading ahead goes on across epochs, and threads or processes start once. The decoder
says which (`data.threads`, `data.workers`).
"""

import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from data.augment import EvalTransform, TrainTransform, Transform
from data.batch import Batch
from data.buffers import Buffers
from data.decoders import Decoder
from data.order import BatchPlan, EpochOrder, steps_per_epoch
from data.pack import PackSource
from data.randomness import sample_key, stream_key
from data.readahead import ReadAhead
from data.sources import Source
from data.threads import Threads
from data.workers import Workers

EVAL_SLICE = 32
MAX_REPLACEMENTS = 10
PIECE = 32  # images that are loaded together: what a thread takes at a time


class Request(NamedTuple):
    """What is asked for: images by index, and under repeated augmentation which copy of each."""

    epoch: int
    indices: np.ndarray
    copies: np.ndarray

    def part(self, rows: slice) -> "Request":
        return Request(self.epoch, self.indices[rows], self.copies[rows])


class Facts(NamedTuple):
    """What goes with the pixels of a batch; the fields are those of `Batch`, as numpy arrays."""

    labels: np.ndarray
    indices: np.ndarray
    erase: np.ndarray
    keys: np.ndarray
    bad: np.ndarray


class _Batches:
    """What training and evaluation share: images of `source` as `transform` plans them and `decoder` makes them."""

    def __init__(self, source: Source, transform: Transform, decoder: Decoder) -> None:
        self.source = source
        self.transform = transform
        self.decoder = decoder

    def fill(self, request: Any, out: np.ndarray) -> Facts:
        """Pixels into `out`, uint8 (B, H, W, 3); raises BadImageError."""
        raise NotImplementedError

    def load(self, request: Any) -> Batch:
        """One batch in memory of its own."""
        pixels = np.empty((_num_images(request), *self.transform.size, 3), np.uint8)
        return to_batch(pixels, self.fill(request, pixels))


class TrainBatches(_Batches):
    """Augmented images by request: a pure function of the request.

    An image that cannot be decoded is replaced by another of the training set, which follows from the coordinates of the
    sample, and listed in `Facts.bad`; after MAX_REPLACEMENTS of them in a row `fill` raises BadImageError.
    """

    def __init__(self, source: Source, transform: TrainTransform, seed: int, decoder: Decoder) -> None:
        super().__init__(source, transform, decoder)
        self.seed = seed

    def fill(self, request: Request, out: np.ndarray) -> Facts:
        indices = request.indices.copy()
        keys = np.array([self._key(request, row, index) for row, index in enumerate(indices.tolist())], np.int64)
        erase, empty = self.decoder.load(self.source, indices, keys, self.transform, out)
        bad: list[int] = []
        for row in empty:
            bad += self._replace(request, row, indices, keys, erase, out)
        return Facts(self.source.labels[indices], indices, erase, keys, np.array(bad, np.int64))

    def again(self, indices: np.ndarray, keys: np.ndarray) -> Batch:
        """A batch that was made before, from the indices and keys that it carried."""
        pixels = np.empty((len(indices), *self.transform.size, 3), np.uint8)
        erase, _ = self.decoder.load(self.source, indices, keys, self.transform, pixels)
        return to_batch(pixels, Facts(self.source.labels[indices], indices, erase, keys, np.empty(0, np.int64)))

    def _key(self, request: Request, row: int, index: int) -> int:
        return sample_key(self.seed, request.epoch, index, int(request.copies[row]))

    def _replace(
        self, request: Request, row: int, indices: np.ndarray, keys: np.ndarray, erase: np.ndarray, out: np.ndarray
    ) -> list[int]:
        """Puts another image into the row, and returns the undecodable ones that were met."""
        bad = []
        here = slice(row, row + 1)
        coordinates = self.seed, request.epoch, int(request.indices[row]), int(request.copies[row])
        for attempt in range(MAX_REPLACEMENTS):
            bad.append(int(indices[row]))
            indices[row] = stream_key("replacement", *coordinates, attempt) % len(self.source)
            keys[row] = self._key(request, row, int(indices[row]))
            erase[here], empty = self.decoder.load(self.source, indices[here], keys[here], self.transform, out[here])
            if not empty:
                return bad
        self.source.load(int(indices[row]))  # raises
        raise AssertionError("decoded now, but not before")


class EvalBatches(_Batches):
    """Images for evaluation by index; one that cannot be decoded is an error."""

    def fill(self, indices: np.ndarray, out: np.ndarray) -> Facts:
        keys = np.zeros(len(indices), np.int64)
        erase, empty = self.decoder.load(self.source, indices, keys, self.transform, out)
        for row in empty:
            self.source.load(int(indices[row]))  # raises
        return Facts(self.source.labels[indices], indices, erase, keys, np.empty(0, np.int64))


def to_batch(pixels: np.ndarray, facts: Facts) -> Batch:
    """pixels: uint8 (B, H, W, 3)."""
    return Batch(torch.from_numpy(pixels).permute(0, 3, 1, 2), *map(torch.from_numpy, facts))


class TrainRequests(Sequence[Request]):
    """The requests of one rank from `start_step` to `total_steps`, `plan.accumulation` of them to a step."""

    def __init__(
        self, order: EpochOrder, plan: BatchPlan, start_step: int, total_steps: int, ahead: ReadAhead | None = None
    ) -> None:
        self.order = order
        self.ahead = ahead
        self.plan = plan
        self.steps = range(start_step, total_steps)
        self.epoch_steps = steps_per_epoch(order.num_images, plan.global_batch)
        self._epoch, self._indices = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self.steps) * self.plan.accumulation

    def __getitem__(self, number: int) -> Request:  # type: ignore[override]  # one at a time: there are no slices
        step, micro = divmod(number, self.plan.accumulation)
        epoch, step_in_epoch = divmod(self.steps[step], self.epoch_steps)
        if epoch != self._epoch:
            self._epoch, self._indices = epoch, self.order.indices(epoch)
        positions = self.plan.positions(step_in_epoch, micro)
        if self.ahead is not None:  # for all ranks: any may be alone on its node
            first = step_in_epoch * self.plan.global_batch + micro * self.plan.world * self.plan.micro_batch
            self.ahead.reach(epoch, first, first + self.plan.world * self.plan.micro_batch)
        return Request(epoch, self._indices[positions], self.order.copies(positions))


@dataclass
class Room:
    """A batch in the making: pieces of PIECE images, each with its facts."""

    request: Any
    pixels: np.ndarray  # uint8 (B, H, W, 3)
    facts: list[Facts | None]

    @property
    def num_pieces(self) -> int:
        return len(self.facts)

    def all_facts(self) -> Facts:
        """Of a batch whose pieces are done."""
        return Facts(*map(np.concatenate, zip(*filter(None, self.facts), strict=True)))


class BatchJob:
    """The batches of a loader as tasks: in pieces for `data.threads`, or for `data.workers` whole, through shared memory.

    Args:
        batches: fills a batch for a request.
        requests: one for each batch, in order.
        batch_size: images in the largest batch.
        pin: batches come in page-locked memory.
    """

    def __init__(self, batches: _Batches, requests: Sequence[Any], batch_size: int, pin: bool) -> None:
        self.batches = batches
        self.requests = requests
        self.size = batches.transform.size
        self.buffers = Buffers(pin)
        numbers = 7 + MAX_REPLACEMENTS  # label, index, key, erase (4), bad
        self.slot_bytes = batch_size * (8 * numbers + 3 * math.prod(self.size))
        self.pieces_per_batch = math.ceil(batch_size / PIECE)

    def __len__(self) -> int:
        return len(self.requests)

    def load(self, task: int) -> Batch:
        """One batch, made here."""
        room = self.begin(task)
        for piece in range(room.num_pieces):
            self.fill(room, piece)
        return self.finish(room)

    def begin(self, task: int) -> Room:
        request = self.requests[task]
        return self._room(request, self.buffers.take((_num_images(request), *self.size, 3)))

    def fill(self, room: Room, piece: int) -> None:
        rows = slice(piece * PIECE, (piece + 1) * PIECE)
        room.facts[piece] = self.batches.fill(_part(room.request, rows), room.pixels[rows])

    def _room(self, request: Any, pixels: np.ndarray) -> Room:
        return Room(request, pixels, [None] * math.ceil(len(pixels) / PIECE))

    def finish(self, room: Room) -> Batch:
        return to_batch(room.pixels, room.all_facts())

    def work(self, task: int, slot: mmap.mmap) -> tuple[int, int]:
        request = self.requests[task]
        num = _num_images(request)
        shape = (num, *self.size, 3)
        room = self._room(request, np.frombuffer(slot, np.uint8, math.prod(shape)).reshape(shape))
        for piece in range(room.num_pieces):
            self.fill(room, piece)
        facts = room.all_facts()
        numbers = np.concatenate([field.ravel() for field in facts])
        np.frombuffer(slot, np.uint8, numbers.nbytes, math.prod(shape))[:] = numbers.view(np.uint8)
        return num, len(facts.bad)

    def collect(self, reply: tuple[int, int], slot: mmap.mmap) -> Batch:
        num, num_bad = reply
        pixels = self.buffers.take((num, *self.size, 3))
        pixels[...] = np.frombuffer(slot, np.uint8, pixels.size).reshape(pixels.shape)
        counts = np.array([num, num, 4 * num, num, num_bad])
        numbers = np.frombuffer(slot, np.uint8, 8 * counts.sum(), pixels.size).copy().view(np.int64)
        labels, indices, erase, keys, bad = np.split(numbers, np.cumsum(counts)[:-1])
        return to_batch(pixels, Facts(labels, indices, erase.reshape(num, 4), keys, bad))

    def describe(self, task: int) -> str:
        request = self.requests[task]
        return name_images(self.batches.source, request.indices if isinstance(request, Request) else request)


def _part(request: Any, rows: slice) -> Any:
    return request.part(rows) if isinstance(request, Request) else request[rows]


def _num_images(request: Any) -> int:
    return len(request.indices if isinstance(request, Request) else request)


def name_images(source: Source, indices: np.ndarray) -> str:
    """The first few names and how many there are, for a message."""
    names = ", ".join(source.name(int(index)) for index in indices[:3])
    return f"{names}{' ...' if len(indices) > 3 else ''} ({len(indices)} images)"


class BatchIterator(Iterator[Batch]):
    """One pass over a job's batches, whose threads or processes end on `close`, when this object is dropped, or at exit.

    Args:
        workers: threads or, where `threaded` is false, processes; 0 loads in the caller's thread.
    """

    def __init__(self, job: BatchJob, workers: int, threaded: bool) -> None:
        self._num_batches = len(job)
        self._workers: Threads[Batch] | Workers[Batch] | None = None
        if workers and threaded:
            # So that every thread has a piece to do and another one next, and one batch is whole when it is asked for.
            self._workers = Threads(job, workers, ahead=1 + math.ceil(2 * workers / job.pieces_per_batch))
        elif workers:
            self._workers = Workers(job, workers)
        self._batches: Iterator[Batch] = self._workers or map(job.load, range(len(job)))

    def __len__(self) -> int:
        """Batches in the whole pass."""
        return self._num_batches

    def __next__(self) -> Batch:
        return next(self._batches)

    def close(self) -> None:
        """Ends threads and processes; may be called again."""
        if self._workers is not None:
            self._workers.close()


def train_loader(
    source: Source,
    transform: TrainTransform,
    order: EpochOrder,
    plan: BatchPlan,
    *,
    decoder: Decoder,
    start_step: int,
    total_steps: int,
    workers: int,
    pin: bool = False,
) -> BatchIterator:
    """The batches of one rank for the rest of the run, `plan.accumulation` micro-batches to a step.

    Threads or processes start now. The global random state is neither read nor changed.

    Args:
        start_step, total_steps: the first step wanted and the one after the last; epochs follow one another within.
        workers: threads or processes that load, as the decoder allows; 0 loads in the caller's thread.
        pin: put batches into page-locked memory, for asynchronous copies to a GPU.

    Raises:
        ValueError: the data hold less than one global batch; while iterating, an image that neither can be decoded nor
            replaced.
        OSError: while iterating, an image that cannot be read, or workers that hang or die again and again.
    """
    ahead = ReadAhead(source, order) if order.block and isinstance(source, PackSource) else None
    requests = TrainRequests(order, plan, start_step, total_steps, ahead)
    job = BatchJob(TrainBatches(source, transform, order.seed, decoder), requests, plan.micro_batch, pin)
    return BatchIterator(job, workers, decoder.threaded)


def eval_requests(num_images: int, batch_size: int, rank: int = 0, world: int = 1) -> list[np.ndarray]:
    """Image indices of each evaluation batch of one rank; over all ranks each image comes once.

    Images form slices of EVAL_SLICE in index order; rank r takes slices r, r + world ...; a batch is as many whole
    slices as `batch_size` holds, at least one. Only the very last slice can be short.
    """
    starts = np.arange(0, num_images, EVAL_SLICE)[rank::world]
    per_batch = max(1, batch_size // EVAL_SLICE)
    slices = [np.arange(start, min(start + EVAL_SLICE, num_images)) for start in starts]
    return [np.concatenate(slices[first : first + per_batch]) for first in range(0, len(slices), per_batch)]


def eval_loader(
    source: Source,
    transform: EvalTransform,
    *,
    decoder: Decoder,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int,
    pin: bool = False,
) -> BatchIterator:
    """The evaluation batches of one rank (`eval_requests`), once.

    Results equal to the last bit for every world and batch size need each slice to go through the network by itself:
    `batch.images.split(EVAL_SLICE)`. Raises while iterating as `train_loader`; no image is replaced.
    """
    requests = eval_requests(len(source), batch_size, rank, world)
    job = BatchJob(EvalBatches(source, transform, decoder), requests, max(map(len, requests), default=0), pin)
    return BatchIterator(job, workers, decoder.threaded)
