"""scripts/predict.py: probabilities are eval.py's, cards hold what was said, maps name what the decision rests on."""

import csv
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import ExifTags, Image

from scripts.prediction.card import GLOW, overlay
from scripts.prediction.explain import Explainer, without_content
from scripts.prediction.images import Given, list_images, place_cards
from scripts.prediction.names import class_names
from scripts.prediction.network import Predictor
from scripts.prediction.work import predict
from tests.conftest import Run
from vip.config import EvalConfig, compose, parse
from vip.trained import open_trained

pytestmark = pytest.mark.e2e

SCRIPT = "scripts/predict.py"


def settings(*keys: str) -> EvalConfig:
    return parse(EvalConfig, compose("eval", list(keys)))


def predictor(run: EvalConfig) -> Predictor:
    return Predictor(open_trained(run), run.precision)


@pytest.fixture
def odd(tmp_path: Path, digits: Path) -> Path:
    """Four digits of each class, of every kind of file that people have: more than a slice, and the last one short."""
    root = tmp_path / "odd"
    (root / "val").mkdir(parents=True)
    (root / "train").symlink_to(digits / "train")
    for folder in (digits / "val").iterdir():
        (root / "val" / folder.name).mkdir()
        plain, grey, clear, turned = (
            root / "val" / folder.name / name for name in ("p.png", "g.png", "c.png", "t.jpg")
        )
        first, second, third, fourth = sorted(folder.iterdir())[:4]
        shutil.copy(first, plain)
        Image.open(second).convert("L").resize((40, 31)).save(grey)
        alpha = Image.linear_gradient("L").resize((32, 32))
        rgba = Image.open(third).convert("RGBA")
        rgba.putalpha(alpha)
        rgba.save(clear)
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        Image.open(fourth).convert("RGB").resize((64, 48)).save(turned, exif=exif)
    return root


def test_probabilities_are_those_of_the_evaluation(run: Run, tmp_path: Path, trained: Path, odd: Path) -> None:
    keys = (f"checkpoint={trained}", "data=folder", f"data.root={odd}", "data.exif=true", "ema=true")
    run("eval.py", *keys, "data.workers=0", f"out={tmp_path}")
    rows = {row["image"]: row for row in csv.DictReader((tmp_path / "predictions.csv").open())}
    network = predictor(settings(*keys))
    val = odd / "val"
    in_order = list_images([str(val)])
    backwards = [Given(image.path, image.path.relative_to(val)) for image in in_order[::-1]][:7]
    for images in (in_order, backwards):  # in the slices of the evaluation, and in others
        for prediction in network.predict(images, pytest.fail):
            row = rows[str(prediction.image.path.relative_to(val))]
            assert [row[f"top{place}"] for place in range(1, 6)] == [str(label) for label, _ in prediction.top]
            for place, (_, probability) in enumerate(prediction.top, start=1):
                assert probability == pytest.approx(
                    float(row[f"probability{place}"]), abs=1e-6
                )  # of which half is rounding
    assert len(rows) == len(in_order) == 40
    turned = next(network.predict([Given(val / "3/t.jpg", Path("t.jpg"))], pytest.fail))
    assert turned.picture.size == (48, 64)
    upright = next(predictor(settings(*keys, "data.exif=false")).predict([turned.image], pytest.fail))
    assert upright.picture.size == (64, 48)
    assert upright.top != turned.top


def test_every_image_gets_its_card_and_bad_ones_a_line(run: Run, tmp_path: Path, trained: Path, digits: Path) -> None:
    photos = tmp_path / "photos"
    (photos / "inner").mkdir(parents=True)
    for name in ("a.png", "a=1.png", "inner/a.png"):
        shutil.copy(next((digits / "val" / "7").iterdir()), photos / name)
    strange = photos / os.fsdecode(b"\xff\n.png")
    shutil.copy(photos / "a.png", strange)
    (photos / "inner" / "circle").symlink_to(photos)
    (photos / "broken.jpg").write_bytes(b"no image")
    (photos / "notes.txt").write_text("no image")
    keys = (f"checkpoint={trained}", f"data.root={digits}", f"out={photos}")
    before = (photos / "a.png").read_bytes()
    said = run(SCRIPT, *keys, "photos/a=1.png", "--explain", "photos")
    assert said.stderr == "warning: photos/broken.jpg is left out (not one of JPEG, PNG, WEBP, BMP, GIF, PPM, TIFF)\n"
    assert (
        said.stdout.index("photos/a=1.png")
        < said.stdout.index("photos/a.png")
        < said.stdout.index("photos/inner/a.png")
    )
    assert said.stdout.count(" %") == 20
    assert "█" in said.stdout
    assert "4 images, 1 left out" in said.stdout
    assert (photos / "a.png").read_bytes() == before, "an image is never overwritten"
    cards = [Image.open(photos / name) for name in ("a=1-2.png", "a-2.png", "inner/a-2.png", f"{strange.stem}-2.png")]
    assert {card.size for card in cards} == {cards[0].size}
    assert np.array_equal(*(np.asarray(card)[60:] [:420, :400] for card in cards[:2])), "the same picture"  # fmt: skip

    sheet = tmp_path / "sheets" / "all.png"
    run(SCRIPT, keys[0], f"data.root={digits}", f"out={sheet}", "photos/a.png", "photos/inner")
    assert Image.open(sheet).height >= 2 * Image.open(sheet).width / 3


def test_cards_of_the_same_name_get_numbers(tmp_path: Path) -> None:
    images = [
        Given(tmp_path / path, Path(path).relative_to(path[0])) for path in ("a/x.jpg", "b/x.jpg", "b/x.png", "c/y.png")
    ]
    places = place_cards(images, tmp_path / "c")
    assert [place.relative_to(tmp_path / "c").name for place in places.values()] == [
        "x.png",
        "x-2.png",
        "x-3.png",
        "y-2.png",
    ]


def test_classes_have_the_best_names_that_are_known(tmp_path: Path, trained: Path, digits: Path) -> None:
    def save(num_classes: int) -> str:
        path = tmp_path / f"{num_classes}.pth"
        torch.save(timm.create_model("vip_tiny", num_classes=num_classes).state_dict(), path)
        return f"checkpoint={path}"

    def names(*keys: str) -> tuple[str, ...]:
        run = settings(*keys)
        return class_names(run, open_trained(run))

    tens = tuple("0123456789")
    assert names(f"checkpoint={trained}") == tens, "the checkpoint knows them"
    assert names(save(10), "model=vip_tiny") == tuple(f"class {number}" for number in range(10))
    assert names(save(10), "model=vip_tiny", "data=digits", f"data.root={digits}") == tens
    imagenet = names(save(1000), "model=vip_tiny")
    assert imagenet[:2] == ("tench", "goldfish")
    assert "crane (n02012849)" in imagenet, "a bird"
    assert "crane (n03126707)" in imagenet, "a machine"
    assert len(set(imagenet)) == 1000
    with pytest.raises(ValueError, match=r"has 10 classes, .*12\.pth has 12"):
        names(save(12), "model=vip_tiny", "data=digits", f"data.root={digits}")


def test_the_map_names_the_pixels_that_the_decision_rests_on(trained: Path, digits: Path) -> None:
    """Without a tenth of the pixels the class loses more of its probability where the map chose them than where dice did."""
    network = predictor(settings(f"checkpoint={trained}"))
    explainer = Explainer(network.model)
    images = list_images([str(digits / "val")])[::24]
    dice = torch.Generator().manual_seed(0)
    left: dict[str, list[float]] = {"named": [], "others": []}
    for prediction in network.predict(images, pytest.fail):
        label, _ = prediction.top[0]
        empty = without_content(prediction.seen)
        named = explainer.map(prediction.seen, label).flatten()
        for what, order in (
            ("named", named.argsort(descending=True)),
            ("others", torch.randperm(1024, generator=dice)),
        ):
            mask = torch.zeros(1024)
            mask[order[:102]] = 1  # a tenth
            mask = mask.view(1, 1, 32, 32)
            with torch.inference_mode():
                logits = network.model(prediction.seen * (1 - mask) + empty * mask)
            left[what].append(logits.softmax(1)[0, label].item())
    assert np.mean(left["named"]) < 0.6 * np.mean(left["others"]), left


@pytest.mark.parametrize("name", ["vip_tiny", "resnet10t"])
def test_the_shares_add_up_to_the_logit(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval()
    for parameter in model.parameters():  # away from the start, where blocks of some networks are the identity
        parameter.data += 0.05 * torch.randn_like(parameter)
    image = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        difference = (model(image) - model(without_content(image)))[0]
    label = int(difference.abs().argmax())
    total = Explainer(model).shares(image, label).sum().item()
    assert total == pytest.approx(difference[label].item(), rel=0.05)


def test_the_map_lies_where_the_network_looked() -> None:
    shares = np.zeros((32, 32), np.float32)
    shares[:8, -8:] = 1  # top right
    shown = np.asarray(overlay(Image.new("RGB", (200, 100)), (50, 0, 150, 100), shares)).astype(int)
    glows = np.abs(shown - GLOW).sum(2) < 40
    rows, columns = np.nonzero(glows)
    assert glows[5:20, 130:145].all()
    assert (rows.max() < 30, columns.min() > 120, columns.max() < 150) == (True, True, True)
    assert shown[50, 25].min() > shown[50, 100].max(), "what it did not see is paler"
    thin = overlay(Image.new("RGB", (1, 400)), (0, 200, 0, 200), shares)
    assert thin.size == (1, 400)


def test_what_cannot_be_done_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, trained: Path, digits: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "captum.attr", None)  # as if it were not installed
    image = str(next((digits / "val/5").iterdir()))
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    torch.save(timm.create_model("vip_tiny", num_classes=10).state_dict(), "bare.pth")
    own = f"checkpoint={trained}"
    for keys, images, words in (
        ([own], ["none.jpg"], "none.jpg: no such file or folder"),
        ([own], ["empty"], "empty: no images in this folder"),
        ([own], [], "no images given"),
        ([], [image], "checkpoint: must be given"),
        ([f"chekpoint={trained}"], [image], "nearest: checkpoint"),
        (["checkpoint=runs/none"], [image], "no such file or folder"),
        (["checkpoint=bare.pth"], [image], "add model=vip_s7"),
        (["checkpoint=bare.pth", "model=vip_s7"], [image], "does not fit vip_s7: the weights are not those"),
        ([own, "out=all.png"], [str(digits / "val")], "64 images fit on a sheet, 360 were given"),
        ([own, "--explain"], [image], "captum is not installed"),
        ([own], ["bad.png"], "none of the 1 images could be decoded"),
    ):
        with pytest.raises(SystemExit) as ended:
            predict([key for key in keys if key != "--explain"], images, "--explain" in keys)
        assert ended.value.code == 2
        said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
        assert len(said) == 1, said
        assert words in said[0]
    assert not (tmp_path / "predictions").exists()
