"""What a run folder tells: config.yaml, metrics.jsonl and views.jsonl, whichever of them are there and as far as they go."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

CONFIG, METRICS, VIEWS = "config.yaml", "metrics.jsonl", "views.jsonl"
MAX_DIFF = 100_000  # characters of code.diff that a page takes


@dataclass(frozen=True)
class Series:
    """One number over training; `epochs` are finished ones, `values` None where a value was not finite."""

    epochs: list[float]
    values: list[float | None]

    @property
    def last(self) -> float | None:
        return next((value for value in reversed(self.values) if value is not None), None)


@dataclass
class Run:
    """A run folder. `starts` and `records` are in the order of the files; pictures are those of the newest views alone."""

    folder: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, float | None]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[str, Any] = field(default_factory=dict)
    validation: dict[str, Any] = field(default_factory=dict)
    gates: dict[int, list[list[Any]]] = field(default_factory=dict)  # by step: [block, height, width, channel]
    diff: str = ""

    @cached_property
    def start(self) -> dict[str, Any]:
        """The newest start."""
        return self.starts[-1] if self.starts else {}

    @property
    def classes(self) -> list[str]:
        return [str(name) for name in self.start.get("classes") or ()]

    @property
    def model(self) -> str:
        return str(self.setting("model.name") or "")

    @property
    def last_step(self) -> int:
        return max((int(record["step"] or 0) for record in self.records), default=0)

    @property
    def last_epoch(self) -> float:
        return self.last_step * self.per_step("epoch")

    @property
    def total_steps(self) -> int | None:
        """Steps from the first to the last, where the run said so."""
        limits = [self.start.get("total_steps"), self.setting("max_steps")]
        return min((int(limit) for limit in limits if limit), default=None)

    def setting(self, key: str) -> Any:
        """A value of the configuration by its dotted key, None where there is none."""
        node: Any = self.config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return node

    def per_step(self, unit: str) -> float:
        """How many images or epochs one step is."""
        for record in reversed(self.records):
            if record["step"] and record.get(unit):
                return float(record[unit] or 0) / float(record["step"])
        if unit == "epoch" and self.start.get("steps_per_epoch"):
            return 1 / float(self.start["steps_per_epoch"])
        return 1.0

    def series(self, key: str) -> Series:
        rows = [record for record in self.records if key in record]
        return Series([float(row["step"] or 0) * self.per_step("epoch") for row in rows], [row[key] for row in rows])

    @cached_property
    def decisive(self) -> str:
        """The prefix of the figures that decide: of the averaged weights, where there are any."""
        return "val_ema" if any("val_ema/top1" in record for record in self.records) else "val"

    def best(self) -> tuple[float, float] | None:
        """The best top-1 accuracy in percent, and the epoch at whose end it was reached."""
        series = self.series(f"{self.decisive}/top1")
        found = [
            (value, -epoch) for epoch, value in zip(series.epochs, series.values, strict=True) if value is not None
        ]
        return (max(found)[0], -max(found)[1]) if found else None

    def training_seconds(self) -> float | None:
        """Time spent on training steps, from images and images/s: without validations, pauses and what was lost to a kill."""
        rows = [row for row in self.records if row.get("images") and row.get("train/images_per_s")]
        seconds, images = 0.0, 0.0
        for row in rows:
            seconds += (float(row["images"] or 0) - images) / float(row["train/images_per_s"] or 1)
            images = float(row["images"] or 0)
        return seconds or None


def read_run(folder: Path) -> Run:
    """Raises ValueError where the folder is none of a run."""
    if not any((folder / name).is_file() for name in (CONFIG, METRICS, VIEWS)):
        what = "not a folder" if not folder.is_dir() else f"no run folder: no {CONFIG}, {METRICS} or {VIEWS} in it"
        raise ValueError(f"{folder}: {what}; give runs/<name>")
    run = Run(folder, folder.resolve().name, config=_read_config(folder / CONFIG))
    run.records = [_numbers(line) for line in _lines(folder / METRICS)]
    for line in _lines(folder / VIEWS):
        if line.get("view") == "start":
            run.starts.append(line)
        elif line.get("view") == "samples":
            run.samples = line
        elif line.get("view") == "validation":
            run.validation = line
            if line.get("gates"):
                run.gates[int(line["step"])] = line["gates"]
    if (folder / "code.diff").is_file():
        run.diff = (folder / "code.diff").read_text(encoding="utf-8", errors="replace")[:MAX_DIFF]
    return run


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: no YAML ({' '.join(str(error).split())}); mend it or delete it") from None
    return config if isinstance(config, dict) else {}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, None for what is no finite number; a line torn by a kill is left out, no file is an empty one."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text, parse_constant=lambda name: None)
            except ValueError:
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                yield line


def _numbers(line: dict[str, Any]) -> dict[str, float | None]:
    return {
        key: value if isinstance(value, int | float) and math.isfinite(value) else None for key, value in line.items()
    }
