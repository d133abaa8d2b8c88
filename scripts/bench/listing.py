"""How soon the first batch comes from a tree with as many files as ImageNet has: hard links to the photographs will do."""

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from data import decoders, index_cache
from data.augment import TrainTransform
from data.config import AugmentConfig, DataConfig
from data.loader import train_loader
from data.order import BatchPlan, EpochOrder
from data.sources import Source, open_source

NUM_CLASSES = 1000
BATCH = 256
ROUNDS = 5


def link_tree(photos: Path, root: Path, num_files: int) -> None:
    """root/train/<class>/ with `num_files` links; a finished tree is kept."""
    done = root / f"{num_files} files"
    if done.exists():
        return
    originals = sorted(photos.rglob("*.JPEG"))
    for number in range(num_files):
        folder = root / "train" / f"n{number % NUM_CLASSES:08d}"
        if number < NUM_CLASSES:
            folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.link(originals[number % len(originals)], folder / f"{folder.name}_{number}.JPEG")
    done.touch()


def seconds(root: Path, workers: int) -> Iterator[tuple[str, float]]:
    """What, and how long it takes: once where the listing is made anew, else the median of ROUNDS."""
    config = DataConfig(kind="folder", root=str(root))
    kept = index_cache.place(root / "train")
    if kept is not None:
        kept.unlink(missing_ok=True)
    yield "open the tree, listed anew", _seconds(lambda: open_source(config, "train"))
    yield "open the tree, listing kept", _median(lambda: open_source(config, "train"))
    source = open_source(config, "train")
    order = EpochOrder(len(source), 0)
    steps = len(source) // BATCH
    yield f"first batch of {BATCH}", _median(lambda: _first(source, order, 0, workers))
    yield "the same at a step in mid-epoch", _median(lambda: _first(source, order, 3 * steps // 2, workers))
    yield "of that, the order of the epoch", _median(lambda: order.indices(1))


def _first(source: Source, order: EpochOrder, step: int, workers: int) -> None:
    transform, decoder = TrainTransform(AugmentConfig(), (224, 224)), decoders.choose("auto")
    plan, last = BatchPlan(BATCH), 10**6
    batches = train_loader(
        source, transform, order, plan, decoder=decoder, start_step=step, total_steps=last, workers=workers
    )
    next(batches)
    batches.close()


def _median(work: Callable[[], object]) -> float:
    return statistics.median(_seconds(work) for _ in range(ROUNDS))


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
