"""`metrics.jsonl` in the run folder: one JSON object a line, the run's own truth whatever happens to other trackers."""

import json
import math
from pathlib import Path

from vip.tracking.base import Record


class JsonlTracker:
    """Appends to `path`; lines beyond `resume_step`, left by a run that was cut off later than its checkpoint, are dropped."""

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = [line for line in read_lines(path) if line["step"] <= resume_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(path)
        self.file = path.open("a", buffering=1)

    def log(self, step: int, record: Record) -> None:
        # JSON has no NaN: a value that is not finite is written as null, so that every reader can read the line.
        values = {key: value if math.isfinite(value) else None for key, value in record.items()}
        self.file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self, status: str) -> None:
        self.file.close()


def read_lines(path: Path) -> list[dict[str, float]]:
    """The records of a metrics.jsonl; a last line torn by a kill is left out, a missing file is an empty one."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
