"""Threads that fill batches: order, errors in their turn, hanging reads named, and an end whatever they are doing."""

import gc
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from data import threads
from data.buffers import Buffers
from data.threads import Threads
from data.workers import WorkerTimeoutError


@dataclass
class Room:
    task: int
    num_pieces: int
    values: dict[int, int] = field(default_factory=dict)


class Squares:
    """Task k has k % 3 + 1 pieces; its result is the squares of 100 k + piece."""

    def __init__(self, num: int, failing: int = -1, begun: list[int] | None = None) -> None:
        self.num = num
        self.failing = failing
        self.begun = begun if begun is not None else []

    def __len__(self) -> int:
        return self.num

    def begin(self, task: int) -> Room:
        assert threading.current_thread() is threading.main_thread()
        self.begun.append(task)
        return Room(task, task % 3 + 1)

    def fill(self, room: Room, piece: int) -> None:
        time.sleep(0.001 * ((room.task * 7 + piece) % 4))
        if room.task == self.failing:
            raise ValueError(f"task {room.task} is no good")
        room.values[piece] = (100 * room.task + piece) ** 2

    def finish(self, room: Room) -> list[int]:
        return [room.values[piece] for piece in range(room.num_pieces)]

    def describe(self, task: int) -> str:
        return f"images of task {task}"


EXPECTED = [[(100 * task + piece) ** 2 for piece in range(task % 3 + 1)] for task in range(40)]


@pytest.mark.parametrize("num", [1, 2, 4])
@pytest.mark.parametrize("ahead", [1, 2, 7])
def test_results_come_in_order_whoever_made_them(num: int, ahead: int) -> None:
    assert list(Threads(Squares(40), num, ahead)) == EXPECTED


def test_no_more_than_asked_for_is_begun_ahead() -> None:
    job = Squares(40)
    results = Threads(job, 2, ahead=3)
    next(results)
    assert job.begun == [0, 1, 2, 3]
    results.close()


def test_an_error_comes_in_its_turn_and_ends_the_threads() -> None:
    results = Threads(Squares(40, failing=9), 3, ahead=12)
    time.sleep(0.2)  # task 9 has failed by now
    assert [next(results) for _ in range(9)] == EXPECTED[:9]
    with pytest.raises(ValueError, match="task 9 is no good"):
        next(results)
    assert not any(thread.name.startswith("loader-") for thread in threading.enumerate())
    assert list(results) == []


def test_threads_end_when_the_iterator_is_dropped() -> None:
    results = Threads(Squares(40), 3, ahead=2)
    next(results)
    del results
    gc.collect()
    assert not any(thread.name.startswith("loader-") for thread in threading.enumerate())


class Reads(Squares):
    """Each piece reads a FIFO that nobody may write to."""

    def __init__(self, path: Path) -> None:
        super().__init__(2)
        self.path = path

    def fill(self, room: Room, piece: int) -> None:
        self.path.read_bytes()


def test_a_read_that_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "WORKER_TIMEOUT_S", 2.0)
    monkeypatch.setattr(threads, "CLOSE_S", 0.1)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    results = Threads(Reads(fifo), 1, ahead=1)
    with pytest.raises(
        WorkerTimeoutError, match=r"1 loader threads gave nothing for 2 s; they were asked for images of task 0: look"
    ):
        next(results)
    with fifo.open("wb"):  # lets the thread go
        pass


def test_memory_is_used_again_once_no_tensor_looks_at_it() -> None:
    buffers = Buffers()
    first = torch.from_numpy(buffers.take((4, 5, 3)))
    address = first.data_ptr()
    view = first.view(20, 3)[3:]
    del first
    assert torch.from_numpy(buffers.take((4, 5, 3))).data_ptr() != address, "a view still looks at it"
    del view
    again = buffers.take((60,))
    assert again.ctypes.data == address
    assert np.shares_memory(again, np.frombuffer(again, np.uint8))
