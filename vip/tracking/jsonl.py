"""`metrics.jsonl` and `views.jsonl` in the run folder: one JSON object a line, the run's own truth whatever happens elsewhere."""

import json
import math
from io import FileIO
from pathlib import Path
from typing import Any

from vip.tracking.base import Record, View

METRICS, VIEWS = "metrics.jsonl", "views.jsonl"


class JsonlTracker:
    """Appends to both files; lines beyond `resume_step`, left by a run that was cut off later than its checkpoint, go."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        self.metrics = Lines(folder / METRICS, resume_step)
        self.views = Lines(folder / VIEWS, resume_step)

    def log(self, step: int, record: Record) -> None:
        # JSON has no NaN: a value that is not finite is written as null, so that every reader can read the line.
        self.metrics.append(
            {"step": step} | {key: value if math.isfinite(value) else None for key, value in record.items()}
        )

    def show(self, step: int, view: View) -> None:
        self.views.append({"step": step, **view})

    def rewind(self, step: int) -> None:
        for lines in (self.metrics, self.views):
            lines.close()
        self.metrics, self.views = Lines(self.metrics.path, step), Lines(self.views.path, step)

    def close(self, status: str) -> None:
        for lines in (self.metrics, self.views):
            lines.close()


class Lines:
    """A file of JSON lines, each with its `step`; begins by dropping those beyond `last_step`."""

    def __init__(self, path: Path, last_step: int) -> None:
        self.path = path
        self.unwritten = b""
        kept = [line for line in read_lines(path) if line["step"] <= last_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(path)
        self.file: FileIO = path.open("ab", buffering=0)

    def append(self, values: dict[str, Any]) -> None:
        self.unwritten += (json.dumps(values) + "\n").encode()
        end = self.file.tell()
        try:
            written = self.file.write(self.unwritten)
        except OSError:
            written = 0
        if written == len(self.unwritten):
            self.unwritten = b""
        else:  # a full disk: the lines wait in memory until there is room, the run does not
            self.file.truncate(end)
            self.file.seek(end)

    def close(self) -> None:
        self.file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of either file; a last line torn by a kill is left out, a missing file is an empty one."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
