"""What only a GPU can show: fp16 with loss scaling, compilation, exact resume there, and a step that never waits."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.sources import open_sources
from tests.conftest import Run
from vip import config
from vip.config import RunConfig
from vip.distributed import World
from vip.engine import SUMS, Trainer
from vip.metrics import DeviceSums
from vip.parts import build
from vip.plan import make_plan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_every_precision_learns_eager_and_compiled(
    run: Run, tmp_path: Path, digits: Path, precision: str, compiled: str
) -> None:
    arguments = (
        "experiment=digits",
        f"data.root={digits}",
        "epochs=4",
        f"precision={precision}",
        f"compile={compiled}",
    )
    run("train.py", *arguments, "model.drop_path.rate=0.1", "ema_decay=0.9")
    seen = losses(tmp_path / "runs/digits")
    assert seen[-1] < 0.8 * seen[0]
    assert all(loss is not None for loss in seen)
    run("eval.py", "checkpoint=runs/digits", f"precision={precision}")
    assert json.loads((tmp_path / "runs/digits/eval.json").read_text())["top1"] > 60


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_a_resumed_run_ends_with_the_same_bits(
    run: Run, tmp_path: Path, digits: Path, precision: str, compiled: str
) -> None:
    arguments = ("experiment=digits", "augment=vip", f"data.root={digits}", "max_steps=20", "save_every=9", "epochs=4",
                 "model.drop_path.rate=0.2", "ema_decay=0.9", "micro_batch=32", f"precision={precision}",
                 f"compile={compiled}")  # fmt: skip
    run("train.py", *arguments, "name=whole")
    run("train.py", *arguments, "name=cut")
    checkpoints = tmp_path / "runs/cut/checkpoints"
    (checkpoints / "step_0000000020.safetensors").unlink()  # as if killed after the save at step 18
    run("train.py", *arguments, "name=cut")
    one, other = (
        load_file(tmp_path / f"runs/{name}/checkpoints/step_0000000020.safetensors") for name in ("whole", "cut")
    )
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def trainer_on_gpu(digits: Path, folder: Path, precision: str) -> tuple[Trainer, DeviceSums]:
    overrides = ["experiment=digits", "augment=vip", f"data.root={digits}", f"precision={precision}", "data.workers=0",
                 "ema_decay=0.9", "optimizer.clip_grad=1", "model.drop_path.rate=0.1", "micro_batch=32",
                 f"runs_dir={folder}"]  # fmt: skip
    run = config.parse(RunConfig, config.compose("train", overrides))
    world = World(0, 1, torch.device("cuda", 0))
    sources = open_sources(run.data)
    plan = make_plan(run.batch_size, run.micro_batch, 1, len(sources[0]), run.total_epochs, None)
    return Trainer(run, plan, world, build(run, plan, world, *sources, None, print)), DeviceSums(SUMS, world)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_step_never_waits_for_the_device(digits: Path, tmp_path: Path, precision: str) -> None:
    trainer, sums = trainer_on_gpu(digits, tmp_path, precision)
    batches = trainer.parts.batches(0, 0)
    for step in range(3):  # allocations and lazy initialisation
        trainer.train_step(batches, step, sums)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3, 8):
            trainer.train_step(batches, step, sums)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sums.reduce()["finite_steps"] >= 5


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_bad_step_is_left_out_on_the_device_and_written_down(digits: Path, tmp_path: Path, precision: str) -> None:
    trainer, sums = trainer_on_gpu(digits, tmp_path, precision)
    finish = trainer.parts.finish
    trainer.parts.finish = lambda batch, step, micro: (
        finish(batch, step, micro)[0] * (torch.nan if step == 20 else 1), finish(batch, step, micro)[1]
    )  # fmt: skip
    batches = trainer.parts.batches(0, 0)
    for step in range(20):
        trainer.train_step(batches, step, sums)
    before = [p.detach().clone() for p in trainer.parts.model.parameters()]
    trainer.train_step(batches, 20, sums)
    assert all(torch.equal(p, q) for p, q in zip(trainer.parts.model.parameters(), before, strict=True))
    assert not list(trainer.config.folder.glob("nan_step_20")), "the host does not know yet"
    trainer.train_step(batches, 21, sums)
    assert list(trainer.config.folder.glob("nan_step_20/batch_rank_0.json"))
    assert any(not torch.equal(p, q) for p, q in zip(trainer.parts.model.parameters(), before, strict=True))
