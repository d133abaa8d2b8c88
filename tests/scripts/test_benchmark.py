"""scripts/benchmark.py measures what it says it measures; how fast anything is, is not a test."""

import json
from pathlib import Path

import pytest

from data import native
from scripts.bench.photos import write_photos
from tests.conftest import Run


@pytest.mark.skipif(not native.available(), reason=native.reason())
def test_data_compares_every_pipeline_on_the_same_files(run: Run, tmp_path: Path) -> None:
    write_photos(tmp_path, 80)
    said = run(
        "scripts/benchmark.py",
        "data",
        "--root",
        str(tmp_path),
        "--work",
        "work",
        "--rounds",
        "1",
        "--batches",
        "1",
        "--json",
    )
    tables = json.loads(said.stdout)
    speeds = {row["pipeline"]: row["x timm"] for row in tables["to a normalised float batch, one core"]}
    assert next(iter(speeds)) == "timm create_loader"
    assert {"native, plain files", "native, lossless pack", "native, 400 q90 pack", "torch, plain files"} < set(speeds)
    assert speeds["timm create_loader"] == 1
    assert all(ratio > 0 for ratio in speeds.values())
    quality = {row["what"]: row["lowest dB"] for row in tables["against Pillow, PSNR over 192 images"]}
    assert len(quality) == 12
    assert min(quality.values()) >= 50
    assert len(tables["stages"]) == 9


def test_photographs_are_made_once(tmp_path: Path) -> None:
    write_photos(tmp_path, 12)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.JPEG")}
    write_photos(tmp_path, 14)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.JPEG")}
    assert len(after) == 14
    assert before.items() < after.items()
    sizes = [path.stat().st_size for path in after]
    assert 60_000 < sum(sizes) / len(sizes) < 170_000, "about ImageNet's 110 kB"


def test_without_photographs_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    from scripts.bench.photos import _photos

    _photos.cache_clear()
    with pytest.raises(
        ValueError, match=r"scikit-image is not installed, .*: pip install scikit-image, or give --root"
    ):
        _photos()
    _photos.cache_clear()
