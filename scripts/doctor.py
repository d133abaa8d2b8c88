"""What to look at before a night is wasted: machine, data, run folder, network and speed, for the run that is planned.

    python scripts/doctor.py experiment=vip_m7_imagenet data.root=/data/imagenet
    torchrun --nnodes=2 --nproc-per-node=8 ... scripts/doctor.py model=vip_l7 data.root=/data/imagenet

Takes the overrides of train.py. Start it as the run will be started: every rank then checks its own machine, and rank 0
prints one table (`--json`: one object). Nothing is left behind but the digits, where they are the data. Exit status
1 where a row is an error.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from scripts.checks import folder, machine, planned, ranks, speed, wandb_server
from scripts.checks.row import LOOK_THERE, Check, Finding, Row, Setup, carry_out, merge, refusal, worst
from vip.config import RunConfig, compose, parse
from vip.distributed import World, connect
from vip.ranks import one_line_errors

# A large tree takes minutes to list, and ranks that have joined wait for one another no longer than that.
BEFORE_JOINING: Sequence[Check] = (planned.data,)
CHECKS: Sequence[Check] = (
    planned.batch,
    planned.network,
    machine.software,
    machine.gpu,
    planned.precision,
    planned.compilation,
    planned.optimizer,
    planned.decoder,
    folder.run_folder,
    folder.shared_folder,
    machine.memory,
    machine.shared_memory,
    machine.open_files,
    ranks.all_reduce,
    ranks.clocks,
    wandb_server.wandb,
    speed.loader,
    speed.training,
)
COLOURS = {"skipped": "dim", "ok": "green", "warning": "yellow", "error": "bold red"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Check what a run needs before it begins; exit status 1 for an error.")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="those of train.py (train.py --help lists them)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args = parser.parse_args()
    with one_line_errors():
        has_error = examine(parse(RunConfig, compose("train", args.overrides)), args.json)
    raise SystemExit(int(has_error))


def examine(run: RunConfig, as_json: bool) -> bool:
    """Check everything and print it, once; True where there is an error. A rank that cannot join the others prints its own."""
    setup = Setup(run, _alone())
    rows = carry_out(BEFORE_JOINING, setup)
    with contextlib.ExitStack() as stack:
        try:
            setup.world = stack.enter_context(connect())
        except (RuntimeError, ValueError, OSError) as error:
            rows.append(dataclasses.replace(refusal(error), check="processes"))
        joined = setup.world.size == setup.num_processes
        rows += carry_out(CHECKS, setup)
        findings = merge(*_all_ranks(setup.world, rows))
        if setup.world.is_main or not joined:
            print_json(findings) if as_json else print_table(findings, setup)
        try:
            setup.world.ask(False).result()  # rank 0 has spoken before another's exit status makes torchrun end it
        except RuntimeError:
            raise SystemExit(1) from None  # without leaving the group, which could wait for ranks that are gone
    return worst(findings) == "error"


def print_json(findings: Sequence[Finding]) -> None:
    rows = [dataclasses.asdict(finding) for finding in findings]
    print(json.dumps({"status": worst(findings), "rows": rows}, indent=2), flush=True)


def print_table(findings: Sequence[Finding], setup: Setup) -> None:
    several = setup.world.size > 1
    table = Table(title=f"{setup.run.model.name} on {setup.run.data.kind}", title_justify="left", show_lines=True)
    for name in ("check", "status", "found", "remedy", *(["where"] if several else [])):
        table.add_column(name)
    for found in findings:
        where = "all" if len(found.ranks) == setup.world.size else f"{_ranges(found.ranks)} ({', '.join(found.hosts)})"
        status = Text(found.status, COLOURS[found.status])
        table.add_row(found.check, status, found.value, found.remedy, *([where] if several else []))
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(table)
    counts = ", ".join(f"{sum(found.status == status for found in findings)} {status}" for status in COLOURS)
    console.print(f"{worst(findings)}: {counts}")


def _alone() -> World:
    """This process without the others, until it joins them."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    has_gpu = local_rank < torch.cuda.device_count()
    return World(
        int(os.environ.get("RANK", "0")), 1, torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    )


def _all_ranks(world: World, rows: Sequence[Row]) -> tuple[list[list[Row]], list[str]]:
    """The rows and the host of every rank, on every rank; of this one alone where another is gone."""
    own = json.dumps([socket.gethostname(), [dataclasses.asdict(row) for row in rows]]).encode()
    try:
        lengths = world.gather(torch.tensor([len(own)], device=world.device)).tolist()
        padded = torch.tensor(list(own.ljust(max(lengths))), dtype=torch.uint8, device=world.device)
        texts = world.gather(padded[None]).tolist()
    except RuntimeError as error:
        lost = Row("error", world.explain(error) or str(error), LOOK_THERE, check="processes")
        return [[*rows, lost]], [socket.gethostname()]
    reports = [json.loads(bytes(text)) for text in texts]
    return [[Row(**row) for row in report[1]] for report in reports], [report[0] for report in reports]


def _ranges(ranks: list[int]) -> str:
    """`rank 3`, `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    shown = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


if __name__ == "__main__":
    main()
