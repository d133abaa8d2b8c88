"""Listings kept from one run to the next: used while they hold, and never when they do not."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from data import folder as listing
from data import index_cache, node
from data.folder import FolderSource

CLASSES = tuple(f"class{number:02d}" for number in range(40))
LONG_AGO = 1_600_000_000


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """40 classes of 12 links to one file, half of them in a folder below; as if the tree were large, and old."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listing, "QUICK_S", 0.0)
    root = tmp_path / "train"
    (tmp_path / "image").write_bytes(b"x")
    for name in CLASSES:
        (root / name / "more").mkdir(parents=True)
        for number in range(6):
            os.link(tmp_path / "image", root / name / f"{number}.jpg")
            os.link(tmp_path / "image", root / name / "more" / f"caf\udce9{number}.png")
    age(root)
    return root


def age(root: Path) -> None:
    for folder, _, _ in os.walk(root):
        os.utime(folder, (LONG_AGO, LONG_AGO))


def paths(root: Path) -> list[str]:
    source = FolderSource(root, CLASSES)
    assert source.labels.tolist() == [CLASSES.index(source.name(i).split("/")[0]) for i in range(len(source))]
    return [os.fsdecode(source.path(index)) for index in range(len(source))]


def truth(root: Path) -> list[str]:
    return sorted(str(path) for path in root.rglob("*") if path.suffix)


def kept(root: Path) -> Path:
    place = index_cache.place(root)
    assert place is not None
    return place


def test_a_listing_is_kept_and_holds_while_no_folder_has_another_time(tree: Path) -> None:
    before = paths(tree)
    assert before == truth(tree)
    assert kept(tree).is_file()
    (tree / "class07/0.jpg").rename(tree / "class07/new.jpg")
    age(tree)  # as if the name had always been that
    assert paths(tree) == before != truth(tree)
    os.utime(tree / "class07")
    assert paths(tree) == truth(tree)


def remove_below(tree: Path) -> None:
    next((tree / "class39/more").iterdir()).unlink()


def replace_folder(tree: Path) -> None:
    """Another folder in the place of one, with its time."""
    (tree / "class00").rename(tree.parent / "old")
    (tree / "class00").mkdir()
    (tree / "class00/other.jpg").touch()
    os.utime(tree / "class00", (LONG_AGO, LONG_AGO))


def retarget_link(tree: Path) -> None:
    (tree / "class00").rename(tree.parent / "old")
    (tree.parent / "elsewhere").mkdir()
    (tree.parent / "elsewhere/other.jpg").touch()
    (tree / "class00").symlink_to(tree.parent / "elsewhere")


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: (tree / "class03/added.jpg").touch(),
        lambda tree: (tree / "class03/0.jpg").unlink(),
        lambda tree: (tree / "class03/0.jpg").rename(tree / "class03/renamed.jpg"),
        remove_below,
        lambda tree: (tree / "class03/more").rename(tree / "class03/other"),
        replace_folder,
        retarget_link,
    ],
)
def test_every_change_of_a_name_is_seen(tree: Path, change: Callable[[Path], object]) -> None:
    paths(tree)
    assert kept(tree).is_file()
    change(tree)
    found = {str(Path(folder, file)) for folder, _, files in os.walk(tree, followlinks=True) for file in files}
    assert paths(tree) == sorted(found)


def test_other_classes_are_another_listing(tree: Path) -> None:
    paths(tree)
    fewer = FolderSource(tree, CLASSES[1:])
    assert len(fewer) == 39 * 12
    assert fewer.name(0) == "class01/0.jpg"
    assert len(FolderSource(tree, CLASSES)) == 40 * 12


def test_a_damaged_listing_is_made_anew(tree: Path) -> None:
    whole = paths(tree)
    place = kept(tree)
    good = place.read_bytes()
    damaged = [b"", b"PK", good[: len(good) // 2], good[:-1], os.urandom(1000)]
    for at in np.random.default_rng(0).integers(len(good), size=25).tolist():
        damaged.append(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    for content in damaged:
        place.write_bytes(content)
        assert paths(tree) == whole
        assert index_cache.read(tree, CLASSES) is not None


def test_a_folder_that_changed_a_moment_ago_is_not_trusted(tree: Path) -> None:
    (tree / "class05/late.jpg").touch()
    assert paths(tree) == truth(tree)
    assert not kept(tree).exists()


def test_what_cannot_be_read_is_named_every_time(tree: Path) -> None:
    (tree / "class05/gone.jpg").symlink_to("nowhere")
    age(tree)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"train has 1 files that cannot be read: class05/gone.jpg"):
            paths(tree)
    assert not kept(tree).exists()


def test_a_small_tree_leaves_nothing_behind(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "QUICK_S", 60.0)
    assert paths(tree) == truth(tree)
    assert not kept(tree).parent.exists()


def test_a_cache_that_cannot_be_written_is_no_error(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_bytes(b"a file where a folder should be")
    assert paths(tree) == truth(tree)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "cache"))
    assert paths(tree) == truth(tree)


def test_the_cache_is_where_the_convention_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/caches")
    assert node.cache_folder() == Path("/var/caches/vision-permutator")
    monkeypatch.setenv("HOME", "/users/me")
    for unset in ("", "not/absolute"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert node.cache_folder() == Path("/users/me/.cache/vision-permutator")


def test_processes_that_start_together_list_alike(tree: Path) -> None:
    with ProcessPoolExecutor(4, get_context("fork")) as pool:
        found = list(pool.map(paths, [tree] * 4))
    assert found == [truth(tree)] * 4
    assert kept(tree).is_file()
