"""A pack is the tree that it was made from: the same images, names and labels; and what is wrong with its files is named."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from data.config import DataConfig
from data.decode import BadImageError, ImageReadError
from data.pack import ABOUT, INDEX, NAMES, PackSource, read_about
from data.sources import EncodedSource, Source, open_sources
from scripts.packing.records import Recipe
from scripts.packing.work import pack
from scripts.prepare.report import Report
from tests.data.test_frames import jpeg, picture

RECIPES = {
    "lossless": Recipe(),
    "short-side": Recipe("short-side", 60, 90),
    "raw": Recipe("raw", 60),
}


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of all kinds of images."""
    root = tmp_path_factory.mktemp("tree")
    for number in range(12):
        split, kind = ("train", "val")[number % 4 == 3], ["4:2:0", "4:4:4", "4:2:2", "gray"][number % 4]
        write(root / split / "ab"[number // 4 % 2] / f"{number}.JPEG", jpeg(60 + 7 * number, 150 - 9 * number, kind))
    write(root / "val/b/progressive.jpg", jpeg(64, 80, progressive=True))
    image, exif = Image.fromarray(picture(70, 90, 5)), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(root / "train/a/turned.jpg", exif=exif)
    image.save(root / "train/a/not_a_jpeg.JPEG", "PNG")
    image.convert("CMYK").save(root / "train/b/cmyk.jpg")
    write(root / "train/b/bad.jpg", jpeg(64, 80)[:-300])
    write(root / "train/b/more/\N{SNOWMAN}.jpg", jpeg(50, 55))
    write(root / os.fsdecode(b"train/b/\xff.jpg"), jpeg(55, 50))
    return root


@pytest.fixture(scope="module", params=RECIPES)
def packed(request: pytest.FixtureRequest, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(request.param)
    pack(root, out, RECIPES[request.param], 1, Report())
    return out


@pytest.fixture(scope="module")
def lossless(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pack")
    pack(root, out, Recipe(), 1, Report())
    return out


@pytest.fixture
def copy(lossless: Path, tmp_path: Path) -> Path:
    """For a test to damage."""
    return Path(shutil.copytree(lossless, tmp_path / "copy"))


def sources(root: Path, exif: bool = False) -> tuple[Source, Source]:
    return open_sources(DataConfig(kind="folder", root=str(root), exif=exif))


def loaded(source: Source, index: int) -> np.ndarray | str:
    try:
        return np.asarray(source.load(index))
    except BadImageError as error:
        return error.reason


def test_a_pack_has_the_names_labels_and_classes_of_its_tree(root: Path, packed: Path) -> None:
    for from_pack, from_tree in zip(sources(packed), sources(root), strict=True):
        assert isinstance(from_pack, PackSource)
        assert isinstance(from_pack, EncodedSource)
        assert from_pack.class_names == from_tree.class_names
        assert from_pack.labels.dtype == np.int64
        assert from_pack.labels.tolist() == from_tree.labels.tolist()
        assert [from_pack.name(i) for i in range(len(from_pack))] == [from_tree.name(i) for i in range(len(from_tree))]


@pytest.mark.parametrize("exif", [False, True])
def test_a_lossless_pack_gives_the_pixels_of_its_tree(root: Path, lossless: Path, exif: bool) -> None:
    bad, turned = 0, 0
    for from_pack, from_tree in zip(sources(lossless, exif), sources(root, exif), strict=True):
        assert isinstance(from_pack, PackSource)
        for index in range(len(from_tree)):
            found, expected = loaded(from_pack, index), loaded(from_tree, index)
            assert np.array_equal(found, expected), from_tree.name(index)
            bad += isinstance(expected, str)
            turned += from_pack.orientations[index] == 6
            size = from_pack.heights[index], from_pack.widths[index]
            if isinstance(expected, str):
                assert size == (0, 0)
            elif from_pack.orientations[index] == 1 or not exif:
                assert size == expected.shape[:2]
    assert (bad, turned) == (1, 1)


@pytest.mark.parametrize("kind", ["short-side", "raw"])
def test_the_other_kinds_shrink_what_is_larger_and_come_close(kind: str, root: Path, tmp_path: Path) -> None:
    pack(root, tmp_path, RECIPES[kind], 1, Report())
    for exif in (False, True):
        for from_pack, from_tree in zip(sources(tmp_path, exif), sources(root, exif), strict=True):
            assert isinstance(from_pack, PackSource)
            for index in range(len(from_tree)):
                found, expected = loaded(from_pack, index), loaded(from_tree, index)
                if isinstance(found, str) or isinstance(expected, str):
                    assert found == expected
                    continue
                scale = min(1.0, 60 / min(expected.shape[:2]))
                height, width = round(expected.shape[0] * scale), round(expected.shape[1] * scale)
                smaller = Image.fromarray(expected).resize((width, height), Image.Resampling.BICUBIC)
                error = found.astype(np.float32) - np.asarray(smaller, np.float32)
                assert np.sqrt(np.square(error).mean()) < (12 if kind == "short-side" else 0.5), from_tree.name(index)


def test_every_record_is_a_file_that_pillow_opens(packed: Path, tmp_path: Path) -> None:
    kinds = set()
    for source in sources(packed):
        assert isinstance(source, PackSource)
        for index in np.flatnonzero(source.heights).tolist():
            path = tmp_path / "record"
            path.write_bytes(source.read(index))
            with Image.open(path) as image:
                image.load()
                assert image.size == (source.widths[index], source.heights[index])
                kinds.add(image.format)
    assert kinds in ({"PPM"}, {"JPEG"}, {"JPEG", "PNG"})


def test_forked_processes_read_the_same_files(lossless: Path) -> None:
    source = PackSource(lossless / "train")
    expected = [source.read(index) for index in range(len(source))]
    children = []
    for number in range(3):
        child = os.fork()
        if not child:
            order = np.random.default_rng(number).permutation(np.repeat(np.arange(len(source)), 50)).tolist()
            os._exit(int(not all(source.read(index) == expected[index] for index in order)))
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]


def test_files_are_closed_with_their_source(lossless: Path) -> None:
    def num_open() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = num_open()
    source = PackSource(lossless / "train")
    assert num_open() > before
    del source
    assert num_open() == before


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def of_another_version(path: Path) -> None:
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"version": 99}))


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("data-00000.bin", Path.unlink, r"cannot open .*data-00000.bin \(No such file.*copy it again"),
        (
            "data-00000.bin",
            lambda path: os.truncate(path, 100),
            "data-00000.bin has 100 bytes instead of .*copy it again",
        ),
        (INDEX, Path.unlink, "cannot read .*index.npy .*copy it again"),
        (INDEX, lambda path: os.truncate(path, 0), "cannot read .*index.npy .*copy it again"),
        (INDEX, lambda path: os.truncate(path, 300), "index.npy is damaged.*copy it again"),
        (INDEX, lambda path: flip(path, -50), "index.npy is damaged.*copy it again"),
        (NAMES, lambda path: flip(path, 3), "names.bin is damaged.*copy it again"),
        (ABOUT, lambda path: flip(path, 0), "pack.json is no pack's .*make the pack anew"),
        (ABOUT, lambda path: flip(path, 200), "pack.json is no pack's .*make the pack anew"),
        (ABOUT, lambda path: path.write_text("[]"), "pack.json is no pack's .*make the pack anew"),
        (ABOUT, of_another_version, "pack.json is no pack's .version 99, and this program reads 1.*make the pack anew"),
        (ABOUT, Path.unlink, "pack.json not found: the pack is not whole"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(
    name: str, damage: Callable[[Path], object], said: str, copy: Path
) -> None:
    damage(copy / "train" / name)
    with pytest.raises(ValueError, match=said) as raised:
        PackSource(copy / "train")
    assert "\n" not in str(raised.value)


def test_any_flipped_bit_of_what_a_pack_says_of_itself_is_found(copy: Path) -> None:
    path = copy / "val" / ABOUT
    good, about = path.read_bytes(), read_about(copy / "val")
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        try:
            assert read_about(copy / "val") == about  # white space
        except ValueError as error:
            assert "no pack's" in str(error)  # noqa: PT017


def test_a_data_file_that_becomes_short_under_way_is_a_read_error(copy: Path) -> None:
    source = PackSource(copy / "train")
    os.truncate(copy / "train/data-00000.bin", int(source.offsets[3]))
    assert source.read(2)
    with pytest.raises(ImageReadError, match=r"data-00000\.bin has become shorter"):
        source.read(3)
