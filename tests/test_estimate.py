"""`plan=true`: figures before the run, measured or counted, and nothing left behind."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import Run
from vip import speed
from vip.config import RunConfig, compose, parse
from vip.models.build import build_model

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU is wanted")


def planned(*overrides: str) -> RunConfig:
    return parse(RunConfig, compose("train", ["experiment=digits", *overrides]))


def figures(said: str) -> dict[str, str]:
    """The facts by their first word."""
    return dict(re.findall(r"^(network|steps|images|speed|GPU memory|all-reduce|disk) +(.*)$", said, re.MULTILINE))


@pytest.mark.e2e
def test_a_plan_says_what_the_run_would_take_and_leaves_no_trace(run: Run, tmp_path: Path, digits: Path) -> None:
    said = run("train.py", "experiment=digits", f"data.root={digits}", "plan=true", "ema_decay=0.9").stdout
    facts = figures(said)
    assert list(tmp_path.iterdir()) == []
    assert facts["network"] == "vip_tiny, 0.5 M parameters, fp32"
    assert facts["steps"].endswith("880 steps, 22 an epoch")
    assert facts["images"] == "56,320 to train on, of 1,437; 360 to validate on"
    assert float(facts["speed"].split()[0].replace(",", "")) > 0
    assert "for 4 checkpoints of 7.7 MB (keep=2, the best, one being written)" in facts["disk"]
    rows = [line.split() for line in said.splitlines() if re.match(r" +[1248] ", line)]
    assert [row[:2] for row in rows] == [["1", "1"], ["2", "2"], ["4", "4"], ["8", "8"]]
    assert "departs" not in said
    assert said.count("assumed: ") >= 6


@pytest.mark.e2e
@NO_GPU
def test_imagenet_is_planned_without_being_there_and_fp16_without_a_gpu(run: Run, tmp_path: Path) -> None:
    said = run("train.py", "model=vip_tiny", "plan=true", "plan_network=10", "micro_batch=64").stdout
    facts = figures(said)
    assert "of 1,281,167; 50,000 to validate on (ImageNet as it is known: data.root is not set)" in facts["images"]
    assert "193750 steps, 625 an epoch" in facts["steps"]
    assert "half-precision copies" in facts["GPU memory"]
    assert "64 images a pass" in facts["GPU memory"]
    assert "at 10 Gbit/s between nodes" in said
    assert "the hours are those of this CPU, in fp32" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.e2e
def test_two_ranks_print_one_plan_and_a_batch_that_will_not_divide_is_said(run: Run, digits: Path) -> None:
    said = run("train.py", "experiment=digits", f"data.root={digits}", "plan=true", "batch_size=12", processes=2).stdout
    assert said.count("network  ") == 1
    assert "= 2 processes x 1 pass x 6" in figures(said)["steps"]
    assert figures(said)["all-reduce"] == "1.9 MB of gradients a step: each of 2 processes sends 1.9 MB"
    assert "8 nodes: batch_size=12: does not divide over 16 processes" in said


@pytest.mark.e2e
def test_a_plan_refuses_what_the_run_would_refuse(run: Run, digits: Path) -> None:
    done = run("train.py", "experiment=digits", f"data.root={digits}", "plan=true", "micro_batch=48", status=2)
    assert done.stderr.count("\n") == 1
    assert "micro_batch can be 1, 2, 4, 8, 16, 32, 64" in done.stderr


def test_what_a_pass_keeps_is_counted_as_a_real_pass_keeps_it() -> None:
    run = planned()
    counted = speed.count(run, 10)
    model = build_model(run.model, 10).train()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        nn.functional.cross_entropy(model(torch.zeros(8, 3, 32, 32)), torch.zeros(8, 10))
    own = {tensor.data_ptr() for tensor in model.parameters()}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    real = sum(size for place, size in storages.items() if place not in own)
    assert counted.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert counted.cast_bytes == 0
    assert 8 * counted.image_bytes == pytest.approx(real, rel=0.02)


def test_half_precision_keeps_about_half_and_copies_of_the_matrices() -> None:
    whole = speed.count(planned(), 10)
    half = speed.count(planned("precision=fp16"), 10)
    assert 0.5 < half.image_bytes / whole.image_bytes < 0.8, "norms and softmaxes stay in float32"
    assert 0.9 < half.cast_bytes / (2 * half.num_parameters) < 1.5, "some of them twice"
    assert not torch.is_autocast_enabled("cuda")


@pytest.mark.parametrize("name", ["resnet18", "test_vit"])
def test_timm_s_networks_are_counted_too(name: str) -> None:
    counted = speed.count(planned("model=timm", f"model.name={name}"), 10)
    assert counted.image_bytes > 100_000
    assert counted.num_parameters > 10_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_memory_is_measured_and_near_the_estimate(run: Run) -> None:
    facts = figures(run("train.py", "model=vip_s7", "plan=true", "batch_size=64").stdout)
    measured = float(facts["GPU memory"].split()[0])
    assert "measured at 64 images a pass" in facts["GPU memory"]
    network = speed.count(parse(RunConfig, compose("train", ["model=vip_s7"])), 1000)
    estimated = 16 * network.num_parameters + network.cast_bytes + 64 * network.image_bytes
    assert 0.7 < measured * 1e9 / estimated < 1.6
