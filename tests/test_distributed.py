"""Several ranks over gloo: what exact resuming asks of DDP."""

import contextlib
import multiprocessing
import os
import socket
from pathlib import Path

import timm
import torch

from vip.distributed import connect

RANKS = 3  # of two, the sum would not depend on the order of the buckets


def gradients_early_and_late(rank: int, port: int, out: Path) -> None:
    """The gradient of one batch at the first step after `settle_buckets`, and again some steps later."""
    facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in facts.items()}
    torch.set_num_threads(1)
    with connect() as world:
        torch.manual_seed(0)
        model = timm.create_model("vip_tiny", num_classes=10)
        wrapped = world.wrap(model)
        world.settle_buckets(wrapped, torch.zeros(2, 3, 32, 32), contextlib.nullcontext)
        torch.manual_seed(rank)
        images, found = torch.randn(4, 2, 3, 32, 32), []
        for i in (0, 1, 2, 3, 0):
            model.zero_grad(set_to_none=True)
            wrapped(images[i]).square().sum().backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone())
        if rank == 0:
            torch.save([found[0], found[-1]], out)


def test_gradients_of_three_ranks_are_the_same_bits_at_the_first_step_and_later(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    ranks = [
        context.Process(target=gradients_early_and_late, args=(rank, port, tmp_path / "out.pt"))
        for rank in range(RANKS)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
    assert [process.exitcode for process in ranks] == [0] * RANKS
    early, late = torch.load(tmp_path / "out.pt", weights_only=True)
    assert early.abs().max() > 0
    assert torch.equal(early, late)
