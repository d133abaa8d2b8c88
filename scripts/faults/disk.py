"""A disk that fills up during a save, and how long a save keeps a run waiting."""

import contextlib
import errno
import os
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch

from scripts.faults.damage import training_state
from scripts.faults.launch import Numbers, UnavailableError
from scripts.faults.resume import Setting, differing_leaves, logged_steps, steps_on_disk
from vip import checkpoint
from vip.checkpoint import STEP_FILE, Writer

NO_SPACE = os.strerror(errno.ENOSPC)
RUN_STEPS = 30


@contextlib.contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A file system of its own in `folder`, of that size. Raises UnavailableError where this process may not mount one."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        raise UnavailableError(f"cannot mount a small file system ({done.stderr.strip()}); run it as root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def free_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def fill(folder: Path, left: int) -> Path:
    """Let a file take all space in `folder` but about `left` bytes (to a page); it is the file to delete afterwards."""
    filler = folder / "filler"
    with filler.open("ab") as file:
        num_bytes = free_bytes(folder) - left
        if num_bytes > 0:
            os.posix_fallocate(file.fileno(), file.tell(), num_bytes)
    return filler


def full(count: int, folder: Path) -> Numbers:
    """Fill the disk at `count` places spread over a checkpoint while it is saved; then in the middle of a real run.

    Numbers: `offsets` at which the disk was full; `lost`, times the checkpoint before was not whole then; `silent`, times
    nothing was said; `stuck`, times the save after it, with space again, did not work; `run_ends_alike`, whether the run
    trained on, saved again and came to the undisturbed end.
    """
    states = []
    for step in (1, 2):
        path = folder / STEP_FILE.format(step)
        checkpoint.write(path, training_state(step))
        states.append(checkpoint.read(path).state)
    (first, second), size = states, path.stat().st_size
    counts = Counter({"offsets": 0, "lost": 0, "silent": 0, "stuck": 0})
    with small_disk(folder / "small", 3 * size) as disk:
        said: list[str] = []
        writer = Writer(disk, keep=2, warn=said.append)
        for number in range(count):
            _save(writer, first)
            filler = fill(disk, number * size // count)
            _save(writer, second)
            counts["silent"] += len(said) != 1 or NO_SPACE not in said[0]
            counts["lost"] += not _is_newest(disk, first)
            filler.unlink()
            said.clear()
            _save(writer, second)
            counts["stuck"] += bool(said) or not _is_newest(disk, second)
            (disk / STEP_FILE.format(2)).unlink()
            counts["offsets"] += 1
    return {**counts, "run_ends_alike": _run_on_a_full_disk(folder, size)}


def _save(writer: Writer, state: dict[str, Any]) -> None:
    writer.save(state, is_best=False)
    writer.wait()


def _is_newest(folder: Path, state: dict[str, Any]) -> bool:
    """Whether the newest checkpoint is whole, of that state, and nothing was wrong on the way to it."""
    said: list[str] = []
    found = checkpoint.newest(folder, said.append)
    return found is not None and not said and not differing_leaves(found.state, state)


def _run_on_a_full_disk(folder: Path, size: int) -> bool:
    """Fill the disk of a run until a save fails, and empty it when there have been more steps."""
    setting = Setting(folder, 1, RUN_STEPS, "save_every=2")
    setting.train_undisturbed()
    with small_disk(folder / "run", 8 * size) as disk, setting.launch(disk, 0) as launch:
        launch.wait_until(lambda: len(steps_on_disk(disk)) == 2)

        def refused() -> bool:  # old checkpoints that still go as the disk fills make room: fill that too
            fill(disk, size // 2)
            return NO_SPACE in launch.output

        launch.wait_until(refused, period=0.02)
        failed_at = max(logged_steps(disk))
        launch.wait_until(lambda: max(logged_steps(disk)) > failed_at + 4)
        fill(disk, size // 2).unlink()
        finished = not any(launch.wait())
        whole = failed_at < RUN_STEPS - 4 and finished and not setting.differing(disk, RUN_STEPS)
        return whole and logged_steps(disk) == logged_steps(setting.undisturbed)


def save(count: int, folder: Path, network: str = "vip_m7") -> Numbers:
    """Save the state of `network` `count` times after a first time, while small training steps go on beside it.

    Numbers: `megabytes`; how long a save keeps the run waiting, in seconds; seconds until it is on the disk; how many times
    longer a step takes meanwhile (a small network's on the host, which the writing thread disturbs most).
    """
    said: list[str] = []
    state, writer = training_state(0, network, num_classes=1000), Writer(folder, keep=2, warn=said.append)
    steps = _Steps()
    calm = steps.seconds(20)
    blocked, written, busy = [], [], []
    for step in range(count + 1):
        state["step"] = step
        started = time.perf_counter()
        writer.save(state, is_best=False)
        blocked.append(time.perf_counter() - started)
        while writer.busy:
            busy += steps.seconds(1)
        written.append(time.perf_counter() - started)
    if said:
        raise RuntimeError(said[0])
    return {
        "megabytes": (folder / STEP_FILE.format(count)).stat().st_size / 1e6,
        "first_s": blocked[0], "median_s": statistics.median(blocked[1:]), "max_s": max(blocked[1:]),
        "written_s": statistics.median(written[1:]), "step_ms": 1000 * statistics.median(calm),
        "slower": statistics.median(busy) / statistics.median(calm),
    }  # fmt: skip


class _Steps:
    """Training steps of a small network on the host."""

    def __init__(self) -> None:
        self.model = timm.create_model("vip_tiny", num_classes=10)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.images = torch.randn(16, 3, 32, 32)

    def seconds(self, count: int) -> list[float]:
        """Of each of `count` steps."""
        taken = []
        for _ in range(count):
            started = time.perf_counter()
            self.model(self.images).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            taken.append(time.perf_counter() - started)
        return taken
