"""Unpack the ImageNet-1k archives into train/ and val/ with one folder per class, as `data=imagenet` wants them.

python scripts/prepare_imagenet.py --archives DOWNLOADS --out /path/to/imagenet

DOWNLOADS holds ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar (from image-net.org, after
registration). torchvision's reader checks their MD5 sums, unpacks them and sorts the validation images into class folders;
a split that is there already is left alone.
"""

import argparse
import tarfile
from pathlib import Path

from torchvision.datasets import imagenet

NUM_CLASSES = 1000
NUM_IMAGES = {"train": 1_281_167, "val": 50_000}


def main() -> None:
    parser = argparse.ArgumentParser(description="Unpack the ImageNet-1k archives into class folders.")
    parser.add_argument("--archives", type=Path, required=True, help="folder that holds the three downloaded archives")
    parser.add_argument("--out", type=Path, required=True, help="folder to make train/ and val/ in")
    args = parser.parse_args()
    try:
        prepare(args.archives, args.out)
    except (RuntimeError, OSError, ValueError, tarfile.TarError) as error:
        raise SystemExit(f"prepare_imagenet.py: error: {' '.join(str(error).split())}") from None


def prepare(archives: Path, out: Path) -> None:
    """Raises RuntimeError or OSError for a missing or damaged archive, ValueError for a result that is not whole."""
    out.mkdir(parents=True, exist_ok=True)
    for kind in ("devkit", "train", "val"):  # torchvision looks for the archives in the folder that it unpacks to
        name = imagenet.ARCHIVE_META[kind][0]
        if not (archives / name).is_file():
            raise ValueError(
                f"{archives / name} not found: download it from image-net.org, or give --archives its folder"
            )
        if not (out / name).exists():
            (out / name).symlink_to((archives / name).resolve())
    for split, unpack in (("train", imagenet.parse_train_archive), ("val", _unpack_val)):
        if not (out / split).is_dir():
            print(f"{split}: checking and unpacking {imagenet.ARCHIVE_META[split][0]} ...", flush=True)
            unpack(out)
        classes = [path for path in (out / split).iterdir() if path.is_dir()]
        images = sum(1 for path in classes for _ in path.iterdir())
        if (len(classes), images) != (NUM_CLASSES, NUM_IMAGES[split]):
            raise ValueError(
                f"{out / split} has {len(classes)} classes and {images} images instead of {NUM_CLASSES} and "
                f"{NUM_IMAGES[split]}: delete it and run again"
            )
        print(f"{split}: {len(classes)} classes, {images:,} images in {out / split}")
    for kind in ("devkit", "train", "val"):
        (out / imagenet.ARCHIVE_META[kind][0]).unlink()
    (out / imagenet.META_FILE).unlink(missing_ok=True)


def _unpack_val(out: Path) -> None:
    imagenet.parse_devkit_archive(out)
    synsets_of_images = imagenet.load_meta_file(out)[1]
    imagenet.parse_val_archive(out, wnids=synsets_of_images)


if __name__ == "__main__":
    main()
