"""scripts/benchmark.py measures what it says it measures; how fast anything is, is not a test."""

import json
from pathlib import Path

import pytest

from data import native
from scripts.bench import convergence, model
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
    tables = json.loads(said.stdout)["tables"]
    speeds = {row["pipeline"]: row["x timm"] for row in tables["to a normalised float batch, one core"]}
    assert next(iter(speeds)) == "timm create_loader"
    assert {"native, plain files", "native, lossless pack", "native, 400 q90 pack", "torch, plain files"} < set(speeds)
    assert speeds["timm create_loader"] == 1
    assert all(ratio > 0 for ratio in speeds.values())
    quality = {row["what"]: row["lowest dB"] for row in tables["against Pillow, PSNR over 192 images"]}
    assert len(quality) == 12
    assert min(quality.values()) >= 50
    assert len(tables["stages"]) == 9


def test_model_has_a_row_for_each_network_in_each_format(run: Run) -> None:
    networks = ["vip_tiny", "literal/vip_tiny", "test_vit"]
    arguments = ["--networks", *networks, "--modes", "eager", "--batch", "2", "--rounds", "1", "--json"]
    said = run("scripts/benchmark.py", "model", *arguments)
    found = json.loads(said.stdout)
    assert {"date", "device", "torch", "command", "tables"} == set(found)
    assert found["command"].endswith("--rounds 1 --json")
    limits, speeds, shares, moved = found["tables"].values()
    assert [row["format"] for row in limits] == ["fp32", "bf16"]
    assert [(row["network"], row["format"]) for row in speeds] == [
        (network, precision) for precision in ("fp32", "bf16") for network in networks
    ]
    for row in speeds:
        assert row["forward images/s"] > row["train images/s"] > 0, row
        assert row["stored MiB"] > 0, row
        assert row["MFU %"] > 0, row
    assert [row.get("train x literal") for row in speeds[1::3]] == [1, 1]
    assert "train x literal" in speeds[0]
    assert "train x literal" not in speeds[2], "it has no literal form"
    for row in shares:
        categories = {name: value for name, value in row.items() if name not in ("network", "format")}
        assert sum(categories.values()) == pytest.approx(100, abs=1)
        assert ("gate" in categories) == ("vip" in row["network"])
        assert ("attention" in categories) == (row["network"] == "test_vit")
    assert [row["network"] for row in moved] == networks
    assert moved[0]["eager"] < moved[1]["eager"]
    assert moved[0]["compiled"] < moved[0]["eager"]
    assert "compiled" not in moved[2]


def test_a_network_that_cannot_run_is_a_row() -> None:
    images = 10**9
    tables = model.measure(["test_vit"], ["fp32"], ["eager"], images, 1, lambda what: None)
    (row,) = tables[f"speed at batch {images}"]
    note = str(row.pop("note"))
    assert row == {"network": "test_vit", "format": "fp32", "mode": "eager"}
    assert "alloc" in note


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["model", "--networks", "vip_t"], "--networks vip_t: no such network"),
        (["model", "--networks", "literal/resnet18"], "--networks literal/resnet18: no such network"),
        (["model", "--batch", "0"], "argument --batch: 0 is no number from 1 on"),
        (["model", "--precisions", "fp16"], "precision=fp16: needs a CUDA device"),
        (["depth", "--network", "resnet18"], "--network resnet18: skips no samples; take one of vip_s16"),
        (["model", "--precisions", "fp8"], "argument --precisions: invalid choice: 'fp8'"),
        (["convergence", "--seeds", "1"], "--seeds 1: no spread can be had from it; take 2 or more"),
    ],
)
def test_a_bad_value_is_one_line(run: Run, arguments: list[str], named: str) -> None:
    said = run("scripts/benchmark.py", *arguments, status=2)
    assert said.stdout == ""
    assert said.stderr.startswith(f"benchmark.py: error: {named}")
    assert said.stderr.count("\n") == 1


def test_convergence_trains_both_forms(run: Run, digits: Path) -> None:
    said = run("scripts/benchmark.py", "convergence", "--seeds", "2", "--epochs", "1", "--root", str(digits), "--json")
    runs, figures = json.loads(said.stdout)["tables"].values()
    assert [(row["form"], row["seed"]) for row in runs] == [
        ("ours", 0), ("literal", 0), ("ours", 1), ("literal", 1)
    ]  # fmt: skip
    assert runs[0]["validation loss"] != runs[2]["validation loss"], "seeds differ"
    assert runs[0]["validation loss"] != runs[1]["validation loss"], "the literal form was not used"
    assert runs[0]["validation loss"] == pytest.approx(runs[1]["validation loss"], rel=0.05), "they begin alike"
    assert [row["verdict"] for row in figures] == ["within the noise"] * 2


def test_convergence_can_fail() -> None:
    assert convergence.compare([99.0, 98.9, 99.1], [99.1, 99.0, 98.9])["verdict"] == "within the noise"
    assert convergence.compare([98.0, 97.9, 98.1], [99.1, 99.0, 98.9])["verdict"] == "beyond the noise"


def test_tracking_has_a_row_for_each_tracker(run: Run, digits: Path) -> None:
    arguments = ["--interval", "2", "--rounds", "1", "--root", str(digits), "--json"]
    said = run("scripts/benchmark.py", "tracking", *arguments)
    (rows,) = json.loads(said.stdout)["tables"].values()
    nothing, *trackers = [row["calls, ms"] for row in rows]
    assert [row["tracked"] for row in rows[1:]] == ["local", "local and wandb, offline", "local and tensorboard"]
    assert all(nothing < spent < 1000 for spent in trackers), rows


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
