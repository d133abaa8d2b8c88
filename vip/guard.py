"""Steps whose loss or gradients are not finite: they never touch the weights, and what made one is kept for a look.

The device decides whether a step counts, so the host need not wait for it: it learns the outcome one step later, when the
weights are still those that the bad step began with, and can write them down with that step's images.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.batch import Batch

FACTS = ("finite", "loss", "grad_norm", "scale")


@dataclass(frozen=True)
class BadStep:
    """A step that was left out. `loss` is this rank's mean over `batches`, `scale` fp16's loss scale (1 without)."""

    step: int
    loss: float
    grad_norm: float
    scale: float
    batches: list[Batch]
    in_row: int

    @property
    def is_overflow(self) -> bool:
        """fp16's loss scale was too large: an ordinary thing, which halving it mends."""
        return self.scale > 1 and math.isfinite(self.loss)

    def write(self, folder: Path, rank: int, torch_seed: int) -> None:
        """This rank's images of the step, as `batch_rank_<rank>.json` in `folder`, for scripts/replay_step.py."""
        facts: dict[str, Any] = {"step": self.step, "rank": rank, "torch_seed": torch_seed, "loss_scale": self.scale}
        facts |= {"loss": str(self.loss), "grad_norm": str(self.grad_norm)}
        facts["batches"] = [{"indices": b.indices.tolist(), "keys": b.keys.tolist()} for b in self.batches]
        (folder / f"batch_rank_{rank}.json").write_text(json.dumps(facts) + "\n")


class Guard:
    """Makes the optimizer's step where its gradients are finite, on all ranks alike."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        self.optimizer = optimizer
        self.scaler = scaler
        state = model.state_dict()
        self.buffers = [buffer for name, buffer in model.named_buffers() if name in state]
        device = next(model.parameters()).device
        # torch's fused optimizers take the decision on the device; elsewhere the host must read it, which the CPU does for free.
        self.asks_device = device.type == "cuda" and all(group.get("fused") for group in optimizer.param_groups)
        self.one = torch.ones((), device=device)
        self.in_row = 0
        self.latest: tuple[int, Tensor, torch.cuda.Event | None, list[Batch]] | None = None

    def begin(self) -> None:
        """Before a step's first pass: running statistics would be spoiled by it, whatever becomes of the step."""
        self.kept = [buffer.clone() for buffer in self.buffers]

    def update(self, step: int, batches: list[Batch], loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Make the step unless `grad_norm`, equal on all ranks, is not finite; returns whether it is, as a 0-d tensor.

        `loss` is this rank's. `batches` are remembered until `outcome()` is asked.
        """
        finite = grad_norm.isfinite()
        facts = torch.stack([finite.float(), loss, grad_norm, self.scaler.scale(self.one)])
        copied = None
        if facts.is_cuda:
            facts = facts.to("cpu", non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self.latest = (step, facts, copied, batches)
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            torch.where(finite, buffer, kept, out=buffer)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.asks_device:
            self.optimizer.grad_scale, self.optimizer.found_inf = None, 1.0 - finite.float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif finite:
            self.optimizer.step()
        return finite

    def outcome(self) -> BadStep | None:
        """What the latest step was, if it was left out; waits for that step. None the second time."""
        if self.latest is None:
            return None
        step, facts, copied, batches = self.latest
        self.latest = None
        if copied is not None:
            copied.synchronize()
        finite, loss, grad_norm, scale = facts.tolist()
        self.in_row = 0 if finite else self.in_row + 1
        return None if finite else BadStep(step, loss, grad_norm, scale, batches, self.in_row)
