"""What there is to see of a run beside its numbers, as plain values for views.jsonl and the trackers.

    start        when, where, with what code and what data a process began or went on (`start`)
    samples      augmented images with their mixed labels, as the network sees them (`Views.samples`)
    validation   classes, confusions, calibration, confident errors, gate weights (`Views.validation`)

B images, K classes, N validation images. Pictures are JPEGs within their JSON, so that a file of lines is all there is.
"""

import base64
import io
from collections import Counter
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.decode import BadImageError, ImageReadError
from data.finish import Normalize
from data.sources import Source
from vip.evaluate import Evaluation
from vip.gates import Gates
from vip.tracking import View

NUM_SAMPLES = 16
NUM_ERRORS = 12
NUM_CONFUSIONS = 30
NUM_BINS = 15
SAMPLE_PIXELS, ERROR_PIXELS = 160, 112  # longer side of a picture
LEAST_SHARE = 0.01  # of a label, to be named


def start(**facts: Any) -> View:
    """A process begins here, now: `facts` about it."""
    return {"view": "start", "time": datetime.now(UTC).isoformat(timespec="seconds"), **facts}


class Views:
    """Pictures and tables of one run, from its validation images and what undoes their normalisation."""

    def __init__(self, images: Source, normalize: Normalize) -> None:
        self.images = images
        self.labels = torch.from_numpy(np.asarray(images.labels, dtype=np.int64))
        self.normalize = normalize

    def samples(self, images: Tensor, targets: Tensor) -> View:
        """The first images of a batch: (B, 3, H, W) as the network sees them, soft targets (B, K)."""
        pixels = self.normalize.invert(images[:NUM_SAMPLES].float()).permute(0, 2, 3, 1).cpu().numpy()
        rows = targets[:NUM_SAMPLES].float().cpu()
        # What label smoothing gives to every class says nothing of this image.
        shares = (rows - rows.amin(1, keepdim=True)) / (1 - rows.shape[1] * rows.amin(1, keepdim=True)).clamp(min=1e-6)
        return {
            "view": "samples",
            "images": [
                {"picture": picture(Image.fromarray(image), SAMPLE_PIXELS), "labels": self._named(row)}
                for image, row in zip(pixels, shares, strict=True)
            ],
        }

    def validation(self, result: Evaluation, gates: Gates, weights: str) -> View:
        """What an evaluation of the `weights` ("raw" or "ema") found, beside its figures."""
        labels, predicted = self.labels, result.top_classes[:, 0]
        right, confidence = predicted == labels, result.top_probabilities[:, 0]
        num_classes = len(self.images.class_names)
        per_class = torch.stack([labels.bincount(minlength=num_classes), labels[right].bincount(minlength=num_classes)])
        bins = _calibration(confidence, right)
        return {
            "view": "validation",
            "weights": weights,
            "num_images": result.num_images,
            "per_class": per_class.T.tolist(),
            "confusions": self._confusions(labels[~right], predicted[~right]),
            "calibration": bins,
            "calibration_error": sum(num * abs(mean - share) for num, mean, share in bins) / result.num_images,
            "errors": [self._error(result, i) for i in _first(confidence, ~right)],
            "gates": [[name, *(round(value, 4) for value in row)] for name, row in gates.items()],
        }

    def _named(self, shares: Tensor) -> list[list[Any]]:
        values, classes = shares.sort(descending=True, stable=True)
        names = self.images.class_names
        found = zip(values[:2].tolist(), classes[:2].tolist(), strict=True)
        return [[names[k], round(value, 3)] for value, k in found if value >= LEAST_SHARE]

    def _confusions(self, labels: Tensor, predicted: Tensor) -> list[list[Any]]:
        names = self.images.class_names
        # Classes decide between equal counts: the list must not depend on the order of the images.
        pairs = sorted(
            Counter(zip(labels.tolist(), predicted.tolist(), strict=True)).items(), key=lambda pair: (-pair[1], pair[0])
        )
        return [[names[label], names[other], num] for (label, other), num in pairs[:NUM_CONFUSIONS]]

    def _error(self, result: Evaluation, i: int) -> dict[str, Any]:
        names = self.images.class_names
        top = zip(result.top_classes[i].tolist(), result.top_probabilities[i].tolist(), strict=True)
        try:
            shown = picture(self.images.load(i), ERROR_PIXELS)
        except (BadImageError, ImageReadError):  # it was readable a moment ago; a picture is no reason to stop
            shown = None
        return {
            "image": self.images.name(i),
            "picture": shown,
            "label": names[int(self.labels[i])],
            "top": [[names[k], round(value, 4)] for k, value in top if k >= 0],
        }


def picture(image: Image.Image, longer_side: int) -> str:
    """A small JPEG as a data URI; what is smaller than half of `longer_side` is enlarged without smoothing."""
    factor = longer_side // max(image.size)
    if factor >= 2:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((longer_side, longer_side))
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _calibration(confidence: Tensor, right: Tensor) -> list[list[float]]:
    """For each bin of confidence: images, mean confidence, share that is right."""
    place = (confidence * NUM_BINS).long().clamp(0, NUM_BINS - 1)
    num, confident, correct = (
        place.bincount(weights=values.double(), minlength=NUM_BINS)
        for values in (torch.ones_like(confidence), confidence, right)
    )
    least = num.clamp(min=1)
    rows = torch.stack([num, (confident / least), (correct / least)]).T.tolist()
    return [[int(count), round(mean, 5), round(share, 5)] for count, mean, share in rows]


def _first(confidence: Tensor, chosen: Tensor) -> list[int]:
    """The most confident of the `chosen` images."""
    order = confidence.argsort(descending=True, stable=True)
    return order[chosen[order]][:NUM_ERRORS].tolist()
