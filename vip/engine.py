"""The trainer: one loop over steps, and everything it does is a function of the step.

A step takes `accumulation` micro-batches of uint8 images, finishes them on the device (normalise, erase, mix), and makes one
optimizer step on the mean gradient of the global batch. Order, augmentation, learning rate, drop rates and random numbers
all follow from (seed, step), so going on after an interruption needs no other position than the step itself. The host
waits for the device on log steps, at validations and for checkpoints, never in between.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.batch import Batch
from data.randomness import stream_key
from vip import checkpoint
from vip.bad_images import BadImages
from vip.config import ConfigError, RunConfig, redacted
from vip.distributed import Vote, World
from vip.evaluate import Evaluation
from vip.gates import GateMeans, means
from vip.guard import BadStep, Guard
from vip.metrics import DeviceSums
from vip.optim import clip_gradients, load_moments, peak_lr, set_lr
from vip.plan import Plan
from vip.precision import Precision
from vip.profiling import Profile
from vip.schedule import lr_at
from vip.stochastic_depth import rate_at, set_drop_path_rate
from vip.tracking import Fanout
from vip.views import Views
from vip.watch import Watch

Finish = Callable[[Batch, int, int], tuple[Tensor, Tensor]]
SUMS = ("loss", "grad_norm", "finite_steps", "data_wait", "bad_images")  # over the steps since the last log
MAX_ROLLBACKS = 3
MAX_DUMPS = 3


@dataclass
class Parts:
    """What a run is made of, each built once from plain values.

    `batches(step, rollbacks)` iterates micro-batches from that step on to the end of the run, others after each rollback;
    `finish(batch, step, micro)` gives the network's input (B, 3, H, W) and soft targets (B, K); `evaluate(model)` runs the
    whole validation set. `image_size` is (H, W) in pixels; `fingerprint` says what a checkpoint belongs to.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    batches: Callable[[int, int], Iterator[Batch]]
    finish: Finish
    evaluate: Callable[[nn.Module], Evaluation]
    bad_images: BadImages
    views: Views
    fingerprint: dict[str, Any]
    image_size: tuple[int, int]


@dataclass
class Progress:
    """Where the run stands; all of it is in the checkpoint."""

    step: int = 0
    validated_step: int = 0
    rollbacks: int = 0
    best_top1: float = -1.0
    last: dict[str, float] = field(default_factory=dict)
    tracking: dict[str, Any] = field(default_factory=dict)


class RollBack(Exception):  # noqa: N818 - no error, a way out of the loop
    """Too many steps in a row were left out: the run goes back to its newest checkpoint."""


class Trainer:
    """Trains `parts.model` as `config` and `plan` say: `resume()`, then `fit()`.

    On every rank `stop` is asked once a step; `warn` says on the console what went wrong and was survived.
    """

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        world: World,
        parts: Parts,
        stop: Callable[[], bool] = lambda: False,
        warn: Callable[[str], object] = print,
    ) -> None:
        self.config = config
        self.plan = plan
        self.world = world
        self.parts = parts
        self.stop = stop
        self.progress = Progress()
        self.trackers = Fanout()
        self.warn = warn
        self.watch = Watch(world, config.folder)
        self.writer = checkpoint.Writer(config.folder / "checkpoints", config.keep, warn)
        self.ema = ModelEmaV3(parts.model, decay=config.ema_decay) if config.ema_decay else None
        self.guard = Guard(parts.model, parts.optimizer, parts.precision.scaler)
        self.wrapped = world.wrap(parts.model, config.compress_gradients)
        self.peak_lr = peak_lr(config.optimizer, config.batch_size)
        self.drop_rate = -1.0
        self.num_dumps = 0
        self.stopped = self.has_shown = False
        self.full_speed: float | None = None  # images/s, if products alone took time, at the rate of a large one

    def resume(self, found: checkpoint.Checkpoint) -> None:
        """Take weights, moments, averages, scaler and position from a checkpoint of the same run."""
        state = found.state
        self.parts.model.load_state_dict(state["model"])
        load_moments(self.parts.optimizer, state["optimizer"])
        if state["scaler"] and self.parts.precision.scaler.is_enabled():
            self.parts.precision.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:  # an average that was not kept before starts from the weights
            self.ema.module.load_state_dict(state["ema"] or state["model"])
        vars(self.progress).update(state["progress"])
        self.writer.saved_step = self.progress.step

    def fit(self) -> Progress:
        """Train to the end of the plan, or to the step after which any rank asks to stop; validate and save on the way."""
        world = self.world
        self.profile = Profile(
            self.config.folder, self.progress.step, world.device, world.rank, world.gather, self.config.profile
        )
        with self.watch:
            try:
                height, width = self.parts.image_size
                images = torch.zeros(self.plan.micro_batch, 3, height, width, device=world.device)
                world.settle_buckets(self.wrapped, images, self.parts.precision.autocast)
                self.parts.optimizer.zero_grad(set_to_none=True)
                if self._validation_due():  # the run was stopped before it could
                    self._save(self._validate())
                while self.progress.step < self.plan.total_steps and not self.stopped:
                    try:
                        self._train()
                    except RollBack:
                        self._roll_back()
                self._settle_save()
            finally:
                self.writer.wait()
        if self.writer.saved_step < self.progress.step and self.world.is_main:
            raise OSError(
                f"{self.config.folder}: the last checkpoint could not be written; free some space and give the same command, "
                f"it goes on from step {self.writer.saved_step}"
            )
        return self.progress

    def _train(self) -> None:
        """Steps until the end, or until a stop is asked for. Raises RollBack where the run must go back instead."""
        plan, progress = self.plan, self.progress
        sums = DeviceSums(SUMS, self.world)
        batches = self.profile.watch(self.parts.batches(progress.step, progress.rollbacks))
        logged, started = progress.step, time.perf_counter()
        while progress.step < plan.total_steps:
            self.watch.step()
            with self.profile.step():
                stop_vote = self.train_step(batches, progress.step, sums)
            progress.step += 1
            stopping = stop_vote.result()
            run_ends = stopping or progress.step == plan.total_steps
            if run_ends or progress.step % self.config.log_every == 0:
                self._log_training(sums, progress.step - logged, started)
                logged, started = progress.step, time.perf_counter()
            paused = time.perf_counter()
            if said := self.profile.report(run_ends):
                self.warn(said)
            self._between_steps(stopping)
            if stopping:
                self.stopped = True
                return
            started += time.perf_counter() - paused

    def _between_steps(self, stopping: bool) -> None:
        """Save and validate where it is time to."""
        due, save_every = self._validation_due(), self.config.save_every
        if stopping or (not due and save_every and self.progress.step % save_every == 0):
            self._save(improved=False)
        if due and not stopping:
            self.watch.pause()
            self._save(self._validate())

    @property
    def finished(self) -> bool:
        return self.progress.step >= self.plan.total_steps and not self._validation_due()

    def _validation_due(self) -> bool:
        step, period = self.progress.step, self.config.eval_every * self.plan.steps_per_epoch
        return self.progress.validated_step < step and (step >= self.plan.total_steps or step % period == 0)

    def train_step(self, batches: Iterator[Batch], step: int, sums: DeviceSums) -> Vote:
        """One optimizer step on the next `accumulation` micro-batches; adds loss, gradient norm and waits to `sums`.

        Returns the ranks' vote on stopping after it, which was taken late: a signal in mid-step is heeded at its end.
        """
        parts, scaler, accumulation = self.parts, self.parts.precision.scaler, self.plan.accumulation
        seed_step(self.config.seed, step, self.world)
        set_lr(parts.optimizer, self.lr_at(step))
        self._set_drop_rate(step)
        self.wrapped.train()
        self.guard.begin()
        step_loss = torch.zeros((), device=self.world.device)
        seen, waited = [], 0.0
        for micro in range(accumulation):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            seen.append(batch)
            if len(batch.bad):
                parts.bad_images.note(batch.bad.tolist())
                sums.add(bad_images=float(len(batch.bad)))
            images, targets = parts.finish(batch, step, micro)
            if self.trackers and not self.has_shown:
                self.has_shown = True
                self.trackers.show(step, parts.views.samples(images, targets))
            with self._sync_gradients(micro == accumulation - 1):
                with parts.precision.autocast():
                    logits = self.wrapped(images)
                loss = nn.functional.cross_entropy(logits.float(), targets)
                step_loss += loss.detach() / accumulation
                # Times one; but a loss that is not finite makes every gradient so, on every rank.
                scaler.scale(loss * (1 + 0 * loss.detach()) / accumulation).backward()
        norm = clip_gradients(parts.model, parts.optimizer, scaler, self.config.optimizer.clip_grad)
        self._heed_outcome()
        stop_vote = self.world.ask(self.stop())
        finite = self.guard.update(step, seen, step_loss, norm)
        sums.add(
            loss=torch.where(finite, step_loss, 0.0), grad_norm=torch.where(finite, norm, 0.0), finite_steps=finite
        )
        sums.add(data_wait=waited)
        parts.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(parts.model, step=step)
        return stop_vote

    def _heed_outcome(self) -> None:
        """Learn whether the step before was left out, write it down if it is worth a look, and give up after too many."""
        bad, config = self.guard.outcome(), self.config
        if bad is None:
            return
        patience_ends = bad.in_row >= config.max_skipped
        if (bad.in_row == 1 and not bad.is_overflow) or patience_ends:
            self._dump(bad)
        if not patience_ends:
            return
        may_roll_back = config.on_nan == "rollback" and self.progress.rollbacks < MAX_ROLLBACKS
        if may_roll_back and self.world.ask(self.writer.wait() > 0).result():
            raise RollBack
        cause = (
            f"fp16 overflows even at a loss scale of {bad.scale:g}; precision=bf16 or a lower optimizer.lr would do"
            if self.parts.precision.scaler.is_enabled()
            else f"lower optimizer.lr={config.optimizer.lr:g} or set optimizer.clip_grad"
        )
        raise ConfigError(
            f"step {bad.step}: loss {bad.loss:g}, gradient norm {bad.grad_norm:g}: not finite in {bad.in_row} steps in a row, "
            f"which were left out; {cause}; python scripts/replay_step.py {config.folder}/nan_step_{bad.step} shows where it "
            "comes from"
        )

    def _dump(self, bad: BadStep) -> None:
        """The state that `bad` began with and its images, every rank its own, for scripts/replay_step.py."""
        self.num_dumps += 1
        if self.num_dumps > MAX_DUMPS:
            return
        folder = self.config.folder / f"nan_step_{bad.step}"
        folder.mkdir(parents=True, exist_ok=True)
        bad.write(folder, self.world.rank, stream_key("step", self.config.seed, bad.step, self.world.rank))
        if self.world.is_main:
            checkpoint.write(folder / "state.safetensors", self.state() | {"step": bad.step})
            self.warn(
                f"warning: step {bad.step} left out: loss {bad.loss:g}, gradient norm {bad.grad_norm:g}; "
                f"python scripts/replay_step.py {folder} runs it again"
            )

    def _roll_back(self) -> None:
        """To the newest checkpoint, and on from there with other images, or the same steps would end the same way."""
        rollbacks, from_step = self.progress.rollbacks + 1, self.progress.step
        found = checkpoint.newest_for_all(self.writer.folder, self.world.is_main, self.world.share, self.warn)
        assert found is not None, "a checkpoint was there when the rollback was decided"
        self.resume(found)
        self.progress.rollbacks = rollbacks
        self.guard.in_row = 0
        self.trackers.rewind(found.step)
        self.warn(
            f"warning: rolled back from step {from_step} to {found.step}, on with other images ({rollbacks} of {MAX_ROLLBACKS})"
        )

    def lr_at(self, step: int) -> float:
        return lr_at(self.config.schedule, self.peak_lr, step, self.plan.steps_per_epoch, self.config.epochs)

    def state(self) -> dict[str, Any]:
        """Everything needed to go on, and to know what it belongs to."""
        return {
            "step": self.progress.step,
            "model": self.parts.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.parts.optimizer.state_dict(),
            "scaler": self.parts.precision.scaler.state_dict(),
            "progress": vars(self.progress),
            "fingerprint": self.parts.fingerprint,
            "config": redacted(self.config),
            "class_names": self.parts.views.images.class_names,
        }

    def _sync_gradients(self, sync: bool) -> contextlib.AbstractContextManager[None]:
        if sync or not isinstance(self.wrapped, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.wrapped.no_sync()

    def _set_drop_rate(self, step: int) -> None:
        rate = rate_at(self.config.model.drop_path, step, self.plan.total_steps)
        if rate != self.drop_rate:
            set_drop_path_rate(self.parts.model, rate, self.config.model.drop_path.over_depth)
            self.drop_rate = rate

    def _log_training(self, sums: DeviceSums, steps: int, started: float) -> None:
        totals = sums.reduce()  # waits for the device, so the clock is read after it
        seconds = time.perf_counter() - started
        step = self.progress.step
        record = {
            "train/loss": totals["loss"] / (totals["finite_steps"] or math.nan),
            "train/lr": self.lr_at(step - 1),
            "train/grad_norm": totals["grad_norm"] / (totals["finite_steps"] or math.nan),
            "train/drop_path": self.drop_rate,
            "train/images_per_s": steps * self.plan.batch_size / seconds,
            "train/data_wait": totals["data_wait"] / self.world.size / seconds,
            "train/skipped_steps": steps - totals["finite_steps"] / self.world.size,
            "train/bad_images": totals["bad_images"],
        }
        if self.full_speed:
            record["train/mfu"] = record["train/images_per_s"] / self.full_speed
        if self.parts.precision.scaler.is_enabled():
            record["train/loss_scale"] = self.parts.precision.scaler.get_scale()
        self._log(record)
        self.parts.bad_images.count_in((step - 1) // self.plan.steps_per_epoch, int(totals["bad_images"]))

    def _validate(self) -> bool:
        """Validate the weights and, where there are, their averages (which then decide); True where top-1 is a new best."""
        progress, record = self.progress, dict[str, float]()
        for prefix, weights, model in (
            ("val", "raw", self.parts.model),
            ("val_ema", "ema", self.ema and self.ema.module),
        ):
            if model is not None:
                with GateMeans(model, self.world) as watched:
                    result = self.parts.evaluate(model)
                record |= {f"{prefix}/{key}": value for key, value in result.metrics().items()}
                gates, validated = watched.result(), weights
        improved = result.top1 > progress.best_top1
        progress.best_top1 = max(result.top1, progress.best_top1)
        progress.last = record | {"val/best_top1": progress.best_top1} | means(gates)
        progress.validated_step = progress.step
        self._log(progress.last)
        if self.world.is_main:
            self.trackers.show(progress.step, self.parts.views.validation(result, gates, validated))
        return improved

    def _log(self, record: dict[str, float]) -> None:
        step = self.progress.step
        self.trackers.log(step, {"epoch": self.plan.epoch_at(step), "images": step * self.plan.batch_size, **record})

    def _save(self, improved: bool) -> None:
        self._heed_outcome()
        self._settle_save()
        if self.world.is_main:
            self.writer.save(self.state(), improved)

    def _settle_save(self) -> None:
        """Wait for the save before, all ranks together: none must take rank 0, waiting for its disk, for a rank that hangs."""
        while self.world.ask(self.writer.busy).result():
            time.sleep(0.05)


def seed_step(seed: int, step: int, world: World) -> None:
    """Seed torch's generators, on the host and on the device, from (seed, step, rank): nothing random depends on history."""
    key = stream_key("step", seed, step, world.rank)
    torch.default_generator.manual_seed(key)
    if world.device.type == "cuda":
        torch.cuda.default_generators[world.device.index].manual_seed(key)
