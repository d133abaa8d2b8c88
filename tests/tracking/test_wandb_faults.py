"""Weights & Biases out of reach, without a key, killed or hanging: a warning each, and the run trains as ever."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import wandb

from scripts.faults.blackhole import FAKE_KEY, account, black_hole, refusing_url
from scripts.faults.launch import Launch
from tests.conftest import Run
from tests.tracking.wandb_files import history
from vip import config
from vip.tracking import TrackingConfig, wandb_run
from vip.tracking.jsonl import read_lines
from vip.tracking.wandb_run import WandbTracker

TRAINING = {"epoch": 0.5, "train/loss": 1.25, "train/lr": 1e-3, "train/images_per_s": 640.0, "train/data_wait": 0.03}
VALIDATION = {"epoch": 1.0, "val/top1": 81.48, "val/top5": 95.76, "val/loss": 0.75, "val/best_top1": 82.0}
ONLINE, OFFLINE = TrackingConfig("wandb", "online", "vip"), TrackingConfig("wandb", "offline", "vip")


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
    tracker = WandbTracker(ONLINE, "x", tmp_path, {}, "abcd1234")
    assert time.monotonic() - started < 10
    tracker.log(1, TRAINING)
    tracker.close("interrupted")
    (warning,) = warnings_of(caplog)
    assert warning.startswith("wandb: no API key (set WANDB_API_KEY or run `wandb login`); recording offline")
    assert tracker.run_id == "abcd1234", "the run of the checkpoint goes on"
    assert history(tmp_path)[0]["train/loss"] == 1.25
    assert wandb.run is None
    assert services() == []


@pytest.mark.parametrize("kind", ["black hole", "refused"])
def test_wandb_unreachable_delays_the_start_by_at_most_10_s_and_records_offline(
    kind: str, tmp_path: Path, no_account: None, caplog: pytest.LogCaptureFixture
) -> None:
    with black_hole() as silent_url, account(silent_url if kind == "black hole" else refusing_url()):
        started = time.monotonic()
        tracker = WandbTracker(ONLINE, "x", tmp_path, {}, "abcd1234")
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
    assert history(tmp_path)[0]["train/loss"] == 1.25


def test_a_key_that_cannot_be_one_is_an_offline_run(
    tmp_path: Path, no_account: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    tracker = WandbTracker(ONLINE, "x", tmp_path, {}, None)
    tracker.log(1, TRAINING)
    tracker.close("done")
    (warning,) = warnings_of(caplog)
    assert "API key must have 40+ characters" in warning
    assert history(tmp_path)[0]["train/loss"] == 1.25


def test_what_wandb_does_not_take_is_one_warning_and_no_more_wandb(
    tmp_path: Path, no_account: None, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = WandbTracker(TrackingConfig("wandb", "offline", "a/b:c"), "x", tmp_path, {}, None)
    tracker.log(1, TRAINING)
    tracker.log(2, VALIDATION)
    tracker.close("done")
    (warning,) = warnings_of(caplog)
    assert warning.startswith("wandb: given up (")
    assert "metrics.jsonl is whole" in warning


def test_the_service_killed_in_mid_run_is_one_warning(
    tmp_path: Path, no_account: None, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = WandbTracker(OFFLINE, "x", tmp_path, {}, None)
    tracker.log(1, TRAINING)
    (service,) = services()
    os.kill(service, signal.SIGKILL)
    for step in range(2, 50):
        tracker.log(step, TRAINING)
        time.sleep(0.02)
    tracker.close("done")
    assert [message.startswith("wandb: given up (") for message in warnings_of(caplog)] == [True]
    assert f"replay_tracking.py {tmp_path}` sends it" in warnings_of(caplog)[0]
    assert services() == []
    assert wandb.run is None, "else the next run of the process could not log in"


def test_a_service_that_hangs_delays_neither_the_steps_nor_the_end(
    tmp_path: Path, no_account: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_run, "CLOSE_LIMIT", 2.0)
    tracker = WandbTracker(OFFLINE, "x", tmp_path, {}, None)
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
    assert wandb.run is None


def test_secrets_reach_no_file_of_wandb(tmp_path: Path, no_account: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "runs_dir=s3://me:hunter2@host/x"])
    run = config.parse(
        config.RunConfig, config.compose("train", ["experiment=digits", "runs_dir=s3://me:hunter2@host/x"])
    )
    tracker = WandbTracker(OFFLINE, "x", tmp_path, config.redacted(run), None)
    tracker.log(1, TRAINING)
    tracker.close("done")
    assert history(tmp_path)
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
    assert len(history(tmp_path / "runs" / "x")) >= 2


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
