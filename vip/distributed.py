"""Processes and devices: the only file that opens, uses or closes a process group.

Under torchrun every rank calls `connect()` and gets its `World`; in a plain `python train.py` the world is one process
without a group, and every operation below is the identity, so that the trainer is written once.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from data.parent import die_with_parent
from vip.host_memory import keep_freed_memory

START_TIMEOUT = timedelta(seconds=300)  # until every rank has made its first step, compilation and all
STEP_TIMEOUT = timedelta(seconds=100)
NCCL_PATIENCE = timedelta(seconds=30)  # beyond the hosts' timeout, which can name the rank
ROLL_CALL_S = (1.0, 3.0)  # how long the others are asked for a sign of life, if one seems dead or seems to hang
LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")


class PeerError(ConnectionError):
    """Another rank is gone or hangs; the text names it."""


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
    store: dist.Store | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wrap(self, model: nn.Module, compress_gradients: bool = False) -> nn.Module:
        """DistributedDataParallel where there is more than one process; buffers follow rank 0 where the network has any.

        `compress_gradients`: they are averaged in fp16.
        """
        if self.size == 1:
            return model
        has_state_buffers = any(name in model.state_dict() for name, _ in model.named_buffers())
        wrapped = DistributedDataParallel(
            model,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            broadcast_buffers=has_state_buffers,
            gradient_as_bucket_view=True,
            static_graph=True,  # every step uses the same parameters: they are not looked for again
        )
        if compress_gradients:
            wrapped.register_comm_hook(None, fp16_compress_hook)
        return wrapped

    def settle_buckets(
        self, wrapped: nn.Module, images: Tensor, autocast: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> None:
        """Passes without a step: DDP orders its buckets after the second backward of a static graph, and sums of three and
        more ranks depend on the order, so an interrupted run must not meet a first step that an untouched run met long
        before. Leaves gradients."""
        if self.size == 1:
            return
        buffers = {name: buffer.clone() for name, buffer in wrapped.named_buffers()}
        wrapped.train()
        for _ in range(2):
            with autocast():
                logits = wrapped(images)
            (logits.float().sum() * 0.0).backward()
        with torch.no_grad():
            for name, buffer in wrapped.named_buffers():
                buffer.copy_(buffers[name])

    def ask(self, wish: bool) -> Vote:
        """Start a vote, between the hosts: no GPU waits for it. Every rank asks equally often."""
        return Vote(wish, self.control)

    def share(self, text: str = "") -> str:
        """Rank 0's text on every rank."""
        if self.size == 1:
            return text
        encoded = torch.tensor(list(text.encode()) if self.is_main else [], dtype=torch.uint8)
        length = torch.tensor(len(encoded))
        dist.broadcast(length, src=0, group=self.control)
        encoded.resize_(int(length))
        dist.broadcast(encoded, src=0, group=self.control)
        return bytes(encoded.tolist()).decode()

    def expect_steps(self) -> None:
        """From now on ranks meet at every step: wait for one another no longer than STEP_TIMEOUT."""
        if self.size > 1:
            dist.distributed_c10d._set_pg_timeout(STEP_TIMEOUT, self.control)
            patience = NCCL_PATIENCE if self.device.type == "cuda" else timedelta(0)
            dist.distributed_c10d._set_pg_timeout(STEP_TIMEOUT + patience)

    def explain(self, error: BaseException | None) -> str | None:
        """Who is missing, in words, if `error` comes from waiting for other ranks; else None. Takes a few seconds.

        Every rank that still runs meets such an error at about the same time and answers the roll call.
        """
        lost = isinstance(error, dist.DistError) or any(word in str(error) for word in LOST)
        if self.store is None or not isinstance(error, RuntimeError) or not lost:
            return None
        absent: list[str] = []
        hangs = "Timed out" in str(error)
        call = threading.Thread(target=self._call_roll, args=(absent, ROLL_CALL_S[hangs]), daemon=True)
        call.start()
        call.join(ROLL_CALL_S[hangs] + 2)
        if call.is_alive():
            absent = ["rank 0"]  # it keeps the store, unless torchrun does
        if not absent:
            return "the connection between the ranks broke, though every rank still runs: a network's fault"
        missing = f"{', '.join(absent[:4])}{' and others' if len(absent) > 4 else ''}"
        return f"{missing} {'gave no sign of life in time: hangs, or its machine is gone' if hangs else 'has ended or hangs'}"

    def _call_roll(self, absent: list[str], patience: float) -> None:
        """Fills `absent` with the ranks that do not answer within `patience`; hangs with a store whose keeper hangs."""
        assert self.store is not None
        ranks, deadline = list(range(self.size)), time.monotonic() + patience
        try:
            self.store.set(f"present/{self.rank}", "")
            while ranks and time.monotonic() < deadline:
                time.sleep(0.1)
                ranks = [rank for rank in ranks if not self.store.check([f"present/{rank}"])]
            absent += [f"rank {rank} ({self.store.get(f'process/{rank}').decode()})" for rank in ranks]
            time.sleep(self.is_main)  # the store, where rank 0 keeps it, must outlast the others' questions
        except RuntimeError:  # the store is gone with its keeper
            absent.append("rank 0 or the launcher")

    def flight_record(self) -> bytes:
        """The last collectives of this rank, for torch's flight-recorder tools (`torchfrtrace`)."""
        recorders = torch._C._distributed_c10d
        on_gpu = self.device.type == "cuda"
        return recorders._dump_nccl_trace() if on_gpu else recorders._dump_fr_trace()  # type: ignore[attr-defined]

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
        keep_freed_memory()
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
    die_with_parent()  # torchrun, killed by force, leaves ranks that would train on unseen
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    on_gpu = place.type == "cuda"
    try:
        with _without_stdout():
            dist.init_process_group(
                "nccl" if on_gpu else "gloo", timeout=START_TIMEOUT, device_id=place if on_gpu else None
            )
            control = dist.new_group(backend="gloo", timeout=START_TIMEOUT)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise PeerError(
            f"rank {rank} found no way to the other {size - 1} ({reason}); look for what they say, and whether every node can "
            f"reach {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        ) from error
    store = dist.distributed_c10d._get_default_store()
    store.set(f"process/{rank}", f"{socket.gethostname()}, pid {os.getpid()}")
    yield World(rank, size, place, control, store)
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
