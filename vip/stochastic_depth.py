"""Stochastic depth: which rate each block drops with, and when.

A block's branch is left out for a sample with a probability (its rate) and scaled up by 1/(1 - rate) otherwise
(Huang et al., arXiv 1603.09382). The rate grows linearly over the depth as published, or is the same everywhere; over
the training it is constant as published, or a pure function of the step. Rates live in a buffer on the device: changing
one costs no recompilation and no wait for the device, at the price of drawing a mask even while the rate is 0.

In subset mode a fixed number of samples is left out of each branch, and the branch is not computed for them (as in DINOv2,
arXiv 2304.07193). How many they are decides shapes, so there the rate is a number of the host.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from timm.layers import DropPath as TimmDropPath
from torch import Tensor, nn

Mode = Literal["bernoulli", "subset"]
OverDepth = Literal["linear", "uniform"]
OverTraining = Literal["constant", "ramp", "early", "late"]

# The names under which timm's blocks keep their DropPath, or the Identity (ResNet: None) that stands for rate 0.
_DROP_PATH_NAMES = ("drop_path", "drop_path1", "drop_path2", "drop_path3")


@dataclass(frozen=True)
class StochasticDepthConfig:
    """How, how far and when blocks are dropped; all defaults but that of `rate` are the published choices.

    Over depth, "linear": block i of L drops with rate * i / (L - 1); "uniform": all drop with `rate`. Over training,
    "constant"; "ramp": from 0 at the first step linearly to `rate` at the last; "early": `rate` until the fraction
    `switch_at` of the run, then 0; "late": 0 until there, then `rate`. In mode "bernoulli" each sample is drawn by itself, and
    what is dropped was computed; "subset" drops a fixed number of each batch, to rounding, and skips them.
    """

    rate: Annotated[float, Field(ge=0, lt=1, description="probability that the deepest block is dropped; 0: off")] = 0.0
    over_depth: Annotated[OverDepth, Field(description="the rate over the blocks; published: linear")] = "linear"
    over_training: Annotated[OverTraining, Field(description="the rate over the run; published: constant")] = "constant"
    switch_at: Annotated[
        float, Field(ge=0, le=1, description="fraction of the run after which early ends and late begins")
    ] = 0.5
    mode: Annotated[
        Mode, Field(description="bernoulli: as published; subset: skips a fixed number of samples (ViP alone)")
    ] = "bernoulli"


def rate_at(config: StochasticDepthConfig, step: int, total_steps: int) -> float:
    """The rate of the deepest block at optimizer step `step`, counted from 0 to `total_steps` - 1."""
    if config.over_training == "ramp":
        return config.rate * step / (total_steps - 1) if total_steps > 1 else config.rate
    if config.over_training == "constant":
        return config.rate
    before_switch = step < config.switch_at * total_steps
    return config.rate if before_switch == (config.over_training == "early") else 0.0


def depth_rates(rate: float, num_blocks: int, over_depth: OverDepth = "linear") -> list[float]:
    """The rate of each block, shallowest first; `rate` is that of the deepest.

    Raises:
        ValueError: `rate` is not in [0, 1).
    """
    _check_rate(rate)
    if over_depth == "uniform" or num_blocks == 1:
        return [rate] * num_blocks
    return [rate * i / (num_blocks - 1) for i in range(num_blocks)]


class DropPath(nn.Module):
    """Zeroes the whole branch of a sample with probability `rate` while training, keeping its expectation.

    The rate is a 0-d float32 buffer, not part of the state dict: it follows from the step, so no checkpoint needs it.
    """

    rate: Tensor

    def __init__(self, rate: float, device: torch.device | str | None = None) -> None:
        super().__init__()
        _check_rate(rate)
        self.built_rate = rate
        self.register_buffer("rate", torch.tensor(rate, dtype=torch.float32, device=device), persistent=False)

    @torch.jit.ignore
    def init_non_persistent_buffers(self) -> None:
        """Back to the rate of construction: timm's hook for networks built on the meta device."""
        self.rate.fill_(self.built_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        if not self.training:
            return x
        keep = 1 - self.rate
        kept = torch.rand((x.shape[0], 1, 1, 1), device=x.device) < keep
        return x * (kept / keep).to(x.dtype)


class SubsetDropPath(nn.Module):
    """Leaves a branch out for so many samples of a batch that their share is `rate`, to rounding, and drawn anew each time.

    The others count for more, so that the expectation is that of all. At least one sample stays.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        _check_rate(rate)
        self.rate = rate
        self.run = _run
        self.is_compiled = False

    def num_kept(self, batch: int) -> int:
        """Of `batch` samples, those for which the branch is computed."""
        return max(1, int(batch * (1 - self.rate) + 0.5))

    def draw(self, x: Tensor) -> Tensor:
        """Positions of the samples kept, int64, on the device of x (B, ...): nothing waits for it."""
        return torch.randperm(x.shape[0], device=x.device)[: self.num_kept(x.shape[0])]

    def forward(self, x: Tensor) -> Tensor:
        """The same of a branch that was computed for all, as DropPath: (B, H, W, C) -> (B, H, W, C)."""
        batch = x.shape[0]
        num_kept = self.num_kept(batch)
        if not self.training or num_kept == batch:
            return x
        scale = torch.zeros((batch, 1, 1, 1), dtype=x.dtype, device=x.device)
        return x * scale.index_fill(0, self.draw(x), batch / num_kept)

    @torch.jit.unused
    def add(self, x: Tensor, norm: nn.Module, layer: nn.Module) -> Tensor:
        """x + layer(norm(x)), computed for the samples kept: (B, H, W, C) -> (B, H, W, C)."""
        batch, num_kept = x.shape[0], self.num_kept(x.shape[0])
        kept = None if num_kept == batch else self.draw(x)
        part = x if kept is None else x.index_select(0, kept)
        if self.is_compiled:
            torch._dynamo.maybe_mark_dynamic(part, 0)  # one compilation for every number of samples
        branch = self.run(norm, layer, part).to(x.dtype)
        return x + branch if kept is None else x.index_add(0, kept, branch, alpha=batch / num_kept)

    def compile(self, *args: Any, **options: Any) -> None:
        """torch.compile for the branches that `add` runs; drawing and adding stay outside."""
        self.run = torch.compile(_run, *args, **options)
        self.is_compiled = True


def _run(norm: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    return layer(norm(x))


def build_drop_path(rate: float, mode: Mode, device: torch.device | str | None = None) -> nn.Module:
    """What drops the branches of one block."""
    return SubsetDropPath(rate) if mode == "subset" else DropPath(rate, device)


def set_drop_path_rate(model: nn.Module, rate: float, over_depth: OverDepth = "linear") -> None:
    """Gives every block of the network its rate: ours without a host sync, timm's by their `drop_prob`.

    Several DropPaths of one block get one rate. A timm block that was built without one (the first of a linear profile)
    stays at 0, even when `over_depth` is "uniform".

    Raises:
        ValueError: `rate` is not in [0, 1), or it is above 0 and the network has no DropPath to set.
    """
    blocks = [
        [getattr(module, name) for name in _DROP_PATH_NAMES if hasattr(module, name)] for module in model.modules()
    ]
    blocks = [block for block in blocks if block]
    num_set = 0
    for block, block_rate in zip(blocks, depth_rates(rate, len(blocks), over_depth), strict=True):
        for drop_path in block:
            if isinstance(drop_path, DropPath):
                drop_path.rate.fill_(block_rate)
            elif isinstance(drop_path, SubsetDropPath):
                drop_path.rate = block_rate
            elif isinstance(drop_path, TimmDropPath):
                drop_path.drop_prob = block_rate
            else:
                continue
            num_set += 1
    if rate > 0 and not num_set:
        raise ValueError(
            f"stochastic depth of rate {rate} has no block to act on: build {type(model).__name__} "
            "with drop_path_rate above 0, or set the rate to 0 if it has no such argument"
        )


def _check_rate(rate: float) -> None:
    if not 0 <= rate < 1:
        raise ValueError(f"stochastic depth of rate {rate} is impossible: give a rate from 0 to below 1")
