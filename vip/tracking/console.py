"""The run on the console: one bar on a terminal, plain lines in a log file, a table at the end.

The bar moves with every step, between the log steps too: it looks at the trainer's position four times a second, from a
thread of its own, so that the steps never wait for a terminal. What others print meanwhile appears above it.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vip.plan import Plan
from vip.tracking.base import Record, View

Mode = Literal["auto", "plain", "quiet"]
BAR_WIDTHS = (4, 40)  # columns, least and most
LOOKS_PER_S = 4


@dataclass
class Totals:
    """Training since this start, summed over log steps; validations and checkpoints are no part of `seconds`."""

    seconds: float = 0.0
    images: float = 0.0
    waited: float = 0.0  # seconds
    worked: float = 0.0  # MFU times seconds
    skipped: float = 0.0
    bad_images: float = 0.0

    def add(self, images: int, record: Record) -> None:
        seconds = images / record["train/images_per_s"]
        self.images += images
        self.seconds += seconds
        self.waited += record["train/data_wait"] * seconds
        self.worked += record.get("train/mfu", 0.0) * seconds
        self.skipped += record.get("train/skipped_steps", 0.0)
        self.bad_images += record.get("train/bad_images", 0.0)


class ConsoleTracker:
    """Shows training metrics as they come, a line for every validation, and what it all came to.

    `start_step` is where the run goes on, `position` says at any moment how many steps are finished. `mode`: "auto" draws a
    bar on a terminal and prints lines anywhere else, "plain" always prints lines, "quiet" only the closing table.
    """

    def __init__(
        self,
        plan: Plan,
        start_step: int,
        console: Console,
        mode: Mode = "auto",
        position: Callable[[], int] | None = None,
    ) -> None:
        self.plan = plan
        self.console = console
        self.mode = mode
        self.begun = time.monotonic()
        self.start = (self.begun, start_step)
        self.first_step = start_step
        self.step = start_step
        self.position = position or (lambda: self.step)
        self.totals = Totals()
        self.training: Record = {}
        self.validations: dict[int, Record] = {}
        self.rollbacks = 0
        self.live: Live | None = None

    def log(self, step: int, record: Record) -> None:
        if "train/loss" in record:
            self.totals.add((step - self.step) * self.plan.batch_size, record)
            self.training, self.step = record, step
            if self.mode != "quiet" and not self._draw():
                self.console.print(
                    f"step {step}/{self.plan.total_steps}  epoch {record['epoch']:.2f}  {' '.join(_figures(record))}  "
                    f"left {self._left(step)}"
                )
        if "val/top1" in record:
            self.validations[step] = record
            if self.mode != "quiet":
                self.console.print(self._validation(step, record))

    def show(self, step: int, view: View) -> None:
        """Pictures and tables are for the other trackers; but the start of a run is that of the bar."""
        if view["view"] == "start":
            self._draw()

    def rewind(self, step: int) -> None:
        self.rollbacks += 1
        self.step = step
        self.validations = {at: record for at, record in self.validations.items() if at <= step}
        self.start = (time.monotonic(), step)

    def close(self, status: str) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None
        self.console.print(self._summary(status), soft_wrap=False)

    def _draw(self) -> bool:
        """Bring the bar up to date, or begin it; False where there is none."""
        if self.mode != "auto" or not self.console.is_interactive:
            return False
        if self.live is None:
            self.live = _start_bar(self)
        self.live.refresh()
        return True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The bar, in one line however narrow the terminal is: what matters least is left out first."""
        plan, step = self.plan, self.position()
        epoch = max(0, step - 1) // plan.steps_per_epoch
        done, steps = step - epoch * plan.steps_per_epoch, plan.steps_per_epoch
        head, count, left = f"epoch {epoch + 1}/{plan.total_epochs} ", f" {done}/{steps}", f"left {self._left(step)}"
        loss, lr, speed, *shares = _figures(self.training) if self.training else ("", "", "")
        for tail in (
            [count, f"{done / steps:.0%}", loss, lr, speed, *shares, left],
            [count, loss, lr, speed, *shares, left],
            [count, loss, speed, *shares, left],
            [count, loss, speed, left],
            [count, loss, left],
            [count, left],
            [count],
        ):
            text = " ".join(part for part in tail if part)
            room = (
                options.max_width - 1 - len(head) - len(text)
            )  # the last column stays free: some terminals wrap there
            if room >= BAR_WIDTHS[0]:
                break
        else:
            yield Text((head + count)[: max(1, options.max_width - 1)], end="", no_wrap=True)
            return
        yield Text(head, end="")
        yield ProgressBar(total=steps, completed=done, width=min(room, BAR_WIDTHS[1]))
        yield Text(text, end="", no_wrap=True)

    def _validation(self, step: int, record: Record) -> str:
        parts = [f"epoch {self.plan.epoch_at(step):.0f}/{self.plan.total_epochs}  validation"]
        parts += [f"{name}{_result(record, prefix)}" for name, prefix in (("", "val"), ("ema ", "val_ema"))
                  if f"{prefix}/top1" in record]  # fmt: skip
        return "  ".join(parts) + (f"  best {record['val/best_top1']:.2f} %" if "val/best_top1" in record else "")

    def _summary(self, status: str) -> Table:
        table = Table(box=box.ROUNDED, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in (*self._run_rows(status), *self._result_rows()):
            table.add_row(name, value)
        return table

    def _run_rows(self, status: str) -> Iterator[tuple[str, str]]:
        plan, step, totals = self.plan, max(self.position(), self.step), self.totals
        yield (
            status,
            f"step {step} of {plan.total_steps}, epoch {round(plan.epoch_at(step), 2):g} of {plan.total_epochs}",
        )
        seconds = time.monotonic() - self.begun
        share = f", {totals.seconds / seconds:.0%} of it training" if totals.seconds else ""
        yield "time", f"{_clock(seconds)}{f' from step {self.first_step} on' if self.first_step else ''}{share}"
        if totals.seconds:
            mfu = f", MFU {totals.worked / totals.seconds:.0%}" if totals.worked else ""
            wait = totals.waited / totals.seconds
            yield "speed", f"{totals.images / totals.seconds:.0f} images/s, data wait {wait:.0%}{mfu}"
        faults = {
            "steps left out": totals.skipped, "bad images replaced": totals.bad_images, "rolled back": self.rollbacks
        }  # fmt: skip
        if any(faults.values()):
            yield "survived", ", ".join(f"{count:.0f} {fault}" for fault, count in faults.items() if count)

    def _result_rows(self) -> Iterator[tuple[str, str]]:
        if self.training:
            yield "training", f"loss {self.training['train/loss']:.4f}"
        if not self.validations:
            return
        last = max(self.validations)
        best_top1 = self.validations[last].get("val/best_top1")
        best = next((at for at, record in self.validations.items() if _decider(record) == best_top1), None)
        for name, at in (("last", last), ("best", best)):
            for suffix, prefix in (("", "val"), (", averaged", "val_ema")):
                if at is not None and f"{prefix}/top1" in self.validations[at]:
                    yield name + suffix, f"{_result(self.validations[at], prefix, 6)}  step {at}"
        if best is None and best_top1 is not None:
            yield "best", f"top-1 {best_top1:6.2f} %  before this start"

    def _left(self, step: int) -> str:
        since, start_step = self.start
        if step <= start_step:
            return "?"
        return _clock((time.monotonic() - since) / (step - start_step) * (self.plan.total_steps - step))


def _start_bar(bar: ConsoleTracker) -> Live:
    live = Live(
        get_renderable=lambda: bar,
        console=bar.console,
        refresh_per_second=LOOKS_PER_S,
        transient=True,
        redirect_stderr=sys.stderr.isatty(),  # else errors that somebody sends to a file would go to the terminal
        vertical_overflow="crop",
    )
    live.start()
    bar.console.show_cursor()  # a run that is killed leaves the terminal as it found it
    os.register_at_fork(after_in_child=_leave_bar)
    return live


def _leave_bar() -> None:
    """A forked loader worker has no thread that draws, and perhaps its lock: it prints to the streams themselves."""
    sys.stdout = getattr(sys.stdout, "rich_proxied_file", sys.stdout)
    sys.stderr = getattr(sys.stderr, "rich_proxied_file", sys.stderr)


def _figures(record: Record) -> list[str]:
    """Loss, learning rate, speed, waiting and, where it is known, MFU."""
    found = [
        f"loss {record['train/loss']:.3f}",
        f"lr {record['train/lr']:.1e}",
        f"{record['train/images_per_s']:.0f} images/s",
        f"data wait {record['train/data_wait']:.0%}",
    ]
    return found + ([f"MFU {record['train/mfu']:.0%}"] if "train/mfu" in record else [])


def _result(record: Record, prefix: str, width: int = 0) -> str:
    top1, top5, loss = (record[f"{prefix}/{key}"] for key in ("top1", "top5", "loss"))
    return f"top-1 {top1:{width}.2f} %  top-5 {top5:{width}.2f} %  loss {loss:.4f}"


def _decider(record: Record) -> float:
    """Averaged weights decide where there are any."""
    return record.get("val_ema/top1", record["val/top1"])


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
