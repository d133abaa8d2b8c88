"""Train a network: `torchrun --nproc-per-node=N train.py [key=value ...]`, or `python train.py` in one process.

Composes the configuration, builds each part once, resumes where the run stands and trains to the end. `--help` lists
every key; `experiment=digits` runs anywhere.
"""

from typing import Any

import torch
from rich.console import Console
from torch import nn

from data.augment import EvalTransform, TrainTransform
from data.finish import BatchFinisher, Normalize
from data.loader import eval_loader, train_loader
from data.order import BatchPlan, EpochOrder
from data.sources import Source, open_sources
from vip import checkpoint, config, run_folder
from vip.config import RunConfig
from vip.distributed import World, connect
from vip.engine import Parts, Trainer
from vip.evaluate import Evaluation, evaluate
from vip.models.build import build_model, compile_model, input_spec
from vip.optim import build_optimizer
from vip.plan import Plan, make_plan
from vip.precision import Precision
from vip.preemption import StopRequest


def train(run: RunConfig) -> None:
    with StopRequest() as stop:
        finished = fit(run, stop)
    if stop() and not finished:
        raise SystemExit(stop.exit_status)


def fit(run: RunConfig, stop: StopRequest) -> bool:
    """Train from where the run stands; True where it reached its end."""
    train_set, val_set = open_sources(run.data)
    with connect() as world:
        console = Console(quiet=not world.is_main, soft_wrap=True, highlight=False, markup=False)
        plan = make_plan(run.batch_size, run.micro_batch, world.size, len(train_set), run.total_epochs, run.max_steps)
        trainer = Trainer(run, plan, world, build(run, plan, world, train_set, val_set), stop)
        found = run_folder.find_start(run, trainer.parts.fingerprint, console)
        if found is not None:
            trainer.resume(found)
        if trainer.finished:
            console.print(f"{run.folder} is complete: step {trainer.progress.step}, nothing left to train")
            return True
        run_folder.announce(run, plan, trainer, (len(train_set), len(val_set)), console)
        with run_folder.tracked(run, plan, trainer, console):
            trainer.fit()
        console.print(run_folder.closing_words(run, trainer, stop.name))
        return trainer.finished


def build(run: RunConfig, plan: Plan, world: World, train_set: Source, val_set: Source) -> Parts:
    """Every part of a run from its configuration; the same weights on every rank, whatever the world size."""
    num_classes = len(train_set.class_names)
    precision = Precision(run.precision, world.device)
    torch.manual_seed(run.seed)
    model = build_model(run.model, num_classes)
    spec = input_spec(run.model, model)
    model.to(world.device)
    if run.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if run.compile:
        compile_model(model)
    normalize = Normalize(spec.mean, spec.std, world.device, run.channels_last)
    loading: dict[str, Any] = {"workers": run.data.workers, "pin": world.device.type == "cuda"}

    def evaluate_network(network: nn.Module) -> Evaluation:
        transform = EvalTransform(spec.size, spec.crop_pct, spec.interpolation)
        share: dict[str, Any] = {"batch_size": plan.micro_batch, "rank": world.rank, "world": world.size}
        batches = eval_loader(val_set, transform, **share, **loading)
        return evaluate(network, batches, len(val_set), normalize, precision, world)

    facts = {key: getattr(run, key) for key in ("batch_size", "seed", "compile")}
    facts |= {"optimizer": run.optimizer.name, "world_size": world.size, "precision": run.precision.name}
    return Parts(
        model=model,
        optimizer=build_optimizer(run.optimizer, model, world.device),
        precision=precision,
        batches=lambda step: train_loader(
            train_set,
            TrainTransform(run.augment, spec.size, spec.mean),
            EpochOrder(len(train_set), run.seed, run.augment.repeats),
            BatchPlan(plan.batch_size, world.size, world.rank, plan.accumulation),
            start_step=step,
            total_steps=plan.total_steps,
            **loading,
        ),
        finish=BatchFinisher(run.augment, num_classes, normalize, run.seed, world.rank).finish,
        evaluate=evaluate_network,
        fingerprint=checkpoint.fingerprint(run.model.name, num_classes, model) | facts,
        image_size=spec.size,
    )


if __name__ == "__main__":
    config.run("train", RunConfig, train)
