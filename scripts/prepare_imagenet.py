"""Make ImageNet-1k a tree of class folders with a manifest, as `data=imagenet` wants it, and audit such a tree.

python scripts/prepare_imagenet.py --archives DOWNLOADS --out DIR     # or --train FILE --val FILE --devkit FILE
python scripts/prepare_imagenet.py --parquet DOWNLOADS --out DIR     # a hub's copy; with --devkit FILE its counts are checked
python scripts/prepare_imagenet.py --tree DIR     # train/ and val/ are there: decodes every image, writes the manifest
python scripts/prepare_imagenet.py --verify --out DIR     # names the files that are missing, added or changed

DOWNLOADS holds ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz (from image-net.org, after
registration), whose MD5 sums are checked. However it is interrupted, the same command goes on. Every image is decoded once;
DIR/manifest.json notes its size, checksum and oddities, DIR/prepare.log how it went.

Exit status 0; 1 where --verify finds a difference; 2 for an error, or where images cannot be decoded (all else is done then).
"""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.prepare import archives, manifest
from scripts.prepare.images import Source, printable
from scripts.prepare.parquet import open_parquet, read_classes
from scripts.prepare.report import Report
from scripts.prepare.tree import open_tree
from scripts.prepare.work import prepare

LOG = "prepare.log"
NUM_CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    args = _parse()
    try:
        if args.verify:
            sys.exit(_verify(args.out, args.workers))
        _prepare(args)
    except (ValueError, OSError) as error:
        _fail(" ".join(str(error).split()))
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr, flush=True)
        os._exit(130)  # the processes at work end with this one


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for kind, name in archives.NAMES.items():
        parser.add_argument(f"--{kind}", type=Path, help=name)
    parser.add_argument("--archives", type=Path, help="folder that holds the three archives")
    parser.add_argument("--parquet", type=Path, help="folder with train-*.parquet and validation-*.parquet")
    parser.add_argument(
        "--classes",
        type=Path,
        help="for --parquet whose file names do not tell: a file with one class (n01440764) a line, by label",
    )
    parser.add_argument("--tree", type=Path, help="folder with train/ and val/: only its manifest is written")
    parser.add_argument("--verify", action="store_true", help="compare --out with its manifest")
    parser.add_argument("--out", type=Path, help="folder that has, or is to have, train/ and val/")
    parser.add_argument("--skip-md5", action="store_true", help="for archives that somebody has packed anew")
    parser.add_argument(
        "--workers", type=int, default=NUM_CPUS, help="processes (default: %(default)s, one for each CPU)"
    )
    args = parser.parse_args()
    given = [name for name in ("archives", "train", "val", "parquet", "tree", "verify") if getattr(args, name)]
    kinds = {"archives" if name in archives.NAMES else name for name in given}
    if len(kinds) != 1:
        parser.error("give one of --archives (or --train, --val and --devkit), --parquet, --tree and --verify")
    if (args.out is None) != (kinds == {"tree"}):
        parser.error("--tree writes its manifest into the tree: no --out" if args.out else "--out is missing")
    if args.devkit and args.classes:
        parser.error("--devkit and --classes both name the classes: give one of them")
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: at least 1")
    return args


def _prepare(args: argparse.Namespace) -> None:
    out = args.out or args.tree
    if args.tree and not (out / "train").is_dir():
        raise ValueError(f"{out / 'train'} not found: give --tree the folder that holds train/ and val/")
    files = _archives(args)
    for path in files.values():
        if not path.is_file():
            raise ValueError(f"{path} not found: download it from image-net.org, or give the folder or file that it is")
    out.mkdir(parents=True, exist_ok=True)
    report = Report(out / LOG)

    def open_source(notes: Path) -> Source:
        if not args.skip_md5:
            archives.check_md5(files, notes / "verified.json", report)
        if args.tree:
            return open_tree(args.tree)
        if args.parquet:
            return _open_parquet(args, files)
        return archives.open_archives(files["train"], files["val"], files["devkit"], verified=not args.skip_md5)

    made = prepare(out, open_source, not args.tree, args.workers, report)
    images, odd = made.header["images"], {kind: found["count"] for kind, found in made.header["odd"].items()}
    report.say(
        f"{out}: {images['train']:,} training and {images['val']:,} validation images of {len(made.header['classes']):,} classes; "
        f"oddities: {', '.join(f'{kind} {count:,}' for kind, count in odd.items()) or 'none'}"
    )
    if bad := made.undecodable:
        first = bad["first"][: manifest.NUM_NAMED]
        named = f"{', '.join(map(printable, first))}{' ...' if bad['count'] > len(first) else ''}"
        raise ValueError(
            f"{bad['count']:,} images cannot be decoded: {named}; all else is done; replace or remove them, delete "
            f"{out / manifest.NAME} and run --tree {out}"
        )


def _archives(args: argparse.Namespace) -> dict[str, Path]:
    """Those that are to be read, by kind."""
    if args.tree:
        return {}
    if args.parquet:
        return {"devkit": args.devkit} if args.devkit else {}
    given = {kind: getattr(args, kind) for kind in archives.NAMES}
    if args.archives:
        return {kind: path or args.archives / archives.NAMES[kind] for kind, path in given.items()}
    if missing := [f"--{kind}" for kind, path in given.items() if path is None]:
        raise ValueError(f"{' and '.join(missing)} missing: give all three archives, or --archives with their folder")
    return given


def _open_parquet(args: argparse.Namespace, files: dict[str, Path]) -> Source:
    if files:
        kit = archives.read_devkit(files["devkit"])
        return open_parquet(args.parquet, kit.classes, archives.expected(kit, verified=not args.skip_md5))
    classes = args.classes.read_text(encoding="utf-8").split() if args.classes else read_classes(args.parquet)
    archives.check_classes(classes, str(args.classes or args.parquet))
    return open_parquet(args.parquet, classes, {})


def _verify(out: Path, num_workers: int) -> int:
    """Prints what differs; the exit status."""
    report = Report()
    differing = manifest.audit(out, num_workers, report)
    for what, paths in differing.items():
        for path in paths[: manifest.NUM_NAMED]:
            report.say(f"{what}: {printable(path)}")
        if len(paths) > manifest.NUM_NAMED:
            report.say(f"{what}: ... {len(paths) - manifest.NUM_NAMED:,} more")
    said = ", ".join(f"{len(paths):,} {what}" for what, paths in differing.items())
    report.say(f"{out}: {said}" if any(differing.values()) else f"{out}: every file is as it was prepared")
    return int(any(differing.values()))


def _fail(text: str) -> NoReturn:
    print(f"prepare_imagenet.py: error: {text}", file=sys.stderr, flush=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
