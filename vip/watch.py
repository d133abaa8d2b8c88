"""A rank that hangs or dies: the others say which one, and each leaves in the run folder what it was doing.

runs/<name>/hang/stack_rank_1.txt     where rank 1 stood when a step took too long: Python's stack of all its threads
runs/<name>/hang/flight_rank_0.pkl    rank 0's last collectives, for torchfrtrace
"""

import contextlib
import faulthandler
from pathlib import Path
from types import TracebackType

from vip.distributed import STEP_TIMEOUT, PeerError, World

STACK_AFTER_S = STEP_TIMEOUT.total_seconds() - 10  # before the others give up and have this process ended


class Watch:
    """Entered around the training loop; `step()` is called as each step begins."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world = world
        self.folder = folder / "hang"
        self.stack = self.folder / f"stack_rank_{world.rank}.txt"
        self.steps = 0

    def __enter__(self) -> "Watch":
        if self.world.size > 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = self.stack.open("w")
        return self

    def step(self) -> None:
        """A step begins; from the second on every rank is expected to make its steps in time."""
        if self.world.size == 1:
            return
        if self.steps == 1:
            self.world.expect_steps()
        self.steps += 1
        if self.steps > 1:
            faulthandler.dump_traceback_later(STACK_AFTER_S, file=self.file)

    def pause(self) -> None:
        """What comes now, a validation for example, may take its time."""
        faulthandler.cancel_dump_traceback_later()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.world.size == 1:
            return
        self.pause()
        why = self.world.explain(error)
        if why is not None:
            with contextlib.suppress(OSError):
                (self.folder / f"flight_rank_{self.world.rank}.pkl").write_bytes(self.world.flight_record())
        self.file.close()
        with contextlib.suppress(OSError):
            if not self.stack.stat().st_size:
                self.stack.unlink()
            self.folder.rmdir()  # if it is empty
        if why is not None:
            raise PeerError(
                f"{why}; what each rank was doing is in {self.folder}; the same command goes on from the newest "
                "checkpoint, torchrun --max-restarts=3 does so by itself"
            ) from error
