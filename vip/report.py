"""What an evaluation found, for people (a table), programs (eval.json) and the curious (predictions.csv)."""

import csv
import json
import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data.sources import Source
from vip.evaluate import Evaluation


def report_evaluation(result: Evaluation, images: Source, facts: dict[str, str], out: Path) -> None:
    """Print the table and write `eval.json` (`facts` and figures) and `predictions.csv` into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    metrics = {
        key: value if math.isfinite(value) else None for key, value in result.metrics().items()
    }  # JSON has no NaN
    figures = {"images": result.num_images, **metrics}
    (out / "eval.json").write_text(json.dumps(facts | figures, indent=2) + "\n")
    _write_predictions(result, images, out / "predictions.csv")
    title = f"{facts['model']} on {facts['data']}, {facts['checkpoint']} ({facts['weights']})"
    table = Table(title=title, title_justify="left")
    for name in ("images", "top-1", "top-5", "loss"):
        table.add_column(name, justify="right")
    table.add_row(f"{result.num_images:,}", f"{result.top1:.3f} %", f"{result.top5:.3f} %", f"{result.loss:.6f}")
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(table)
    console.print(f"written: {out / 'eval.json'}, {out / 'predictions.csv'}")


def _write_predictions(result: Evaluation, images: Source, path: Path) -> None:
    """One line an image: its name, its label, and its five (or all) likeliest classes with their probabilities."""
    names = images.class_names
    places = range(min(result.top_classes.shape[1], len(names)))
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "label", *(f"{what}{k + 1}" for k in places for what in ("top", "probability"))])
        for i, (classes, probabilities) in enumerate(
            zip(result.top_classes.tolist(), result.top_probabilities.tolist(), strict=True)
        ):
            top = [value for k in places for value in (names[classes[k]], f"{probabilities[k]:.6f}")]
            rows.writerow([images.name(i), names[int(images.labels[i])], *top])
