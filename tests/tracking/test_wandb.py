"""Offline runs of Weights & Biases, read back from their files: every value, once, however the run was cut off."""

import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from scripts.faults.launch import Launch
from tests.conftest import Run
from tests.made_run import make_run
from tests.tracking import wandb_files
from tests.tracking.wandb_files import assert_same_rows, history, offline_run
from vip.tracking import Fanout, TrackingConfig
from vip.tracking.jsonl import JsonlTracker, read_lines
from vip.tracking.pictures import decode
from vip.tracking.wandb_run import WandbTracker

OFFLINE = TrackingConfig("wandb", "offline", "vip", group="sweep 3", tags=("digits", "try"), notes="as in the paper")
Lines = list[dict[str, Any]]


@pytest.fixture
def told(tmp_path: Path) -> Lines:
    """All that a run of three epochs with averaged weights tells, by step; one value of it is not finite."""
    folder = make_run(tmp_path / "made", epochs=3, ema=True)
    lines = sorted(
        read_lines(folder / "metrics.jsonl") + read_lines(folder / "views.jsonl"), key=lambda line: line["step"]
    )
    next(line for line in lines if line["step"] == 10)["train/grad_norm"] = float("nan")
    return lines


def trackers(folder: Path, resume_step: int = 0, tracking: TrackingConfig = OFFLINE) -> Fanout:
    folder.mkdir(exist_ok=True)
    config = {"seed": 3, "model": {"name": "vip_tiny"}}
    return Fanout([JsonlTracker(folder, resume_step), WandbTracker(tracking, "x", folder, config, "abcd1234")])


def tell(fanout: Fanout, lines: Sequence[dict[str, Any]]) -> None:
    for line in lines:
        content = {key: value for key, value in line.items() if key != "step"}
        (fanout.show if "view" in line else fanout.log)(line["step"], content)


def table(row: dict[str, Any], key: str, folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((offline_run(folder) / "files" / row[f"{key}/path"]).read_text())
    return content


def test_every_value_and_picture_is_read_back_from_the_run_folder_alone(
    tmp_path: Path, no_account: None, told: Lines
) -> None:
    folder = tmp_path / "run"
    fanout = trackers(folder)
    (folder / "code.diff").write_text("- a\n+ b\n")
    tell(fanout, told)
    fanout.close("done")
    rows = history(folder)
    assert_same_rows(rows, read_lines(folder / "metrics.jsonl"))
    assert rows[2]["train/grad_norm"] == "NaN", "also what is not finite"
    (run,) = wandb_files.records(folder, "run")
    assert (run.project, run.display_name, run.run_id) == ("vip", "x", "abcd1234")
    assert (run.run_group, list(run.tags), run.notes) == ("sweep 3", ["digits", "try"], "as in the paper")
    config = wandb_files.config(folder)
    assert (config["seed"], config["model"], config["world_size"]) == (3, {"name": "vip_tiny"}, 2)
    assert config["environment"]["commit"] == "8f1579e0c1d2"
    assert (offline_run(folder) / "files" / "code.diff").read_text() == "- a\n+ b\n"
    best = [line["val/best_top1"] for line in told if "val/best_top1" in line]
    assert wandb_files.summary(folder)["best_top1"] == best[-1]
    axes = {metric.glob_name: metric.step_metric for metric in wandb_files.records(folder, "metric")}
    assert axes == {"train/*": "images", "val/*": "images", "val_ema/*": "images", "gate/*": "images"}
    stats = {item.key for record in wandb_files.records(folder, "stats") for item in record.item}
    assert "cpu" in stats or "proc.memory.rssMB" in stats, "system metrics"

    files = offline_run(folder) / "files"
    samples = next(line for line in told if line.get("view") == "samples")["images"]
    assert rows[0]["train/samples/captions"] == [
        f"{image['labels'][0][0]} 0.63, {image['labels'][1][0]} 0.37" for image in samples
    ]
    assert [(files / name).read_bytes() for name in rows[0]["train/samples/filenames"]] == [
        decode(image["picture"]) for image in samples
    ]
    waiting = {path.read_bytes() for path in offline_run(folder).glob("artifacts/staging/*")}  # what tables refer to
    views = [line for line in told if line.get("view") == "validation"]
    validated = [row for row in rows if "val_ema/errors/path" in row]
    for row, view in zip(validated, views, strict=True):
        assert row["val_ema/calibration_error"] == view["calibration_error"]
        assert table(row, "val_ema/confusions", folder)["data"] == view["confusions"]
        assert [[num, right] for _, num, right, _ in table(row, "val_ema/classes", folder)["data"]] == view["per_class"]
        errors = table(row, "val_ema/errors", folder)["data"]
        assert [error[1:5] for error in errors] == [
            [error["image"], error["label"], *error["top"][0]] for error in view["errors"]
        ]
        assert [error[0] is not None for error in errors] == [error["picture"] is not None for error in view["errors"]]
        assert {decode(error["picture"]) for error in view["errors"] if error["picture"]} <= waiting
        assert (files / row["gate/blocks/path"]).read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "home").glob(".local/share/wandb/**/*.json")), "which nobody would take along or remove"


def test_a_run_that_goes_on_is_one_clean_run(tmp_path: Path, no_account: None, told: Lines) -> None:
    """It told of steps beyond its checkpoint when it was cut off: those come again, with other figures."""
    folder = tmp_path / "run"
    stale = folder / "wandb" / "offline-run-20200101_000000-abcd1234"
    stale.mkdir(parents=True)  # as a kill leaves one, between a new one and the end of the old
    first = trackers(folder)
    tell(first, told[:10])
    assert told[9]["step"] > 11
    first.close("failed")
    second = trackers(folder, 11)
    again = [line | {"train/loss": 9.0} if "train/loss" in line else line for line in told if line["step"] > 11]
    tell(second, again)
    second.close("done")
    rows = history(folder)
    assert_same_rows(rows, read_lines(folder / "metrics.jsonl"))
    assert [row["train/loss"] for row in rows if row["_step"] > 11 and "train/loss" in row].count(9.0) == 4
    assert "train/samples/captions" in rows[0]
    assert not stale.exists()


def test_a_rollback_leaves_nothing_of_what_it_undoes(tmp_path: Path, no_account: None, told: Lines) -> None:
    folder = tmp_path / "run"
    fanout = trackers(folder)
    tell(fanout, told[:10])
    fanout.rewind(11)
    again = [line | {"train/loss": 9.0} if "train/loss" in line else line for line in told if line["step"] > 11]
    tell(fanout, again)
    fanout.close("done")
    assert_same_rows(history(folder), read_lines(folder / "metrics.jsonl"))


def test_the_best_checkpoint_is_an_artifact_where_that_is_asked_for(tmp_path: Path, no_account: None) -> None:
    asked = TrackingConfig("wandb", "offline", "vip", artifacts=True)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    best = tmp_path / "run" / "checkpoints" / "best.safetensors"
    best.write_bytes(b"weights")
    for status, expected in (("interrupted", []), ("done", ["model"])):
        fanout = trackers(tmp_path / "run", tracking=asked)
        fanout.log(1, {"val/best_top1": 82.5, "val/loss": 1.0})
        fanout.close(status)
        history(tmp_path / "run")
        sent = wandb_files.records(tmp_path / "run", "artifact")
        assert [artifact.type for artifact in sent] == expected
    (artifact,) = sent
    assert (artifact.name, set(artifact.aliases)) == ("x", {"best", "latest"})
    assert json.loads(artifact.metadata) == {"best_top1": 82.5}
    assert [entry.local_path for entry in artifact.manifest.contents] == [str(best)]


ARGUMENTS = (
    "experiment=digits", "epochs=2", "schedule.warmup_epochs=1", "log_every=1", "save_every=4", "data.workers=0", "name=x",
    "tracking=wandb", "tracking.mode=offline",
)  # fmt: skip


def test_a_run_that_was_killed_and_then_stopped_is_one_clean_run(
    digits: Path, tmp_path: Path, no_account: None
) -> None:
    folder = tmp_path / "runs" / "x"
    command = (*ARGUMENTS, f"data.root={digits}")

    def last_step() -> int:
        return max((int(line["step"]) for line in read_lines(folder / "metrics.jsonl")), default=0)

    with Launch(command, tmp_path) as launch:
        assert launch.wait_until(lambda: last_step() >= 6 and any(folder.glob("checkpoints/step_*4.safetensors")))
        launch.kill()
    with Launch(command, tmp_path) as launch:
        assert launch.wait_until(lambda: last_step() >= 9), launch.output
        os.kill(launch.pids[0], signal.SIGTERM)
        launch.wait()
    with Launch(command, tmp_path) as launch:
        assert launch.wait() == [0], launch.output
    assert "wandb: " not in launch.output
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, lines[-1]["step"] + 1))
    assert_same_rows(history(folder), lines)
    assert any("gate/blocks/path" in row for row in history(folder))


def test_a_run_that_ended_before_its_first_checkpoint_keeps_its_id(
    run: Run, digits: Path, tmp_path: Path, no_account: None
) -> None:
    folder, ids = tmp_path / "runs" / "x", []
    for _ in range(2):
        run("train.py", *ARGUMENTS, f"data.root={digits}", "max_steps=1")
        ids.append(offline_run(folder).name.rpartition("-")[2])
        shutil.rmtree(folder / "checkpoints")
    assert ids[0] == ids[1]
