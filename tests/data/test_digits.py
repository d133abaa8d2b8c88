"""The digits tree: fixed, whole or absent, safe to write from several processes."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.digits import prepare_digits
from data.sources import Source, open_sources

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_digits.py"


def test_split_is_fixed_and_stratified(digits: tuple[Source, Source]) -> None:
    train, val = digits
    assert (len(train), len(val)) == (1437, 360)
    assert train.class_names == tuple("0123456789")
    assert np.bincount(val.labels).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    numbers = {Path(source.name(index)).stem for source in digits for index in range(len(source))}
    assert len(numbers) == 1797
    names = "".join(val.name(index) for index in range(len(val)))
    assert hashlib.sha256(names.encode()).hexdigest().startswith("8e1778a00fc0a1b0")


def test_images_are_32_pixels_of_the_full_range(digits: tuple[Source, Source]) -> None:
    pixels = np.asarray(digits[0].load(0))
    assert pixels.shape == (32, 32, 3)
    assert pixels.min() == 0
    assert pixels.max() > 230


def test_opening_prepares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train, _ = open_sources(DataConfig(kind="digits"))
    first = tmp_path / "datasets" / "digits" / "train" / train.name(0)
    written = first.stat().st_mtime_ns
    open_sources(DataConfig(kind="digits"))
    assert first.stat().st_mtime_ns == written


def test_two_processes_at_once(tmp_path: Path) -> None:
    root = tmp_path / "sets" / "digits"
    command = [sys.executable, str(SCRIPT), "--root", str(root)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    for process in running:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        assert "1437 training and 360 validation images" in output
    assert [path.name for path in root.parent.iterdir()] == ["digits"]
    prepare_digits(root)


def test_incomplete_tree_is_reported_not_repaired(tmp_path: Path) -> None:
    root = tmp_path / "digits"
    prepare_digits(root)
    next((root / "val").glob("*/*.png")).unlink()
    with pytest.raises(ValueError, match=r"val has 359 digit images instead of 360: delete .*digits"):
        prepare_digits(root)
