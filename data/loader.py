"""Loaders: batches in the order that data.order dictates, made by worker processes or by the caller's own.

Only requests travel to the workers, so their number and the prefetch depth change nothing. One iterator serves the
whole rest of a run: prefetching goes on across epochs, and processes start once. Workers are forked on Linux: spawned
ones would each import torch for seconds and hold a copy of the list of files.
"""

import atexit
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.augment import EvalTransform, Pixels, TrainTransform
from data.batch import Batch
from data.order import BatchPlan, EpochOrder, steps_per_epoch
from data.randomness import preserved_generators, sample_key
from data.sources import Source

EVAL_SLICE = 32
WORKER_TIMEOUT_S = 120.0
TERM_GRACE_S = 30  # torchrun's own patience


class Request(NamedTuple):
    """What a worker is asked for: images by index, and under repeated augmentation which copy of each."""

    epoch: int
    indices: np.ndarray
    copies: np.ndarray


class TrainBatches(Dataset[Batch]):
    """Augmented batches by request: `batches[Request(epoch, indices, copies)]`, a pure function of the request."""

    def __init__(self, source: Source, transform: TrainTransform, seed: int) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed

    def __getitem__(self, request: Request) -> Batch:
        keys = [
            sample_key(self.seed, request.epoch, int(index), int(copy))
            for index, copy in zip(request.indices, request.copies, strict=True)
        ]
        with preserved_generators():
            samples = [
                self.transform(self.source.load(int(index)), key)
                for index, key in zip(request.indices, keys, strict=True)
            ]
        return _collate(self.source, samples, request.indices, keys)


class EvalBatches(Dataset[Batch]):
    """Batches for evaluation by request: `batches[indices]`."""

    def __init__(self, source: Source, transform: EvalTransform) -> None:
        self.source = source
        self.transform = transform

    def __getitem__(self, indices: np.ndarray) -> Batch:
        samples = [self.transform(self.source.load(int(index))) for index in indices]
        return _collate(self.source, samples, indices, [0] * len(indices))


def _collate(source: Source, samples: list[Pixels], indices: np.ndarray, keys: list[int]) -> Batch:
    return Batch(
        images=torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2),
        labels=torch.from_numpy(source.labels[indices]),
        indices=torch.from_numpy(indices),
        erase=torch.tensor([sample.erase for sample in samples]),
        keys=torch.tensor(keys),
    )


class TrainRequests:
    """The requests of one rank from `start_step` to `total_steps`, `plan.accumulation` of them to a step."""

    def __init__(self, order: EpochOrder, plan: BatchPlan, start_step: int, total_steps: int) -> None:
        self.order = order
        self.plan = plan
        self.steps = range(start_step, total_steps)
        self.epoch_steps = steps_per_epoch(order.num_images, plan.global_batch)

    def __len__(self) -> int:
        return len(self.steps) * self.plan.accumulation

    def __iter__(self) -> Iterator[Request]:
        current_epoch, indices = -1, np.empty(0, np.int64)
        for step in self.steps:
            epoch, step_in_epoch = divmod(step, self.epoch_steps)
            if epoch != current_epoch:
                current_epoch, indices = epoch, self.order.indices(epoch)
            for micro in range(self.plan.accumulation):
                positions = self.plan.positions(step_in_epoch, micro)
                yield Request(epoch, indices[positions], self.order.copies(positions))


class BatchIterator(Iterator[Batch]):
    """One pass over a DataLoader, whose workers end on `close`, when this object is dropped, or at exit.

    A torch iterator that is still alive at exit (an exception's traceback is enough to keep it) has its workers killed,
    and then reports the kill as an error of its own.
    """

    def __init__(self, loader: DataLoader[Batch]) -> None:
        self._num_batches = len(loader)
        self._batches: Iterator[Batch] = iter(loader)
        self._shut_down: Callable[[], None] = getattr(self._batches, "_shutdown_workers", _nothing)
        atexit.register(self._shut_down)

    def __len__(self) -> int:
        """Batches in the whole pass."""
        return self._num_batches

    def __next__(self) -> Batch:
        return next(self._batches)

    def close(self) -> None:
        """Ends the workers; may be called again."""
        atexit.unregister(self._shut_down)
        self._shut_down()

    def __del__(self) -> None:
        self.close()


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
        ValueError: the data hold less than one global batch; while iterating, an image that cannot be decoded.
        RuntimeError: while iterating, a worker that gave nothing for 120 s.
    """
    requests = TrainRequests(order, plan, start_step, total_steps)
    return _iterate(TrainBatches(source, transform, order.seed), requests, workers, pin)


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
    `batch.images.split(EVAL_SLICE)`.
    """
    requests = eval_requests(len(source), batch_size, rank, world)
    return _iterate(EvalBatches(source, transform), requests, workers, pin)


def _iterate(
    batches: Dataset[Batch], requests: TrainRequests | list[np.ndarray], workers: int, pin: bool
) -> BatchIterator:
    loader = DataLoader(
        batches,
        sampler=requests,
        batch_size=None,  # a request is a whole batch
        collate_fn=_unchanged,  # type: ignore[arg-type]  # torch's stub knows no batches that come whole
        num_workers=workers,
        pin_memory=pin,
        timeout=WORKER_TIMEOUT_S if workers else 0,
        worker_init_fn=_set_worker_signals,
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        generator=torch.Generator(),  # else every iterator draws from the global one
    )
    return BatchIterator(loader)


def _nothing() -> None:
    """What there is to shut down without workers."""


def _unchanged(batch: Batch) -> Batch:
    return batch


def _set_worker_signals(worker: int) -> None:
    """Signals are the training process's business: Ctrl-C and a scheduler's warning reach the whole process group.

    SIGTERM may be such a warning too, under which the trainer still needs batches to reach a step's end; but it is also how
    the parent ends workers that hang. So a worker heeds it late: the alarm's default is to end the process.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(TERM_GRACE_S))
