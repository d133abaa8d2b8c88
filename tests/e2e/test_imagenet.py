"""The published recipe on a tree of ImageNet's shape: 1,000 classes, however small the images."""

from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import Run

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training images and one validation image in each of 1,000 classes, all links to three files."""
    root = tmp_path_factory.mktemp("imagenet")
    for i, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (60, 50), colour).save(root / f"{i}.jpeg", quality=90)
    for label in range(1000):
        for split, count in (("train", 2), ("val", 1)):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for image in range(count):
                (folder / f"{label}_{image}.JPEG").symlink_to(root / f"{(label + image) % 3}.jpeg")
    return root


def test_a_bare_model_is_the_recipe_and_departures_are_named(
    run: Run, tmp_path: Path, imagenet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ("model=vip_s7", "model.img_size=28", "batch_size=64", "micro_batch=32", "max_steps=2", "precision=bf16")
    said = run("train.py", *small, f"data.root={imagenet}", "data.workers=1", "log_every=1").stdout
    assert "imagenet: 2,000 training and 1,000 validation images, 1000 classes" in said
    departures = {line.partition(": ")[2] for line in said.splitlines() if line.startswith("departs")}
    assert departures == {
        "model.img_size: null -> 28", "batch_size: 2048 -> 64", "max_steps: null -> 2", "precision.name: fp16 -> bf16",
    }  # fmt: skip
    assert "lr 1.0e-06" in said, "the first epoch trains at the warm-up's first rate"

    monkeypatch.setenv("IMAGENET_DIR", str(imagenet))
    said = run("eval.py", "checkpoint=runs/vip_s7", "precision=bf16").stdout
    assert "vip_s7 on imagenet" in said


def test_a_tree_that_is_not_imagenet_is_refused(run: Run, digits: Path) -> None:
    refused = run("train.py", f"data.root={digits}", status=2)
    assert "needs 1000 class folders" in refused.stderr
    assert "data=folder" in refused.stderr
