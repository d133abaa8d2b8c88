"""Cause faults for real, many times over, and print what was asked, what was reached and how long it took.

python scripts/torture.py [FIGURE ...] [--count N] [--folder DIR] [--json]

Without names it measures all figures, which takes hours; `--count` makes each shorter. What it writes goes to DIR, which
must not hold anything yet, or to a temporary folder. Exit status 1 where a figure falls short. Runs on the CPU alone.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: the bits depend on it
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from scripts.faults import blackhole, damage, disk, images, resume, storm
from scripts.faults import hostile as attacks
from scripts.faults.launch import Numbers, UnavailableError
from vip.config import ConfigError
from vip.ranks import one_line_errors


def decode(count: int, folder: Path) -> Numbers:
    return dataclasses.asdict(images.fuzz_decoder(count, seed=0))


def wandb(count: int, folder: Path) -> Numbers:
    return blackhole.measure_delay()


def hostile(count: int, folder: Path) -> Numbers:
    """Numbers: `payloads`, and how many were `harmful`; the first of those by name."""
    results = attacks.attack(folder)
    harmful = [result.name for result in results if not result.harmless]
    return {"payloads": len(results), "harmful": len(harmful)} | ({"first_harmful": harmful[0]} if harmful else {})


@dataclass(frozen=True)
class Figure:
    """What is asked, how many times it is tried, what measures it in an empty folder, and whether its numbers will do."""

    asked: str
    count: int
    measure: Callable[[int, Path], Numbers]
    holds: Callable[[dict[str, Any]], bool]


FIGURES = {
    "sweep": Figure(
        "killed and resumed at every step boundary, 1 and 2 processes: the same bits",
        200, resume.sweep, lambda n: n["boundaries"] == n["wanted"] and n["differing"] == 0,
    ),
    "storm": Figure(
        "500 kills at random, 100 inside a save: the same end, no more steps repeated than between saves, no repair",
        500, storm.storm,
        lambda n: n["kills"] >= n["count"] and n["inside_saves"] >= n["count"] // 5
        and n["repeated"] <= n["save_every"] and n["troubles"] == 0,
    ),
    "signals": Figure(
        "100 signals at random: no step lost, at most one more after the one in flight",
        100, storm.signals,
        lambda n: n["stops"] == n["count"] and n["lost_steps"] == n["troubles"] == 0 and n["steps_after"] <= 2,
    ),
    "damage": Figure(
        "1,000 damaged checkpoints: all detected, the one before is used",
        1000, damage.damage, lambda n: n["damaged"] == n["count"] and n["undetected"] == n["no_fallback"] == 0,
    ),
    "full": Figure(
        "disk full at 50 places of a save: the one before is whole, the next save works, a run trains on",
        50, disk.full,
        lambda n: n["offsets"] == n["count"] and n["lost"] == n["silent"] == n["stuck"] == 0 and n["run_ends_alike"],
    ),
    "decode": Figure(
        "100,000 damaged images: decoded or refused, nothing else",
        100_000, decode, lambda n: n["decoded"] + n["bad"] == n["count"],
    ),
    "ranks": Figure(
        "a rank killed: training again within 30 s; a rank that hangs: named within 120 s",
        1, resume.ranks, lambda n: n["back_s"] <= 30 and n["named_s"] <= 120,
    ),
    "save": Figure(
        "vip_m7 saved in the background (882 MB): training waits 0.3 s at most, after the first time",
        5, disk.save, lambda n: n["max_s"] <= 0.3,
    ),
    "wandb": Figure(
        "W&B does not answer, or refuses: the start is delayed by at most 10 s",
        1, wandb, lambda n: max(n["black_hole_start_s"], n["refused_start_s"]) <= 10,
    ),
    "hostile": Figure(
        "30 hostile files and settings: all refused, none runs",
        1, hostile, lambda n: n["payloads"] >= 30 and n["harmful"] == 0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table; `passed` is None for a figure that this machine cannot measure."""

    figure: str
    asked: str
    reached: Numbers | str
    passed: bool | None
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description="Cause faults for real, and measure what becomes of runs.")
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"{', '.join(FIGURES)} (default: all of them)")
    parser.add_argument("--count", type=int, help="how often, in place of each figure's own count")
    parser.add_argument(
        "--folder", type=Path, help="where to write, to be looked at afterwards (default: a temporary one)"
    )
    parser.add_argument("--json", action="store_true", help="a JSON object for each figure instead of the table")
    args = parser.parse_args()
    with one_line_errors(), tempfile.TemporaryDirectory() as temporary:
        unknown = [name for name in args.figures if name not in FIGURES]
        if unknown:
            raise ConfigError(f"{unknown[0]}: no such figure; there are {', '.join(FIGURES)}")
        if args.count is not None and args.count < 1:
            raise ConfigError(f"--count {args.count}: must be at least 1")
        rows = []
        for name in args.figures or FIGURES:
            rows.append(measure(name, args.count or FIGURES[name].count, (args.folder or Path(temporary)) / name))
            print(
                json.dumps(dataclasses.asdict(rows[-1])) if args.json else f"{name}: {rows[-1].seconds:.0f} s",
                flush=True,
            )
    if not args.json:
        Console().print(table(rows))
    raise SystemExit(int(any(row.passed is False for row in rows)))


def measure(name: str, count: int, folder: Path) -> Row:
    """Measure one figure in `folder`. Raises ConfigError where there is something already."""
    figure = FIGURES[name]
    if folder.exists():
        raise ConfigError(f"{folder}: is there already; choose another --folder, or delete it")
    folder.mkdir(parents=True)
    started = time.monotonic()
    reached: Numbers | str
    passed: bool | None
    try:
        reached = figure.measure(count, folder.resolve())
        passed = figure.holds({**reached, "count": count})
    except UnavailableError as error:
        reached, passed = f"not measured: {error}", None
    except RuntimeError as error:  # a run that did not do what the figure needs; the others can still be measured
        reached, passed = str(error), False
    return Row(name, figure.asked, reached, passed, time.monotonic() - started)


def table(rows: list[Row]) -> Table:
    shown = Table("figure", "asked", "reached", "", "time", show_lines=True)
    words = {True: "yes", False: "NO", None: "-"}
    for row in rows:
        reached = row.reached
        if not isinstance(reached, str):
            reached = "\n".join(f"{name} {round(n, 3) if isinstance(n, float) else n}" for name, n in reached.items())
        shown.add_row(row.figure, row.asked, reached, words[row.passed], f"{row.seconds:.0f} s")
    return shown


if __name__ == "__main__":
    main()
