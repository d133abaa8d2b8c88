"""The archives become class folders: on small ones of the real layout, and with words where one is missing or damaged."""

import hashlib
import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from torchvision.datasets import imagenet

from scripts import prepare_imagenet
from tests.conftest import Run

WNIDS = ("n01440764", "n01443537")


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes of two training images, three validation images, and torchvision's checksums set to theirs."""
    folder = tmp_path / "archives"
    folder.mkdir()
    names = {kind: meta[0] for kind, meta in imagenet.ARCHIVE_META.items()}
    with tarfile.open(folder / names["train"], "w") as train:
        for wnid in WNIDS:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as images:
                for i in range(2):
                    add(images, f"{wnid}_{i}.JPEG", f"{wnid}{i}".encode())
            add(train, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(folder / names["val"], "w") as val:
        for i in range(1, 4):
            add(val, f"ILSVRC2012_val_{i:08d}.JPEG", f"val{i}".encode())
    synsets = np.array(
        [(i + 1, wnid, f"class {i}", "", 0) for i, wnid in enumerate(WNIDS)],
        dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "i4")],
    ).reshape(-1, 1)
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets})
    with tarfile.open(folder / names["devkit"], "w:gz") as devkit:
        add(devkit, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        add(devkit, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", b"2\n1\n2\n")
    sums = {kind: (name, hashlib.md5((folder / name).read_bytes()).hexdigest()) for kind, name in names.items()}
    monkeypatch.setattr(imagenet, "ARCHIVE_META", sums)
    monkeypatch.setattr(prepare_imagenet, "NUM_CLASSES", 2)
    monkeypatch.setattr(prepare_imagenet, "NUM_IMAGES", {"train": 4, "val": 3})
    return folder


def test_archives_become_class_folders(archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "imagenet"
    monkeypatch.setattr(sys, "argv", ["prepare_imagenet.py", "--archives", str(archives), "--out", str(out)])
    for _ in range(2):  # the second time finds all of it there
        prepare_imagenet.main()
        tree = {str(path.relative_to(out)): path.read_text() for path in out.rglob("*") if path.is_file()}
        assert tree == {
            **{f"train/{wnid}/{wnid}_{i}.JPEG": f"{wnid}{i}" for wnid in WNIDS for i in range(2)},
            "val/n01443537/ILSVRC2012_val_00000001.JPEG": "val1",
            "val/n01440764/ILSVRC2012_val_00000002.JPEG": "val2",
            "val/n01443537/ILSVRC2012_val_00000003.JPEG": "val3",
        }


def test_a_damaged_archive_is_one_line(archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (archives / imagenet.ARCHIVE_META["train"][0]).open("ab") as file:
        file.write(b"x")
    monkeypatch.setattr(
        sys, "argv", ["prepare_imagenet.py", "--archives", str(archives), "--out", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as stopped:
        prepare_imagenet.main()
    assert "ILSVRC2012_img_train.tar" in str(stopped.value)
    assert "\n" not in str(stopped.value)


def test_a_missing_archive_is_one_line(run: Run, tmp_path: Path) -> None:
    refused = run("scripts/prepare_imagenet.py", "--archives", str(tmp_path), "--out", str(tmp_path / "out"), status=1)
    assert "ILSVRC2012_devkit_t12.tar.gz not found" in refused.stderr
    assert refused.stderr.count("\n") == 1
