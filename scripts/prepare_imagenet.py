"""Unpack the ImageNet-1k archives into train/ and val/ with one folder per class, as `data=imagenet` wants them.

python scripts/prepare_imagenet.py --archives DOWNLOADS --out /path/to/imagenet

DOWNLOADS holds ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar (from image-net.org, after
registration). Their MD5 sums are checked; a split that is there already is left alone. Nothing but regular files with the
names that ImageNet uses is written, whatever an archive holds.
"""

import argparse
import io
import re
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import scipy.io  # type: ignore[import-untyped]
from torchvision.datasets import imagenet
from torchvision.datasets.utils import check_integrity

NUM_CLASSES = 1000
NUM_IMAGES = {"train": 1_281_167, "val": 50_000}
CLASS_ARCHIVE = r"n\d{8}\.tar"
IMAGE = r"\w+\.JPEG"


def main() -> None:
    parser = argparse.ArgumentParser(description="Unpack the ImageNet-1k archives into class folders.")
    parser.add_argument("--archives", type=Path, required=True, help="folder that holds the three downloaded archives")
    parser.add_argument("--out", type=Path, required=True, help="folder to make train/ and val/ in")
    args = parser.parse_args()
    try:
        prepare(args.archives, args.out)
    except (OSError, ValueError, LookupError, tarfile.TarError) as error:
        raise SystemExit(f"prepare_imagenet.py: error: {' '.join(str(error).split())}") from None


def prepare(archives: Path, out: Path) -> None:
    """Raises OSError or ValueError for a missing, damaged or strange archive, and for a result that is not whole."""
    devkit, train, val = (_checked(archives, kind) for kind in ("devkit", "train", "val"))
    out.mkdir(parents=True, exist_ok=True)
    for split, archive in (("train", train), ("val", val)):
        if not (out / split).is_dir():
            print(f"{split}: unpacking {archive.name} ...", flush=True)
            unfinished = out / f"{split}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            if split == "train":
                _unpack_train(archive, unfinished)
            else:
                _unpack_val(archive, _classes_of_validation(devkit), unfinished)
            unfinished.rename(out / split)
        classes = [path for path in (out / split).iterdir() if path.is_dir()]
        images = sum(1 for path in classes for _ in path.iterdir())
        if (len(classes), images) != (NUM_CLASSES, NUM_IMAGES[split]):
            raise ValueError(
                f"{out / split} has {len(classes)} classes and {images} images instead of {NUM_CLASSES} and "
                f"{NUM_IMAGES[split]}: delete it and run again"
            )
        print(f"{split}: {len(classes)} classes, {images:,} images in {out / split}")


def _checked(archives: Path, kind: str) -> Path:
    name, md5 = imagenet.ARCHIVE_META[kind]
    if not (archives / name).is_file():
        raise ValueError(f"{archives / name} not found: download it from image-net.org, or give --archives its folder")
    print(f"checking {name} ...", flush=True)
    if not check_integrity(archives / name, md5):
        raise ValueError(f"{archives / name} is damaged: its MD5 sum is not {md5}; download it again")
    return archives / name


def _members(file: IO[bytes], archive: str, pattern: str) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and content of every member of a tar; a name off the pattern, a link, a folder or a device is refused."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isreg() else None
            if content is None or not re.fullmatch(pattern, member.name, re.ASCII):
                raise ValueError(
                    f"{archive}: {member.name!r} is no image file of ImageNet's: not the published archive, download it again"
                )
            yield member.name, content


def _unpack_train(archive: Path, folder: Path) -> None:
    with archive.open("rb") as file:
        for name, images in _members(file, archive.name, CLASS_ARCHIVE):
            for image, content in _members(images, f"{archive.name}, {name}", IMAGE):
                _write(content, folder / name.removesuffix(".tar") / image)


def _unpack_val(archive: Path, classes: Sequence[str], folder: Path) -> None:
    """`classes` in the order of the images' names, which end in their number."""
    with archive.open("rb") as file:
        for image, content in _members(file, archive.name, IMAGE):
            number = int(re.sub(r"\D", "", image.removeprefix("ILSVRC2012_val_")) or 0)
            if not 1 <= number <= len(classes):
                raise ValueError(
                    f"{archive.name}: {image!r} is not one of the {len(classes)} images of the devkit's list"
                )
            _write(content, folder / classes[number - 1] / image)


def _classes_of_validation(devkit: Path) -> list[str]:
    """The class of each validation image, from the devkit, which is read and not unpacked."""
    with tarfile.open(devkit, "r:gz") as tar:
        meta, truth = (
            _content(tar, f"ILSVRC2012_devkit_t12/data/{name}")
            for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
        )
    synsets = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    names = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
    strange = [name for name in names.values() if not re.fullmatch(r"n\d{8}", name, re.ASCII)]
    if strange:
        raise ValueError(f"{devkit.name}: {strange[0]!r} is not the name of a class")
    return [names[int(line)] for line in truth.split()]


def _content(tar: tarfile.TarFile, name: str) -> bytes:
    member = tar.getmember(name)
    content = tar.extractfile(member) if member.isreg() else None
    if content is None:
        raise ValueError(f"{name!r} in the devkit is not a regular file: not the published archive, download it again")
    return content.read()


def _write(content: IO[bytes], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        shutil.copyfileobj(content, file)


if __name__ == "__main__":
    main()
