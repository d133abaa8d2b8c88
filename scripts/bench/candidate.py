"""One network to be measured: built, compiled where that is asked for, and run forward or through a training step."""

import math
import multiprocessing
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from multiprocessing.connection import Connection
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import vip  # noqa: F401 (registers the models)
from scripts.bench.literal import make_literal
from vip.host_memory import keep_freed_memory
from vip.models.build import compile_model
from vip.models.permutator import VisionPermutator
from vip.precision import DTYPES

NUM_CLASSES = 1000
LITERAL = "literal/"
WORK_S = {"cuda": 0.1, "cpu": 0.5}  # that a clock can tell, and beside which caches that others have left are nothing
SETTLING_STEPS = 4  # before a process has all memory that a training step asks for


class Candidate:
    """A network in one number format, eager or compiled, with a batch of noise.

    `compile_s` is what the first training step took more than the second, `memory` the bytes of a training step beside the
    parameters: the peak on a GPU, on a CPU what is stored for the backward pass.
    """

    def __init__(self, name: str, mode: str, precision: str, batch: int, device: torch.device) -> None:
        self.name, self.mode, self.precision, self.device = name, mode, precision, device
        self.dtype = DTYPES[precision]
        self.model = build(name).to(device)
        if mode == "compiled":
            compile_model(self.model)
        self.images = torch.randn(batch, 3, *image_size(self.model), device=device)
        self.labels = torch.randint(NUM_CLASSES, (batch,), device=device)
        self.num_forward = self.num_train = 1
        self.clock = time.perf_counter if device.type == "cuda" else time.process_time

    def prepare(self) -> None:
        """Run everything until it is as fast as it gets; then it is known how often work must be repeated to be timed."""
        self.model.train()
        first_s, train_s = _seconds(self.train), _seconds(self.train)
        self.compile_s = first_s - train_s if self.mode == "compiled" else None
        self.memory = self._memory()
        for _ in range(SETTLING_STEPS):
            train_s = _seconds(self.train)
        self.speed("forward")
        work_s = WORK_S[self.device.type]
        self.num_forward, self.num_train = (max(1, math.ceil(work_s / s)) for s in (_seconds(self.forward), train_s))

    def speed(self, work: str) -> float:
        """Images a second of `work`, "forward" or "train"."""
        self.model.train(work == "train").zero_grad(set_to_none=True)
        begun = self.clock()
        num_images = getattr(self, work)()
        return num_images / (self.clock() - begun)

    @torch.inference_mode()
    def forward(self) -> int:
        """As in validation; the number of images."""
        for _ in range(self.num_forward):
            with self._autocast():
                self.model(self.images)
        return self._done(self.num_forward)

    def train(self) -> int:
        """Forward and backward pass, without an optimizer, whose time follows from the parameters alone."""
        for _ in range(self.num_train):
            self.model.zero_grad(set_to_none=True)
            self._loss().backward()
        return self._done(self.num_train)

    def _loss(self) -> Tensor:
        with self._autocast():
            logits = self.model(self.images)
        return F.cross_entropy(logits.float(), self.labels)

    def _memory(self) -> int:
        if self.device.type == "cuda":
            self.model.zero_grad(set_to_none=True)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.train()
            return torch.cuda.max_memory_allocated(self.device) - before
        kept: list[Tensor] = []  # all of them held, or storages would be met twice

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            self._loss()
        own = {tensor.untyped_storage()._cdata for tensor in (*self.model.parameters(), *self.model.buffers())}
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in kept}
        return sum(num_bytes for storage, num_bytes in storages.items() if storage not in own)

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _done(self, repeats: int) -> int:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return repeats * len(self.images)


class Isolated:
    """A candidate in a process of its own: what it takes from the system's memory is as in a run that has but one network.

    Raises, from `prepare` and `speed`, the RuntimeError or MemoryError that the candidate met.
    """

    def __init__(self, name: str, mode: str, precision: str, batch: int, device: torch.device) -> None:
        self.name, self.mode, self.precision, self.device = name, mode, precision, device
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, dict(os.environ), name, mode, precision, batch, device), daemon=True
        )
        self._process.start()
        theirs.close()  # so that the end of the process ends the pipe

    def prepare(self) -> None:
        """As a candidate's."""
        self.compile_s, self.memory = self._ask("prepare")

    def speed(self, work: str) -> float:
        """As a candidate's."""
        return self._ask(work)

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()

    def _ask(self, what: str) -> Any:
        self._pipe.send(what)
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError("its process was killed; memory may be short") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(pipe: Connection, environment: dict[str, str], *args: Any) -> None:
    os.environ.update(environment)  # where inductor keeps what it has compiled; the server's is older
    keep_freed_memory()  # as in training
    candidate: Candidate | None = None
    answer: object
    with suppress(EOFError, BrokenPipeError):  # nobody asks any more
        while True:
            what = pipe.recv()
            try:
                if candidate is None:
                    candidate = Candidate(*args)
                if what == "prepare":
                    candidate.prepare()
                answer = (candidate.compile_s, candidate.memory) if what == "prepare" else candidate.speed(what)
            except (RuntimeError, MemoryError) as error:
                answer = type(error)(str(error))
            pipe.send(answer)


def build(name: str) -> nn.Module:
    """A network of timm's by its name, or the literal form of one of ours as `literal/NAME`.

    Raises ValueError for other names.
    """
    known = name.removeprefix(LITERAL)
    if timm.is_model(known):
        model = timm.create_model(known, num_classes=NUM_CLASSES)
        if not name.startswith(LITERAL):
            return model
        if isinstance(model, VisionPermutator):
            return make_literal(model)
    raise ValueError(f"--networks {name}: no such network; take names of timm.list_models(), or {LITERAL}vip_s7")


def image_size(model: nn.Module) -> tuple[int, int]:
    """Height and width in pixels of what the network was built for."""
    height, width = model.pretrained_cfg["input_size"][-2:]  # type: ignore[index]
    return int(height), int(width)


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
