"""`plan=true`: what a run would take, in hours, memory, disk and network, before anybody waits for it.

Said by rank 0; nothing is trained and the run folder stays as it is. Each figure says whether it was measured, and
what is merely assumed has a line of its own.
"""

import dataclasses
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from data.config import IMAGENET
from data.sources import NUM_CLASSES, Source, SyntheticSource, open_sources
from vip import micro_batch, speed
from vip.checkpoint import size_in_words
from vip.config import RunConfig
from vip.distributed import World, connect
from vip.plan import Plan
from vip.scaling import EVAL_SPEED, NODES, OVERLAP, Scale, Work, ring_bytes, scale
from vip.speed import CPU_PARAMETERS, Network, Speed

CPU_BATCH = 32
LONG_BATCH = 2  # of a network too large for a CPU
TABLE_WIDTH = 110  # columns
LIBRARY_BYTES = 1_000_000_000  # CUDA's context, NCCL's buffers, workspaces of the products


@dataclass(frozen=True)
class Estimate:
    """All that is known of the run; `scales` holds a refusal's text where the batch does not divide."""

    run: RunConfig
    plan: Plan
    num_images: tuple[int, int]
    is_known: bool  # the counts are ImageNet's own, no data were looked at
    per_node: int  # processes
    device: str
    network: Network
    speed: Speed
    scales: dict[int, Scale | str]


def show(run: RunConfig) -> None:
    """Print the estimate. Raises ValueError for what training would refuse as well."""
    train_set, val_set, is_known = _sources(run)
    with connect() as world:
        found = _estimate(run, world, train_set, val_set, is_known)
        console = Console(quiet=not world.is_main, soft_wrap=True, highlight=False, markup=False)
        console.width = max(console.width, TABLE_WIDTH)
        for line in (*_facts(found), *_disk(found)):
            console.print(line)
        console.print(_table(found))
        for nodes, refusal in found.scales.items():
            if isinstance(refusal, str):
                console.print(f"{nodes} nodes: {refusal}")
        for line in _assumptions(found):
            console.print(f"assumed: {line}")


def _sources(run: RunConfig) -> tuple[Source, Source, bool]:
    """Both splits; of ImageNet, where no folder is named, as many images as it is known to have."""
    if run.data.kind != "imagenet" or run.data.root is not None or os.environ.get("IMAGENET_DIR"):
        return *open_sources(run.data), False
    train, val = IMAGENET.values()
    classes = NUM_CLASSES["imagenet"]
    return SyntheticSource(train, classes, "train"), SyntheticSource(val, classes, "val"), True


def _estimate(run: RunConfig, world: World, train_set: Source, val_set: Source, is_known: bool) -> Estimate:
    on_gpu = world.device.type == "cuda"
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", torch.cuda.device_count() if on_gpu else 1))
    num_processes = max(world.size, per_node)
    run, plan = micro_batch.settle(run, world, num_processes, train_set)
    network = speed.count(run, len(train_set.class_names))
    batch, is_long = plan.micro_batch, False
    if not on_gpu:
        is_long = network.num_parameters > CPU_PARAMETERS
        batch = min(batch, LONG_BATCH if is_long else CPU_BATCH)
    measured = speed.measure(_as_measured(run, on_gpu), batch, train_set, world.device, is_long)
    slowest = world.gather(torch.tensor([measured.images_per_s], device=world.device)).min()
    work = Work(
        images_per_s=float(slowest),
        gradient_bytes=4 * network.num_parameters,
        batch_size=run.batch_size,
        micro_batch=plan.micro_batch,
        num_images=len(train_set),
        num_val_images=len(val_set),
        total_epochs=run.total_epochs,
        max_steps=run.max_steps,
        eval_every=run.eval_every,
        num_evaluated=1 if run.ema_decay is None else 2,
    )
    scales: dict[int, Scale | str] = {}
    for nodes in NODES:
        try:
            scales[nodes] = scale(work, nodes, per_node, run.plan_network)
        except ValueError as error:
            scales[nodes] = str(error)
    device = (
        torch.cuda.get_device_name(world.device)
        if on_gpu
        else f"the CPU, {torch.get_num_threads()} thread(s) a process"
    )
    counts = (len(train_set), len(val_set))
    return Estimate(run, plan, counts, is_known, per_node, device, network, measured, scales)


def _as_measured(run: RunConfig, on_gpu: bool) -> RunConfig:
    """fp16 is for GPUs alone, but one may plan where there is none."""
    if on_gpu or run.precision.name != "fp16":
        return run
    return dataclasses.replace(run, precision=dataclasses.replace(run.precision, name="fp32"))


def _facts(found: Estimate) -> Iterator[str]:
    run, plan, made = found.run, found.plan, found.speed
    millions = found.network.num_parameters / 1e6
    yield f"network    {run.model.name}, {millions:.1f} M parameters, {run.precision.name}"
    yield f"steps      {plan.describe()}"
    train, val = found.num_images
    yield (
        f"images     {plan.total_steps * plan.batch_size:,} to train on, of {train:,}; {val:,} to validate on"
        f"{' (ImageNet as it is known: data.root is not set)' if found.is_known else ''}"
    )
    yield (
        f"speed      {made.images_per_s:,.1f} images/s a process, measured: {made.num_steps} "
        f"step{'s' if made.num_steps > 1 else ''} of {made.batch} on noise, on {found.device}"
    )
    yield f"GPU memory {_memory(found)}"
    gradients = 4 * found.network.num_parameters
    sent = size_in_words(int(ring_bytes(gradients, plan.world_size)))
    alone = "none in one process" if plan.world_size == 1 else f"each of {plan.world_size} processes sends {sent}"
    yield f"all-reduce {size_in_words(gradients)} of gradients a step: {alone}"


def _memory(found: Estimate) -> str:
    if found.speed.gpu_bytes is not None:
        return f"{size_in_words(found.speed.gpu_bytes)} a process, measured at {found.speed.batch} images a pass"
    weights, network, micro_batch = 4 * found.network.num_parameters, found.network, found.plan.micro_batch
    pieces = {
        "weights and gradients": 2 * weights,
        "optimizer": found.speed.optimizer_bytes,
        "averages": weights if found.run.ema_decay is not None else 0,
        "half-precision copies": network.cast_bytes,
        f"{micro_batch} images a pass": network.image_bytes * micro_batch,
        "libraries": LIBRARY_BYTES,
    }
    named = " + ".join(f"{size_in_words(size)} {name}" for name, size in pieces.items() if size)
    return f"{size_in_words(sum(pieces.values()))} a process, estimated: {named}"


def _disk(found: Estimate) -> Iterator[str]:
    run = found.run
    copies = 1 if run.ema_decay is None else 2
    size = 4 * found.network.num_parameters * copies + found.speed.optimizer_bytes
    files = run.keep + 2  # the newest, the best and the one being written
    place = next(path for path in (run.folder, *run.folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    lack = "" if free > files * size else ": too little, choose another runs_dir=..."
    yield (
        f"disk       {size_in_words(files * size)} for {files} checkpoints of {size_in_words(size)} (keep={run.keep}, the "
        f"best, one being written); {size_in_words(free)} free in {place}{lack}"
    )


def _table(found: Estimate) -> Table:
    table = Table(
        title=f"at {found.run.plan_network:g} Gbit/s between nodes",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    hours = "GPU-hours" if found.speed.gpu_bytes is not None else "process-hours"
    columns = ("nodes", "processes", "a pass", "step", "all-reduce", "waits", "images/s", "efficiency", "hours")
    for name in (*columns, hours):
        table.add_column(name, justify="right", no_wrap=True)
    rows = [row for row in found.scales.values() if isinstance(row, Scale)]
    for row in rows:
        plan, first = row.plan, rows[0]
        passes = f"{plan.accumulation} x {plan.micro_batch}" if plan.accumulation > 1 else str(plan.micro_batch)
        gained = row.images_per_s / first.images_per_s * first.nodes / row.nodes
        table.add_row(
            str(row.nodes),
            str(plan.world_size),
            passes,
            _duration(row.step),
            _duration(row.all_reduce) if row.nodes > 1 else "-",
            f"{row.exposed / row.step:.1%}",
            f"{row.images_per_s:,.0f}" if row.images_per_s >= 100 else f"{row.images_per_s:.2g}",
            f"{gained:.0%}",
            _hours(row.hours),
            _hours(row.process_hours),
        )
    return table


def _duration(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 10 else f"{1000 * seconds:,.1f} ms"


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 1 else f"{60 * hours:.2g} min"


def _assumptions(found: Estimate) -> Iterator[str]:
    yield (
        f"{found.per_node} process{'es' if found.per_node > 1 else ''} a node, as here, of the same speed on every node; "
        "NPROC=8 scripts/launch.sh train.py ... reckons with 8"
    )
    yield f"plan_network={found.run.plan_network:g} Gbit/s a node, all of it for the all-reduce; none is needed within a node"
    yield f"all but the last bucket of gradients travels during {OVERLAP:.0%} of a pass, and nothing slows the other down"
    yield f"validation runs {EVAL_SPEED:g} times as fast as training; checkpoints are written in the background"
    yield "the loader keeps up: scripts/doctor.py measures it"
    if found.speed.gpu_bytes is None:
        measured = ", in fp32" if found.run.precision.name == "fp16" else ""
        yield (
            f"no GPU here: the hours are those of this CPU{measured}; the memory is counted from shapes, and the libraries' "
            "share is a guess"
        )
    elif found.plan.world_size > 1:
        yield "with several processes NCCL takes some hundred MB of GPU memory more"
