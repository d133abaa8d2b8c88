"""Runs that have ended, or were cut off, sent to W&B and TensorBoard from what their folders hold."""

import os
import re
from pathlib import Path

import pytest
import yaml

from scripts.faults.blackhole import FAKE_KEY
from tests.conftest import Run
from tests.made_run import make_run
from tests.tracking import wandb_files
from tests.tracking.fake_server import fake_server
from tests.tracking.test_tensorboard import assert_same_scalars, reader
from tests.tracking.wandb_files import assert_same_rows, history, offline_run
from vip import checkpoint, preflight
from vip.tracking.jsonl import read_lines

SCRIPT = "scripts/replay_tracking.py"


def test_a_cut_off_run_goes_to_an_offline_run_twice_the_same(tmp_path: Path, no_account: None, run: Run) -> None:
    folder = make_run(tmp_path / "x", epochs=5, done=3)
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    settings["tracking"] = {"kind": "local", "mode": "online", "project": "own", "tags": ["a"], "api_key": "hunter2"}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "train/lo')  # as a kill leaves it
    said = run(SCRIPT, str(folder), "--offline").stdout
    assert_same_rows(history(folder), read_lines(folder / "metrics.jsonl"))
    (sent,) = wandb_files.records(folder, "run")
    assert (sent.project, sent.display_name, list(sent.tags)) == ("own", "x", ["a"])
    assert "hunter2" not in str(wandb_files.config(folder))
    assert wandb_files.config(folder)["optimizer"]["lr"] == settings["optimizer"]["lr"]
    assert wandb_files.records(folder, "exit")[0].exit_code == 1, "it has not reached its end"
    assert re.match(
        rf"{folder}: 9 rows and 5 views up to step 33 -> `wandb sync {folder}/wandb/offline-run-\*-{sent.run_id}`\n$",
        said,
    )
    first = offline_run(folder)
    run(SCRIPT, str(folder), "--offline", "--project", "other")
    (again,) = wandb_files.records(folder, "run")
    assert (again.run_id, again.project) == (sent.run_id, "other")
    assert offline_run(folder) != first


def test_the_run_of_the_checkpoint_gets_what_it_lacks(
    tmp_path: Path, no_account: None, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [make_run(tmp_path / name, epochs=2) for name in ("x", "y")]
    for folder, run_id in zip(folders, ("abcd1234", "efgh5678"), strict=True):
        state = {"step": 22, "progress": {"step": 22, "tracking": {"wandb": run_id}}}
        checkpoint.write(folder / "checkpoints" / checkpoint.STEP_FILE.format(22), state)
    with fake_server() as server:
        machine = server.url.removeprefix("http://")
        (tmp_path / "netrc").write_text(f"machine {machine}\n  login user\n  password {FAKE_KEY}\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        done = run(SCRIPT, *map(str, folders))
        assert done.stdout.splitlines()[1].endswith("-> W&B run efgh5678 in vision-permutator")
        for folder, run_id in zip(folders, ("abcd1234", "efgh5678"), strict=True):
            assert_same_rows(server.runs[run_id].history, read_lines(folder / "metrics.jsonl"))
            assert server.runs[run_id].exit_code == 0


def test_event_files_are_replaced(tmp_path: Path, run: Run) -> None:
    folder = make_run(tmp_path / "x", epochs=3)
    run(SCRIPT, str(folder), "--to", "tensorboard")
    (first,) = (folder / "tensorboard").iterdir()
    said = run(SCRIPT, str(folder), "--to", "tensorboard").stdout
    assert said == f"{folder}: 9 rows and 5 views up to step 33 -> {folder}/tensorboard\n"
    assert first.stat().st_size == 0
    assert_same_scalars(reader(folder), folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no metrics.jsonl in it; give the folder of a run"),
        ("", "metrics.jsonl holds no line; there is nothing to send"),
    ],
)
def test_what_is_no_run_is_one_line(tmp_path: Path, run: Run, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    done = run(SCRIPT, str(tmp_path), status=2)
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_run_that_still_trains_is_left_alone(tmp_path: Path, run: Run) -> None:
    folder = make_run(tmp_path / "x", epochs=1)
    pid = os.fork()  # a lock keeps out other processes, not the one that holds it
    if pid == 0:
        with preflight.locked(folder, print):
            os.kill(os.getpid(), 19)
        os._exit(0)
    try:
        os.waitpid(pid, os.WUNTRACED)
        assert "in use by another run" in run(SCRIPT, str(folder), status=2).stderr
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
