"""Reading what W&B left offline: the transaction log of a run and the media beside it.

wandb has no reader of its own for these files in Python; its messages are parsed by its own protobuf classes.
"""

import json
import struct
import time
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

OWN = ("_step", "_timestamp", "_runtime")  # keys that W&B adds to a row


def offline_run(folder: Path) -> Path:
    """The one offline folder of the run in `folder`."""
    (path,) = folder.glob("wandb/offline-run-*")
    return path


def records(folder: Path, kind: str) -> list[Any]:
    """The records of a kind, in order. The file is a LevelDB log: 32 KiB blocks of chunks with crc, length and type."""
    (path,) = offline_run(folder).glob("*.wandb")
    data, found, position, started = path.read_bytes(), [], 7, b""
    assert data.startswith(b":W&B")
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # too little left of the block for a header
            position += 32768 - position % 32768
            continue
        length, place = struct.unpack_from("<HB", data, position + 4)
        started += data[position + 7 : position + 7 + length]
        position += 7 + length
        if place in (1, 4):  # a whole record, or the last chunk of one
            found.append(Record.FromString(started))
            started = b""
    return [getattr(record, kind) for record in found if record.WhichOneof("record_type") == kind]


def history(folder: Path) -> list[dict[str, Any]]:
    """The logged rows, once all are there: wandb's service may write the last of them after `finish` returned."""
    deadline = time.monotonic() + 30
    while not records(folder, "exit") and time.monotonic() < deadline:
        time.sleep(0.1)
    return [values(record.item) for record in records(folder, "history")]


def config(folder: Path) -> dict[str, Any]:
    """The run's configuration: what it was started with, and what was added."""
    updates = [*(run.config.update for run in records(folder, "run")), *(c.update for c in records(folder, "config"))]
    return {item.key: json.loads(item.value_json) for items in updates for item in items}


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in records(folder, "summary"):
        found |= values(record.update)
    return found


def values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json, parse_constant=str) for item in items}


def expected_rows(lines: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """metrics.jsonl as W&B should have it: one row a step; what is not finite is "NaN" there."""
    rows: dict[int, dict[str, Any]] = {}
    for line in lines:
        numbers = {key: "NaN" if value is None else value for key, value in line.items() if key != "step"}
        rows.setdefault(line["step"], {}).update(numbers)
    return rows


def assert_same_rows(found: list[dict[str, Any]], lines: list[dict[str, Any]]) -> None:
    """Every value of metrics.jsonl is in the row of its step, and every step is there once, in order."""
    expected = expected_rows(lines)
    steps = [row["_step"] for row in found]
    assert steps == sorted(set(steps))
    with_numbers = {row["_step"]: row for row in found if set(row) & {"train/loss", "val/loss"}}
    assert list(with_numbers) == list(expected)
    for step, numbers in expected.items():
        assert {key: with_numbers[step][key] for key in numbers} == numbers
