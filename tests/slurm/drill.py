"""One training on two nodes, through everything that a cluster does to it: what each cause costs, as a table.

    python -m tests.slurm.drill [CAUSE ...]          as root, 10 minutes; all causes if none is named

The run must end by itself, with the bits of one that nothing touched, of as many processes on one node. Exit status 1 where it
does not, or where a cause that comes with a warning costs a step.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from data.digits import prepare_digits
from scripts.faults.launch import ROOT, Launch
from tests.slurm.cluster import NODE_TIMEOUT_S, Cluster, missing

SBATCH = ROOT / "scripts/slurm/train.sbatch"
PATIENCE_S = 400.0  # a start takes 15 s on an idle machine, but this one may be busy
CUT_S = 30.0
SAVE_EVERY = 6
OVERRIDES = (
    "experiment=digits", "name=run", "batch_size=128", "micro_batch=32", "ema_decay=0.9", "model.drop_path.rate=0.2",
    "epochs=200", "eval_every=1000", f"save_every={SAVE_EVERY}", "log_every=1",
)  # fmt: skip
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL")


class Run:
    """A job of train.sbatch, submitted in the folder `cwd` with sbatch's `options`."""

    def __init__(self, cluster: Cluster, cwd: Path, *overrides: str, options: Sequence[str] = ("--nodes=2",)) -> None:
        self.cluster, self.cwd = cluster, cwd
        self.job = cluster.submit(*options, SBATCH, *overrides, cwd=cwd)

    @property
    def said(self) -> str:
        log = self.cwd / f"slurm-{self.job}.out"
        return log.read_text(errors="replace") if log.exists() else ""

    @property
    def starts(self) -> list[int]:
        """The steps that it went on from, at each start of the job or of its ranks."""
        return [int(step or 0) for step in re.findall(r"^folder .* (?:start|step (\d+))$", self.said, re.MULTILINE)]

    @property
    def steps(self) -> list[int]:
        """Those made since the last start."""
        since = self.said.rpartition("\nfolder ")[2] if self.starts else ""
        return [int(step) for step in re.findall(r"^step (\d+)/", since, re.MULTILINE)]

    @property
    def nodes(self) -> list[str]:
        return self.cluster.run("scontrol", "show", "hostnames", self.field("NodeList")).split()

    def field(self, name: str) -> str:
        return self.cluster.job(self.job)[name]

    def end(self) -> str:
        """Wait for it; the job's last state."""
        self.cluster.wait_for(lambda: self.field("JobState") in ENDED, f"end of job {self.job}", PATIENCE_S)
        return self.field("JobState")

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Raises RuntimeError with the job's log where the job ends before, or it takes too long."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > deadline or (self.field("JobState") in ENDED and not condition()):
                raise RuntimeError(f"job {self.job} {self.field('JobState')}: no {what}:\n{self.said}")
            time.sleep(0.1)


def requeue(run: Run) -> None:
    run.cluster.run("scontrol", "requeue", run.job)


def time_limit(run: Run) -> None:
    """Two minutes from the job's start: the warning, 120 s before, is due at once; Slurm looks every 30 s. Until then the job's
    processes are stopped, or it would be at its end first."""
    restarts = run.field("Restarts")
    run.cluster.run("scancel", "--signal=STOP", run.job)
    run.cluster.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=2")
    run.wait_for(lambda: "time limit: asking" in run.said, "warning")
    run.cluster.run("scancel", "--signal=CONT", run.job)
    run.wait_for(lambda: run.field("Restarts") != restarts, "requeue")
    run.cluster.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=UNLIMITED")


def preemption(run: Run) -> None:
    """By a job of a higher partition that needs every node."""
    everything = (f"--nodes={len(run.cluster.nodes)}", "--exclusive")
    run.cluster.submit("--partition=urgent", *everything, "--output=/dev/null", "--wrap=true", cwd=run.cwd)


def killed_worker(run: Run) -> None:
    node = run.nodes[1]
    pid = run.cluster.run(
        "pgrep", "--oldest", "--full", "python.* -u .*train.py", on=node
    )  # forked loaders are younger
    run.cluster.run("kill", "-KILL", pid.strip(), on=node)


def killed_node(run: Run) -> None:
    """The second one; a spare takes its place."""
    run.cluster.kill(run.nodes[1])


def killed_first_node(run: Run) -> None:
    """The one with the batch script, the rendezvous and rank 0."""
    run.cluster.kill(run.nodes[0])


def silent_node(run: Run) -> None:
    """Its link goes before its power: nobody hears of its end."""
    node = run.nodes[1]
    run.cluster.link(node, "down")
    run.cluster.kill(node)


def cut_link(run: Run) -> None:
    """For 30 s; Slurm, as most are set up, is more patient than that."""
    node = run.nodes[1]
    run.cluster.configure("SlurmdTimeout", 300)
    run.cluster.link(node, "down")
    time.sleep(CUT_S)
    run.cluster.link(node, "up")
    run.cluster.configure("SlurmdTimeout", NODE_TIMEOUT_S)


@dataclass(frozen=True)
class Cause:
    """`warns`: no step may be lost. `may_go_on`: the ranks can live through it."""

    act: Callable[[Run], None]
    warns: bool = False
    may_go_on: bool = False


CAUSES = {
    "requeue": Cause(requeue, warns=True),
    "time_limit": Cause(time_limit, warns=True),
    "preemption": Cause(preemption, warns=True),
    "killed_worker": Cause(killed_worker),
    "killed_node": Cause(killed_node),
    "killed_first_node": Cause(killed_first_node),
    "silent_node": Cause(silent_node),
    "cut_link": Cause(cut_link, may_go_on=True),
}


@dataclass(frozen=True)
class Cost:
    """`steps_lost` had been made and were made again; `seconds` from the cause to the first step after it."""

    steps_lost: int
    seconds: float


def suffer(run: Run, cause: Cause) -> Cost:
    """Let it happen to a run that has saved since its last start; back when it has gone on."""
    run.wait_for(lambda: len(run.steps) > SAVE_EVERY * 3 // 2, "steps")
    num_starts, began = len(run.starts), time.monotonic()
    cause.act(run)
    made = run.steps[-1]

    def goes_on() -> bool:
        return len(run.starts) > num_starts or (cause.may_go_on and run.steps[-1] > made)

    run.wait_for(lambda: goes_on() and bool(run.steps), "step after that")
    seconds = time.monotonic() - began
    if len(run.starts) == num_starts:
        return Cost(0, seconds)
    before = run.said.rpartition("\nfolder ")[0]
    made = max(int(step) for step in re.findall(r"^step (\d+)/", before, re.MULTILINE))
    for node in set(run.cluster.nodes) - set(run.cluster.inits):
        run.cluster.power_on(node)
    return Cost(made - run.starts[-1], seconds)


@dataclass(frozen=True)
class Report:
    """`state` is Slurm's, of the job; `differing` names the tensors of the last checkpoint that an undisturbed run has not."""

    costs: dict[str, Cost]
    state: str
    said: str
    differing: list[str]


def drill(cluster: Cluster, folder: Path, digits: Path, names: Sequence[str]) -> Report:
    """One run through the causes in turn. The undisturbed one runs meanwhile, in what time the processor has left."""
    num_steps = SAVE_EVERY * (5 * len(names) + 1)
    overrides = (*OVERRIDES, f"data.root={digits}", f"max_steps={num_steps}")
    (folder / "nodes").mkdir(parents=True)
    run = Run(cluster, folder / "nodes", *overrides)
    with Launch(overrides, folder / "undisturbed", processes=2) as undisturbed:
        for pid in undisturbed.pids:
            os.setpriority(os.PRIO_PROCESS, pid, 10)
        costs = {name: suffer(run, CAUSES[name]) for name in names}
        state = run.end()
        if any(undisturbed.wait(2 * PATIENCE_S)):
            raise RuntimeError(undisturbed.output)
    last = f"runs/run/checkpoints/step_{num_steps:010d}.safetensors"
    one, other = load_file(folder / "nodes" / last), load_file(folder / "undisturbed" / last)
    differing = sorted(name for name in one.keys() | other.keys() if not _same(one.get(name), other.get(name)))
    return Report(costs, state, run.said, differing)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("causes", nargs="*", choices=[[], *CAUSES], metavar="CAUSE", help=", ".join(CAUSES))
    names = parser.parse_args().causes or list(CAUSES)
    if reason := missing():
        parser.error(reason)
    with tempfile.TemporaryDirectory() as name:
        prepare_digits(Path(name) / "digits")
        with Cluster(Path(name) / "cluster") as cluster:
            report = drill(cluster, Path(name), Path(name) / "digits", names)
    table = Table("cause", "steps lost", "seconds to the next step")
    for name, cost in report.costs.items():
        table.add_row(name, str(cost.steps_lost), f"{cost.seconds:.0f}")
    console = Console(highlight=False)
    console.print(table)
    console.print(f"job {report.state}; " + (f"differs: {report.differing}" if report.differing else "the same bits"))
    unwarned = all(cost.steps_lost == 0 for name, cost in report.costs.items() if CAUSES[name].warns)
    return 0 if report.state == "COMPLETED" and not report.differing and unwarned else 1


if __name__ == "__main__":
    sys.exit(main())
