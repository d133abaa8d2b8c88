"""A run's folder, from outside the loop: where to start, what to say at the start and the end, who watches.

runs/<name>/config.yaml      every key, resolved
runs/<name>/metrics.jsonl    numbers, one JSON object a line
runs/<name>/views.jsonl      what there is to see beside them (vip/views.py)
runs/<name>/report.html      both as a page, once the run has ended
runs/<name>/code.diff        what the code differs by from its commit, if it does
runs/<name>/checkpoints/     the newest and the best
runs/<name>/bad_images.jsonl   training images that could not be decoded, if there were any
runs/<name>/PREEMPTED        only while a signal has stopped the run: the step it was saved at
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vip import checkpoint, config, environment, mfu, preflight, views
from vip.config import ConfigError, RunConfig
from vip.distributed import World
from vip.engine import Progress, Trainer
from vip.page import write_report
from vip.plan import Plan
from vip.tracking import Fanout, Tracker, View
from vip.tracking.console import ConsoleTracker
from vip.tracking.jsonl import JsonlTracker
from vip.tracking.truth import first_id, read_truth

# A checkpoint that differs in one of these is of another run; in one of the others, the bits will differ.
IDENTITY = ("model", "num_classes", "parameters", "optimizer", "batch_size", "seed", "block")
CIRCUMSTANCES = ("world_size", "micro_batch", "precision", "compile", "compress_gradients", "decoder")


@contextlib.contextmanager
def held(run: RunConfig, world: World) -> Iterator[Console]:
    """The console, which only rank 0 uses, while rank 0 keeps other runs out of the folder."""
    console = Console(quiet=not world.is_main, soft_wrap=True, highlight=False, markup=False)
    with preflight.locked(run.folder, console.print) if world.is_main else contextlib.nullcontext():
        if world.is_main:
            checkpoint.sweep(run.folder / "checkpoints")
        yield console


def find_start(run: RunConfig, world: World, console: Console) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from, the same on all ranks, or None for a fresh start.

    The run's own newest checkpoint comes first, so that a command with `resume=<path>` may be repeated after an interruption.
    Raises ValueError where `resume=never` would overwrite a run.
    """
    own = checkpoint.newest_for_all(run.folder / "checkpoints", world.is_main, world.share, console.print)
    if run.resume == "never" and own is not None:
        raise ConfigError(
            f"resume=never: {run.folder} already holds a run (step {own.step}); choose another name=..., or delete that folder"
        )
    if own is not None or run.resume in ("auto", "never"):
        return own
    return _other_run(Path(run.resume), world, console)


def check_same_run(found: checkpoint.Checkpoint, fingerprint: dict[str, Any], console: Console) -> None:
    """Raises ConfigError where the checkpoint is of another run; says where it was made under other circumstances."""
    saved = found.state["fingerprint"]
    for key in IDENTITY:
        if key in saved and saved[key] != fingerprint[key]:
            raise ConfigError(
                f"{found.path} is of another run: {key} {saved[key]}, here {fingerprint[key]}; choose another name=..., "
                "set the key back, or begin a new run with its weights: weights=..."
            )
    for key in CIRCUMSTANCES:
        if saved.get(key) != fingerprint[key]:
            console.print(f"note: {key} was {saved[key]}, now {fingerprint[key]}: goes on, but not with the same bits")


def _other_run(path: Path, world: World, console: Console) -> checkpoint.Checkpoint:
    """A checkpoint to branch off from: its weights, moments and position, but neither its best result nor its trackers."""
    if path.is_dir():
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        found = checkpoint.newest_for_all(folder, world.is_main, world.share, console.print)
        if found is None:
            raise ConfigError(f"resume={path}: no checkpoint in this folder")
    elif path.exists() and not checkpoint.is_ours(path):
        raise ConfigError(
            f"resume={path}: not a checkpoint of this program; eval.py reads published weights, a run cannot go on from them"
        )
    else:
        found = checkpoint.read(path)
    found.state["progress"] = {"step": found.step}
    return found


def announce(run: RunConfig, plan: Plan, trainer: Trainer, num_images: tuple[int, int], console: Console) -> None:
    """Say in a few lines what is about to happen; `num_images` counts training and validation images."""
    if run.console == "quiet":
        return
    millions = sum(p.numel() for p in trainer.parts.model.parameters()) / 1e6
    device = environment.device_name(trainer.world.device)
    height, width = trainer.parts.image_size
    facts = trainer.parts.fingerprint
    console.print(
        f"network   {run.model.name}, {millions:.1f} M parameters, {height}x{width}, {run.precision.name} on {device}"
    )
    console.print(f"data      {run.data.kind}: {num_images[0]:,} training and {num_images[1]:,} validation images, "
                  f"{facts['num_classes']} classes, decoder {facts['decoder']}")  # fmt: skip
    console.print(f"plan      {plan.describe()}")
    step = trainer.progress.step
    console.print(f"folder    {run.folder}, {f'goes on from step {step}' if step else 'from the start'}")
    for departure in config.departures(run):
        console.print(f"departs from the published recipe: {departure}")


@contextlib.contextmanager
def tracked(run: RunConfig, plan: Plan, trainer: Trainer, console: Console) -> Iterator[None]:
    """Give the trainer its trackers (on rank 0) while it runs; an interruption ends in a line that says how to go on.

    A run that a signal has stopped leaves the file PREEMPTED with its step, for scripts to see.
    """
    progress, status = trainer.progress, "failed"
    if trainer.world.is_main:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "PREEMPTED").unlink(missing_ok=True)
        (run.folder / "config.yaml").write_text(config.to_yaml(run))
        environment.write_diff(run.folder / "code.diff")
        start = _start(run, plan, trainer)
        trainer.trackers = Fanout(_trackers(run, plan, progress, console, start))
        trainer.trackers.show(progress.step, start)
        parts = trainer.parts
        rate = plan.world_size * mfu.matrix_rate(parts.precision.dtype, trainer.world.device)
        trainer.full_speed = rate / mfu.step_flops(parts.model, parts.image_size)
    try:
        yield
        status = "done" if trainer.finished else "interrupted"
        if status == "interrupted" and trainer.world.is_main:
            (run.folder / "PREEMPTED").write_text(f"{progress.step}\n")
    except KeyboardInterrupt:
        status = "interrupted"
        console.print(
            f"interrupted at step {progress.step}; the same command goes on from step {trainer.writer.wait()}"
        )
        raise SystemExit(130) from None
    except torch.OutOfMemoryError as error:
        remedy = f"micro_batch={plan.micro_batch // 2} keeps the global batch by accumulation"
        raise ConfigError(
            f"micro_batch={plan.micro_batch}: too much for the GPU's memory ({error}); {remedy}"
        ) from error
    finally:
        trainer.trackers.close(status)
        if trainer.world.is_main:
            _write_report(run.folder, console)


def closing_words(run: RunConfig, trainer: Trainer, signal_name: str | None) -> str:
    """The last lines on the console."""
    progress = trainer.progress
    if not trainer.finished:
        return f"stopped by {signal_name or 'a signal to another rank'}, saved at step {progress.step}; the same command goes on"
    top1 = progress.last.get("val_ema/top1", progress.last["val/top1"])  # averaged weights decide where there are any
    return (
        f"done: top-1 {top1:.2f} %, best {progress.best_top1:.2f} %, after {progress.step} steps in {run.folder}\n"
        f"next: python eval.py checkpoint={run.folder}"
    )


def _write_report(folder: Path, console: Console) -> None:
    try:
        write_report([folder], folder / "report.html")
        console.print(f"report: {folder / 'report.html'}")
    except Exception as error:  # whatever it is, it is no reason for a run to end otherwise
        console.print(f"warning: no report ({error}); python scripts/report.py {folder} tries again")


def _start(run: RunConfig, plan: Plan, trainer: Trainer) -> View:
    return views.start(
        world_size=plan.world_size,
        total_steps=plan.total_steps,
        steps_per_epoch=plan.steps_per_epoch,
        classes=trainer.parts.views.images.class_names,
        num_parameters=sum(p.numel() for p in trainer.parts.model.parameters()),
        departures=config.departures(run),
        environment=environment.describe(trainer.world.device),
    )


def _trackers(run: RunConfig, plan: Plan, progress: Progress, console: Console, start: View) -> list[Tracker]:
    trackers: list[Tracker] = [
        JsonlTracker(run.folder, progress.step),
        ConsoleTracker(plan, progress.step, console, run.console, lambda: progress.step),
    ]
    if run.tracking.kind == "wandb":
        from vip.tracking.wandb_run import WandbTracker

        # A run that ended before its first checkpoint has left its start, and so its id.
        known_id = progress.tracking.get("wandb") or first_id(
            run.name, [*read_truth(run.folder), (progress.step, start)]
        )
        tracker = WandbTracker(run.tracking, run.name, run.folder, config.redacted(run), known_id)
        progress.tracking["wandb"] = tracker.run_id
        trackers.append(tracker)
    if run.tracking.kind == "tensorboard":
        from vip.tracking.tensorboard import TensorBoardTracker

        trackers.append(TensorBoardTracker(run.folder, progress.step))
    return trackers
