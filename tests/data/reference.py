"""What a sample must look like: Pillow's crop, resize and operations, one after another, as timm calls them."""

import io

import numpy as np
from PIL import Image

from data import ops


def pillow_pixels(image: Image.Image, sample: np.void, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W, 3) of a decoded RGB image, as `sample` (data.ops.SAMPLE) says."""
    top, left, height, width = (int(sample[key]) for key in ("top", "left", "height", "width"))
    box = image.crop((left, top, left + width, top + height))
    resized = box.resize(
        (int(sample["resized_width"]), int(sample["resized_height"])), Image.Resampling(int(sample["filter"]))
    )
    window_top, window_left = int(sample["window_top"]), int(sample["window_left"])
    window = resized.crop((window_left, window_top, window_left + size[1], window_top + size[0]))
    if sample["flip"]:
        window = window.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    fill = tuple(int(level) for level in sample["fill"][:3])
    return np.asarray(ops.apply_ops(window, sample["ops"][: int(sample["num_ops"])], fill))


def psnr(pixels: np.ndarray, expected: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB; infinite where they are equal."""
    error = np.square(pixels.astype(float) - expected).mean()
    return float(10 * np.log10(255**2 / error)) if error else np.inf


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours, edges and a little noise: what photographs are made of."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(256, size=(6, 8, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(coarse).astype(np.int64) + rng.normal(0, 6, (height, width, 3)).round().astype(np.int64)
    pixels[height // 3 : height // 2, width // 4 : width // 2] += 80
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: object) -> bytes:
    """The image as a JPEG file; `options` are Pillow's."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()
