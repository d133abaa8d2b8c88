"""Weights & Biases: never the reason that a run fails or waits. Without a key or a network the run is recorded offline.

All of W&B happens in a thread of its own, which is told through a queue: training does not wait for a service that hangs,
and what goes wrong there ends in one warning. metrics.jsonl in the run folder is whole in any case.
"""

import contextlib
import logging
import os
import signal
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import wandb
from wandb.sdk.lib.runid import generate_id

from vip.tracking.base import Record

INIT_TIMEOUT = 6.0  # seconds for the server's answer
START_LIMIT = 9.0  # seconds that the start of a run waits for W&B in all, with the fallback
FINISH_TIMEOUT = 20.0  # seconds for what is not sent yet at the end of a run
CLOSE_LIMIT = 25.0  # seconds that the end of a run waits for W&B in all, before its service is killed
SERVICE = "wandb-core"
log = logging.getLogger(__name__)


class WandbTracker:
    """One W&B run; `run_id` None starts a new one, the id of a checkpoint goes on with the same one.

    Online without a key, or with a server that does not answer within INIT_TIMEOUT seconds, falls back to an offline run
    (`wandb sync` sends it later) with a warning. `config` is shown to everyone who can see the run: no secrets in it.
    """

    def __init__(
        self,
        mode: Literal["online", "offline"],
        project: str,
        name: str,
        folder: Path,
        config: dict[str, Any],
        run_id: str | None,
    ) -> None:
        self.run_id = run_id or generate_id()
        self.folder = folder / "wandb"
        self.options: dict[str, Any] = {
            "project": project, "name": name, "dir": folder, "config": config, "id": self.run_id,
        }  # fmt: skip
        self.queue: SimpleQueue[tuple[int, Record] | int] = SimpleQueue()  # rows with their step, at last the exit code
        self.started = threading.Event()
        self.warned = False
        self.thread = threading.Thread(target=self._serve, args=(mode,), name="wandb", daemon=True)
        self.thread.start()
        self.started.wait(START_LIMIT)

    def log(self, step: int, record: Record) -> None:
        if self.thread.is_alive():
            self.queue.put((step, dict(record)))

    def rewind(self, step: int) -> None:
        """W&B cannot take back what it was told: it keeps the first row of a step, metrics.jsonl the last."""

    def close(self, status: str) -> None:
        self.queue.put(0 if status == "done" else 1)
        self.thread.join(CLOSE_LIMIT)
        if self.thread.is_alive():
            self._warn(f"no end within {CLOSE_LIMIT:g} s")
            _kill_service()  # which wakes the thread, and the exit of the program, if it waits for it
            self.thread.join(CLOSE_LIMIT)

    def _serve(self, mode: Literal["online", "offline"]) -> None:
        try:
            run = self._start(mode)
            self.started.set()
            while not isinstance(told := self.queue.get(), int):
                step, record = told
                run.log(dict(record), step=step)
                if "val/best_top1" in record:
                    run.summary["best_top1"] = record["val/best_top1"]
            run.finish(exit_code=told)
        except Exception as error:  # whatever it is, it is W&B's
            self._warn(_first_line(error))
        finally:
            self.started.set()
            _end_session()

    def _start(self, mode: Literal["online", "offline"]) -> wandb.Run:
        # Else its service tries to reach W&B's error collectors when it ends, even offline: 10 to 20 s without a network.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        # What is printed would go through the service too, and wait for it; arguments and git remotes may hold secrets.
        settings = wandb.Settings(
            mode=mode,
            silent=True,
            console="off",
            disable_git=True,
            x_disable_meta=True,
            init_timeout=INIT_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT,
            finish_timeout_raises=True,
        )
        wandb.setup(settings)
        if mode == "online":
            try:
                if wandb.login(prompt=False, verify=False):
                    return wandb.init(resume="allow", settings=settings, **self.options)
                reason = "no API key (set WANDB_API_KEY or run `wandb login`)"
            except (wandb.Error, OSError, ValueError) as error:
                reason = f"no connection ({_first_line(error)})"
            log.warning(
                "wandb: %s; recording offline, to be sent by `wandb sync %s/offline-run-*`", reason, self.folder
            )
            _end_session()  # its service holds the run's id
            settings.mode = "offline"
            wandb.setup(settings)
        return wandb.init(mode="offline", settings=settings, **self.options)

    def _warn(self, reason: str) -> None:
        if not self.warned:
            self.warned = True
            log.warning(
                "wandb: given up (%s); training goes on, metrics.jsonl is whole; `wandb sync %s/*run-*` sends what is there",
                reason, self.folder,
            )  # fmt: skip


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _end_session() -> None:
    with contextlib.suppress(Exception, SystemExit):  # a service that was killed is said so by an exit
        wandb.teardown()


def _kill_service() -> None:
    """Kill the service that wandb started for this process; it would be waited for when the program ends."""
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            if (Path("/proc") / pid / "comm").read_text().strip() == SERVICE:
                os.kill(int(pid), signal.SIGKILL)
