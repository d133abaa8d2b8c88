"""Decoders: the same samples from each, and pixels as Pillow has them, whatever the file."""

import io
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import decoders, native
from data.augment import EvalTransform, TrainTransform
from data.config import AugmentConfig
from data.decode import ImageReadError, decode_rgb, plain_jpeg_size
from data.decoders import Decoder, NativeDecoder, TorchDecoder
from data.folder import FolderSource
from data.randomness import sample_key
from tests.data.reference import jpeg, photo, pillow_pixels, psnr

SIZE = (48, 40)
RECIPE = TrainTransform(AugmentConfig(), SIZE)
NO_OPS = TrainTransform(AugmentConfig(rand_augment=None), SIZE)
EXACT_DB = 50.0

each_decoder = pytest.mark.parametrize(
    "decoder",
    [
        TorchDecoder(),
        pytest.param(NativeDecoder(), marks=pytest.mark.skipif(not native.available(), reason=native.reason())),
    ],
    ids=["torch", "native"],
)


class Files:
    """Encoded images in memory."""

    class_names = ("one",)

    def __init__(self, files: list[bytes], exif: bool = False) -> None:
        self.files = files
        self.exif = exif
        self.labels = np.zeros(len(files), np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return f"file {index}"

    def read(self, index: int) -> bytes:
        return self.files[index]

    def load(self, index: int) -> Image.Image:
        return decode_rgb(self.files[index], self.name(index), self.exif)


def load(
    decoder: Decoder, source: Files | FolderSource, transform: TrainTransform | EvalTransform = RECIPE
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Pixels, boxes and empty rows of all files."""
    out = np.zeros((len(source), *transform.size, 3), np.uint8)
    keys = np.array([sample_key(0, 0, index) for index in range(len(source))])
    return out, *decoder.load(source, np.arange(len(source)), keys, transform, out)


def expected(source: Files, transform: TrainTransform | EvalTransform = RECIPE) -> tuple[np.ndarray, np.ndarray]:
    """The same through Pillow alone."""
    images = [source.load(index) for index in range(len(source))]
    keys = np.array([sample_key(0, 0, index) for index in range(len(source))])
    sizes = np.array([(image.height, image.width) for image in images]).T
    samples, erase = transform.plan(keys, *sizes)
    return np.stack([pillow_pixels(*pair, transform.size) for pair in zip(images, samples, strict=True)]), erase


def assert_like_pillow(decoder: Decoder, source: Files, transform: TrainTransform | EvalTransform = NO_OPS) -> None:
    pixels, erase, empty = load(decoder, source, transform)
    pillows, boxes = expected(source, transform)
    assert empty == []
    assert np.array_equal(erase, boxes)
    assert min(psnr(*pair) for pair in zip(pixels, pillows, strict=True)) >= EXACT_DB


PHOTO = photo(150, 200)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sixteen_bit() -> bytes:
    values = np.asarray(PHOTO.convert("L")).astype(np.uint16) * 257
    return encoded(Image.fromarray(values), "PNG")


KINDS: dict[str, bytes] = {
    "4:2:0": jpeg(PHOTO, quality=92),
    "4:4:4": jpeg(PHOTO, quality=92, subsampling="4:4:4"),
    "4:2:2": jpeg(PHOTO, quality=92, subsampling="4:2:2"),
    "gray": jpeg(PHOTO.convert("L")),
    "CMYK": jpeg(PHOTO.convert("CMYK")),
    "progressive": jpeg(PHOTO, progressive=True),
    "restart markers": jpeg(PHOTO, restart_marker_blocks=3),
    "odd size": jpeg(photo(101, 67)),
    "wide": jpeg(photo(1, 300)),
    "one pixel": jpeg(photo(4, 4).crop((0, 0, 1, 1))),
    "PNG": encoded(PHOTO, "PNG"),
    "palette": encoded(PHOTO.convert("P"), "PNG"),
    "alpha": encoded(Image.merge("RGBA", (*PHOTO.split(), PHOTO.getchannel("R"))), "PNG"),
    "16 bits": sixteen_bit(),
    "WebP": encoded(PHOTO, "WEBP"),
    "GIF": encoded(PHOTO, "GIF"),
    "no end": jpeg(PHOTO)[:-2] + b"\0\0" + b"\xff\xd9\0",
    "broken profile": jpeg(PHOTO, icc_profile=b"nonsense"),
}


@each_decoder
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_looks_as_pillow_shows_it(decoder: Decoder, kind: str) -> None:
    assert_like_pillow(decoder, Files([KINDS[kind]] * 6))
    assert_like_pillow(decoder, Files([KINDS[kind]]), EvalTransform(SIZE, 0.9))


@each_decoder
def test_the_whole_recipe_looks_as_pillow_shows_it(decoder: Decoder) -> None:
    source = Files([jpeg(photo(90 + index, 160 - index, index), quality=93) for index in range(60)])
    pixels, erase, _ = load(decoder, source)
    pillows, boxes = expected(source)
    assert np.array_equal(erase, boxes)
    # Equalising and posterising can make much of the last bit in which resizing differs.
    quality = [psnr(*pair) for pair in zip(pixels, pillows, strict=True)]
    assert np.median(quality) > EXACT_DB
    assert np.mean(np.array(quality) > 35) > 0.9


@settings(max_examples=40)
@given(height=st.integers(1, 260), width=st.integers(1, 260), seed=st.integers(0, 99), smooth=st.booleans())
def test_decoders_sample_alike(height: int, width: int, seed: int, smooth: bool) -> None:
    source = Files([jpeg(photo(height, width, seed), quality=95, subsampling="4:2:0" if smooth else "4:4:4")] * 3)
    chosen = [TorchDecoder(), *([NativeDecoder()] if native.available() else [])]
    for transform in (NO_OPS, EvalTransform(SIZE, 0.875)):
        pillows, boxes = expected(source, transform)
        for decoder in chosen:
            pixels, erase, empty = load(decoder, source, transform)
            assert np.array_equal(erase, boxes)
            assert empty == []
            assert min(psnr(*pair) for pair in zip(pixels, pillows, strict=True)) >= 45


@each_decoder
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"<html>",
        lambda data: b"\xff\xd8" + data[200:],
        lambda data: data[:2] + b"\xff\xd9",
    ],
    ids=["truncated", "empty", "HTML", "garbage", "nothing inside"],
)
def test_what_pillow_cannot_decode_stays_empty(decoder: Decoder, damage: Callable[[bytes], bytes]) -> None:
    good = KINDS["4:2:0"]
    pixels, erase, empty = load(decoder, Files([good, damage(good), good]))
    assert empty == [1]
    assert not erase[1].any()
    assert pixels[0].any()
    assert pixels[2].any()


@each_decoder
def test_flipped_bits_are_decoded_as_pillow_decodes_them(decoder: Decoder) -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        data = bytearray(KINDS["4:4:4"])
        for position in rng.integers(700, len(data) - 2, size=3).tolist():
            data[position] ^= 1 << int(rng.integers(8))
        source = Files([bytes(data)])
        try:
            pillows, _ = expected(source, EvalTransform(SIZE, 1.0))
        except ValueError:
            assert load(decoder, source, EvalTransform(SIZE, 1.0))[2] == [0]
            continue
        assert psnr(load(decoder, source, EvalTransform(SIZE, 1.0))[0], pillows) >= 40


@each_decoder
def test_a_bomb_is_refused(decoder: Decoder) -> None:
    data = bytearray(KINDS["4:2:0"])
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 20_000, 20_000)
    assert plain_jpeg_size(bytes(data)) is None
    assert load(decoder, Files([bytes(data)]))[2] == [0]


@each_decoder
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_orientation_counts_only_where_it_is_asked_for(decoder: Decoder, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(PHOTO, exif=exif)
    plain = load(decoder, Files([data]), EvalTransform(SIZE, 1.0))[0]
    upright = load(decoder, Files([data], exif=True), EvalTransform(SIZE, 1.0))[0]
    assert psnr(plain, load(decoder, Files([jpeg(PHOTO)]), EvalTransform(SIZE, 1.0))[0]) == np.inf
    assert (psnr(plain, upright) > EXACT_DB) == (orientation == 1)
    assert_like_pillow(decoder, Files([data], exif=True), EvalTransform(SIZE, 1.0))


@each_decoder
def test_rare_filters_of_evaluation_work(decoder: Decoder) -> None:
    assert_like_pillow(decoder, Files([KINDS["4:4:4"]]), EvalTransform(SIZE, 0.9, "lanczos"))


@each_decoder
def test_files_are_read_from_the_disk(decoder: Decoder, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for number, kind in enumerate(("4:2:0", "PNG", "4:4:4")):
        (tmp_path / "a" / f"{number}.jpg").write_bytes(KINDS[kind])
    source = FolderSource(tmp_path, ("a",))
    in_memory = Files([KINDS["4:2:0"], KINDS["PNG"], KINDS["4:4:4"]])
    assert np.array_equal(load(decoder, source)[0], load(decoder, in_memory)[0])
    (tmp_path / "a" / "2.jpg").unlink()
    with pytest.raises(ImageReadError, match=r"cannot read .*a/2.jpg \(No such file or directory\)"):
        load(decoder, source)


def test_the_native_decoder_is_refused_where_it_was_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "reason", lambda: "the native library was not built")
    with pytest.raises(
        ValueError, match=r"data.decoder=native: the native library was not built; or set data.decoder=auto"
    ):
        decoders.choose("native")
    assert decoders.choose("auto").name == "torch"


@each_decoder
def test_parts_that_are_off_are_off(decoder: Decoder) -> None:
    plain = TrainTransform(replace(AugmentConfig.none()), SIZE)
    assert_like_pillow(decoder, Files([KINDS["4:4:4"]]), plain)
