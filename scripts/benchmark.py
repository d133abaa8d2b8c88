"""Speed, measured on this machine: `data` the loader against timm's and others', `model` the networks against their peers.

python scripts/benchmark.py data                      # on JPEGs that it makes from sample photographs
python scripts/benchmark.py data --root DIR           # on real ones: DIR/train/<class>/*
python scripts/benchmark.py model                     # every size and its peers, eager and compiled
python scripts/benchmark.py model --networks vip_s7 literal/vip_s7 --modes eager --precisions bf16
python scripts/benchmark.py data --files 1281167      # and how soon the first batch comes from so many

Candidates take turns, and each figure is the median of several rounds: ratios hold where absolute speeds drift.
Exit status 0, or 2 for an error.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core each; before torch is imported

from rich.console import Console
from rich.table import Table

NUM_IMAGES = 960
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
        raise SystemExit(f"{Path(sys.argv[0]).name}: error: {error}") from None
    if args.json:
        print(json.dumps(tables, indent=1))
        return
    console = Console(width=120)
    console.print(f"{date.today()}, {_processor()}, {os.cpu_count()} cores")
    for title, rows in tables.items():
        console.print(_table(title, rows))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="the loader")
    data.add_argument("--root", type=Path, help="a class-folder tree (default: made from sample photographs)")
    data.add_argument(
        "--work", type=Path, default=Path("datasets/benchmark"), help="where packs and made images go (%(default)s)"
    )
    data.add_argument("--files", type=int, help="also time the start on a tree of so many links to the made images")
    data.add_argument("--rounds", type=int, default=7)
    data.add_argument("--batches", type=int, default=3, help="of 64 images, in each round (%(default)s)")
    data.set_defaults(measure=measure_data)
    model = commands.add_parser("model", help="the networks")
    model.add_argument(
        "--networks", nargs="+", help="names of timm's, literal/NAME for ours (default: all sizes and peers)"
    )
    model.add_argument("--precisions", nargs="+", choices=("fp32", "bf16", "fp16"), help="default: those of the device")
    model.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    model.add_argument("--batch", type=int, default=8, help="images (%(default)s)")
    model.add_argument("--rounds", type=int, default=7)
    model.set_defaults(measure=measure_model)
    for command in (data, model):
        command.add_argument("--json", action="store_true", help="figures for programs")
    return parser.parse_args()


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
    import torch

    from scripts.bench import model as bench

    names = args.networks or [*bench.OURS, "literal/vip_s7", *bench.PEERS]
    on_gpu = torch.cuda.is_available()
    precisions = args.precisions or ["fp32", "bf16", *["fp16"] * on_gpu]
    return {
        "bytes that an eager training step moves in fp16, counted": list(bench.traffic(names)),
        f"speed at batch {args.batch} (memory limit: of the speed at which the products' bytes alone would fill the bandwidth)": [
            row for each in precisions for row in bench.speeds(names, each, args.modes, args.batch, args.rounds)
        ],
        "share of an eager training step's time, %": [
            row for each in precisions for row in bench.shares(names, each, args.batch)
        ],
    }


def _pack(root: Path, out: Path, options: list[str]) -> Path:
    script = Path(__file__).with_name("pack.py")
    subprocess.run([sys.executable, script, root, out, *options], check=True, stdout=subprocess.DEVNULL)
    return out


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
        table.add_column(column, justify="left" if column in ("pipeline", "stage", "what", "network") else "right")
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    return table


if __name__ == "__main__":
    main()
