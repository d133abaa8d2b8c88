"""Between the ranks: how fast gradients are summed, and whether the clocks agree."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from scripts.checks.row import Row, Setup
from vip.checkpoint import size_in_words
from vip.distributed import World

MAX_BYTES = 256_000_000
MEASURE_S = 1.0
MAX_ROUNDS = 50
SLOW_GB_PER_S = 1.0  # GPUs across 10-gigabit Ethernet
MAX_CLOCK_S = 1.0


def all_reduce(setup: Setup) -> Iterator[Row]:
    """Sum a buffer of the size of the network's gradients (float32) over all ranks, as every training step does."""
    world = setup.world
    if world.size == 1:
        yield Row("skipped", "one process: no gradients to sum; start it with torchrun to measure")
        return
    own = 4 * sum(parameter.numel() for parameter in setup.model.parameters()) if setup.model else MAX_BYTES
    num_bytes = int(world.share(str(min(own, MAX_BYTES))))  # rank 0's word: buffers must be equal
    values = torch.full((num_bytes // 4,), world.rank + 1.0, device=world.device)
    world.sum(values)  # the first one connects
    expected = world.size * (world.size + 1) / 2
    if not bool((values == expected).all()):
        remedy = "look at the network cards and cables; NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1 tell where"
        yield Row("error", f"sums over {world.size} ranks come out wrong", remedy)
    values.zero_()
    rounds = world.share(str(min(MAX_ROUNDS, max(3, int(MEASURE_S / _seconds(world, values, 1))))))
    own_seconds = torch.tensor([_seconds(world, values, int(rounds))], device=world.device)
    seconds = float(world.gather(own_seconds).max())
    speed = 2 * (world.size - 1) / world.size * num_bytes / seconds / 1e9
    found = (
        f"{size_in_words(num_bytes)} over {world.size} ranks in {1000 * seconds:.1f} ms: {speed:.3g} GB/s bus bandwidth"
    )
    if world.device.type == "cuda" and speed < SLOW_GB_PER_S:
        remedy = "NCCL_DEBUG=INFO shows which network NCCL took; NCCL_SOCKET_IFNAME and NCCL_IB_HCA name another"
        yield Row("warning", f"{found}, slow for GPUs", remedy)
    else:
        yield Row("ok", found)


def clocks(setup: Setup) -> Iterator[Row]:
    world = setup.world
    if world.size == 1:
        yield Row("skipped", "one process")
        return
    for _ in range(2):  # the first one brings them together, so that the second is short
        world.ask(False).result()
    now = torch.tensor([time.time()], dtype=torch.float64, device=world.device)
    times = world.gather(now).tolist()
    spread = max(times) - min(times)
    first, last = times.index(min(times)), times.index(max(times))
    if spread > MAX_CLOCK_S:
        found = f"rank {last}'s is {spread:.1f} s ahead of rank {first}'s: their logs cannot be compared"
        yield Row("warning", found, "turn on time synchronisation (chrony, systemd-timesyncd) on their hosts")
    else:
        yield Row("ok", f"within {spread:.3f} s")


def _seconds(world: World, values: Tensor, rounds: int) -> float:
    """For one sum, averaged over `rounds`."""
    _wait_for_device(world)
    begun = time.perf_counter()
    for _ in range(rounds):
        world.sum(values)
    _wait_for_device(world)
    return (time.perf_counter() - begun) / rounds


def _wait_for_device(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
