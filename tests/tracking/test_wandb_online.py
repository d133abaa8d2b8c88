"""Weights & Biases online, against a server on this machine that keeps rows by their offsets as W&B's does."""

import multiprocessing
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.faults.blackhole import account
from tests.tracking.fake_server import FakeServer, ServerRun, fake_server
from tests.tracking.wandb_files import assert_same_rows
from vip.tracking import Fanout, TrackingConfig
from vip.tracking.jsonl import JsonlTracker, read_lines
from vip.tracking.wandb_run import WandbTracker

ONLINE = TrackingConfig("wandb", "online", "vip", tags=("a",))
START = {"view": "start", "classes": ["a", "b"], "environment": {"commit": "8f1579e"}}


@pytest.fixture
def server(no_account: None) -> Iterator[FakeServer]:
    with fake_server() as server, account(server.url):
        yield server


def part(folder: Path, start: int, end: int, status: str, *, add: float = 0.0, mode: str = "online") -> WandbTracker:
    """A process of a run: from its checkpoint at step `start` to step `end`; `add` tells its figures from others'."""
    folder.mkdir(exist_ok=True)
    tracking = ONLINE if mode == "online" else TrackingConfig("wandb", "offline", "vip")
    jsonl, tracker = JsonlTracker(folder, start), WandbTracker(tracking, "x", folder, {"seed": 1}, "abcd1234")
    fanout = Fanout([jsonl, tracker])
    fanout.show(start, START)
    for step in range(start + 1, end + 1):
        fanout.log(step, {"epoch": step / 4, "images": step * 8, "train/loss": 1 / (step + 1) + add})
        if step % 4 == 0:
            fanout.log(
                step, {"epoch": step / 4, "images": step * 8, "val/loss": 2.0 + add, "val/best_top1": float(step)}
            )
    fanout.close(status)
    assert tracker.mode == mode
    assert not tracker.warned
    return tracker


def assert_whole(run: ServerRun, folder: Path) -> None:
    assert_same_rows(run.history, read_lines(folder / "metrics.jsonl"))


def test_a_finished_run_is_on_the_server(server: FakeServer, tmp_path: Path) -> None:
    part(tmp_path / "x", 0, 10, "done")
    run = server.runs["abcd1234"]
    assert_whole(run, tmp_path / "x")
    assert (run.display_name, run.exit_code, run.summary["best_top1"]) == ("x", 0, 8.0)
    assert run.config["environment"]["value"] == {"commit": "8f1579e"}


@pytest.mark.parametrize("stop", [6, 8])
def test_a_run_that_was_stopped_goes_on_without_a_rewind(server: FakeServer, tmp_path: Path, stop: int) -> None:
    """At the end of an epoch it is saved before it validates, and more is told of a step that W&B heard of."""
    folder = tmp_path / "x"
    jsonl, tracker = JsonlTracker(*_made(folder)), WandbTracker(ONLINE, "x", folder, {}, "abcd1234")
    first = Fanout([jsonl, tracker])
    for step in range(1, stop + 1):
        first.log(step, {"train/loss": 1 / step})
    first.close("interrupted")
    second = Fanout([JsonlTracker(folder, stop), WandbTracker(ONLINE, "x", folder, {}, "abcd1234")])
    second.log(stop, {"val/loss": 2.0})
    second.log(stop + 1, {"train/loss": 0.1})
    second.close("done")
    assert_whole(server.runs["abcd1234"], folder)
    assert server.runs["abcd1234"].rewinds == []


def test_steps_that_are_done_again_overwrite(server: FakeServer, tmp_path: Path) -> None:
    part(tmp_path / "x", 0, 11, "failed")
    part(tmp_path / "x", 6, 14, "done", add=5.0)
    run = server.runs["abcd1234"]
    assert run.rewinds == [6]
    assert_whole(run, tmp_path / "x")
    assert run.summary["best_top1"] == 12.0


def _tell_until_killed(url: str, home: str, folder: Path) -> None:
    os.environ["HOME"] = os.environ["WANDB_CONFIG_DIR"] = home
    os.environ["WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL"] = "0.5"  # seconds, else 15
    with account(url):
        fanout = Fanout([JsonlTracker(folder, 0), WandbTracker(ONLINE, "x", folder, {}, "abcd1234")])
        for step in range(1, 10):
            fanout.log(step, {"epoch": step / 4, "images": step * 8, "train/loss": 1 / (step + 1)})
        time.sleep(120)


def test_a_run_that_was_killed_goes_on_as_one_clean_run(server: FakeServer, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    context = multiprocessing.get_context("forkserver")
    killed = context.Process(target=_tell_until_killed, args=(server.url, str(tmp_path / "home"), folder), daemon=True)
    killed.start()
    deadline = time.monotonic() + 60
    while not (server.runs and len(server.runs["abcd1234"].lines) >= 8) and time.monotonic() < deadline:
        time.sleep(0.1)
    killed.kill()
    killed.join()
    assert [row["_step"] for row in server.runs["abcd1234"].history] == list(range(1, 9)), "all but the one under way"
    part(folder, 6, 14, "done")
    assert server.runs["abcd1234"].rewinds == [6]
    assert_whole(server.runs["abcd1234"], folder)


def test_a_rollback_is_a_rewind(server: FakeServer, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    fanout = Fanout([JsonlTracker(*_made(folder)), WandbTracker(ONLINE, "x", folder, {}, "abcd1234")])
    for step in range(1, 9):
        fanout.log(step, {"train/loss": 1 / step})
    fanout.rewind(4)
    for step in range(5, 9):
        fanout.log(step, {"train/loss": 7.0})
    fanout.close("done")
    assert_whole(server.runs["abcd1234"], folder)
    assert server.runs["abcd1234"].rewinds == [4]


def test_a_server_that_does_not_rewind_keeps_the_first_row_of_a_step(
    server: FakeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.refuses_rewinds = True
    part(tmp_path / "x", 0, 10, "failed")
    part(tmp_path / "x", 6, 14, "done")
    assert_whole(server.runs["abcd1234"], tmp_path / "x")
    (warning,) = [record.getMessage() for record in caplog.records if record.name.startswith("vip")]
    assert re.match(r"wandb: run abcd1234 not rewound to step 6 \(.*not enabled.*\); it keeps the first row", warning)


def test_what_was_recorded_offline_is_sent_when_the_run_goes_on_online(server: FakeServer, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    part(folder, 0, 4, "interrupted")
    part(folder, 4, 8, "interrupted", mode="offline")
    assert list(folder.glob("wandb/offline-run-*"))
    part(folder, 8, 12, "done")
    assert_whole(server.runs["abcd1234"], folder)
    assert not list(folder.glob("wandb/offline-run-*")), "sent later, it would put the run back"


def test_the_best_checkpoint_is_sent(server: FakeServer, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "best.safetensors").write_bytes(b"weights")
    asked = TrackingConfig("wandb", "online", "vip", artifacts=True)
    tracker = WandbTracker(asked, "x", folder, {}, "abcd1234")
    tracker.log(1, {"train/loss": 1.0})
    tracker.close("done")
    assert not tracker.warned
    assert server.num_artifacts == 1


def _made(folder: Path) -> tuple[Path, int]:
    folder.mkdir()
    return folder, 0
