"""From one image to uint8 pixels of the network's size: what worker processes do.

The operations are timm's and torchvision's, in the order of `timm.data.create_transform`; what is added is that a key
decides every draw. Normalising, filling the erased box and mixing wait for the device (`data.finish`): pixels travel as
bytes, a quarter of the size. H, W: height and width in pixels.
"""

import math
import random
from typing import NamedTuple

import numpy as np
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from torchvision import transforms

from data.config import AugmentConfig
from data.randomness import seed_generators

ERASE_AREA = (0.02, 1 / 3)  # share of the image; these and the next are timm's defaults, which the recipe kept
ERASE_LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))


class Pixels(NamedTuple):
    """One sample: uint8 pixels (H, W, 3) and the box to erase as (top, left, height, width), all 0 for none."""

    image: np.ndarray
    erase: tuple[int, int, int, int] = (0, 0, 0, 0)


class TrainTransform:
    """Random crop, flip, RandAugment (or three-augment), colour jitter, and where to erase.

    Args:
        config: what to do; parts that are off cost nothing.
        size: (H, W) of the result in pixels.
        mean: colour, 0 to 1 per channel, that fills what rotation, shear and translation leave empty.
    """

    def __init__(
        self,
        config: AugmentConfig,
        size: tuple[int, int],
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
    ) -> None:
        self.size = size
        self.erase_prob = config.erase_prob
        steps: list = [_crop(config, size)]
        if config.hflip:
            steps.append(transforms.RandomHorizontalFlip(config.hflip))
        options = {
            "translate_const": int(min(size) * 0.45),
            "img_mean": tuple(min(255, round(255 * channel)) for channel in mean),
        }
        if config.interpolation != "random":
            options["interpolation"] = str_to_pil_interp(config.interpolation)
        if config.rand_augment is not None:
            steps.append(rand_augment_transform(config.rand_augment, options))
        if config.three_augment:
            steps.append(auto_augment_transform("3a", options))
        if config.color_jitter:
            steps.append(transforms.ColorJitter(*(config.color_jitter,) * 3))
        self.image_transform = transforms.Compose(steps)

    def __call__(self, image: Image.Image, key: int) -> Pixels:
        """The sample that `key` stands for; leaves the three global generators seeded from it (see data.randomness)."""
        seed_generators(key)
        pixels = np.asarray(self.image_transform(image))
        return Pixels(pixels, draw_erase_box(self.erase_prob, self.size))


def _crop(config: AugmentConfig, size: tuple[int, int]) -> transforms.Compose | RandomResizedCropAndInterpolation:
    if config.scale is not None:
        return RandomResizedCropAndInterpolation(size, config.scale, config.ratio, config.interpolation)
    fixed = "bicubic" if config.interpolation == "random" else config.interpolation
    return _resize_and_crop(size, 1.0, fixed)


class EvalTransform:
    """Resize so that a centre crop of `size` covers `crop_pct` of the shorter side: timm's evaluation.

    Args:
        size: (H, W) of the result in pixels.
        crop_pct, interpolation, crop_mode: as in a timm network's pretrained_cfg.
    """

    def __init__(
        self, size: tuple[int, int], crop_pct: float, interpolation: str = "bicubic", crop_mode: str = "center"
    ) -> None:
        self.size = size
        self.image_transform = _resize_and_crop(size, crop_pct, interpolation, crop_mode)

    def __call__(self, image: Image.Image) -> Pixels:
        return Pixels(np.asarray(self.image_transform(image)))


def _resize_and_crop(
    size: tuple[int, int], crop_pct: float, interpolation: str, crop_mode: str = "center"
) -> transforms.Compose:
    steps = create_transform(
        size, interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode, use_prefetcher=True
    ).transforms
    return transforms.Compose(steps[:-1])  # all but the last, which turns the image into a tensor


def draw_erase_box(prob: float, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """One random box, from python's generator: timm's RandomErasing (arXiv 1708.04896) without the fill.

    Returns:
        (top, left, height, width) in pixels; all 0 with probability 1 - `prob` or if ten draws did not fit the image.
    """
    if random.random() >= prob:
        return 0, 0, 0, 0
    size_h, size_w = size
    for _ in range(10):
        area = random.uniform(*ERASE_AREA) * size_h * size_w
        aspect = math.exp(random.uniform(*ERASE_LOG_ASPECT))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < size_h and width < size_w:
            return random.randint(0, size_h - height), random.randint(0, size_w - width), height, width
    return 0, 0, 0, 0
