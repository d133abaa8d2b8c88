"""Memory that a network on a CPU takes and frees at every step."""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MOST = 2**31 - 1
MOST_MAPPED = 1 << 25  # bytes, the most that older glibc takes for M_MMAP_THRESHOLD


def keep_freed_memory() -> None:
    """Have glibc keep what this process frees; elsewhere, or where MALLOC_* variables rule, nothing is done.

    Otherwise it hands large tensors back to the system, whose pages are cleared and faulted in again at every step.
    """
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:  # musl has none
            mallopt(M_TRIM_THRESHOLD, MOST)
            mallopt(M_MMAP_THRESHOLD, MOST) or mallopt(M_MMAP_THRESHOLD, MOST_MAPPED)
