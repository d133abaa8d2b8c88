"""Signals at random moments: kills that may meet a run anywhere, and requests to stop, which must lose nothing."""

import random
import re
import signal
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from scripts.faults.launch import Launch, Numbers
from scripts.faults.resume import Setting, logged_steps, step_file, steps_on_disk

SAVE_EVERY = 4
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
PEERS_PATIENCE_S = 3.0


@dataclass
class Storm:
    """Runs that are killed until they are done; `spread` is how late a random moment can be, in seconds after a launch."""

    setting: Setting
    folder: Path
    spread: float
    draw: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    most_repeated: int = 0
    troubles: list[str] = field(default_factory=list)

    def blow(self, kills: int, inside_saves: int) -> None:
        """One run from start to end, killed on the way until there were `kills` of them, `inside_saves` inside a save."""
        cwd = self.folder / f"storm{self.setting.processes}_{self.counts['runs']}"
        finished = False
        while not finished:
            logged = max(logged_steps(cwd), default=0)
            with self.setting.launch(cwd, self.counts["launches"]) as launch:
                missing = inside_saves - self.counts["inside_saves"]
                if missing > 0 or self.counts["kills"] < kills:
                    self._kill(launch, cwd, inside_save=missing > 0 and self.draw.random() < 0.5)
                finished = not any(launch.wait())
            self.counts["launches"] += 1
            self._judge(launch, logged)
        self.counts["runs"] += 1
        self.troubles += self.setting.differing(cwd, self.setting.steps)
        if logged_steps(cwd) != logged_steps(self.setting.undisturbed):
            self.troubles.append(f"{cwd.name}: steps are missing from metrics.jsonl, or there twice")
        if list(cwd.rglob("*.damaged")):
            self.troubles.append(f"{cwd.name}: a damaged checkpoint")

    def _kill(self, launch: Launch, cwd: Path, inside_save: bool) -> None:
        """Kill one rank or all, at a random moment or as soon as a checkpoint is being written (by rank 0)."""
        before = _unfinished_saves(cwd)
        if inside_save:
            met = launch.wait_until(lambda: bool(_unfinished_saves(cwd) - before), period=0.0005)
        else:
            moment = launch.started + self.draw.uniform(0, self.spread)
            met = launch.wait_until(lambda: time.monotonic() > moment)
        if not met:  # it was done before
            return
        rank = self.draw.choice([None, 0 if inside_save else self.draw.randrange(len(launch.ranks))])
        launch.kill(rank)
        launch.ranks[rank or 0].join()
        if rank is not None:  # torchrun does this to the other ranks
            launch.kill(None, signal.SIGTERM)
            deadline = time.monotonic() + PEERS_PATIENCE_S
            for peer in launch.ranks:
                peer.join(max(0.0, deadline - time.monotonic()))
        if launch.stop()[rank or 0] == -signal.SIGKILL:
            kind = "one" if rank is not None and len(launch.ranks) > 1 else "all"
            self.counts.update(["kills", kind, *(["inside_saves"] if _unfinished_saves(cwd) - before else [])])

    def _judge(self, launch: Launch, logged: int) -> None:
        """A launch ends by a kill or at the end of the run, and repeats no more than the steps since a save."""
        statuses = {rank.exitcode for rank in launch.ranks}
        if -signal.SIGKILL not in statuses and statuses != {0}:
            self.troubles.append(f"a launch ended by itself with {statuses}: {launch.output[-2000:]}")
        start = _start(launch)
        if start is not None:
            self.most_repeated = max(self.most_repeated, logged - start)


def storm(count: int, folder: Path, worlds: tuple[int, ...] = (1, 2), steps: int = 120) -> Numbers:
    """Kill runs of `steps` steps `count` times, a fifth of them inside a save, each until it has reached its end.

    Numbers: `kills`, of `one` rank and of `all`, `inside_saves`; `runs` that came to their end; `repeated`, the most steps
    that a launch did again, and `save_every`; `troubles`: differing tensors, lost lines, damage, runs that would not go on.
    """
    counts: Counter[str] = Counter()
    repeated, troubles = 0, []
    for i, processes in enumerate(worlds):
        setting = Setting(folder, processes, steps, f"save_every={SAVE_EVERY}")
        one = Storm(setting, folder, 2 * setting.train_undisturbed(), random.Random(processes))
        kills, inside_saves = (_share(number, i, len(worlds)) for number in (count, count // 5))
        while not one.counts["runs"] or one.counts["kills"] < kills or one.counts["inside_saves"] < inside_saves:
            one.blow(kills, inside_saves)
        counts += one.counts
        repeated = max(repeated, one.most_repeated)
        troubles += one.troubles
    shown = {name: counts[name] for name in ("kills", "one", "all", "inside_saves", "launches", "runs")}
    return shown | {"repeated": repeated, "save_every": SAVE_EVERY} | _named(troubles)


def signals(count: int, folder: Path, worlds: tuple[int, ...] = (1, 2)) -> Numbers:
    """Ask a run to stop, `count` times, at random moments from the first at which it listens; every time it goes on.

    Numbers: `stops`; `lost_steps`, done but not in the newest checkpoint; `steps_after`, the most that ended after the
    signal, with the one in flight; seconds from the signal to the exit; `troubles`: PREEMPTED, newest checkpoint, last step
    and the next start that are not one number, and another exit status than the signal's.
    """
    draw, lost, after, seconds = random.Random(0), 0, [0], [0.0]
    troubles: list[str] = []
    for i, processes in enumerate(worlds):
        setting = Setting(folder, processes, 100_000)
        cwd, stopped_at = folder / f"stopped{processes}", 0
        for number in range(_share(count, i, len(worlds))):
            wanted = STOP_SIGNALS[number % len(STOP_SIGNALS)]
            with setting.launch(cwd, number) as launch:
                _wait_until_it_listens(launch)
                time.sleep(draw.uniform(0, 2))
                before, asked = max(logged_steps(cwd), default=0), time.monotonic()
                launch.kill(draw.choice([None, *range(processes)]), wanted)
                statuses = launch.wait()
                seconds.append(time.monotonic() - asked)
            start, marked = _start(launch), int((cwd / "runs/run/PREEMPTED").read_text())
            last, saved = max(logged_steps(cwd)), max(steps_on_disk(cwd))
            lost += last - saved
            after.append(last - before)
            if start != stopped_at or not marked == last == saved or 128 + wanted not in statuses:
                troubles.append(
                    f"{wanted.name}: from {start} instead of {stopped_at}, PREEMPTED {marked}, logged {last}, saved {saved}, "
                    f"exit statuses {statuses}: {launch.output[-2000:]}"
                )
            stopped_at = saved
    facts: Numbers = {"stops": len(seconds) - 1, "lost_steps": lost, "steps_after": max(after)}
    return {**facts, "median_s": statistics.median(seconds[1:]), "max_s": max(seconds), **_named(troubles)}


def _wait_until_it_listens(launch: Launch) -> None:
    """Until every rank catches the last of the signals, as the kernel knows."""
    bit = 1 << (STOP_SIGNALS[-1] - 1)

    def listens(pid: int) -> bool:
        status = Path(f"/proc/{pid}/status").read_text()
        return bool(int(status.partition("SigCgt:")[2].split()[0], 16) & bit)

    launch.wait_until(lambda: all(map(listens, launch.pids)))


def _start(launch: Launch) -> int | None:
    """The step that a launch went on from, 0 for a fresh start; None where it was killed before it said so."""
    found = re.search(r"goes on from step (\d+)\n|(from the start)\n", launch.output)
    return int(found[1] or 0) if found else None


def _unfinished_saves(cwd: Path) -> set[str]:
    folder = step_file(cwd, 0).parent
    return {path.name for path in folder.glob(".step_*")} if folder.exists() else set()


def _share(number: int, part: int, parts: int) -> int:
    return number * (part + 1) // parts - number * part // parts


def _named(troubles: list[str]) -> dict[str, float | str]:
    first: dict[str, float | str] = {"first_trouble": troubles[0]} if troubles else {}
    return {"troubles": len(troubles), **first}
