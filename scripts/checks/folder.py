"""The run folder: writable, with locks and room, and the same one on every host. Nothing is left in it."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from scripts.checks.row import Row, Setup
from vip.checkpoint import size_in_words
from vip.preflight import checkpoint_size, locked


def run_folder(setup: Setup) -> Iterator[Row]:
    """Rank 0 alone writes most of it: lock, metrics and checkpoints."""
    if not setup.world.is_main:
        return
    run, warnings = setup.run, list[str]()
    with _left_as_it_was(run.folder), locked(run.folder, warnings.append):
        free = shutil.disk_usage(run.folder).free
        found = f"{run.folder}: writable, {size_in_words(free)} free"
        if warnings:
            yield Row("warning", f"{run.folder}: its file system has no locks", "start no second run in it")
        if setup.model is None or setup.optimizer is None:
            yield Row("ok", f"{found}; what a checkpoint takes is not known")
            return
        size = checkpoint_size(setup.model, setup.optimizer, run.ema_decay is not None)
        # Files by inode: the best one is mostly a second name of another.
        there = len({path.stat().st_ino for path in run.folder.glob("checkpoints/*.safetensors")})
        needed = size * max(1, run.keep + 2 - there)
        said = f"{size_in_words(needed)} needed for the newest {run.keep}, the best and one being written"
        if free < needed:
            remedy = "free some space, choose another runs_dir=..., or lower keep"
            yield Row("error", f"{run.folder}: {size_in_words(free)} free, {said}", remedy)
        else:
            yield Row("ok", f"{found}, {said}")


def shared_folder(setup: Setup) -> Iterator[Row]:
    """Every rank reads the checkpoint that rank 0 names, so all hosts must see one runs_dir."""
    world = setup.world
    if world.size == 1:
        yield Row("skipped", "one process")
        return
    runs_dir = Path(setup.run.runs_dir)
    made = ""
    if world.is_main:
        place = next(path for path in (runs_dir, *runs_dir.parents, Path()) if path.is_dir())
        with contextlib.suppress(OSError):
            handle, path = tempfile.mkstemp(prefix=".doctor-", dir=place)
            os.close(handle)
            made = str(place / Path(path).name)  # relative where runs_dir is
    try:
        sign = world.share(made)
        seen = bool(sign) and Path(sign).exists()
        world.ask(False).result()  # all have looked
    finally:
        if made:
            Path(made).unlink(missing_ok=True)
    if seen:
        yield Row("ok", f"{runs_dir}: the same on all hosts")
    elif sign:
        remedy = "choose a runs_dir=... on a file system that all hosts share"
        yield Row("error", f"{runs_dir}: not the folder that rank 0 has", remedy)
    else:
        yield Row("skipped", f"{runs_dir}: rank 0 cannot write there")


@contextlib.contextmanager
def _left_as_it_was(folder: Path) -> Iterator[None]:
    """Take away again the lock file and the folders made within, where there was no run folder before."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        if new:
            with contextlib.suppress(OSError):
                (folder / ".lock").unlink(missing_ok=True)
                for path in new:
                    path.rmdir()
