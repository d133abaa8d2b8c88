"""The digits data: scikit-learn's 1,797 scanned handwritten digits as a class-folder tree of PNGs.

Real images without a download, on disk in ImageNet's layout, so that a demo takes the same path as the real thing. The
tree is written under a temporary name and renamed, so it is whole or absent however many processes start at once.
"""

import shutil
import tempfile
from pathlib import Path

from PIL import Image

NUM_IMAGES = {"train": 1437, "val": 360}
PIXELS = 32  # the scans are 8x8; 32 leaves the network 8x8 patches of 4 pixels
LEVELS = 16  # the scans' white


def prepare_digits(root: Path) -> None:
    """Makes sure that `root` holds the whole tree: writes it if there is nothing, checks it otherwise.

    Raises:
        ValueError: `root` holds something else or not all of it.
    """
    root = Path(root)
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
        try:
            building.chmod(0o755)  # mkdtemp's 0700 would lock out other users of a shared folder
            _write_tree(building)
            building.rename(root)
        except OSError:
            if not root.exists():
                raise
            # Another process was first: its tree is checked below like any other.
        finally:
            shutil.rmtree(building, ignore_errors=True)
    for split, expected in NUM_IMAGES.items():
        found = sum(1 for _ in (root / split).glob("*/*.png"))
        if found != expected:
            raise ValueError(
                f"{root / split} has {found} digit images instead of {expected}: "
                f"delete {root} to have it written again, or set data.root to another folder"
            )


def _write_tree(root: Path) -> None:
    from sklearn.datasets import load_digits  # takes a second to import; nothing else needs it
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, val = train_test_split(
        range(len(digits.target)), test_size=NUM_IMAGES["val"], stratify=digits.target, random_state=0
    )
    for split, indices in (("train", train), ("val", val)):
        for index in indices:
            folder = root / split / str(digits.target[index])
            folder.mkdir(parents=True, exist_ok=True)
            levels = (digits.images[index] * (255 / LEVELS)).round().astype("uint8")
            image = Image.fromarray(levels).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)
            image.save(folder / f"{index:04d}.png")
