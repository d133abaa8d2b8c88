"""Samples as functions of their keys, and in timm's distributions: where timm draws the same numbers, it does the same."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform, random_erasing
from timm.data import transforms as timm_transforms

from data.augment import (
    ATTEMPTS,
    CROP_DRAWS,
    ERASE_DRAWS,
    EvalTransform,
    TrainTransform,
    erase_boxes,
    random_crops,
)
from data.config import AugmentConfig
from data.ops import Kind
from data.randomness import sample_key, uniforms
from tests.data.reference import photo, pillow_pixels

NONE = AugmentConfig.none()
KEYS = np.array([sample_key(0, 0, index) for index in range(400)])


class Draws:
    """python's random module, fed with given numbers: areas and aspect ratios of one attempt after another, then a place."""

    def __init__(self, areas: np.ndarray, aspects: np.ndarray, place: np.ndarray, wanted: float = 0.0) -> None:
        attempts, places = iter(np.stack([areas, aspects], axis=1).ravel()), iter(place)
        self.random = lambda: wanted
        self.uniform = lambda low, high: low + (high - low) * next(attempts)
        self.randint = lambda low, high: low + math.floor(next(places) * (high - low + 1))


@given(
    height=st.integers(1, 700),
    width=st.integers(1, 700),
    scale=st.sampled_from([(0.08, 1.0), (0.5, 1.0), (0.9, 1.0)]),
    ratio=st.sampled_from([(3 / 4, 4 / 3), (1.0, 1.0), (0.5, 0.6)]),
    seed=st.integers(0, 1000),
)
def test_crops_are_timms(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], seed: int
) -> None:
    draws = uniforms(np.array([seed]), CROP_DRAWS)
    ours = tuple(int(side[0]) for side in random_crops(draws, np.array([height]), np.array([width]), scale, ratio))
    timm = timm_transforms.RandomResizedCropAndInterpolation(1, scale, ratio)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm_transforms, "random", Draws(*np.split(draws[0], [ATTEMPTS, 2 * ATTEMPTS])))
        expected = timm.get_params(Image.new("L", (width, height)), scale, ratio)
    clamped = expected[0], expected[1], max(1, expected[2]), max(1, expected[3])
    assert ours == clamped or 0 in expected[2:], "timm's crops of tiny images can be empty"
    assert ours[0] + ours[2] <= height
    assert ours[1] + ours[3] <= width
    assert min(ours[:2]) >= 0


def test_erased_boxes_are_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    size = (40, 60)
    draws = uniforms(KEYS, ERASE_DRAWS)
    boxes = erase_boxes(draws, 1.0, size)
    timm = random_erasing.RandomErasing(1.0, mode="pixel", device="cpu")
    for row, box in zip(draws, boxes, strict=True):
        wanted, areas, aspects, place = np.split(row, [1, 1 + ATTEMPTS, 1 + 2 * ATTEMPTS])
        monkeypatch.setattr(random_erasing, "random", Draws(areas, aspects, place, wanted[0]))
        erased = timm(torch.zeros(3, *size))[0].nonzero()
        top, left, height, width = box.tolist()
        assert erased.min(0).values.tolist() == [top, left]
        assert (erased.max(0).values + 1).tolist() == [top + height, left + width]


def test_erase_statistics() -> None:
    boxes = erase_boxes(uniforms(np.arange(8000) * 7919, ERASE_DRAWS), 0.25, (224, 224))
    drawn = boxes[boxes[:, 2] > 0]
    assert len(drawn) / len(boxes) == pytest.approx(0.25, abs=0.02)
    area, aspect = drawn[:, 2] * drawn[:, 3] / 224**2, drawn[:, 2] / drawn[:, 3]
    assert area.min() > 0.018
    assert area.max() < 0.336
    assert area.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.01)
    assert np.log(aspect).mean() == pytest.approx(0, abs=0.05)
    assert abs(np.log(aspect)).max() < math.log(1 / 0.3) + 0.05
    assert ((drawn[:, :2] + drawn[:, 2:]) <= 224).all()


def plan(config: AugmentConfig, keys: np.ndarray = KEYS, height: int = 90, width: int = 120) -> np.ndarray:
    sizes = np.full((2, len(keys)), [[height], [width]])
    return TrainTransform(config, (32, 32)).plan(keys, *sizes)[0]


def test_a_sample_follows_from_its_key_alone() -> None:
    whole = plan(AugmentConfig())
    assert np.array_equal(plan(AugmentConfig(), KEYS[7:9]), whole[7:9])
    assert len(np.unique(whole)) == len(whole)
    for key in (sample_key(0, 1, 5), sample_key(1, 0, 5), sample_key(0, 0, 6), sample_key(0, 0, 5, 1)):
        assert plan(AugmentConfig(), np.array([key])) != whole[5]


def test_flips_and_filters_come_as_often_as_asked_for() -> None:
    samples = plan(AugmentConfig(hflip=0.7))
    assert samples["flip"].mean() == pytest.approx(0.7, abs=0.07)
    assert (samples["filter"] == Image.Resampling.BICUBIC).mean() == pytest.approx(0.5, abs=0.08)
    assert (plan(AugmentConfig(interpolation="bicubic"))["filter"] == Image.Resampling.BICUBIC).all()


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        ({"rand_augment": "rand-m9-mstd0.5-inc1"}, set(Kind) - {Kind.BLUR}),
        ({"three_augment": True}, {Kind.SOLARIZE, Kind.COLOR, Kind.BLUR}),
        ({"color_jitter": 0.4}, {Kind.BRIGHTNESS, Kind.CONTRAST, Kind.COLOR}),
        ({}, set()),
    ],
    ids=["RandAugment", "three-augment", "jitter", "none"],
)
def test_each_part_brings_its_operations(change: dict[str, Any], kinds: set[Kind]) -> None:
    samples = plan(replace(NONE, **change))
    used = {int(kind) for sample in samples for kind in sample["ops"]["kind"][: sample["num_ops"]]}
    assert used == {int(kind) for kind in kinds}


def test_more_operations_than_a_sample_holds_are_refused() -> None:
    config = AugmentConfig(rand_augment="rand-m9-n6", color_jitter=0.4)
    with pytest.raises(ValueError, match=r"'rand-m9-n6' and color_jitter=0.4 are 9 operations, 8 is the most"):
        TrainTransform(config, (32, 32))


@pytest.mark.parametrize(("size", "crop_pct"), [((32, 32), 0.9), ((32, 48), 0.875), ((64, 64), 1.0), ((20, 50), 0.9)])
@pytest.mark.parametrize("shape", [(90, 120), (120, 90), (77, 77), (1, 300), (33, 31)])
def test_evaluation_equals_timm(shape: tuple[int, int], size: tuple[int, int], crop_pct: float) -> None:
    image = photo(*shape)
    timm = create_transform(size, interpolation="bicubic", crop_pct=crop_pct, use_prefetcher=True)
    samples, erase = EvalTransform(size, crop_pct).plan(KEYS[:1], np.array(shape[:1]), np.array(shape[1:]))
    pixels = pillow_pixels(image, samples[0], size)
    np.testing.assert_array_equal(pixels, timm(image).permute(1, 2, 0).numpy())
    assert not erase.any()


def test_all_off_is_a_resize_and_centre_crop() -> None:
    square = photo(64, 64)
    samples = plan(NONE, KEYS[:1], 64, 64)
    np.testing.assert_array_equal(
        pillow_pixels(square, samples[0], (32, 32)), np.asarray(square.resize((32, 32), Image.Resampling.BICUBIC))
    )
