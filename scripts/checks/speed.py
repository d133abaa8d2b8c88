"""Images a second: what the loader makes and what the network takes, both as configured."""

import itertools
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from data import decoders
from data.augment import TrainTransform
from data.batch import Batch
from data.loader import train_loader
from data.order import BatchPlan, EpochOrder
from data.sources import Source
from scripts.checks.row import Row, Setup
from vip.config import RunConfig
from vip.distributed import World
from vip.engine import SUMS, Trainer
from vip.metrics import DeviceSums
from vip.models.build import input_spec
from vip.parts import build
from vip.plan import Plan, make_plan

LOADER_S = 5.0
ROUNDS = 20  # batches of each worker that will do, if they come sooner
LOADER_BATCH = 32  # small, so that many come in the time; the speed of an image is the same
WARM_UP_STEPS = 3  # compilation, and the choice of kernels
STEPS_S = 1.0
MAX_STEPS = 30
SMALL = 2_000_000  # parameters of a network that a CPU trains


def loader(setup: Setup) -> Iterator[Row]:
    world, workers = setup.world, setup.run.data.workers
    world.ask(False).result()  # the ranks of a host load at the same time, as in training
    if setup.train_set is None or setup.plan is None or setup.model is None:
        yield Row("skipped", "needs data, batch and network")
        return
    spec = input_spec(setup.run.model, setup.model)
    size = min(setup.plan.micro_batch, LOADER_BATCH)
    # Another order each time: images that were read before come from memory, and would flatter the disk.
    order = EpochOrder(len(setup.train_set), time.time_ns() % 2**32, setup.run.augment.repeats)
    batches = train_loader(
        setup.train_set,
        TrainTransform(setup.run.augment, spec.size, spec.mean),
        order,
        BatchPlan(size * setup.num_processes, setup.num_processes, world.rank),
        decoder=decoders.choose(setup.run.data.decoder),
        start_step=0,
        total_steps=1_000_000,
        workers=workers,
        pin=world.device.type == "cuda",
    )
    try:
        for _ in range(max(1, workers)):
            next(batches)  # the workers have begun
        begun, num_batches, elapsed = time.perf_counter(), 0, 0.0
        while elapsed < LOADER_S and num_batches < ROUNDS * max(1, workers):
            next(batches)
            num_batches, elapsed = num_batches + 1, time.perf_counter() - begun
    finally:
        batches.close()
    setup.loader_speed = num_batches * size / elapsed
    cores = len(os.sched_getaffinity(0)) / setup.num_processes_here
    found = f"{{}} images/s a process (data.workers={workers}; CPU cores a process: {cores:g})"
    yield Row("ok", found, figure=setup.loader_speed)


def training(setup: Setup) -> Iterator[Row]:
    """Whole steps on one device, without other ranks; then the loader against them."""
    device, workers = setup.world.device, setup.run.data.workers
    setup.world.ask(False).result()
    needed = {"data", "batch", "network", "precision", "compilation", "optimizer"}
    if setup.failed & needed or setup.train_set is None or setup.plan is None or setup.model is None:
        yield Row("skipped", "after the errors above")
        return
    if device.type == "cpu" and sum(parameter.numel() for parameter in setup.model.parameters()) > SMALL:
        yield Row("skipped", "too large a network for the CPU")
        return
    micro_batch = setup.plan.micro_batch if device.type == "cuda" else min(setup.plan.micro_batch, LOADER_BATCH)
    plan = make_plan(micro_batch, None, 1, len(setup.train_set), setup.run.total_epochs, None)
    try:
        with tempfile.TemporaryDirectory() as folder:
            speed = _steps_per_s(replace(setup.run, runs_dir=folder), plan, setup.train_set, device) * micro_batch
    except torch.OutOfMemoryError:
        raise ValueError(
            f"micro_batch={micro_batch}: too much for the GPU's memory; micro_batch={max(1, micro_batch // 2)} keeps the global "
            "batch by accumulation"
        ) from None
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    kind = "GPU" if device.type == "cuda" else "process on the CPU"
    yield Row("ok", f"{{}} images/s a {kind}, {micro_batch} at a time in {setup.run.precision.name}", figure=speed)
    if device.type == "cuda" and setup.loader_speed is not None:
        ratio = setup.loader_speed / speed
        keeps_up = ratio >= 1 and workers > 0
        yield Row(
            "ok" if keeps_up else "warning",
            f"the loader makes {{}} times what the network takes{'' if keeps_up else ': the GPU will wait for it'}",
            ""
            if keeps_up
            else f"raise data.workers={workers} up to the cores there are, keep the images on a local disk",
            figure=ratio,
        )


def _steps_per_s(run: RunConfig, plan: Plan, images: Source, device: torch.device) -> float:
    """Optimizer steps of one process, each the trainer's own, on noise."""
    world = World(0, 1, device)
    parts = build(run, plan, world, images, images, None, print)
    trainer = Trainer(run, plan, world, parts)
    noise = torch.randint(0, 256, (plan.micro_batch, *parts.image_size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    zeros = torch.zeros(plan.micro_batch, dtype=torch.int64)
    labels = torch.arange(plan.micro_batch) % len(images.class_names)
    batch = Batch(noise, labels, zeros, torch.zeros(plan.micro_batch, 4, dtype=torch.int64), zeros)
    if device.type == "cuda":
        batch = batch._replace(images=batch.images.pin_memory())
    batches, sums = itertools.repeat(batch), DeviceSums(SUMS, world)

    def seconds(steps: range) -> float:
        begun = time.perf_counter()
        for step in steps:
            trainer.train_step(batches, step, sums)
        sums.reduce()  # waits for the device
        return time.perf_counter() - begun

    seconds(range(WARM_UP_STEPS))
    count = min(MAX_STEPS, max(3, math.ceil(STEPS_S / seconds(range(WARM_UP_STEPS, WARM_UP_STEPS + 1)))))
    first = WARM_UP_STEPS + 1
    return count / seconds(range(first, first + count))
