"""Validation images are tried before a run counts on them."""

from pathlib import Path

import pytest
from PIL import Image

from data.config import DataConfig
from data.preflight import CHUNK, check_validation, undecodable
from data.sources import Source, open_source

NUM_IMAGES = 3 * CHUNK + 5


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """Four files are no good: truncated, a web page, too large, gone after they were listed."""
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        for number in range(NUM_IMAGES):
            Image.effect_noise((16, 16), 20).save(tmp_path / split / "cat" / f"{number:03d}.png")
    folder = tmp_path / "val" / "cat"
    source = open_source(DataConfig(kind="folder", root=str(tmp_path)), "val")
    (folder / "003.png").write_bytes((folder / "003.png").read_bytes()[:100])
    (folder / "040.png").write_bytes(b"<html></html>")
    header = bytearray((folder / "041.png").read_bytes())
    header[16:24] = b"\0\1\0\0\0\1\0\0"
    (folder / "041.png").write_bytes(bytes(header))
    (folder / f"{NUM_IMAGES - 1}.png").unlink()
    return source


EXPECTED = ["cat/003.png", "cat/040.png", "cat/041.png", f"cat/{NUM_IMAGES - 1}.png"]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_bad_validation_image_is_found_with_its_reason(source: Source, workers: int) -> None:
    found = undecodable(source, workers)
    assert [name for name, _ in found] == EXPECTED
    reasons = dict(found)
    assert "not one of JPEG" in reasons["cat/040.png"]
    assert reasons[EXPECTED[-1]] == "No such file or directory"
    assert all(reason and "\n" not in reason for reason in reasons.values())


@pytest.mark.parametrize("world", [2, 3, 200])
def test_the_ranks_share_the_images(source: Source, world: int) -> None:
    shares = [undecodable(source, 0, rank, world) for rank in range(world)]
    assert sorted(name for share in shares for name, _ in share) == EXPECTED


def test_a_bad_validation_set_is_refused_in_one_line(source: Source) -> None:
    with pytest.raises(
        ValueError, match=rf"^4 of {NUM_IMAGES} validation images cannot be decoded: cat/003.png \("
    ) as caught:
        check_validation(source, 2)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(" ...; replace them, for figures without them compare with no others")
    with pytest.raises(ValueError, match=r"^1 of .* in the share of rank 40: cat/040.png"):
        check_validation(source, 0, rank=40, world=NUM_IMAGES)


def test_a_whole_validation_set_passes(digits: tuple[Source, Source]) -> None:
    check_validation(digits[1], 2)
