"""Loaders: batches in the order that data.order dictates, made by worker processes or by the caller's own.

A worker is told no more than a batch's number, so how many there are and how far they run ahead changes nothing. One
iterator serves the whole rest of a run: loading ahead goes on across epochs, and processes start once (`data.workers`).
"""

import math
import mmap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from data.augment import EvalTransform, Pixels, TrainTransform
from data.batch import Batch
from data.decode import BadImageError
from data.order import BatchPlan, EpochOrder, steps_per_epoch
from data.randomness import preserved_generators, sample_key, stream_key
from data.sources import Source
from data.workers import Workers

EVAL_SLICE = 32
MAX_REPLACEMENTS = 10


class Request(NamedTuple):
    """What a worker is asked for: images by index, and under repeated augmentation which copy of each."""

    epoch: int
    indices: np.ndarray
    copies: np.ndarray


class TrainBatches:
    """Augmented batches by request: `batches[Request(epoch, indices, copies)]`, a pure function of the request.

    An image that cannot be decoded is replaced by another of the training set, which follows from the coordinates of the
    sample, and listed in `Batch.bad`.
    """

    def __init__(self, source: Source, transform: TrainTransform, seed: int) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed

    def __getitem__(self, request: Request) -> Batch:
        samples, indices, keys, bad = [], [], [], []
        with preserved_generators():
            for index, copy in zip(request.indices.tolist(), request.copies.tolist(), strict=True):
                image, index, undecodable = self._decode(request.epoch, index, copy)
                keys.append(sample_key(self.seed, request.epoch, index, copy))
                samples.append(self.transform(image, keys[-1]))
                indices.append(index)
                bad += undecodable
        return _collate(self.source, samples, np.array(indices), keys, bad)

    def again(self, indices: list[int], keys: list[int]) -> Batch:
        """A batch that was made before, from the indices and keys that it carried."""
        with preserved_generators():
            samples = [self.transform(self.source.load(index), key) for index, key in zip(indices, keys, strict=True)]
        return _collate(self.source, samples, np.array(indices), keys, [])

    def _decode(self, epoch: int, index: int, copy: int) -> tuple[Image.Image, int, list[int]]:
        """The image `index` or the one that stands in for it, the index of what came, and those that were undecodable.

        Raises:
            BadImageError: MAX_REPLACEMENTS others could not be decoded either.
        """
        candidate = index
        bad: list[int] = []
        for attempt in range(MAX_REPLACEMENTS):
            try:
                return self.source.load(candidate), candidate, bad
            except BadImageError:
                bad.append(candidate)
                candidate = stream_key("replacement", self.seed, epoch, index, copy, attempt) % len(self.source)
        return self.source.load(candidate), candidate, bad


class EvalBatches:
    """Batches for evaluation by request: `batches[indices]`; an image that cannot be decoded is an error."""

    def __init__(self, source: Source, transform: EvalTransform) -> None:
        self.source = source
        self.transform = transform

    def __getitem__(self, indices: np.ndarray) -> Batch:
        samples = [self.transform(self.source.load(int(index))) for index in indices]
        return _collate(self.source, samples, indices, [0] * len(indices), [])


def _collate(source: Source, samples: list[Pixels], indices: np.ndarray, keys: list[int], bad: list[int]) -> Batch:
    return Batch(
        images=torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2),
        labels=torch.from_numpy(source.labels[indices]),
        indices=torch.from_numpy(indices),
        erase=torch.tensor([sample.erase for sample in samples]),
        keys=torch.tensor(keys),
        bad=torch.tensor(bad, dtype=torch.int64),
    )


class TrainRequests(Sequence[Request]):
    """The requests of one rank from `start_step` to `total_steps`, `plan.accumulation` of them to a step."""

    def __init__(self, order: EpochOrder, plan: BatchPlan, start_step: int, total_steps: int) -> None:
        self.order = order
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
        return Request(epoch, self._indices[positions], self.order.copies(positions))


class BatchJob:
    """Batches for `data.workers`: loaded in a worker, carried in shared memory, copied out where they are wanted.

    Args:
        batches: gives a batch for a request.
        requests: one for each batch, in order.
        batch_size: images in the largest batch.
        pin: put what comes out into page-locked memory.
    """

    def __init__(
        self, batches: TrainBatches | EvalBatches, requests: Sequence[Any], batch_size: int, pin: bool
    ) -> None:
        self.batches: Any = batches
        self.requests = requests
        self.pin = pin
        height, width = batches.transform.size
        numbers = 7 + MAX_REPLACEMENTS  # label, index, key, erase (4), bad
        self.slot_bytes = batch_size * (8 * numbers + 3 * height * width)

    def __len__(self) -> int:
        return len(self.requests)

    def load(self, task: int) -> Batch:
        """One batch, made here."""
        batch = self.batches[self.requests[task]]
        if not self.pin:
            return batch
        return batch._replace(
            images=batch.images.pin_memory(), labels=batch.labels.pin_memory(), indices=batch.indices.pin_memory()
        )

    def work(self, task: int, slot: mmap.mmap) -> tuple[tuple[int, ...], int]:
        batch = self.batches[self.requests[task]]
        numbers = torch.cat([field.flatten() for field in batch[1:]])
        pixels = batch.images.permute(0, 2, 3, 1)
        torch.frombuffer(slot, dtype=torch.int64, count=len(numbers)).copy_(numbers)
        start = 8 * len(numbers)
        torch.frombuffer(slot, dtype=torch.uint8, count=pixels.numel(), offset=start).copy_(pixels.flatten())
        return tuple(pixels.shape), len(batch.bad)

    def collect(self, reply: tuple[tuple[int, ...], int], slot: mmap.mmap) -> Batch:
        shape, num_bad = reply
        num = shape[0]
        counts = (num, num, 4 * num, num, num_bad)
        numbers = self._out(torch.frombuffer(slot, dtype=torch.int64, count=sum(counts)))
        pixels = torch.frombuffer(slot, dtype=torch.uint8, count=math.prod(shape), offset=8 * sum(counts))
        labels, indices, erase, keys, bad = numbers.split(counts)
        return Batch(self._out(pixels).view(shape).permute(0, 3, 1, 2), labels, indices, erase.view(num, 4), keys, bad)

    def _out(self, shared: torch.Tensor) -> torch.Tensor:
        return shared.pin_memory() if self.pin else shared.clone()

    def describe(self, task: int) -> str:
        request = self.requests[task]
        return name_images(self.batches.source, request.indices if isinstance(request, Request) else request)


def name_images(source: Source, indices: np.ndarray) -> str:
    """The first few names and how many there are, for a message."""
    names = ", ".join(source.name(int(index)) for index in indices[:3])
    return f"{names}{' ...' if len(indices) > 3 else ''} ({len(indices)} images)"


class BatchIterator(Iterator[Batch]):
    """One pass over a job's batches, whose workers end on `close`, when this object is dropped, or at exit."""

    def __init__(self, job: BatchJob, workers: int) -> None:
        self._num_batches = len(job)
        self._workers = Workers(job, workers) if workers else None
        self._batches: Iterator[Batch] = self._workers or map(job.load, range(len(job)))

    def __len__(self) -> int:
        """Batches in the whole pass."""
        return self._num_batches

    def __next__(self) -> Batch:
        return next(self._batches)

    def close(self) -> None:
        """Ends the workers; may be called again."""
        if self._workers is not None:
            self._workers.close()


def train_loader(
    source: Source,
    transform: TrainTransform,
    order: EpochOrder,
    plan: BatchPlan,
    *,
    start_step: int,
    total_steps: int,
    workers: int,
    pin: bool = False,
) -> BatchIterator:
    """The batches of one rank for the rest of the run, `plan.accumulation` micro-batches to a step.

    Workers start now. The global random state is neither read nor changed.

    Args:
        start_step, total_steps: the first step wanted and the one after the last; epochs follow one another within.
        workers: processes that load; 0 loads in this one.
        pin: put batches into page-locked memory, for asynchronous copies to a GPU.

    Raises:
        ValueError: the data hold less than one global batch; while iterating, an image that neither can be decoded nor
            replaced.
        OSError: while iterating, an image that cannot be read, or workers that hang or die again and again.
    """
    requests = TrainRequests(order, plan, start_step, total_steps)
    job = BatchJob(TrainBatches(source, transform, order.seed), requests, plan.micro_batch, pin)
    return BatchIterator(job, workers)


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
    job = BatchJob(EvalBatches(source, transform), requests, max(map(len, requests), default=0), pin)
    return BatchIterator(job, workers)
