"""Evaluation against scikit-learn, on the cases that go wrong: ties, NaN, few classes, short batches."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, top_k_accuracy_score
from torch import Tensor, nn

from data.batch import Batch
from data.loader import EVAL_SLICE, eval_requests
from vip.distributed import World
from vip.evaluate import Evaluation, evaluate
from vip.precision import Precision, PrecisionConfig

ALONE = World(0, 1, torch.device("cpu"))
FP32 = Precision(PrecisionConfig("fp32"), ALONE.device)


class Lookup(nn.Module):
    """Gives the image whose first two pixels spell i the i-th row of `logits`; notes the mode it ran in."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.modes: set[bool] = set()

    def forward(self, images: Tensor) -> Tensor:
        self.modes.add(self.training)
        return self.logits[(images[:, 0, 0, 0] + 256 * images[:, 0, 0, 1]).long()]


def images_of(num_images: int) -> Tensor:
    """uint8 (N, 3, 2, 2): noise, but for the first two pixels."""
    images = torch.randint(256, (num_images, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    index = torch.arange(num_images)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = (index % 256).to(torch.uint8), (index // 256).to(torch.uint8)
    return images


def batches(images: Tensor, labels: Tensor, batch_size: int) -> Iterator[Batch]:
    for request in eval_requests(len(images), batch_size):
        indices = torch.from_numpy(request)
        unused = torch.zeros(len(indices), 4, dtype=torch.int64)
        yield Batch(images[indices], labels[indices], indices, unused, unused[:, 0])


def judged(logits: Tensor, labels: Tensor, batch_size: int = 64) -> Evaluation:
    num_images = len(labels)
    given = batches(images_of(num_images), labels, batch_size)
    return evaluate(Lookup(logits), given, num_images, lambda images: images.float(), FP32, ALONE)


@pytest.mark.parametrize("num_classes", [6, 10, 1000])
def test_figures_are_scikit_learn_s(num_classes: int) -> None:
    torch.manual_seed(num_classes)
    labels = torch.randint(num_classes, (301,))
    logits = torch.randn(301, num_classes, dtype=torch.float64) * 2
    logits[torch.arange(301), labels] += 3
    result = judged(logits, labels)
    classes = np.arange(num_classes)
    assert result.num_images == 301
    assert result.top1 == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=1, labels=classes), rel=1e-12)
    assert result.top5 == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=5, labels=classes), rel=1e-12)
    assert result.loss == pytest.approx(log_loss(labels, logits.softmax(dim=1), labels=classes), rel=1e-9)
    assert result.metrics() == {"loss": result.loss, "top1": result.top1, "top5": result.top5}
    probabilities, top_classes = logits.softmax(dim=1).topk(5)
    assert torch.equal(result.top_classes, top_classes)
    assert torch.allclose(result.top_probabilities, probabilities, rtol=1e-12)


def test_ties_fall_to_the_lower_class() -> None:
    result = judged(torch.zeros(8, 8), torch.arange(8))
    assert (result.top1, result.top5) == (100 / 8, 100 * 5 / 8)
    assert result.top_classes.tolist() == [[0, 1, 2, 3, 4]] * 8


def test_nan_logits_are_wrong_and_leave_the_others_alone() -> None:
    logits = torch.eye(8) * 9
    logits[2] = torch.nan
    logits[5, 0] = torch.nan
    result = judged(logits, torch.arange(8))
    assert (result.top1, result.top5) == (75.0, 75.0)
    assert np.isnan(result.loss)


@pytest.mark.parametrize("num_classes", [1, 2, 4])
def test_fewer_classes_than_five(num_classes: int) -> None:
    labels = torch.arange(12) % num_classes
    result = judged(torch.arange(float(num_classes)).expand(12, num_classes), labels)
    assert (result.top1, result.top5) == (pytest.approx(100 / num_classes), 100.0)
    assert result.top_classes.shape == (12, 5)
    assert result.top_classes[0].tolist() == [*reversed(range(num_classes)), *[-1] * (5 - num_classes)]
    assert result.top_probabilities[0, num_classes:].tolist() == [0.0] * (5 - num_classes)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_batch_size_changes_no_bit(precision: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 2), nn.Flatten(), nn.Linear(8, 7))
    images, labels = images_of(77), torch.arange(77) % 7
    at_work = Precision(PrecisionConfig(precision), ALONE.device)  # type: ignore[arg-type]
    results = [
        evaluate(model, batches(images, labels, size), 77, lambda x: x / 255, at_work, ALONE)
        for size in (1, 8, 30, 500)
    ]
    for result in results[1:]:
        assert result.metrics() == results[0].metrics()
        assert torch.equal(result.top_classes, results[0].top_classes)
        assert torch.equal(result.top_probabilities, results[0].top_probabilities)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_runs_in_evaluation_mode_and_is_left_as_it_was(training: bool) -> None:
    model = Lookup(torch.eye(8)).train(training)
    evaluate(model, batches(images_of(8), torch.arange(8), 8), 8, lambda images: images.float(), FP32, ALONE)
    assert model.modes == {False}
    assert model.training == training


def test_an_image_too_few_or_twice_is_an_error() -> None:
    num_images = 2 * EVAL_SLICE
    given = list(batches(images_of(num_images), torch.zeros(num_images, dtype=torch.int64), EVAL_SLICE))
    assert len(given) == 2
    for wrong in (given[:1], [given[0], given[0]]):
        with pytest.raises(RuntimeError, match=f"of {num_images}, or some of them twice"):
            evaluate(Lookup(torch.zeros(num_images, 8)), wrong, num_images, lambda x: x.float(), FP32, ALONE)
