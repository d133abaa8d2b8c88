"""Faults that a run meets from outside its own code, caused for real: other runs, disks, data, numbers, clocks, signals."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from scripts.faults.launch import Launch
from tests.conftest import ROOT, Run, command, environment, run_launch
from vip import checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("faults")]

SHORT = ("experiment=digits", "epochs=1", "schedule.warmup_epochs=0", "log_every=1", "data.workers=1", "name=run")


def metrics(cwd: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (cwd / "runs/run/metrics.jsonl").read_text().splitlines()]


def the_error(done: subprocess.CompletedProcess[str]) -> str:
    """What a user reads: one line."""
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("train.py: error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0].removeprefix("train.py: error: ")


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A real file system of its own on `folder`."""
    folder.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this machine does not let us mount a file system ({done.stderr.strip()})")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_second_run_in_the_folder_is_refused_and_a_killed_one_is_no_obstacle(
    run: Run, tmp_path: Path, digits: Path
) -> None:
    first = Launch((*SHORT, f"data.root={digits}", "save_every=1", "epochs=99"), tmp_path)
    assert first.wait_until(lambda: bool(list(tmp_path.glob("runs/run/checkpoints/step_*.safetensors"))))
    error = the_error(run("train.py", *SHORT, f"data.root={digits}", "epochs=99", status=2))
    assert error.startswith(
        f"runs/run: in use by another run (host {socket.gethostname()}, pid {first.pids[0]}, since "
    )
    assert first.running
    first.kill()
    first.wait()
    again = Launch((*SHORT, f"data.root={digits}", "save_every=1", "epochs=99"), tmp_path)
    assert again.wait_until(lambda: "goes on from step" in again.output)
    again.stop()


def test_a_folder_that_cannot_be_written_is_found_before_the_first_step(run: Run, tmp_path: Path, digits: Path) -> None:
    with mounted(tmp_path / "runs", "ro"):
        error = the_error(run("train.py", *SHORT, f"data.root={digits}", status=2))
    assert error == "runs/run: cannot be written (Read-only file system); choose another runs_dir=..."


def test_no_room_for_two_checkpoints_is_found_before_the_first_step(run: Run, tmp_path: Path, digits: Path) -> None:
    with mounted(tmp_path / "runs", "size=8m"):
        error = the_error(run("train.py", *SHORT, f"data.root={digits}", status=2))
        assert not (tmp_path / "runs/run/metrics.jsonl").exists()
    assert error.startswith("runs/run: 8.4 MB are free, 11.6 MB are needed (a checkpoint takes 5.8 MB)")


def fill(folder: Path) -> Path:
    """A file that takes all that is left."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(1 << 12)):
            pass
    return filler


def test_a_disk_that_fills_up_costs_checkpoints_but_no_steps(tmp_path: Path, digits: Path) -> None:
    with mounted(tmp_path / "runs", "size=20m"):
        launch = Launch((*SHORT, f"data.root={digits}", "save_every=3"), tmp_path)
        first = tmp_path / "runs/run/checkpoints/step_0000000003.safetensors"
        assert launch.wait_until(first.exists)
        filler = fill(tmp_path / "runs")
        assert launch.wait_until(lambda: "not written" in launch.output)
        assert "not written (No space left on device; it takes 5." in launch.output
        assert checkpoint.read(first).step == 3
        filler.unlink()
        assert launch.wait() == [0], launch.output
        assert [line["step"] for line in metrics(tmp_path) if "train/loss" in line] == list(range(1, 23))
        assert checkpoint.newest(first.parent, pytest.fail).step == 22  # type: ignore[union-attr]


def test_a_last_checkpoint_that_finds_no_room_is_an_error(run: Run, tmp_path: Path, digits: Path) -> None:
    with mounted(tmp_path / "runs", "size=20m"):
        launch = Launch((*SHORT, f"data.root={digits}", "save_every=3"), tmp_path)
        assert launch.wait_until((tmp_path / "runs/run/checkpoints/step_0000000003.safetensors").exists)
        filler = fill(tmp_path / "runs")
        assert launch.wait() == [2], launch.output
        last = checkpoint.newest(tmp_path / "runs/run/checkpoints", pytest.fail)
        assert last is not None
        assert f"the same command, it goes on from step {last.step}" in launch.output.splitlines()[-1]
        filler.unlink()
        assert f"goes on from step {last.step}" in run("train.py", *SHORT, f"data.root={digits}", "save_every=3").stdout


def test_divergence_stops_with_the_cause_and_the_step_can_be_replayed(run: Run, tmp_path: Path, digits: Path) -> None:
    wild = ("optimizer.lr=1e30", "optimizer.weight_decay=0", "max_skipped=3", "micro_batch=32")
    error = the_error(run("train.py", *SHORT, f"data.root={digits}", *wild, status=2))
    assert "not finite in 3 steps in a row, which were left out; lower optimizer.lr=1e+30" in error
    first = min(tmp_path.glob("runs/run/nan_step_*"), key=lambda path: int(path.name.rpartition("_")[2]))
    facts = json.loads((first / "batch_rank_0.json").read_text())
    assert [len(batch["indices"]) for batch in facts["batches"]] == [32, 32]
    replayed = run("scripts/replay_step.py", str(first)).stdout
    assert f"step {facts['step']}" in replayed
    assert f"gradient norm nan, then {facts['grad_norm']}" in replayed
    assert "not finite: the gradients of" in replayed


def damage(root: Path, split: str, number: int) -> list[str]:
    """Truncate, empty and replace images of a tree; their names."""
    images = sorted(root.glob(f"{split}/*/*.png"))[:: len(list(root.glob(f"{split}/*/*.png"))) // number][:number]
    for i, path in enumerate(images):
        content = path.read_bytes()
        path.write_bytes((content[: len(content) // 2], b"", b"<html><body>503</body></html>")[i % 3])
    return [str(path.relative_to(root / split)) for path in images]


def test_a_bad_training_image_is_replaced_and_listed(run: Run, tmp_path: Path, digits: Path) -> None:
    shutil.copytree(digits, tmp_path / "digits")
    (name,) = damage(tmp_path / "digits", "train", 1)
    done = run("train.py", *SHORT, "data.root=digits", "epochs=2", "schedule.warmup_epochs=1")
    (listed,) = [json.loads(line) for line in (tmp_path / "runs/run/bad_images.jsonl").read_text().splitlines()]
    assert listed["name"] == name
    assert "cannot decode" in listed["reason"]
    assert (
        "1 training images cannot be decoded, others took their place; runs/run/bad_images.jsonl names them"
        in done.stdout
    )
    assert sum(line.get("train/bad_images", 0) for line in metrics(tmp_path)) >= 1


def test_too_many_bad_training_images_stop_the_run(run: Run, tmp_path: Path, digits: Path) -> None:
    shutil.copytree(digits, tmp_path / "digits")
    names = damage(tmp_path / "digits", "train", 200)
    error = the_error(run("train.py", *SHORT, "data.root=digits", status=2))
    assert "data.max_bad=0.001:" in error
    assert "1 were allowed; runs/run/bad_images.jsonl names them" in error
    listed = [json.loads(line)["name"] for line in (tmp_path / "runs/run/bad_images.jsonl").read_text().splitlines()]
    assert set(listed) <= set(names)
    assert run("train.py", *SHORT, "data.root=digits", "data.max_bad=0.5").returncode == 0


def test_a_bad_validation_image_is_named_before_the_run_begins(run: Run, tmp_path: Path, digits: Path) -> None:
    shutil.copytree(digits, tmp_path / "digits")
    names = damage(tmp_path / "digits", "val", 2)
    error = the_error(run("train.py", *SHORT, "data.root=digits", status=2))
    assert all(name in error for name in names)
    assert not (tmp_path / "runs/run/metrics.jsonl").exists()


def test_fine_tuning_begins_with_weights_and_another_classifier(
    run: Run, tmp_path: Path, digits: Path, trained: Path
) -> None:
    for split in ("train", "val"):
        for label in "0123":
            shutil.copytree(digits / split / label, tmp_path / "four" / split / label)
    options = (
        "data=folder",
        "data.root=four",
        "data.workers=1",
        f"weights={trained}",
        "max_steps=1",
        "optimizer.lr=1e-30",
    )
    run("train.py", "experiment=digits", *options, "name=run")
    begun = checkpoint.read(checkpoint.find(tmp_path / "runs/run")).state["model"]
    given = checkpoint.read(checkpoint.find(trained)).state["ema"]
    assert [n for n in begun if begun[n].shape != given[n].shape] == ["head.weight", "head.bias"]
    assert all(torch.allclose(begun[n], given[n], atol=1e-4) for n in begun if not n.startswith("head."))


def test_another_network_in_the_folder_is_refused_and_fine_tuning_named(run: Run, tmp_path: Path, digits: Path) -> None:
    run("train.py", *SHORT, f"data.root={digits}", "max_steps=1")
    error = the_error(run("train.py", *SHORT, f"data.root={digits}", "optimizer=lamb", status=2))
    assert "is of another run: optimizer adamw, here lamb" in error
    assert "weights=..." in error


def test_a_clock_that_jumps_changes_nothing(
    tmp_path: Path, digits: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wall clocks are set by people and by NTP: here every look at it is a year off, one way or the other."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        '"""A clock that jumps."""\nimport itertools, time\nnow, years = time.time, itertools.cycle((-3e7, 3e7))\n'
        "time.time = lambda: now() + next(years)\ntime.time_ns = lambda: int(time.time() * 1e9)\n"
    )
    options = (*SHORT, f"data.root={digits}", "save_every=7", "max_steps=20", "keep=9")
    monkeypatch.setenv("PYTHONPATH", str(site))
    jumping = run_launch(command("train.py", *options), tmp_path)
    assert jumping.returncode == 0, jumping.stdout + jumping.stderr
    monkeypatch.delenv("PYTHONPATH")
    run("train.py", *options, "runs_dir=steady")
    names = [
        [path.name for path in sorted((tmp_path / folder / "run/checkpoints").iterdir())]
        for folder in ("runs", "steady")
    ]
    assert names[0] == names[1]
    one, other = (
        checkpoint.read(tmp_path / f / "run/checkpoints" / names[0][-1]).state["model"] for f in ("runs", "steady")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def launched(*arguments: str, cwd: Path, processes: int = 2) -> subprocess.Popen[str]:
    """By the launch script, from elsewhere."""
    return subprocess.Popen(
        [str(ROOT / "scripts/launch.sh"), "train.py", *arguments], cwd=cwd, text=True,
        env=environment() | {"NPROC": str(processes), "PYTHON": sys.executable},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_sigusr1_to_the_launcher_reaches_every_rank(tmp_path: Path, digits: Path) -> None:
    """torchrun itself dies of it unless told to handle it, and would leave the ranks behind."""
    started = launched(*SHORT, f"data.root={digits}", "epochs=99", cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / "runs/run/metrics.jsonl").exists() or not metrics(tmp_path):
        assert started.poll() is None, started.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(started.pid, signal.SIGUSR1)
    said = started.communicate(timeout=60)[0]
    stopped_at = int((tmp_path / "runs/run/PREEMPTED").read_text())
    assert f"saved at step {stopped_at}; the same command goes on" in said
    assert metrics(tmp_path)[-1]["step"] == stopped_at


def test_what_the_user_can_mend_is_said_once_and_not_started_again(tmp_path: Path) -> None:
    started = launched("experiment=digits", "data.root=nowhere", "data=folder", cwd=tmp_path)
    said = started.communicate(timeout=120)[0]
    assert started.returncode == 2
    assert re.fullmatch(r"train.py: error: nowhere/train not found: .*\n", said), said
