"""What the processes of a node share: a folder for caches, and turns at filling it."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


def cache_folder() -> Path | None:
    """$XDG_CACHE_HOME/vision-permutator, by default under ~/.cache; None for a user without a home. It need not exist."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # the convention says that a relative one does not count
        try:
            base = Path.home() / ".cache"
        except RuntimeError:
            return None
    return base / "vision-permutator"


@contextlib.contextmanager
def turn(lock: Path) -> Iterator[bool]:
    """One process at a time; the others wait here. The lock is the kernel's: it ends with its process, and forked ones have
    no part in it. False where no lock can be had (a read-only folder, a file system without locks): then nobody waits.
    """
    with contextlib.ExitStack() as stack:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(lock.open("a"))
            fcntl.lockf(file, fcntl.LOCK_EX)
            held = True
        except OSError:
            held = False
        yield held
