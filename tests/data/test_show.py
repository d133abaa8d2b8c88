"""The picture of what the network sees, through its command line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.show import main


def test_grid_of_images_with_captions(digits_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    command = [sys.executable, "-m", "data.show", "--root", str(digits_root), "--num", "7", "--out", str(out)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    assert "7 training images" in shown.stdout
    page = np.asarray(Image.open(out))
    assert page[8:200, 8:200].std() > 10
    caption = page[200:236, 8:200]
    assert caption.min() < 100
    assert caption.max() == 255


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "mixup_alpha=1"], "--set mixup_alpha=1: no such key; there are scale, "),
        (["--set", "mixup=-1"], "--set mixup: Input should be greater than or equal to 0"),
        (["--set", "scale=[1,0.5]"], "--set scale="),
        (["--data", "folder", "--root", "nowhere"], "nowhere/train not found"),
    ],
)
def test_mistakes_are_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data.show", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert str(stopped.value).startswith(message)
    assert "\n" not in str(stopped.value)
    assert not list(tmp_path.iterdir())
