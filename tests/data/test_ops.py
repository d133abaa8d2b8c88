"""Operations on pixels: the native core's are Pillow's, Pillow's are timm's, and they are drawn with timm's distributions."""

import ctypes
import importlib.util
import math
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageStat

from data import native, ops
from data.ops import BICUBIC, BILINEAR, DRAWS_PER_OP, OP, TABLE, Kind, RandAugment, apply_ops
from data.randomness import uniforms
from tests.conftest import ROOT

FILL = (124, 116, 104)
needs_native = pytest.mark.skipif(not native.available(), reason=native.reason())


@pytest.fixture(scope="module")
def timm() -> ModuleType:
    """timm's auto_augment.py by itself: timm as a whole takes seconds to import."""
    package = importlib.util.find_spec("timm")
    assert package is not None
    assert package.origin is not None
    file = Path(package.origin).parent / "data" / "auto_augment.py"
    spec = importlib.util.spec_from_file_location("timm_auto_augment", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def op(kind: Kind, *args: float, resample: int = BICUBIC) -> np.ndarray:
    made = np.zeros(1, OP)
    made["kind"], made["filter"] = kind, resample
    made["args"][0, : len(args)] = args
    return made


def by_native(image: np.ndarray, operations: np.ndarray) -> np.ndarray:
    result = image.copy()
    native.apply_ops(result, operations, FILL)
    return result


def by_pillow(image: np.ndarray, operations: np.ndarray) -> np.ndarray:
    return np.asarray(apply_ops(Image.fromarray(image), operations, FILL))


def picture(height: int, width: int, content: str, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    if content == "noise":
        return generator.integers(0, 256, (height, width, 3), np.uint8)
    if content == "black and white":
        return generator.choice(np.array([0, 255], np.uint8), (height, width, 3))
    if content == "one colour":
        return np.broadcast_to(generator.integers(0, 256, 3, np.uint8), (height, width, 3)).copy()
    y, x = np.mgrid[0:height, 0:width, 0:3][:2]
    waves = 128 + 90 * np.sin(x / 9 + seed) + 60 * np.cos(y / 7) + generator.normal(0, 3, (height, width, 3))
    waves[: height // 4] = 255
    return waves.clip(0, 255).astype(np.uint8)


pictures = st.builds(
    picture,
    st.one_of(st.integers(1, 7), st.integers(8, 70)),
    st.one_of(st.integers(1, 7), st.integers(8, 70)),
    st.sampled_from(["noise", "black and white", "one colour", "photo"]),
    st.integers(0, 999),
)
factors = st.one_of(st.floats(0, 2), st.floats(-3, 5), st.sampled_from([0.0, 1.0, 0.1, 1.9]))
shifts = st.one_of(st.floats(-80, 80), st.integers(-80, 80), st.sampled_from([0.0, 0.5, 1e-14, -1e-14, 1e9]))
shears = st.one_of(st.floats(-0.3, 0.3), st.floats(-4, 4), st.sampled_from([0.0, 0.25, 1e-12, 1.0]))
ARGUMENTS: dict[Kind, st.SearchStrategy] = {
    Kind.NONE: st.just(()),
    Kind.AUTOCONTRAST: st.just(()),
    Kind.EQUALIZE: st.just(()),
    Kind.INVERT: st.just(()),
    Kind.POSTERIZE: st.tuples(st.integers(0, 8)),
    Kind.SOLARIZE: st.tuples(st.one_of(st.integers(0, 256), st.floats(0, 256))),
    Kind.SOLARIZE_ADD: st.tuples(st.integers(0, 255)),
    Kind.COLOR: st.tuples(factors),
    Kind.CONTRAST: st.tuples(factors),
    Kind.BRIGHTNESS: st.tuples(factors),
    Kind.SHARPNESS: st.tuples(factors),
    Kind.AFFINE: st.one_of(
        st.tuples(st.just(1), shears, st.just(0), st.just(0), st.just(1), st.just(0)),
        st.tuples(st.just(1), st.just(0), st.just(0), shears, st.just(1), st.just(0)),
        st.tuples(st.just(1), st.just(0), shifts, st.just(0), st.just(1), shifts),
        st.tuples(st.just(1), shears, shifts, st.just(0), st.just(1), shifts),
        st.tuples(shears, shears, shifts, shears, shears, shifts),
    ),
    Kind.BLUR: st.tuples(st.one_of(st.just(0), st.floats(0.01, 2.5), st.floats(0.01, 90))),
}


@needs_native
@pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.name.lower())
def test_native_is_pillow_to_the_last_bit(kind: Kind) -> None:
    @settings(max_examples=400 if kind is Kind.AFFINE else 60, deadline=None)
    @given(image=pictures, args=ARGUMENTS[kind], resample=st.sampled_from([BILINEAR, BICUBIC]))
    def compare(image: np.ndarray, args: tuple[float, ...], resample: int) -> None:
        operation = op(kind, *args, resample=resample)
        np.testing.assert_array_equal(by_native(image, operation), by_pillow(image, operation))

    compare()


@needs_native
@pytest.mark.parametrize("kind", [Kind.COLOR, Kind.CONTRAST, Kind.BRIGHTNESS, Kind.SHARPNESS])
def test_native_rounds_like_pillow_at_decimal_factors(kind: Kind) -> None:
    """Where a compiler that contracts multiplication and addition would be caught."""
    image = picture(96, 96, "noise")
    for tenths in range(-30, 50):
        operation = op(kind, tenths / 10)
        np.testing.assert_array_equal(by_native(image, operation), by_pillow(image, operation))


@needs_native
@pytest.mark.parametrize("resample", [BILINEAR, BICUBIC])
@pytest.mark.parametrize("degrees", [0, 1e-9, 0.1, 17.3, -30, 45, 89.999, 90, 180, 270, 359])
def test_native_rotates_like_pillow(degrees: float, resample: int) -> None:
    for size in [(1, 1), (1, 9), (31, 31), (64, 48)]:
        image = picture(*size, "noise")
        rotated = Image.fromarray(image).rotate(degrees, Image.Resampling(resample), fillcolor=FILL)
        operation = op(Kind.AFFINE, *ops.rotation(degrees, size), resample=resample)
        np.testing.assert_array_equal(by_native(image, operation), rotated)


@needs_native
@pytest.mark.parametrize("content", ["noise", "black and white", "photo"])
def test_native_is_pillow_for_drawn_samples_of_full_size(content: str) -> None:
    drawn = RandAugment("rand-n4-m9-mstd0.5-inc1-p1", (224, 224)).draw(uniforms(np.arange(16), 4 * DRAWS_PER_OP))
    for seed, operations in enumerate(drawn):
        image = picture(224, 224, content, seed)
        np.testing.assert_array_equal(by_native(image, operations), by_pillow(image, operations))


@needs_native
def test_no_argument_makes_native_read_or_write_elsewhere() -> None:
    generator = np.random.default_rng(0)
    odd = np.array([np.nan, np.inf, -np.inf, 1e300, -1e300, 1e17, -1e17, 2.0**31, 1e4, -1.0, 0.0, 1.0, 0.5, 1e-300])
    for _ in range(2000):
        height, width = generator.integers(1, 20, 2)
        around = np.full((height + 2, width, 3), 7, np.uint8)
        operations = np.zeros(3, OP)
        operations["kind"] = generator.choice([*Kind, Kind.AFFINE, Kind.AFFINE, -1, 99], 3)
        operations["filter"] = generator.integers(0, 5, 3)
        operations["args"] = np.where(generator.random((3, 6)) < 0.5, [1, 0, 0, 0, 1, 0], generator.choice(odd, (3, 6)))
        native.apply_ops(around[1:-1], operations, FILL)
        assert (around[[0, -1]] == 7).all()
    nowhere = by_native(np.zeros((9, 9, 3), np.uint8), op(Kind.AFFINE, math.nan, 0, 0, 0, 1, 0))
    np.testing.assert_array_equal(nowhere, np.broadcast_to(np.array(FILL, np.uint8), (9, 9, 3)))


@needs_native
def test_native_is_pillow_where_huge_coordinates_cancel() -> None:
    image = picture(12, 40, "noise")
    for power in range(3, 20):
        for args in [(1, 10.0**power, -(10.0**power) * 5.5, 0, 1, 0), (1, 0, 0, 10.0**power, 1, -(10.0**power) * 9.5)]:
            operation = op(Kind.AFFINE, *args)
            np.testing.assert_array_equal(by_native(image, operation), by_pillow(image, operation))


@needs_native
def test_threads_do_not_share_scratch_memory() -> None:
    drawn = RandAugment("rand-n3-m9-mstd0.5-inc1-p1", (60, 60)).draw(uniforms(np.arange(64), 3 * DRAWS_PER_OP))
    sizes = [(20 + seed % 7 * 15, 60) for seed in range(64)]
    images = [picture(*size, "photo", seed) for seed, size in enumerate(sizes)]
    alone = [by_native(image, operations) for image, operations in zip(images, drawn, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            together = list(pool.map(by_native, images, drawn))
            assert all((a == b).all() for a, b in zip(alone, together, strict=True))


@needs_native
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: install gcc")
def test_code_for_processors_without_vectors_gives_the_same_bytes(tmp_path: Path) -> None:
    library = tmp_path / "plain.so"
    flags = ["-std=c11", "-O1", "-ffp-contract=off", "-DVIP_PLAIN", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    sources = [ROOT / "data/native/ops.c", ROOT / "data/native/affine.c"]
    subprocess.run(["cc", *flags, *sources, "-o", library, "-lm", "-pthread"], check=True)
    plain = ctypes.CDLL(str(library)).vip_apply_ops
    fill = np.array([*FILL, 0], np.uint8)
    drawn = RandAugment("rand-n2-m9-mstd0.5-inc1-p1", (50, 70)).draw(uniforms(np.arange(100), 2 * DRAWS_PER_OP))
    for seed, operations in enumerate(
        np.concatenate([drawn, ops.three_augment(uniforms(np.arange(9), 2)).repeat(2, 1)])
    ):
        image = picture(50, 70, "photo", seed)
        result = image.copy()
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (result, np.ascontiguousarray(operations), fill)]
        plain(pointers[0], 50, 70, pointers[1], len(operations), pointers[2])
        np.testing.assert_array_equal(result, by_native(image, operations))


def test_kinds_are_those_of_the_header() -> None:
    header = (ROOT / "data/native/native.h").read_text(encoding="utf-8")
    (kinds,) = re.findall(r"enum \{\s*(VIP_NONE.*?)\};", header, re.DOTALL)
    assert dict(re.findall(r"VIP_(\w+) = (\d+)", kinds)) == {kind.name: str(kind.value) for kind in Kind}
    assert re.findall(r"VIP_(BILINEAR|BICUBIC) = (\d+)", header) == [
        ("BILINEAR", str(BILINEAR)),
        ("BICUBIC", str(BICUBIC)),
    ]
    assert re.findall(r"VIP_MAX_OPS (\d+)", header) == [str(ops.MAX_OPS)]


@pytest.mark.parametrize("name", list(TABLE))
def test_each_operation_is_timms(timm: ModuleType, name: str) -> None:
    image = Image.fromarray(picture(40, 56, "photo"))
    for seed, magnitude in enumerate([0, 0.3, 2.5, 4, 5.5, 7, 9, 9.73, 10, 12]):
        random.seed(seed)
        sign = -1.0 if random.random() > 0.5 else 1.0
        random.seed(seed)
        level_args: tuple[Any, ...] = timm.LEVEL_TO_ARG[name](magnitude, {}) if timm.LEVEL_TO_ARG[name] else ()
        resample = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)[seed % 2]
        if timm.NAME_TO_OP[name] is timm.posterize and level_args[0] <= 0:
            expected: Image.Image = Image.new("RGB", image.size)  # Pillow 13 refuses to compute it
        else:
            expected = timm.NAME_TO_OP[name](image, *level_args, fillcolor=FILL, resample=resample)
        kind, arguments = TABLE[name]
        args = arguments(np.array([magnitude / 10]), np.array([sign]), (40, 56))
        operation = op(kind, *(float(np.ravel(arg)[0]) for arg in args), resample=int(resample))
        np.testing.assert_array_equal(apply_ops(image, operation, FILL), expected)


def recorded(timm: ModuleType, spec: str, num: int, hparams: dict[str, Any]) -> list[list[tuple[str, float, int]]]:
    """What timm would have done to `num` images: for each the operations, their first arguments and filters."""
    transform = timm.rand_augment_transform(spec, hparams)
    applied: list[tuple[str, float, int]] = []

    def record(name: str) -> Callable[..., None]:
        def operate(image: None, *args: float, **kwargs: Any) -> None:
            resample = kwargs["resample"]
            resample = random.choice(resample) if isinstance(resample, tuple) else resample
            amount = 1 - args[0] if name == "Desaturate" else args[0] if args else 0.0  # a factor as of Color
            kind = TABLE[name][0]
            applied.append((name if kind is Kind.AFFINE else kind.name, amount, int(resample)))

        return operate

    for operation in transform.ops:
        operation.aug_fn = record(operation.name)
    samples = []
    for _ in range(num):
        applied.clear()
        transform(None)
        samples.append(applied.copy())
    return samples


def named(spec: str, num: int, size: tuple[int, int], interpolation: Any) -> list[list[tuple[str, float, int]]]:
    """The same of ours, arguments translated back."""
    augment = RandAugment(spec, size, interpolation)
    drawn = augment.draw(uniforms(np.arange(num), augment.num_layers * DRAWS_PER_OP))

    def name(one: np.void) -> tuple[str, float, int]:
        a, b, c, d, _, f = one["args"]
        if one["kind"] != Kind.AFFINE:
            return Kind(one["kind"]).name, a, int(one["filter"])
        if b and d:
            return "Rotate", math.degrees(math.atan2(-b, a)), int(one["filter"])
        geometric = {"ShearX": b, "ShearY": d, "TranslateXRel": c / size[1], "TranslateYRel": f / size[0]}
        return *max(geometric.items(), key=lambda item: abs(item[1])), int(one["filter"])

    return [[name(one) for one in sample if one["kind"] != Kind.NONE] for sample in drawn]


def assert_same_distribution(ours: list[float], theirs: list[float]) -> None:
    """Two-sample Kolmogorov-Smirnov, rejecting one in a hundred thousand; rounded, since many values are the bounds."""
    samples = [np.sort(np.round(sample, 9)) for sample in (ours, theirs)]
    steps = [np.searchsorted(sample, np.concatenate(samples), "right") / len(sample) for sample in samples]
    bound = math.sqrt(-0.5 * math.log(1e-5 / 2) * (1 / len(ours) + 1 / len(theirs)))
    assert np.abs(steps[0] - steps[1]).max() < bound


def assert_as_often(ours: int, theirs: int) -> None:
    assert abs(ours - theirs) <= 4.5 * math.sqrt(ours + theirs) + 1, f"{ours} of ours, {theirs} of timm's"


@pytest.mark.parametrize(
    ("spec", "interpolation"),
    [
        ("rand-m9-mstd0.5-inc1", "random"),
        ("rand-m6-n3-p0.8-mstd2", "bilinear"),
        ("rand-m15-mstd101-mmax12-inc1", "bicubic"),
        ("rand-n3-p1-tweights", "random"),
        ("rand-t3aw-m8-mstd1-n4", "random"),
        ("rand-t3a-m5-mstd2", "random"),
        ("rand", "random"),
    ],
)
def test_drawn_like_timm(timm: ModuleType, spec: str, interpolation: str) -> None:
    hparams: dict[str, Any] = {"img_mean": FILL}
    if interpolation != "random":
        hparams["interpolation"] = Image.Resampling[interpolation.upper()]
    random.seed(1)
    np.random.seed(1)
    theirs = recorded(timm, spec, 20_000, hparams)
    ours = named(spec, 20_000, (96, 64), interpolation)
    for length in range(5):
        assert_as_often(sum(len(s) == length for s in ours), sum(len(s) == length for s in theirs))
    for pick in (0, -1):  # without replacement the last is not distributed like the first
        first, second = ([s[pick] for s in samples if len(s) > 1] for samples in (ours, theirs))
        for name in {name for name, *_ in second}:
            assert_as_often(*([one[0] for one in picked].count(name) for picked in (first, second)))
    flat, expected = ([one for s in samples for one in s] for samples in (ours, theirs))
    assert {name for name, *_ in flat} == {name for name, *_ in expected}
    for name in {name for name, *_ in expected}:
        assert_same_distribution(*([one[1] for one in listed if one[0] == name] for listed in (flat, expected)))
    for resample in (BILINEAR, BICUBIC):
        assert_as_often(*([one[2] for one in listed].count(resample) for listed in (flat, expected)))


def test_draws_are_a_function_of_each_samples_own_numbers() -> None:
    augment = RandAugment("rand-n3-mstd1-tweights", (50, 70))
    numbers = uniforms(np.arange(200), 3 * DRAWS_PER_OP)
    together = augment.draw(numbers)
    assert together.shape == (200, 3)
    assert together.dtype == OP
    for index in (0, 7, 199):
        np.testing.assert_array_equal(augment.draw(numbers[index : index + 1])[0], together[index])
    assert augment.draw(np.zeros((1, 3 * DRAWS_PER_OP)))["kind"].tolist() != [[0, 0, 0]]
    assert np.isfinite(augment.draw(np.full((1, 3 * DRAWS_PER_OP), 1 - 2.0**-53))["args"]).all()


def test_more_operations_than_a_sample_holds_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"rand_augment='rand-m5-n9' asks for 9 operations, 8 is the most: use n8 or less"
    ):
        RandAugment("rand-m5-n9", (8, 8))


def test_three_augment_is_timms(timm: ModuleType) -> None:
    image = Image.fromarray(picture(30, 40, "photo"))
    transform = timm.auto_augment_transform("3a", {"img_mean": FILL})
    seen = set()
    for seed in range(30):
        generator = random.Random(seed)
        numbers = np.array([[(generator.choice(range(3)) + 0.5) / 3, generator.random()]])
        random.seed(seed)
        operations = ops.three_augment(numbers)
        np.testing.assert_array_equal(apply_ops(image, operations[0], FILL), transform(image))
        seen.add(int(operations["kind"][0, 0]))
    assert seen == {Kind.SOLARIZE, Kind.COLOR, Kind.BLUR}
    counts = np.bincount(ops.three_augment(uniforms(np.arange(9000), 2))["kind"].ravel())
    assert np.abs(counts[list(seen)] - 3000).max() < 200


@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_color_jitter_is_torchvisions(strength: float) -> None:
    from torchvision.transforms import ColorJitter
    from torchvision.transforms import functional as F

    image = Image.fromarray(picture(30, 40, "photo"))
    adjust = {Kind.BRIGHTNESS: F.adjust_brightness, Kind.CONTRAST: F.adjust_contrast, Kind.COLOR: F.adjust_saturation}
    drawn = ops.color_jitter(strength, uniforms(np.arange(12_000), ops.COLOR_JITTER_DRAWS))
    orders, counts = np.unique(drawn["kind"], axis=0, return_counts=True)
    assert len(orders) == 6
    assert np.abs(counts - 2000).max() < 200
    jitter = ColorJitter(strength, strength, strength)
    for kind, (low, high) in zip(adjust, (jitter.brightness, jitter.contrast, jitter.saturation), strict=True):
        chosen = drawn["args"][..., 0][drawn["kind"] == kind]
        assert_same_distribution(list(chosen), list(np.linspace(low, high, 12_000)))
        assert low <= chosen.min() < chosen.max() <= high
    for operations in drawn[:20]:
        expected = image
        for one in operations:
            expected = adjust[Kind(one["kind"])](expected, one["args"][0])
        np.testing.assert_array_equal(apply_ops(image, operations, FILL), expected)


def test_posterizing_to_no_bits_leaves_black() -> None:
    assert ImageStat.Stat(apply_ops(Image.fromarray(picture(9, 9, "noise")), op(Kind.POSTERIZE, 0), FILL)).sum == [
        0,
        0,
        0,
    ]
