"""Weights & Biases: never the reason that a run fails. Without a key or a network the run is recorded offline."""

import logging
from pathlib import Path
from typing import Any, Literal

import wandb
from wandb.sdk.lib.runid import generate_id

from vip.tracking.base import Record

INIT_TIMEOUT = 10.0
log = logging.getLogger(__name__)


class WandbTracker:
    """One W&B run; `run_id` None starts a new one, the id of a checkpoint goes on with the same one.

    Online without a key, or with a server that does not answer within INIT_TIMEOUT seconds, falls back to an offline run
    (`wandb sync` sends it later) with a warning.
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
        if mode == "online" and not wandb.api.api_key:
            log.warning(
                "wandb: no API key (set WANDB_API_KEY or run `wandb login`); recording offline in %s", folder / "wandb"
            )
            mode = "offline"
        options: dict[str, Any] = {"project": project, "name": name, "dir": folder, "config": config, "id": self.run_id}
        try:
            settings = wandb.Settings(init_timeout=INIT_TIMEOUT, silent=True)
            self.run = wandb.init(mode=mode, resume="allow" if mode == "online" else None, settings=settings, **options)
        except (wandb.Error, OSError) as error:
            log.warning(
                "wandb: no connection (%s); recording offline in %s", str(error).splitlines()[0], folder / "wandb"
            )
            self.run = wandb.init(mode="offline", settings=wandb.Settings(silent=True), **options)

    def log(self, step: int, record: Record) -> None:
        self.run.log(dict(record), step=step)
        if "val/best_top1" in record:
            self.run.summary["best_top1"] = record["val/best_top1"]

    def close(self, status: str) -> None:
        self.run.finish(exit_code=0 if status == "done" else 1)
