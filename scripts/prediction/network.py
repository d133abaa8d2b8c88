"""From files to predictions, by the road that validation images take: same decoder, resize, crop, slices and precision."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data import decoders
from data.augment import EvalTransform
from data.config import DataConfig
from data.decode import BadImageError
from data.finish import Normalize
from data.loader import EVAL_SLICE
from scripts.prediction.images import Encoded, Given
from vip.evaluate import TOP
from vip.models.build import input_spec
from vip.precision import Precision, PrecisionConfig
from vip.trained import Trained


@dataclass(frozen=True)
class Prediction:
    """What the network says of one image.

    `picture` is the image as decoded, `window` (left, top, right, bottom) the part of it that the network saw, in its
    pixels; `seen` float32 (1, 3, H, W) is that part as the network's input. `top` holds (class, probability), likeliest first.
    """

    image: Given
    picture: Image.Image
    window: tuple[float, float, float, float]
    seen: Tensor
    top: list[tuple[int, float]]


class Predictor:
    """A trained network on the GPU, or on the CPU where there is none."""

    def __init__(self, trained: Trained, precision: PrecisionConfig) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.precision = Precision(precision, self.device)
        self.model = trained.build(trained.num_classes).to(self.device).eval().requires_grad_(False)
        spec = input_spec(trained.model, self.model)
        self.transform = EvalTransform(spec.size, spec.crop_pct, spec.interpolation)
        self.normalize = Normalize(spec.mean, spec.std, self.device)
        data = trained.data or DataConfig()
        self.decoder = decoders.choose(data.decoder)
        self.exif = data.exif

    def predict(self, images: Sequence[Given], warn: Callable[[str], object]) -> Iterator[Prediction]:
        """In order; what cannot be read or decoded is left out, and `warn` hears why."""
        for first in range(0, len(images), EVAL_SLICE):
            encoded = Encoded(images[first : first + EVAL_SLICE], self.exif, warn)
            if not encoded:
                continue
            seen = self._load(encoded)
            with torch.inference_mode(), self.precision.autocast():
                logits = self.model(seen)
            probabilities = logits.double().softmax(1).cpu()
            for row, image in enumerate(encoded.images):
                try:
                    picture = encoded.load(row)
                except BadImageError as error:
                    warn(f"warning: {error.name} is left out ({error.reason})")
                    continue
                order = (
                    probabilities[row].argsort(descending=True, stable=True)[:TOP].tolist()
                )  # as vip.evaluate has it
                top = [(label, probabilities[row, label].item()) for label in order]
                yield Prediction(image, picture, self._window(picture), seen[row : row + 1], top)

    def _load(self, encoded: Encoded) -> Tensor:
        """The network's input, float32 (B, 3, H, W); rows of images that cannot be decoded hold anything."""
        rows = np.arange(len(encoded))
        pixels = np.zeros((len(rows), *self.transform.size, 3), np.uint8)
        self.decoder.load(encoded, rows, np.zeros(len(rows), np.int64), self.transform, pixels)
        return self.normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.device))

    def _window(self, picture: Image.Image) -> tuple[float, float, float, float]:
        plan = self.transform.plan(np.zeros(1, np.int64), np.array([picture.height]), np.array([picture.width]))[0][0]
        x, y = picture.width / int(plan["resized_width"]), picture.height / int(plan["resized_height"])
        left, top = int(plan["window_left"]), int(plan["window_top"])
        height, width = self.transform.size
        return left * x, top * y, (left + width) * x, (top + height) * y
