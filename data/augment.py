"""What happens to an image on its way to the network's size, drawn before any pixel is touched.

A transform turns keys and image sizes into samples (`data.ops.SAMPLE`): the box to cut out, the size to give it, whether to
mirror it, which operations follow with which arguments. Every draw is a function of the sample's key alone, made for a whole
chunk at once; a decoder (`data.decoders`) then only does as it is told, so all of them sample alike. Distributions are those of
timm's `create_transform`. Normalising, filling the erased box and mixing wait for the device (`data.finish`). B samples, H, W
height and width in pixels.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image

from data import ops
from data.config import AugmentConfig
from data.randomness import uniforms

IMAGENET_MEAN = (0.485, 0.456, 0.406)
ATTEMPTS = 10  # at a crop that fits, and at an erased box
ERASE_AREA = (0.02, 1 / 3)  # share of the image; these and the next are timm's defaults, which the recipe kept
ERASE_LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC,
           "lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST, "box": Image.Resampling.BOX,
           "hamming": Image.Resampling.HAMMING}  # fmt: skip
CROP_DRAWS = 2 * ATTEMPTS + 2
ERASE_DRAWS = 2 * ATTEMPTS + 3


class TrainTransform:
    """Random crop, flip, RandAugment (or three-augment), colour jitter, and where to erase.

    Args:
        config: what to do; parts that are off cost nothing.
        size: (H, W) of the result in pixels.
        mean: colour, 0 to 1 per channel, that fills what rotation, shear and translation leave empty.
    """

    def __init__(
        self, config: AugmentConfig, size: tuple[int, int], mean: tuple[float, float, float] = IMAGENET_MEAN
    ) -> None:
        self.config = config
        self.size = size
        self.fill = [min(255, round(255 * channel)) for channel in mean]
        self.steps: list[
            tuple[int, Callable[[np.ndarray], np.ndarray]]
        ] = []  # how many draws, and what becomes of them
        num_ops = 3 * bool(config.color_jitter)
        if config.rand_augment is not None:
            rand_augment = ops.RandAugment(config.rand_augment, size, config.interpolation)
            num_ops += rand_augment.num_layers
            self.steps.append((rand_augment.num_layers * ops.DRAWS_PER_OP, rand_augment.draw))
        if config.three_augment:
            self.steps.append((ops.THREE_AUGMENT_DRAWS, ops.three_augment))
        if config.color_jitter:
            self.steps.append((ops.COLOR_JITTER_DRAWS, partial(ops.color_jitter, config.color_jitter)))
        if num_ops > ops.MAX_OPS:
            raise ValueError(
                f"rand_augment={config.rand_augment!r} and color_jitter={config.color_jitter} are {num_ops} operations, "
                f"{ops.MAX_OPS} is the most: leave one of them out"
            )

    def plan(self, keys: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Samples (B,) and boxes to erase, int64 (B, 4), from sample keys and image sizes, each (B,)."""
        counts = [CROP_DRAWS, 1, 1, ERASE_DRAWS, *(num_draws for num_draws, _ in self.steps)]
        draws = uniforms(keys, sum(counts))
        crop, filter_draw, flip, erase, *rest = np.split(draws, np.cumsum(counts)[:-1], axis=1)
        config = self.config
        if config.scale is None:
            fixed = "bicubic" if config.interpolation == "random" else config.interpolation
            samples, _ = EvalTransform(self.size, 1.0, fixed).plan(keys, heights, widths)
        else:
            samples = np.zeros(len(keys), ops.SAMPLE)
            boxes = random_crops(crop, heights, widths, config.scale, config.ratio)
            samples["top"], samples["left"], samples["height"], samples["width"] = boxes
            samples["resized_height"], samples["resized_width"] = self.size
            samples["filter"] = (
                np.where(filter_draw[:, 0] < 0.5, FILTERS["bilinear"], FILTERS["bicubic"])
                if config.interpolation == "random"
                else FILTERS[config.interpolation]
            )
        samples["flip"] = flip[:, 0] < config.hflip
        samples["fill"][:, :3] = self.fill
        first = 0
        for (_, draw), step_draws in zip(self.steps, rest, strict=True):
            drawn = draw(np.ascontiguousarray(step_draws))
            samples["ops"][:, first : first + drawn.shape[1]] = drawn
            first += drawn.shape[1]
        samples["num_ops"] = first
        return samples, erase_boxes(erase, config.erase_prob, self.size)


class EvalTransform:
    """Resize so that a centre crop of `size` covers `crop_pct` of the shorter side: timm's evaluation.

    Args:
        size: (H, W) of the result in pixels.
        crop_pct, interpolation: as in a timm network's pretrained_cfg.
    """

    def __init__(self, size: tuple[int, int], crop_pct: float, interpolation: str = "bicubic") -> None:
        self.size = size
        self.filter = FILTERS[interpolation]
        self.scaled = [math.floor(side / crop_pct) for side in size]

    def plan(self, keys: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `TrainTransform.plan`; nothing is drawn or erased."""
        size_h, size_w = self.size
        scaled_h, scaled_w = self.scaled
        if scaled_h == scaled_w:  # torchvision rounds the longer side down, timm's own class to the nearest
            shorter = np.minimum(heights, widths)
            resized_h, resized_w = scaled_h * heights // shorter, scaled_h * widths // shorter
        else:
            ratio = np.minimum(heights / scaled_h, widths / scaled_w)
            resized_h, resized_w = np.rint(heights / ratio), np.rint(widths / ratio)
        samples = np.zeros(len(heights), ops.SAMPLE)
        samples["height"], samples["width"] = heights, widths
        samples["resized_height"], samples["resized_width"] = resized_h, resized_w
        samples["window_top"] = np.rint((resized_h - size_h) / 2)
        samples["window_left"] = np.rint((resized_w - size_w) / 2)
        samples["filter"] = self.filter
        return samples, np.zeros((len(heights), 4), np.int64)


Transform = TrainTransform | EvalTransform


def random_crops(
    draws: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tops, lefts, heights and widths, int64 (B,) each: RandomResizedCrop's (arXiv 1409.4842).

    The first of ATTEMPTS draws of area and aspect ratio that fits the image; if none does, the largest central box whose
    ratio is allowed. draws: float64 (B, CROP_DRAWS).
    """
    areas, aspects, place = np.split(draws, [ATTEMPTS, 2 * ATTEMPTS], axis=1)
    area = (scale[0] + (scale[1] - scale[0]) * areas) * (heights * widths)[:, None]
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(log_low + (log_high - log_low) * aspects)
    tried_h = np.maximum(np.rint(np.sqrt(area / aspect)), 1)
    tried_w = np.maximum(np.rint(np.sqrt(area * aspect)), 1)
    fits = (tried_h <= heights[:, None]) & (tried_w <= widths[:, None])
    rows, first, found = np.arange(len(draws)), fits.argmax(1), fits.any(1)
    central_h = np.where(widths / heights < ratio[0], np.rint(widths / ratio[0]), heights)
    central_w = np.where(widths / heights > ratio[1], np.rint(heights * ratio[1]), widths)
    crop_h = np.where(found, tried_h[rows, first], np.clip(central_h, 1, heights)).astype(np.int64)
    crop_w = np.where(found, tried_w[rows, first], np.clip(central_w, 1, widths)).astype(np.int64)
    free_h, free_w = heights - crop_h, widths - crop_w
    top = np.where(found, np.floor(place[:, 0] * (free_h + 1)), free_h // 2).astype(np.int64)
    left = np.where(found, np.floor(place[:, 1] * (free_w + 1)), free_w // 2).astype(np.int64)
    return top, left, crop_h, crop_w


def erase_boxes(draws: np.ndarray, prob: float, size: tuple[int, int]) -> np.ndarray:
    """One box per sample as (top, left, height, width) in pixels, int64 (B, 4): RandomErasing (arXiv 1708.04896), timm's.

    All 0 with probability 1 - `prob`, or if none of ATTEMPTS draws fitted. draws: float64 (B, ERASE_DRAWS).
    """
    size_h, size_w = size
    wanted, areas, aspects, place = np.split(draws, [1, 1 + ATTEMPTS, 1 + 2 * ATTEMPTS], axis=1)
    area = (ERASE_AREA[0] + (ERASE_AREA[1] - ERASE_AREA[0]) * areas) * size_h * size_w
    aspect = np.exp(ERASE_LOG_ASPECT[0] + (ERASE_LOG_ASPECT[1] - ERASE_LOG_ASPECT[0]) * aspects)
    heights, widths = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (heights < size_h) & (widths < size_w) & (heights > 0) & (widths > 0)
    rows, first = np.arange(len(draws)), fits.argmax(1)
    height, width = heights[rows, first], widths[rows, first]
    top = np.floor(place[:, 0] * (size_h - height + 1))
    left = np.floor(place[:, 1] * (size_w - width + 1))
    boxes = np.stack([top, left, height, width], axis=1).astype(np.int64)
    return np.where((fits.any(1) & (wanted[:, 0] < prob))[:, None], boxes, 0)
