"""Datasets of the `datasets` library: saved to disk, or as Parquet files."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image

from data.config import DataConfig
from data.decode import BadImageError, ImageReadError
from data.sources import EncodedSource, open_source, open_sources

NAMES = ["n01", "n02", "n03"]
FEATURES = Features({"image": datasets.Image(), "label": ClassLabel(names=NAMES)})


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(256, size=(20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def rows(count: int, features: Features = FEATURES, **changed: Any) -> Dataset:
    """`count` images; the i-th has label i % 3 and is named i.JPEG."""
    images = [{"bytes": jpeg(number), "path": f"{number}.JPEG"} for number in range(count)]
    return Dataset.from_dict({"image": images, "label": [n % 3 for n in range(count)]} | changed, features=features)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def config(root: Path, **keys: Any) -> DataConfig:
    return DataConfig(kind="arrow", root=str(root), **keys)


@pytest.fixture(params=["saved", "parquet", "parquet in data"])
def root(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    if request.param == "saved":
        both = DatasetDict({"train": rows(20).shuffle(seed=0), "validation": rows(7)})
        both.save_to_disk(tmp_path, num_shards={"train": 3, "validation": 1})
        return tmp_path
    folder = tmp_path / "data" if request.param == "parquet in data" else tmp_path
    folder.mkdir(exist_ok=True)
    shuffled = rows(20).shuffle(seed=0)
    shuffled.select(range(12)).to_parquet(folder / "train-00000-of-00002.parquet")
    shuffled.select(range(12, 20)).to_parquet(folder / "train-00001-of-00002.parquet")
    rows(7).to_parquet(folder / "validation-00000-of-00001.parquet")
    return tmp_path


def test_a_dataset_gives_its_bytes_labels_and_names(root: Path) -> None:
    train, val = open_sources(config(root, cache=str(root / "cache")))
    assert (len(train), len(val)) == (20, 7)
    assert train.class_names == val.class_names == tuple(NAMES)
    assert train.labels.dtype == np.int64
    assert isinstance(train, EncodedSource)
    numbers = [int(Path(train.name(index)).stem) for index in range(20)]
    assert sorted(numbers) == list(range(20)) != numbers
    for index, number in enumerate(numbers):
        assert train.name(index) == f"{NAMES[number % 3]}/{number}.JPEG"
        assert train.labels[index] == number % 3
        assert train.read(index) == jpeg(number)
        assert train.load(index).size == (30, 20)


def test_threads_and_forked_processes_read_the_same(tmp_path: Path) -> None:
    DatasetDict({"train": rows(30)}).save_to_disk(tmp_path)
    source = open_source(config(tmp_path), "train")
    assert isinstance(source, EncodedSource)
    expected = [jpeg(number) for number in range(30)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.read, list(range(30)) * 20)) == expected * 20
    pid = os.fork()
    if pid == 0:
        os._exit(0 if [source.read(index) for index in range(30)] == expected else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_files_beside_the_dataset_are_read_and_empty_rows_are_bad_images(tmp_path: Path) -> None:
    (tmp_path / "beside.jpg").write_bytes(jpeg(5))
    images = [{"bytes": None, "path": str(tmp_path / name)} for name in ("beside.jpg", "gone.jpg")]
    images += [{"bytes": b"<html>", "path": None}, {"bytes": None, "path": None}]
    plain = Features({"image": {"bytes": Value("binary"), "path": Value("string")}, "label": ClassLabel(names=NAMES)})
    dataset = Dataset.from_dict({"image": images, "label": [0, 1, 2, 0]}, features=plain)  # else it copies the files in
    DatasetDict({"train": dataset}).save_to_disk(tmp_path / "saved")
    source = open_source(config(tmp_path / "saved"), "train")
    assert isinstance(source, EncodedSource)
    assert source.read(0) == jpeg(5)
    with pytest.raises(ImageReadError, match=r"gone.jpg .*No such file"):
        source.read(1)
    with pytest.raises(BadImageError, match=r"train, row 2 \(n03/2\) \(not one of"):
        source.load(2)
    with pytest.raises(BadImageError, match=r"row 3 \(n01/3\) \(the row is empty\)"):
        source.load(3)


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        (rows(3, label=[0, -1, 2]), r"train: 1 rows have no class \(row 1: -1\)"),
        (rows(3, Features({"image": datasets.Image(), "label": Value("int64")})), r"has columns image, label: needed"),
        (rows(3).rename_column("image", "photo"), r"has columns photo, label: needed are image and label"),
    ],
)
def test_what_a_dataset_lacks_is_said_in_one_line(dataset: Dataset, said: str, tmp_path: Path) -> None:
    DatasetDict({"train": dataset}).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=said) as refused:
        open_source(config(tmp_path), "train")
    assert "\n" not in str(refused.value)


def test_splits_with_other_classes_are_refused(tmp_path: Path) -> None:
    turned = Features({"image": datasets.Image(), "label": ClassLabel(names=NAMES[::-1])})
    DatasetDict({"train": rows(3)}).save_to_disk(tmp_path)
    rows(3, turned).save_to_disk(tmp_path / "validation")
    with pytest.raises(ValueError, match="val has train's classes in another order"):
        open_sources(config(tmp_path))
    with pytest.raises(ValueError, match=r"data=arrow needs 4 class.* has 3: set data.num_classes"):
        open_sources(config(tmp_path, num_classes=4))


def test_what_is_no_dataset_or_damaged_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no split validation or val or test: data=arrow takes"):
        open_source(config(tmp_path), "val")
    with pytest.raises(ValueError, match=r"data.root=s3://x/y: data=arrow reads a folder"):
        open_source(DataConfig(kind="arrow", root="s3://x/y"), "train")
    DatasetDict({"train": rows(3)}).save_to_disk(tmp_path)
    (tmp_path / "train/state.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot be opened \(.*: restore it") as refused:
        open_source(config(tmp_path), "train")
    assert "\n" not in str(refused.value)


def test_without_the_library_the_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "datasets.py").write_text("# an empty module, as the folder of that name is one")
    code = (
        f"from pathlib import Path; from data.arrow import ArrowSource; ArrowSource(Path({str(tmp_path)!r}), 'train')"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (
        "ValueError: data=arrow needs datasets, which is not installed: pip install datasets (the extra `arrow`)"
        in done.stderr
    )
