"""Pack a class-folder tree into a few large files for fast loading, check such a pack, and turn it into a tree again.

python scripts/pack.py DIR OUT                                 # lossless: every pixel stays what it was
python scripts/pack.py DIR OUT --short-side 400 --quality 90   # smaller and faster: 41 dB from the originals
python scripts/pack.py DIR OUT --raw 256                       # fastest and largest: pixels, no JPEGs
python scripts/pack.py --verify OUT                            # every record against its checksum; names what is damaged
python scripts/pack.py --unpack OUT DIR                        # the class folders again

DIR holds train/ and val/, or one of them; OUT is then what data.root takes. JPEGs are coded anew in segments, which takes
no more room and lets the loader decode only what a crop covers; colour profiles and comments go. What is no plain JPEG stays
the file that it was. The other two kinds shrink images whose shorter side is larger, and --short-side codes anew whatever gets
smaller by that. However it is interrupted, the same command goes on. Every record is decoded and compared before it counts.

Exit status 0; 1 where --verify finds damage; 2 for an error.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import native
from data.pack import About
from scripts.packing import audit
from scripts.packing.records import Recipe
from scripts.packing.work import pack
from scripts.prepare.report import Report

NUM_CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
NUM_NAMED = 20


def main() -> None:
    args = _parse()
    report = Report()
    try:
        if args.verify:
            sys.exit(_verify(args.verify, args.workers, report))
        elif args.unpack:
            out, folder = args.unpack
            report.say(f"{folder}: {audit.unpack(out, folder, args.workers, report):,} images")
        else:
            _pack(args, report)
    except (ValueError, OSError) as error:
        _fail(" ".join(str(error).split()))
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr, flush=True)
        os._exit(130)  # the processes at work end with this one


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("paths", type=Path, nargs="*", metavar="DIR OUT", help="the tree, and where its pack is to be")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--lossless", action="store_true", help="the default")
    kinds.add_argument(
        "--short-side", type=int, metavar="PIXELS", help="JPEGs whose shorter side is no longer than that"
    )
    kinds.add_argument("--raw", type=int, metavar="PIXELS", help="the same, not coded")
    kinds.add_argument("--verify", type=Path, metavar="OUT", help="check a pack")
    kinds.add_argument("--unpack", type=Path, nargs=2, metavar=("OUT", "DIR"), help="write the tree of a pack")
    parser.add_argument("--quality", type=int, help="of the JPEGs of --short-side, 1 to 100")
    parser.add_argument(
        "--workers", type=int, default=NUM_CPUS, help="processes (default: %(default)s, one for each CPU)"
    )
    args = parser.parse_args()
    if len(args.paths) != (0 if args.verify or args.unpack else 2):
        parser.error("--verify and --unpack take no more folders" if args.verify or args.unpack else "give DIR and OUT")
    if (args.quality is None) != (args.short_side is None):
        parser.error("--short-side and --quality go together")
    for name in ("short_side", "raw", "quality", "workers"):
        value, highest = getattr(args, name), 100 if name == "quality" else 1 << 14
        if value is not None and not 1 <= value <= highest:
            parser.error(f"--{name.replace('_', '-')} {value}: 1 to {highest:,}")
    return args


def _pack(args: argparse.Namespace, report: Report) -> None:
    recipe = Recipe("raw", args.raw) if args.raw else Recipe()
    if args.short_side:
        recipe = Recipe("short-side", args.short_side, args.quality)
    if recipe.kind != "lossless":
        report.say(
            f"this changes the data: images whose shorter side exceeds {recipe.short_side} pixels are shrunk to that"
            f"{f', what gets smaller is coded with quality {recipe.quality}' if recipe.quality else ''}; accuracies may differ"
        )
    if recipe.kind != "raw" and not native.available():
        report.say(f"JPEGs stay the files that they are, without segments: {native.reason()}")
    root, out = args.paths
    for split, about in pack(root, out, recipe, args.workers, report).items():
        report.say(f"{out / split}: {_summary(about)}")


def _summary(about: About) -> str:
    counts, made_from = about.counts, about.parameters["made_from"]
    size = sum(num_bytes for num_bytes, _ in about.files.values())
    said = [
        f"{counts['images']:,} images of {len(about.class_names):,} classes",
        f"{size / 1e6:,.1f} MB, {size / max(1, made_from['bytes']):.1%} of the tree's",
    ]
    if about.parameters["segments"]:
        said.append(f"{counts['in_segments']:,} in segments")
    if counts["undecodable"]:
        said.append(f"{counts['undecodable']:,} that cannot be decoded, kept as they are")
    return "; ".join(said)


def _verify(out: Path, num_workers: int, report: Report) -> int:
    """Prints what is damaged; the exit status."""
    damaged = audit.verify(out, num_workers, report)
    for line in damaged[:NUM_NAMED]:
        report.say(f"damaged: {line}")
    if len(damaged) > NUM_NAMED:
        report.say(f"damaged: ... {len(damaged) - NUM_NAMED:,} more")
    report.say(f"{out}: {len(damaged):,} damaged records" if damaged else f"{out}: every record is as it was packed")
    return int(bool(damaged))


def _fail(text: str) -> NoReturn:
    print(f"pack.py: error: {text}", file=sys.stderr, flush=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
