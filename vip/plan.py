"""The arithmetic of a run: how the global batch is shared out and how many steps there are.

The global batch is the contract: ranks x images per pass x accumulation equals it, or the run does not start.
"""

from dataclasses import dataclass

from data.order import steps_per_epoch


@dataclass(frozen=True)
class Plan:
    """`batch_size` images a step = `world_size` ranks x `micro_batch` images a pass x `accumulation` passes."""

    world_size: int
    batch_size: int
    micro_batch: int
    accumulation: int
    steps_per_epoch: int
    total_epochs: int
    total_steps: int

    def epoch_at(self, step: int) -> float:
        return step / self.steps_per_epoch

    def describe(self) -> str:
        processes = f"{self.world_size} process{'es' if self.world_size > 1 else ''}"
        passes = f"{self.accumulation} pass{'es' if self.accumulation > 1 else ''}"
        return (
            f"{self.batch_size} images a step = {processes} x {passes} x {self.micro_batch}; "
            f"{self.total_steps} steps, {self.steps_per_epoch} an epoch"
        )


def make_plan(
    batch_size: int, micro_batch: int | None, world_size: int, num_images: int, total_epochs: int, max_steps: int | None
) -> Plan:
    """Raises ValueError, with the numbers that would fit, where the batch cannot be shared out or the data fill no batch."""
    if batch_size % world_size:
        lower = batch_size // world_size * world_size
        fits = ", ".join(str(n) for n in (lower, lower + world_size) if n)
        counts = ", ".join(str(n) for n in divisors(batch_size))
        raise ValueError(
            f"batch_size={batch_size}: does not divide over {world_size} processes; batch_size={fits} would, "
            f"or this batch on {counts} processes"
        )
    per_rank = batch_size // world_size
    micro = micro_batch or per_rank
    if per_rank % micro:
        raise ValueError(
            f"micro_batch={micro}: {per_rank} images a rank (batch_size={batch_size} over {world_size} processes) are no multiple "
            f"of it; micro_batch can be {', '.join(str(n) for n in divisors(per_rank))}"
        )
    epoch_steps = steps_per_epoch(num_images, batch_size)
    total_steps = epoch_steps * total_epochs
    return Plan(
        world_size=world_size,
        batch_size=batch_size,
        micro_batch=micro,
        accumulation=per_rank // micro,
        steps_per_epoch=epoch_steps,
        total_epochs=total_epochs,
        total_steps=min(total_steps, max_steps) if max_steps else total_steps,
    )


def divisors(number: int) -> list[int]:
    """In rising order."""
    return [n for n in range(1, number + 1) if number % n == 0]
