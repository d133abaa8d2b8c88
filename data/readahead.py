"""Has the kernel read the blocks of a pack that are coming (`EpochOrder.coming`) in large pieces, ahead of their use.

They wait in the page cache, where every process of the node finds them. These are hints: without them, or where the memory does
not hold a window of blocks, a record is read when it is asked for.
"""

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator
from queue import SimpleQueue

from data.order import EpochOrder
from data.pack import PackSource

PIECE = 128 << 10  # bytes: of a longer range some kernels read no more than this, their usual window


class ReadAhead:
    """Announces the blocks of `source` in the order of `order`, from a thread of its own in whatever process asks."""

    def __init__(self, source: PackSource, order: EpochOrder) -> None:
        self.source = source
        self.order = order
        self._process = 0  # whose thread it is: none survives a fork
        self._asked: SimpleQueue[tuple[int, int, int] | None] = SimpleQueue()

    def reach(self, epoch: int, start: int, stop: int) -> None:
        """The positions `start` to `stop` of `epoch` are about to be loaded. Returns at once."""
        if self._process != os.getpid():
            self._process, self._asked = os.getpid(), SimpleQueue()
            threading.Thread(target=_serve, args=(self.source, self.order, self._asked), daemon=True).start()
            weakref.finalize(self, self._asked.put, None)
        self._asked.put((epoch, start, stop))


def _serve(source: PackSource, order: EpochOrder, asked: "SimpleQueue[tuple[int, int, int] | None]") -> None:
    """The life of the thread, which does not know the object whose end is its own."""
    while positions := asked.get():
        for block in order.coming(*positions).tolist():
            for fd, offset, length in ranges(source, block * order.block, (block + 1) * order.block):
                announce(fd, offset, length)


def ranges(source: PackSource, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Open file, offset and length of what holds the records `start` to `stop`, as few ranges as they lie in."""
    rows = sorted(
        zip(*(column[start:stop].tolist() for column in (source.fds, source.offsets, source.lengths)), strict=True)
    )
    fd, first, end = -1, 0, 0
    for file, offset, length in rows:
        if (file, offset) != (fd, end):
            if end > first:
                yield fd, first, end - first
            fd, first = file, offset
        end = offset + length
    if end > first:
        yield fd, first, end - first


def announce(fd: int, offset: int, length: int) -> None:
    if hasattr(os, "posix_fadvise"):  # not on macOS
        for at in range(offset, offset + length, PIECE):
            with contextlib.suppress(OSError):
                os.posix_fadvise(fd, at, min(PIECE, offset + length - at), os.POSIX_FADV_WILLNEED)
