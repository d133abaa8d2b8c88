"""The trainer in one process: each promise of a step against arithmetic by hand, and going on from any step."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import vip  # noqa: F401 - registers vip_tiny
from data.batch import Batch
from data.finish import Normalize
from data.sources import SyntheticSource
from tests.test_evaluate import ALONE, FP32, batches
from vip import checkpoint, config
from vip.bad_images import BadImages
from vip.config import RunConfig
from vip.distributed import World
from vip.engine import SUMS, Parts, Trainer, seed_step
from vip.evaluate import evaluate
from vip.metrics import DeviceSums
from vip.optim import build_optimizer
from vip.plan import make_plan
from vip.schedule import lr_at
from vip.stochastic_depth import DropPath, rate_at
from vip.tracking import Fanout, Record, View
from vip.views import Views

NUM_IMAGES, CLASSES, SIDE = 70, 5, 8

PLAIN_SGD = (
    "optimizer=sgd", "optimizer.name=momentum", "optimizer.momentum=0", "optimizer.weight_decay=0", "optimizer.lr_batch=null",
    "schedule=constant", "schedule.warmup_epochs=0",
)  # fmt: skip


class Recorder:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.records: list[tuple[int, Record]] = []
        self.views: list[tuple[int, View]] = []

    def log(self, step: int, record: Record) -> None:
        self.records.append((step, record))

    def show(self, step: int, view: View) -> None:
        self.views.append((step, view))

    def rewind(self, step: int) -> None:
        self.records = [(s, record) for s, record in self.records if s <= step]

    def close(self, status: str) -> None:
        self.status = status

    def values(self, key: str) -> dict[int, float]:
        return {step: record[key] for step, record in self.records if key in record}


class Images:
    """Seventy random images; the batch of a step is a function of the step."""

    def __init__(self, side: int = SIDE) -> None:
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randint(256, (NUM_IMAGES, 3, side, side), dtype=torch.uint8, generator=generator)
        self.labels = torch.arange(NUM_IMAGES) % CLASSES

    def of_step(self, step: int, batch_size: int) -> Tensor:
        order = torch.randperm(NUM_IMAGES, generator=torch.Generator().manual_seed(step))
        return order[:batch_size]


def settings(*overrides: str, runs_dir: Path = Path("nowhere")) -> RunConfig:
    base = ("experiment=digits", "batch_size=16", "log_every=1", "epochs=3", "schedule.warmup_epochs=1")
    run = config.parse(RunConfig, config.compose("train", [*base, *overrides]))
    return dataclasses.replace(run, runs_dir=str(runs_dir))


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(3 * SIDE**2, 12),
        nn.LayerNorm(12),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(12, CLASSES),
    )


def trainer_of(run: RunConfig, model: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[Trainer, Recorder]:
    side = 32 if run.model.drop_path.rate else SIDE
    data, plan = (
        Images(side),
        make_plan(run.batch_size, run.micro_batch, 1, NUM_IMAGES, run.total_epochs, run.max_steps),
    )
    model.to(dtype)
    source = SyntheticSource(NUM_IMAGES, CLASSES, "train")

    def normalise(images: Tensor) -> Tensor:
        return images.to(dtype) / 255 - 0.5

    def batches_from(start: int, rollbacks: int = 0) -> Iterator[Batch]:
        for step in range(start, plan.total_steps):
            for part in data.of_step(step + 1000 * rollbacks, plan.batch_size).split(plan.micro_batch):
                unused = torch.zeros(len(part), 4, dtype=torch.int64)
                yield Batch(data.images[part], data.labels[part], part, unused, unused[:, 0], part[:0])

    parts = Parts(
        model=model,
        optimizer=build_optimizer(run.optimizer, model, ALONE.device),
        precision=FP32,
        batches=batches_from,
        finish=lambda batch, step, micro: (
            normalise(batch.images), nn.functional.one_hot(batch.labels, CLASSES).float()
        ),
        evaluate=lambda net: evaluate(
            net, batches(data.images, data.labels, 32), NUM_IMAGES, normalise, FP32, ALONE
        ),
        bad_images=BadImages(run.folder, source, 0.1, print),
        views=Views(source, Normalize((0.5,) * 3, (1.0,) * 3, ALONE.device)),
        fingerprint={"model": "test"},
        image_size=(side, side),
    )  # fmt: skip
    trainer, recorder = Trainer(run, plan, ALONE, parts), Recorder()
    trainer.trackers = Fanout([recorder])
    return trainer, recorder


def sums() -> DeviceSums:
    return DeviceSums(SUMS, ALONE)


def parameters(trainer: Trainer) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in trainer.parts.model.parameters()]).clone()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-5)])
@pytest.mark.parametrize("micro_batch", [1, 4, 8])
def test_accumulation_gives_the_update_of_the_whole_batch(
    dtype: torch.dtype, tolerance: float, micro_batch: int
) -> None:
    # SGD: Adam's first updates divide a gradient by its own size, and so show a rounding error as large as the update.
    ends = []
    for override in ("micro_batch=null", f"micro_batch={micro_batch}"):
        trainer, _ = trainer_of(settings(override, "optimizer=sgd", "optimizer.lr=0.1"), network(), dtype)
        start, data = parameters(trainer), trainer.parts.batches(0)
        for step in range(4):
            trainer.train_step(data, step, sums())
        assert (parameters(trainer) - start).abs().max() > 1e-2
        ends.append(parameters(trainer))
    assert torch.allclose(ends[0], ends[1], rtol=0, atol=tolerance)


def test_one_step_of_sgd_by_hand() -> None:
    run = settings(*PLAIN_SGD, "optimizer.lr=0.5", "micro_batch=4")
    trainer, _ = trainer_of(run, network())
    start, data = parameters(trainer), Images()
    chosen = data.of_step(0, 16)
    logits = trainer.parts.model(data.images[chosen].float() / 255 - 0.5)
    loss = nn.functional.cross_entropy(logits, data.labels[chosen])
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(trainer.parts.model.parameters()))])
    total = sums()
    trainer.train_step(trainer.parts.batches(0), 0, total)
    assert torch.allclose(parameters(trainer), start - 0.5 * gradient, atol=1e-6)
    logged = total.reduce()
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert logged["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)
    assert logged["finite_steps"] == 1


def test_clipping_limits_the_update_and_logs_the_norm_before_it() -> None:
    run = settings(*PLAIN_SGD, "optimizer.lr=1", "optimizer.clip_grad=0.01")
    trainer, _ = trainer_of(run, network())
    start, total = parameters(trainer), sums()
    trainer.train_step(trainer.parts.batches(0), 0, total)
    assert (parameters(trainer) - start).norm().item() == pytest.approx(0.01, rel=1e-3)
    assert total.reduce()["grad_norm"] > 0.1


def test_averaged_weights_by_hand() -> None:
    trainer, _ = trainer_of(settings("ema_decay=0.8"), network())
    assert trainer.ema is not None
    data, average = trainer.parts.batches(0), parameters(trainer)
    for step in range(6):
        trainer.train_step(data, step, sums())
        # timm's rule: up to the second step the average is the weights themselves, not what they began as.
        average = parameters(trainer) if step < 2 else 0.8 * average + 0.2 * parameters(trainer)
        kept = torch.cat([p.reshape(-1) for p in trainer.ema.module.parameters()])
        assert torch.allclose(kept, average, atol=1e-6), step
    assert not torch.allclose(average, parameters(trainer), atol=1e-6)


@pytest.mark.parametrize("over_training", ["ramp", "late"])
def test_scheduled_values_are_the_functions_of_the_step(tmp_path: Path, over_training: str) -> None:
    run = settings("model.drop_path.rate=0.2", f"model.drop_path.over_training={over_training}", "batch_size=14", "epochs=2",
                   runs_dir=tmp_path)  # fmt: skip
    trainer, recorder = trainer_of(run, timm.create_model("vip_tiny", num_classes=CLASSES, drop_path_rate=0.2))
    trainer.fit()
    steps = range(10)
    assert recorder.values("train/drop_path") == {s + 1: rate_at(run.model.drop_path, s, 10) for s in steps}
    assert recorder.values("train/lr") == {s + 1: lr_at(run.schedule, 2e-3, s, 5, 2) for s in steps}
    assert len(set(recorder.values("train/drop_path").values())) > 1
    rates = [m.rate.item() for m in trainer.parts.model.modules() if isinstance(m, DropPath)]
    assert max(rates) == pytest.approx(0.2)


def test_seed_step_depends_on_seed_step_and_rank_and_nothing_else() -> None:
    def draw(seed: int, step: int, rank: int) -> float:
        torch.rand(3)  # history, which must not matter
        seed_step(seed, step, World(rank, 4, ALONE.device))
        return torch.rand(()).item()

    coordinates = [(seed, step, rank) for seed in (0, 1) for step in (0, 1, 2) for rank in (0, 1)]
    drawn = {at: draw(*at) for at in coordinates}
    assert len(set(drawn.values())) == len(coordinates)
    assert {at: draw(*at) for at in reversed(coordinates)} == drawn


def test_the_host_waits_on_log_steps_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, recorder = trainer_of(settings("log_every=3", "eval_every=9", runs_dir=tmp_path), network())
    calls, reduce = [], DeviceSums.reduce

    def counted(sums: DeviceSums) -> dict[str, float]:
        calls.append(trainer.progress.step)
        return reduce(sums)

    monkeypatch.setattr(DeviceSums, "reduce", counted)
    trainer.fit()
    assert trainer.progress.step == 12
    assert calls == [3, 6, 9, 12]
    assert list(recorder.values("train/loss")) == [3, 6, 9, 12]


def test_logged_losses_are_means_over_the_steps_since_the_last(tmp_path: Path) -> None:
    every, third = (
        trainer_of(settings(f"log_every={n}", "micro_batch=8", "max_steps=7", runs_dir=tmp_path / str(n)), network())
        for n in (1, 3)
    )
    for trainer, _ in (every, third):
        trainer.fit()
    one, mean = every[1].values("train/loss"), third[1].values("train/loss")
    assert list(mean) == [3, 6, 7]
    assert mean[6] == pytest.approx((one[4] + one[5] + one[6]) / 3, rel=1e-12)
    assert mean[7] == pytest.approx(one[7], rel=1e-12)


@pytest.mark.parametrize("at", [2, 5, 6])
def test_going_on_from_any_step_is_exact(tmp_path: Path, at: int) -> None:
    overrides = ("ema_decay=0.7", "micro_batch=8", "save_every=1", "keep=99", "optimizer.clip_grad=1")
    untouched, said = trainer_of(settings(*overrides, runs_dir=tmp_path / "untouched"), network(dropout=0.3))
    untouched.fit()
    torch.rand(17)
    resumed, said_again = trainer_of(settings(*overrides, runs_dir=tmp_path / "resumed"), network(dropout=0.3))
    resumed.resume(checkpoint.read(tmp_path / f"untouched/digits/checkpoints/step_{at:010d}.safetensors"))
    assert resumed.progress.step == at
    resumed.fit()
    files = [tmp_path / f"{name}/digits/checkpoints/step_0000000012.safetensors" for name in ("untouched", "resumed")]
    one, other = (checkpoint.read(path).state for path in files)
    for part in ("model", "ema"):
        assert all(torch.equal(one[part][name], other[part][name]) for name in one[part])
    for index, moments in one["optimizer"]["state"].items():
        assert all(torch.equal(value, other["optimizer"]["state"][index][key]) for key, value in moments.items())
    assert one["progress"] == other["progress"]
    for key in ("train/loss", "train/grad_norm", "val/loss", "val_ema/top1", "val/best_top1"):
        assert {s: v for s, v in said.values(key).items() if s > at} == said_again.values(key)


def test_a_checkpoint_without_averages_starts_them_from_its_weights(tmp_path: Path) -> None:
    trainer, _ = trainer_of(settings("max_steps=2", runs_dir=tmp_path), network())
    trainer.fit()
    averaging, _ = trainer_of(settings("ema_decay=0.9"), network())
    averaging.resume(checkpoint.read(checkpoint.find(trainer.config.folder)))
    assert averaging.ema is not None
    assert torch.equal(torch.cat([p.reshape(-1) for p in averaging.ema.module.parameters()]), parameters(trainer))


def test_validations_best_and_saves_fall_where_they_should(tmp_path: Path) -> None:
    run = settings("eval_every=2", "save_every=3", "keep=9", "log_every=100", runs_dir=tmp_path)
    trainer, recorder = trainer_of(run, network())
    progress = trainer.fit()
    top1 = recorder.values("val/top1")
    assert list(top1) == [8, 12]
    assert recorder.values("val/best_top1") == {8: top1[8], 12: max(top1.values())}
    assert progress.last == {key: value for key, value in recorder.records[-1][1].items() if key.startswith("val")}
    folder = run.folder / "checkpoints"
    steps = sorted(int(path.stem.split("_")[1]) for path in folder.glob("step_*"))
    assert steps == [3, 6, 8, 9, 12]
    assert checkpoint.read(folder / "best.safetensors").step == min(
        step for step in top1 if top1[step] == progress.best_top1
    )


def test_the_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    run = settings("max_steps=1", runs_dir=tmp_path)
    trainer, _ = trainer_of(run, network())
    trainer.fit()
    state: dict[str, Any] = checkpoint.read(checkpoint.find(run.folder)).state
    assert state["fingerprint"] == {"model": "test"}
    assert state["config"] == json.loads(json.dumps(dataclasses.asdict(run)))
    assert (state["step"], state["ema"], state["scaler"]) == (1, None, {})
