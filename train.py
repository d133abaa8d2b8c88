"""Train a network: `torchrun --nproc-per-node=N train.py [key=value ...]`, or `python train.py` in one process.

Composes the configuration, builds each part once, resumes where the run stands and trains to the end. `--help` lists
every key; `experiment=digits` runs anywhere.
"""

from data.preflight import check_validation
from data.sources import open_sources
from vip import config, estimate, micro_batch, run_folder
from vip.config import RunConfig
from vip.distributed import connect
from vip.engine import Trainer
from vip.parts import build
from vip.preemption import StopRequest
from vip.preflight import check_space


def train(run: RunConfig) -> None:
    if run.plan:
        estimate.show(run)
        return
    with StopRequest() as stop:
        finished = fit(run, stop)
    if stop() and not finished:
        raise SystemExit(stop.exit_status)


def fit(run: RunConfig, stop: StopRequest) -> bool:
    """Train from where the run stands; True where it reached its end."""
    train_set, val_set = open_sources(run.data)
    with connect() as world, run_folder.held(run, world) as console:
        found = run_folder.find_start(run, world, console)
        run, plan = micro_batch.settle(run, world, world.size, train_set, found)
        is_fresh = found is None
        parts = build(run, plan, world, train_set, val_set, run.weights if is_fresh else None, console.print)
        trainer = Trainer(run, plan, world, parts, stop, console.print)
        if found is not None:
            run_folder.check_same_run(found, parts.fingerprint, console)
            trainer.resume(found)
        del found  # as large as the network, its moments and averages
        if trainer.finished:
            console.print(f"{run.folder} is complete: step {trainer.progress.step}, nothing left to train")
            return True
        run_folder.announce(run, plan, trainer, (len(train_set), len(val_set)), console)
        check_space(run.folder, parts.model, parts.optimizer, trainer.ema is not None)
        if is_fresh:
            check_validation(val_set, run.data.workers, world.rank, world.size)
        with run_folder.tracked(run, plan, trainer, console):
            trainer.fit()
        console.print(run_folder.closing_words(run, trainer, stop.name))
        return trainer.finished


if __name__ == "__main__":
    config.run("train", RunConfig, train)
