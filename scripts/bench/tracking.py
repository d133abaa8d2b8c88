"""`benchmark.py tracking`: what the trackers take of the time between two log steps.

The trainer's own steps on the digits, in blocks that end with what a log step tells; each block with other trackers in turn.
What the loop spends in the trackers' calls is measured directly. The CPU time of the block, against the block that
tells nobody, has in it what their threads do meanwhile as well; it is as uncertain as a few percent.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

from rich.console import Console

from data.sources import open_sources
from scripts.bench.timing import interleaved
from vip.config import RunConfig, compose, parse, redacted
from vip.distributed import connect
from vip.engine import SUMS, Trainer
from vip.metrics import DeviceSums
from vip.parts import build
from vip.plan import Plan, make_plan
from vip.tracking import Fanout, Tracker
from vip.tracking.base import Record
from vip.tracking.console import ConsoleTracker
from vip.tracking.jsonl import JsonlTracker
from vip.tracking.tensorboard import TensorBoardTracker
from vip.tracking.wandb_run import WandbTracker

EPOCHS = 1000  # enough steps for every block
STEP_S = 0.1  # of the step that the shares are stated for
NONE, LOCAL, WANDB, TENSORBOARD = "none", "local", "wandb, offline", "tensorboard"
Row = dict[str, object]


class Timed(Fanout):
    """Trackers whose calls are timed."""

    def __init__(self, trackers: list[Tracker]) -> None:
        super().__init__(trackers)
        self.seconds: list[float] = []

    def log(self, step: int, record: Record) -> None:
        begun = time.perf_counter()
        super().log(step, record)
        self.seconds.append(time.perf_counter() - begun)


def measure(interval: int, rounds: int, root: str | None, say: Callable[[str], object]) -> dict[str, list[Row]]:
    """Tables by title: a row for each kind of tracking, at a log step every `interval` steps."""
    with tempfile.TemporaryDirectory() as folder, connect() as world:
        changes = [f"runs_dir={folder}", f"epochs={EPOCHS}", "tracking.mode=offline"]
        changes += [f"data.root={root}"] * (root is not None)
        run = parse(RunConfig, compose("train", ["experiment=digits", "tracking=wandb", *changes]))
        train_set, val_set = open_sources(run.data)
        plan = make_plan(run.batch_size, None, world.size, len(train_set), run.total_epochs, None)
        trainer = Trainer(run, plan, world, build(run, plan, world, train_set, val_set, None, say))
        batches, sums = trainer.parts.batches(0, 0), DeviceSums(SUMS, world)
        fanouts = {kind: Timed(_trackers(kind, run, plan)) for kind in (NONE, LOCAL, WANDB, TENSORBOARD)}
        blocks: list[float] = []

        def block(kind: str) -> int:
            say(f"{interval} steps, tracked: {kind}")
            begun = time.perf_counter()
            for _ in range(interval):
                trainer.train_step(batches, trainer.progress.step, sums)
                trainer.progress.step += 1
            step, totals = trainer.progress.step, sums.reduce()
            record = {f"train/{name}": value for name, value in totals.items()}
            record |= {"train/lr": trainer.lr_at(step), "train/drop_path": 0.0, "train/skipped_steps": 0.0}
            record["train/images_per_s"] = interval * plan.batch_size / (time.perf_counter() - begun)
            fanouts[kind].log(step, {"epoch": plan.epoch_at(step), "images": step * plan.batch_size, **record})
            blocks.append(time.perf_counter() - begun)
            return interval

        speeds = interleaved({kind: lambda kind=kind: block(kind) for kind in fanouts}, rounds)  # type: ignore[misc]
        for fanout in fanouts.values():
            fanout.close("done")
    step_s = statistics.median(blocks) / interval
    title = f"a log step every {interval} steps, of {1e3 * step_s:.0f} ms here"
    return {title: [_row(kind, fanouts[kind], interval, step_s, speeds) for kind in fanouts]}


def _trackers(kind: str, run: RunConfig, plan: Plan) -> list[Tracker]:
    if kind == NONE:
        return []
    run = replace(run, name=kind.partition(",")[0])
    run.folder.mkdir(parents=True)
    log = (run.folder / "console.txt").open("w", buffering=1)
    trackers: list[Tracker] = [JsonlTracker(run.folder, 0), ConsoleTracker(plan, 0, Console(file=log), "plain")]
    if kind == WANDB:
        trackers.append(WandbTracker(run.tracking, run.name, run.folder, redacted(run), None))
    if kind == TENSORBOARD:
        trackers.append(TensorBoardTracker(run.folder, 0))
    return trackers


def _row(kind: str, fanout: Timed, interval: int, step_s: float, speeds: dict[str, float]) -> Row:
    spent = statistics.median(fanout.seconds)
    return {
        "tracked": kind if kind in (NONE, LOCAL) else f"{LOCAL} and {kind}",
        "calls, ms": round(1e3 * spent, 3),
        "% of the steps": round(100 * spent / (interval * step_s), 4),
        f"% of steps of {1e3 * STEP_S:.0f} ms": round(100 * spent / (interval * STEP_S), 4),
        "CPU time beside none, %": round(100 * (speeds[NONE] / speeds[kind] - 1), 1),
    }
