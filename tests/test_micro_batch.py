"""`micro_batch=auto`: the largest size that fits, and the same one again when a run goes on."""

from pathlib import Path

import pytest
import torch

from data.sources import SyntheticSource
from tests.conftest import Run
from tests.test_engine import settings
from tests.test_evaluate import ALONE
from vip import micro_batch, speed
from vip.checkpoint import Checkpoint
from vip.config import ConfigError
from vip.distributed import World

IMAGES = SyntheticSource(1000, 10, "train")
AUTO = settings("micro_batch=auto", "batch_size=24")


@pytest.mark.parametrize(("room", "size"), [(100, 24), (23.9, 12), (7, 6), (3.5, 3), (1.1, 1)])
def test_the_largest_share_of_the_batch_that_fits_is_taken(
    monkeypatch: pytest.MonkeyPatch, room: float, size: int
) -> None:
    network = speed.count(AUTO, 10)
    needed = network.num_parameters * 16 + network.image_bytes * room
    monkeypatch.setattr(micro_batch, "_free_bytes", lambda: int(needed / micro_batch.HEADROOM))
    run, plan = micro_batch.settle(AUTO, ALONE, 1, IMAGES)
    assert run.micro_batch == plan.micro_batch == size
    assert size * plan.accumulation == plan.batch_size == 24, "the global batch stays"


def test_where_nothing_fits_one_line_says_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batch, "_free_bytes", lambda: 1_000_000)
    with pytest.raises(ConfigError, match=r"micro_batch=auto: not even one image .*; model.checkpointing=true or"):
        micro_batch.settle(AUTO, ALONE, 1, IMAGES)


def test_a_run_that_goes_on_keeps_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batch, "_free_bytes", lambda: 1 << 40)
    found = Checkpoint(Path("x"), {"step": 3, "fingerprint": {"micro_batch": 4}})
    assert micro_batch.settle(AUTO, ALONE, 1, IMAGES, found)[0].micro_batch == 4
    assert micro_batch.settle(AUTO, ALONE, 4, IMAGES, found)[0].micro_batch == 6, (
        "four images do not divide a share of six"
    )


def test_a_number_that_was_given_stays() -> None:
    run, plan = micro_batch.settle(settings("micro_batch=8"), ALONE, 1, IMAGES)
    assert (run.micro_batch, plan.micro_batch, plan.accumulation) == (8, 8, 2)


def test_batch_size_auto_keeps_the_batch_of_the_recipe(run: Run, tmp_path: Path, digits: Path) -> None:
    done = run(
        "train.py", "experiment=digits", f"data.root={digits}", "batch_size=auto", "max_steps=1", "data.workers=0"
    )
    assert "plan      64 images a step = 1 process x 1 pass x 64;" in done.stdout
    assert "micro_batch: 64\n" in (tmp_path / "runs/digits/config.yaml").read_text()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_what_is_found_runs_and_twice_as_much_does_not() -> None:
    device = torch.device("cuda", 0)
    gpu = World(0, 1, device)
    run = settings("micro_batch=auto", "model=vip_s7", "batch_size=4096", "data=synthetic", "data.num_images=4096")
    torch.cuda.set_per_process_memory_fraction(0.1)
    try:
        images = SyntheticSource(4096, 10, "train")
        size = micro_batch.settle(run, gpu, 1, images)[1].micro_batch
        assert speed.measure(run, size, images, device, True).num_steps == 1
        with pytest.raises(ConfigError, match="too much for the GPU's memory"):
            speed.measure(run, 2 * size, images, device, True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
