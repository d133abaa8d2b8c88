"""Steps that are not finite: left out, written down, and too many of them in a row end in a stop or a rollback."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from data.batch import Batch
from tests.test_engine import CLASSES, SIDE, network, parameters, settings, trainer_of
from vip import checkpoint
from vip.config import ConfigError, RunConfig
from vip.engine import Trainer
from vip.guard import Guard


def poison(trainer: Trainer, steps: set[int], value: float = torch.nan, rollbacks: int = 0) -> None:
    """The images of these steps become `value`, in the first passes of the run alone."""
    finish = trainer.parts.finish

    def finish_poisoned(batch: Batch, step: int, micro: int) -> tuple[Tensor, Tensor]:
        images, targets = finish(batch, step, micro)
        return images * value if step in steps and trainer.progress.rollbacks <= rollbacks else images, targets

    trainer.parts.finish = finish_poisoned


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "sgd"])
def test_a_bad_step_leaves_no_trace_in_weights_and_moments(tmp_path: Path, value: float, optimizer: str) -> None:
    run = settings(f"optimizer={optimizer}", "micro_batch=8", "save_every=1", "keep=99", runs_dir=tmp_path)
    trainer, recorder = trainer_of(run, network())
    poison(trainer, {4}, value)
    trainer.fit()
    before, after = (checkpoint.read(run.folder / f"checkpoints/step_{n:010d}.safetensors").state for n in (4, 5))
    for part in ("model", "optimizer"):
        one, other = (torch.cat([t.double().reshape(-1) for t in tensors_of(state[part])]) for state in (before, after))
        assert torch.equal(one, other)
    assert parameters(trainer).isfinite().all()
    skipped = recorder.values("train/skipped_steps")
    assert {step: n for step, n in skipped.items() if n} == {5: 1}
    losses = recorder.values("train/loss")
    assert [step for step, loss in losses.items() if loss != loss] == [5]


def tensors_of(node: object) -> list[Tensor]:
    if isinstance(node, Tensor):
        return [node]
    values = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [tensor for value in values for tensor in tensors_of(value)]


def test_a_loss_that_is_not_finite_counts_even_where_its_gradients_are(tmp_path: Path) -> None:
    trainer, recorder = trainer_of(settings(runs_dir=tmp_path), network())
    finish = trainer.parts.finish
    trainer.parts.finish = lambda batch, step, micro: (
        finish(batch, step, micro)[0],
        finish(batch, step, micro)[1] * (torch.inf if step == 2 else 1),
    )
    trainer.fit()
    assert [step for step, n in recorder.values("train/skipped_steps").items() if n] == [3]


def test_running_statistics_are_not_spoiled(tmp_path: Path) -> None:
    def normed() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3 * SIDE**2), nn.Linear(3 * SIDE**2, CLASSES))

    trainer, recorder = trainer_of(settings(runs_dir=tmp_path), normed())
    poison(trainer, {3})
    trainer.fit()
    assert all(buffer.isfinite().all() for buffer in trainer.parts.model.buffers())
    assert trainer.parts.model[1].num_batches_tracked == 11  # type: ignore[index]
    assert all(loss == loss for loss in recorder.values("val/loss").values())


def test_the_dump_holds_the_state_and_the_images_of_the_step(tmp_path: Path) -> None:
    run = settings("micro_batch=8", "save_every=1", "keep=99", runs_dir=tmp_path)
    said: list[str] = []
    trainer, _ = trainer_of(run, network())
    trainer.warn = said.append
    poison(trainer, {6})
    trainer.fit()
    folder = run.folder / "nan_step_6"
    dumped, before = (
        checkpoint.read(path).state
        for path in (folder / "state.safetensors", run.folder / f"checkpoints/step_{6:010d}.safetensors")
    )
    assert dumped["step"] == 6
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(dumped), tensors_of(before), strict=True))
    facts = json.loads((folder / "batch_rank_0.json").read_text())
    assert (facts["step"], facts["loss"], facts["loss_scale"]) == (6, "nan", 1)
    trained = [batch.indices.tolist() for batch, _ in zip(trainer.parts.batches(6, 0), range(2), strict=False)]
    assert [batch["indices"] for batch in facts["batches"]] == trained
    assert len(said) == 1
    assert f"python scripts/replay_step.py {folder}" in said[0]


def test_too_many_in_a_row_stop_the_run_with_the_cause(tmp_path: Path) -> None:
    run = settings("max_skipped=3", "epochs=2", runs_dir=tmp_path)
    trainer, _ = trainer_of(run, network())
    poison(trainer, {1, 2, 4, 5, 6, 7})
    with pytest.raises(ConfigError, match="not finite in 3 steps in a row") as stopped:
        trainer.fit()
    assert str(stopped.value).startswith("step 6: loss nan")
    assert "lower optimizer.lr=0.002" in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert sorted(path.name for path in run.folder.glob("nan_step_*")) == ["nan_step_1", "nan_step_4", "nan_step_6"]


def test_rollback_goes_on_from_the_newest_checkpoint_with_other_images(tmp_path: Path) -> None:
    run = settings("max_skipped=2", "on_nan=rollback", "save_every=2", "keep=99", runs_dir=tmp_path)
    trainer, recorder = trainer_of(run, network())
    said: list[str] = []
    trainer.warn = said.append
    poison(trainer, {5, 6})
    progress = trainer.fit()
    assert (progress.step, progress.rollbacks) == (12, 1)
    assert "rolled back from step 7 to 6" in said[-1]
    steps = [step for step, record in recorder.records if "train/loss" in record]
    assert steps == list(range(1, 13)), "each step is told once"
    again, _ = trainer_of(
        settings("max_skipped=2", "on_nan=rollback", "save_every=2", "keep=99", runs_dir=tmp_path), network()
    )
    again.resume(checkpoint.read(run.folder / "checkpoints/step_0000000010.safetensors"))
    again.fit()
    assert torch.equal(parameters(again), parameters(trainer)), "going on after a rollback is exact"


def test_rollbacks_are_bounded(tmp_path: Path) -> None:
    run = settings("max_skipped=2", "on_nan=rollback", "save_every=2", runs_dir=tmp_path)
    trainer, _ = trainer_of(run, network())
    poison(trainer, set(range(5, 12)), rollbacks=9)
    with pytest.raises(ConfigError, match="not finite in 2 steps in a row"):
        trainer.fit()
    assert trainer.progress.rollbacks == 3


def test_without_a_checkpoint_there_is_nothing_to_roll_back_to(tmp_path: Path) -> None:
    trainer, _ = trainer_of(settings("max_skipped=2", "on_nan=rollback", runs_dir=tmp_path), network())
    poison(trainer, {1, 2})
    with pytest.raises(ConfigError, match="not finite in 2 steps in a row"):
        trainer.fit()


def scaled(run: RunConfig) -> Trainer:
    """With torch's real loss scaling, which fp16 brings along on a GPU."""
    trainer, _ = trainer_of(run, network())
    trainer.parts.precision = copy.copy(trainer.parts.precision)
    trainer.parts.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    trainer.guard = Guard(trainer.parts.model, trainer.parts.optimizer, trainer.parts.precision.scaler)
    return trainer


def test_an_overflow_of_scaled_gradients_is_no_event(tmp_path: Path) -> None:
    run = settings("max_skipped=4", runs_dir=tmp_path)
    trainer = scaled(run)
    scale_with(trainer, lambda scale: 1e36 if scale > 2**8 else 1.0)
    trainer.fit()
    assert trainer.parts.precision.scaler.get_scale() <= 2**9
    assert not list(run.folder.glob("nan_step_*"))


@pytest.mark.parametrize("at", [1, 4, 7])
def test_the_loss_scale_goes_on_exactly(tmp_path: Path, at: int) -> None:
    ends = []
    for name in ("untouched", "resumed"):
        run = settings("save_every=1", "keep=99", runs_dir=tmp_path / name)
        trainer = scaled(run)
        scale_with(trainer, lambda scale: 1e36 if scale > 2**8 else 1.0)
        if name == "resumed":
            trainer.resume(checkpoint.read(tmp_path / f"untouched/digits/checkpoints/step_{at:010d}.safetensors"))
        trainer.fit()
        ends.append(checkpoint.read(run.folder / "checkpoints/step_0000000012.safetensors").state)
    assert ends[0]["scaler"] == ends[1]["scaler"]
    assert ends[0]["scaler"]["scale"] < 2**10
    assert all(torch.equal(a, b) for a, b in zip(*map(tensors_of, ends), strict=True))


def test_an_overflow_without_end_stops_with_the_cause(tmp_path: Path) -> None:
    run = settings("max_skipped=4", runs_dir=tmp_path)
    trainer = scaled(run)
    scale_with(trainer, lambda scale: 1e38)
    with pytest.raises(ConfigError, match="fp16 overflows even at a loss scale of 128") as stopped:
        trainer.fit()
    assert "precision=bf16" in str(stopped.value)
    assert [path.name for path in run.folder.glob("nan_step_*")] == ["nan_step_3"]


def scale_with(trainer: Trainer, factor: Callable[[float], float]) -> None:
    """Gradients times `factor(loss scale)`, on their way back: what is finite in the loss need not be so in them."""
    for parameter in trainer.parts.model.parameters():
        parameter.register_hook(lambda gradient: gradient * factor(trainer.parts.precision.scaler.get_scale()))
