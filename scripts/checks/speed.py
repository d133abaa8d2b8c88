"""Images a second: what the loader makes and what the network takes, both as configured."""

import os
import time
from collections.abc import Iterator

from data import decoders
from data.augment import TrainTransform
from data.loader import train_loader
from data.order import BatchPlan, EpochOrder
from scripts.checks.row import Row, Setup
from vip.models.build import input_spec
from vip.speed import CPU_PARAMETERS, measure

LOADER_S = 5.0
ROUNDS = 20  # batches of each worker that will do, if they come sooner
LOADER_BATCH = 32  # small, so that many come in the time; the speed of an image is the same


def loader(setup: Setup) -> Iterator[Row]:
    world, workers = setup.world, setup.run.data.workers
    world.ask(False).result()  # the ranks of a host load at the same time, as in training
    if setup.train_set is None or setup.plan is None or setup.model is None or "decoder" in setup.failed:
        yield Row("skipped", "needs data, batch, network and decoder")
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
    needed = {"data", "batch", "network", "precision", "compilation", "optimizer", "decoder"}
    if setup.failed & needed or setup.train_set is None or setup.plan is None or setup.model is None:
        yield Row("skipped", "after the errors above")
        return
    if device.type == "cpu" and sum(parameter.numel() for parameter in setup.model.parameters()) > CPU_PARAMETERS:
        yield Row("skipped", "too large a network for the CPU")
        return
    micro_batch = setup.plan.micro_batch if device.type == "cuda" else min(setup.plan.micro_batch, LOADER_BATCH)
    speed = measure(setup.run, micro_batch, setup.train_set, device).images_per_s
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
