"""Charts of the newest validation: classes, confusions, calibration."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from vip.page.chart import Chart, Trace, color, shown
from vip.page.run import Run

FEW_CLASSES = 40  # up to which every class has a bar
NUM_WORST = 20
NAME_WIDTH = 22  # characters of a class on an axis
PERCENT: dict[str, Any] = {"range": [0, 103], "ticksuffix": " %"}


class Row(NamedTuple):
    """One class in the validation images."""

    name: str
    num: int
    correct: int

    @property
    def percent(self) -> float:
        return 100 * self.correct / self.num

    @property
    def words(self) -> str:
        return f"{shown(self.name)}: {self.correct:,} of {self.num:,} right, {self.percent:.1f} %"


def classes(runs: Sequence[Run]) -> list[Chart]:
    """Of one run all charts, of several those that can be laid over each other."""
    if len(runs) > 1:
        charts = [_sorted_classes(runs), _calibration(runs)]
    elif len(_rows(runs[0])) <= FEW_CLASSES:
        charts = [_class_bars(runs[0]), _confusions(runs[0]), _calibration(runs)]
    else:
        charts = [_sorted_classes(runs), _worst(runs[0]), _confusions(runs[0]), _calibration(runs)]
    return [chart for chart in charts if chart is not None]


def _rows(run: Run) -> list[Row]:
    """The classes that have images, in class order."""
    counts = run.validation.get("per_class") or []
    names = run.classes if len(run.classes) == len(counts) else [str(place) for place in range(len(counts))]
    return [Row(name, num, correct) for name, (num, correct) in zip(names, counts, strict=True) if num]


def _class_bars(run: Run) -> Chart | None:
    rows = _rows(run)
    if not rows:
        return None
    bars: Trace = {
        "type": "bar",
        "name": "accuracy",
        "x": list(range(len(rows))),
        "y": [row.percent for row in rows],
        "text": [f"{row.percent:.1f}" for row in rows],
        "textangle": 0,
        "marker": {"color": "$series-1"},
        "customdata": [row.words for row in rows],
        "hovertemplate": "%{customdata}<extra></extra>",
        "meta": {"run": 0},
    }
    xaxis = {"tickvals": bars["x"], "ticktext": [shown(row.name, NAME_WIDTH) for row in rows]}
    layout = {"xaxis": xaxis, "yaxis": PERCENT, "hovermode": "closest"}
    alt = f"Accuracies of {len(rows)} classes; the lowest: {min(rows, key=lambda row: row.percent).words}"
    return Chart("per-class", "Accuracy of each class", "", [bars], layout, wide=True, alt=alt)


def _sorted_classes(runs: Sequence[Run]) -> Chart | None:
    data: list[Trace] = []
    for place, run in enumerate(runs):
        if rows := sorted(_rows(run), key=lambda row: row.percent):
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": shown(run.name, 40),
                    "x": list(range(1, len(rows) + 1)),
                    "y": [round(row.percent, 3) for row in rows],
                    "line": {"color": color(place), "width": 2, "shape": "hv"},
                    "customdata": [row.words for row in rows],
                    "hovertemplate": "%{customdata}<extra></extra>",
                    "meta": {"run": place},
                }
            )
    if not data:
        return None
    if len(runs) == 1:
        data[0] |= {"fill": "tozeroy", "fillcolor": "$band"}
    layout = {"xaxis": {"title": {"text": "classes, worst first"}}, "yaxis": PERCENT, "hovermode": "closest"}
    about = "Sorted: a long low start on the left are classes that fail."
    alt = f"Sorted accuracies of {len(data[0]['x'])} classes"
    return Chart("per-class", "Accuracy of all classes", about, data, layout, height=300, alt=alt)


def _worst(run: Run) -> Chart:
    rows = sorted(_rows(run), key=lambda row: row.percent)[:NUM_WORST]
    title = f"The {NUM_WORST} worst classes"
    values, words = [row.percent for row in rows], [row.words for row in rows]
    return _bars(
        "worst", title, "", [row.name for row in rows], values, words, "$series-2", PERCENT | {"range": [0, 100]}
    )


def _confusions(run: Run) -> Chart | None:
    found = (run.validation.get("confusions") or [])[:NUM_WORST]
    if not found:
        return None
    names = [f"{_short(label)} → {_short(predicted)}" for label, predicted, _ in found]
    words = [f"{shown(label)} taken for {shown(predicted)}: {count:,} times" for label, predicted, count in found]
    about = "Label → what the network says, and how often."
    xaxis: dict[str, Any] = {"tickformat": ",d", "rangemode": "tozero"}
    counts = [count for _, _, count in found]
    if max(counts) <= 10:
        xaxis["dtick"] = 1  # else ticks fall between the counts
    return _bars("confusions", "Most frequent confusions", about, names, counts, words, "$series-4", xaxis)


def _short(name: object) -> str:
    text = " ".join(str(name).split())
    return text if len(text) <= NAME_WIDTH // 2 + 2 else text[: NAME_WIDTH // 2 + 1] + "…"


def _bars(
    key: str,
    title: str,
    about: str,
    names: list[str],
    values: Sequence[float],
    words: list[str],
    paint: str,
    xaxis: dict[str, Any],
) -> Chart:
    """Horizontal bars, the first at the top, at numbered places: two classes may have one name."""
    bars: Trace = {
        "type": "bar",
        "orientation": "h",
        "name": title,
        "y": list(range(len(names))),
        "x": values,
        "marker": {"color": paint},
        "customdata": words,
        "hovertemplate": "%{customdata}<extra></extra>",
        "meta": {"run": 0},
    }
    labels = {"tickvals": bars["y"], "ticktext": [shown(name, NAME_WIDTH + 6) for name in names]}
    yaxis = labels | {"autorange": "reversed", "showgrid": False}
    layout = {"xaxis": xaxis | {"showgrid": True}, "yaxis": yaxis, "hovermode": "closest"}
    height = 60 + 18 * max(len(names), 6)
    return Chart(key, title, about, [bars], layout, height=height, alt=f"{title}; the first: {words[0]}")


def _calibration(runs: Sequence[Run]) -> Chart | None:
    data: list[Trace] = []
    errors = []
    for place, run in enumerate(runs):
        bins = [row for row in run.validation.get("calibration") or [] if row[0] and None not in row]
        if bins:
            data.append(_calibration_points(run, place, bins))
        if (error := run.validation.get("calibration_error")) is not None:
            errors.append((f"{run.name} " if len(runs) > 1 else "") + f"{100 * error:.1f} %")
    if not data:
        return None
    ideal: Trace = {
        "type": "scatter",
        "mode": "lines",
        "x": [0, 100],
        "y": [0, 100],
        "line": {"color": "$muted", "dash": "dash", "width": 1},
        "hoverinfo": "skip",
        "meta": {"run": 0, "reference": True},
    }
    axis = {"range": [-3, 103], "ticksuffix": " %"}
    layout = {
        "xaxis": axis | {"title": {"text": "confidence"}},
        "yaxis": axis | {"title": {"text": "share that is right"}},
        "hovermode": "closest",
    }
    about = "Below the dashed line the network is too sure of itself, above it too modest. Larger points: more images."
    if errors:
        about += f" Expected calibration error: {', '.join(errors)}."
    alt = f"Confidence against the share that is right; calibration error {', '.join(errors) or 'unknown'}"
    return Chart("calibration", "Calibration", about, [ideal, *data], layout, height=340, alt=alt)


def _calibration_points(run: Run, place: int, bins: list[list[float]]) -> Trace:
    total = sum(row[0] for row in bins)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": shown(run.name, 40),
        "x": [100 * row[1] for row in bins],
        "y": [100 * row[2] for row in bins],
        "line": {"color": color(place), "width": 2},
        "marker": {"size": [6 + 12 * (row[0] / total) ** 0.5 for row in bins]},
        "customdata": [f"{n:,} images, {100 * sure:.1f} % sure, {100 * right:.1f} % right" for n, sure, right in bins],
        "hovertemplate": "%{customdata}<extra></extra>",
        "meta": {"run": place},
    }
