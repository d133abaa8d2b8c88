"""Blocks of a pack are in the page cache before they are asked for."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.order import WINDOW, EpochOrder
from data.pack import PackSource
from data.readahead import ReadAhead, ranges
from tests.data.made_pack import describe, write_pack

PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def pack(tmp_path: Path) -> PackSource:
    write_pack(tmp_path / "train", 60)
    return PackSource(tmp_path / "train")


def test_the_ranges_of_a_block_hold_its_records_and_no_others(pack: PackSource) -> None:
    for start, stop in ((0, 60), (7, 15), (15, 45), (59, 70), (20, 20)):
        found = sorted(
            (int(pack.fds[i]), int(pack.offsets[i]), int(pack.lengths[i])) for i in range(start, min(stop, 60))
        )
        joined = list(ranges(pack, start, stop))
        assert sum(length for *_, length in joined) == sum(length for *_, length in found)
        assert len(joined) == len({fd for fd, *_ in found})
        for fd, offset, length in found:
            assert any(fd == of and begin <= offset and offset + length <= begin + size for of, begin, size in joined)


def in_cache(fd: int, offset: int) -> bool:
    """Whether the page at `offset` can be had without waiting for the disk."""
    try:
        return os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False


def wait_until(condition: Callable[[], bool]) -> bool:
    patience = time.monotonic() + 20
    while not (met := condition()) and time.monotonic() < patience:
        time.sleep(0.01)
    return met


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="the system cannot say what is in the page cache")
def test_announced_blocks_are_in_the_page_cache_before_they_are_read(tmp_path: Path) -> None:
    """Of a pack with one page to a record, also in a forked process."""
    num_images = 2 * WINDOW
    write_pack(tmp_path / "train", 4)
    index = np.repeat(np.load(tmp_path / "train/index.npy")[:1], num_images)
    index["offset"], index["length"] = np.arange(num_images) * PAGE, PAGE
    np.save(tmp_path / "train/index.npy", index)
    path = tmp_path / "train/data-00000.bin"
    path.write_bytes(os.urandom(num_images * PAGE))
    describe(tmp_path / "train", num_images)
    source = PackSource(tmp_path / "train")
    fd = int(source.fds[0])
    os.fsync(os.open(path, os.O_RDWR))
    order = EpochOrder(num_images, seed=3, block=1)
    for epoch in range(2):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if sum(in_cache(fd, at * PAGE) for at in range(0, num_images, 64)):
            pytest.skip("the file system keeps its files in memory")
        ahead = ReadAhead(source, order)
        coming = order.coming(epoch, 0, 50)
        if epoch == 0:
            ahead.reach(epoch, 0, 50)
        elif (pid := os.fork()) == 0:
            ahead.reach(epoch, 0, 50)
            time.sleep(30)
            os._exit(0)
        assert wait_until(lambda blocks=coming: all(in_cache(fd, block * PAGE) for block in blocks.tolist()))
        if epoch == 1:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
