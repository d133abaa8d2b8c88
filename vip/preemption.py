"""Signals that ask a run to stop: noted when they come, acted on at the next step boundary, where nothing is lost."""

import os
import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ


class StopRequest:
    """While entered, the first of SIGNALS is remembered in `name` instead of ending the process.

    More of them change nothing: torchrun forwards them twice, and ends what has not stopped by itself within 30 s. Without
    torchrun a second Ctrl-C interrupts at once.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.number = 0

    def __enter__(self) -> "StopRequest":
        self.previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return self.name is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name is None:
            self.number, self.name = number, signal.Signals(number).name
            if number == signal.SIGINT and not UNDER_TORCHRUN:
                os.write(2, b"\nstopping after this step; Ctrl-C again interrupts at once\n")
        elif number == signal.SIGINT and not UNDER_TORCHRUN:
            raise KeyboardInterrupt

    @property
    def exit_status(self) -> int:
        """What the shell expects of a process ended by the signal; 0 under torchrun, which would restart a failed rank."""
        return 0 if UNDER_TORCHRUN else 128 + self.number
