"""JPEGs like ImageNet's, made from scikit-image's sample photographs: sizes around 500x375, 110 KB, three subsamplings."""

import importlib.util
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "hubble_deep_field.jpg",
          "ihc.png")  # fmt: skip
SUBSAMPLINGS = ("4:2:0", "4:4:4", "4:2:2")
SHARES = (0.60, 0.35, 0.05)
NUM_CLASSES = 10


def write_photos(root: Path, num_images: int) -> None:
    """A tree root/train/<class>/*.JPEG of `num_images`; what is there already is kept."""
    todo = [number for number in range(num_images) if not _path(root, number).exists()]
    for folder in {_path(root, number).parent for number in todo}:
        folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        list(pool.map(partial(_write, root), todo, chunksize=16))


def _path(root: Path, number: int) -> Path:
    return root / "train" / f"class{number % NUM_CLASSES}" / f"{number:05d}.JPEG"


def _write(root: Path, number: int) -> None:
    rng = np.random.default_rng(number)
    long_side = int(rng.choice([500, 500, 500, 500, 500, 640, 400]))
    short_side = round(long_side * rng.choice([0.75, 0.75, 0.75, 2 / 3, rng.uniform(0.6, 1)]))
    width, height = (long_side, short_side) if rng.random() < 0.75 else (short_side, long_side)
    photo = _photos()[number % len(PHOTOS)]
    scale = max(width / photo.width, height / photo.height) * rng.uniform(1.0, 1.6)
    enlarged = photo.resize((max(width, round(photo.width * scale)), max(height, round(photo.height * scale))))
    left, top = int(rng.integers(enlarged.width - width + 1)), int(rng.integers(enlarged.height - height + 1))
    pixels = np.asarray(enlarged.crop((left, top, left + width, top + height))).astype(np.float32)
    grain = rng.normal(0, rng.uniform(3, 14), (height, width, 1)) + rng.normal(0, 1.5, (height, width, 3))
    image = Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))
    path = _path(root, number)
    partial_path = path.with_suffix(".partial")
    image.save(
        partial_path, "JPEG", quality=int(rng.integers(90, 97)), subsampling=str(rng.choice(SUBSAMPLINGS, p=SHARES))
    )
    partial_path.rename(path)


@cache
def _photos() -> tuple[Image.Image, ...]:
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise ValueError(
            "scikit-image is not installed, whose photographs this draws on: pip install scikit-image, or give --root"
        )
    folder = Path(package.origin).parent / "data"
    return tuple(Image.open(folder / name).convert("RGB") for name in PHOTOS)


def sizes(root: Path) -> Iterator[int]:
    """Bytes of each file below `root`."""
    return (path.stat().st_size for path in root.rglob("*.JPEG"))
