"""Class-folder trees: the class map, foreign files, links, and images of every mode."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.config import DataConfig
from data.decode import BadImageError, open_rgb
from data.sources import Source, open_source, open_sources

WriteTree = Callable[[dict[str, Iterable[str]]], Path]


def folder(root: Path) -> DataConfig:
    return DataConfig(kind="folder", root=str(root))


def names(source: Source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def test_classes_are_the_sorted_training_folders(write_tree: WriteTree) -> None:
    root = write_tree({"train/b": ["2.png", "1.jpg"], "train/a": ["x.PNG"], "val/a": ["v.png"], "val/b": ["w.png"]})
    train, val = open_sources(folder(root))
    assert train.class_names == val.class_names == ("a", "b")
    assert names(train) == ["a/x.PNG", "b/1.jpg", "b/2.png"]
    assert train.labels.tolist() == [0, 1, 1]
    assert train.labels.dtype == np.int64
    assert names(val) == ["a/v.png", "b/w.png"]
    assert train.load(2).size == (30, 20)


def test_folders_below_a_class_belong_to_it(write_tree: WriteTree) -> None:
    root = write_tree({"train/a": ["1.png"], "train/a/more": ["0.png"], "val/a": ["1.png"]})
    assert names(open_source(folder(root), "train")) == ["a/1.png", "a/more/0.png"]


@pytest.mark.parametrize(
    ("val", "message"),
    [
        (["a"], r"val lacks b \(1\)"),
        (["a", "b", "c"], r"val adds c \(1\)"),
        (["a", "c"], r"val lacks b \(1\) and adds c \(1\)"),
    ],
)
def test_validation_must_have_the_same_classes(write_tree: WriteTree, val: list[str], message: str) -> None:
    root = write_tree({"train/a": ["1.png"], "train/b": ["1.png"], **{f"val/{name}": ["1.png"] for name in val}})
    with pytest.raises(ValueError, match=message):
        open_sources(folder(root))


@pytest.mark.parametrize("split", ["train", "val"])
def test_empty_class_folder_is_named(write_tree: WriteTree, split: str) -> None:
    root = write_tree({f"{part}/{name}": ["1.png"] for part in ("train", "val") for name in "ab"})
    (root / split / "b" / "1.png").rename(root / split / "b" / "notes.txt")
    with pytest.raises(ValueError, match=f"{split}/b has no images"):
        open_sources(folder(root))


def test_foreign_and_hidden_files_are_skipped(write_tree: WriteTree) -> None:
    root = write_tree(
        {"train/a": ["1.png"], "val/a": ["1.png"], "train/.cache": ["1.png"], "train/a/.thumbs": ["2.png"]}
    )
    for junk in ("._1.png", ".DS_Store", "Thumbs.db", "README.txt"):
        (root / "train" / "a" / junk).write_bytes(b"junk")
    (root / "train" / ".DS_Store").write_bytes(b"junk")
    (root / "train" / "list.txt").write_bytes(b"junk")
    train, _ = open_sources(folder(root))
    assert train.class_names == ("a",)
    assert names(train) == ["a/1.png"]


def test_links_that_lead_back_are_not_followed(write_tree: WriteTree) -> None:
    root = write_tree({"train/a": ["1.png"], "train/b": ["1.png"], "val/a": ["1.png"], "val/b": ["1.png"]})
    (root / "train" / "loop").symlink_to(root / "train")
    (root / "train" / "a" / "self").symlink_to(root / "train" / "a")
    (root / "train" / "a" / "up").symlink_to(root)
    (root / "train" / "b" / "alias.png").symlink_to(root / "train" / "a" / "1.png")
    train = open_source(folder(root), "train")
    assert train.class_names == ("a", "b")
    assert names(train) == ["a/1.png", "b/1.png", "b/alias.png"]


def test_dangling_link_is_named_when_read(write_tree: WriteTree) -> None:
    root = write_tree({"train/a": ["1.png"], "val/a": ["1.png"]})
    (root / "train" / "a" / "2.png").symlink_to(root / "gone.png")
    with pytest.raises(BadImageError, match=r"cannot decode .*train/a/2.png .*No such file"):
        open_source(folder(root), "train").load(1)


def test_names_that_are_not_utf8_print_and_load(write_tree: WriteTree) -> None:
    root = write_tree({"train/a": ["1.png"], "val/a": ["1.png"]})
    odd = os.fsencode(root / "train" / "a") + b"/caf\xe9.png"
    os.link(os.fsencode(root / "train" / "a" / "1.png"), odd)
    train = open_source(folder(root), "train")
    assert train.name(1) == "a/caf\\xe9.png"
    assert train.load(1).size == (30, 20)


def test_missing_folders_are_named_with_a_way_out(
    write_tree: WriteTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("IMAGENET_DIR", raising=False)
    with pytest.raises(ValueError, match=r"nowhere/train not found: .*IMAGENET_DIR.*experiment=digits"):
        open_sources(DataConfig(kind="imagenet", root=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"data.root and IMAGENET_DIR are not set: .*experiment=digits"):
        open_sources(DataConfig(kind="imagenet"))
    with pytest.raises(ValueError, match=r"data.root is not set"):
        open_sources(DataConfig(kind="folder"))
    root = write_tree({"train/a": ["1.png"]})
    with pytest.raises(ValueError, match=r"val not found"):
        open_sources(folder(root))
    (tmp_path / "bare" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"bare/train has no class folders"):
        open_sources(folder(tmp_path / "bare"))


def test_imagenet_wants_a_thousand_classes(write_tree: WriteTree, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_tree({"train/a": ["1.png"], "val/a": ["1.png"]})
    monkeypatch.setenv("IMAGENET_DIR", str(root))
    with pytest.raises(ValueError, match=r"data=imagenet needs 1000 class folders but .*train has 1: use data=folder"):
        open_sources(DataConfig(kind="imagenet"))
    assert len(open_sources(DataConfig(kind="imagenet", num_classes=1))[0]) == 1


def test_imagenet_validation_needs_no_training_images(write_tree: WriteTree) -> None:
    root = write_tree({"val/a": ["1.png"], "val/b": ["1.png"]})
    val = open_source(DataConfig(kind="imagenet", root=str(root), num_classes=2), "val")
    assert val.labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"needs 1000 class folders"):
        open_source(DataConfig(kind="imagenet", root=str(root)), "val")


def test_synthetic_is_a_function_of_the_index() -> None:
    train, val = open_sources(DataConfig(kind="synthetic", num_images=50, num_classes=4))
    assert (len(train), len(val), len(train.class_names)) == (50, 5, 4)
    assert np.array_equal(train.load(3), open_source(DataConfig(kind="synthetic", num_images=50), "train").load(3))
    assert not np.array_equal(train.load(3), train.load(7))
    assert not np.array_equal(train.load(3), val.load(3))


LEVELS = np.array([[0, 128, 255]], np.uint8)
GRAY = [(0, 0, 0), (128, 128, 128), (255, 255, 255)]
TRANSLUCENT = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)
ON_WHITE = [(200, 0, 0), (255, 255, 255), (204, 204, 204)]


def _palette() -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([200, 0, 0, 1, 2, 3, 0, 0, 0])
    image.putdata([0, 1, 2])
    return image


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (Image.fromarray(LEVELS), {}, GRAY),
        (Image.fromarray(LEVELS.astype(np.uint16) * 257), {}, GRAY),
        (Image.fromarray(TRANSLUCENT), {}, ON_WHITE),
        (_palette(), {"transparency": b"\xff\x00\x33"}, ON_WHITE),
        (_palette(), {}, [(200, 0, 0), (1, 2, 3), (0, 0, 0)]),
    ],
    ids=["gray", "gray16", "rgba", "palette-alpha", "palette"],
)
def test_png_modes(tmp_path: Path, image: Image.Image, options: dict, expected: list) -> None:
    image.save(tmp_path / "image.png", **options)
    decoded = open_rgb(tmp_path / "image.png")
    assert decoded.mode == "RGB"
    assert [tuple(pixel) for pixel in np.asarray(decoded)[0]] == expected


def test_cmyk_jpeg(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (200, 30, 60)).convert("CMYK").save(tmp_path / "image.jpg", quality=100)
    assert np.abs(np.asarray(open_rgb(tmp_path / "image.jpg")).astype(int) - (200, 30, 60)).max() <= 4


def test_exif_orientation_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "image.jpg", exif=exif)
    assert open_rgb(tmp_path / "image.jpg").size == (8, 4)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_undecodable_files_are_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "image.jpg"
    Image.effect_noise((64, 64), 50).save(path)
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "garbage": b"<html>" * 50, "empty": b""}[damage])
    with pytest.raises(BadImageError, match=r"cannot decode .*image.jpg \(.*\): replace or remove the file") as caught:
        open_rgb(path)
    assert "\n" not in str(caught.value)
