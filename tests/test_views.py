"""What a run shows beside its numbers: pictures, tables and gate weights, each against arithmetic by hand."""

import base64
import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vip  # noqa: F401 - registers vip_tiny
from data.decode import BadImageError
from data.finish import Normalize
from data.sources import SyntheticSource
from tests.test_evaluate import ALONE
from vip import environment
from vip.evaluate import Evaluation
from vip.gates import GateMeans, means
from vip.tracking.jsonl import read_lines
from vip.views import NUM_ERRORS, Views, picture, start

NUM_IMAGES, NUM_CLASSES = 200, 7


def decoded(uri: str) -> Image.Image:
    assert uri.startswith("data:image/jpeg;base64,")
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_gates_are_the_mean_softmax_of_every_block_over_all_images() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vip_tiny", num_classes=10).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    images = torch.randn(12, 3, 32, 32)
    logits: dict[str, list[torch.Tensor]] = {}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: logits.setdefault(name, []).append(out))
        for name, module in model.named_modules()
        if name.endswith(".reweight")
    ]
    with torch.inference_mode(), GateMeans(model, ALONE) as watched:
        for part in images.split([5, 5, 2]):
            model(part)
    for hook in hooks:
        hook.remove()
    gates = watched.result()
    assert list(gates) == [name.removesuffix(".attn.reweight") for name in logits]
    for name, row in gates.items():
        out = torch.cat(logits[f"{name}.attn.reweight"])
        expected = out.view(12, -1, 3).softmax(2).mean((0, 1))
        assert torch.allclose(torch.tensor(row), expected, atol=1e-6)
        assert abs(max(row) - 1 / 3) > 1e-3, "weights that differ"
    averages = means(gates)
    assert averages["gate/width"] == pytest.approx(np.mean([row[1] for row in gates.values()]))
    assert sum(averages.values()) == pytest.approx(1)
    with torch.inference_mode():
        model(images)
    assert watched.result() == gates, "nothing is watched any more"


@pytest.mark.parametrize("name", ["resnet10t", "vip_tiny"])
def test_networks_without_gates_have_none(name: str) -> None:
    options = {"mixer": "plain"} if name == "vip_tiny" else {}
    model = timm.create_model(name, num_classes=10, **options)
    with GateMeans(model, ALONE) as watched, torch.inference_mode():
        model.eval()(torch.randn(2, 3, 32, 32))
    assert watched.result() == {}
    assert means({}) == {}


class Photographs(SyntheticSource):
    """Whose third image cannot be decoded."""

    def load(self, index: int) -> Image.Image:
        if index == 3:
            raise BadImageError(self.name(3), "truncated")
        return super().load(index)


@pytest.fixture
def views() -> Views:
    return Views(
        Photographs(NUM_IMAGES, NUM_CLASSES, "train"), Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), ALONE.device)
    )


def evaluation(labels: np.ndarray) -> Evaluation:
    """Random predictions, of which about half are right; image 3 is the most confident error."""
    generator = np.random.default_rng(1)
    top = np.argsort(generator.random((NUM_IMAGES, NUM_CLASSES)), axis=1)[:, :5]
    right = generator.random(NUM_IMAGES) < 0.5
    top[right, 0] = labels[right]
    top[3, 0] = (labels[3] + 1) % NUM_CLASSES
    probabilities = np.sort(generator.random((NUM_IMAGES, 5)), axis=1)[:, ::-1].copy()
    probabilities[3, 0] = 1.0
    return Evaluation(NUM_IMAGES, 1.0, 50.0, 90.0, torch.from_numpy(top), torch.from_numpy(probabilities))


def test_a_validation_in_tables_is_what_counting_gives(views: Views) -> None:
    labels = views.images.labels
    result = evaluation(labels)
    view = views.validation(result, {"network.0.0": (0.2, 0.3, 0.5)}, "ema")
    assert json.loads(json.dumps(view)) == view, "plain values"
    predicted, confidence = result.top_classes[:, 0].numpy(), result.top_probabilities[:, 0].numpy()
    right = predicted == labels
    assert view["per_class"] == [[int((labels == k).sum()), int(right[labels == k].sum())] for k in range(NUM_CLASSES)]
    names = views.images.class_names
    pairs = Counter(
        (names[label], names[other]) for label, other in zip(labels, predicted, strict=True) if label != other
    )
    assert [num for *_, num in view["confusions"]] == sorted(pairs.values(), reverse=True)[: len(view["confusions"])]
    assert all(pairs[label, other] == num for label, other, num in view["confusions"])
    error = 0.0
    for i, (num, mean, share) in enumerate(view["calibration"]):
        inside = np.minimum((confidence * 15).astype(int), 14) == i
        assert num == inside.sum()
        if num:
            assert mean == pytest.approx(confidence[inside].mean(), abs=1e-5)
            assert share == pytest.approx(right[inside].mean(), abs=1e-5)
            error += num / NUM_IMAGES * abs(confidence[inside].mean() - right[inside].mean())
    assert view["calibration_error"] == pytest.approx(error, abs=1e-4)
    assert view["gates"] == [["network.0.0", 0.2, 0.3, 0.5]]
    assert (view["weights"], view["num_images"]) == ("ema", NUM_IMAGES)


def test_the_most_confident_errors_come_first_with_their_pictures(views: Views) -> None:
    labels = views.images.labels
    result = evaluation(labels)
    errors = views.validation(result, {}, "raw")["errors"]
    assert len(errors) == NUM_ERRORS
    wrong = np.flatnonzero(result.top_classes[:, 0].numpy() != labels)
    order = wrong[np.argsort(-result.top_probabilities[wrong, 0].numpy(), kind="stable")]
    assert [error["image"] for error in errors] == [views.images.name(int(i)) for i in order[:NUM_ERRORS]]
    assert errors[0]["picture"] is None, "its file has become unreadable meanwhile"
    assert max(decoded(errors[1]["picture"]).size) == 112
    assert all(error["label"] != error["top"][0][0] for error in errors)
    assert [len(error["top"]) for error in errors] == [5] * NUM_ERRORS


def test_samples_show_what_the_network_sees_and_how_labels_are_mixed(views: Views) -> None:
    original = torch.full((3, 3, 40, 40), 64.0)
    original[1] = torch.arange(3.0).view(3, 1, 1) * 100
    targets = torch.tensor([[0.7, 0.3, 0, 0, 0, 0, 0], [0, 0, 1.0, 0, 0, 0, 0], [0.5, 0, 0, 0, 0, 0.5, 0]])
    smoothed = targets * 0.9 + 0.1 / NUM_CLASSES
    normalised = (original - views.normalize.mean) / views.normalize.std
    view: Any = views.samples(normalised, smoothed)
    assert view["view"] == "samples"
    names = views.images.class_names
    assert [sample["labels"] for sample in view["images"]] == [
        [[names[0], 0.7], [names[1], 0.3]],
        [[names[2], 1.0]],
        [[names[0], 0.5], [names[5], 0.5]],
    ]
    pixels = np.asarray(decoded(view["images"][1]["picture"])).astype(float)
    assert pixels.shape == (160, 160, 3)
    assert np.abs(pixels - [0, 100, 200]).max() < 8, "as before normalising, but for JPEG"
    assert len(views.samples(torch.zeros(40, 3, 8, 8), torch.eye(7)[torch.zeros(40, dtype=torch.long)])["images"]) == 16


@pytest.mark.parametrize(("size", "shown"), [((500, 250), (160, 80)), ((32, 32), (160, 160)), ((8, 30), (40, 150))])
def test_pictures_have_one_size_whatever_the_images(size: tuple[int, int], shown: tuple[int, int]) -> None:
    assert decoded(picture(Image.new("RGB", size), 160)).size == shown


def git(folder: Path, *arguments: str) -> None:
    author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", *author, *arguments], cwd=folder, check=True, capture_output=True)


def test_the_state_of_the_code_is_written_down_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["/x/train.py", "seed=1", "data.root=s3://me:hunter2@host/x"])
    assert "commit" not in environment.describe(torch.device("cpu")), "not under git"
    diff = tmp_path / "out.diff"
    (tmp_path / "code.py").write_text("a = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-qm", "one")
    environment.write_diff(diff)
    facts = environment.describe(torch.device("cpu"))
    assert facts["changed"] == "nothing"
    assert not diff.exists()
    assert "hunter2" not in facts["command"]
    assert facts["command"].startswith("train.py seed=1 ")
    (tmp_path / "code.py").write_text("a = 'hf_abcdefghijklmnopqrstuvwxyz'\n")
    environment.write_diff(diff)
    facts = environment.describe(torch.device("cpu"))
    assert facts["changed"] == "1 file"
    assert "-a = 1" in diff.read_text()
    assert "hf_abc" not in diff.read_text()
    assert len(facts["commit"]) == 12
    git(tmp_path, "checkout", "code.py")
    environment.write_diff(diff)
    assert not diff.exists(), "of an earlier start"


def test_a_run_leaves_its_start_its_samples_and_every_validation(trained: Path) -> None:
    lines = read_lines(trained / "views.jsonl")
    steps = read_lines(trained / "metrics.jsonl")
    validated = [line["step"] for line in steps if "val/top1" in line]
    assert [(line["view"], line["step"]) for line in lines] == [
        ("start", 0), ("samples", 0), *(("validation", step) for step in validated)
    ]  # fmt: skip
    begun, last = lines[0], lines[-1]
    assert begun["world_size"] == 2
    assert begun["classes"] == [str(digit) for digit in range(10)]
    assert begun["total_steps"] == steps[-1]["step"]
    assert last["weights"] == "ema"
    right, images = sum(row[1] for row in last["per_class"]), sum(row[0] for row in last["per_class"])
    assert 100 * right / images == pytest.approx(steps[-1]["val_ema/top1"]), "the averaged weights decide"
    assert [name for name, *_ in last["gates"]][:2] == ["network.0.0", "network.0.1"]
    assert steps[-1]["gate/height"] == pytest.approx(np.mean([row[1] for row in last["gates"]]), abs=1e-4)


def test_a_start_has_its_time() -> None:
    view = start(world_size=2)
    assert view["view"] == "start"
    assert view["time"].endswith("+00:00")
    assert view["world_size"] == 2
