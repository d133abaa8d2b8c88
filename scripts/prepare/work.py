"""The work itself, which may be killed at any moment: the same command goes on with the parts that are not done.

<out>/unfinished/source.json        which files the images come from
<out>/unfinished/verified.json      which of them have the published MD5 sum (scripts/prepare/archives.py)
<out>/unfinished/parts/<key>.jsonl  what is noted of the images of a part; it is there once they are on the disk
<out>/unfinished/train, val         the images, until all of them are there
<out>/manifest.json                comes last: a tree that has one is whole
"""

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from scripts.prepare import manifest, pool
from scripts.prepare.images import SPLITS, Part, Source, examine, printable, sync_folder, write, write_whole
from scripts.prepare.report import Report

UNFINISHED = "unfinished"
PATIENCE_S = 10.0  # with the processes of a preparation that was just killed


def prepare(
    out: Path, open_source: Callable[[Path], Source], writes: bool, num_workers: int, report: Report
) -> manifest.Manifest:
    """Makes `out` a whole tree with its manifest, from where an earlier preparation stopped; leaves a whole one alone.

    Args:
        open_source: gives the source; its argument is the folder of what is kept between two attempts.
        writes: whether the images are to be written; otherwise they are in `out`.

    Raises ValueError or OSError, in one line; what was done stays and need not be done again.
    """
    unfinished = out / UNFINISHED
    (unfinished / "parts").mkdir(parents=True, exist_ok=True)
    with _locked(unfinished):
        if not (out / manifest.NAME).exists():
            source = open_source(unfinished)
            _check_begun(unfinished / "source.json", source)
            todo = [part for part in source.parts if not _journal(unfinished, part).exists()]
            if writes and todo:
                _check_room(out, source, todo)
            _do(source, todo, unfinished, writes, num_workers, report)
            _finish(source, out, writes, report)
        shutil.rmtree(unfinished)
    return manifest.read(out)


def do_part(part: Part, unfinished: Path, writes: bool) -> None:
    """Writes and decodes the images of a part, and then its journal."""
    lines = []
    for path, content in part.images():
        if writes:
            write(unfinished / path, content)
        lines.append(examine(path, content))
        pool.advance()
    if writes:
        _sync(unfinished)
    write_whole(_journal(unfinished, part), "".join(f"{line}\n" for line in lines))


def _do(source: Source, todo: list[Part], unfinished: Path, writes: bool, num_workers: int, report: Report) -> None:
    total = sum(part.num_images for part in source.parts)
    earlier = total - sum(part.num_images for part in todo)
    if earlier:
        report.say(f"{earlier:,} of {total:,} images were done earlier")
    work = partial(do_part, unfinished=unfinished, writes=writes)
    with report.progress("writing and decoding" if writes else "decoding", total, "images", done=earlier) as bar:
        for _ in pool.share(work, todo, num_workers, lambda done: bar.update(earlier + done)):
            pass


def _finish(source: Source, out: Path, writes: bool, report: Report) -> None:
    """Checks that the images are those that were expected, and gives everything its final name, the manifest's last."""
    unfinished = out / UNFINISHED
    report.say("checking that all of them are there ...")
    lines = [line for part in source.parts for line in _journal(unfinished, part).read_text("ascii").splitlines()]
    paths = [manifest.path_of(line) for line in lines]
    _check_counts(source, paths, unfinished)
    at = {split: out / split if (out / split).exists() else unfinished / split for split in SPLITS}
    there = {path for folder in {place.parent for place in at.values()} for path in manifest.list_images(folder)}
    if differing := sorted(there ^ set(paths)):
        raise ValueError(
            f"{len(differing):,} files of {out} have come or gone since they were prepared, {printable(differing[0])} first: "
            f"{f'remove {unfinished} and ' if writes else ''}run the same command again"
        )
    text = manifest.make(lines, source.classes)
    for split, place in at.items():
        if place != out / split:
            place.rename(out / split)
    sync_folder(out)
    manifest.save(out, text)


def _check_counts(source: Source, paths: list[str], unfinished: Path) -> None:
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise ValueError(
            f"{len(twice):,} images are there twice, {printable(twice[0])} first: the source is not ImageNet's"
        )
    counts = Counter(path.split("/")[0] for path in paths) + Counter(path.rpartition("/")[0] for path in paths)
    wrong = [
        f"{name} has {counts[name]:,} images instead of {n:,}"
        for name, n in source.expected.items()
        if counts[name] != n
    ]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}: the source is not whole; put that right, remove "
            f"{unfinished} and run again"
        )


def _check_begun(path: Path, source: Source) -> None:
    if not path.exists():
        write_whole(path, json.dumps(source.files))
    elif source.files != (begun := json.loads(path.read_text("ascii"))):
        others = sorted(name for name in begun.keys() | source.files if begun.get(name) != source.files.get(name))
        raise ValueError(
            f"{path.parent} was begun from other files ({others[0]} differs): give those, or remove the folder to begin anew"
        )


def _check_room(out: Path, source: Source, todo: list[Part]) -> None:
    for split in SPLITS:
        if (out / split).exists():
            raise ValueError(
                f"{out / split} is there already: --tree {out} makes the manifest of a tree; or choose another --out"
            )
    needed = source.num_bytes * sum(part.num_images for part in todo) // max(1, sum(p.num_images for p in source.parts))
    if (free := shutil.disk_usage(out).free) < needed:
        raise ValueError(
            f"{out} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are needed: make room or choose another --out"
        )


def _journal(unfinished: Path, part: Part) -> Path:
    return unfinished / "parts" / f"{part.key}.jsonl"


def _sync(folder: Path) -> None:
    """Has everything that was written to this file system on the disk: one call for the hundreds of files of a part."""
    if sys.platform != "linux":
        os.sync()
        return
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if libc.syncfs(descriptor):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), str(folder))
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(unfinished: Path) -> Iterator[None]:
    """One preparation at a time: the kernel's lock, which processes that a killed one has left behind hold as well."""
    with (unfinished / "lock").open("w") as file:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"another preparation works in {unfinished.parent}: wait for it, or stop it and run again"
                    ) from None
                time.sleep(0.05)
            except OSError:  # a file system without locks
                break
        yield
