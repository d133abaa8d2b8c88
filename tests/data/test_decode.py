"""Decoding: images of every mode and size, bad content, trouble with reading, and a few thousand damaged files."""

import io
import os
import pickle
import resource
import struct
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from data import decode
from data.config import DataConfig
from data.decode import BadImageError, ImageReadError, decode_rgb, read_file
from data.sources import open_source
from scripts.faults.images import fuzz_decoder

LEVELS = np.array([[0, 128, 255]], np.uint8)
GRAY = [(0, 0, 0), (128, 128, 128), (255, 255, 255)]
TRANSLUCENT = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)
ON_WHITE = [(200, 0, 0), (255, 255, 255), (204, 204, 204)]
COLOUR = (200, 30, 60)


def _palette() -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([200, 0, 0, 1, 2, 3, 0, 0, 0])
    image.putdata([0, 1, 2])
    return image


def open_rgb(path: Path, exif: bool = False) -> Image.Image:
    return decode_rgb(read_file(path, str(path)), str(path), exif)


def pixels(image: Image.Image) -> list[tuple[int, ...]]:
    """Of the first row."""
    return [tuple(pixel) for pixel in np.asarray(image)[0].tolist()]


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (Image.fromarray(LEVELS), {}, GRAY),
        (Image.fromarray(LEVELS.astype(np.uint16) * 257), {}, GRAY),
        (Image.fromarray(TRANSLUCENT), {}, ON_WHITE),
        (_palette(), {"transparency": b"\xff\x00\x33"}, ON_WHITE),
        (_palette(), {}, [(200, 0, 0), (1, 2, 3), (0, 0, 0)]),
    ],
    ids=["gray", "16-bit gray is rescaled", "rgba", "palette-alpha", "palette"],
)
def test_png_modes(tmp_path: Path, image: Image.Image, options: dict, expected: list) -> None:
    image.save(tmp_path / "image.png", **options)
    decoded = open_rgb(tmp_path / "image.png")
    assert decoded.mode == "RGB"
    assert pixels(decoded) == expected


def test_16_bit_gray_keeps_its_range_and_order(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "image.png")
    assert np.asarray(open_rgb(tmp_path / "image.png"))[..., 0].ravel().tolist() == list(range(256))


def ycck(colour: tuple[int, int, int]) -> bytes:
    """A JPEG as image editors write it for print: C, M and Y as Y, Cb and Cr, and K.

    Pillow writes CMYK, inverted: so the planes are inverted here, and the file is marked as YCCK.
    """
    cmy = Image.new("RGB", (16, 16), tuple(255 - channel for channel in colour))
    planes = [plane.point(lambda value: 255 - value) for plane in cmy.convert("YCbCr").split()]
    buffer = io.BytesIO()
    Image.merge("CMYK", [*planes, Image.new("L", (16, 16), 0)]).save(buffer, "JPEG", quality=100)
    data = bytearray(buffer.getvalue())
    place = data.index(b"Adobe")
    assert data[place + 11] == 0
    data[place + 11] = 2
    return bytes(data)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "YCCK"])
def test_jpeg_modes(mode: str) -> None:
    expected = (100, 100, 100) if mode == "L" else COLOUR
    buffer = io.BytesIO()
    if mode != "YCCK":
        Image.new("RGB", (16, 16), expected).convert(mode).save(buffer, "JPEG", quality=100)
    data = ycck(expected) if mode == "YCCK" else buffer.getvalue()
    decoded = decode_rgb(data, "image.jpg")
    assert decoded.mode == "RGB"
    assert np.abs(np.asarray(decoded).astype(int) - expected).max() <= 4


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_extreme_sizes_decode(tmp_path: Path, size: tuple[int, int], kind: str) -> None:
    Image.new("RGB", size, COLOUR).save(tmp_path / "image", kind)
    assert open_rgb(tmp_path / "image").size == size


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_broken_icc_profile_changes_nothing(tmp_path: Path, kind: str) -> None:
    image = Image.effect_noise((32, 32), 50).convert("RGB")
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[10:200] = bytes(190)
    image.save(tmp_path / "plain", kind)
    image.save(tmp_path / "broken", kind, icc_profile=bytes(profile))
    assert open_rgb(tmp_path / "broken").tobytes() == open_rgb(tmp_path / "plain").tobytes()


def test_a_png_named_jpeg_decodes(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), COLOUR).save(tmp_path / "image.JPEG", "PNG")
    assert pixels(open_rgb(tmp_path / "image.JPEG"))[0] == COLOUR


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_animations_give_their_first_frame(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "image", kind, save_all=True, append_images=frames[1:], lossless=True)
    assert Image.open(tmp_path / "image").n_frames == 2  # type: ignore[attr-defined]
    assert pixels(open_rgb(tmp_path / "image"))[0] == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_followed_only_where_it_is_asked_for(orientation: int, kind: str) -> None:
    upright = Image.new("RGB", (48, 32), "black")
    upright.paste("red", (0, 0, 16, 16))
    upright.paste("blue", (32, 16, 48, 32))
    undo = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}  # the others are their own inverse
    turn = undo.get(orientation, decode.TURNED.get(orientation))
    stored = upright if turn is None else upright.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    stored.save(buffer, kind, exif=exif, quality=100, subsampling=0, lossless=True)
    plain, turned = (decode_rgb(buffer.getvalue(), "image", exif) for exif in (False, True))
    assert (plain.size, turned.size) == (stored.size, upright.size)
    assert np.abs(np.asarray(plain).astype(int) - np.asarray(stored)).max() < 30
    assert np.abs(np.asarray(turned).astype(int) - np.asarray(upright)).max() < 30


def test_damaged_exif_is_no_damage_to_the_image() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 4)).save(buffer, "JPEG", exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff" + bytes(range(40)))
    assert decode_rgb(buffer.getvalue(), "image", exif=True).size == (8, 4)


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_exif_key_reaches_both_splits(tmp_path: Path, split: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        Image.new("RGB", (8, 4)).save(tmp_path / part / "a" / "image.jpg", exif=exif)
    for turn, size in ((False, (8, 4)), (True, (4, 8))):
        source = open_source(DataConfig(kind="folder", root=str(tmp_path), exif=turn), split)  # type: ignore[arg-type]
        assert source.load(0).size == size


NOISE = Image.effect_noise((64, 64), 50)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("damage", ["truncated", "html", "empty", "random"])
def test_bad_content_is_named(tmp_path: Path, kind: str, damage: str) -> None:
    path = tmp_path / "image.jpg"
    NOISE.save(path, kind)
    whole = path.read_bytes()
    html = b"<html>404 Not Found</html>" * 50
    path.write_bytes(
        {"truncated": whole[: len(whole) // 2], "html": html, "empty": b"", "random": bytes(range(256))}[damage]
    )
    with pytest.raises(BadImageError, match=r"cannot decode .*image.jpg \(.*\): replace or remove the file") as caught:
        open_rgb(path)
    assert "\n" not in str(caught.value)
    assert " at 0x" not in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.name, again.reason) == (str(caught.value), caught.value.name, caught.value.reason)


def bomb(width: int, height: int) -> bytes:
    """A PNG that is all header."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("limit", [Image.MAX_IMAGE_PIXELS, None], ids=["pillow's limit", "none in pillow"])
def test_a_decompression_bomb_is_refused_before_memory_is_taken(
    monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadImageError, match="pixels"):
        decode_rgb(bomb(20_000, 20_000), "bomb.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB; decoded it would be 1.6 million


def test_a_large_image_decodes_without_a_warning() -> None:
    buffer = io.BytesIO()
    Image.new("1", (10_000, 9_500)).save(buffer, "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_rgb(buffer.getvalue(), "large.png").size == (10_000, 9_500)


def test_formats_that_run_programs_are_no_images() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "EPS")
    with pytest.raises(BadImageError, match="not one of JPEG, PNG"):
        decode_rgb(buffer.getvalue(), "image.jpg")


def test_too_little_memory_is_not_taken_for_bad_content() -> None:
    """Else another image would stand in for it, on this machine today and on no other."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, resource.RLIM_INFINITY))
        try:
            decode_rgb(bomb(13_000, 13_000), "large.png")
        except Exception as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        assert said.read().startswith("ImageReadError: cannot read large.png (not enough memory to decode it)")
    os.waitpid(pid, 0)


LASTING = {"missing": "No such file", "folder": "Is a directory", "fifo": "not a regular", "device": "not a regular"}


@pytest.mark.parametrize("what", list(LASTING))
def test_what_waiting_cannot_help_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(decode, "RETRY_WAITS_S", (1e6,))  # a retry would hang
    path = tmp_path / "image.jpg"
    if what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    with pytest.raises(ImageReadError, match=rf"cannot read .*image.jpg \({LASTING[what]}.*\): check the file"):
        open_rgb(path)


def test_an_io_error_that_passes_is_waited_for(tmp_path: Path) -> None:
    """The first page of a process's memory is a regular file's content that gives a real EIO."""
    path, good = tmp_path / "image.png", tmp_path / "good.png"
    path.symlink_to("/proc/self/mem")
    Image.new("RGB", (8, 8), COLOUR).save(good)

    def repair() -> None:
        time.sleep(0.2)
        good.replace(path)

    repairing = threading.Thread(target=repair)
    repairing.start()
    assert pixels(open_rgb(path))[0] == COLOUR
    repairing.join()


def test_an_io_error_that_stays_is_named_and_is_not_bad_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "RETRY_WAITS_S", (0.01, 0.02))
    path = tmp_path / "image.png"
    path.symlink_to("/proc/self/mem")
    with pytest.raises(ImageReadError, match=r"cannot read .*image.png \(Input/output error, in each of 3 attempts\)"):
        open_rgb(path)


def test_thousands_of_damaged_files_decode_to_rgb_or_are_refused() -> None:
    result = fuzz_decoder(3000, seed=1)
    assert result.decoded > 300
    assert result.bad > 300
    assert result.growth_mib < 100
    assert result.slowest_s < 60
