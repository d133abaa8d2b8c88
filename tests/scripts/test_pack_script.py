"""scripts/pack.py: the same pack after any number of kills, damage that is named, and the tree back again."""

import contextlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data import native
from data.decode import decode_rgb
from data.pack import RECORD, PackSource
from scripts.faults.disk import fill, small_disk
from scripts.faults.launch import ROOT, Launch, UnavailableError
from scripts.packing import work
from scripts.packing.records import Recipe
from scripts.prepare.report import Report
from tests.data.test_frames import jpeg

SCRIPT = ROOT / "scripts/pack.py"


def command(cwd: Path, *arguments: object, status: int = 0) -> str:
    """Runs pack.py and gives what it printed."""
    with Launch([str(item) for item in (*arguments, "--workers", 2)], cwd, script=SCRIPT) as launch:
        ended = launch.wait()
        assert ended == [status], launch.output
        assert "Traceback" not in launch.output
        return launch.output


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough for two data files in train/ and one in val/."""
    root = tmp_path_factory.mktemp("images") / "tree"
    for number in range(90):
        split, name = ("train", "val")[number % 6 == 5], f"n0{number // 6 % 3}"
        path = root / split / name / f"{name}_{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(375, 500, ["4:2:0", "4:4:4"][number % 2], quality=95, seed=number))
    (root / "train/n00/broken.jpg").write_bytes(jpeg(100, 100)[:1000])
    return root


@pytest.fixture(scope="module")
def whole(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pack that nothing disturbed; tests only read it."""
    out = tmp_path_factory.mktemp("whole") / "pack"
    said = command(out.parent, tree, out)
    assert "91 of 91 images" in said
    assert "76 images of 3 classes" in said
    assert "1 that cannot be decoded" in said
    return out


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_a_whole_pack_is_left_alone_and_one_of_other_images_is_refused(tree: Path, copy: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    assert "is whole already" in command(tmp_path, tree, copy)
    assert "another kind: choose another folder" in command(tmp_path, tree, copy, "--raw", 64, status=2)
    other = shutil.copytree(tree, tmp_path / "other")
    next((other / "val").rglob("*.JPEG")).write_bytes(b"x")
    assert "of other images" in command(tmp_path, other, copy, status=2)
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
    assert "holds something else: choose another folder" in command(tmp_path, tree, tree, status=2)
    assert "is a pack already" in command(tmp_path, copy, tmp_path / "new", status=2)
    assert "has neither train/ nor val/" in command(tmp_path, tree / "val", tmp_path / "new", status=2)


def moments(out: Path, num_files: int) -> list[Callable[[], bool]]:
    """When to kill: at random numbers of records, when data files are whole, and around each of the last steps."""
    stream = random.Random(0)

    def rows(count: int) -> Callable[[], bool]:
        found = lambda: sum(path.stat().st_size for path in out.glob("*/unfinished/*.rows"))  # noqa: E731
        return lambda: found() >= count * RECORD.itemsize

    def done(count: int) -> Callable[[], bool]:
        return lambda: len(list(out.glob("*/unfinished/0*.json"))) >= count

    last = ("train/index.npy", "train/names.bin", "train/pack.json.tmp", "val/index.npy", "val/pack.json")
    return [
        (out / "train/unfinished").exists,
        *(rows(count) for count in sorted(stream.sample(range(1, 85), 7))),
        *(done(count) for count in range(1, num_files + 1)),
        *((out / name).exists for name in last),
    ]


@pytest.mark.e2e
def test_killed_again_and_again_it_ends_like_an_undisturbed_one(tree: Path, whole: Path, tmp_path: Path) -> None:
    num_files = len(list(whole.glob("*/data-*.bin")))
    assert num_files >= 3
    for attempt in range(4):  # on a busy machine kills may come too late
        out, kills, amid_records = tmp_path / str(attempt), 0, 0
        for moment in moments(out, num_files):
            with Launch([str(tree), str(out), "--workers", "2"], tmp_path / "cwd", script=SCRIPT) as launch:
                launch.wait_until(moment, period=0.0005)
                kills += launch.stop() == [-9]
            amid_records += any(out.glob("*/unfinished/0*.rows")) and not any(out.glob("*/index.npy"))
        said = command(tmp_path, tree, out)
        assert files(out) == files(whole), said
        if kills >= 8 and amid_records >= 5:
            return
    pytest.fail(f"only {kills} kills, {amid_records} amid the records")


def test_what_a_power_cut_left_torn_is_packed_again(tree: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Launch([str(tree), str(out), "--workers", "1"], tmp_path, script=SCRIPT) as launch:
        rows = out / "train/unfinished/00000.rows"
        assert launch.wait_until(lambda: rows.exists() and rows.stat().st_size >= 8 * RECORD.itemsize)
        launch.stop()
    index = np.fromfile(rows, RECORD)
    torn = bytearray((out / "train/data-00000.bin").read_bytes())
    start = int(index["offset"][5])
    torn[start + 100 : start + 200] = bytes(100)  # pages that never reached the disk
    (out / "train/data-00000.bin").write_bytes(torn)
    with rows.open("ab") as file:
        file.write(bytes(RECORD.itemsize + 7))
    said = command(tmp_path, tree, out)
    assert "images were packed earlier" in said
    assert files(out) == files(whole)


def test_what_was_begun_from_other_images_is_not_continued(tree: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    shutil.copytree(tree / "val", other / "val")
    with Launch([str(other), str(out)], tmp_path, script=SCRIPT) as launch:
        assert launch.wait_until((out / "val/unfinished/settings.json").exists)
        launch.stop()
    path = next((other / "val").rglob("*.JPEG"))
    path.write_bytes(path.read_bytes())  # only its time stamp changes
    assert "was begun from other images" in command(tmp_path, other, out, status=2)
    shutil.rmtree(out / "val")
    assert "15 images of 3 classes" in command(tmp_path, other, out)  # val/ alone will do


def test_a_flipped_bit_is_found_and_named(copy: Path, tmp_path: Path) -> None:
    assert "every record is as it was packed" in command(tmp_path, "--verify", copy)
    stream, source = np.random.default_rng(0), PackSource(copy / "train")
    for index in stream.choice(len(source), 3, replace=False).tolist():
        path = copy / "train" / f"data-{source.files[index]:05d}.bin"
        good = path.read_bytes()
        bad, at = bytearray(good), int(source.offsets[index] + stream.integers(source.lengths[index]))
        bad[at] ^= 1 << int(stream.integers(8))
        path.write_bytes(bad)
        said = command(tmp_path, "--verify", copy, status=1)
        assert f"damaged: train/{source.name(index)} (its checksum differs: " in said
        assert said.count("damaged:") == 1
        assert "1 damaged records" in said
        assert "is damaged" in command(tmp_path, "--unpack", copy, tmp_path / "tree", status=2)
        path.write_bytes(good)


def test_unpacked_it_is_the_tree_again(tree: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "unpacked"
    assert "91 images" in command(tmp_path, "--unpack", whole, out)
    found, expected = files(out), files(tree)
    assert found.keys() == expected.keys()
    broken = "train/n00/broken.jpg"
    assert found.pop(broken) == expected.pop(broken)
    for name, content in expected.items():
        assert decode_rgb(found[name], name) == decode_rgb(content, name)
    (out / "val/n02").rename(tmp_path / "gone")
    command(tmp_path, "--unpack", whole, out)  # goes on
    assert (out / "val/n02").exists()
    (out / broken).write_bytes(b"mine")
    assert "broken.jpg is there already and differs" in command(tmp_path, "--unpack", whole, out, status=2)
    assert (out / broken).read_bytes() == b"mine"


def test_the_smaller_kinds_say_what_they_change(tree: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    shutil.copytree(tree / "val", root / "val")
    said = command(tmp_path, root, tmp_path / "small", "--short-side", 100, "--quality", 90)
    assert "this changes the data: images whose shorter side exceeds 100 pixels are shrunk to that, what gets" in said
    assert "changes the data" in command(tmp_path, root, tmp_path / "raw", "--raw", 100)
    command(tmp_path, "--unpack", tmp_path / "raw", tmp_path / "tree")
    assert {path.suffix for path in (tmp_path / "tree").rglob("*.*")} == {".ppm"}
    for wrong in (
        ["--short-side", 100],
        ["--quality", 9],
        ["--raw", 0],
        ["--raw", 9, "--lossless"],
        ["--verify", root],
    ):
        command(tmp_path, root, tmp_path / "x", *wrong, status=2)


def test_without_the_native_library_files_stay_as_they_are(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    shutil.copytree(tree / "val", tmp_path / "images/val")
    about = work.pack(tmp_path / "images", tmp_path / "out", Recipe(), 2, Report())["val"]
    assert about.counts["in_segments"] == 0
    source = PackSource(tmp_path / "out/val")
    assert not source.heads.any()
    for index in range(len(source)):
        assert source.read(index) == (tree / "val" / source.name(index)).read_bytes()


@pytest.mark.e2e
def test_a_disk_that_fills_up_is_named_and_the_same_command_goes_on(tree: Path, whole: Path, tmp_path: Path) -> None:
    try:
        with small_disk(tmp_path / "disk", 64 << 20) as disk:
            filler = fill(disk, 4 << 20)
            assert "GB are needed: make room" in command(tmp_path, tree, disk / "out", status=2)
            filler.unlink()
            with Launch([str(tree), str(disk / "out"), "--workers", "1"], tmp_path, script=SCRIPT) as launch:
                assert launch.wait_until(lambda: any((disk / "out").glob("*/data-*.bin")), period=0.0005)
                with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                    while file.write(bytes(4096)):
                        pass
                assert launch.wait() == [2], launch.output
                assert "(No space left on device): see to the disk; the same command then goes on" in launch.output
            filler.unlink()
            command(tmp_path, tree, disk / "out")
            assert files(disk / "out") == files(whole)
    except UnavailableError as reason:
        pytest.skip(str(reason))
