"""Decoders: encoded images and their samples (`data.augment`) in, uint8 pixels out.

`native` is the project's own C library (`data.native`), which decodes no more than the crop needs and leaves Python's lock
alone, so that threads share the work. `torch` does the same with torchvision's JPEG decoder and torch's resize, in worker
processes. They sample alike; their pixels differ in the last bits, so a run keeps to one of them. Whatever is no plain JPEG
Pillow decodes (`data.decode`), and it alone judges what is a bad image.
"""

import threading
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from data import native, ops
from data.augment import FILTERS, Transform
from data.decode import BadImageError, plain_jpeg_size
from data.folder import FolderSource
from data.native import frames
from data.pack import PackSource
from data.sources import EncodedSource, Source

Load = Callable[[np.ndarray, np.ndarray], np.ndarray]  # samples and where the pixels go, to status
TORCH_FILTERS = {int(FILTERS["bilinear"]): "bilinear", int(FILTERS["bicubic"]): "bicubic"}


class Decoder:
    """How pixels come about."""

    name: str
    threaded: bool  # threads can share its work; else processes must

    def load(
        self, source: Source, indices: np.ndarray, keys: np.ndarray, transform: Transform, out: np.ndarray
    ) -> tuple[np.ndarray, list[int]]:
        """Loads the images `indices` (B,), as `transform` plans them for `keys` (B,), into `out`, uint8 (B, H, W, 3).

        Returns:
            boxes to erase, int64 (B, 4), and which rows stayed empty since their images cannot be decoded.

        Raises:
            ImageReadError: bytes that could not be had.
        """
        raise NotImplementedError


def choose(name: Literal["auto", "native", "torch"]) -> Decoder:
    """The decoder that `data.decoder` names. Raises ValueError where the native one is asked for and not there."""
    if name == "native" and not native.available():
        raise ValueError(f"data.decoder=native: {native.reason()}; or set data.decoder=auto")
    return TorchDecoder() if name == "torch" or not native.available() else NativeDecoder()


class NativeDecoder(Decoder):
    name = "native"
    threaded = True

    def __init__(self) -> None:
        self._local = threading.local()

    def load(
        self, source: Source, indices: np.ndarray, keys: np.ndarray, transform: Transform, out: np.ndarray
    ) -> tuple[np.ndarray, list[int]]:
        if getattr(transform, "filter", None) not in (None, *TORCH_FILTERS):  # of a rare network's evaluation
            return TorchDecoder().load(source, indices, keys, transform, out)
        decoded: dict[int, np.ndarray] = {}  # what is not for the library to decode

        def through_pillow(row: int) -> tuple[int, int]:
            try:
                decoded[row] = _raw_pixels(source, int(indices[row]))
            except BadImageError:
                decoded[row] = np.empty((0, 0, 3), np.uint8)
            return decoded[row].shape[0] or 1, decoded[row].shape[1] or 1

        heights, widths, odd, load = self._open(source, indices)
        for row in np.flatnonzero(odd).tolist():
            heights[row], widths[row] = through_pillow(row)
        samples, erase = transform.plan(keys, heights, widths)
        for row in np.flatnonzero(odd | (load(samples, out) != native.OK)).tolist():
            if row not in decoded:  # its damage lay behind the header
                through_pillow(row)
            if decoded[row].size:
                native.render(decoded[row], samples[row], out[row])
        empty = [row for row, pixels in sorted(decoded.items()) if not pixels.size]
        erase[empty] = 0
        return erase, empty

    def _open(self, source: Source, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, Load]:
        """Heights, widths, which rows are not for the library, and what gives the pixels of the others."""
        if isinstance(source, PackSource) and source.about.kind != "raw":
            heights, widths = source.heights[indices], source.widths[indices]
            odd = (heights == 0) | (source.exif and source.orientations[indices] != 1)
            fds, offsets = source.fds[indices], source.offsets[indices]
            lengths, heads = source.lengths[indices], source.heads[indices]
            return (
                heights,
                widths,
                odd,
                lambda samples, out: frames.load_pack(fds, offsets, lengths, heads, samples, out),
            )
        if not isinstance(source, EncodedSource) or isinstance(source, PackSource):
            every = np.ones(len(indices), np.int64)
            return every, every.copy(), every > 0, lambda samples, out: every
        files = self._read(source, indices)
        heights, widths, status = native.sizes(files)
        odd = status != native.OK
        if source.exif:
            odd |= [b"Exif\0" in bytes(file) for file in files]
        return heights, widths, odd, lambda samples, out: native.load(files, samples, out)

    def _read(self, source: EncodedSource, indices: np.ndarray) -> list[Any]:
        """The encoded images."""
        if not isinstance(source, FolderSource):
            return [source.read(index) for index in indices.tolist()]
        self._local.arena = getattr(self._local, "arena", None) or native.Arena()  # one a thread
        files, status = self._local.arena.read([source.path(index) for index in indices.tolist()])
        for row in np.flatnonzero(status).tolist():
            files[row] = source.read(int(indices[row]))  # waits where that may help, or says what is wrong
        return files


def _raw_pixels(source: Source, index: int) -> np.ndarray:
    """uint8 (height, width, 3)."""
    if isinstance(source, PackSource) and source.holds_pixels(index):
        pixels = np.frombuffer(source.read(index), np.uint8, offset=int(source.heads[index]))
        return pixels.reshape(source.heights[index], source.widths[index], 3)
    return np.array(source.load(index))


class TorchDecoder(Decoder):
    name = "torch"
    threaded = False

    def load(
        self, source: Source, indices: np.ndarray, keys: np.ndarray, transform: Transform, out: np.ndarray
    ) -> tuple[np.ndarray, list[int]]:
        decoded = [_decode(source, index) for index in indices.tolist()]
        sizes = np.array([(1, 1) if pixels is None else pixels.shape[1:] for pixels in decoded])
        samples, erase = transform.plan(keys, *sizes.T)  # of all at once: drawing for one costs as much
        empty = []
        for row, pixels in enumerate(decoded):
            if pixels is None:
                empty.append(row)
            else:
                out[row] = render(pixels, samples[row], out.shape[1:3])
        erase[empty] = 0
        return erase, empty


def _decode(source: Source, index: int) -> torch.Tensor | None:
    """uint8 (3, height, width); None for what is no image."""
    if isinstance(source, EncodedSource):
        data = source.read(index)
        if plain_jpeg_size(data) is not None and not (source.exif and b"Exif\0" in data):
            try:
                pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
                return pixels.expand(3, -1, -1)
            except RuntimeError:  # damaged
                pass
    try:
        return torch.from_numpy(np.array(source.load(index))).permute(2, 0, 1)
    except BadImageError:
        return None


def render(pixels: torch.Tensor, sample: np.void, size: tuple[int, int]) -> np.ndarray:
    """One sample of a decoded image, uint8 (3, height, width), as uint8 (H, W, 3)."""
    top, left, height, width = (int(sample[key]) for key in ("top", "left", "height", "width"))
    box = pixels[:, top : top + height, left : left + width]
    resized = _resize(box, (int(sample["resized_height"]), int(sample["resized_width"])), int(sample["filter"]))
    window_top, window_left = int(sample["window_top"]), int(sample["window_left"])
    window = resized[:, window_top : window_top + size[0], window_left : window_left + size[1]]
    if sample["flip"]:
        window = window.flip(2)
    image = window.permute(1, 2, 0).contiguous().numpy()
    operations = sample["ops"][: sample["num_ops"]]
    if not operations["kind"].any():
        return image
    return np.asarray(ops.apply_ops(Image.fromarray(image), operations, tuple(sample["fill"][:3].tolist())))


def _resize(pixels: torch.Tensor, size: tuple[int, int], filter_: int) -> torch.Tensor:
    if filter_ in TORCH_FILTERS:
        return torch.nn.functional.interpolate(pixels[None], size, mode=TORCH_FILTERS[filter_], antialias=True)[0]
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    return torch.from_numpy(np.array(image.resize(size[::-1], Image.Resampling(filter_)))).permute(2, 0, 1)
