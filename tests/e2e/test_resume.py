"""A run that is interrupted and goes on ends with the bits of a run that was left alone."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scripts.faults.launch import Launch
from tests.conftest import Run, command, environment

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("resume")]

# Everything that draws random numbers or keeps state: RandAugment, erasing, mixing, stochastic depth, accumulation, EMA.
FULL = (
    "experiment=digits", "augment=vip", "augment.hflip=0", "model.drop_path.rate=0.2", "model.drop_path.over_training=ramp",
    "epochs=1", "schedule.warmup_epochs=0", "batch_size=64", "micro_batch=16", "ema_decay=0.9",
    "save_every=6", "log_every=3", "optimizer.clip_grad=5",
)  # fmt: skip
LAST_STEP = 1437 // 64


def full(processes: int) -> tuple[str, ...]:
    """Both kinds of stochastic depth: the one that skips under DDP."""
    return (*FULL, "model.drop_path.mode=subset") if processes == 2 else FULL


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Callable[[int], Path]:
    """The folder of a run that nothing interrupts, by number of processes; each is trained once."""
    folders: dict[int, Path] = {}

    def train(processes: int) -> Path:
        if processes not in folders:
            cwd = tmp_path_factory.mktemp("untouched")
            arguments = (*full(processes), f"data.root={digits}", "name=run", "data.workers=1")
            undisturbed = Launch(arguments, cwd, processes or 1)
            assert not any(undisturbed.wait()), undisturbed.output
            folders[processes] = cwd / "runs/run"
        return folders[processes]

    return train


def interrupt(cwd: Path, digits: Path, processes: int, number: signal.Signals) -> tuple[int, str]:
    """Start the run and send it the signal as soon as it has a checkpoint; its exit status and what it said."""
    arguments = (*full(processes), f"data.root={digits}", "name=run", "data.workers=2")
    first = cwd / "runs/run/checkpoints/step_0000000006.safetensors"
    if not processes:
        alone = Launch(arguments, cwd)
        assert alone.wait_until(first.exists), alone.output
        alone.kill(0, number)
        (status,), said = alone.wait(), alone.output
    else:
        started = subprocess.Popen(
            command("train.py", *arguments, processes=processes),
            cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        wait_for(first, started)
        os.kill(started.pid, number)
        said = started.communicate(timeout=60)[0]
        status = started.returncode
    assert final_checkpoint(cwd / "runs/run") is None, "the signal came too late to prove anything"
    return status, said


def wait_for(path: Path, started: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 150
    while not path.exists():
        assert started.poll() is None, started.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def final_checkpoint(folder: Path) -> dict[str, torch.Tensor] | None:
    path = folder / f"checkpoints/step_{LAST_STEP:010d}.safetensors"
    return load_file(path) if path.exists() else None


def records(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without those values that a clock decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clocked = ("train/images_per_s", "train/data_wait", "train/mfu")
    return [{k: v for k, v in line.items() if k not in clocked} for line in lines]


def assert_same_end(folder: Path, untouched: Path) -> None:
    one, other = final_checkpoint(folder), final_checkpoint(untouched)
    assert one is not None
    assert other is not None
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert records(folder)[-1] == records(untouched)[-1]


@pytest.mark.parametrize("processes", [0, 2])
def test_killed_in_mid_epoch(
    run: Run, tmp_path: Path, digits: Path, untouched: Callable[[int], Path], processes: int
) -> None:
    interrupt(tmp_path, digits, processes, signal.SIGKILL)
    folder = tmp_path / "runs/run"
    resumed = run(
        "train.py", *full(processes), f"data.root={digits}", "name=run", "data.workers=0", processes=processes
    )
    assert "goes on from step" in resumed.stdout
    assert_same_end(folder, untouched(processes))
    steps = [line["step"] for line in records(folder)]
    assert steps == [line["step"] for line in records(untouched(processes))], "no step is missing or twice"


@pytest.mark.parametrize(
    ("processes", "number"),
    [(0, signal.SIGINT), (0, signal.SIGUSR1), (0, signal.SIGTERM), (2, signal.SIGTERM)],
)
def test_asked_to_stop_loses_no_step(
    run: Run, tmp_path: Path, digits: Path, untouched: Callable[[int], Path], processes: int, number: signal.Signals
) -> None:
    status, said = interrupt(tmp_path, digits, processes, number)
    folder = tmp_path / "runs/run"
    stopped_at = int((folder / "PREEMPTED").read_text())
    assert f"saved at step {stopped_at}; the same command goes on" in said
    assert records(folder)[-1]["step"] == stopped_at
    assert (folder / f"checkpoints/step_{stopped_at:010d}.safetensors").exists()
    if not processes:
        assert status == 128 + number
        assert "Traceback" not in said
    resumed = run(
        "train.py", *full(processes), f"data.root={digits}", "name=run", "data.workers=0", processes=processes
    )
    assert f"goes on from step {stopped_at}" in resumed.stdout
    assert not (folder / "PREEMPTED").exists()
    assert_same_end(folder, untouched(processes))


def test_a_rank_that_dies_is_replaced_by_torchrun(
    tmp_path: Path, digits: Path, untouched: Callable[[int], Path]
) -> None:
    launcher = command("train.py", *full(2), f"data.root={digits}", "name=run", "data.workers=2", processes=2)
    launcher.insert(3, "--max-restarts=1")
    started = subprocess.Popen(
        launcher, cwd=tmp_path, env=environment() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for(tmp_path / "runs/run/checkpoints/step_0000000006.safetensors", started)
    ranks = [int(pid) for pid in Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()]
    os.kill(ranks[1], signal.SIGKILL)
    said = started.communicate(timeout=150)[0]
    assert started.returncode == 0, said
    assert f"train.py: error: rank 1 ({socket.gethostname()}, pid {ranks[1]}) has ended or hangs" in said
    assert "goes on from step" in said
    assert_same_end(tmp_path / "runs/run", untouched(2))


def test_another_number_of_processes_goes_on_with_the_same_images_and_says_so(tmp_path: Path, digits: Path) -> None:
    plain = (
        "experiment=digits",
        f"data.root={digits}",
        "epochs=1",
        "schedule.warmup_epochs=0",
        "log_every=1",
        "save_every=1",
    )
    alone = Launch((*plain, "name=run"), tmp_path / "alone")
    two = Launch((*plain, "name=run"), tmp_path / "changed", processes=2)
    assert two.wait_until((tmp_path / "changed/runs/run/checkpoints/step_0000000005.safetensors").exists)
    two.kill()
    two.wait()
    one = Launch((*plain, "name=run"), tmp_path / "changed")
    assert (one.wait(), alone.wait()) == ([0], [0])
    assert "note: world_size was 2, now 1: goes on, but not with the same bits" in one.output
    losses = [[line["train/loss"] for line in records(tmp_path / name / "runs/run") if "train/loss" in line]
              for name in ("alone", "changed")]  # fmt: skip
    assert len(losses[0]) == len(losses[1]) == LAST_STEP
    assert losses[0] == pytest.approx(losses[1], rel=1e-3), "the same images in every global batch"
