"""Class-folder trees: the class map, foreign files, links, and files that cannot be read."""

import os
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from data.config import DataConfig
from data.decode import BadImageError, ImageReadError
from data.folder import FolderSource
from data.pack import PackSource
from data.sources import EncodedSource, Source, Split, open_source, open_sources
from tests.data.made_pack import CLASSES, write_pack

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


def as_nobody(task: Callable[[], object]) -> str:
    """What `task` raises when a user without rights runs it, in a forked process; root may read everything."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            task()
        except Exception as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        text = said.read()
    os.waitpid(pid, 0)
    return text


@pytest.mark.parametrize("split", ["train", "val"])
def test_dangling_links_and_what_is_no_file_are_named_while_listing(write_tree: WriteTree, split: Split) -> None:
    root = write_tree({"train/a": ["1.png"], "val/a": ["1.png"]})
    images = root / split / "a"
    (images / "2.png").symlink_to(root / "gone.png")
    os.mkfifo(images / "3.png")
    (images / "4.png").symlink_to("/dev/zero")
    (images / "5.png").symlink_to("5.png")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(images / "6.png"))  # a socket's name must be short
    with pytest.raises(ValueError, match="cannot be read") as caught:
        open_source(folder(root), split)
    assert str(caught.value) == (
        f"{root / split} has 5 files that cannot be read: a/2.png (link to nothing), a/3.png (not a regular file), "
        "a/4.png (not a regular file), a/5.png (Too many levels of symbolic links), a/6.png (not a regular file); "
        "repair or remove them"
    )


def test_of_many_broken_links_the_first_are_named_and_all_are_counted(write_tree: WriteTree) -> None:
    root = write_tree({"train/a": ["1.png"], "train/b": ["1.png"], "val/a": ["1.png"], "val/b": ["1.png"]})
    for number in range(9):
        (root / "train" / "ab"[number % 2] / f"gone{number}.png").symlink_to("nowhere")
    with pytest.raises(
        ValueError, match=r"train has 9 files .* a/gone0.png \(.*b/gone\d.png|a/gone8.png \(.*\) \.\.\.;"
    ):
        open_source(folder(root), "train")


def test_files_and_folders_without_permission_are_named_while_listing(write_tree: WriteTree) -> None:
    root = write_tree({"train/a": ["1.png", "2.png"], "train/b": ["1.png"], "val/a": ["1.png"], "val/b": ["1.png"]})
    for parent in (root, *root.parents):
        if parent.stat().st_uid == os.getuid():
            parent.chmod(parent.stat().st_mode | 0o011)
    (root / "train" / "a" / "2.png").chmod(0)
    (root / "train" / "b").chmod(0o311)
    said = as_nobody(lambda: open_source(folder(root), "train"))
    assert said == (
        f"{root / 'train'} has 2 files that cannot be read: a/2.png (no permission to read), b (Permission denied); "
        "repair or remove them"
    )


def test_a_class_folder_that_is_a_dangling_link_is_named_not_dropped(write_tree: WriteTree) -> None:
    root = write_tree({"train/a": ["1.png"], "val/a": ["1.png"]})
    (root / "train" / "b").symlink_to(root / "not mounted")
    with pytest.raises(ValueError, match=r"train has 1 files that cannot be read: b \(link to nothing\)"):
        open_source(folder(root), "train")


def test_names_that_are_not_utf8_print_and_load(write_tree: WriteTree) -> None:
    root = write_tree({"train/a": ["1.png"], "val/a": ["1.png"]})
    odd = os.fsencode(root / "train" / "a") + b"/caf\xe9.png"
    os.link(os.fsencode(root / "train" / "a" / "1.png"), odd)
    train = open_source(folder(root), "train")
    assert train.name(1) == "a/caf\\xe9.png"
    assert train.load(1).size == (30, 20)


def test_an_encoded_source_gives_the_bytes_that_it_decodes(write_tree: WriteTree) -> None:
    root = write_tree({"train/a": ["1.png", "2.png"], "val/a": ["1.png"]})
    train = open_source(folder(root), "train")
    assert isinstance(train, EncodedSource)
    assert isinstance(train, FolderSource)
    for index in range(2):
        path = root / "train" / train.name(index)
        assert train.path(index) == bytes(path)
        assert train.read(index) == path.read_bytes()
    (root / "train/a/1.png").write_bytes(b"no image")
    assert train.read(0) == b"no image"
    with pytest.raises(BadImageError, match=r"cannot decode .*train/a/1.png"):
        train.load(0)
    (root / "train/a/2.png").unlink()
    with pytest.raises(ImageReadError, match=r"cannot read .*train/a/2.png \(No such file or directory\)"):
        train.read(1)
    assert not isinstance(open_source(DataConfig(kind="synthetic"), "train"), EncodedSource)


@pytest.mark.parametrize("kind", ["folder", "imagenet", "digits"])
def test_a_pack_is_opened_whatever_the_kind(kind: Literal["folder", "imagenet", "digits"], tmp_path: Path) -> None:
    write_pack(tmp_path / "train", 20)
    write_pack(tmp_path / "val", 6)
    train, val = open_sources(DataConfig(kind=kind, root=str(tmp_path), num_classes=2, exif=True))
    assert isinstance(train, PackSource)
    assert isinstance(val, EncodedSource)
    assert (len(train), len(val), train.class_names, train.exif) == (20, 6, CLASSES, True)
    with pytest.raises(ValueError, match=r"needs 3 class folders but .*train has 2"):
        open_source(DataConfig(kind=kind, root=str(tmp_path), num_classes=3), "val")


def test_a_packed_split_goes_with_a_tree_of_the_same_classes(write_tree: WriteTree) -> None:
    root = write_tree({"train/a": ["1.png"], "train/b": ["1.png"]})
    write_pack(root / "val", 6)
    assert [len(source) for source in open_sources(folder(root))] == [2, 6]
    (root / "train/c").mkdir()
    (root / "train/a/1.png").rename(root / "train/c/1.png")
    (root / "train/a").rmdir()
    with pytest.raises(ValueError, match=r"val lacks c \(1\) and adds a \(1\)"):
        open_sources(folder(root))
    (root / "train/b/1.png").unlink()
    assert len(open_source(folder(root), "val")) == 6  # enough to evaluate


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
