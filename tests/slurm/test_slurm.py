"""scripts/slurm/train.sbatch and sweeps, on a cluster that is real but for its hardware."""

import re
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.slurm.cluster import Cluster
from tests.slurm.drill import CAUSES, OVERRIDES, SAVE_EVERY, Run, drill

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("slurm")]


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An interpreter, for train.sbatch, whose ranks run the shell script beside it instead of Python."""
    interpreter, ranks = tmp_path / "python", tmp_path / "ranks"
    interpreter.write_text(f'#!/bin/sh\n[ "$RANK" ] || exec {sys.executable} "$@"\nexec sh {ranks}\n')
    interpreter.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(interpreter))
    monkeypatch.setenv("MAX_RESTARTS", "0")
    monkeypatch.setenv("MAX_FUTILE", "2")
    return ranks


@pytest.mark.timeout(1200)
def test_a_run_ends_with_the_bits_of_an_undisturbed_one_whatever_the_cluster_does(
    cluster: Cluster, tmp_path: Path, digits: Path
) -> None:
    """The other causes take longer: python -m tests.slurm.drill."""
    report = drill(cluster, tmp_path, digits, ["killed_worker", "requeue", "preemption", "time_limit", "killed_node"])
    assert report.state == "COMPLETED", report.said
    assert report.said.endswith("DONE: runs/run\n")
    assert report.differing == [], "two nodes, interrupted, against one node"
    assert not (tmp_path / "nodes/runs/run/.slurm").exists()
    for name, cost in report.costs.items():
        most = 0 if CAUSES[name].warns else SAVE_EVERY * 3 // 2 + 2  # what had been made when it came, and while it did
        assert cost.steps_lost <= most, f"{name}: {report.said}"


@pytest.mark.timeout(600)
def test_an_error_of_the_users_is_said_once_and_not_queued_again(
    cluster: Cluster, tmp_path: Path, digits: Path
) -> None:
    overrides = [*OVERRIDES, f"data.root={digits}"]
    odd = Run(cluster, tmp_path, *overrides, "batch_size=63", options=("--nodes=2", "--nodelist=n2,n3"))
    wrong = Run(cluster, tmp_path, *overrides, "epoch=3", options=("--nodelist=n1",))
    assert (odd.end(), wrong.end()) == ("FAILED", "FAILED")
    assert (odd.field("ExitCode"), wrong.field("ExitCode")) == ("2:0", "2:0")
    assert (odd.field("Restarts"), wrong.field("Restarts")) == ("0", "0")
    (error,) = re.findall(r"^.*error: (batch_size.*)$", odd.said, re.MULTILINE)
    assert error == (
        "batch_size=63: does not divide over 2 processes; batch_size=62, 64 would, or this batch on 1, 3, 7, 9, 21, 63 processes"
    )
    assert wrong.said.splitlines()[-1].startswith("train.py: error: epoch=3: no such key; nearest: epochs")


def test_a_job_that_gets_nowhere_is_queued_again_a_few_times_only(
    cluster: Cluster, tmp_path: Path, python: Path
) -> None:
    python.write_text("echo rank $RANK of $WORLD_SIZE\nexit 1\n")
    run = Run(cluster, tmp_path, *OVERRIDES, options=("--nodelist=n3",))
    assert run.end() == "FAILED"
    assert run.field("Restarts") == "1"
    assert run.said.endswith("no new checkpoint in 2 starts in a row, giving up; the reason is above\n")
    assert sorted(re.findall(r"rank \d of \d", run.said)) == ["rank 0 of 2"] * 2 + ["rank 1 of 2"] * 2, "all GPUs of n3"


def test_a_cancelled_job_is_not_queued_again(cluster: Cluster, tmp_path: Path, python: Path) -> None:
    python.write_text("echo here\nexec sleep 60\n")
    run = Run(cluster, tmp_path, *OVERRIDES, options=("--nodelist=n1",))
    run.wait_for(lambda: "here" in run.said, "rank")
    cluster.run("scancel", run.job)
    assert run.end() == "CANCELLED"
    assert run.field("Restarts") == "0"
    assert run.said.endswith("ended with status 143: cancelled, or queued again already\n")


@pytest.mark.timeout(600)
def test_a_sweep_is_a_job_for_each_value(cluster: Cluster, tmp_path: Path, digits: Path) -> None:
    pytest.importorskip("submitit", reason="uv pip install 'vision-permutator[slurm]'")
    launcher = ("hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=60", "hydra.launcher.gpus_per_node=1")
    short = ("experiment=digits", f"data.root={digits}", "max_steps=3", "schedule.warmup_epochs=0", "name=sweep")
    train = ("env", "OMP_NUM_THREADS=1", sys.executable, ROOT / "train.py", "-m")
    cluster.run(*train, *launcher, *short, "seed=1,2", cwd=tmp_path, timeout=500)
    for seed in (1, 2):
        (folder,) = (tmp_path / "runs").glob(f"sweep-seed={seed}")
        assert (folder / "checkpoints/step_0000000003.safetensors").exists()
    nodes = [re.search(r"hostname=(\w+)", log.read_text()) for log in tmp_path.glob("runs/.submitit/*/*_log.out")]
    assert {node[1] for node in nodes if node} == {"n1", "n2"}
