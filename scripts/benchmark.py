"""Speed and sameness, measured on this machine, one subcommand for each question.

python scripts/benchmark.py data                      # the loader against timm's and others', on JPEGs that it makes
python scripts/benchmark.py data --root DIR           # on real ones: DIR/train/<class>/*
python scripts/benchmark.py data --files 1281167      # and how soon the first batch comes from so many
python scripts/benchmark.py model                     # every size and its peers, eager and compiled: half an hour on 2 cores
python scripts/benchmark.py model --networks vip_s7 literal/vip_s7 --modes eager --precisions bf16      # minutes
python scripts/benchmark.py depth                     # stochastic depth that skips what it drops: what it saves
python scripts/benchmark.py convergence --seeds 5     # trained in our form and in the literal one: equally well?
python scripts/benchmark.py tracking                  # what the trackers take of a step

Candidates take turns, and each figure is the median of several rounds: ratios hold where absolute speeds drift.
Tables go to stdout, progress to stderr. Exit status 0, 1 where the two forms of `convergence` differ, 2 for an error.

Columns of `model`: `x literal` beside the network's equations written down literally (literal/NAME, where it is among the
candidates); MFU: of the rate of a large product; roofline: of the speed at which either the products or the bytes
of their operands would take all the time; stored: what is kept for the backward pass, on a GPU instead the peak of
a step, beside the weights; moved: inputs and outputs of every operation, or of every kernel that inductor would make for a GPU.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from datetime import date, datetime
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core each; before torch is imported

from rich.console import Console
from rich.table import Table

NUM_IMAGES = 960
PASSED = "within the noise"
PACKS = {
    "lossless pack": ["--lossless"],
    "400 q90 pack": ["--short-side", "400", "--quality", "90"],
    "raw 256 pack": ["--raw", "256"],
}


def main() -> None:
    args = _parse()
    try:
        tables = args.measure(args)
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    import torch

    facts = {"date": str(date.today()), "device": _device(), "torch": torch.__version__, "command": _command()}
    if args.json:
        print(json.dumps({**facts, "tables": tables}, indent=1))
    else:
        console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
        for key, value in facts.items():
            console.print(f"{key:8s} {value}", soft_wrap=True, markup=False)
        for title, rows in tables.items():
            console.print(_table(title, rows))
    verdicts = {row.get("verdict", PASSED) for rows in tables.values() for row in rows}
    raise SystemExit(int(verdicts != {PASSED}))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{Path(sys.argv[0]).name}: error: {message}; --help says more\n")


def _parse() -> argparse.Namespace:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="the loader")
    data.add_argument("--root", type=Path, help="a class-folder tree (default: made from sample photographs)")
    data.add_argument(
        "--work", type=Path, default=Path("datasets/benchmark"), help="where packs and made images go (%(default)s)"
    )
    data.add_argument("--files", type=_count, help="also time the start on a tree of so many links to the made images")
    data.add_argument("--rounds", type=_count, default=7)
    data.add_argument("--batches", type=_count, default=3, help="of 64 images, in each round (%(default)s)")
    data.set_defaults(measure=measure_data)
    model = commands.add_parser("model", help="the networks")
    model.add_argument(
        "--networks",
        nargs="+",
        default=[],
        help="names of timm's, literal/NAME for ours (default: all sizes and peers)",
    )
    model.add_argument("--precisions", nargs="+", choices=("fp32", "bf16", "fp16"), help="default: those of the device")
    model.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    model.add_argument("--batch", type=_count, help="images (default: 64 on a GPU, 2 on a CPU)")
    model.add_argument("--rounds", type=_count, help="default: 7 on a GPU, 3 on a CPU")
    model.set_defaults(measure=measure_model)
    depth = commands.add_parser("depth", help="what stochastic depth saves that skips the samples it drops")
    depth.add_argument("--network", default="vip_s7", help="one of ours (%(default)s)")
    depth.add_argument("--precisions", nargs="+", choices=("fp32", "bf16", "fp16"), default=["fp32", "bf16"])
    depth.add_argument("--batch", type=_count, default=16, help="images (%(default)s)")
    depth.add_argument("--rounds", type=_count, default=3)
    depth.set_defaults(measure=measure_depth)
    convergence = commands.add_parser("convergence", help="our form of the network against the literal one, trained")
    convergence.add_argument("--seeds", type=_count, default=5, help="runs of each form (%(default)s)")
    convergence.add_argument("--epochs", type=_count, default=12, help="of experiment=digits (%(default)s)")
    convergence.set_defaults(measure=measure_convergence)
    tracking = commands.add_parser("tracking", help="what the trackers take of a step")
    tracking.add_argument("--interval", type=_count, default=50, help="steps between log steps (%(default)s)")
    tracking.add_argument("--rounds", type=_count, default=5)
    tracking.set_defaults(measure=measure_tracking)
    for command in (convergence, tracking):
        command.add_argument("--root", help="where the digits are kept (default: that of conf/data/digits.yaml)")
    for command in (data, model, depth, convergence, tracking):
        command.add_argument("--json", action="store_true", help="figures for programs")
    return parser.parse_args()


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number from 1 on")
    return int(text)


def measure_data(args: argparse.Namespace) -> dict[str, list[dict[str, object]]]:
    """Tables by title: rows of column and value."""
    from scripts.bench import data as bench
    from scripts.bench.photos import write_photos

    root: Path = args.root or args.work / "photos"
    if args.root is None:
        write_photos(root, NUM_IMAGES)
    packs = {name: _pack(root, args.work / name.replace(" ", "-"), options) for name, options in PACKS.items()}
    speeds = bench.speeds(root, packs, args.rounds, args.batches)
    base = next(iter(speeds.values()))
    walls = bench.scaling(root, args.rounds, args.batches * 2)
    starts = {f"start on {args.files:,} files": _starts(root, args)} if args.files else {}
    return {
        "to a normalised float batch, one core": [
            {"pipeline": name, "images/s": round(speed), "x timm": round(speed / base, 2)}
            for name, speed in speeds.items()
        ],
        "up to uint8 batches, by the wall's clock": [
            {"pipeline": name, "images/s": round(speed)} for name, speed in walls.items()
        ],
        "stages": [
            {"stage": name, "us an image": round(time)} for name, time in bench.stages(root, args.rounds).items()
        ],
        "against Pillow, PSNR over 192 images": [
            {"what": name, "lowest dB": low, "median dB": median} for name, low, median in bench.quality(root)
        ],
        **starts,
    }


def _starts(root: Path, args: argparse.Namespace) -> list[dict[str, object]]:
    from scripts.bench import listing

    tree = args.work / "files"
    listing.link_tree(root, tree, args.files)
    workers = os.cpu_count() or 1
    return [{"what": name, "ms": round(1e3 * seconds)} for name, seconds in listing.seconds(tree, workers)]


def measure_model(args: argparse.Namespace) -> dict[str, list[dict[str, object]]]:
    """Tables by title: rows of column and value."""
    from scripts.bench import model as bench

    return bench.measure(args.networks, args.precisions, args.modes, args.batch, args.rounds, _say)


def measure_depth(args: argparse.Namespace) -> dict[str, list[dict[str, object]]]:
    """Tables by title: rows of column and value."""
    from scripts.bench import depth as bench
    from vip.models.variants import VARIANTS

    if args.network not in VARIANTS:
        raise ValueError(f"--network {args.network}: skips no samples; take one of {', '.join(VARIANTS)}")
    rows = list(bench.savings(args.network, tuple(args.precisions), batch=args.batch, rounds=args.rounds))
    return {f"time of a training step at batch {args.batch}, of one that drops nothing": rows}


def measure_convergence(args: argparse.Namespace) -> dict[str, list[dict[str, object]]]:
    """Tables by title: rows of column and value."""
    from scripts.bench import convergence as bench

    return bench.measure(args.seeds, args.epochs, args.root, _say)


def measure_tracking(args: argparse.Namespace) -> dict[str, list[dict[str, object]]]:
    """Tables by title: rows of column and value."""
    from scripts.bench import tracking as bench

    return bench.measure(args.interval, args.rounds, args.root, _say)


def _pack(root: Path, out: Path, options: list[str]) -> Path:
    script = Path(__file__).with_name("pack.py")
    subprocess.run([sys.executable, script, root, out, *options], check=True, stdout=subprocess.DEVNULL)
    return out


def _say(what: str) -> None:
    print(f"{datetime.now():%H:%M:%S} {what}", file=sys.stderr, flush=True)


def _device() -> str:
    import torch

    threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{_processor()}, {threads}"


def _command() -> str:
    return shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]])


def _processor() -> str:
    try:
        lines: Iterable[str] = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = ()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _table(title: str, rows: list[dict[str, object]]) -> Table:
    table = Table(title=title, title_justify="left")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for column in columns:
        table.add_column(
            column,
            justify="left"
            if column in ("pipeline", "stage", "what", "network", "form", "figure", "tracked")
            else "right",
        )
    for row in rows:
        table.add_row(*(_cell(row.get(column, "")) for column in columns))
    return table


def _cell(value: object) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
