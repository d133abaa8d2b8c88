"""What a preparation says of itself: a bar on a terminal, and plain lines every ten seconds where there is none and in a log."""

import contextlib
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from rich import progress
from rich.console import Console

LINE_S = 10.0


class Report:
    """Lines on the console and, with `log`, at the end of that file too."""

    def __init__(self, log: Path | None = None) -> None:
        self.console = Console(stderr=True)
        self.log = log

    def say(self, text: str) -> None:
        print(text, flush=True)
        self._write(text)

    @contextlib.contextmanager
    def progress(self, what: str, total: int, unit: str, scale: float = 1, done: int = 0) -> Iterator["Progress"]:
        """Of `total` things, `done` of them earlier; shown in `unit`s of `scale` of them."""
        shown = Progress(self, what, total, unit, scale, done)
        with shown.bar:
            yield shown
        shown.line()

    def show(self, text: str) -> None:
        """A line that the bar of a terminal stands for."""
        self.say(text) if not self.console.is_terminal else self._write(text)

    def _write(self, text: str) -> None:
        if self.log:
            # A disk that is full will be named by what matters more.
            with contextlib.suppress(OSError), self.log.open("a", encoding="utf-8") as file:
                file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")


class Progress:
    """How far it is, how fast it goes and how long it will take."""

    def __init__(self, report: Report, what: str, total: int, unit: str, scale: float, done: int) -> None:
        self.report, self.what, self.total, self.unit, self.scale = report, what, total, unit, scale
        self.earlier = self.done = done
        self.started = self.last_line = time.monotonic()
        columns = ("{task.description}", progress.BarColumn(), progress.TaskProgressColumn(), "{task.fields[speed]}")
        self.bar = progress.Progress(
            *columns,
            progress.TimeRemainingColumn(),
            console=report.console,
            transient=True,
            auto_refresh=False,  # that takes a thread, and this process is going to fork
            disable=not report.console.is_terminal,
        )
        self.task = self.bar.add_task(what, total=total, completed=done, speed="")

    def update(self, done: int) -> None:
        """`done` of the things are done, those of earlier included."""
        self.done = done
        self.bar.update(self.task, completed=done, speed=f"{self.speed() * self.scale:,.0f} {self.unit}/s")
        self.bar.refresh()
        if time.monotonic() - self.last_line >= LINE_S:
            self.line()

    def speed(self) -> float:
        """Things a second, of this run."""
        return (self.done - self.earlier) / max(time.monotonic() - self.started, 1e-3)

    def line(self) -> None:
        self.last_line = time.monotonic()
        speed = self.speed()
        left = f", {(self.total - self.done) / speed / 60:,.0f} min left" if self.done < self.total and speed else ""
        self.report.show(
            f"{self.what}: {self.done * self.scale:,.0f} of {self.total * self.scale:,.0f} {self.unit}, "
            f"{speed * self.scale:,.0f} {self.unit}/s{left}"
        )
