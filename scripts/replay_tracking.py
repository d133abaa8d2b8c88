"""Send runs that have ended, or were cut off, to Weights & Biases or TensorBoard.

    python scripts/replay_tracking.py runs/x runs/y                       to W&B, or offline where it cannot be reached
    python scripts/replay_tracking.py runs/x --offline --project other    for `wandb sync`
    python scripts/replay_tracking.py runs/x --to tensorboard             writes runs/x/tensorboard anew

metrics.jsonl and views.jsonl are what is sent. A run that W&B knows gets the rows that it lacks there; another one gets an id
that follows from its name and its first start, so that sending it twice makes no second run.
"""

import argparse
import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import yaml

from vip import checkpoint, preflight
from vip.config import ConfigError
from vip.ranks import one_line_errors
from vip.redact import redact
from vip.tracking import TrackingConfig
from vip.tracking.jsonl import METRICS
from vip.tracking.truth import Told, first_id, read_truth

KEYS = {field.name for field in dataclasses.fields(TrackingConfig)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Send finished or failed runs to W&B or TensorBoard.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="run", help="run folders")
    parser.add_argument("--to", choices=("wandb", "tensorboard"), default="wandb")
    parser.add_argument("--offline", action="store_true", help="W&B: keep it for `wandb sync`")
    parser.add_argument("--project", help="W&B: another project than the run's own")
    args = parser.parse_args()
    with one_line_errors():
        for folder in args.runs:
            if not (folder / METRICS).is_file():
                raise ConfigError(f"{folder}: no {METRICS} in it; give the folder of a run, such as runs/<name>")
            with preflight.locked(folder, print):
                truth = read_truth(folder)
                if not truth:
                    raise ConfigError(f"{folder}: {METRICS} holds no line; there is nothing to send")
                print(f"{folder}: {_summary(truth)} -> {_send(folder, truth, args)}")


def _send(folder: Path, truth: list[Told], args: argparse.Namespace) -> str:
    """Where it went. Raises ConfigError where it did not."""
    last_step = truth[-1][0]
    if args.to == "tensorboard":
        from vip.tracking.tensorboard import FOLDER, TensorBoardTracker

        events = TensorBoardTracker(folder, last_step)
        events.close("done")
        if events.failed:
            raise ConfigError(f"{folder / FOLDER}: not written whole; see to the disk, and give the same command again")
        return f"{folder / FOLDER}"

    from vip.tracking.wandb_run import WandbTracker

    config = _config(folder)
    given = {"kind": "wandb", "mode": "offline" if args.offline else "online"}
    given |= {"project": args.project} if args.project else {}
    tracking = TrackingConfig(**{key: value for key, value in config["tracking"].items() if key in KEYS} | given)
    tracker = WandbTracker(
        tracking, config["name"], folder, config, _known_id(folder) or first_id(config["name"], truth)
    )
    total_steps = next((told["total_steps"] for _, told in truth if "total_steps" in told), last_step)
    tracker.close("done" if last_step >= total_steps else "failed")
    if tracker.warned:
        raise ConfigError(f"{folder}: not all of it reached W&B; give the same command again, or add --offline")
    if tracker.mode == "offline":
        return f"`wandb sync {folder}/wandb/offline-run-*-{tracker.run_id}`"
    return f"W&B run {tracker.run_id} in {tracking.project}"


def _summary(truth: list[Told]) -> str:
    num_views = sum("view" in told for _, told in truth)
    return f"{len(truth) - num_views} rows and {num_views} views up to step {truth[-1][0]}"


def _config(folder: Path) -> dict[str, Any]:
    """What the run was configured by, with `name` and `tracking` in any case."""
    path = folder / "config.yaml"
    try:
        found = yaml.safe_load(path.read_text()) if path.exists() else {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not readable ({str(error).splitlines()[0]}); mend it, or move it away") from error
    return {"name": folder.resolve().name, "tracking": {}} | redact(found or {})


def _known_id(folder: Path) -> str | None:
    """W&B's id in the newest checkpoint that can be read."""
    for path in sorted((folder / "checkpoints").glob("step_*.safetensors"), reverse=True):
        with contextlib.suppress(checkpoint.CheckpointError):
            run_id: str | None = checkpoint.read(path).state["progress"]["tracking"].get("wandb")
            return run_id
    return None


if __name__ == "__main__":
    main()
