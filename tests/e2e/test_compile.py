"""torch.compile through the real command: it learns what eager learns, and resumes to the same bits."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Run

pytestmark = pytest.mark.e2e


@pytest.mark.timeout(600)
def test_compiled_runs_follow_eager_ones_and_resume_exactly(run: Run, tmp_path: Path, digits: Path) -> None:
    arguments = ("experiment=digits", f"data.root={digits}", "max_steps=4", "save_every=2", "data.workers=0",
                 "model.drop_path.rate=0.1", "model.drop_path.over_training=ramp", "ema_decay=0.9", "log_every=1")  # fmt: skip
    run("train.py", *arguments, "name=eager")
    run("train.py", *arguments, "name=compiled", "compile=true")
    last = tmp_path / "runs/compiled/checkpoints/step_0000000004.safetensors"
    whole, compiled_losses = load_file(last), losses(tmp_path / "runs/compiled")
    last.unlink()  # as if killed after the save at step 2
    run("train.py", *arguments, "name=compiled", "compile=true")
    resumed = load_file(last)
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    eager_losses = losses(tmp_path / "runs/eager")
    assert compiled_losses == pytest.approx(eager_losses, rel=1e-2)  # a compiled network draws other drop masks
    assert compiled_losses != eager_losses, "bits as in eager: was anything compiled?"


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]
