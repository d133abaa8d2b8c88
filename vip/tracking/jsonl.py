"""`metrics.jsonl` in the run folder: one JSON object a line, the run's own truth whatever happens to other trackers."""

import json
import math
from io import FileIO
from pathlib import Path

from vip.tracking.base import Record


class JsonlTracker:
    """Appends to `path`; lines beyond `resume_step`, left by a run that was cut off later than its checkpoint, are dropped."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        self.unwritten = b""
        self.file = self._open(resume_step)

    def log(self, step: int, record: Record) -> None:
        # JSON has no NaN: a value that is not finite is written as null, so that every reader can read the line.
        values = {key: value if math.isfinite(value) else None for key, value in record.items()}
        self.unwritten += (json.dumps({"step": step, **values}) + "\n").encode()
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

    def rewind(self, step: int) -> None:
        self.file.close()
        self.unwritten = b""
        self.file = self._open(step)

    def close(self, status: str) -> None:
        self.file.close()

    def _open(self, last_step: int) -> FileIO:
        kept = [line for line in read_lines(self.path) if line["step"] <= last_step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(self.path)
        return self.path.open("ab", buffering=0)


def read_lines(path: Path) -> list[dict[str, float]]:
    """The records of a metrics.jsonl; a last line torn by a kill is left out, a missing file is an empty one."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
