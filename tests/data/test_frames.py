"""JPEGs in segments: the pixels stay to the last bit, whole or cut, and bytes that lie about themselves do no harm."""

import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFile

from data import native
from data.decode import decode_rgb
from data.ops import SAMPLE

if not native.available():
    pytest.skip(native.reason(), allow_module_level=True)

from data.native import ODD, OK, UNREADABLE, frames

# How many luma samples a JPEG has for each chroma sample, across and down, as its header says.
SAMPLINGS = {"4:4:4": (1, 1), "4:2:2": (2, 1), "4:2:0": (2, 2), "4:4:0": (1, 2), "4:1:1": (4, 1), "1x4": (1, 4)}
ALIKE = {"4:4:0": "4:2:2", "4:1:1": "4:2:0", "1x4": "4:2:0"}  # has as many blocks in an MCU


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """Gradients, edges and a little noise."""
    stream = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(y / stream.uniform(2, 40) + x / stream.uniform(2, 40) + phase) for phase in range(3)]
    noise = stream.normal(0, 6, (height, width, 3))
    return (128 + 90 * np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8)


def encode(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def jpeg(
    height: int, width: int, sampling: str = "4:2:0", quality: int = 90, seed: int = 0, **options: object
) -> bytes:
    """A JPEG of that size. Those samplings that Pillow cannot write are others' data under a header of their own."""
    if sampling == "gray":
        return encode(Image.fromarray(picture(height, width, seed)).convert("L"), quality=quality, **options)
    if sampling not in ALIKE:
        return encode(Image.fromarray(picture(height, width, seed)), quality=quality, subsampling=sampling, **options)
    (across, down), (own_across, own_down) = SAMPLINGS[ALIKE[sampling]], SAMPLINGS[sampling]
    mcus = -(-height // (8 * own_down)), -(-width // (8 * own_across))
    other = bytearray(jpeg(mcus[0] * 8 * down, mcus[1] * 8 * across, ALIKE[sampling], quality, seed, **options))
    frame = max(other.find(b"\xff\xc0\0\x11\x08"), other.find(b"\xff\xc2\0\x11\x08"))
    other[frame + 5 : frame + 9] = height.to_bytes(2) + width.to_bytes(2)
    other[frame + 11] = own_across << 4 | own_down
    return bytes(other)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(decode_rgb(data, "test"))


@pytest.fixture(autouse=True)
def room_for_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's writer fails where a small image takes more bytes than its buffer."""
    monkeypatch.setattr(ImageFile, "MAXBLOCK", 1 << 22)


ANY_JPEG = st.builds(
    lambda height, width, sampling, quality, seed, progressive: jpeg(
        height, width, sampling, quality, seed, progressive=progressive and sampling not in ALIKE
    ),
    st.integers(1, 200),
    st.integers(1, 400),
    st.sampled_from([*SAMPLINGS, "gray"]),
    st.integers(20, 98),
    st.integers(0, 1000),
    st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(ANY_JPEG, st.sampled_from([1, 64, 10_000]), st.data())
def test_reframed_whole_and_cut_give_the_pixels_of_the_original(
    original: bytes, segment_pixels: int, data: st.DataObject
) -> None:
    ImageFile.MAXBLOCK = 1 << 22
    expected = pixels(original)
    framed = frames.reframe(original, segment_pixels)
    assert framed is not None
    record, head = framed
    assert np.array_equal(pixels(record), expected)
    assert record[head - 1 : head] == b"\0"  # the last byte of the scan's header
    height, width = expected.shape[:2]
    for _ in range(4):
        top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
        box = top, left, data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left))
        made = frames.cut(record, *box)
        assert made is not None
        smaller, y, x = made
        found = pixels(smaller)[y : y + box[2], x : x + box[3]]
        assert np.array_equal(found, expected[top : top + box[2], left : left + box[3]]), box


@pytest.mark.parametrize("sampling", [*SAMPLINGS, "gray"])
def test_every_box_of_a_small_image_is_exact(sampling: str) -> None:
    original = jpeg(35, 52, sampling, seed=3)  # the last MCUs of a row are 4 pixels wide
    expected = pixels(original)
    record, _ = frames.reframe(original, 8) or pytest.fail("not re-framed")
    for top in range(35):
        for left in range(52):
            smaller, y, x = frames.cut(record, top, left, 2, 3) or pytest.fail("not cut")
            height, width = min(2, 35 - top), min(3, 52 - left)
            found = pixels(smaller)[y : y + height, x : x + width]
            assert np.array_equal(found, expected[top : top + height, left : left + width]), (top, left)


@pytest.mark.parametrize("sampling", ["4:2:0", "4:4:4"])
def test_a_cut_holds_little_more_than_its_box_and_the_whole_takes_no_more_than_before(sampling: str) -> None:
    original = jpeg(375, 500, sampling, quality=92)
    record, head = frames.reframe(original) or pytest.fail("not re-framed")
    assert len(record) < len(original)
    smaller, _, _ = frames.cut(record, 100, 100, 150, 200) or pytest.fail("not cut")
    assert len(smaller) - head < 0.32 * len(record)  # the box is 16 % of the image, its segments 27 %


def test_a_row_without_a_good_divisor_is_one_segment() -> None:
    record, head = frames.reframe(jpeg(500, 375, "4:4:4")) or pytest.fail("not re-framed")  # 47 MCUs
    assert b"\xff\xdd\0\x04\0\x2f" in record[:head]


def test_orientation_and_colours_survive_and_other_metadata_goes() -> None:
    image, exif = Image.fromarray(picture(40, 60, 1)), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    extras = {"exif": exif.tobytes(), "icc_profile": b"profile" * 100, "comment": b"a comment"}
    tagged = encode(image, **extras)
    record, _ = frames.reframe(tagged) or pytest.fail("not re-framed")
    assert b"profile" not in record
    assert b"a comment" not in record
    assert np.array_equal(decode_rgb(record, "", exif=True), decode_rgb(tagged, "", exif=True))
    assert decode_rgb(record, "", exif=True).size == (40, 60)
    as_rgb = encode(image, keep_rgb=True, quality=90)  # not turned into YCbCr: a marker says so
    record, _ = frames.reframe(as_rgb) or pytest.fail("not re-framed")
    assert np.array_equal(pixels(record), pixels(as_rgb))
    smaller, y, x = frames.cut(record, 20, 20, 9, 9) or pytest.fail("not cut")
    assert np.array_equal(pixels(smaller)[y : y + 9, x : x + 9], pixels(as_rgb)[20:29, 20:29])


def odd_files() -> dict[str, bytes]:
    image = Image.fromarray(picture(48, 64, 0))
    png = io.BytesIO()
    image.save(png, "PNG")
    good = encode(image)
    damaged = good[:-200] + b"\xff\xd3" + good[-198:]
    return {
        "cmyk": encode(image.convert("CMYK")),
        "png": png.getvalue(),
        "truncated": good[:-50],
        "damaged": damaged,
        "no scan": good[:200],
        "empty": b"",
        "short": good[:3],
        "text": b"no image at all",
    }


@pytest.mark.parametrize("what", odd_files())
def test_what_is_not_plain_is_left_as_it_is(what: str) -> None:
    assert frames.reframe(odd_files()[what]) is None
    assert frames.cut(odd_files()[what], 0, 0, 8, 8) is None


def test_a_cut_needs_a_table_that_fits_and_a_box_that_begins_inside() -> None:
    original = jpeg(64, 128)
    record, head = frames.reframe(original) or pytest.fail("not re-framed")
    assert frames.cut(original, 0, 0, 8, 8) is None
    assert frames.cut(record[:-1], 0, 0, 8, 8) is None
    assert frames.cut(record[:head], 0, 0, 8, 8) is None
    for box in ((64, 0, 8, 8), (0, 128, 8, 8), (-1, 0, 8, 8), (0, -1, 8, 8), (0, 0, 0, 8), (0, 0, 8, -5)):
        assert frames.cut(record, *box) is None
    beyond, _, _ = frames.cut(record, 50, 100, 1 << 30, 1 << 30) or pytest.fail("not cut")
    assert np.array_equal(pixels(beyond)[-14:, -28:], pixels(original)[50:, 100:])


def samples(boxes: list[tuple[int, int, int, int]], size: int) -> np.ndarray:
    made = np.zeros(len(boxes), SAMPLE)
    for number, box in enumerate(boxes):
        made["top"][number], made["left"][number], made["height"][number], made["width"][number] = box
    made["resized_height"] = made["resized_width"] = size
    made["filter"] = int(Image.Resampling.BICUBIC)
    return made


class Records:
    """Records in one file, as a pack has them."""

    def __init__(self, path: Path, records: list[tuple[bytes, int]]) -> None:
        path.write_bytes(b"before" + b"".join(content for content, _ in records))
        self.fd = os.open(path, os.O_RDONLY)
        self.lengths = np.array([len(content) for content, _ in records])
        self.offsets = len(b"before") + np.cumsum(self.lengths) - self.lengths
        self.heads = np.array([head for _, head in records])

    def load(self, planned: np.ndarray, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
        out = np.zeros((len(planned), size, size, 3), np.uint8)
        fds = np.full(len(planned), self.fd)
        return out, frames.load_pack(fds, self.offsets, self.lengths, self.heads, planned, out)


@pytest.fixture
def jpegs() -> list[bytes]:
    kinds = [*SAMPLINGS, "gray"] * 4
    return [jpeg(90 + 13 * number, 300 - 7 * number, kind, seed=number) for number, kind in enumerate(kinds)]


def boxes_of(jpegs: list[bytes]) -> list[tuple[int, int, int, int]]:
    stream = np.random.default_rng(0)
    found = []
    for data in jpegs:
        width, height = Image.open(io.BytesIO(data)).size
        top, left = int(stream.integers(height - 8)), int(stream.integers(width - 8))
        found.append((top, left, int(stream.integers(8, height - top + 1)), int(stream.integers(8, width - left + 1))))
    return found


def test_samples_from_a_pack_are_those_of_the_files(jpegs: list[bytes], tmp_path: Path) -> None:
    planned = samples(boxes_of(jpegs), 32)
    planned["flip"][::2] = 1
    expected = np.zeros((len(jpegs), 32, 32, 3), np.uint8)
    assert (native.load(jpegs, planned, expected) == OK).all()
    framed = [frames.reframe(data) or pytest.fail("not re-framed") for data in jpegs]
    for records in (framed, [(content, 0) for content, _ in framed], [(data, 0) for data in jpegs]):
        found, status = Records(tmp_path / "records", records).load(planned)
        assert (status == OK).all()
        assert np.array_equal(found, expected)


def test_samples_of_raw_records_are_those_of_their_pixels(tmp_path: Path) -> None:
    image = picture(50, 70, 0)
    ppm = b"P6\n70 50\n255\n" + image.tobytes()
    head = len(ppm) - image.size
    boxes = [(0, 0, 50, 70), (10, 20, 30, 40), (49, 69, 1, 1), (40, 60, 99, 99)]
    planned = samples(boxes, 16)
    found, status = Records(tmp_path / "records", [(ppm, head)] * 4).load(planned, 16)
    for number in range(3):
        expected = np.zeros((16, 16, 3), np.uint8)
        native.render(image, planned[number], expected)
        assert status[number] == OK
        assert np.array_equal(found[number], expected)
    lies = [
        (ppm, head - 1),
        (ppm[:-1], head),
        (b"P6\n0070 50\n255\n" + ppm[head:], head),
        (b"P6\n-7 -5 255\n" + bytes(105), 13),
    ]
    _, status = Records(tmp_path / "lies", lies).load(planned, 16)
    assert (status == ODD).all()


def test_many_threads_load_what_one_does(jpegs: list[bytes], tmp_path: Path) -> None:
    records = Records(tmp_path / "records", [frames.reframe(data) or pytest.fail("not re-framed") for data in jpegs])
    planned = samples(boxes_of(jpegs), 32)
    expected, _ = records.load(planned)
    with ThreadPoolExecutor(4) as threads:
        for found, status in threads.map(lambda _: records.load(planned), range(40)):
            assert (status == OK).all()
            assert np.array_equal(found, expected)


def test_a_file_that_is_short_or_no_file_is_unreadable(jpegs: list[bytes], tmp_path: Path) -> None:
    record = frames.reframe(jpegs[0]) or pytest.fail("not re-framed")
    records = Records(tmp_path / "records", [record, (record[0], 0)])
    planned = samples([(40, 40, 30, 30)] * 2, 32)
    os.truncate(tmp_path / "records", len(record[0]) // 2)
    assert (records.load(planned)[1] == UNREADABLE).all()
    os.close(records.fd)
    records.fd = -1
    assert (records.load(planned)[1] == UNREADABLE).all()


def test_records_that_lie_about_themselves_do_no_harm(tmp_path: Path) -> None:
    stream = np.random.default_rng(0)
    outcomes = set()
    for number in range(400):
        record, head = frames.reframe(jpeg(70, 150, ["4:2:0", "4:4:4", "gray"][number % 3])) or pytest.fail(
            "not re-framed"
        )
        lying = np.frombuffer(record, np.uint8).copy()
        for at in stream.integers(head if number % 4 else len(record), size=number % 4):
            lying[at] = stream.choice([0, 255, stream.integers(256)])
        content = lying.tobytes()[: None if number % 5 else int(stream.integers(1, len(record)))]
        top, left, height, width = map(int, stream.integers((-5, -5, 1, 1), (80, 160, 200, (400, 1 << 31)[number % 2])))
        box = top, left, height, width
        made = frames.cut(content, *box)
        outcomes.add("cut" if made else "refused")
        head = int(stream.choice([head, head, head, 0, 2, -5, len(content), 1 << 30]))
        _, status = Records(tmp_path / "records", [(content, head)]).load(samples([box], 32))
        outcomes.add(int(status[0]))
    assert {"cut", "refused", OK, ODD} <= outcomes
