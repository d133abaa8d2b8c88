"""Threads that do a job's tasks in order, a piece at a time, for work that leaves Python's lock alone.

As `data.workers`, without processes: results are made where they are wanted, and nothing crosses. Which thread does which piece
changes nothing. A thread that waits for a disk cannot be ended, only named.
"""

import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar

from data.workers import CLOSE_S, WORKER_TIMEOUT_S, WorkerTimeoutError

Result = TypeVar("Result", covariant=True)


class PiecewiseJob(Protocol[Result]):
    """What there is to do: `len(job)` tasks, each in pieces that may be done at the same time."""

    def __len__(self) -> int: ...

    def begin(self, task: int) -> Any:
        """In the caller's thread: room for the task's result; `num_pieces` of it says how many pieces there are."""

    def fill(self, room: Any, piece: int) -> None:
        """In any thread: does one piece."""

    def finish(self, room: Any) -> Result:
        """In the caller's thread, when all pieces are done: the result."""

    def describe(self, task: int) -> str:
        """The images of the task, for a message."""


class Threads(Iterator[Result], Generic[Result]):
    """The results of a job's tasks in order, from `num` threads, which start now and end on `close`.

    Iterating raises what `fill` raised, and `WorkerTimeoutError` after WORKER_TIMEOUT_S in which no piece was done.
    """

    def __init__(self, job: PiecewiseJob[Result], num: int, ahead: int) -> None:
        self.job = job
        self._work = _Work(job, ahead)
        self._next = 0  # task whose result comes next
        self._begun = 0
        self._ahead = ahead
        self._finalizer = weakref.finalize(self, self._work.close)  # at exit too
        self._begin()
        for number in range(num if len(job) else 0):
            thread = threading.Thread(target=self._work.serve, daemon=True, name=f"loader-{number}")
            self._work.threads.append(thread)
            thread.start()

    def _begin(self) -> None:
        while self._begun < min(len(self.job), self._next + self._ahead):
            self._work.add(self._begun, self.job.begin(self._begun))
            self._begun += 1

    def __next__(self) -> Result:
        if self._next >= len(self.job) or self._work.closing:
            self.close()
            raise StopIteration
        try:
            room = self._wait()
        except Exception:
            self.close()  # there is no going on
            raise
        result = self.job.finish(room)
        self._next += 1
        self._begin()
        return result

    def _wait(self) -> Any:
        """The next task's room, filled. Time in which this process itself was stopped does not count."""
        work, left, seen = self._work, WORKER_TIMEOUT_S, -1
        with work.changed:
            while not work.is_done(self._next):
                if work.num_done != seen:
                    left, seen = WORKER_TIMEOUT_S, work.num_done
                elif left <= 0:
                    raise WorkerTimeoutError(
                        f"{len(work.threads)} loader threads gave nothing for {WORKER_TIMEOUT_S:g} s; they were asked for "
                        f"{self.job.describe(self._next)}: look at the disk or network file system that holds them, then start "
                        "again"
                    )
                if not work.changed.wait(1.0):
                    left -= 1.0
            if self._next in work.errors:
                raise work.errors[self._next]
            del work.left[self._next]
            return work.rooms.pop(self._next)

    def close(self) -> None:
        """Ends the threads after the pieces that they are at; may be called again."""
        self._finalizer()


class _Work:
    """What the threads share; it does not know the iterator, whose end is theirs."""

    def __init__(self, job: PiecewiseJob[Any], ahead: int) -> None:
        self.job = job
        self.changed = threading.Condition()
        self.threads: list[threading.Thread] = []
        self.rooms: dict[int, Any] = {}
        self.left: dict[int, int] = {}  # pieces of a task that are not done
        self.pieces: list[tuple[int, int]] = []  # not yet taken, the last one first
        self.errors: dict[int, Exception] = {}
        self.num_done = 0
        self.closing = False

    def add(self, task: int, room: Any) -> None:
        with self.changed:
            self.rooms[task], self.left[task] = room, room.num_pieces
            self.pieces[:0] = [(task, piece) for piece in reversed(range(room.num_pieces))]
            self.changed.notify_all()

    def is_done(self, task: int) -> bool:
        return self.left[task] == 0

    def serve(self) -> None:
        """The life of a thread."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.pieces or self.closing)
                if self.closing:
                    return
                task, piece = self.pieces.pop()
                room = self.rooms[task]
            try:
                self.job.fill(room, piece)
            except Exception as error:
                self.errors.setdefault(task, error)
            del room
            with self.changed:
                self.num_done += 1
                self.left[task] -= 1
                self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self.closing = True
            self.pieces.clear()
            self.rooms.clear()
            self.changed.notify_all()
        patience = time.monotonic() + CLOSE_S
        for thread in self.threads:
            thread.join(max(0.0, patience - time.monotonic()))
