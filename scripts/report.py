"""Writes the report of a run, finished or not: one HTML file that opens from disk. Several runs are laid over each other.

python scripts/report.py runs/x               # writes runs/x/report.html
python scripts/report.py runs/x runs/y ...    # writes runs/comparison.html
python scripts/report.py runs/x --out FILE

Prints the file's path. Exit status 0, or 2 for an error.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vip.page import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, like runs/x")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: RUN/report.html, of several RUN/../comparison.html"
    )
    args = parser.parse_args()
    out = args.out or (args.runs[0] / "report.html" if len(args.runs) == 1 else args.runs[0].parent / "comparison.html")
    try:
        write_report(args.runs, out)
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(out)


if __name__ == "__main__":
    main()
