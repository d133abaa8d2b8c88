"""What is said of errors, and by whom: one line for what a user can cause, and of other ranks than 0 faults alone, each line
with the rank before it."""

import logging
import os
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

OWN = ("vip", "data")


def settle_ranks() -> None:
    """Called first of all in a process that torchrun started; elsewhere it changes nothing.

    An uncaught exception, in any thread, is told with `[rank N]` before each line. Ranks other than 0 keep warnings to
    themselves, except those of this program, which are of faults that were survived: those get the same prefix.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    prefix = f"[rank {os.environ.get('RANK', '0')}] "

    def tell(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        text = "".join(traceback.format_exception(kind, error, trace))
        # In one piece, or the ranks' lines would mix; and past sys.stderr, which torch's own hook prefixes once more.
        os.write(2, "".join(f"{prefix}{line}\n" for line in text.splitlines()).encode())

    def tell_of_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_type is not SystemExit:
            tell(args.exc_type, args.exc_value, args.exc_traceback)

    sys.excepthook, threading.excepthook = tell, tell_of_thread
    if prefix != "[rank 0] ":
        _hush(prefix)


def _hush(prefix: str) -> None:
    warnings.simplefilter("ignore")
    loggers = [logging.getLogger(), *map(logging.getLogger, logging.root.manager.loggerDict)]
    for logger in loggers:
        if logger.level == logging.WARNING:  # an explicit level; the others inherit theirs
            logger.setLevel(logging.ERROR)
    for name in OWN:
        logging.getLogger(name).setLevel(logging.WARNING)
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(logging.Formatter(f"{prefix}%(message)s"))


class one_line_errors:  # noqa: N801 - a context manager, used like a function
    """What a user can cause (ValueError, OSError) becomes one line and exit status 2.

    Anything else is a bug and keeps its traceback; HYDRA_FULL_ERROR=1 shows one for the user's errors as well.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, KeyboardInterrupt):
            raise SystemExit(130) from None
        if not isinstance(error, ValueError | OSError):
            return
        rank = os.environ.get("RANK", "0")
        # scripts/launch.sh looks there: an error of the user's, unlike a lost peer, is no reason to start the ranks again.
        notes = os.environ.get("LAUNCH_NOTES")
        refused = Path(notes) / "refused" if notes else None
        if rank != "0" and isinstance(error, ValueError | ConnectionError) and _rank_0_speaks(refused, error):
            raise SystemExit(0) from None
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            traceback.print_exception(error)
        where = "" if rank == "0" else f"[rank {rank}] "
        said = f"{where}{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}"
        print(said, file=sys.stderr, flush=True)
        if refused is not None and isinstance(error, ValueError):
            refused.touch()
            raise SystemExit(0) from None
        raise SystemExit(2) from None


def _rank_0_speaks(refused: Path | None, error: Exception) -> bool:
    """Whether rank 0 says the same. It does so at once, and is heard; alone, torchrun ends this process meanwhile."""
    deadline = time.monotonic() + (15 if isinstance(error, ValueError) else 0)
    while not (seen := refused is not None and refused.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return seen
