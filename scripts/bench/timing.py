"""Interleaved measuring: all candidates in turn, several rounds, medians; so that a machine that slows down slows all of them."""

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(
    candidates: Mapping[str, Callable[[], int]],
    rounds: int,
    clock: Callable[[], float] = time.process_time,
    warm_up: bool = True,
) -> dict[str, float]:
    """Items per second of each candidate, the median over `rounds`.

    Args:
        candidates: each call does some work and returns how many items it was.
        clock: `time.process_time` counts this process' cores, `time.perf_counter` the wall's.
        warm_up: call each once before.
    """
    if warm_up:
        for work in candidates.values():
            work()
    speeds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, work in candidates.items():
            begun = clock()
            num_items = work()
            speeds[name].append(num_items / (clock() - begun))
    return {name: statistics.median(values) for name, values in speeds.items()}
