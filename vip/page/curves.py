"""Charts over training: accuracy, loss, learning rate, speed, stability.

Of one run each kind of figure has its colour; of several, each run has one, which the head of the page shows.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vip.page.chart import Chart, Trace, color, shown, thinned
from vip.page.published import Published, published_for, published_lr
from vip.page.run import Run

FEW = 40  # points, up to which those of validations are marked
NOISY = 60  # points, from which a noisy curve has its mean
PERCENT: dict[str, Any] = {"ticksuffix": " %"}
FROM_ZERO: dict[str, Any] = {"rangemode": "tozero"}
LOG: dict[str, Any] = {"type": "log", "minorloglabels": "none"}


@dataclass(frozen=True)
class Plain:
    """A chart of one number of the training log; `hover` is how its value is said."""

    key: str
    title: str
    about: str
    hover: str
    yaxis: dict[str, Any] = field(default_factory=dict)
    is_noisy: bool = False
    scale: float = 1


SPEED = (
    Plain("images_per_s", "Throughput", "Images per second, all processes together.", "%{y:,.0f} images/s",
          FROM_ZERO | {"tickformat": "~s"}, is_noisy=True),
    Plain("data_wait", "Waiting for data", "Share of the time in which the network waits for images.", "%{y:.1f} %",
          FROM_ZERO | PERCENT, is_noisy=True, scale=100),
    Plain("mfu", "Model FLOPs utilisation", "Share of the device's peak arithmetic that the network uses.", "%{y:.1f} %",
          PERCENT | {"range": [0, 100]}, is_noisy=True, scale=100),
)  # fmt: skip
STABILITY = (
    Plain("grad_norm", "Gradient norm", "Before clipping; a logarithmic scale.", "%{y:.3g}", LOG, is_noisy=True),
    Plain("loss_scale", "Loss scale", "Of fp16; halved where gradients overflow.", "%{y:,.0f}",
          LOG | {"dtick": math.log10(4), "tickformat": ".3~s"}),
)  # fmt: skip
IF_ANY = (
    Plain("skipped_steps", "Steps left out", "Not finite in loss or gradients; since the row of the log before.",
          "%{y:,.0f}", FROM_ZERO),
    Plain("bad_images", "Bad images", "Not decodable, others took their place; since the row of the log before.",
          "%{y:,.0f}", FROM_ZERO),
)  # fmt: skip
IF_CHANGING = (Plain("drop_path", "Stochastic depth", "The drop rate of the last block.", "%{y:.3f}", FROM_ZERO),)


def learning(runs: Sequence[Run]) -> list[Chart]:
    return _present(_accuracy(runs), *_losses(runs), _learning_rate(runs), _top5(runs))


def speed(runs: Sequence[Run]) -> list[Chart]:
    return _present(*(_plain(runs, chart) for chart in SPEED))


def stability(runs: Sequence[Run]) -> list[Chart]:
    values = {chart.key: _values(runs, f"train/{chart.key}") for chart in IF_ANY + IF_CHANGING}
    rare = [chart for chart in IF_ANY if any(values[chart.key])]
    rare += [chart for chart in IF_CHANGING if len(set(values[chart.key])) > 1]
    return _present(*(_plain(runs, chart) for chart in (*STABILITY, *rare)))


def _accuracy(runs: Sequence[Run]) -> Chart | None:
    about = "Validation images whose likeliest class is the label, each counted once."
    known = {found.name: found for run in runs if (found := published_for(run)) is not None}
    if known:
        about += " The published run is marked where its log is known."
    data = _validated(runs, "top1", "%{y:.2f} %")
    chart = _chart(runs, "top1", "Top-1 accuracy", about, data, PERCENT)
    if chart is not None:
        chart.wide, chart.height = True, 360
        for found in known.values():
            chart.data.append(_published_points(found))
            chart.layout["shapes"].append(_released_line(found))
            chart.layout["showlegend"] = len(runs) == 1
    return chart


def _published_points(found: Published) -> Trace:
    points = sorted(found.log)
    return {
        "type": "scatter",
        "mode": "markers",
        "name": f"{found.name} published",
        "x": [epoch + 1 for epoch, _ in points],  # row 0 is what the first epoch has led to
        "y": [top1 for _, top1 in points],
        "marker": {"symbol": "diamond", "size": 9, "color": "$ink"},
        "text": [f"{top1:.3f} % in row {epoch} of the published log" for epoch, top1 in points],
        "hovertemplate": "%{text}<extra></extra>",
        "meta": {"run": 0, "reference": True},
    }


def _released_line(found: Published) -> dict[str, Any]:
    label = {"text": f"{found.name} released: {found.released:.2f} %", "textposition": "start"}
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": found.released,
        "y1": found.released,
        "line": {"color": "$muted", "width": 1, "dash": "dot"},
        "label": label | {"font": {"size": 11, "color": "$muted"}},
    }


def _top5(runs: Sequence[Run]) -> Chart | None:
    about = "Validation images whose label is among the five likeliest classes."
    return _chart(runs, "top5", "Top-5 accuracy", about, _validated(runs, "top5", "%{y:.2f} %"), PERCENT)


def _losses(runs: Sequence[Run]) -> list[Chart | None]:
    """Training and validation in one chart; of several runs, in two."""
    training = [
        trace
        for place, run in enumerate(runs)
        for trace in _curve(runs, place, "train/loss", "training" if len(runs) == 1 else run.name, "%{y:.4f}", is_noisy=True)
    ]  # fmt: skip
    validated = _validated(runs, "loss", "%{y:.4f}")
    if len(runs) > 1:
        about = "Of augmented, mixed images with smoothed labels."
        return [
            _chart(runs, "loss", "Training loss", about, training),
            _chart(runs, "val-loss", "Validation loss", "Of whole images and their labels.", validated),
        ]
    about = "Training images are augmented, mixed and softly labelled: their loss may well stay above the validation's."
    return [_chart(runs, "loss", "Loss", about, training + validated)]


def _learning_rate(runs: Sequence[Run]) -> Chart | None:
    about = "Of the last step."
    data = [
        trace for place in range(len(runs)) for trace in _curve(runs, place, "train/lr", runs[place].name, "%{y:.3g}")
    ]
    chart = _chart(runs, "lr", "Learning rate", about, data, FROM_ZERO)
    if chart is not None and any(published_for(run) for run in runs):
        epochs, rates = published_lr()
        chart.data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "published",
                "x": epochs,
                "y": rates,
                "line": {"color": "$muted", "dash": "dot", "shape": "hv", "width": 1.5},
                "hovertemplate": "%{y:.3g}",
                "meta": {"run": 0, "reference": True},
            }
        )
        chart.about += " Published: a global batch of 2048, a new rate each epoch."
        chart.layout["showlegend"] = len(runs) == 1
    return chart


def _plain(runs: Sequence[Run], plain: Plain) -> Chart | None:
    data = []
    for place, run in enumerate(runs):
        key = f"train/{plain.key}"
        data += _curve(runs, place, key, run.name, plain.hover, is_noisy=plain.is_noisy, scale=plain.scale)
    return _chart(runs, plain.key, plain.title, plain.about, data, plain.yaxis)


def _validated(runs: Sequence[Run], key: str, hover: str) -> list[Trace]:
    """Of one run the figures of both weights, of several of those that decide."""
    if len(runs) == 1:
        return [
            *_curve(runs, 0, f"val/{key}", "validation", hover, paint=color(1), is_marked=True),
            *_curve(runs, 0, f"val_ema/{key}", "averaged weights", hover, paint=color(2), is_marked=True),
        ]
    return [
        trace
        for place, run in enumerate(runs)
        for trace in _curve(runs, place, f"{run.decisive}/{key}", run.name, hover, is_marked=True)
    ]


def _curve(
    runs: Sequence[Run],
    place: int,
    key: str,
    name: str,
    hover: str,
    *,
    paint: str | None = None,
    is_marked: bool = False,
    is_noisy: bool = False,
    scale: float = 1,
) -> list[Trace]:
    """One figure of runs[place], nothing where it has none. A noisy one is its mean, faintly upon itself if there is room."""
    series = runs[place].series(key)
    if series.last is None:
        return []
    values = [None if value is None else value * scale for value in series.values]
    x, y = thinned(series.epochs, values)
    trace: Trace = {
        "type": "scatter",
        "mode": "lines+markers" if len(x) == 1 or (is_marked and len(x) <= FEW) else "lines",
        "name": shown(name, 40),
        "x": x,
        "y": y,
        "line": {"color": paint or color(place), "width": 2},
        "marker": {"size": 5},
        "hovertemplate": hover,
        "meta": {"run": place},
    }
    if not is_noisy or len(values) <= NOISY:
        return [trace]
    faint = trace | {"opacity": 0.3, "line": trace["line"] | {"width": 1}, "showlegend": False}
    x, y = thinned(series.epochs, _means(values))
    mean = trace | {"x": x, "y": y, "hovertemplate": hover + " (mean)"}
    return [faint, mean] if len(runs) == 1 else [mean]


def _means(values: Sequence[float | None]) -> list[float | None]:
    """Of the finite values around each: a hundredth of all, at least five."""
    reach = max(len(values) // 200, 2)
    sums, counts = [0.0], [0]
    for value in values:
        sums.append(sums[-1] + (value or 0))
        counts.append(counts[-1] + (value is not None))
    found: list[float | None] = []
    for place in range(len(values)):
        low, high = max(place - reach, 0), min(place + reach + 1, len(values))
        num = counts[high] - counts[low]
        found.append((sums[high] - sums[low]) / num if num else None)
    return found


def _chart(
    runs: Sequence[Run], key: str, title: str, about: str, data: list[Trace], yaxis: dict[str, Any] | None = None
) -> Chart | None:
    """With the resume points of each run; x ends where the runs do, whatever the published log has beyond. None without data."""
    if not data:
        return None
    ends = [
        f"{trace['name']} ends at {next(y for y in reversed(trace['y']) if y is not None):.4g}"
        for trace in data
        if trace.get("showlegend", True)
    ]
    layout: dict[str, Any] = {
        "yaxis": dict(yaxis or {}),
        "hovermode": "x unified",
        "showlegend": len(runs) == 1 and len(ends) > 1,
        "ends": [run.last_epoch for run in runs],
        "shapes": [],
        "annotations": [],
    }
    if any(layout["ends"]):
        layout["xaxis"] = {"range": [0, max(layout["ends"])]}
    for place, start in _resumes(runs):
        x = start["step"] * runs[place].per_step("epoch")
        paint = "$muted" if len(runs) == 1 else color(place)
        mark = {"x": x, "yref": "paper", "y": 1, "yanchor": "bottom", "text": "↻", "showarrow": False, "run": place}
        words = _resume_words(runs[place], start)
        layout["annotations"].append(mark | {"hovertext": words, "font": {"size": 13, "color": paint}})
        line = {"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "run": place}
        layout["shapes"].append(line | {"line": {"color": paint, "width": 1, "dash": "dash"}})
    alt = f"{title} over training: {'; '.join(ends)}"
    return Chart(key, title, about, data, layout, over_training=True, height=290, alt=alt)


def _resumes(runs: Sequence[Run]) -> Iterator[tuple[int, dict[str, Any]]]:
    return ((place, start) for place, run in enumerate(runs) for start in run.starts if start["step"] > 0)


def _resume_words(run: Run, start: dict[str, Any]) -> str:
    when = str(start.get("time", ""))[:16].replace("T", " ")
    processes = start.get("world_size")
    on = f", on {processes} process{'es' if processes != 1 else ''}" if processes else ""
    return shown(f"{run.name} went on from step {start['step']:,}{', ' + when if when else ''}{on}")


def _present(*charts: Chart | None) -> list[Chart]:
    return [chart for chart in charts if chart is not None]


def _values(runs: Sequence[Run], key: str) -> list[float]:
    return [value for run in runs for value in run.series(key).values if value is not None]
