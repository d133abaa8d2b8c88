"""`benchmark.py convergence`: the digits, trained in our form of the network and in the literal one, from several seeds.

Both forms begin with the same weights and see the same images; what they round differently grows into another run, as
another seed would be. So they are compared as samples: means, and how far apart they may be by chance.
"""

import contextlib
import io
import math
import statistics
import tempfile
from collections.abc import Callable

from data.sources import open_sources
from scripts.bench.literal import make_literal
from vip.config import RunConfig, compose, parse
from vip.distributed import connect
from vip.engine import Trainer
from vip.parts import build
from vip.plan import make_plan

FORMS = ("ours", "literal")
FIGURES = {"top-1 %": "val/top1", "validation loss": "val/loss"}
WITHIN, BEYOND = "within the noise", "beyond the noise"
STANDARD_ERRORS = 2
Row = dict[str, object]


def measure(num_seeds: int, epochs: int, root: str | None, say: Callable[[str], object]) -> dict[str, list[Row]]:
    """Tables by title: each run, and each figure compared. Raises ValueError for a single seed."""
    if num_seeds < 2:
        raise ValueError(f"--seeds {num_seeds}: no spread can be had from it; take 2 or more")
    runs: list[Row] = []
    for seed in range(num_seeds):
        for form in FORMS:
            say(f"{form}, seed {seed}")
            last = train(form, seed, epochs, root)
            runs.append({"form": form, "seed": seed} | {name: last[key] for name, key in FIGURES.items()})
    found = {
        name: [[float(str(run[name])) for run in runs if run["form"] == form] for form in FORMS] for name in FIGURES
    }
    title = f"experiment=digits, {epochs} epochs, {num_seeds} seeds; the noise: {STANDARD_ERRORS} standard errors"
    return {"runs": runs, title: [{"figure": name, **compare(*found[name])} for name in FIGURES]}


def train(form: str, seed: int, epochs: int, root: str | None) -> dict[str, float]:
    """Figures of the last validation."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        changes = [f"runs_dir={folder}", f"seed={seed}", f"epochs={epochs}", f"eval_every={epochs}"]
        changes += [f"schedule.warmup_epochs={epochs // 10}"]
        changes += [f"data.root={root}"] * (root is not None)
        run = parse(RunConfig, compose("train", ["experiment=digits", *changes]))
        train_set, val_set = open_sources(run.data)
        with connect() as world:
            plan = make_plan(run.batch_size, None, world.size, len(train_set), run.total_epochs, None)
            parts = build(run, plan, world, train_set, val_set, None, print)
            if form == "literal":
                make_literal(parts.model)
            return Trainer(run, plan, world, parts).fit().last


def compare(ours: list[float], literal: list[float]) -> Row:
    """Means, spreads, and whether the difference of the means is one that chance would give."""
    difference = statistics.mean(ours) - statistics.mean(literal)
    error = math.sqrt(statistics.variance(ours) / len(ours) + statistics.variance(literal) / len(literal))
    row: Row = {}
    for form, values in zip(FORMS, (ours, literal), strict=True):
        row |= {f"{form}, mean": round(statistics.mean(values), 4), f"{form}, std": round(statistics.stdev(values), 4)}
    row |= {"difference": round(difference, 4), "its standard error": round(error, 4)}
    return row | {"verdict": WITHIN if abs(difference) <= STANDARD_ERRORS * error else BEYOND}
