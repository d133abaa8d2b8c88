"""One interface for everything that watches a run; rank 0 alone has trackers that do anything."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import BeforeValidator, Field

Record = Mapping[str, float]
View = Mapping[str, Any]
Text = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, int | float) else value)]


@dataclass(frozen=True)
class TrackingConfig:
    kind: Annotated[
        Literal["local", "wandb", "tensorboard"],
        Field(description="local: files in the run folder and the console; wandb, tensorboard: there as well"),
    ]
    mode: Annotated[Literal["online", "offline"], Field(description="wandb: send now, or keep for `wandb sync`")] = (
        "online"
    )
    project: Annotated[Text, Field(description="wandb: the project's name")] = "vision-permutator"
    group: Annotated[Text | None, Field(description="wandb: runs that belong together; null: none")] = None
    tags: Annotated[tuple[Text, ...], Field(description="wandb: words to find the run by")] = ()
    notes: Annotated[Text | None, Field(description="wandb: a sentence about the run; null: none")] = None
    artifacts: Annotated[bool, Field(description="wandb: send the best checkpoint as an artifact, too")] = False


class Tracker(Protocol):
    """What the trainer tells; `step` counts finished optimizer steps."""

    def log(self, step: int, record: Record) -> None:
        """Metrics at `step`: `epoch` (finished epochs, fractional), `images` seen and `train/...` or `val/...` values."""

    def show(self, step: int, view: View) -> None:
        """What there is to see at `step` beside numbers, as JSON would have it; `view["view"]` says what it is (vip/views.py)."""

    def rewind(self, step: int) -> None:
        """The run goes back to `step`: what was told of later steps did not happen."""

    def close(self, status: str) -> None:
        """The run ends here: `done`, `interrupted` or `failed`."""


class Fanout:
    """Several trackers as one; none for the ranks that stay silent."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self.trackers = trackers

    def __bool__(self) -> bool:
        return bool(self.trackers)

    def log(self, step: int, record: Record) -> None:
        for tracker in self.trackers:
            tracker.log(step, record)

    def show(self, step: int, view: View) -> None:
        for tracker in self.trackers:
            tracker.show(step, view)

    def rewind(self, step: int) -> None:
        for tracker in self.trackers:
            tracker.rewind(step)

    def close(self, status: str) -> None:
        for tracker in self.trackers:
            tracker.close(status)
