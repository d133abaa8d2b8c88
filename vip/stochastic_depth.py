"""Stochastic depth: which rate each block drops with, and when.

A block's branch is left out for a sample with a probability (its rate) and scaled up by 1/(1 - rate) otherwise
(Huang et al., arXiv 1603.09382). The rate grows linearly over the depth as published, or is the same everywhere; over
the training it is constant as published, or a pure function of the step. Rates live in a buffer on the device: changing
one costs no recompilation and no wait for the device, at the price of drawing a mask even while the rate is 0.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from timm.layers import DropPath as TimmDropPath
from torch import Tensor, nn

OverDepth = Literal["linear", "uniform"]
OverTraining = Literal["constant", "ramp", "early", "late"]

# The names under which timm's blocks keep their DropPath, or the Identity (ResNet: None) that stands for rate 0.
_DROP_PATH_NAMES = ("drop_path", "drop_path1", "drop_path2", "drop_path3")


@dataclass(frozen=True)
class StochasticDepthConfig:
    """How far and when blocks are dropped; the defaults of the last three are the published choices.

    Over depth, "linear": block i of L drops with rate * i / (L - 1); "uniform": all drop with `rate`. Over training,
    "constant"; "ramp": from 0 at the first step linearly to `rate` at the last; "early": `rate` until the fraction
    `switch_at` of the run, then 0; "late": 0 until there, then `rate`.
    """

    rate: Annotated[float, Field(ge=0, lt=1, description="probability that the deepest block is dropped; 0: off")] = 0.0
    over_depth: Annotated[OverDepth, Field(description="the rate over the blocks; published: linear")] = "linear"
    over_training: Annotated[OverTraining, Field(description="the rate over the run; published: constant")] = "constant"
    switch_at: Annotated[
        float, Field(ge=0, le=1, description="fraction of the run after which early ends and late begins")
    ] = 0.5


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
