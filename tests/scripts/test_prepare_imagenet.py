"""ImageNet from its archives, from Parquet or from a tree: whole after any number of kills, and audited by its manifest."""

import contextlib
import fcntl
import io
import json
import os
import random
import shutil
import signal
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
from PIL import Image

from data.decode import decode_rgb
from data.folder import FolderSource
from scripts.faults.disk import fill, small_disk
from scripts.faults.launch import ROOT, Launch, UnavailableError
from scripts.prepare import archives as reading
from scripts.prepare import manifest, work
from scripts.prepare.parquet import open_parquet
from tests.scripts import fake_imagenet as fake

SCRIPT = ROOT / "scripts/prepare_imagenet.py"


def command(cwd: Path, *arguments: object, status: int = 0) -> str:
    """Runs prepare_imagenet.py and gives what it printed."""
    with Launch([str(item) for item in (*arguments, "--workers", 2)], cwd, script=SCRIPT) as launch:
        ended = launch.wait()
        assert ended == [status], launch.output
        return launch.output


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def images() -> dict[str, bytes]:
    return fake.images()


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory, images: dict[str, bytes]) -> Path:
    return fake.write_archives(tmp_path_factory.mktemp("ilsvrc") / "archives", images)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, archives: Path) -> Path:
    """The tree that nothing disturbed; tests only read it."""
    out = tmp_path_factory.mktemp("whole") / "imagenet"
    command(out.parent, "--archives", archives, "--out", out, "--skip-md5")
    return out


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_archives_become_a_tree_and_a_manifest_of_every_image(whole: Path, images: dict[str, bytes]) -> None:
    log = (whole / "prepare.log").read_text()
    assert "38 training and 11 validation images of 4 classes" in log
    assert "49 of 49 images" in log
    found = tree(whole)
    assert found.pop("prepare.log")
    header = json.loads(found.pop("manifest.json"))
    assert found == images
    entries = header["files"]
    assert [entry["path"] for entry in entries] == sorted(images)
    for entry in entries:
        content = images[entry["path"]]
        with Image.open(io.BytesIO(content)) as image:
            assert (entry["width"], entry["height"]) == image.size
        assert (entry["bytes"], entry["xxh3_128"]) == (len(content), xxhash.xxh3_128_hexdigest(content))
        assert entry.get("odd", []) == [kind for path, kind in fake.ODD.items() if path == entry["path"]]
    assert header["images"] == {"train": 38, "val": 11}
    assert header["classes"] == list(fake.WNIDS)
    assert header["odd"] == {kind: {"count": 1, "first": [path]} for path, kind in fake.ODD.items()}


def test_a_whole_tree_is_left_alone(archives: Path, copy: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*.*") if path.name != "prepare.log"}
    command(tmp_path, "--archives", archives, "--out", copy, "--skip-md5")
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*.*") if path.name != "prepare.log"} == before
    assert not (copy / "unfinished").exists()


def moments(out: Path) -> list[Callable[[], bool]]:
    """When to kill: early and late in the writing, at journals, and around each of the last renames."""
    stream = random.Random(0)

    def files(count: int) -> Callable[[], bool]:
        return lambda: sum(1 for _ in (out / "unfinished").glob("*/n*/*")) >= count

    def journals(count: int) -> Callable[[], bool]:
        return lambda: len(list((out / "unfinished/parts").glob("*"))) >= count

    last = ("train", "val", "manifest.json.tmp", "manifest.json")
    return [
        *(files(count) for count in sorted(stream.sample(range(1, 25), 4))),
        *(journals(count) for count in range(1, 6)),
        *((out / name).exists for name in last),
    ]


def storm(archives: Path, out: Path) -> tuple[int, int]:
    """Kills at each of the moments, then a last attempt; how many it killed, and how many of them amid the parts."""
    arguments = ["--archives", str(archives), "--out", str(out), "--skip-md5", "--workers", "2"]
    kills, amid_parts = 0, 0
    done: dict[str, tuple[int, int]] = {}  # inode and time of what a journal says is done
    for moment in moments(out):
        with Launch(arguments, out.parent / "cwd", script=SCRIPT) as launch:
            launch.wait_until(moment, period=0.0005)
            kills += launch.stop() == [-9]
        journals = list((out / "unfinished/parts").glob("*.jsonl"))
        amid_parts += 0 < len(journals) < len(fake.WNIDS) + 1
        for path in (manifest.path_of(line) for file in journals for line in file.read_text().splitlines()):
            status = next(place for place in (out / path, out / "unfinished" / path) if place.exists()).stat()
            done.setdefault(path, (status.st_ino, status.st_mtime_ns))
    command(out.parent, *arguments)
    statuses = {path: (out / path).stat() for path in done}
    assert {path: (status.st_ino, status.st_mtime_ns) for path, status in statuses.items()} == done, "work was repeated"
    return kills, amid_parts


@pytest.mark.e2e
def test_killed_again_and_again_it_ends_like_an_undisturbed_one(
    archives: Path, whole: Path, images: dict[str, bytes], tmp_path: Path
) -> None:
    for attempt in range(4):  # on a busy machine kills may come too late
        out = tmp_path / str(attempt)
        kills, amid_parts = storm(archives, out)
        found = tree(out)
        assert found.pop("prepare.log")
        assert found.pop("manifest.json") == (whole / "manifest.json").read_bytes()
        assert found == images
        if kills >= 6 and amid_parts >= 2:
            return
    pytest.fail(f"only {kills} kills, {amid_parts} amid the parts")


def workers(launch: Launch) -> list[int]:
    pid = launch.pids[0]
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.e2e
@pytest.mark.parametrize("whom", ["main", "worker"])
def test_interrupted_or_short_of_a_process_it_says_that_the_same_command_goes_on(
    whom: str, archives: Path, tmp_path: Path
) -> None:
    arguments = ["--archives", str(archives), "--out", str(tmp_path / "out"), "--skip-md5", "--workers", "1"]
    with Launch(arguments, tmp_path, script=SCRIPT) as launch:
        assert launch.wait_until(lambda: any((tmp_path / "out/unfinished").glob("train/*/*")), period=0.0005)
        others = workers(launch)
        assert len(others) == 1
        if whom == "main":
            launch.kill(0, signal.SIGINT)
        else:
            os.kill(others[0], signal.SIGKILL)
        assert launch.wait() == [130 if whom == "main" else 2], launch.output
        assert launch.output.count("the same command goes on") == 1
        assert "Traceback" not in launch.output
    assert not (tmp_path / "out/train").exists()
    assert "every file" in command(tmp_path, *arguments) + command(tmp_path, "--verify", "--out", tmp_path / "out")


@pytest.mark.e2e
def test_interrupted_while_it_reads_an_archive_it_ends_at_once(tmp_path: Path) -> None:
    for name in fake.ARCHIVES:
        with (tmp_path / name).open("wb") as file:
            file.truncate(200 << 30)  # holes: they take no room, but minutes to read
    with Launch(["--archives", str(tmp_path), "--out", str(tmp_path / "out")], tmp_path, script=SCRIPT) as launch:
        assert launch.wait_until((tmp_path / "out/unfinished/lock").exists)
        time.sleep(0.3)
        launch.kill(0, signal.SIGINT)
        assert launch.wait() == [130], launch.output


@pytest.mark.e2e
def test_a_disk_that_fills_up_is_named_and_the_same_command_goes_on(
    archives: Path, images: dict[str, bytes], tmp_path: Path
) -> None:
    arguments = ["--archives", archives, "--out", tmp_path / "disk/out", "--skip-md5"]
    needed = sum((archives / name).stat().st_size for name in fake.ARCHIVES[:2])
    try:
        with small_disk(tmp_path / "disk", 8 << 20) as disk:
            filler = fill(disk, needed // 2)
            assert "GB are needed: make room" in command(tmp_path, *arguments, status=2)
            filler.unlink()
            with Launch([*map(str, arguments), "--workers", "1"], tmp_path, script=SCRIPT) as launch:
                assert launch.wait_until(lambda: any((disk / "out/unfinished").glob("train/*/*")), period=0.0005)
                with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                    while file.write(bytes(4096)):
                        pass
                assert launch.wait() == [2], launch.output
                assert "(No space left on device): see to the disk; the same command then goes on" in launch.output
            assert not (disk / "out/train").exists()
            filler.unlink()
            command(tmp_path, *arguments)
            assert {path: content for path, content in tree(disk / "out").items() if path in images} == images
    except UnavailableError as reason:
        pytest.skip(str(reason))


def test_a_bit_flipped_in_a_jpeg_that_still_decodes_is_named_by_the_audit(copy: Path, tmp_path: Path) -> None:
    path = "train/n02119789/n02119789_5.JPEG"
    good = (copy / path).read_bytes()
    for at in range(len(good) // 2, len(good)):
        bad = good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :]
        if not np.array_equal(decode_rgb(bad, path), decode_rgb(good, path)):  # it decodes, to another image
            break
    (copy / path).write_bytes(bad)
    said = command(tmp_path, "--verify", "--out", copy, status=1)
    assert f"changed: {path}\n" in said
    assert "0 missing, 0 added, 1 changed" in said
    (copy / path).write_bytes(good)
    assert "every file is as it was prepared" in command(tmp_path, "--verify", "--out", copy)


def test_missing_and_added_files_are_named_by_the_audit(copy: Path, tmp_path: Path) -> None:
    missing = sorted((copy / "train/n01443537").iterdir())
    for path in missing:
        path.unlink()
    (copy / "val/n01440764/copy.jpg").write_bytes(b"x")
    (copy / "val/n01440764/.DS_Store").write_bytes(b"training does not see it")
    said = command(tmp_path, "--verify", "--out", copy, status=1)
    named = [line for line in said.splitlines() if line.startswith("missing: train")]
    assert named == [f"missing: {path.relative_to(copy)}" for path in missing[:10]]
    assert "missing: ... 2 more" in said
    assert "added: val/n01440764/copy.jpg\n" in said
    assert "12 missing, 1 added, 0 changed" in said


def test_a_manifest_that_is_damaged_or_missing_is_said(copy: Path) -> None:
    path = copy / "manifest.json"
    good = path.read_bytes()
    for at in range(0, len(good), 97):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        if at > good.index(b"\n"):
            with pytest.raises(ValueError, match=r"manifest.json is damaged .*restore"):
                manifest.read(copy)
    path.unlink()
    with pytest.raises(ValueError, match=r"manifest.json not found: .*--tree"):
        manifest.read(copy)


def test_a_tree_that_is_there_gets_the_same_manifest(copy: Path, whole: Path, tmp_path: Path) -> None:
    (copy / "manifest.json").unlink()
    (copy / "prepare.log").unlink()
    before = tree(copy)
    command(tmp_path, "--tree", copy)
    assert (copy / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()
    assert before.items() <= tree(copy).items()


def test_the_manifest_lists_what_training_lists(copy: Path) -> None:
    odd = copy / "train/n01440764/inner/caf\udce9.png"
    odd.parent.mkdir()
    for name in (odd.name, ".hidden.png", "notes.txt"):
        (odd.parent / name).touch()
    (odd.parent / "back").symlink_to(copy / "train/n01440764")
    (copy / "train/n01440764/link.jpg").symlink_to("n01440764_0.JPEG")
    source = FolderSource(copy / "train", fake.WNIDS)
    listed = [path.removeprefix("train/") for path in manifest.list_images(copy) if path.startswith("train/")]
    assert sorted(map(work.printable, listed)) == sorted(source.name(index) for index in range(len(source)))


def test_an_image_that_cannot_be_decoded_is_named_and_all_else_is_done(
    images: dict[str, bytes], tmp_path: Path
) -> None:
    path = "train/n13133613/n13133613_3.JPEG"
    broken = images | {path: b"<html>not found</html>"}
    archives = fake.write_archives(tmp_path / "archives", broken)
    out = tmp_path / "imagenet"
    for _ in range(2):
        said = command(tmp_path, "--archives", archives, "--out", out, "--skip-md5", status=2)
        assert f"error: 1 images cannot be decoded: {path}; all else is done; " in said
    assert {name: content for name, content in tree(out).items() if name in images} == broken
    entries = {entry["path"]: entry for entry in json.loads((out / "manifest.json").read_text())["files"]}
    assert entries[path]["odd"] == ["undecodable"]
    assert "not one of" in entries[path]["reason"]
    (out / path).write_bytes(images[path])
    (out / "manifest.json").unlink()
    assert "cannot be decoded" not in command(tmp_path, "--tree", out)


def test_parquet_files_give_the_same_tree_and_manifest(archives: Path, whole: Path, tmp_path: Path) -> None:
    parquet = fake.write_parquet(tmp_path / "parquet", fake.images())
    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join(fake.WNIDS))
    for i, names in enumerate(([], ["--classes", classes], ["--devkit", archives / fake.ARCHIVES[2]])):
        out = tmp_path / str(i)
        command(tmp_path, "--parquet", parquet, *names, "--out", out, "--skip-md5")
        assert tree(out) | {"prepare.log": b""} == tree(whole) | {"prepare.log": b""}
    classes.write_text("\n".join(reversed(fake.WNIDS)))
    said = command(tmp_path, "--parquet", parquet, "--classes", classes, "--out", tmp_path / "x", status=2)
    assert "the classes are not in this copy's order" in said
    (parquet / "train-00001-of-00002.parquet").unlink()
    said = command(tmp_path, "--parquet", parquet, "--classes", classes, "--out", tmp_path / "y", status=2)
    assert "has 1 files of train (of 2)" in said


def test_classes_that_file_names_do_not_tell_are_asked_for(images: dict[str, bytes], tmp_path: Path) -> None:
    renamed = {path.replace("n02119789_", "x"): content for path, content in images.items()}
    parquet = fake.write_parquet(tmp_path / "parquet", renamed)
    refused = command(tmp_path, "--parquet", parquet, "--out", tmp_path / "out", status=2)
    assert "which does not tell the class of its label: give --devkit or --classes" in refused


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # python's own way to say that there is none
    with pytest.raises(ValueError, match=r"not installed: pip install pyarrow \(the extra `parquet`\)"):
        open_parquet(tmp_path, ["n01440764"], {})


def with_member(archive: int, name: str) -> Callable[[Path], None]:
    def add(folder: Path) -> None:
        with tarfile.open(folder / fake.ARCHIVES[archive], "a") as tar:
            fake.add(tar, name, b"")

    return add


def cut_off(folder: Path) -> None:
    path = folder / fake.ARCHIVES[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_off_devkit(folder: Path) -> None:
    path = folder / fake.ARCHIVES[2]
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_member(0, "n00000001.tar"), r"do not agree on classes: it adds 1 \(n00000001 "),
        (with_member(1, "ILSVRC2012_val_00000003.JPEG"), r"do not agree on images: it repeats 1 \(3 "),
        (with_member(1, "ILSVRC2012_val_00000012.JPEG"), "is not one of the 11 images"),
        (cut_off, "ILSVRC2012_img_train.tar.* download it again"),
        (cut_off_devkit, r"is not the devkit \("),
    ],
)
def test_archives_that_are_not_whole_are_one_line(
    change: Callable[[Path], None], said: str, archives: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(archives, tmp_path / "archives"))
    change(folder)
    with pytest.raises(ValueError, match=said) as refused:
        reading.open_archives(*(folder / name for name in fake.ARCHIVES), verified=False)
    assert "\n" not in str(refused.value)


def test_images_that_the_devkit_counts_and_the_archive_lacks_are_an_error(
    images: dict[str, bytes], tmp_path: Path
) -> None:
    del (short := dict(images))["train/n02119789/n02119789_6.JPEG"]
    archives = fake.write_archives(tmp_path / "archives", short)
    out = tmp_path / "imagenet"
    said = command(tmp_path, "--archives", archives, "--out", out, "--skip-md5", status=2)
    assert "train has 37 images instead of 38, train/n02119789 has 6 images instead of 7" in said
    assert not (out / "train").exists()
    fake_again = fake.write_archives(tmp_path / "whole", images)
    said = command(tmp_path, "--archives", fake_again, "--out", out, "--skip-md5", status=2)
    assert "was begun from other files" in said


def test_archives_other_than_the_published_ones_are_refused(archives: Path, tmp_path: Path) -> None:
    said = command(tmp_path, "--archives", archives, "--out", tmp_path / "out", status=2)
    assert "ILSVRC2012_img_train.tar has the MD5 sum" in said
    assert "instead of 1d675b47d978889d74fa0da5fadfb00e" in said
    said = command(tmp_path, "--archives", tmp_path, "--out", tmp_path / "out", status=2)
    assert "ILSVRC2012_img_train.tar not found: download it from image-net.org" in said
    assert said.count("\n") == 1


def test_a_tree_that_is_there_is_not_mixed_with_another(archives: Path, copy: Path, tmp_path: Path) -> None:
    (copy / "manifest.json").unlink()
    said = command(tmp_path, "--archives", archives, "--out", copy, "--skip-md5", status=2)
    assert f"train is there already: --tree {copy}" in said


def test_one_preparation_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "PATIENCE_S", 0.2)
    (tmp_path / "unfinished").mkdir()
    with (tmp_path / "unfinished/lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another preparation works in"):
            work.prepare(tmp_path, lambda notes: pytest.fail("it began"), True, 1, None)  # type: ignore[arg-type]
