"""A small ILSVRC2012: its three archives, or its Parquet files, with odd images among them."""

import io
import tarfile
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

WNIDS = ("n01440764", "n01443537", "n02119789", "n13133613")
NUM_TRAIN = (9, 12, 7, 10)
VAL_CLASSES = tuple(WNIDS[label] for label in (1, 0, 3, 2, 1, 1, 0, 2, 3, 3, 0))
ARCHIVES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz")
ODD = {
    "train/n01440764/n01440764_0.JPEG": "not_jpeg",
    "train/n01443537/n01443537_3.JPEG": "cmyk",
    "train/n01443537/n01443537_4.JPEG": "gray",
    "val/n01440764/ILSVRC2012_val_00000002.JPEG": "exif_orientation",
}


def images() -> dict[str, bytes]:
    """Content of each image by its path in the tree."""
    paths = [
        f"train/{wnid}/{wnid}_{i}.JPEG" for wnid, count in zip(WNIDS, NUM_TRAIN, strict=True) for i in range(count)
    ]
    paths += [f"val/{wnid}/ILSVRC2012_val_{i:08d}.JPEG" for i, wnid in enumerate(VAL_CLASSES, 1)]
    return {path: _image(i, ODD.get(path)) for i, path in enumerate(paths)}


def _image(seed: int, odd: str | None) -> bytes:
    stream = np.random.default_rng(seed)
    pixels = stream.integers(256, size=(60 + seed % 7, 50 + seed % 5, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((500, 375))
    if odd in ("cmyk", "gray"):
        image = image.convert("CMYK" if odd == "cmyk" else "L")
    exif = Image.Exif()
    if odd == "exif_orientation":
        exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "PNG" if odd == "not_jpeg" else "JPEG", exif=exif)
    return file.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_archives(folder: Path, content: dict[str, bytes]) -> Path:
    """The archives of these images, and a devkit that expects NUM_TRAIN and VAL_CLASSES."""
    folder.mkdir()
    train_name, val_name, devkit_name = ARCHIVES
    with tarfile.open(folder / train_name, "w") as train:
        for wnid in reversed(WNIDS):  # the published order is not sorted either
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as images:
                for path in (path for path in content if path.startswith(f"train/{wnid}/")):
                    add(images, Path(path).name, content[path])
            add(train, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(folder / val_name, "w") as val:
        for path in (path for path in content if path.startswith("val/")):
            add(val, Path(path).name, content[path])
    with tarfile.open(folder / devkit_name, "w:gz") as devkit:
        add(devkit, "ILSVRC2012_devkit_t12/data/meta.mat", _meta())
        truth = "".join(f"{WNIDS.index(wnid) + 1}\n" for wnid in VAL_CLASSES)
        add(devkit, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())
    return folder


def _meta() -> bytes:
    fields = [
        ("ILSVRC2012_ID", "i4"),
        ("WNID", "O"),
        ("words", "O"),
        ("num_children", "i4"),
        ("num_train_images", "i4"),
    ]
    classes = [(i + 1, wnid, f"class {i}", 0, NUM_TRAIN[i]) for i, wnid in enumerate(WNIDS)]
    synsets = np.array([*classes, (len(WNIDS) + 1, "n00001740", "entity", len(WNIDS), 0)], dtype=fields).reshape(-1, 1)
    file = io.BytesIO()
    scipy.io.savemat(file, {"synsets": synsets})
    return file.getvalue()


def write_parquet(folder: Path, content: dict[str, bytes]) -> Path:
    """Two files of training, one of validation, with the names that a hub's copy gives its images."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    train = [path for path in content if path.startswith("train/")]
    shards = {
        "train-00000-of-00002": train[::2],
        "train-00001-of-00002": train[1::2],
        "validation-00000-of-00001": sorted(set(content) - set(train)),
    }
    for name, paths in shards.items():
        rows = [
            {
                "image": {"bytes": content[path], "path": f"{Path(path).stem}_{path.split('/')[1]}.JPEG"},
                "label": sorted(WNIDS).index(path.split("/")[1]),
            }
            for path in paths
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{name}.parquet", row_group_size=4)
    return folder
