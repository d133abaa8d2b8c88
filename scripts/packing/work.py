"""The packing itself, which may be killed at any moment: the same command goes on after the last whole record.

<out>/<split>/unfinished/settings.json    what is packed, and how
<out>/<split>/unfinished/00000.rows       the index of data-00000.bin: a row after each record that is written
<out>/<split>/unfinished/00000.json       size and checksum of data-00000.bin, once it is on the disk
<out>/<split>/pack.json                   comes last: a split that has one is whole

What a machine that lost its power has left of a data file is told by the checksums of the records. The result is the same
whatever the number of processes and of kills.
"""

import contextlib
import fcntl
import io
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from data import native
from data.pack import ABOUT, INDEX, NAMES, RECORD, About, data_file, encode_about, read_about
from scripts.packing.plan import Plan, make_plan, open_splits
from scripts.packing.records import Recipe, make
from scripts.prepare import pool
from scripts.prepare.images import sync_folder, write_whole
from scripts.prepare.report import Report

PATIENCE_S = 10.0  # with the processes of one that was just killed

_plans: list[Plan] = []  # forked processes find here what would take long to send them


def pack(root: Path, out: Path, recipe: Recipe, num_workers: int, report: Report) -> dict[str, About]:
    """Packs each split of the tree `root` below `out`, from where an earlier attempt stopped; what each then is.

    Raises ValueError or OSError, in one line; what was done stays and need not be done again.
    """
    sources = open_splits(root)
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        report.say(f"{root}: {sum(map(len, sources.values())):,} images")
        has_segments = recipe.kind != "raw" and native.available()
        plans = [make_plan(source, out / split, recipe, has_segments) for split, source in sources.items()]
        _plans[:] = [plan for plan in plans if not _is_whole(plan)]
        if _plans:
            _check_room(out)
            _write_records(num_workers, report)
        else:
            report.say(f"{out}: is whole already")
        for plan in _plans:
            _finish(plan)
    return {split: read_about(out / split) for split in sources}


def _is_whole(plan: Plan) -> bool:
    """Makes ready to begin or to go on where it is not; raises ValueError for a pack of something else."""
    if (plan.out / ABOUT).exists():
        about = read_about(plan.out)
        if (about.kind, about.parameters) != (plan.recipe.kind, plan.parameters):
            raise ValueError(f"{plan.out} is a pack of other images or of another kind: choose another folder")
        shutil.rmtree(plan.unfinished, ignore_errors=True)
        return True
    settings = json.loads(json.dumps([plan.recipe.kind, plan.parameters, plan.stamps]))
    begun = plan.unfinished / "settings.json"
    if begun.exists():
        if json.loads(begun.read_text("ascii")) != settings:
            raise ValueError(
                f"{plan.out} was begun from other images or in another way: give the same command, or remove it to begin anew"
            )
    elif plan.out.exists() and any(path != plan.unfinished for path in plan.out.iterdir()):
        raise ValueError(f"{plan.out} holds something else: choose another folder")
    else:
        plan.unfinished.mkdir(parents=True, exist_ok=True)
        write_whole(begun, json.dumps(settings))
    return False


def _check_room(out: Path) -> None:
    written = sum(path.stat().st_size for plan in _plans for path in plan.out.glob("data-*.bin"))
    needed = sum(plan.num_bytes for plan in _plans) - written
    if (free := shutil.disk_usage(out).free) < needed:
        raise ValueError(
            f"{out} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are needed: make room or choose another folder"
        )


def _write_records(num_workers: int, report: Report) -> None:
    total = sum(len(plan.source) for plan in _plans)
    earlier = sum(path.stat().st_size // RECORD.itemsize for plan in _plans for path in plan.unfinished.glob("*.rows"))
    if earlier:
        report.say(f"{earlier:,} of {total:,} images were packed earlier")
    tasks = [(i, number) for i, plan in enumerate(_plans) for number in plan.numbers if not plan.done(number).exists()]
    with report.progress("packing", total, "images", done=earlier) as bar:
        for _ in pool.share(write_file, tasks, num_workers, lambda done: bar.update(earlier + done)):
            pass


def write_file(task: tuple[int, int]) -> None:
    """Writes a data file, given by the number of its plan and its own, or what it lacks."""
    plan, number = _plans[task[0]], task[1]
    paths = plan.out / data_file(number), plan.rows(number)
    checksum = xxhash.xxh3_64()
    start, stop = plan.bounds[number], plan.bounds[number + 1]
    with _open(paths[0]) as data, _open(paths[1]) as rows:
        num_done, offset = _recover(data, rows, checksum)
        for index in range(start + num_done, stop):
            record = make(plan.source.read(index), plan.source.name(index), plan.recipe)
            row = np.zeros((), RECORD)
            row["offset"], row["length"], row["file"] = offset, len(record.content), number
            row["checksum"], row["label"] = xxhash.xxh3_64_intdigest(record.content), plan.source.labels[index]
            for key in ("head", "height", "width", "orientation"):
                row[key] = getattr(record, key)
            _write(data, record.content)
            _write(rows, row.tobytes())
            checksum.update(record.content)
            offset += len(record.content)
            pool.advance()
        os.fsync(data.fileno())
        os.fsync(rows.fileno())
    write_whole(plan.done(number), json.dumps([offset, checksum.hexdigest()]))


def _recover(data: BinaryIO, rows: BinaryIO, checksum: xxhash.xxh3_64) -> tuple[int, int]:
    """Cuts off what is not whole; records and bytes that remain, and their checksum."""
    index = rows.read()
    known = np.frombuffer(index[: len(index) // RECORD.itemsize * RECORD.itemsize], RECORD)
    num_whole = offset = 0
    for row in known:
        record = data.read(int(row["length"]))
        if row["offset"] != offset or xxhash.xxh3_64_intdigest(record) != row["checksum"]:
            break
        checksum.update(record)
        num_whole += 1
        offset += len(record)
    for file, size in ((data, offset), (rows, num_whole * RECORD.itemsize)):
        file.truncate(size)
        file.seek(size)
    return num_whole, offset


def _open(path: Path) -> BinaryIO:
    path.touch()
    return path.open("r+b", buffering=0)


def _write(file: BinaryIO, content: bytes) -> None:
    """All of it, and straight to the system: a record must not be overtaken by its row."""
    view = memoryview(content)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError as error:
        raise ValueError(
            f"cannot write {file.name} ({error.strerror or error}): see to the disk; the same command then goes on"
        ) from error


def _finish(plan: Plan) -> None:
    """The index of all data files, and then what says that the pack is whole."""
    index = np.concatenate([np.fromfile(plan.rows(number), RECORD) for number in plan.numbers])
    paths = [plan.path(i) for i in range(len(plan.source))]
    index["name_end"] = np.cumsum([len(path) for path in paths])
    encoded = io.BytesIO()
    np.save(encoded, index, allow_pickle=False)
    files = {data_file(number): tuple(json.loads(plan.done(number).read_text("ascii"))) for number in plan.numbers}
    for name, content in ((INDEX, encoded.getvalue()), (NAMES, b"".join(paths))):
        _save(plan.out / name, content)
        files[name] = len(content), xxhash.xxh3_64_hexdigest(content)
    counts = {
        "images": len(index),
        "in_segments": int(np.count_nonzero(index["head"])) if plan.parameters["segments"] else 0,
        "undecodable": int(np.count_nonzero(index["height"] == 0)),
    }
    about = About(plan.recipe.kind, plan.parameters, plan.source.class_names, files, counts)
    write_whole(plan.out / ABOUT, encode_about(about))
    shutil.rmtree(plan.unfinished)


def _save(path: Path, content: bytes) -> None:
    with _open(path) as file:
        file.truncate(0)
        _write(file, content)
        os.fsync(file.fileno())
    sync_folder(path.parent)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One packing at a time: the kernel's lock, which processes that a killed one has left behind hold as well."""
    descriptor = os.open(folder, os.O_RDONLY)
    deadline = time.monotonic() + PATIENCE_S
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ValueError(f"another packing works in {folder}: wait for it, or stop it") from None
                time.sleep(0.05)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(descriptor)
