"""Augmentation as a function of the key, equal to timm's own pipelines under the same seeds."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing

from data.augment import EvalTransform, TrainTransform, draw_erase_box
from data.config import AugmentConfig
from data.randomness import preserved_generators, sample_key, seed_generators

NONE = AugmentConfig.none()


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """Smooth colours with an edge, so that every operation shows."""
    y, x = np.mgrid[0:90, 0:120]
    pixels = np.stack([x * 2, y * 2, (x > 60) * 200 + y // 2], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (AugmentConfig(), {"auto_augment": "rand-m9-mstd0.5-inc1", "interpolation": "random"}),
        (
            AugmentConfig(interpolation="bicubic", rand_augment="rand-m5-n3-inc1", hflip=0.0),
            {"auto_augment": "rand-m5-n3-inc1", "interpolation": "bicubic", "hflip": 0.0},
        ),
        (
            AugmentConfig(rand_augment=None, three_augment=True, color_jitter=0.3, scale=(0.5, 1.0)),
            {"auto_augment": "3a", "interpolation": "random", "color_jitter": 0.3, "scale": (0.5, 1.0)},
        ),
        (
            AugmentConfig(rand_augment=None, color_jitter=0.4),
            {"interpolation": "random", "color_jitter": 0.4},
        ),
    ],
    ids=["published", "bicubic", "three-augment", "jitter"],
)
def test_equals_timm(photo: Image.Image, config: AugmentConfig, options: dict[str, Any]) -> None:
    ours = TrainTransform(config, (48, 64))
    timm = create_transform((48, 64), is_training=True, use_prefetcher=True, **options)
    with preserved_generators():
        for index in range(25):
            key = sample_key(0, 0, index)
            seed_generators(key)
            expected = timm(photo).permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(ours(photo, key).image, expected)


def test_same_key_same_pixels_other_key_other_pixels(photo: Image.Image) -> None:
    transform = TrainTransform(AugmentConfig(), (32, 32))
    with preserved_generators():
        keys = [
            sample_key(0, 0, 5),
            sample_key(0, 1, 5),
            sample_key(1, 0, 5),
            sample_key(0, 0, 6),
            sample_key(0, 0, 5, 1),
        ]
        first = [transform(photo, key).image.tobytes() for key in keys]
        again = [transform(photo, key).image.tobytes() for key in reversed(keys)]
    assert first == again[::-1]
    assert len(set(first)) == len(keys)


@pytest.mark.parametrize(
    "change",
    [{"rand_augment": "rand-m9-mstd0.5-inc1"}, {"three_augment": True}, {"color_jitter": 0.4}, {"hflip": 0.7}],
    ids=lambda change: next(iter(change)),
)
def test_each_part_changes_pixels(photo: Image.Image, change: dict[str, Any]) -> None:
    plain, augmented = TrainTransform(NONE, (32, 32)), TrainTransform(replace(NONE, **change), (32, 32))
    with preserved_generators():
        changed = [not np.array_equal(plain(photo, key).image, augmented(photo, key).image) for key in range(60)]
    assert np.mean(changed) > 0.5


def test_none_is_a_plain_resize(photo: Image.Image) -> None:
    square = photo.crop((10, 10, 74, 74))
    with preserved_generators():
        pixels, erase = TrainTransform(NONE, (32, 32))(square, sample_key(0, 0, 0))
    np.testing.assert_array_equal(pixels, np.asarray(square.resize((32, 32), Image.Resampling.BICUBIC)))
    assert erase == (0, 0, 0, 0)


@pytest.mark.parametrize(("size", "crop_pct"), [((32, 32), 0.9), ((32, 48), 0.875), ((64, 64), 1.0)])
def test_evaluation_equals_timm(photo: Image.Image, size: tuple[int, int], crop_pct: float) -> None:
    timm = create_transform(size, interpolation="bicubic", crop_pct=crop_pct, use_prefetcher=True)
    pixels = EvalTransform(size, crop_pct)(photo).image
    assert pixels.shape == (*size, 3)
    np.testing.assert_array_equal(pixels, timm(photo).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (500, 3)])
def test_odd_image_sizes(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "red")
    with preserved_generators():
        assert TrainTransform(AugmentConfig(), (32, 32))(image, 0).image.shape == (32, 32, 3)
    assert EvalTransform((32, 32), 0.9)(image).image.shape == (32, 32, 3)


def test_erase_box_is_timms() -> None:
    timm = RandomErasing(1.0, mode="pixel", device="cpu")
    with preserved_generators():
        for key in range(50):
            seed_generators(key)
            erased = timm(torch.zeros(3, 40, 60))[0].nonzero()
            seed_generators(key)
            top, left, height, width = draw_erase_box(1.0, (40, 60))
            assert erased.min(0).values.tolist() == [top, left]
            assert (erased.max(0).values + 1).tolist() == [top + height, left + width]


def test_erase_statistics() -> None:
    with preserved_generators():
        seed_generators(0)
        boxes = np.array([draw_erase_box(0.25, (224, 224)) for _ in range(8000)])
    drawn = boxes[boxes[:, 2] > 0]
    assert len(drawn) / len(boxes) == pytest.approx(0.25, abs=0.02)
    area, aspect = drawn[:, 2] * drawn[:, 3] / 224**2, drawn[:, 2] / drawn[:, 3]
    assert area.min() > 0.018
    assert area.max() < 0.336
    assert area.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.01)
    assert np.log(aspect).mean() == pytest.approx(0, abs=0.05)
    assert abs(np.log(aspect)).max() < math.log(1 / 0.3) + 0.05
    assert ((drawn[:, :2] + drawn[:, 2:]) <= 224).all()
