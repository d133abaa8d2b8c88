"""Weights & Biases: never the reason that a run fails or waits. Without a key or a network the run is recorded offline.

All of W&B happens in a thread of its own, which is told through a queue: training does not wait for a service that hangs,
and what goes wrong there ends in one warning. metrics.jsonl and views.jsonl in the run folder are the truth in any case, and
every start tells W&B what it lacks of them:

    offline   the whole run is written anew under the same id, and the offline folders before it are removed. So there is one
              folder, which holds every step once, wherever the run was cut off.
    online    rows after the last one that the server has are sent. Where it has steps that will be done again, the run is
              rewound there; a server that refuses keeps the first row of a step, which has the same figures.
"""

import contextlib
import logging
import os
import re
import shutil
import signal
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import wandb
from wandb.sdk.lib.module import unset_globals
from wandb.sdk.lib.runid import generate_id

from vip.tracking.base import Record, TrackingConfig, View
from vip.tracking.truth import Told, last_validation, read_truth
from vip.tracking.wandb_rows import Rows

INIT_TIMEOUT = 6.0  # seconds for the server's answer
START_LIMIT = 9.0  # seconds that the start of a run waits for W&B in all, with the fallback
FINISH_TIMEOUT = 20.0  # seconds for what is not sent yet at the end of a run
CLOSE_LIMIT = 25.0  # seconds without progress that the end of a run waits for W&B, before its service is killed
ARTIFACT_LIMIT = 600.0  # seconds more where a checkpoint is sent, which was asked for
SERVICE = "wandb-core"
log = logging.getLogger(__name__)


class WandbTracker:
    """One W&B run; `run_id` None starts a new one, the id of a checkpoint goes on with the same one.

    It begins with what `folder`, the run's own, already holds. Online without a key, or with a server that does not answer
    within INIT_TIMEOUT seconds, falls back to an offline run (`wandb sync` sends it later) with a warning. `config` is shown
    to everyone who can see the run: no secrets in it.
    """

    def __init__(
        self, tracking: TrackingConfig, name: str, folder: Path, config: dict[str, Any], run_id: str | None
    ) -> None:
        self.run_id = run_id or generate_id()
        self.tracking = tracking
        self.mode = tracking.mode
        self.name = name
        self.folder = folder
        self.options: dict[str, Any] = {
            "project": tracking.project, "group": tracking.group, "tags": tracking.tags, "notes": tracking.notes,
            "name": name, "dir": folder, "config": config, "id": self.run_id,
        }  # fmt: skip
        self.queue: SimpleQueue[Any] = SimpleQueue()  # the run so far, what is told of a step, at last how it ends
        self.queue.put(read_truth(folder))
        self.started = threading.Event()
        self.num_taken = 0
        self.warned = False
        self.thread = threading.Thread(target=self._serve, name="wandb", daemon=True)
        self.thread.start()
        self.started.wait(START_LIMIT)

    def log(self, step: int, record: Record) -> None:
        self._tell((step, dict(record)))

    def show(self, step: int, view: View) -> None:
        self._tell((step, view))

    def rewind(self, step: int) -> None:
        self._tell(read_truth(self.folder, step))

    def close(self, status: str) -> None:
        self._tell(status)
        limit = CLOSE_LIMIT + (ARTIFACT_LIMIT if self._sends_model(status) else 0)
        num_taken = -1
        while self.thread.is_alive() and num_taken < self.num_taken:
            num_taken = self.num_taken
            self.thread.join(limit)
        if self.thread.is_alive():
            self._warn(f"no end within {limit:g} s")
            _kill_service()  # which wakes the thread, and the exit of the program, if it waits for it
            self.thread.join(CLOSE_LIMIT)

    def _tell(self, told: Told | list[Told] | str) -> None:
        if self.thread.is_alive():
            self.queue.put(told)

    def _sends_model(self, status: str) -> bool:
        return self.tracking.artifacts and status == "done"

    def _serve(self) -> None:
        try:
            settings = self._connect()
            rows = self._begin(settings, self.queue.get())
            while not isinstance(told := self.queue.get(), str):
                if isinstance(told, list):  # a rollback: the run so far is another one
                    rows.run.finish(exit_code=0)
                    rows = self._begin(settings, told)
                else:
                    self._take(rows, told)
            self._end(rows, told)
        except Exception as error:  # whatever it is, it is W&B's
            self._warn(_first_line(error))
        finally:
            self.started.set()
            _end_session()

    def _begin(self, settings: wandb.Settings, truth: list[Told]) -> Rows:
        """A run that has, or is about to get, all of `truth`."""
        last_step = max((step for step, told in truth if told.get("view") != "start"), default=-1)  # that has a row
        run, sent_step = self._start(settings, last_step)
        self.started.set()
        # Tables wait there to be sent, offline for good: not in a home folder, where nobody would remove them.
        os.environ["WANDB_DATA_DIR"] = str(Path(run.dir).parent)
        rows = Rows(run, sent_step, self.folder, last_validation(truth))
        for told in truth:
            self._take(rows, told)
        if self.mode == "offline":
            run.status()  # its service has taken all of it when it answers
            self._remove_superseded(Path(run.dir).parent)
        return rows

    def _take(self, rows: Rows, told: Told) -> None:
        rows.take(*told)
        self.num_taken += 1

    def _end(self, rows: Rows, status: str) -> None:
        # More may be told of the step that an interrupted run stopped at, and W&B takes no second row.
        if self.mode == "offline" or status != "interrupted":
            rows.flush()
        if self._sends_model(status):
            try:
                rows.send_model(re.sub(r"[^\w.-]", "-", self.name))
            except Exception as error:  # the rest of the run is there
                log.warning("wandb: the best checkpoint was not sent (%s)", _first_line(error))
        if status == "interrupted":
            rows.run.mark_preempting()
        rows.run.finish(exit_code=0 if status == "done" else 1)
        self._remove_superseded(Path(rows.run.dir).parent)

    def _remove_superseded(self, current: Path) -> None:
        """Offline folders of this run that hold less of it: sent later, they would put it back."""
        for folder in (self.folder / "wandb").glob("offline-run-*"):
            if folder != current:
                shutil.rmtree(folder, ignore_errors=True)

    def _connect(self) -> wandb.Settings:
        """Settings for a run in the mode that is possible."""
        # Else its service tries to reach W&B's error collectors when it ends, even offline: 10 to 20 s without a network.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        # What is printed would go through the service too, and wait for it; arguments and git remotes may hold secrets.
        settings = wandb.Settings(
            mode=self.mode,
            silent=True,
            console="off",
            disable_git=True,
            x_disable_meta=True,
            init_timeout=INIT_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT + (ARTIFACT_LIMIT if self.tracking.artifacts else 0),
            finish_timeout_raises=True,
        )
        wandb.setup(settings)
        return settings

    def _start(self, settings: wandb.Settings, last_step: int) -> tuple[wandb.Run, int]:
        """A run, and the step up to which it is whole, at most `last_step`; -1 where it is empty."""
        if self.mode == "online":
            try:
                if wandb.login(prompt=False, verify=False):
                    return self._resume(settings, last_step)
                reason = "no API key (set WANDB_API_KEY or run `wandb login`)"
            except (wandb.Error, OSError, ValueError) as error:
                reason = f"no connection ({_first_line(error)})"
            log.warning(
                "wandb: %s; recording offline, to be sent by `wandb sync %s/wandb/offline-run-*`", reason, self.folder
            )
            _end_session()  # its service holds the run's id
            self.mode = settings.mode = "offline"
            wandb.setup(settings)
        return self._init(settings), -1

    def _resume(self, settings: wandb.Settings, last_step: int) -> tuple[wandb.Run, int]:
        """The server's run. It says of a run that has rows: it starts at the step after its last row."""
        run = self._init(settings, resume="allow")
        if run.starting_step - 1 > last_step >= 0:
            run.finish()
            try:
                run = self._init(settings, resume_from=f"{self.run_id}?_step={last_step}")
            except wandb.Error as error:
                log.warning(
                    "wandb: run %s not rewound to step %d (%s); it keeps the first row of steps that are done again",
                    self.run_id, last_step, _first_line(error),
                )  # fmt: skip
                _end_session()  # its service holds the run's id
                wandb.setup(settings)
                run = self._init(settings, resume="allow")
        return run, run.starting_step - 1

    def _init(self, settings: wandb.Settings, **how: Any) -> wandb.Run:
        # A copy, because `how` ends up in the settings, and the next time may be another.
        return wandb.init(settings=settings.model_copy(), **how, **self.options)

    def _warn(self, reason: str) -> None:
        if not self.warned:
            self.warned = True
            log.warning(
                "wandb: given up (%s); training goes on, metrics.jsonl is whole; "
                "`python scripts/replay_tracking.py %s` sends it",
                reason, self.folder,
            )  # fmt: skip


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _end_session() -> None:
    """End what is left of a run, and the service. A service that was killed is said so by an exit."""
    with contextlib.suppress(Exception, SystemExit):
        if wandb.run is not None:  # its threads would fail later, each with a traceback
            wandb.run.finish(exit_code=1)
    unset_globals()  # a run without its service cannot finish, and while there is one, no other logs in
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()


def _kill_service() -> None:
    """Kill the service that wandb started for this process; it would be waited for when the program ends."""
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            if (Path("/proc") / pid / "comm").read_text().strip() == SERVICE:
                os.kill(int(pid), signal.SIGKILL)
