"""The evaluation command: exact figures, whatever the world and the batch, from our checkpoints and published files."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.conftest import Run
from vip import checkpoint

pytestmark = pytest.mark.e2e


def figures(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "eval.json").read_text())


@pytest.fixture(scope="session")
def odd_digits(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """The digits with 345 validation images: no multiple of any world or batch below, and a last slice that is short."""
    root = tmp_path_factory.mktemp("odd") / "digits"
    (root / "val").mkdir(parents=True)
    (root / "train").symlink_to(digits / "train")
    for folder in (digits / "val").iterdir():
        (root / "val" / folder.name).mkdir()
        for image in sorted(folder.iterdir())[: None if folder.name != "0" else -15]:
            (root / "val" / folder.name / image.name).symlink_to(image)
    return root


def test_every_world_and_batch_size_gives_the_same_digits(
    run: Run, tmp_path: Path, trained: Path, odd_digits: Path
) -> None:
    results, predictions = [], []
    for processes, batch_size in ((0, 64), (1, 7), (2, 100), (3, 1000)):
        out = tmp_path / f"{processes}-{batch_size}"
        run("eval.py", f"checkpoint={trained}", "data=folder", f"data.root={odd_digits}", "data.workers=0", f"out={out}",
            f"batch_size={batch_size}", processes=processes)  # fmt: skip
        results.append(figures(out))
        predictions.append((out / "predictions.csv").read_text())
    assert results[0]["images"] == 345
    assert all(result == results[0] for result in results)
    assert all(text == predictions[0] for text in predictions)


def test_figures_follow_from_the_predictions_and_equal_the_run_s_own(
    run: Run, tmp_path: Path, trained: Path, digits: Path
) -> None:
    said = run("eval.py", f"checkpoint={trained / 'checkpoints'}", f"out={tmp_path}").stdout
    result = figures(tmp_path)
    assert f"{result['top1']:.3f} %" in said
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert sorted(row["image"] for row in rows) == sorted(
        str(path.relative_to(digits / "val")) for path in (digits / "val").glob("*/*.png")
    )
    assert result["top1"] == 100 * sum(row["label"] == row["top1"] for row in rows) / len(rows)
    in_top5 = sum(row["label"] in [row[f"top{k}"] for k in range(1, 6)] for row in rows)
    assert result["top5"] == 100 * in_top5 / len(rows)
    assert all(row["label"] == row["image"].split("/")[0] for row in rows)
    step = checkpoint.read(checkpoint.find(trained)).step
    own = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    own = [line for line in own if line["step"] == step and "val/top1" in line]
    assert [result[key] for key in ("loss", "top1", "top5")] == [
        own[0][f"val/{key}"] for key in ("loss", "top1", "top5")
    ]

    run("eval.py", f"checkpoint={trained}", "ema=true", f"out={tmp_path}")
    assert [figures(tmp_path)[key] for key in ("loss", "top1")] == [
        own[0][f"val_ema/{key}"] for key in ("loss", "top1")
    ]


@pytest.mark.parametrize("wrapping", ["bare", "state_dict", "state_dict_ema", "model", "safetensors"])
def test_published_files_of_every_wrapping(run: Run, tmp_path: Path, digits: Path, wrapping: str) -> None:
    torch.manual_seed(1)
    weights = timm.create_model("vip_tiny", num_classes=10).state_dict()
    path = tmp_path / ("weights.safetensors" if wrapping == "safetensors" else "weights.pth")
    if wrapping == "safetensors":
        save_file(weights, path)
    elif wrapping == "bare":
        torch.save(weights, path)
    else:
        torch.save({"epoch": 309, wrapping: {f"module.{name}": value for name, value in weights.items()}}, path)
    run(
        "eval.py",
        f"checkpoint={path}",
        "model=vip_tiny",
        "data=digits",
        f"data.root={digits}",
        "data.workers=0",
        "ema=true",
    )
    assert figures(tmp_path)["images"] == 360


def test_what_does_not_fit_is_one_line(run: Run, tmp_path: Path, digits: Path, trained: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("vip_tiny", num_classes=12).state_dict(), path)
    data = ("data=digits", f"data.root={digits}")
    cases = {
        (f"checkpoint={path}",): "add model=vip_s7",
        (f"checkpoint={path}", "model=vip_tiny", *data): "head has 12 classes in the checkpoint and 10 here",
        (f"checkpoint={path}", "model=vip_s7", *data): "does not fit vip_s7 on digits: the weights are not those",
        ("checkpoint=runs/none",): "no such file or folder",
        (f"checkpoint={trained}", "model=vip_x"): "nearest: vip_",
        (): "checkpoint: must be given",
    }
    for arguments, expected in cases.items():
        refused = run("eval.py", *arguments, status=2)
        assert expected in refused.stderr
        assert refused.stderr.count("\n") == 1, refused.stderr
