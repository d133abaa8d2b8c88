"""TensorBoard's event files, read back with its own reader."""

import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import Run
from tests.made_run import make_run
from vip.tracking import Fanout
from vip.tracking.jsonl import JsonlTracker, read_lines
from vip.tracking.tensorboard import TensorBoardTracker

ALL = {"scalars": 0, "images": 0, "tensors": 0}
Lines = list[dict[str, Any]]


@pytest.fixture
def told(tmp_path: Path) -> Lines:
    """All that a run of three epochs tells, by step; one value of it is not finite."""
    folder = make_run(tmp_path / "made", epochs=3)
    lines = sorted(
        read_lines(folder / "metrics.jsonl") + read_lines(folder / "views.jsonl"), key=lambda line: line["step"]
    )
    next(line for line in lines if line["step"] == 10)["train/grad_norm"] = float("nan")
    return lines


def trackers(folder: Path, resume_step: int = 0) -> Fanout:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("seed: 3\n")
    return Fanout([JsonlTracker(folder, resume_step), TensorBoardTracker(folder, resume_step)])


def tell(fanout: Fanout, lines: Lines) -> None:
    for line in lines:
        content = {key: value for key, value in line.items() if key != "step"}
        (fanout.show if "view" in line else fanout.log)(line["step"], content)


def reader(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance=ALL)
    events.Reload()
    return events


def assert_same_scalars(events: EventAccumulator, folder: Path) -> None:
    """Every value of metrics.jsonl, as the 32 bits that TensorBoard keeps of it, at its step, once."""
    lines = read_lines(folder / "metrics.jsonl")
    keys = {key for line in lines for key in line} - {"step"}
    assert keys == {tag for tag in events.Tags()["scalars"] if not tag.endswith("calibration_error")}
    for key in keys:
        expected = [(line["step"], np.nan if line[key] is None else line[key]) for line in lines if key in line]
        found = [(event.step, event.value) for event in events.Scalars(key)]
        np.testing.assert_array_equal(np.array(found, np.float32), np.array(expected, np.float32), key)


def test_every_value_and_view_is_read_back(tmp_path: Path, told: Lines) -> None:
    folder = tmp_path / "run"
    fanout = trackers(folder)
    tell(fanout, told)
    events = reader(folder)  # before the end: what is told is on the disk
    fanout.close("done")
    assert_same_scalars(events, folder)
    validated = [(line["step"], line["calibration_error"]) for line in told if line.get("view") == "validation"]
    found = [(event.step, round(event.value, 6)) for event in events.Scalars("val/calibration_error")]
    assert found == validated
    assert [event.step for event in events.Images("train/samples")] == [0]
    for tag in ("val/errors", "gate/blocks"):
        assert [event.step for event in events.Images(tag)] == [step for step, _ in validated]
    assert events.Images("gate/blocks")[0].encoded_image_string.startswith(b"\x89PNG")
    assert events.Tensors("config")[0].tensor_proto.string_val == [b"    seed: 3\n"]
    label, predicted, num = told[-1]["confusions"][0]
    assert (
        f"| {label} | {predicted} | {num} |".encode() in events.Tensors("val/confusions")[-1].tensor_proto.string_val[0]
    )


def test_a_run_that_goes_on_is_one_clean_run_also_for_who_watches(tmp_path: Path, told: Lines) -> None:
    folder = tmp_path / "run"
    tell(trackers(folder), told[:10])  # and is killed
    watching = reader(folder)
    assert max(event.step for event in watching.Scalars("train/loss")) > 11
    second = trackers(folder, 11)
    tell(second, [line | {"train/loss": 9.0} if "train/loss" in line else line for line in told if line["step"] > 11])
    second.close("done")
    assert [path.stat().st_size > 0 for path in sorted((folder / "tensorboard").iterdir())] == [False, True]
    watching.Reload()
    for events in (watching, reader(folder)):
        assert_same_scalars(events, folder)
        assert [event.value for event in events.Scalars("train/loss")].count(9.0) == 4
    trackers(folder, 33).close("done")
    assert len(list((folder / "tensorboard").iterdir())) == 2, "what was emptied goes at the next start"


def test_a_rollback_leaves_nothing_of_what_it_undoes(tmp_path: Path, told: Lines) -> None:
    folder = tmp_path / "run"
    fanout = trackers(folder)
    tell(fanout, told[:10])
    fanout.rewind(11)
    tell(fanout, [line | {"train/loss": 9.0} if "train/loss" in line else line for line in told if line["step"] > 11])
    fanout.close("done")
    assert_same_scalars(reader(folder), folder)


def test_a_full_disk_is_one_warning_and_whole_files(
    tmp_path: Path, told: Lines, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    fanout = trackers(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    tell(fanout, told[:6])
    (path,) = (folder / "tensorboard").iterdir()
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 50, limits[1]))  # no file may grow beyond
    try:
        for tracker in fanout.trackers[1:]:
            tell(Fanout([tracker]), told[6:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    fanout.close("done")
    (warning,) = [record.getMessage() for record in caplog.records if record.name.startswith("vip")]
    assert warning.startswith("tensorboard: given up (")
    assert f"replay_tracking.py --to tensorboard {folder}` writes the files anew" in warning
    assert_same_scalars(reader(folder), folder)


def test_without_the_package_the_run_says_so_at_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(
        ValueError, match="tracking=tensorboard needs a package that is missing; `pip install tensorboard`"
    ):
        TensorBoardTracker(tmp_path, 0)


def test_a_run_writes_them(digits: Path, tmp_path: Path, run: Run) -> None:
    run(
        "train.py", "experiment=digits", f"data.root={digits}", "data.workers=0", "max_steps=3", "log_every=1", "name=x",
        "tracking=tensorboard",
    )  # fmt: skip
    folder = tmp_path / "runs" / "x"
    events = reader(folder)
    assert_same_scalars(events, folder)
    assert {"train/samples", "val/errors"} <= set(events.Tags()["images"])
