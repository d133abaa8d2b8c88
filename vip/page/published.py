"""What is known of the published runs (published.json), and their learning rate, which is a formula."""

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vip.page.run import Run

NUM_CLASSES = 1000


@dataclass(frozen=True)
class Published:
    """`log`: (epoch counted from 0, top-1 in percent) as far as it is known, best first; `released`: of the weights."""

    name: str
    log: tuple[tuple[int, float], ...]
    released: float
    source: str

    @property
    def best(self) -> float:
        return max(top1 for _, top1 in self.log)


@cache
def _facts() -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((Path(__file__).parent / "published.json").read_text())
    return facts


def published_for(run: Run) -> Published | None:
    """The published run of the same network on as many classes, if there is one."""
    found = _facts()["networks"].get(run.model)
    num_classes = len(run.classes) or (NUM_CLASSES if run.setting("data.kind") == "imagenet" else 0)
    if found is None or num_classes != NUM_CLASSES:
        return None
    log = tuple((int(epoch), float(top1)) for epoch, top1 in found["log"])
    return Published(run.model, log, float(found["released"]), str(_facts()["source"]))


def published_lr() -> tuple[list[float], list[float]]:
    """Epochs and the rates that hold from each on: a linear warm-up, a cosine that counts from epoch 0, a cooldown."""
    recipe = _facts()["recipe"]
    peak, low, first, warmup = (recipe[key] for key in ("peak_lr", "min_lr", "warmup_lr", "warmup_epochs"))
    rates = []
    for epoch in range(recipe["epochs"] + recipe["cooldown_epochs"]):
        if epoch < warmup:
            rates.append(first + (peak - first) * epoch / warmup)
        else:
            angle = math.pi * min(epoch / recipe["epochs"], 1)
            rates.append(low + (peak - low) * (1 + math.cos(angle)) / 2)
    return [float(epoch) for epoch in range(len(rates) + 1)], [*rates, rates[-1]]
