"""A run that is killed and goes on ends with the bits of a run that was left alone."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Run, command, environment

pytestmark = pytest.mark.e2e

# Everything that draws random numbers or keeps state: RandAugment, erasing, mixing, stochastic depth, accumulation, EMA.
FULL = (
    "experiment=digits", "augment=vip", "augment.hflip=0", "model.drop_path.rate=0.2", "model.drop_path.over_training=ramp",
    "epochs=1", "max_steps=30", "schedule.warmup_epochs=0", "batch_size=64", "micro_batch=16", "ema_decay=0.9",
    "save_every=6", "log_every=3", "optimizer.clip_grad=5",
)  # fmt: skip


def final_tensors(folder: Path, step: int = 22) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step_{step:010d}.safetensors")


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("processes", [0, 2])
def test_killed_in_mid_epoch_and_resumed_ends_with_the_same_bits(
    run: Run, tmp_path: Path, digits: Path, processes: int
) -> None:
    arguments = (*FULL, f"data.root={digits}")
    run("train.py", *arguments, "name=untouched", "data.workers=1", processes=processes)

    killed = subprocess.Popen(
        command("train.py", *arguments, "name=killed", "data.workers=2", processes=processes),
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    folder = tmp_path / "runs" / "killed"
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "step_0000000006.safetensors").exists():
        assert killed.poll() is None, killed.communicate()[0].decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (folder / "checkpoints" / "step_0000000022.safetensors").exists(), (
        "the kill came too late to prove anything"
    )

    resumed = run("train.py", *arguments, "name=killed", "data.workers=0", processes=processes)
    assert "goes on from step" in resumed.stdout
    untouched = tmp_path / "runs" / "untouched"
    assert_same_bits(final_tensors(untouched), final_tensors(folder))
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (untouched, folder)]
    timeless = [
        [{k: v for k, v in line.items() if k not in ("train/images_per_s", "train/data_wait")} for line in part]
        for part in lines
    ]
    assert [line["step"] for line in timeless[0]] == [line["step"] for line in timeless[1]]
    assert timeless[0][-1] == timeless[1][-1]
