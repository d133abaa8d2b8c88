"""The profile on a GPU: bound by compute, by data, by the host where that is so, and kernels named by their operations."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import Run
from vip.profiling import Profile

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def profiled(folder: Path, width: int, depth: int, loading: float = 0.0) -> str:
    """What is said of 25 steps of a network of `depth` layers with a loader that takes `loading` seconds."""
    device = torch.device("cuda", torch.cuda.current_device())

    def batches() -> Iterator[Tensor]:
        for _ in itertools.count():
            time.sleep(loading)
            yield torch.ones(width, width, device=device)

    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.GELU())]
    model = nn.Sequential(*layers).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    profile = Profile(folder, 0, device, 0)
    source, said = profile.watch(batches()), None
    for _ in range(25):
        with profile.step():
            model(next(source)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        said = profile.report() or said
    assert said
    return said


def test_large_products_are_bound_by_compute(tmp_path: Path) -> None:
    said = profiled(tmp_path, width=8192, depth=4)
    assert "\nbound by compute: " in said
    assert said.splitlines()[2].split()[0] in ("mm", "addmm")


def test_a_slow_loader_is_bound_by_data(tmp_path: Path) -> None:
    assert "\nbound by data: " in profiled(tmp_path, width=256, depth=2, loading=0.05)


def test_many_small_operations_are_bound_by_the_host(tmp_path: Path) -> None:
    assert "\nbound by host: " in profiled(tmp_path, width=16, depth=200)


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_the_training_command_is_profiled(run: Run, tmp_path: Path, digits: Path, compiled: str) -> None:
    said = run(
        "train.py", "experiment=digits", f"data.root={digits}", "max_steps=25", "profile=true", f"compile={compiled}",
        "precision=bf16",
    ).stdout  # fmt: skip
    assert "profile of steps 10 to 20: " in said
    assert "\nbound by " in said
    assert (tmp_path / "runs/digits/trace.json.gz").stat().st_size > 10_000
