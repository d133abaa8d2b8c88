"""The run's own files, metrics.jsonl and views.jsonl, and several trackers as one."""

import json
from pathlib import Path

import pytest

from vip.tracking import Fanout
from vip.tracking.jsonl import JsonlTracker, read_lines
from vip.tracking.truth import read_truth

METRICS, VIEWS = "metrics.jsonl", "views.jsonl"


def test_lines_come_back_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path, 0)
    tracker.log(1, {"train/loss": 0.1, "train/grad_norm": float("nan")})
    tracker.show(1, {"view": "start", "world_size": 2})
    assert len((tmp_path / METRICS).read_text().splitlines()) == 1, "a line is on its way at once, not at the end"
    tracker.log(2, {"train/loss": float("-inf")})
    tracker.close("done")
    assert read_lines(tmp_path / METRICS) == [
        {"step": 1, "train/loss": 0.1, "train/grad_norm": None},
        {"step": 2, "train/loss": None},
    ]
    assert read_lines(tmp_path / VIEWS) == [{"step": 1, "view": "start", "world_size": 2}]
    assert "NaN" not in (tmp_path / METRICS).read_text()


@pytest.mark.parametrize("torn", ["", '{"step": 7, "train/lo', "\n", "\0\0\0"])
@pytest.mark.parametrize("name", [METRICS, VIEWS])
def test_going_on_drops_what_lies_beyond_the_checkpoint(tmp_path: Path, name: str, torn: str) -> None:
    path = tmp_path / name
    path.write_text("".join(json.dumps({"step": step, "a": 1.0}) + "\n" for step in (2, 4, 4, 6)) + torn)
    tracker = JsonlTracker(tmp_path, 4)
    assert [line["step"] for line in read_lines(path)] == [2, 4, 4]
    (tracker.log if name == METRICS else tracker.show)(5, {"a": 2.0})
    tracker.close("interrupted")
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4, 4, 5]
    assert sorted(file.name for file in tmp_path.iterdir()) == [METRICS, VIEWS]


def test_a_rollback_drops_what_did_not_happen(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path, 0)
    for step in (1, 2, 3):
        tracker.log(step, {"a": 1.0})
        tracker.show(step, {"view": "validation"})
    tracker.rewind(1)
    tracker.log(2, {"a": 2.0})
    tracker.close("done")
    assert [(line["step"], line["a"]) for line in read_lines(tmp_path / METRICS)] == [(1, 1.0), (2, 2.0)]
    assert [line["step"] for line in read_lines(tmp_path / VIEWS)] == [1]


def test_a_run_is_told_again_by_step_with_records_before_views(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path, 0)
    tracker.show(0, {"view": "start"})
    tracker.log(2, {"a": 1.0, "b": float("nan")})
    tracker.show(2, {"view": "validation"})
    tracker.log(3, {"a": 2.0})
    tracker.close("failed")
    truth = read_truth(tmp_path)
    assert [(step, told.get("view") or told["a"]) for step, told in truth] == [
        (0, "start"), (2, 1.0), (2, "validation"), (3, 2.0),
    ]  # fmt: skip
    assert truth[1][1]["b"] != truth[1][1]["b"], "null is NaN again"
    assert [step for step, _ in read_truth(tmp_path, 2)] == [0, 2, 2]


def test_a_fanout_tells_everyone(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    trackers = [JsonlTracker(tmp_path / name, 0) for name in "ab"]
    fanout = Fanout(trackers)
    fanout.log(1, {"x": 2.0})
    fanout.show(1, {"view": "start"})
    fanout.log(2, {"x": 3.0})
    fanout.rewind(1)
    fanout.close("done")
    for name in "ab":
        assert read_lines(tmp_path / name / METRICS) == [{"step": 1, "x": 2.0}]
        assert read_lines(tmp_path / name / VIEWS) == [{"step": 1, "view": "start"}]
    assert all(tracker.metrics.file.closed and tracker.views.file.closed for tracker in trackers)
