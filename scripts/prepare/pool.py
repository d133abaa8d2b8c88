"""Processes that share the work: they count what they have done, and none outlives the one that started it."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import Synchronized
from typing import TypeVar

from data.parent import die_with_parent

Task = TypeVar("Task")
Result = TypeVar("Result")
POLL_S = 0.2

_count: "Synchronized[int] | None" = None  # in a worker: shared by all of them


def advance(done: int = 1) -> None:
    """In a worker: so many more are done. Outside of one it means nothing."""
    if _count is not None:
        with _count.get_lock():
            _count.value += done


def share(
    work: Callable[[Task], Result], tasks: Sequence[Task], num_workers: int, update: Callable[[int], object]
) -> Iterator[Result]:
    """The results of `work` on each task, in the order in which they come; `update` is told of what `advance` counted.

    Raises the first error of a task; those that are in work then are finished, the others never begin. OSError where a
    process dies. After a KeyboardInterrupt the caller should end the process at once, and the workers with it.
    """
    context = multiprocessing.get_context("fork")
    count = context.Value("q", 0)
    pool = ProcessPoolExecutor(max(1, min(num_workers, len(tasks))), context, _start, (os.getpid(), count))
    interrupted = False
    try:
        pending = {pool.submit(work, task) for task in tasks}
        while pending:
            done, pending = wait(pending, POLL_S, FIRST_COMPLETED)
            update(count.value)
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise OSError(
            f"one of the {num_workers} processes died, maybe for want of memory: the same command goes on, with fewer --workers"
        ) from error
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:
        pool.shutdown(wait=not interrupted, cancel_futures=True)


def _start(parent: int, count: "Synchronized[int]") -> None:
    global _count
    _count = count
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that started it
    die_with_parent(parent)
