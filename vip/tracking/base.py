"""One interface for everything that watches a run; rank 0 alone has trackers that do anything."""

from collections.abc import Mapping, Sequence
from typing import Protocol

Record = Mapping[str, float]


class Tracker(Protocol):
    """What the trainer tells; `step` counts finished optimizer steps."""

    def log(self, step: int, record: Record) -> None:
        """Metrics at `step`: `epoch` (finished epochs, fractional) and `train/...` or `val/...` values."""

    def rewind(self, step: int) -> None:
        """The run goes back to `step`: what was told of later steps did not happen."""

    def close(self, status: str) -> None:
        """The run ends here: `done`, `interrupted` or `failed`."""


class Fanout:
    """Several trackers as one; none for the ranks that stay silent."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self.trackers = trackers

    def log(self, step: int, record: Record) -> None:
        for tracker in self.trackers:
            tracker.log(step, record)

    def rewind(self, step: int) -> None:
        for tracker in self.trackers:
            tracker.rewind(step)

    def close(self, status: str) -> None:
        for tracker in self.trackers:
            tracker.close(status)
