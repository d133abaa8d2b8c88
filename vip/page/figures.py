"""The words and tables of the page: key figures, state of the run, configuration."""

import datetime
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vip.page.published import published_for
from vip.page.run import Run

NONE = "—"


@dataclass(frozen=True)
class Figure:
    label: str
    value: str
    note: str = ""


def status(run: Run) -> tuple[str, str]:
    """One word for the colour of the badge (done, stopped, open) and what the badge says."""
    step, total = run.last_step, run.total_steps
    if not run.records:
        return "open", "no metrics yet"
    if total and step >= total:
        return "done", f"finished, {step:,} steps"
    where = f"step {step:,}" + (f" of {total:,}" if total else "")
    return ("stopped", f"interrupted at {where}") if (run.folder / "PREEMPTED").exists() else ("open", f"at {where}")


def headline(run: Run) -> str:
    """Model, data and device in a line, as far as they are known."""
    parameters = run.start.get("num_parameters")
    environment = run.start.get("environment") or {}
    processes = run.start.get("world_size") or 1
    parts = [
        run.model and run.model + (f", {parameters / 1e6:.1f} M parameters" if parameters else ""),
        run.setting("data.kind")
        and f"{run.setting('data.kind')}" + (f", {len(run.classes):,} classes" if run.classes else ""),
        str(run.setting("precision.name") or ""),
        f"{environment.get('device') or ''}" + (f", {processes} processes" if processes > 1 else ""),
    ]
    return " · ".join(part for part in parts if part)


def key_figures(run: Run) -> list[Figure]:
    found: list[Figure] = []
    if best := run.best():
        top1, epoch = best
        weights = ", averaged weights" if run.decisive == "val_ema" else ""
        found.append(Figure("Best top-1", percent(top1), f"after epoch {epoch:.4g}{weights}"))
        if published := published_for(run):
            found.append(
                Figure("Published", percent(published.best), f"best of its log; here {signed(top1 - published.best)}")
            )
        if (top5 := run.series(f"{run.decisive}/top5").last) is not None:
            found.append(Figure("Last top-5", percent(top5)))
        if (loss := run.series(f"{run.decisive}/loss").last) is not None:
            found.append(Figure("Last validation loss", f"{loss:.4f}"))
    total = run.total_steps
    if run.records:
        note = f"of {total:,}" if total else ""
        resumes = sum(start["step"] > 0 for start in run.starts)
        note += f"{', ' if note and resumes else ''}{f'resumed {times(resumes)}' if resumes else ''}"
        found.append(Figure("Steps", f"{run.last_step:,}", note))
    if (seconds := run.training_seconds()) is not None:
        found.append(Figure("Training time", duration(seconds), "without validation and pauses"))
    for key, label, text, scale, note in (
        ("images_per_s", "Images per second", "{:,.0f}", 1, "median"),
        ("data_wait", "Data wait", "{:.1f} %", 100, "of the time, median"),
        ("mfu", "MFU", "{:.1f} %", 100, "median"),
    ):
        if (median := _median(run, f"train/{key}", scale)) is not None:
            found.append(Figure(label, text.format(median), note))
    for key, label in (("skipped_steps", "Steps left out"), ("bad_images", "Bad images")):
        if total_count := sum(value or 0 for value in run.series(f"train/{key}").values):
            found.append(Figure(label, f"{total_count:,.0f}"))
    return found


def comparison(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Final figures: the heads of the columns, and a row for each run, without its name."""
    heads = ["best top-1", "after epoch", "last top-1", "last top-5", "last loss", "steps"]
    heads += ["training time", "images/s", "data wait"]
    rows = []
    for run in runs:
        top1, epoch = run.best() or (None, None)
        last = [run.series(f"{run.decisive}/{key}").last for key in ("top1", "top5", "loss")]
        total = run.total_steps
        steps = f"{run.last_step:,}" + (f" of {total:,}" if total else "")
        cells: list[tuple[Any, Callable[..., str]]] = [
            (top1, percent),
            (epoch, "{:.4g}".format),
            (last[0], percent),
            (last[1], percent),
            (last[2], "{:.4f}".format),
            (steps, str),
            (run.training_seconds(), duration),
            (_median(run, "train/images_per_s"), "{:,.0f}".format),
            (_median(run, "train/data_wait", 100), "{:.1f} %".format),
        ]
        rows.append([NONE if value is None else say(value) for value, say in cells])
    return heads, rows


def validations(run: Run) -> list[list[str]]:
    """Epoch, top-1, top-5, loss of every validation: the curves as a table."""
    rows = []
    for record in run.records:
        if f"{run.decisive}/top1" in record:
            epoch = float(record["step"] or 0) * run.per_step("epoch")
            values = [record.get(f"{run.decisive}/{key}") for key in ("top1", "top5", "loss")]
            rows.append([f"{epoch:.4g}", *(NONE if value is None else f"{value:.4f}" for value in values)])
    return rows


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys and their values as YAML would have them."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = _yaml(value)
    return found


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Keys that the runs do not share, with the value of each run; the name differs anyway."""
    configs = [flat(run.config) for run in runs]
    keys = {key: None for config in configs for key in config if key != "name"}
    found = [(key, [config.get(key, NONE) for config in configs]) for key in keys]
    return [(key, values) for key, values in found if len(set(values)) > 1]


def environment(run: Run) -> list[tuple[str, str]]:
    found = [
        (key, _yaml(value)) for key, value in (run.start.get("environment") or {}).items() if value not in (None, "")
    ]
    if started := run.starts[0].get("time") if run.starts else None:
        found.insert(0, ("started", str(started)[:19].replace("T", " ")))
    return found


def without_departures(run: Run) -> str:
    """What to say where no departure from the published recipe is listed."""
    if not run.start:
        return "Not recorded."
    return "None." if published_for(run) else "There is no published recipe for this network and data."


def resumes(run: Run) -> list[str]:
    return [
        f"step {start['step']:,}, {str(start.get('time', ''))[:19].replace('T', ' ')}"
        for start in run.starts
        if start["step"] > 0
    ]


def newest(run: Run) -> str:
    """Which validation the charts of classes are of."""
    if not (found := run.validation):
        return ""
    weights = ", averaged weights" if found.get("weights") == "ema" else ""
    return f"The newest validation: {found.get('num_images') or 0:,} images after step {found['step']:,}{weights}."


def percent(value: float) -> str:
    return f"{value:.2f} %"


def duration(seconds: float) -> str:
    """Like 41 s, 12 min 5 s, 29 h 40 min, 4 d 3 h."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    if seconds < 1:
        return f"{seconds:.2f} s"
    left = round(seconds)
    for place, (unit, size) in enumerate(units):
        if left >= size:
            rest, smaller = left % size, units[min(place + 1, 3)]
            more = rest // smaller[1] if place < 3 else 0
            return f"{left // size} {unit}" + (f" {more} {smaller[0]}" if more else "")
    return f"{seconds:.1f} s"


def signed(difference: float) -> str:
    return f"{difference:+.2f}".replace("-", "\N{MINUS SIGN}")


def times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _median(run: Run, key: str, scale: float = 1) -> float | None:
    values = [value * scale for value in run.series(key).values if value is not None]
    return statistics.median(values) if values else None


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_yaml(part) for part in value) + "]"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.10g}"
    return str(value)
