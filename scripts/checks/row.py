"""What a check is given and what it answers, and how the answers of all ranks become one list.

A check is a function that yields rows. A ValueError or OSError that it raises is the run's own refusal and becomes an error
row, and so does anything else: no check ends the others.
"""

import itertools
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import nn

from data.sources import Source
from vip.config import RunConfig
from vip.distributed import World
from vip.plan import Plan

Status = Literal["skipped", "ok", "warning", "error"]
LOOK_THERE = "look at what the other ranks say"
SEVERITY: dict[Status, int] = {"skipped": 0, "ok": 0, "warning": 1, "error": 2}


@dataclass(frozen=True)
class Row:
    """What one rank found. `figure`, which differs from rank to rank, takes the place of {} in `value`."""

    status: Status
    value: str
    remedy: str = ""
    figure: float | None = None
    must_agree: bool = False  # an error where ranks differ
    check: str = ""  # the name of the check, filled in by `carry_out`


@dataclass(frozen=True)
class Finding:
    """Equal rows of one or more ranks."""

    check: str
    status: Status
    value: str
    remedy: str
    ranks: list[int]
    hosts: list[str]


@dataclass
class Setup:
    """The planned run as this rank sees it; what one check finds out serves those after it."""

    run: RunConfig
    world: World
    train_set: Source | None = None
    plan: Plan | None = None
    model: nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None
    loader_speed: float | None = None  # images/s of this rank
    failed: set[str] = field(default_factory=set)  # checks with an error

    @property
    def num_processes(self) -> int:
        """Of the run, whether or not this process could join it."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def num_processes_here(self) -> int:
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


Check = Callable[[Setup], Iterable[Row]]


def carry_out(checks: Sequence[Check], setup: Setup) -> list[Row]:
    """The rows of all checks, in order."""
    rows: list[Row] = []
    for check in checks:
        name = check.__name__.replace("_", " ")
        try:
            for row in check(setup):
                rows.append(replace(row, check=name))
        except (ValueError, OSError) as error:
            rows.append(replace(refusal(error), check=name))
        except Exception as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                traceback.print_exc(file=sys.stderr)
            lost = setup.world.explain(error)
            found = lost or f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            remedy = LOOK_THERE if lost else "not foreseen: HYDRA_FULL_ERROR=1 shows where it comes from"
            rows.append(Row("error", found, remedy, check=name))
        if any(row.check == name and row.status == "error" for row in rows):
            setup.failed.add(name)
    return rows


def refusal(error: Exception) -> Row:
    """An error row from a message of the run's own, `cause; remedy`."""
    cause, _, remedy = " ".join(str(error).split()).partition("; ")
    return Row("error", cause, remedy)


def merge(rows_by_rank: Sequence[Sequence[Row]], hosts: Sequence[str]) -> list[Finding]:
    """One finding for rows that are equal but for their figures, in the order of the checks."""
    names = dict.fromkeys(row.check for rows in rows_by_rank for row in rows)
    return [finding for name in names for finding in _merge_check(name, rows_by_rank, hosts)]


def _merge_check(name: str, rows_by_rank: Sequence[Sequence[Row]], hosts: Sequence[str]) -> Iterator[Finding]:
    groups: dict[Row, dict[int, list[float]]] = {}
    for rank, rows in enumerate(rows_by_rank):
        for row in rows:
            if row.check == name:
                figures = groups.setdefault(replace(row, figure=None), {}).setdefault(rank, [])
                figures += [] if row.figure is None else [row.figure]
    for row, by_rank in groups.items():
        figures = list(itertools.chain(*by_rank.values()))
        value = row.value.format(_span(figures)) if figures else row.value
        status, remedy = row.status, row.remedy
        if row.must_agree and len(by_rank) < len(hosts) and status != "error":
            status, remedy = "error", "must be the same on all hosts"
        yield Finding(name, status, value, remedy, list(by_rank), sorted({hosts[rank] for rank in by_rank}))


def worst(findings: Iterable[Finding]) -> Status:
    """ok, warning or error."""
    return max([finding.status for finding in findings] + ["ok"], key=lambda status: SEVERITY[status])


def _span(figures: list[float]) -> str:
    shown = [f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}" for figure in (min(figures), max(figures))]
    return shown[0] if shown[0] == shown[1] else " to ".join(shown)
