"""A run told again: what its folder holds, for trackers that write it anew whenever it goes on."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vip.tracking.jsonl import METRICS, VIEWS, read_lines

Told = tuple[int, Mapping[str, Any]]  # the step, and a record or a view


def read_truth(folder: Path, last_step: float = math.inf) -> list[Told]:
    """Records and views of a run folder by step, up to `last_step`; null in a record is NaN again."""
    records = [
        {key: math.nan if value is None else value for key, value in line.items()}
        for line in read_lines(folder / METRICS)
    ]
    lines = sorted([*records, *read_lines(folder / VIEWS)], key=lambda line: line["step"])
    return [
        (line["step"], {key: value for key, value in line.items() if key != "step"})
        for line in lines
        if line["step"] <= last_step
    ]


def is_view(told: Mapping[str, Any]) -> bool:
    return "view" in told


def last_validation(truth: Sequence[Told]) -> int:
    """The step of the newest validation; what is drawn over training need not be drawn for those before it."""
    return max((step for step, told in truth if told.get("view") == "validation"), default=0)


def first_id(name: str, truth: list[Told]) -> str:
    """W&B's id of a run that has none in a checkpoint: it follows from its name and its first start, so it is always the same."""
    first = next((told["time"] for _, told in truth if told.get("view") == "start"), "")
    return hashlib.sha256(f"{name} {first}".encode()).hexdigest()[:8]
