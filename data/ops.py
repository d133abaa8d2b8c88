"""Operations on the pixels of a sample: what they are, how they are drawn, and how Pillow does them.

An operation is a record of the numpy type OP, the same bytes as `vip_op` of data/native/native.h. Drawing is a pure
function of uniform random numbers, vectorised over a batch, with the distributions of timm's auto_augment.py and of
torchvision's ColorJitter. `apply_ops` does with Pillow what the native core does faster, to the same bits.
B: samples, H, W: height and width in pixels.
"""

import math
from collections.abc import Callable
from enum import IntEnum
from itertools import permutations
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy.special import ndtri  # type: ignore[import-untyped]

MAX_OPS = 8


class Kind(IntEnum):
    """The operations; native.h says what the arguments of each mean."""

    NONE = 0
    AUTOCONTRAST = 1
    EQUALIZE = 2
    INVERT = 3
    POSTERIZE = 4
    SOLARIZE = 5
    SOLARIZE_ADD = 6
    COLOR = 7
    CONTRAST = 8
    BRIGHTNESS = 9
    SHARPNESS = 10
    AFFINE = 11
    BLUR = 12


BILINEAR, BICUBIC = int(Image.Resampling.BILINEAR), int(Image.Resampling.BICUBIC)

OP = np.dtype([("kind", np.int32), ("filter", np.int32), ("args", np.float64, 6)], align=True)
SAMPLE = np.dtype(
    [
        *((name, np.int32) for name in ("top", "left", "height", "width", "resized_height", "resized_width")),
        *((name, np.int32) for name in ("window_top", "window_left", "filter", "flip", "num_ops")),
        ("fill", np.uint8, 4),
        ("ops", OP, MAX_OPS),
    ],
    align=True,
)

DRAWS_PER_OP = 5  # which operation, whether at all, how much, in which direction, with which filter
THREE_AUGMENT_DRAWS = 2
COLOR_JITTER_DRAWS = 4


def apply_ops(image: Image.Image, ops: np.ndarray, fill: tuple[int, int, int]) -> Image.Image:
    """`image` (RGB) after the operations `ops` (n,) of type OP, in order; `fill` colours what AFFINE leaves empty."""
    for op in ops:
        image = _apply(image, Kind(op["kind"]), [float(arg) for arg in op["args"]], int(op["filter"]), fill)
    return image


def _apply(image: Image.Image, kind: Kind, args: list[float], resample: int, fill: tuple[int, int, int]) -> Image.Image:
    value = args[0]
    match kind:
        case Kind.AUTOCONTRAST:
            return ImageOps.autocontrast(image)
        case Kind.EQUALIZE:
            return ImageOps.equalize(image)
        case Kind.INVERT:
            return ImageOps.invert(image)
        case Kind.POSTERIZE:  # not ImageOps.posterize: Pillow 13 refuses to keep 0 bits
            return image.point([level & (0xFF00 >> int(value)) for level in range(256)] * 3)
        case Kind.SOLARIZE:
            return image.point([level if level < value else 255 - level for level in range(256)] * 3)
        case Kind.SOLARIZE_ADD:
            return image.point([min(255, int(level + value)) if level < 128 else level for level in range(256)] * 3)
        case Kind.COLOR:
            return ImageEnhance.Color(image).enhance(value)
        case Kind.CONTRAST:
            return ImageEnhance.Contrast(image).enhance(value)
        case Kind.BRIGHTNESS:
            return ImageEnhance.Brightness(image).enhance(value)
        case Kind.SHARPNESS:
            return ImageEnhance.Sharpness(image).enhance(value)
        case Kind.AFFINE:
            method, filter_ = Image.Transform.AFFINE, Image.Resampling(resample)
            return image.transform(image.size, method, args, filter_, fillcolor=fill)
        case Kind.BLUR:
            return image.filter(ImageFilter.GaussianBlur(value))
    return image


class RandAugment:
    """timm's RandAugment as a function: `draw` gives the operations of a batch.

    Args:
        spec: timm's string, such as "rand-m9-mstd0.5-inc1".
        size: (H, W) of the images in pixels, which rotation and translation depend on.
        interpolation: filter of the geometric operations; "random" draws one for each.

    Raises:
        ValueError: `spec` asks for more operations than a sample can hold.
    """

    def __init__(
        self, spec: str, size: tuple[int, int], interpolation: Literal["random", "bilinear", "bicubic"] = "random"
    ) -> None:
        fields = _parse(spec)
        self.size = size
        self.bilinear_prob = {"random": 0.5, "bilinear": 1.0, "bicubic": 0.0}[interpolation]
        self.num_layers = int(fields.get("n", 2))
        self.prob = float(fields.get("p", 0.5))
        self.magnitude = float(fields.get("m", LEVELS))
        self.std = float(fields.get("mstd", 0))
        self.max_magnitude = float(fields.get("mmax", 0)) or LEVELS
        self.names, self.weights, self.replace = _choices(fields.get("t"), bool(int(fields.get("inc", 0))))
        if self.num_layers > MAX_OPS:
            raise ValueError(
                f"rand_augment={spec!r} asks for {self.num_layers} operations, {MAX_OPS} is the most: use n{MAX_OPS} or less"
            )

    def draw(self, uniforms: np.ndarray) -> np.ndarray:
        """Operations for B samples, Kind.NONE where a layer is left out.

        Args:
            uniforms: (B, num_layers * DRAWS_PER_OP) float64 in [0, 1), independent.

        Returns:
            (B, num_layers) of type OP.
        """
        draws = uniforms.reshape(len(uniforms), self.num_layers, DRAWS_PER_OP)
        which, whether, amount, direction, filters = draws.transpose(2, 0, 1)
        ops = np.zeros(which.shape, OP)
        ops["filter"] = np.where(filters < self.bilinear_prob, BILINEAR, BICUBIC)
        chosen = np.where(whether < self.prob, self._choose(which), len(self.names))
        levels = self._magnitudes(amount) / LEVELS
        signs = np.where(direction < 0.5, 1.0, -1.0)
        for index, name in enumerate(self.names):
            mask = chosen == index
            if mask.any():
                kind, args = TABLE[name]
                ops["kind"][mask] = kind
                ops["args"][mask] = _columns(args(levels[mask], signs[mask], self.size), int(mask.sum()))
        return ops

    def _choose(self, uniforms: np.ndarray) -> np.ndarray:
        """Index into `names` for each of (B, num_layers)."""
        weights = np.tile(self.weights, (len(uniforms), 1))
        chosen = np.empty(uniforms.shape, np.int64)
        for layer in range(uniforms.shape[1]):
            bounds = weights.cumsum(axis=1)
            chosen[:, layer] = (bounds <= uniforms[:, layer, None] * bounds[:, -1:]).sum(axis=1)
            if not self.replace:
                weights[np.arange(len(weights)), chosen[:, layer]] = 0
        return chosen

    def _magnitudes(self, uniforms: np.ndarray) -> np.ndarray:
        if self.std > 100:  # timm's word for uniform
            magnitudes = uniforms * self.magnitude
        else:
            magnitudes = self.magnitude + (self.std * ndtri(uniforms) if self.std else np.zeros_like(uniforms))
        return magnitudes.clip(0, self.max_magnitude)


def three_augment(uniforms: np.ndarray) -> np.ndarray:
    """DeiT III's choice of solarize, gray or blur (arXiv 2204.07118), as timm's "3a" has it.

    Args:
        uniforms: (B, THREE_AUGMENT_DRAWS) float64 in [0, 1).

    Returns:
        (B, 1) of type OP.
    """
    which = (uniforms[:, 0] * 3).astype(np.int64)
    ops = np.zeros((len(uniforms), 1), OP)
    ops["kind"][:, 0] = np.array([Kind.SOLARIZE, Kind.COLOR, Kind.BLUR])[which]
    radii = 0.1 + 1.9 * uniforms[:, 1]
    ops["args"][:, 0, 0] = np.choose(which, [128.0, 0.0, radii])
    return ops


def color_jitter(strength: float, uniforms: np.ndarray) -> np.ndarray:
    """torchvision's ColorJitter of brightness, contrast and saturation by factors 1 - `strength` to 1 + `strength`.

    Args:
        strength: at most 1.
        uniforms: (B, COLOR_JITTER_DRAWS) float64 in [0, 1).

    Returns:
        (B, 3) of type OP, in random order.
    """
    orders = np.array(list(permutations((Kind.BRIGHTNESS, Kind.CONTRAST, Kind.COLOR))))
    ops = np.zeros((len(uniforms), 3), OP)
    ops["kind"] = orders[(uniforms[:, 0] * len(orders)).astype(np.int64)]
    ops["args"][:, :, 0] = 1 - strength + 2 * strength * uniforms[:, 1:]
    return ops


def rotation(degrees: float, size: tuple[int, int]) -> tuple[float, ...]:
    """AFFINE's six arguments for Image.rotate(degrees) of an image of `size` (H, W), to the last bit."""
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = size[1] / 2, size[0] / 2
    return cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y


LEVELS = 10.0  # timm's magnitudes run from 0 to this
Columns = tuple[Any, ...]  # up to six numbers or arrays (n,)
Arguments = Callable[[np.ndarray, np.ndarray, tuple[int, int]], Columns]


def _columns(args: Columns, num: int) -> np.ndarray:
    columns = [np.broadcast_to(column, num) for column in (*args, *(0.0,) * (6 - len(args)))]
    return np.stack(columns, axis=-1)


def _rotations(level: np.ndarray, sign: np.ndarray, size: tuple[int, int]) -> Columns:
    return tuple(np.array([rotation(degrees, size) for degrees in level * 30 * sign]).T)


def _enhanced(level: np.ndarray, sign: np.ndarray, size: tuple[int, int]) -> Columns:
    return (level * 1.8 + 0.1,)


def _enhanced_more(level: np.ndarray, sign: np.ndarray, size: tuple[int, int]) -> Columns:
    return (np.maximum(0.1, 1 + level * 0.9 * sign),)


# How timm's names become operations: arguments from the level (magnitude / 10), a random sign and the image's size.
TABLE: dict[str, tuple[Kind, Arguments]] = {
    "AutoContrast": (Kind.AUTOCONTRAST, lambda level, sign, size: ()),
    "Equalize": (Kind.EQUALIZE, lambda level, sign, size: ()),
    "Invert": (Kind.INVERT, lambda level, sign, size: ()),
    "Rotate": (Kind.AFFINE, _rotations),
    "Posterize": (Kind.POSTERIZE, lambda level, sign, size: (np.minimum(8, np.trunc(level * 4)),)),
    "PosterizeIncreasing": (Kind.POSTERIZE, lambda level, sign, size: (np.maximum(0, 4 - np.trunc(level * 4)),)),
    "Solarize": (Kind.SOLARIZE, lambda level, sign, size: (np.minimum(256, np.trunc(level * 256)),)),
    "SolarizeIncreasing": (Kind.SOLARIZE, lambda level, sign, size: (256 - np.minimum(256, np.trunc(level * 256)),)),
    "SolarizeAdd": (Kind.SOLARIZE_ADD, lambda level, sign, size: (np.minimum(128, np.trunc(level * 110)),)),
    "Color": (Kind.COLOR, _enhanced),
    "ColorIncreasing": (Kind.COLOR, _enhanced_more),
    "Contrast": (Kind.CONTRAST, _enhanced),
    "ContrastIncreasing": (Kind.CONTRAST, _enhanced_more),
    "Brightness": (Kind.BRIGHTNESS, _enhanced),
    "BrightnessIncreasing": (Kind.BRIGHTNESS, _enhanced_more),
    "Sharpness": (Kind.SHARPNESS, _enhanced),
    "SharpnessIncreasing": (Kind.SHARPNESS, _enhanced_more),
    "ShearX": (Kind.AFFINE, lambda level, sign, size: (1, level * 0.3 * sign, 0, 0, 1, 0)),
    "ShearY": (Kind.AFFINE, lambda level, sign, size: (1, 0, 0, level * 0.3 * sign, 1, 0)),
    "TranslateXRel": (Kind.AFFINE, lambda level, sign, size: (1, 0, level * 0.45 * sign * size[1], 0, 1, 0)),
    "TranslateYRel": (Kind.AFFINE, lambda level, sign, size: (1, 0, 0, 0, 1, level * 0.45 * sign * size[0])),
    "Desaturate": (Kind.COLOR, lambda level, sign, size: (1 - (0.5 + 0.5 * level).clip(0.5, 1),)),
    "GaussianBlur": (Kind.BLUR, lambda level, sign, size: ((0.1 + 1.9 * level).clip(0.1, 2),)),
}

PLAIN = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
)  # fmt: skip
INCREASING = tuple(name + "Increasing" if name + "Increasing" in TABLE else name for name in PLAIN)
SHAPES = {"Rotate": 3, "ShearX": 2, "ShearY": 2}
REST_OF_3A = ("PosterizeIncreasing", "AutoContrast", "ColorIncreasing", "SharpnessIncreasing", "ContrastIncreasing",
              "BrightnessIncreasing", "Equalize", "Invert")  # fmt: skip
THREE = ("SolarizeIncreasing", "Desaturate", "GaussianBlur")
WEIGHTED_3A = dict.fromkeys(THREE, 6.0) | SHAPES | dict.fromkeys(REST_OF_3A, 1.0)
WEIGHTED = (
    dict.fromkeys(INCREASING, 0.05)
    | {"ColorIncreasing": 0.25, "SharpnessIncreasing": 0.25, "AutoContrast": 0.25}
    | {**SHAPES, "TranslateXRel": 1, "TranslateYRel": 1}
)


def _choices(name: str | None, increasing: bool) -> tuple[tuple[str, ...], np.ndarray, bool]:
    """Names of the operations, their weights, and whether one may be drawn twice for the same sample."""
    weighted = {"weights": WEIGHTED, "3aw": WEIGHTED_3A}.get(name or "")
    if weighted is not None:
        return tuple(weighted), np.array(list(weighted.values())), False
    names = THREE if name == "3a" else INCREASING if increasing else PLAIN
    return names, np.ones(len(names)), True


def _parse(spec: str) -> dict[str, str]:
    """The fields of timm's string by their key; of a repeated one timm keeps the first of these three, else the last."""
    fields: dict[str, str] = {}
    for part in spec.split("-")[1:]:
        key = "t" if part.startswith("t") else part.rstrip("0123456789.")
        if key not in fields or key not in ("mstd", "mmax", "t"):
            fields[key] = part.removeprefix(key)
    return fields
