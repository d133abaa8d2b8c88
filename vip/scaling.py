"""What a run takes on 1, 2, 4, 8 nodes: a small model of a data-parallel step. docs/clusters.md derives its formulas.

The compute of a step shrinks with the number of processes, its all-reduce does not: that is all there is to it.
"""

import math
from dataclasses import dataclass

from vip.plan import Plan, make_plan

NODES = (1, 2, 4, 8)
BUCKET_BYTES = 25 * 2**20  # of DDP: the last one is full when the backward pass is over, so nothing hides it
OVERLAP = 0.5  # share of a pass during which earlier buckets travel; the backward is about 2/3 of it
EVAL_SPEED = 3.0  # images/s of a forward pass alone, in those of a whole step


@dataclass(frozen=True)
class Work:
    """The run: what is measured of one process, and what the data and the configuration say."""

    images_per_s: float  # of one process, whole steps
    gradient_bytes: int
    batch_size: int
    micro_batch: int
    num_images: int
    num_val_images: int
    total_epochs: int
    max_steps: int | None
    eval_every: int
    num_evaluated: int  # sets of weights in each validation


@dataclass(frozen=True)
class Scale:
    """The run on `nodes` nodes. Times are seconds of one step unless they say hours."""

    nodes: int
    plan: Plan
    step: float
    all_reduce: float
    exposed: float  # the part of it that nothing hides
    hours: float

    @property
    def process_hours(self) -> float:
        return self.hours * self.plan.world_size

    @property
    def images_per_s(self) -> float:
        return self.plan.batch_size / self.step


def scale(work: Work, nodes: int, processes_per_node: int, network_gbit: float) -> Scale:
    """Raises ValueError where the global batch does not divide over so many processes."""
    processes = nodes * processes_per_node
    shared = make_plan(work.batch_size, None, processes, work.num_images, work.total_epochs, work.max_steps)
    fits = max(n for n in range(1, work.micro_batch + 1) if shared.micro_batch % n == 0)
    plan = make_plan(work.batch_size, fits, processes, work.num_images, work.total_epochs, work.max_steps)
    # Between the nodes alone: within one, the links of its GPUs are an order of magnitude faster.
    sent = ring_bytes(work.gradient_bytes, processes) if nodes > 1 else 0.0
    all_reduce = sent / (network_gbit * 1e9 / 8)
    a_pass = plan.micro_batch / work.images_per_s
    last_bucket = all_reduce * min(1.0, BUCKET_BYTES / work.gradient_bytes)
    exposed = max(last_bucket, all_reduce - OVERLAP * a_pass)
    step = plan.accumulation * a_pass + exposed
    validations = math.ceil(plan.total_steps / (work.eval_every * plan.steps_per_epoch))
    validation = work.num_val_images * work.num_evaluated / (EVAL_SPEED * work.images_per_s * processes)
    hours = (plan.total_steps * step + validations * validation) / 3600
    return Scale(nodes, plan, step, all_reduce, exposed, hours)


def ring_bytes(num_bytes: int, processes: int) -> float:
    """What a process sends, and receives, in a ring all-reduce of `num_bytes`: 2 (n - 1) / n times as much."""
    return 2 * (processes - 1) / processes * num_bytes
