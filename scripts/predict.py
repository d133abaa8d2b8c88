"""What a trained network sees in images: the five likeliest classes, as bars in the terminal and as a PNG for each image.

    python scripts/predict.py checkpoint=runs/vip_m7 cat.jpg photos/              # predictions/cat.png, predictions/...
    python scripts/predict.py checkpoint=runs/vip_m7 cat.jpg --explain            # with a map of what the decision used
    python scripts/predict.py checkpoint=vip_s7.pth model=vip_s7 photos/ out=photos.png       # all on one sheet

Takes files, folders (with all that is below them) and eval.py's keys. Images are decoded, resized and cropped as in
validation, so the probabilities are those of eval.py's predictions.csv. Exit status 0, or 2 for an error.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

KEY = re.compile(r"[~+]{0,2}[A-Za-z_][\w.]*=")
KEYS = """\
keys (eval.py --help has them all):
  checkpoint=PATH     a run folder (its best checkpoint), a checkpoint, or a published file
  model=vip_s7        the network of a published file; a checkpoint of this program knows its own
  out=predictions     folder for the PNGs; a name that ends in .png: all of them on one sheet
  ema=true            the averaged weights of a checkpoint
  data.root=DIR       the data it was trained on, for the names of classes where the file has none
  precision=bf16      number format of the matrix products
"""


def main() -> None:
    opening, examples, rest = (__doc__ or "").split("\n\n", 2)
    parser = argparse.ArgumentParser(
        usage="predict.py checkpoint=PATH IMAGE ... [--explain] [key=value ...]",
        description=f"{opening}\n\n{examples}\n\n{rest}",
        epilog=KEYS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("arguments", nargs="*", metavar="IMAGE", help="a file, or a folder; or key=value")
    parser.add_argument("--explain", action="store_true", help="map what speaks for the first class")
    args = parser.parse_intermixed_args()
    keys = [text for text in args.arguments if KEY.match(text) and not Path(text).exists()]
    images = [text for text in args.arguments if text not in keys]

    from scripts.prediction.work import predict  # torch and timm take seconds to import, --help needs neither

    predict(keys, images, args.explain)


if __name__ == "__main__":
    main()
