"""The learning rate as a pure function of the step: warm-up, cosine, cooldown.

The published runs change it once an epoch (timm's stepping, `per="epoch"`): epoch t trains at the rate of the schedule
at t, and the cosine counts from epoch 0, not from the end of the warm-up. `per="step"` follows the same curve smoothly.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field


@dataclass(frozen=True)
class ScheduleConfig:
    kind: Annotated[Literal["cosine", "constant"], Field(description="the curve after the warm-up")]
    per: Annotated[Literal["epoch", "step"], Field(description="how often the rate changes; published: epoch")]
    warmup_epochs: Annotated[float, Field(ge=0, description="epochs of linear warm-up from warmup_lr")]
    warmup_lr: Annotated[float, Field(ge=0, description="learning rate of the first step")]
    min_lr: Annotated[float, Field(ge=0, description="learning rate at the end of the cosine and in the cooldown")]
    cooldown_epochs: Annotated[
        int, Field(ge=0, description="epochs added after `epochs`, at the lowest rate (constant: at the same)")
    ]


def lr_at(config: ScheduleConfig, peak: float, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Learning rate of optimizer step `step` (0 is the first) of a run of `epochs` + cooldown epochs.

    `peak` is the rate the warm-up leads to. Source: the cosine of SGDR (arXiv 1608.03983) as timm's scheduler steps it.
    """
    t = step / steps_per_epoch if config.per == "step" else step // steps_per_epoch
    if t < config.warmup_epochs:
        return config.warmup_lr + (peak - config.warmup_lr) * t / config.warmup_epochs
    if config.kind == "constant":
        return peak
    if t >= epochs:
        return config.min_lr
    return config.min_lr + 0.5 * (peak - config.min_lr) * (1 + math.cos(math.pi * t / epochs))
