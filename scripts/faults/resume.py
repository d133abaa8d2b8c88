"""Runs that are killed and go on: at every step boundary, bit for bit; and as torchrun's restarts, within a time."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.digits import prepare_digits
from data.parent import die_with_parent
from scripts.faults.launch import ROOT, Launch, Numbers, environment
from vip import checkpoint
from vip.checkpoint import STEP_FILE
from vip.tracking.jsonl import read_lines

# Everything that draws random numbers or keeps state: RandAugment, mixing, erasing, stochastic depth, accumulation, EMA.
FULL = (
    "experiment=digits", "augment=vip", "augment.hflip=0", "model.drop_path.rate=0.2", "model.drop_path.over_training=ramp",
    "schedule.warmup_epochs=1", "ema_decay=0.9", "optimizer.clip_grad=5", "name=run",
    "eval_every=100000", "log_every=1",
)  # fmt: skip
BATCH = 16
EPOCH_STEPS = 1437 // BATCH
WORKERS = (0, 1, 2)
RESTART_LIMIT_S = 180.0


class Setting:
    """A command for short runs with everything on, and the undisturbed run that others are compared with."""

    def __init__(self, folder: Path, processes: int, steps: int, *arguments: str) -> None:
        data = folder / "digits"
        prepare_digits(data)
        self.processes = processes
        self.steps = steps
        self.undisturbed = folder / f"undisturbed{processes}"
        shared = (f"data.root={data}", f"epochs={steps // EPOCH_STEPS + 2}", f"max_steps={steps}", *arguments)
        sizes = (f"batch_size={BATCH}", f"micro_batch={BATCH // processes // 2}")
        self.arguments = (*FULL, *shared, *sizes)

    def train_undisturbed(self) -> float:
        """Keep every checkpoint of a run from start to end; seconds until its first step was done."""
        cwd = self.undisturbed
        with Launch((*self.arguments, "data.workers=1", f"keep={self.steps + 1}"), cwd, self.processes) as launch:
            launch.wait_until(lambda: bool(logged_steps(cwd)))
            seconds = time.monotonic() - launch.started
            if any(launch.wait(1800)):
                raise RuntimeError(f"the undisturbed run failed:\n{launch.output}")
        return seconds

    def launch(self, cwd: Path, number: int, *arguments: str) -> Launch:
        """The same run in `cwd`, from where it stands; its number of workers changes with the number of the launch."""
        workers = f"data.workers={WORKERS[number % len(WORKERS)]}"
        return Launch((*self.arguments, workers, *arguments), cwd, self.processes)

    def differing(self, cwd: Path, step: int) -> list[str]:
        """What differs in the checkpoint of `step` from the undisturbed run's."""
        one, other = (checkpoint.read(step_file(folder, step)).state for folder in (cwd, self.undisturbed))
        return differing_leaves(one, other)


def step_file(cwd: Path, step: int) -> Path:
    return cwd / "runs/run/checkpoints" / STEP_FILE.format(step)


def steps_on_disk(cwd: Path) -> list[int]:
    """Steps of which there is a checkpoint, in order."""
    return sorted(int(path.stem.removeprefix("step_")) for path in step_file(cwd, 0).parent.glob("step_*.safetensors"))


def logged_steps(cwd: Path) -> list[int]:
    """Steps in the run's metrics.jsonl, of training alone, in order of the file."""
    return [int(line["step"]) for line in read_lines(cwd / "runs/run/metrics.jsonl") if "train/loss" in line]


def differing_leaves(one: Any, other: Any) -> list[str]:
    """Names of all that is not the same, to the last bit, in two states; their settings alone may differ."""
    leaves, others = dict(_leaves(one)), dict(_leaves(other))
    return [name for name in sorted(leaves.keys() | others.keys()) if not _same(leaves.get(name), others.get(name))]


def sweep(count: int, folder: Path, worlds: tuple[int, ...] = (1, 2)) -> Numbers:
    """Kill a run after each of `count` - 1 steps and resume it each time, once for each world size.

    Numbers: `wanted` and `boundaries`, those that a launch really started from; `differing` tensors (and other values) in
    the checkpoints of all steps.
    """
    boundaries, unlike = 0, []
    for processes in worlds:
        setting = Setting(folder, processes, count, "save_every=1")
        setting.train_undisturbed()
        cwd = folder / f"killed{processes}"
        for step in range(count):
            boundaries += _one_step(setting, cwd, step)
            unlike += setting.differing(cwd, step + 1)
    numbers = {"wanted": len(worlds) * (count - 1), "boundaries": boundaries, "differing": len(unlike)}
    return numbers | ({"first_differing": unlike[0]} if unlike else {})


def _one_step(setting: Setting, cwd: Path, step: int) -> bool:
    """Launch, and kill as soon as the checkpoint of the next step stands; whether it went on from the boundary `step`.

    The last launch may end by itself. A kill that comes late finds more checkpoints: they are taken away, so that the next
    launch starts from the very next boundary.
    """
    with setting.launch(cwd, step, "keep=1000000") as launch:
        if step + 1 == setting.steps:
            if any(launch.wait()):
                raise RuntimeError(f"the launch from step {step} failed:\n{launch.output}")
        elif not launch.wait_until(step_file(cwd, step + 1).exists):
            raise RuntimeError(f"the launch from step {step} ended without a checkpoint:\n{launch.output}")
    for later in steps_on_disk(cwd):
        if later != step + 1:
            step_file(cwd, later).unlink()
    return f"goes on from step {step}\n" in launch.output


class Torchrun:
    """A real torchrun of two ranks that may restart, in `cwd`; what it says goes to the file `launch.txt` there."""

    def __init__(self, arguments: Sequence[str], cwd: Path) -> None:
        cwd.mkdir(parents=True)
        self.log = cwd / "launch.txt"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                (sys.executable, *launcher, str(ROOT / "train.py"), *arguments), cwd=cwd, stdout=log, stderr=log,
                env=environment() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}, preexec_fn=die_with_parent,
            )  # fmt: skip

    def __enter__(self) -> "Torchrun":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()  # its ranks die with it
        self.process.wait()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def pid(self, rank: int) -> int:
        """Of the process that is this rank now. Raises RuntimeError where there is none."""
        for children in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for pid in children.read_text().split():
                with contextlib.suppress(OSError):
                    if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                        return int(pid)
        raise RuntimeError(f"torchrun has no rank {rank}:\n{self.output}")

    def seconds_until(self, condition: Callable[[], bool]) -> float:
        """Raises RuntimeError where that takes too long, or torchrun ends before."""
        started = time.monotonic()
        while not condition():
            if self.process.poll() is not None or time.monotonic() - started > RESTART_LIMIT_S:
                raise RuntimeError(f"torchrun (exit status {self.process.poll()}) did not get there:\n{self.output}")
            time.sleep(0.05)
        return time.monotonic() - started


def ranks(count: int, folder: Path) -> Numbers:
    """A real torchrun with two ranks, `count` times: one rank is killed, and later one stands still as if it hung.

    Numbers: `back_s`, the longest from the kill to a step that was never done before; `named_s`, the longest from the
    standstill to a line that names the rank.
    """
    setting = Setting(folder, 2, 100_000, "save_every=1", "data.workers=1")
    back, named = [], []
    for number in range(count):
        cwd = folder / f"torchrun{number}"
        with Torchrun(setting.arguments, cwd) as run:
            run.seconds_until(lambda: _last_step(cwd) > 20)  # noqa: B023 - called in this turn of the loop
            os.kill(run.pid(1), signal.SIGKILL)
            beyond = _last_step(cwd) + 1  # the step in flight may still be logged
            back.append(run.seconds_until(lambda: _last_step(cwd) > beyond))  # noqa: B023
            run.seconds_until(lambda: _last_step(cwd) > beyond + 20)  # noqa: B023
            seen = len(run.output)
            os.kill(run.pid(1), signal.SIGSTOP)
            named.append(run.seconds_until(lambda: "rank 1" in run.output[seen:]))  # noqa: B023
    return {"times": count, "back_s": max(back), "named_s": max(named)}


def _last_step(cwd: Path) -> int:
    return max(logged_steps(cwd), default=0)


def _leaves(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of everything in a state but the configuration, which names workers and folders."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            if (name, key) != ("", "config"):
                yield from _leaves(value, f"{name}/{key}")
    elif isinstance(node, list) and node:
        for i, value in enumerate(node):
            yield from _leaves(value, f"{name}/{i}")
    else:
        yield name, node


def _same(one: Any, other: Any) -> bool:
    """Equal type and bits: 0.0 is not -0.0, and NaN is itself."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    return type(one) is type(other) and repr(one) == repr(other)
