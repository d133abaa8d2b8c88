"""Writes the digits data by hand; training with data=digits does the same on first use.

python scripts/prepare_digits.py [--root datasets/digits]
"""

import argparse
from pathlib import Path

from data.digits import NUM_IMAGES, prepare_digits


def main() -> None:
    parser = argparse.ArgumentParser(description="Write scikit-learn's digits as a class-folder tree of PNGs.")
    parser.add_argument("--root", type=Path, default=Path("datasets/digits"), help="where to (default: %(default)s)")
    root = parser.parse_args().root
    try:
        prepare_digits(root)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    print(f"{root}: {NUM_IMAGES['train']} training and {NUM_IMAGES['val']} validation images")


if __name__ == "__main__":
    main()
