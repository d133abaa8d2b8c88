"""The native core against Pillow: the same pixels from the same bytes, whatever the JPEG, the crop and the number of threads."""

import io
import os
import random
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import native
from data.ops import SAMPLE, Kind
from tests.data.made_jpegs import made_jpeg

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason())

FACTORS = {
    "4:4:4": [(1, 1), (1, 1), (1, 1)],
    "4:4:4 in doubled factors": [(2, 1), (2, 1), (2, 1)],
    "4:2:2": [(2, 1), (1, 1), (1, 1)],
    "4:2:0": [(2, 2), (1, 1), (1, 1)],
    "4:4:0": [(1, 2), (1, 1), (1, 1)],
    "4:1:1": [(4, 1), (1, 1), (1, 1)],
    "4:1:0": [(4, 2), (1, 1), (1, 1)],
    "tall chroma": [(1, 4), (1, 1), (1, 1)],
    "unequal chroma": [(2, 2), (2, 1), (1, 2)],
    "finer chroma than luma": [(1, 1), (2, 2), (2, 2)],
    "gray": [(1, 1)],
    "gray with factors": [(2, 2)],
}


def pixels(height: int, width: int, seed: int) -> np.ndarray:
    """uint8 (height, width, 3): smooth, with edges and noise, as photographs have them."""
    generator = np.random.default_rng(seed)
    image = np.full((height, width, 3), 128.0)
    for cell in (2, 8, 32, 128):
        coarse = generator.integers(0, 256, (height // cell + 2, width // cell + 2, 3), np.uint8)
        fine = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        image += (np.asarray(fine) - 127.5) * cell**0.5 / 12
    image[height // 3 :, width // 2 :] += 60
    return (image + generator.normal(0, 4, image.shape)).clip(0, 255).astype(np.uint8)


def jpeg(image: np.ndarray, mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).convert(mode).save(file, "JPEG", **({"quality": 92} | options))
    return file.getvalue()


def by_pillow(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def sample(box: tuple[int, int, int, int], resized: tuple[int, int], **fields: int) -> np.ndarray:
    """(1,) of type SAMPLE; `box` is (top, left, height, width)."""
    made = np.zeros(1, SAMPLE)
    made["top"], made["left"], made["height"], made["width"] = box
    made["resized_height"], made["resized_width"] = resized
    made["filter"] = Image.Resampling.BILINEAR
    for name, value in fields.items():
        made[name] = value
    return made


def load(data: bytes, made: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, int]:
    out = np.zeros((1, *size, 3), np.uint8)
    status = native.load([data], made, out)
    return out[0], int(status[0])


def check_regions(data: bytes, draw: random.Random, count: int) -> None:
    """A box resized to its own size is what the decoder gave."""
    whole = np.asarray(by_pillow(data))
    height, width = whole.shape[:2]
    for number in range(count):
        most = (height, width) if number % 3 else (min(height, 5), min(width, 5))  # small ones lie at any border
        size = draw.randint(1, most[0]), draw.randint(1, most[1])
        top, left = draw.randint(0, height - size[0]), draw.randint(0, width - size[1])
        out, status = load(data, sample((top, left, *size), size), size)
        assert status == native.OK
        np.testing.assert_array_equal(out, whole[top : top + size[0], left : left + size[1]])


@pytest.mark.parametrize("kind", FACTORS)
def test_a_region_has_the_pixels_of_a_full_decode(kind: str) -> None:
    draw = random.Random(kind)
    for number in range(24):
        height, width, restart = draw.randint(1, 90), draw.randint(1, 110), draw.choice([0, 0, 1, 3, 7])
        check_regions(made_jpeg(height, width, FACTORS[kind], restart, number), draw, 24)
    check_regions(made_jpeg(70, 96, FACTORS[kind], 0, 99), draw, 200)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}, {"optimize": True}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_region_has_the_pixels_of_a_full_decode_of_files_by_pillow(mode: str, options: dict[str, int]) -> None:
    draw = random.Random(1)
    for number in range(12):
        image = pixels(draw.randint(1, 150), draw.randint(1, 200), number)
        check_regions(jpeg(image, mode, subsampling=number % 3, **options), draw, 24)


@pytest.mark.parametrize("transform", [0, 1])
def test_an_adobe_marker_says_whether_three_components_are_rgb(transform: int) -> None:
    check_regions(made_jpeg(40, 50, FACTORS["4:4:4"], adobe=transform, seed=5), random.Random(0), 10)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Decibels."""
    error = np.square(one.astype(np.float64) - other).mean()
    return np.inf if error == 0 else 10 * np.log10(255**2 / error)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_crop_is_resized_as_by_pillow(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 400))
    box = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top, left = data.draw(st.integers(0, height - box[0])), data.draw(st.integers(0, width - box[1]))
    resized = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
    window = data.draw(st.integers(1, resized[0])), data.draw(st.integers(1, resized[1]))
    at = data.draw(st.integers(0, resized[0] - window[0])), data.draw(st.integers(0, resized[1] - window[1]))
    resampling = data.draw(st.sampled_from([Image.Resampling.BILINEAR, Image.Resampling.BICUBIC]))
    flip = data.draw(st.booleans())
    image = pixels(height, width, data.draw(st.integers(0, 99)))

    expected = Image.fromarray(image).crop((left, top, left + box[1], top + box[0])).resize(resized[::-1], resampling)
    expected = expected.crop((at[1], at[0], at[1] + window[1], at[0] + window[0]))
    if flip:
        expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    made = sample(
        (top, left, *box), resized, filter=resampling, flip=flip, window_top=at[0], window_left=at[1]
    )  # fmt: skip
    out = np.zeros((*window, 3), np.uint8)
    native.render(image, made[0], out)
    assert np.abs(out.astype(int) - np.asarray(expected)).max() <= 2  # one in each pass
    if out.size > 300:
        assert psnr(out, np.asarray(expected)) >= 50


def test_samples_as_training_and_evaluation_draw_them_are_as_by_pillow() -> None:
    for number in range(24):
        data = jpeg(pixels(375, 500, number), subsampling=number % 3)
        whole = by_pillow(data)
        resampling = Image.Resampling.BICUBIC if number % 2 else Image.Resampling.BILINEAR
        made = sample((30, 50, 300, 260 + 8 * number), (224, 224), filter=resampling, flip=number % 2)
        out, status = load(data, made, (224, 224))
        crop = whole.crop((50, 30, 310 + 8 * number, 330)).resize((224, 224), resampling)
        expected = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if number % 2 else crop
        assert status == native.OK
        assert psnr(out, np.asarray(expected)) >= 60
        made = sample((0, 0, 375, 500), (256, 341), filter=resampling, window_top=16, window_left=58)
        out, status = load(data, made, (224, 224))
        expected = whole.resize((341, 256), resampling).crop((58, 16, 282, 240))
        assert status == native.OK
        assert psnr(out, np.asarray(expected)) >= 60


def batch(num: int) -> tuple[list[bytes], np.ndarray]:
    kinds = [{"subsampling": k % 3, "progressive": k % 5 == 0} for k in range(num)]
    jpegs = [jpeg(pixels(90 + 5 * k, 130 - 2 * k, k), **kind) for k, kind in enumerate(kinds)]
    made = [sample((k, k, 60, 50), (64, 64), flip=k % 2, num_ops=k % 3) for k in range(num)]
    for k, one in enumerate(made):
        one["ops"]["kind"] = (Kind.EQUALIZE, Kind.CONTRAST, *[Kind.NONE] * 6)
        one["ops"]["args"][:, :, 0] = 0.5 + k / 20
    return jpegs, np.concatenate(made)


@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_threads_change_nothing(num_threads: int) -> None:
    jpegs, samples = batch(24)
    alone = np.zeros((24, 64, 64, 3), np.uint8)
    assert not native.load(jpegs, samples, alone).any()
    together = np.zeros_like(alone)
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(10):
            together[:] = 0
            list(
                pool.map(
                    lambda k: native.load(jpegs[k : k + 3], samples[k : k + 3], together[k : k + 3]), range(0, 24, 3)
                )
            )
            np.testing.assert_array_equal(together, alone)


def test_operations_follow_the_resized_sample_and_render_does_the_same() -> None:
    jpegs, samples = batch(9)
    out = np.zeros((9, 64, 64, 3), np.uint8)
    assert not native.load([memoryview(file) for file in jpegs], samples, out).any()
    for file, made, done in zip(jpegs, samples, out, strict=True):
        plain = made.copy()
        plain["num_ops"] = 0
        expected, status = load(file, plain[None], (64, 64))
        native.apply_ops(expected, made["ops"][: made["num_ops"]], (1, 2, 3))
        assert status == native.OK
        np.testing.assert_array_equal(done, expected)
        rendered = np.zeros_like(done)
        native.render(np.asarray(by_pillow(file)), made, rendered)
        np.testing.assert_array_equal(done, rendered)


def patched(data: bytes, at: int, *values: int) -> bytes:
    """With other bytes from the frame header's marker + `at` on."""
    frame = next(k for k in range(len(data)) if data[k] == 0xFF and data[k + 1] in (0xC0, 0xC2))
    return data[: frame + at] + bytes(values) + data[frame + at + len(values) :]


def odd_files() -> dict[str, bytes]:
    image = pixels(60, 80, 0)
    plain, png = jpeg(image), io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    return {
        "empty": b"",
        "three bytes": plain[:3],
        "PNG": png.getvalue(),
        "CMYK": jpeg(image, "CMYK"),
        "truncated": plain[: len(plain) // 2],
        "cut short, with an end": plain[: len(plain) // 2] + b"\xff\xd9",
        "something behind the end": plain + b"\n",
        "header alone": plain[:400] + b"\xff\xd9",
        "arithmetic coding": patched(plain, 1, 0xC9),
        "12 bits": patched(plain, 4, 12),
        "two components": patched(plain, 9, 2),
        "no height": patched(plain, 5, 0, 0),
        "too many pixels": patched(plain, 5, 0xFF, 0xDC, 0xFF, 0xDC),
        "huge progressive": jpeg(np.zeros((4100, 4100), np.uint8), "L", progressive=True),
        "damaged": plain[:900] + b"\xff\xd5" + plain[902:],
    }


@pytest.mark.parametrize("kind", odd_files())
def test_whatever_is_not_plain_is_left_to_pillow(kind: str) -> None:
    assert load(odd_files()[kind], sample((0, 0, 60, 80), (32, 32)), (32, 32))[1] == native.ODD


def test_an_incomplete_progressive_file_is_left_to_pillow() -> None:
    data = jpeg(pixels(60, 80, 0), progressive=True)
    scans = [k for k in range(len(data) - 1) if data[k : k + 2] == b"\xff\xda"]
    assert len(scans) > 5
    for scan in scans[1:]:
        tables = data.rfind(b"\xff\xc4", 0, scan)
        short = data[: tables if tables > data.rfind(b"\xff\xda", 0, scan) else scan] + b"\xff\xd9"
        by_pillow(short).load()
        assert load(short, sample((0, 0, 60, 80), (32, 32)), (32, 32))[1] == native.ODD


def test_damage_below_the_region_does_not_matter() -> None:
    data = jpeg(pixels(300, 80, 0))
    damaged = data[:-400] + b"\xff\xd5" + data[-398:]
    made = sample((10, 10, 40, 60), (40, 60))
    good, status = load(damaged, made, (40, 60))
    assert status == native.OK
    np.testing.assert_array_equal(good, load(data, made, (40, 60))[0])
    assert load(damaged, sample((0, 0, 300, 80), (40, 60)), (40, 60))[1] == native.ODD


def test_sizes_come_from_the_header() -> None:
    jpegs = [jpeg(pixels(7, 300, 0), exif=bytes(50), icc_profile=bytes(3000)), b"", jpeg(pixels(9, 8, 1), "L")]
    jpegs.append(made_jpeg(33, 17, FACTORS["4:4:0"]))
    heights, widths, status = native.sizes(jpegs)
    assert heights.tolist() == [7, 0, 9, 33]
    assert widths.tolist() == [300, 0, 8, 17]
    assert status.tolist() == [native.OK, native.ODD, native.OK, native.OK]
    assert [len(part) for part in native.sizes([])] == [0, 0, 0]


@pytest.mark.parametrize(
    "fields",
    [
        {"top": -1}, {"left": -1}, {"top": 21}, {"left": 31}, {"height": 0}, {"width": -5}, {"height": 2**31 - 1},
        {"left": 2**31 - 1}, {"window_top": 1}, {"window_left": -1}, {"window_top": 2**31 - 1}, {"resized_width": 31},
        {"resized_height": -(2**31)}, {"filter": 1}, {"filter": 99}, {"num_ops": 9}, {"num_ops": -1},
    ],
)  # fmt: skip
def test_an_impossible_sample_is_refused(fields: dict[str, int]) -> None:
    image = pixels(60, 80, 0)
    possible = sample((20, 30, 40, 50), (32, 32))
    assert load(jpeg(image), possible, (32, 32))[1] == native.OK
    made = sample((20, 30, 40, 50), (32, 32), **fields)
    assert load(jpeg(image), made, (32, 32))[1] == native.ODD
    with pytest.raises(ValueError, match="does not fit"):
        native.render(image, made[0], np.zeros((32, 32, 3), np.uint8))


def test_arrays_of_another_kind_are_refused() -> None:
    data, made = jpeg(pixels(60, 80, 0)), sample((0, 0, 60, 80), (32, 32))
    for out in (np.zeros((1, 32, 32, 3)), np.zeros((2, 32, 32, 3), np.uint8), np.zeros((1, 3, 32, 32), np.uint8)):
        with pytest.raises(ValueError, match="is needed"):
            native.load([data], made, out)
    with pytest.raises(ValueError, match="is needed"):
        native.load([data], made, np.zeros((1, 32, 3, 32), np.uint8).transpose(0, 1, 3, 2))
    with pytest.raises(ValueError, match="one for each"):
        native.load([data], np.concatenate([made, made]), np.zeros((1, 32, 32, 3), np.uint8))


def test_nothing_is_leaked() -> None:
    resource = pytest.importorskip("resource")
    jpegs, samples = batch(9)
    jpegs += [data for kind, data in odd_files().items() if kind != "huge progressive"]
    samples = np.resize(samples, len(jpegs))
    out = np.zeros((len(jpegs), 64, 64, 3), np.uint8)

    def many(call: Callable[[], object]) -> int:
        for _ in range(300):
            call()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def on_a_new_thread() -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(native.load, jpegs, samples, out).result()

    for call in (lambda: native.load(jpegs, samples, out), on_a_new_thread):
        many(call)
        unit = 1 if sys.platform == "darwin" else 1024  # bytes
        grown = -many(call) + many(call)
        assert grown * unit < 1 << 20  # 7,000 files


def test_an_arena_reads_regular_files_and_nothing_else(tmp_path: Path) -> None:
    contents = [os.urandom(n) for n in (1, 4000, 900_000, 3_000_000)]
    paths = [tmp_path / f"file-\udcff-{k}" for k in range(4)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    odd = [tmp_path / name for name in ("missing", "fifo", "folder", "empty", "loop", "link")]
    os.mkfifo(odd[1])
    odd[2].mkdir()
    odd[3].touch()
    odd[4].symlink_to(odd[4])
    odd[5].symlink_to(paths[1])
    arena = native.Arena()
    for _ in range(2):
        views, status = arena.read([*paths, *odd])
        assert [view.tobytes() for view in views] == [*contents, *[b""] * 5, contents[1]]
        assert status.tolist() == [native.OK] * 4 + [native.UNREADABLE] * 5 + [native.OK]
    views, status = arena.read([str(paths[0]), os.fsencode(paths[1])])
    assert [view.tobytes() for view in views] == contents[:2]
    with pytest.raises(ValueError, match="null byte"):
        arena.read([f"{paths[0]}\0x"])
