"""Trackers: the run's own metrics file, the console on a terminal and in a log, and Weights & Biases without a network."""

import io
import json
import os
import re
import signal
import struct
import sys
import time
from pathlib import Path

import pytest
import wandb
from rich.console import Console
from wandb.proto.wandb_internal_pb2 import Record as WandbRecord  # type: ignore[attr-defined]

from scripts.faults.blackhole import FAKE_KEY, account, black_hole, refusing_url
from scripts.faults.launch import Launch
from tests.conftest import Run
from vip import config
from vip.plan import Plan, make_plan
from vip.tracking import Fanout, wandb_run
from vip.tracking.console import ConsoleTracker
from vip.tracking.jsonl import JsonlTracker, read_lines
from vip.tracking.wandb_run import WandbTracker

TRAINING = {"epoch": 0.5, "train/loss": 1.25, "train/lr": 1e-3, "train/images_per_s": 640.0, "train/data_wait": 0.03}
VALIDATION = {"epoch": 1.0, "val/top1": 81.48, "val/top5": 95.76, "val/loss": 0.75, "val/best_top1": 82.0}


def test_lines_come_back_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path, 0)
    tracker.log(1, {"train/loss": 0.1, "train/grad_norm": float("nan")})
    assert len(path.read_text().splitlines()) == 1, "a line is on its way at once, not at the end"
    tracker.log(2, {"train/loss": float("-inf")})
    tracker.close("done")
    assert read_lines(path) == [
        {"step": 1, "train/loss": 0.1, "train/grad_norm": None},
        {"step": 2, "train/loss": None},
    ]
    assert "NaN" not in path.read_text()


@pytest.mark.parametrize("torn", ["", '{"step": 7, "train/lo', "\n", "\0\0\0"])
def test_going_on_drops_what_lies_beyond_the_checkpoint(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "a": 1.0}) + "\n" for step in (2, 4, 4, 6)) + torn)
    tracker = JsonlTracker(path, 4)
    assert [line["step"] for line in read_lines(path)] == [2, 4, 4]
    tracker.log(5, {"a": 2.0})
    tracker.close("interrupted")
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4, 4, 5]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.fixture
def plan() -> Plan:
    return make_plan(10, None, 1, 45, 3, None)  # 4 steps an epoch, 12 in all


def test_plain_lines_in_a_log_file(plan: Plan) -> None:
    console = Console(record=True, force_terminal=False, width=300, file=io.StringIO())
    tracker = ConsoleTracker(plan, 0, console)
    tracker.log(2, TRAINING)
    tracker.log(4, VALIDATION | {"val_ema/top1": 80.0, "val_ema/top5": 94.0, "val_ema/loss": 0.8})
    tracker.close("done")
    lines = console.export_text().splitlines()
    assert len(lines) == 2
    assert re.match(
        r"step 2/12 +epoch 0.50 +loss 1.25\d* +lr 1.0\d*e-03 +640 images/s +data wait 3% +left \d+:\d\d:\d\d$", lines[0]
    )
    assert lines[1].startswith("epoch 1/3  validation  top-1 81.48 %  top-5 95.76 %  loss 0.7500  ema top-1 80.00 %")
    assert lines[1].endswith("best 82.00 %")
    assert "\x1b" not in "".join(lines)


def test_a_bar_for_each_epoch_on_a_terminal(plan: Plan) -> None:
    console = Console(record=True, force_terminal=True, width=160, file=io.StringIO())
    tracker = ConsoleTracker(plan, 0, console)
    for step in (2, 4):
        tracker.log(step, TRAINING)
    tracker.log(4, VALIDATION)
    tracker.log(6, TRAINING)
    tracker.close("done")
    lines = [line.strip() for line in console.export_text().splitlines() if line.strip()]
    validation = next(i for i, line in enumerate(lines) if line.startswith("epoch 1/3  validation"))
    assert any(line.startswith("epoch 1/3 ") and "4/4" in line and "loss 1.25" in line for line in lines[:validation])
    assert any(line.startswith("epoch 2/3 ") and "2/4" in line for line in lines[validation + 1 :])


def test_the_time_left_counts_from_where_the_run_went_on(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    console = Console(record=True, force_terminal=False, width=300, file=io.StringIO())
    ConsoleTracker(plan, 6, console).log(8, TRAINING)
    assert "left 0:00:20" in console.export_text(), "2 steps took 10 s, 4 are left"


def test_a_fanout_tells_everyone(tmp_path: Path) -> None:
    trackers = [JsonlTracker(tmp_path / f"{name}.jsonl", 0) for name in "ab"]
    fanout = Fanout(trackers)
    fanout.log(1, {"x": 2.0})
    fanout.close("done")
    assert read_lines(tmp_path / "a.jsonl") == read_lines(tmp_path / "b.jsonl") == [{"step": 1, "x": 2.0}]
    assert all(tracker.file.closed for tracker in trackers)


def wandb_records(path: Path) -> list[WandbRecord]:
    """The records of a .wandb file, which is a LevelDB log: 32 KiB blocks of chunks with crc, length and type."""
    data, records, position, started = path.read_bytes(), [], 7, b""
    assert data.startswith(b":W&B")
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # too little left of the block for a header
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        started += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last chunk of one
            records.append(WandbRecord.FromString(started))
            started = b""
    return records


@pytest.fixture
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key in the environment, in the home folder or in wandb's settings."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home"))


def history_of(folder: Path, num_rows: int) -> list[dict[str, float]]:
    """The logged rows, once they are there: wandb's service may write the last of them after `finish` returned."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 30
    while True:
        rows = [
            {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for record in wandb_records(path)
            if record.WhichOneof("record_type") == "history"
        ]
        if len(rows) >= num_rows or time.monotonic() > deadline:
            return rows
        time.sleep(0.2)


def test_an_offline_run_of_wandb_is_really_written(tmp_path: Path, no_account: None) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    tracker = WandbTracker("offline", "vip", "x", folder, {"seed": 3, "model": {"name": "vip_s7"}}, None)
    tracker.log(2, TRAINING)
    tracker.log(4, VALIDATION)
    tracker.close("done")
    history = history_of(folder, 2)
    assert [row["_step"] for row in history] == [2, 4]
    for row, expected in zip(history, (TRAINING, VALIDATION), strict=True):
        assert {key: row[key] for key in expected} == expected
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    run = next(record.run for record in wandb_records(path) if record.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name, run.run_id) == ("vip", "x", tracker.run_id)
    assert json.loads({item.key: item.value_json for item in run.config.update}["seed"]) == 3


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("vip")]


def services(parent: int | str = "self") -> list[int]:
    """The wandb-core processes that a process has started and that still live."""
    children = " ".join(path.read_text() for path in Path(f"/proc/{parent}/task").glob("*/children")).split()
    facts = {int(pid): Path(f"/proc/{pid}/stat").read_text().split()[1:3] for pid in children}
    return [pid for pid, (name, state) in facts.items() if name == "(wandb-core)" and state != "Z"]


def test_online_without_a_key_warns_and_records_offline_at_once(
    tmp_path: Path, no_account: None, caplog: pytest.LogCaptureFixture
) -> None:
    started = time.monotonic()
    tracker = WandbTracker("online", "vip", "x", tmp_path, {}, "abcd1234")
    assert time.monotonic() - started < 10
    tracker.log(1, TRAINING)
    tracker.close("interrupted")
    (warning,) = warnings_of(caplog)
    assert warning.startswith("wandb: no API key (set WANDB_API_KEY or run `wandb login`); recording offline")
    assert tracker.run_id == "abcd1234", "the run of the checkpoint goes on"
    assert history_of(tmp_path, 1)[0]["train/loss"] == 1.25
    assert wandb.run is None
    assert services() == []


@pytest.mark.parametrize("kind", ["black hole", "refused"])
def test_wandb_unreachable_delays_the_start_by_at_most_10_s_and_records_offline(
    kind: str, tmp_path: Path, no_account: None, caplog: pytest.LogCaptureFixture
) -> None:
    with black_hole() as silent_url, account(silent_url if kind == "black hole" else refusing_url()):
        started = time.monotonic()
        tracker = WandbTracker("online", "vip", "x", tmp_path, {}, "abcd1234")
        assert time.monotonic() - started < 10
        tracker.log(1, TRAINING)
        ended = time.monotonic()
        tracker.close("done")
        assert time.monotonic() - ended < 10
    (warning,) = warnings_of(caplog)
    assert re.match(
        r"wandb: no connection \(.+\); recording offline, to be sent by `wandb sync .+/offline-run-\*`$", warning
    )
    assert FAKE_KEY not in warning
    assert not any(FAKE_KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert history_of(tmp_path, 1)[0]["train/loss"] == 1.25


def test_a_key_that_cannot_be_one_is_an_offline_run(
    tmp_path: Path, no_account: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    tracker = WandbTracker("online", "vip", "x", tmp_path, {}, None)
    tracker.log(1, TRAINING)
    tracker.close("done")
    (warning,) = warnings_of(caplog)
    assert "API key must have 40+ characters" in warning
    assert history_of(tmp_path, 1)[0]["train/loss"] == 1.25


def test_what_wandb_does_not_take_is_one_warning_and_no_more_wandb(
    tmp_path: Path, no_account: None, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = WandbTracker("offline", "a/b:c", "x", tmp_path, {}, None)
    tracker.log(1, TRAINING)
    tracker.log(2, VALIDATION)
    tracker.close("done")
    (warning,) = warnings_of(caplog)
    assert warning.startswith("wandb: given up (")
    assert "metrics.jsonl is whole" in warning


def test_the_service_killed_in_mid_run_is_one_warning(
    tmp_path: Path, no_account: None, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = WandbTracker("offline", "vip", "x", tmp_path, {}, None)
    tracker.log(1, TRAINING)
    (service,) = services()
    os.kill(service, signal.SIGKILL)
    for step in range(2, 50):
        tracker.log(step, TRAINING)
        time.sleep(0.02)
    tracker.close("done")
    assert [message.startswith("wandb: given up (") for message in warnings_of(caplog)] == [True]
    assert f"wandb sync {tmp_path}/wandb" in warnings_of(caplog)[0]
    assert services() == []


def test_a_service_that_hangs_delays_neither_the_steps_nor_the_end(
    tmp_path: Path, no_account: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_run, "CLOSE_LIMIT", 2.0)
    tracker = WandbTracker("offline", "vip", "x", tmp_path, {}, None)
    (service,) = services()
    os.kill(service, signal.SIGSTOP)
    started = time.monotonic()
    for step in range(20_000):  # more than the pipe to the service holds
        tracker.log(step, TRAINING)
    print("still")  # goes through wandb where it captures the console
    assert time.monotonic() - started < 5
    tracker.close("done")
    assert time.monotonic() - started < 15
    assert [message.startswith("wandb: given up (no end within 2 s)") for message in warnings_of(caplog)] == [True]
    assert services() == []


def test_secrets_reach_no_file_of_wandb(tmp_path: Path, no_account: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "runs_dir=s3://me:hunter2@host/x"])
    run = config.parse(
        config.RunConfig, config.compose("train", ["experiment=digits", "runs_dir=s3://me:hunter2@host/x"])
    )
    tracker = WandbTracker("offline", "vip", "x", tmp_path, config.redacted(run), None)
    tracker.log(1, TRAINING)
    tracker.close("done")
    assert history_of(tmp_path, 1)
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert any(
        b"s3://<redacted>@host/x" in content.replace(rb"\u003c", b"<").replace(rb"\u003e", b">") for content in files
    )
    assert not any(b"hunter2" in content for content in files)


ARGUMENTS = ("experiment=digits", "epochs=2", "schedule.warmup_epochs=1", "log_every=1", "data.workers=0", "name=x")


def test_a_run_without_wandb_in_reach_trains_as_ever(
    digits: Path, tmp_path: Path, no_account: None, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with black_hole() as url:
        machine = url.removeprefix("http://")
        (tmp_path / "netrc").write_text(f"machine {machine}\n  login user\n  password {FAKE_KEY}\n")
        monkeypatch.setenv("WANDB_BASE_URL", url)
        done = run("train.py", *ARGUMENTS, f"data.root={digits}", "tracking=wandb")
    assert done.stdout.splitlines()[-2].startswith("done: top-1")
    assert done.stderr.startswith("wandb: no connection (")
    assert done.stderr.count("\n") == 1
    records = read_lines(tmp_path / "runs" / "x" / "metrics.jsonl")
    assert [line["step"] for line in records if "train/loss" in line] == list(range(1, records[-1]["step"] + 1))
    assert len(history_of(tmp_path / "runs" / "x", 2)) >= 2


def test_a_run_that_loses_wandbs_service_trains_as_ever(digits: Path, tmp_path: Path, no_account: None) -> None:
    launch = Launch((*ARGUMENTS, f"data.root={digits}", "tracking=wandb", "tracking.mode=offline"), tmp_path)
    metrics = tmp_path / "runs" / "x" / "metrics.jsonl"
    assert launch.wait_until(lambda: len(read_lines(metrics)) > 3), launch.output
    (service,) = services(launch.pids[0])
    os.kill(service, signal.SIGKILL)
    assert launch.wait() == [0], launch.output
    records = read_lines(metrics)
    assert [line["step"] for line in records if "train/loss" in line] == list(range(1, records[-1]["step"] + 1))
    assert "val/top1" in records[-1]
    assert [line.startswith("wandb: given up (") for line in launch.output.splitlines() if "wandb" in line] == [True]
    assert "Traceback" not in launch.output
