"""The run on the console: a rich progress bar an epoch on a terminal, plain lines in a log file."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from vip.plan import Plan
from vip.tracking.base import Record

WIDE = 100  # columns; narrower terminals get a short bar and fewer words


class ConsoleTracker:
    """Shows training metrics as they come and a line for every validation; `start_step` is where the run goes on."""

    def __init__(self, plan: Plan, start_step: int, console: Console) -> None:
        self.plan = plan
        self.console = console
        self.start = (time.monotonic(), start_step)
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.bar_epoch = -1

    def log(self, step: int, record: Record) -> None:
        if "val/top1" in record:
            self._finish_bar()
            self.console.print(self._validation(step, record))
        if "train/loss" in record:
            if self.console.is_terminal:
                self._show_bar(step, record)
            else:
                self.console.print(
                    f"step {step}/{self.plan.total_steps}  epoch {record['epoch']:.2f}  {self._training(record)}  "
                    f"left {self._time_left(step)}",
                    soft_wrap=True,
                )

    def rewind(self, step: int) -> None:
        self._finish_bar()
        self.start = (time.monotonic(), step)

    def close(self, status: str) -> None:
        self._finish_bar()

    def _training(self, record: Record) -> str:
        text = (
            f"loss {record['train/loss']:.3f} lr {record['train/lr']:.1e} {record['train/images_per_s']:.0f} images/s"
        )
        wait = f" data wait {record['train/data_wait']:.0%}"
        return text + (wait if not self.console.is_terminal or self.console.width >= WIDE else "")

    def _validation(self, step: int, record: Record) -> str:
        parts = [f"epoch {self.plan.epoch_at(step):.0f}/{self.plan.total_epochs}  validation"]
        for name, prefix in (("", "val"), ("ema ", "val_ema")):
            if f"{prefix}/top1" in record:
                top1, top5, loss = (record[f"{prefix}/{key}"] for key in ("top1", "top5", "loss"))
                parts.append(f"{name}top-1 {top1:.2f} %  top-5 {top5:.2f} %  loss {loss:.4f}")
        return "  ".join(parts) + (f"  best {record['val/best_top1']:.2f} %" if "val/best_top1" in record else "")

    def _show_bar(self, step: int, record: Record) -> None:
        epoch = (step - 1) // self.plan.steps_per_epoch
        if self.bar is None or epoch != self.bar_epoch:
            self._finish_bar()
            self.bar = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(bar_width=8 if self.console.width < WIDE else 30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                console=self.console,
            )
            self.task = self.bar.add_task(
                "", total=self.plan.steps_per_epoch, epoch=f"{epoch + 1}/{self.plan.total_epochs}", text=""
            )
            self.bar.start()
            self.bar_epoch = epoch
        assert self.task is not None
        done = step - epoch * self.plan.steps_per_epoch
        self.bar.update(self.task, completed=done, text=f"{self._training(record)} left {self._time_left(step)}")

    def _finish_bar(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _time_left(self, step: int) -> str:
        started, start_step = self.start
        seconds = (time.monotonic() - started) / max(step - start_step, 1) * (self.plan.total_steps - step)
        hours, rest = divmod(round(seconds), 3600)
        return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
