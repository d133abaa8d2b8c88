"""`micro_batch=auto`: as many images a pass as the devices have memory for; the global batch stays, by accumulation.

On GPUs a step of the trainer is tried, the largest size first; on CPUs, which would rather swap than say no, what a step
keeps is counted and held against the free memory.
"""

import dataclasses
import os
from functools import partial
from pathlib import Path

import torch

from data.sources import Source
from vip import checkpoint, speed
from vip.config import ConfigError, RunConfig
from vip.distributed import World
from vip.plan import Plan, divisors, make_plan

HEADROOM = 0.9  # of the memory: fragments, validation and libraries take some later on
BYTES_A_PARAMETER = 16  # weight, gradient and two moments


def settle(
    run: RunConfig, world: World, num_processes: int, images: Source, found: checkpoint.Checkpoint | None = None
) -> tuple[RunConfig, Plan]:
    """The run with a number for `micro_batch` where that is auto, the same on all ranks, and its plan.

    What goes on from `found` keeps its number, or the bits would differ. Raises ConfigError where not even one image
    fits, and what `make_plan` does.
    """
    plan_of = partial(
        make_plan, run.batch_size, world_size=num_processes, num_images=len(images), total_epochs=run.total_epochs,
        max_steps=run.max_steps,
    )  # fmt: skip
    if run.micro_batch != "auto":
        return run, plan_of(micro_batch=run.micro_batch)
    share = plan_of(micro_batch=None).micro_batch
    before = found.state["fingerprint"].get("micro_batch") if found is not None else None
    sizes = [before] if before in divisors(share) else reversed(divisors(share))
    for size in sizes:
        if size == before or not world.ask(not _fits(run, size, images, world)).result():
            return dataclasses.replace(run, micro_batch=size), plan_of(micro_batch=size)
    raise ConfigError(
        "micro_batch=auto: not even one image a pass fits into the memory; model.checkpointing=true or a smaller network would do"
    )


def _fits(run: RunConfig, size: int, images: Source, world: World) -> bool:
    network = speed.count(run, len(images.class_names))
    needed = network.num_parameters * BYTES_A_PARAMETER + network.image_bytes * size
    if world.device.type == "cuda":
        room = torch.cuda.get_device_properties(world.device).total_memory * HEADROOM
        try:  # the count is of what must be kept: beyond the room there is nothing to try
            return needed < room and (speed.measure(run, size, images, world.device, True).gpu_bytes or 0) < room
        except ConfigError:
            return False
    return needed < _free_bytes() / int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * HEADROOM


def _free_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
