"""Loader workers that are killed, stopped or fail, by real signals: the same batches, or one line that says what happened."""

import faulthandler
import logging
import mmap
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
import torch

from data import workers
from data.augment import TrainTransform
from data.batch import Batch
from data.config import AugmentConfig, DataConfig
from data.decoders import TorchDecoder
from data.loader import BatchIterator, train_loader
from data.order import BatchPlan, EpochOrder
from data.sources import Source, open_source
from data.workers import MAX_RESTARTS, WorkerError, Workers, WorkerTimeoutError

NUM_BATCHES = 30


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source(DataConfig(kind="synthetic", num_images=40, num_classes=5), "train")


def load(source: Source, num_workers: int) -> BatchIterator:
    transform = TrainTransform(AugmentConfig(), (32, 32))
    order, plan = EpochOrder(len(source), 3), BatchPlan(8)
    return train_loader(
        source,
        transform,
        order,
        plan,
        decoder=TorchDecoder(),
        start_step=0,
        total_steps=NUM_BATCHES,
        workers=num_workers,
    )


def children(parent: int | None = None) -> set[int]:
    """Process ids of the children of `parent`, or of this process, zombies too."""
    parent = parent or os.getpid()
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.add(int(stat.parent.name))
    return found


@pytest.fixture
def new_children() -> Iterator[Callable[[], list[int]]]:
    """The processes started since the test began, oldest first; at its end none must be left."""
    before = children()
    yield lambda: sorted(children() - before)
    assert children() <= before


@pytest.fixture(scope="module")
def undisturbed(source: Source) -> list[Batch]:
    return list(load(source, 0))


def assert_same(ours: list[Batch], expected: list[Batch]) -> None:
    assert len(ours) == len(expected)
    for one, other in zip(ours, expected, strict=True):
        assert all(torch.equal(field, expected_field) for field, expected_field in zip(one, other, strict=True))


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_a_killed_worker_is_started_again_and_the_batches_are_the_same(
    source: Source,
    undisturbed: list[Batch],
    new_children: Callable[[], list[int]],
    caplog: pytest.LogCaptureFixture,
    num_workers: int,
) -> None:
    batches, ours = load(source, num_workers), []
    killed = []
    for number, batch in enumerate(batches):
        ours.append(batch)
        if number % 6 == 2 and number < 20:
            killed.append(new_children()[-1])
            os.kill(killed[-1], signal.SIGKILL)
    assert_same(ours, undisturbed)
    assert len(killed) == 3
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 3
    for pid, line in zip(killed, said, strict=True):
        assert re.search(
            rf"\(pid {pid}\) was killed by signal 9 \(SIGKILL: often memory\) when batch \d+ was due", line
        )


def test_all_workers_killed_at_once_come_back(
    source: Source, undisturbed: list[Batch], new_children: Callable[[], list[int]]
) -> None:
    batches = load(source, 3)
    ours = [next(batches) for _ in range(5)]
    for pid in new_children():
        os.kill(pid, signal.SIGKILL)
    assert_same([*ours, *batches], undisturbed)


def test_a_worker_killed_while_the_trainer_computes_does_not_interrupt_it(
    source: Source, new_children: Callable[[], list[int]]
) -> None:
    """torch's DataLoader raises from its SIGCHLD handler, wherever the training process happens to be."""
    batches = load(source, 2)
    next(batches)
    os.kill(new_children()[0], signal.SIGKILL)
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        sum(range(1000))
    batches.close()


def test_workers_that_die_again_and_again_end_in_one_line(
    source: Source, new_children: Callable[[], list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    batches = load(source, 1)

    def kill_before_each() -> None:
        for _ in range(NUM_BATCHES):
            os.kill(new_children()[-1], signal.SIGKILL)
            next(batches)

    with pytest.raises(WorkerError) as caught:
        kill_before_each()
    batches.close()
    message = str(caught.value)
    assert "\n" not in message
    assert "was killed by signal 9 (SIGKILL: often memory) when it was asked for class" in message
    assert "lower data.workers" in message
    assert len(caplog.records) == MAX_RESTARTS


class Deadly:
    """A job whose third task kills whoever tries it, as an image can that crashes its decoder."""

    slot_bytes = 0

    def __len__(self) -> int:
        return 5

    def work(self, task: int, slot: mmap.mmap) -> int:
        if task == 2:
            faulthandler.disable()  # pytest's
            os.kill(os.getpid(), signal.SIGSEGV)
        return task

    def collect(self, reply: int, slot: mmap.mmap) -> int:
        return reply

    def describe(self, task: int) -> str:
        return f"image {task}"


def test_an_image_that_crashes_every_worker_is_named(new_children: Callable[[], list[int]]) -> None:
    results = Workers(Deadly(), 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(WorkerError, match=r"was killed by signal 11 \(SIGSEGV\) when it was asked for image 2"):
        next(results)
    results.close()


class Faulty(Deadly):
    def work(self, task: int, slot: mmap.mmap) -> int:
        raise (KeyError("a bug"), ValueError("a user's mistake"))[task]


def test_errors_in_a_worker_are_raised_where_their_batch_is_due(new_children: Callable[[], list[int]]) -> None:
    results = Workers(Faulty(), 1)
    with pytest.raises(RuntimeError, match=r"(?s)asked for image 0.*Traceback.*KeyError: 'a bug'"):
        next(results)
    results.close()
    results.close()
    with pytest.raises(StopIteration):
        next(results)


@pytest.mark.parametrize("moment", ["with batches ready", "at work"])
def test_a_stopped_worker_is_named_with_its_state_and_images_and_does_not_outlive_the_run(
    source: Source, monkeypatch: pytest.MonkeyPatch, new_children: Callable[[], list[int]], moment: str
) -> None:
    monkeypatch.setattr(workers, "WORKER_TIMEOUT_S", 2.0)
    batches = load(source, 2)
    ours = [next(batches)]
    ready = moment == "with batches ready"  # which must come without its help
    if ready:
        time.sleep(1)
    pid = new_children()[0]
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(WorkerTimeoutError) as caught:
        ours.extend(batches)
    assert len(ours) >= (4 if ready else 1)
    message = str(caught.value)
    assert "\n" not in message
    assert re.match(
        rf"loader worker 0 \(pid {pid}, state T: stopped\) gave nothing for 2 s; it was asked for class\d/\d+, class\d/\d+, "
        r"class\d/\d+ \.\.\. \(8 images\): look at the disk",
        message,
    )
    assert new_children() == []


def test_a_worker_stopped_and_continued_changes_nothing(
    source: Source, undisturbed: list[Batch], new_children: Callable[[], list[int]]
) -> None:
    batches = load(source, 2)
    ours = [next(batches) for _ in range(3)]
    pids = new_children()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    resume = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -CONT {' '.join(map(str, pids))}"])
    assert_same([*ours, *batches], undisturbed)
    resume.wait()


class Slow(Deadly):
    def work(self, task: int, slot: mmap.mmap) -> int:
        time.sleep(1.5)
        return task


def test_time_in_which_the_whole_job_was_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedulers stop jobs for minutes to let others pass."""
    monkeypatch.setattr(workers, "WORKER_TIMEOUT_S", 3.0)
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        status = 1
        try:
            status = 0 if next(Workers(Slow(), 1)) == 0 else 2
        finally:
            os._exit(status)
    time.sleep(0.7)
    os.killpg(pid, signal.SIGSTOP)
    time.sleep(4)
    os.killpg(pid, signal.SIGCONT)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_dropped_iterator_ends_its_workers(source: Source, new_children: Callable[[], list[int]]) -> None:
    batches = load(source, 2)
    next(batches)
    assert len(new_children()) == 2
    del batches
    assert new_children() == []


def test_close_ends_the_workers_and_may_be_called_again(source: Source, new_children: Callable[[], list[int]]) -> None:
    batches = load(source, 2)
    next(batches)
    assert len(new_children()) == 2
    batches.close()
    batches.close()
    assert new_children() == []


def test_a_forked_copy_of_an_iterator_leaves_the_workers_alone(source: Source, undisturbed: list[Batch]) -> None:
    batches = load(source, 2)
    pid = os.fork()
    if pid == 0:
        try:
            batches.close()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert_same(list(batches), undisturbed)


TRAINING = """
import signal, time
from data.augment import TrainTransform
from data.config import AugmentConfig, DataConfig
from data.decoders import TorchDecoder
from data.loader import train_loader
from data.order import BatchPlan, EpochOrder
from data.sources import open_source

signal.signal(signal.SIGTERM, lambda number, frame: None)
source = open_source(DataConfig(kind="synthetic", num_images=64), "train")
transform = TrainTransform(AugmentConfig(), (32, 32))
batches = train_loader(
    source, transform, EpochOrder(64, 0), BatchPlan(4), decoder=TorchDecoder(), start_step=0, total_steps=10**6, workers=2
)
for batch in batches:
    print("batch", flush=True)
    time.sleep(0.05)
"""


def start_training() -> tuple[subprocess.Popen[str], IO[str], list[int]]:
    """TRAINING as the leader of its own process group after its first batch, the lines that it prints, and its workers."""
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINING],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    lines = process.stdout
    assert lines is not None
    assert lines.readline() == "batch\n"
    started = children(process.pid)
    assert len(started) == 2
    return process, lines, sorted(started)


def test_interrupting_the_process_group_leaves_no_worker_tracebacks_and_no_stopped_worker() -> None:
    process, _, pids = start_training()
    os.kill(pids[0], signal.SIGSTOP)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)  # returns when the workers, which hold the pipes too, are gone
    assert errors.count("Traceback") == 1, errors
    assert errors.endswith("KeyboardInterrupt\n"), errors


def test_a_scheduler_s_sigterm_to_the_process_group_does_not_take_the_batches_away() -> None:
    process, lines, pids = start_training()
    os.killpg(process.pid, signal.SIGTERM)  # the process itself has a handler
    for _ in range(40):  # more than was loaded ahead
        assert lines.readline() == "batch\n"
    assert sorted(children(process.pid)) == pids
    os.kill(pids[0], signal.SIGKILL)
    for _ in range(10):
        assert lines.readline() == "batch\n"
    for pid in children(process.pid):  # a run that is killed must not leave a stopped worker behind either
        os.kill(pid, signal.SIGSTOP)
    process.kill()
    _, errors = process.communicate(timeout=60)
    assert re.fullmatch(rf"loader worker 0 \(pid {pids[0]}\) was killed by signal 9 .* started again .*\n", errors), (
        errors
    )
