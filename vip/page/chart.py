"""A chart as plotly.js takes it: plain dicts. Colours are `$names` of CSS variables, which page.js fills in for each theme."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_POINTS = 2000  # of a curve; more would be drawn on the same pixels
NUM_COLORS = 8
Trace = dict[str, Any]


@dataclass
class Chart:
    """Each trace's `meta` says which `run` it is of, and whether it is a `reference`.

    `over_training`: x is the number of finished epochs, which the page can turn into images or steps.
    """

    key: str
    title: str
    about: str
    data: list[Trace]
    layout: dict[str, Any] = field(default_factory=dict)
    over_training: bool = False
    wide: bool = False
    height: int = 300
    alt: str = ""

    def for_page(self) -> dict[str, Any]:
        return {
            "key": self.key, "data": self.data, "layout": self.layout, "height": self.height,
            "overTraining": self.over_training,
        }  # fmt: skip


def color(number: int) -> str:
    return f"$series-{number % NUM_COLORS + 1}"


def shown(text: object, width: int = 200) -> str:
    """Text for a chart, cut to `width` characters: plotly reads some HTML in labels, so names must not look like any."""
    flat = " ".join(str(text).split())
    return html.escape(flat if len(flat) <= width else flat[: width - 1] + "…", quote=False)


def thinned(x: Sequence[float], y: Sequence[float | None]) -> tuple[list[float], list[float | None]]:
    """A curve of at most MAX_POINTS points, to six digits: the ends, every dip and peak, and the gaps stay."""
    x, y = [float(f"{value:.8g}") for value in x], [None if value is None else float(f"{value:.6g}") for value in y]
    if len(x) <= MAX_POINTS:
        return x, y
    size = -(-len(x) // (MAX_POINTS // 5))
    kept: set[int] = set()
    for start in range(0, len(x), size):
        places = range(start, min(start + size, len(x)))
        finite = sorted((value, place) for place in places if (value := y[place]) is not None)
        kept |= {places[0], places[-1], *(place for _, place in (finite[:1] + finite[-1:]))}
        kept |= set([place for place in places if y[place] is None][:1])
    order = sorted(kept)
    return [x[place] for place in order], [y[place] for place in order]
