"""Photographs a run's report for the documentation, in headless Chromium: docs/report-light.png and docs/report-dark.png.

python scripts/screenshots.py                # of runs/digits, as `make demo` leaves it
python scripts/screenshots.py RUN --out DIR

For developers: needs `playwright` and a Chromium (apt install chromium). Exit status 0, or 2 for an error.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image
from playwright.sync_api import Error, sync_playwright

from vip.page import write_report

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT = 1280, 1445  # down to the end of the first section
NUM_COLORS = 128  # of a PNG: enough for curves and small pictures, and a third of the bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, default=ROOT / "runs/digits", metavar="RUN", help="a run folder")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", metavar="DIR", help="where the pictures go (docs)")
    args = parser.parse_args()
    try:
        photograph(args.run, args.out)
    except (ValueError, OSError, Error) as error:
        print(f"{Path(sys.argv[0]).name}: error: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)


def photograph(run: Path, out: Path) -> None:
    """Write the report of `run` to a folder that is gone afterwards, and its upper part in both themes to `out`."""
    chromium = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
    if chromium is None:
        raise ValueError("no Chromium here; apt install chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as tools:
        report = Path(folder) / "report.html"
        write_report([run], report)
        browser = tools.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            context = browser.new_context(
                viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme, offline=True
            )
            tab = context.new_page()
            tab.goto(report.as_uri())
            tab.wait_for_selector("html[data-drawn]", timeout=120_000)
            picture = out / f"report-{scheme}.png"
            tab.screenshot(path=picture)
            with Image.open(picture) as image:
                image.convert("RGB").quantize(NUM_COLORS, dither=Image.Dither.NONE).save(picture, optimize=True)
            print(picture)
        browser.close()


if __name__ == "__main__":
    main()
