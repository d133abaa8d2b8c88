"""Processes and devices: the only file that opens, uses or closes a process group.

Under torchrun every rank calls `connect()` and gets its `World`; in a plain `python train.py` the world is one process
without a group, and every operation below is the identity, so that the trainer is written once.
"""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

TIMEOUT = timedelta(seconds=300)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Vote:
    """Whether any rank wished for something: asked without waiting, answered by `result()`, the same on every rank."""

    def __init__(self, wish: bool, group: dist.ProcessGroup | None) -> None:
        self.votes = torch.tensor(int(wish))
        self.work = dist.all_reduce(self.votes, group=group, async_op=True) if group is not None else None

    def result(self) -> bool:
        if self.work is not None:
            self.work.wait()
        return bool(self.votes)


@dataclass(frozen=True)
class World:
    """Where this process stands: `rank` of `size` processes, on `device`; `control` joins their hosts, past the GPUs."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """DistributedDataParallel where there is more than one process; buffers follow rank 0 where the network has any."""
        if self.size == 1:
            return model
        has_state_buffers = any(name in model.state_dict() for name, _ in model.named_buffers())
        return DistributedDataParallel(
            model,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            broadcast_buffers=has_state_buffers,
            gradient_as_bucket_view=True,
        )

    def ask(self, wish: bool) -> Vote:
        """Start a vote, between the hosts: no GPU waits for it. Every rank asks equally often."""
        return Vote(wish, self.control)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, rows: Tensor) -> Tensor:
        """(N, ...) of every rank, equal shapes, concatenated in rank order to (size * N, ...) on every rank."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    def share_buffers(self, model: nn.Module) -> None:
        """Rank 0's buffers to all ranks: running statistics are rank 0's, as in its checkpoints."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)


@contextlib.contextmanager
def connect() -> Iterator[World]:
    """Join the world that torchrun describes in the environment (or be alone) and leave it at the end."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if not torch.cuda.is_available():
        place = torch.device("cpu")
    elif local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"rank {rank} has no GPU: {torch.cuda.device_count()} on this node; start torchrun with --nproc-per-node="
            f"{torch.cuda.device_count()}"
        )
    else:
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    if "WORLD_SIZE" not in os.environ:
        yield World(0, 1, place)
        return
    _die_with_launcher()
    on_gpu = place.type == "cuda"
    with _without_stdout():
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT, device_id=place if on_gpu else None)
        control = dist.new_group(backend="gloo", timeout=TIMEOUT)
    yield World(rank, size, place, control)
    dist.destroy_process_group()  # after an error this could wait for ranks that never come; torchrun ends them all


@contextlib.contextmanager
def _without_stdout() -> Iterator[None]:
    """Keep gloo's greetings, which no log level silences, off the console: every rank prints one into the others'."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _die_with_launcher() -> None:
    """Have Linux end this process when torchrun is gone: killed by force, it leaves ranks that would train on unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
