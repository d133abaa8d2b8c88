"""The configuration against this machine and its data: what train.py would refuse, and what it would not notice."""

import os
import shutil
from collections.abc import Iterator

import torch

from data import decoders, native
from data.config import IMAGENET
from data.sources import NUM_CLASSES, SyntheticSource, open_sources
from scripts.checks.row import Row, Setup
from vip import micro_batch
from vip.models.build import build_model, input_spec
from vip.optim import APEX, build_optimizer
from vip.precision import Precision

IMAGENET_COUNTS = (IMAGENET["train"], IMAGENET["val"])
AMPERE = (8, 0)


def data(setup: Setup) -> Iterator[Row]:
    config = setup.run.data
    train_set, val_set = open_sources(config)
    setup.train_set = train_set
    counts = (len(train_set), len(val_set))
    found = f"{config.kind}: {len(train_set.class_names):,} classes, {counts[0]:,} training and {counts[1]:,} validation images"
    differences = [
        f"{abs(count - expected):,} {'more' if count > expected else 'fewer'} than ImageNet's {expected:,} {split} images"
        for split, count, expected in zip(("training", "validation"), counts, IMAGENET_COUNTS, strict=True)
        if count != expected
    ]
    if config.kind == "imagenet" and differences:
        remedy = (
            "scripts/prepare_imagenet.py makes the tree from the archives; results will not compare with published ones"
        )
        yield Row("warning", f"{found}: {' and '.join(differences)}", remedy, must_agree=True)
    else:
        yield Row("ok", found, must_agree=True)


def decoder(setup: Setup) -> Iterator[Row]:
    """Which one `data.decoder` leads to: `auto` takes the slower one without a word where the other was not built."""
    asked = setup.run.data.decoder
    found = decoders.choose(asked).name
    if found != asked and found == "torch":
        cause, _, remedy = native.reason().rpartition(": ")
        yield Row("warning", f"torch's, in processes: {cause}", remedy, must_agree=True)
    else:
        yield Row("ok", f"{found} (data.decoder={asked})", must_agree=True)


def batch(setup: Setup) -> Iterator[Row]:
    images = setup.train_set
    some = images or SyntheticSource(
        setup.run.batch_size, 1000, "train"
    )  # without data only the sharing out is checked
    setup.run, setup.plan = micro_batch.settle(setup.run, setup.world, setup.num_processes, some)
    described = setup.plan.describe()
    yield Row("ok", described if images is not None else described.partition(";")[0])


def network(setup: Setup) -> Iterator[Row]:
    config = setup.run.model
    if setup.train_set is not None:
        num_classes = len(setup.train_set.class_names)
    else:
        num_classes = setup.run.data.num_classes or NUM_CLASSES.get(setup.run.data.kind, 1000)
    setup.model = build_model(config, num_classes)
    height, width = input_spec(config, setup.model).size
    millions = sum(parameter.numel() for parameter in setup.model.parameters()) / 1e6
    yield Row("ok", f"{config.name}, {millions:.1f} M parameters, {height}x{width}, {num_classes:,} classes")


def precision(setup: Setup) -> Iterator[Row]:
    device = setup.world.device
    Precision(setup.run.precision, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    yield Row("ok", f"{setup.run.precision.name} on {name}")


def compilation(setup: Setup) -> Iterator[Row]:
    if not setup.run.compile:
        yield Row("skipped", "compile=false")
        return
    variable, *names = ("CC", "gcc", "clang") if setup.world.device.type == "cuda" else ("CXX", "g++", "clang++")
    compilers = [os.environ.get(variable, ""), *names]
    if not any(shutil.which(compiler) for compiler in compilers if compiler):
        found = f"compile=true: torch.compile calls {' or '.join(names)}, and there is none here"
        yield Row("error", found, "install one, or set compile=false")
        return
    capability = torch.cuda.get_device_capability(setup.world.device) if setup.world.device.type == "cuda" else AMPERE
    if capability < AMPERE:
        name = torch.cuda.get_device_name(setup.world.device)
        yield Row(
            "warning",
            f"compile=true on {name}: Triton is made for Ampere and later; before, its kernels are slow and may fail",
            "compile=false, or measure both for an hour",
        )
    else:
        yield Row("ok", "compile=true")


def optimizer(setup: Setup) -> Iterator[Row]:
    """Built as train.py builds it; apex's kernels themselves are asked for, since its package imports without them."""
    if setup.model is None:
        yield Row("skipped", "there is no network to build it for")
        return
    setup.optimizer = build_optimizer(setup.run.optimizer, setup.model, setup.world.device)
    name = setup.run.optimizer.name
    yield Row("ok", f"{name}, with apex's CUDA kernels" if name in APEX else f"{name} (apex not configured)")
