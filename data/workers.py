"""Processes that do a job's tasks in order, and what happens when one of them dies or hangs.

Task k falls to worker k mod n, and a task is a number and nothing else: the job, which the workers inherit by forking, knows
what it stands for. A worker that dies is started again and given the tasks that it still owed, so nothing that comes out
depends on it. What is large goes through memory shared from the start: no process waits for data that another one, which
may be stopped or gone, has yet to hand over, and no limit on /dev/shm matters. torch's DataLoader can promise neither, and
reports a dead worker by raising in the midst of whatever the training process is doing.
"""

import contextlib
import logging
import mmap
import os
import signal
import time
import traceback
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, Generic, NoReturn, Protocol, TypeVar

import torch

from data.parent import die_with_parent

WORKER_TIMEOUT_S = 120.0
MAX_RESTARTS = 10
AHEAD = 2  # tasks that a worker has at a time: one in work, one done or next
CLOSE_S = 5.0  # patience with workers that not even SIGKILL ends: those that wait for a disk
STATES = {"D": "waits for a disk or network file system", "T": "stopped", "t": "held by a debugger", "S": "sleeps",
          "R": "runs"}  # fmt: skip

Result = TypeVar("Result", covariant=True)
logger = logging.getLogger(__name__)


class WorkerError(OSError):
    """Workers that die again and again; one line with the cause."""


class WorkerTimeoutError(TimeoutError):
    """A worker that hangs; one line that names it and its images."""


class Job(Protocol[Result]):
    """What there is to do: `len(job)` tasks."""

    slot_bytes: int  # shared memory that one task needs

    def __len__(self) -> int: ...

    def work(self, task: int, slot: mmap.mmap) -> Any:
        """In the worker: does the task. The bulk of the result goes into `slot`, a few kB are returned."""

    def collect(self, reply: Any, slot: mmap.mmap) -> Result:
        """In the parent: the result, independent of `slot`, from what `work` returned and left there."""

    def describe(self, task: int) -> str:
        """The images of the task, for a message."""


@dataclass
class _Worker:
    number: int
    pid: int
    connection: Connection
    outcome: str | None = None  # how it ended; its process id may be another's from then on

    def end(self, patience: float) -> str:
        """Kills it unless it has ended, waits at most until `patience` on the monotonic clock, and says how it ended."""
        self.connection.close()
        while self.outcome is None:
            try:
                os.kill(self.pid, signal.SIGKILL)  # a stopped process heeds nothing less
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except (ChildProcessError, ProcessLookupError):  # somebody else waited for it
                self.outcome = "ended"
                break
            if pid:
                self.outcome = _outcome(status)
            elif time.monotonic() > patience:
                return "did not end"
            else:
                time.sleep(0.002)
        return self.outcome


class Workers(Iterator[Result], Generic[Result]):
    """The results of a job's tasks in order, from `num` forked processes, which start now and end on `close`.

    Iterating raises what `Job.work` raised (ValueError and OSError as they are, anything else as RuntimeError with the
    worker's traceback), `WorkerError` after MAX_RESTARTS deaths and `WorkerTimeoutError` after WORKER_TIMEOUT_S without a
    result.
    """

    def __init__(self, job: Job[Result], num: int) -> None:
        if not hasattr(os, "fork"):
            raise ValueError(f"data.workers={num}: this system cannot fork processes; set data.workers=0")
        self.job = job
        self._next = 0  # task whose result comes next
        self._restarts = 0
        self._workers: list[_Worker] = []
        num = min(num, len(job))
        self._slots = [mmap.mmap(-1, max(1, job.slot_bytes)) for _ in range(num * AHEAD)]
        self._finalizer = weakref.finalize(self, _end_all, self._workers, os.getpid())  # at exit too
        for number in range(num):
            self._workers.append(self._start(number))

    def __next__(self) -> Result:
        if self._next >= len(self.job) or not self._workers:
            self.close()
            raise StopIteration
        number = self._next % len(self._workers)
        try:
            reply = self._receive(number)
            if isinstance(reply, Exception):
                raise reply
        except Exception:
            self.close()  # there is no going on
            raise
        result = self.job.collect(reply, self._slot(self._next))
        self._send(self._workers[number], self._next + len(self._slots))
        self._next += 1
        return result

    def close(self) -> None:
        """Ends the workers, whatever they are doing; may be called again."""
        self._finalizer()

    def _slot(self, task: int) -> mmap.mmap:
        return self._slots[task % len(self._slots)]

    def _start(self, number: int) -> _Worker:
        """Forks worker `number` and gives it the tasks that are due."""
        ours, theirs = Pipe()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._serve(theirs, [ours, *(worker.connection for worker in self._workers)], parent)
        theirs.close()
        worker = _Worker(number, pid, ours)
        num = len(self._slots) // AHEAD
        first = self._next + (number - self._next) % num
        for task in range(first, self._next + len(self._slots), num):
            self._send(worker, task)
        return worker

    def _send(self, worker: _Worker, task: int) -> None:
        if task < len(self.job):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # dead: found when its turn comes
                worker.connection.send(task)

    def _receive(self, number: int) -> Any:
        """The reply to the next task, from worker `number`, which is started again if it died."""
        while True:
            worker = self._workers[number]
            self._wait_for(worker)
            try:
                return worker.connection.recv()
            except (EOFError, OSError):
                self._restart(worker)

    def _wait_for(self, worker: _Worker) -> None:
        """Returns when the worker has replied or is dead. Time in which this process itself was stopped does not count."""
        left = WORKER_TIMEOUT_S
        while not worker.connection.poll(min(left, 1.0)):
            left -= 1.0
            if left <= 0:
                raise WorkerTimeoutError(
                    f"loader worker {worker.number} (pid {worker.pid}, {_state(worker.pid)}) gave nothing for "
                    f"{WORKER_TIMEOUT_S:g} s; it was asked for {self.job.describe(self._next)}: look at the disk or network "
                    "file system that holds them, then start again"
                )

    def _restart(self, worker: _Worker) -> None:
        cause = worker.end(time.monotonic() + CLOSE_S)
        asked = self.job.describe(self._next)
        self._restarts += 1
        if self._restarts > MAX_RESTARTS:
            raise WorkerError(
                f"loader worker {worker.number} (pid {worker.pid}) {cause} when it was asked for {asked}, and {MAX_RESTARTS} "
                "workers had to be started again before: if memory ran out, lower data.workers or the batch; else look at "
                "these images"
            )
        logger.warning(
            "loader worker %d (pid %d) %s when batch %d was due; started again there (%d of %d times)",
            worker.number, worker.pid, cause, self._next, self._restarts, MAX_RESTARTS,
        )  # fmt: skip
        self._workers[worker.number] = self._start(worker.number)

    def _serve(self, connection: Connection, inherited: list[Connection], parent: int) -> NoReturn:
        """The life of a worker; no exit handler of the parent's runs in it."""
        status = 1
        try:
            _leave_signals_to(parent)
            torch.set_num_threads(1)
            for other in inherited:  # else it would keep them open, and nobody would see its parent's end
                other.close()
            while True:
                task = connection.recv()
                connection.send(self._reply(task))
        except (EOFError, ConnectionError):  # the parent is gone
            status = 0
        finally:
            os._exit(status)

    def _reply(self, task: int) -> Any:
        try:
            return self.job.work(task, self._slot(task))
        except (ValueError, OSError) as error:
            return error
        except Exception:
            return RuntimeError(f"in a loader worker, asked for {self.job.describe(task)}:\n{traceback.format_exc()}")


def _leave_signals_to(parent: int) -> None:
    """Signals are the parent's business: Ctrl-C and a scheduler's warning reach the whole process group, and the parent may
    need more batches to reach a step's end. It ends its workers with SIGKILL; when it dies, they die."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(parent)


def _end_all(workers: list[_Worker], parent: int) -> None:
    """Empties the list; in a forked process, which has a copy of it, nothing is done."""
    if os.getpid() != parent:
        return
    for worker in workers:
        if worker.outcome is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)
    patience = time.monotonic() + CLOSE_S
    while workers:
        workers.pop().end(patience)


def _outcome(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"ended with status {code}"
    hint = ": often memory" if code == -signal.SIGKILL else ""
    return f"was killed by signal {-code} ({signal.Signals(-code).name}{hint})"


def _state(pid: int) -> str:
    """What the process does, where the system tells."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "state unknown"
    return f"state {letter}: {STATES.get(letter, 'see ps')}"
