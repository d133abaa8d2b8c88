"""The console: lines in a log, a bar on a real pseudo-terminal of any width, and the table at the end."""

import fcntl
import io
import logging
import os
import pty
import re
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from vip.plan import Plan, make_plan
from vip.tracking.console import ConsoleTracker

TRAINING = {"epoch": 0.5, "train/loss": 1.25, "train/lr": 1e-3, "train/images_per_s": 640.0, "train/data_wait": 0.03}
VALIDATION = {"epoch": 1.0, "val/top1": 81.48, "val/top5": 95.76, "val/loss": 0.75, "val/best_top1": 82.0}
PLAN = make_plan(10, None, 1, 45, 3, None)  # 4 steps an epoch, 12 in all
START = {"view": "start", "step": 0}


@pytest.fixture
def plan() -> Plan:
    return PLAN


def log_file(width: int = 200) -> Console:
    return Console(force_terminal=False, width=width, file=io.StringIO(), soft_wrap=True, highlight=False, markup=False)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def rows_of(table: str) -> dict[str, str]:
    """The closing table, by the words of its first column."""
    return {name.strip(): value.strip() for name, value in re.findall(r"^│(.*?)│(.*?)│$", table, re.MULTILINE)}


def on_terminal(draw: Callable[[Console], object], width: int = 140, resized: int | None = None) -> str:
    """All that a forked process writes to a terminal of its own, which changes its width when it reads "resize"."""
    pid, terminal = pty.fork()
    if pid == 0:
        status = 1
        try:
            os.environ.update(TERM="xterm-256color")
            for name in ("COLUMNS", "LINES", "NO_COLOR"):
                os.environ.pop(name, None)
            os.read(0, 1)  # the terminal has its size from here on
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            draw(Console(soft_wrap=True, highlight=False, markup=False))
            sys.stdout.flush()
            status = 0
        finally:
            os._exit(status)
    set_width(terminal, width)
    os.write(terminal, b"\n")
    said = b""
    while True:
        try:
            said += os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if resized and b"resize" in said:
            set_width(terminal, resized)
            resized = None
            os.write(terminal, b"\n")
    _, status = os.waitpid(pid, 0)
    assert status == 0, said.decode()
    return said.decode()


def set_width(terminal: int, width: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))


def screen(said: str, width: int) -> list[str]:
    """What a terminal shows in the end: the few control codes that rich uses, carried out."""
    rows, row, column = [""] * 300, 0, 0
    for number, code, char in re.findall(r"\x1b\[[?]?([\d;]*)([A-Za-z])|([^\x1b])", said):
        if code == "K":
            rows[row] = ""
        elif code == "A":
            row -= int(number or 1)
        elif char == "\r":
            column = 0
        elif char == "\n":
            row += 1
        elif char:
            if column == width:
                row, column = row + 1, 0
            rows[row] = rows[row][:column].ljust(column) + char + rows[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in rows[: row + 1] if line.strip()]


def frames(said: str) -> list[str]:
    """The bar each time it was drawn, without colours."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", said)
    return re.findall(r"(epoch \d+/3 [^\r\n\x1b]*[━╸╺][^\r\n\x1b]*)", plain)


def train(tracker: ConsoleTracker, first: int, last: int) -> None:
    for step in range(first, last + 1):
        if step % 2 == 0:
            tracker.log(step, TRAINING)
        if step % 4 == 0:
            tracker.log(step, VALIDATION)


def test_plain_lines_in_a_log_file(plan: Plan) -> None:
    console = log_file()
    tracker = ConsoleTracker(plan, 0, console)
    tracker.show(0, START)
    tracker.log(2, TRAINING | {"train/mfu": 0.41})
    tracker.log(4, VALIDATION | {"val_ema/top1": 80.0, "val_ema/top5": 94.0, "val_ema/loss": 0.8})
    lines = text_of(console).splitlines()
    assert len(lines) == 2
    assert re.fullmatch(
        r"step 2/12  epoch 0.50  loss 1.250 lr 1.0e-03 640 images/s data wait 3% MFU 41%  left \d+:\d\d:\d\d", lines[0]
    )
    assert lines[1].startswith("epoch 1/3  validation  top-1 81.48 %  top-5 95.76 %  loss 0.7500  ema top-1 80.00 %")
    assert lines[1].endswith("best 82.00 %")


@pytest.mark.parametrize(("mode", "on_tty"), [("auto", False), ("plain", False), ("plain", True)])
def test_lines_and_table_hold_no_control_codes(plan: Plan, mode: str, on_tty: bool) -> None:
    def draw(console: Console) -> None:
        tracker = ConsoleTracker(plan, 0, console, mode)  # type: ignore[arg-type]
        tracker.show(0, START)
        train(tracker, 1, 12)
        tracker.close("done")

    if on_tty:
        said = on_terminal(draw)
    else:
        draw(console := log_file())
        said = text_of(console)
    assert "\x1b" not in said
    assert said.count("validation  top-1 81.48 %") == 3
    assert len(re.findall(r"^step \d+/12  epoch", said, re.MULTILINE)) == 6
    assert rows_of(said.replace("\r", ""))["done"] == "step 12 of 12, epoch 3 of 3"


def test_quiet_is_the_table_and_what_others_have_to_say(plan: Plan) -> None:
    def draw(console: Console) -> None:
        tracker = ConsoleTracker(plan, 0, console, "quiet")
        tracker.show(0, START)
        train(tracker, 1, 7)
        console.print("warning: step 7 left out")
        tracker.close("interrupted")

    lines = screen(on_terminal(draw), 140)
    assert lines[0] == "warning: step 7 left out"
    assert lines[1].startswith("╭")
    assert "interrupted" in lines[2]
    assert len(lines) == len(rows_of("\n".join(lines))) + 3


def test_the_bar_leaves_the_validations_and_the_table(plan: Plan) -> None:
    def draw(console: Console) -> None:
        tracker = ConsoleTracker(plan, 0, console)
        tracker.show(0, START)
        train(tracker, 1, 12)
        tracker.close("done")
        console.print("done: top-1 81.48 %")

    said = on_terminal(draw)
    drawn = frames(said)
    assert re.fullmatch(r"epoch 1/3 ━+ 0/4 0% left \?", drawn[0]), "it is there before the first step is done"
    last = drawn[-1]
    assert re.fullmatch(r"epoch 3/3 ━+ 4/4 100% loss 1.250 lr 1.0e-03 640 images/s data wait 3% left 0:00:00", last)
    lines = screen(said, 140)
    assert [line.partition("  ")[0] for line in lines[:3]] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert "━" not in "".join(lines)
    assert lines[3].startswith("╭")
    assert lines[-2].startswith("╰")
    assert lines[-1] == "done: top-1 81.48 %"
    assert said.rfind("\x1b[?25h") > said.rfind("\x1b[?25l"), "the cursor is back"


def test_the_bar_moves_with_every_step_between_log_steps(plan: Plan) -> None:
    def draw(console: Console) -> None:
        steps = 0
        tracker = ConsoleTracker(plan, 0, console, "auto", lambda: steps)
        tracker.show(0, START)
        for steps in range(4):  # noqa: B007 - the tracker reads it
            time.sleep(0.6)
        tracker.close("done")

    counts = [found[1] for frame in frames(on_terminal(draw)) if (found := re.search(r" (\d)/4 ", frame))]
    assert set(counts) == {"0", "1", "2", "3"}
    assert counts == sorted(counts)


def test_prints_warnings_and_logging_meanwhile_come_out_whole_above_the_bar(plan: Plan) -> None:
    def draw(console: Console) -> None:
        tracker = ConsoleTracker(plan, 0, console)
        tracker.show(0, START)
        assert logging.lastResort is not None
        for number in range(20):
            train(tracker, number % 12 + 1, number % 12 + 1)
            console.print(f"warning: number {number}, said by the trainer, " + "long " * 40)
            print(f"printed {number}")
            print(f"an error {number}", file=sys.stderr)
            logging.lastResort.handle(logging.makeLogRecord({"msg": f"logged {number}", "levelno": 30}))
            speaker = threading.Thread(target=console.print, args=(f"the writer's {number}",))
            speaker.start()
            speaker.join()
        tracker.close("done")

    lines = screen(on_terminal(draw), 140)
    for number in range(20):
        assert f"warning: number {number}, said by the trainer, {'long ' * 40}".strip() in "".join(
            line.ljust(140) if line.startswith("warning") else line + "\n" for line in lines
        )
        for words in (f"printed {number}", f"an error {number}", f"logged {number}", f"the writer's {number}"):
            assert words in lines


@pytest.mark.parametrize("width", [*range(1, 40), 60, 80, 100, 140, 250])
def test_the_bar_is_one_line_however_narrow_the_terminal_is(plan: Plan, width: int) -> None:
    file = io.StringIO()
    console = Console(force_terminal=True, width=width, file=file, color_system=None, soft_wrap=True)
    tracker = ConsoleTracker(plan, 0, console, "plain")
    for step, record in ((0, {}), (2, TRAINING), (12, TRAINING | {"train/mfu": 0.4})):
        tracker.step, tracker.training = step, record
        console.print(tracker)
    drawn = file.getvalue()
    assert "\n" not in drawn.rstrip("\n")
    assert len(drawn) <= 3 * max(1, width - 1)
    if width >= 30:
        assert drawn.count("epoch") == 3
        assert "━" in drawn
    if width >= 140:
        assert "2/4 50% loss 1.250 lr 1.0e-03 640 images/s data wait 3% left" in drawn


def test_the_bar_follows_a_terminal_that_is_resized(plan: Plan) -> None:
    def draw(console: Console) -> None:
        tracker = ConsoleTracker(plan, 0, console)
        train(tracker, 1, 3)
        console.print("resize")
        os.read(0, 1)
        train(tracker, 4, 12)
        tracker.close("done")

    before, _, after = on_terminal(draw, 140, resized=50).partition("resize")
    assert max(len(frame) for frame in frames(before)) > 80
    assert frames(after)
    assert max(len(frame) for frame in frames(after)[2:]) < 50


def test_errors_that_are_sent_to_a_file_go_there(plan: Plan, tmp_path: Path) -> None:
    def draw(console: Console) -> None:
        os.dup2(os.open(tmp_path / "errors", os.O_WRONLY | os.O_CREAT), 2)
        tracker = ConsoleTracker(plan, 0, console)
        train(tracker, 1, 4)
        print("a warning", file=sys.stderr, flush=True)
        tracker.close("done")

    assert "a warning" not in on_terminal(draw)
    assert (tmp_path / "errors").read_text() == "a warning\n"


def test_ctrl_c_leaves_a_tidy_terminal(plan: Plan) -> None:
    def draw(console: Console) -> None:
        streams = sys.stdout, sys.stderr
        tracker = ConsoleTracker(plan, 0, console)
        tracker.show(0, START)
        try:
            train(tracker, 1, 6)
            time.sleep(0.2)
            os.kill(os.getpid(), 2)
            time.sleep(10)
        except KeyboardInterrupt:
            console.print("interrupted at step 6")
        finally:
            tracker.close("interrupted")
        assert (sys.stdout, sys.stderr) == streams

    said = on_terminal(draw)
    lines = screen(said, 140)
    assert lines[1] == "interrupted at step 6"
    assert "interrupted │ step 6 of 12, epoch 1.5 of 3" in lines[3]
    assert "━" not in "".join(lines)
    assert said.rfind("\x1b[?25h") > said.rfind("\x1b[?25l")


def test_a_forked_worker_can_speak_while_the_bar_is_drawn(plan: Plan) -> None:
    def draw(console: Console) -> None:
        tracker = ConsoleTracker(plan, 0, console)
        tracker.show(0, START)
        assert tracker.live is not None
        with tracker.live._lock:  # as if the thread that draws had it
            pid = os.fork()
            if pid == 0:
                print("a worker's last words", file=sys.stderr, flush=True)
                os._exit(0)
        _, status = os.waitpid(pid, 0)
        assert status == 0
        tracker.close("done")

    assert "a worker's last words" in on_terminal(draw)


def test_the_time_left_counts_from_where_the_run_went_on(plan: Plan) -> None:
    tracker = ConsoleTracker(plan, 6, console := log_file())
    tracker.start = (time.monotonic() - 10, 6)
    tracker.log(8, TRAINING)
    assert "left 0:00:20" in text_of(console), "2 steps took 10 s, 4 are left"


def test_the_table_says_what_the_run_came_to(plan: Plan) -> None:
    tracker = ConsoleTracker(plan, 2, console := log_file())
    ema = {"val_ema/top1": 84.5, "val_ema/top5": 97.0, "val_ema/loss": 0.5}
    tracker.log(4, TRAINING | {"train/images_per_s": 20.0, "train/data_wait": 0.5, "train/mfu": 0.2})  # 1 s
    tracker.log(4, VALIDATION | ema | {"val/best_top1": 84.5})
    tracker.log(8, TRAINING | {"train/images_per_s": 40.0 / 3, "train/data_wait": 0.1, "train/mfu": 0.4})  # 3 s
    tracker.log(8, VALIDATION | ema | {"val/top1": 9.0, "val_ema/top1": 84.5, "val/best_top1": 84.5})
    tracker.log(12, TRAINING | {"train/loss": 0.5, "train/skipped_steps": 2.0, "train/bad_images": 1.0})
    tracker.log(12, VALIDATION | ema | {"val_ema/top1": 84.0, "val/best_top1": 84.5})
    tracker.close("done")
    rows = rows_of(text_of(console))
    assert list(rows) == [
        "done", "time", "speed", "survived", "training", "last", "last, averaged", "best", "best, averaged"
    ]  # fmt: skip
    assert rows["done"] == "step 12 of 12, epoch 3 of 3"
    assert re.match(r"0:00:00 from step 2 on, [\d,]+% of it training", rows["time"])
    assert rows["survived"] == "2 steps left out, 1 bad images replaced"
    assert rows["training"] == "loss 0.5000"
    assert rows["last, averaged"] == "top-1  84.00 %  top-5  97.00 %  loss 0.5000  step 12"
    assert rows["best"] == "top-1  81.48 %  top-5  95.76 %  loss 0.7500  step 4", (
        "the first of equals, as the checkpoint"
    )
    assert rows["best, averaged"] == "top-1  84.50 %  top-5  97.00 %  loss 0.5000  step 4"
    seconds = 1 + 3 + 40 / 640
    wait, mfu = (0.5 + 0.3 + 0.03 * 40 / 640) / seconds, (0.2 + 1.2) / seconds
    assert rows["speed"] == f"{100 / seconds:.0f} images/s, data wait {wait:.0%}, MFU {mfu:.0%}"


def test_a_run_that_was_better_before_it_went_on_says_so(plan: Plan) -> None:
    tracker = ConsoleTracker(plan, 4, console := log_file())
    tracker.log(8, VALIDATION | {"val/best_top1": 90.0})
    tracker.rewind(6)
    tracker.log(8, VALIDATION | {"val/best_top1": 90.0, "val/top1": 83.0})
    tracker.close("failed")
    rows = rows_of(text_of(console))
    assert rows["best"] == "top-1  90.00 %  before this start"
    assert rows["last"].startswith("top-1  83.00 %")
    assert rows["survived"] == "1 rolled back"


def test_a_run_without_a_step_has_a_table_too(plan: Plan) -> None:
    tracker = ConsoleTracker(plan, 0, console := log_file(80))
    tracker.close("failed")
    assert rows_of(text_of(console)) == {"failed": "step 0 of 12, epoch 0 of 3", "time": "0:00:00"}
