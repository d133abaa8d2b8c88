"""Puts the page together: one file with its style, its script, plotly.js, the charts' data and the pictures in it."""

import base64
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vip.page import curves, figures
from vip.page.chart import Chart, color
from vip.page.classes import classes
from vip.page.gates import gates
from vip.page.run import Run, read_run

HERE = Path(__file__).parent
PICTURE = re.compile(r"data:image/(?:jpeg|png|webp);base64,[A-Za-z0-9+/]+=*")


@dataclass(frozen=True)
class Section:
    key: str
    title: str
    about: str
    charts: list[Chart]

    @property
    def columns(self) -> str:
        """Three charts side by side where that leaves no gap, else two; one alone has the row."""
        num = sum(not chart.wide for chart in self.charts)
        return "one" if num == 1 else "thirds" if num % 3 == 0 else "halves"


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Write one HTML file about the runs in `folders`: of one everything there is to see, of several a comparison.

    The file needs no other and no network. It appears whole or not at all. Raises ValueError where a folder is none of a run.
    """
    runs = [read_run(Path(folder)) for folder in folders]
    if not runs:
        raise ValueError("no run folder given; give runs/<name>")
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = str(run.folder)
    page = _render(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def _render(runs: list[Run]) -> str:
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {"figures": figures, "picture": _picture, "color": lambda n: color(n).replace("$", "--")}
    sections = _sections(runs)
    charts = [chart for section in sections for chart in section.charts]
    plotly = (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    script = (HERE / "page.js").read_text(encoding="utf-8")
    return environment.get_template("page.html").render(
        title=runs[0].name if len(runs) == 1 else f"Comparison of {len(runs)} runs",
        runs=runs,
        run=runs[0],
        sections=sections,
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        plotly=Markup(plotly),
        script=Markup(script),
        hashes=[_hash(plotly), _hash(script)],
        data=_json({"charts": [chart.for_page() for chart in charts], "units": [_units(run) for run in runs]}),
    )


def _sections(runs: list[Run]) -> list[Section]:
    found = [
        Section("learning", "Learning", "", curves.learning(runs)),
        Section("speed", "Speed", "", curves.speed(runs)),
        Section("stability", "Stability", "", curves.stability(runs)),
        Section("classes", "Classes", figures.newest(runs[0]) if len(runs) == 1 else "", classes(runs)),
    ]
    if len(runs) == 1:
        about = "How each block weighs its three branches (means over channels; the three add up to one)."
        found.append(Section("gates", "Gates", about, gates(runs[0])))
    return [section for section in found if section.charts]


def _units(run: Run) -> dict[str, float]:
    """What one epoch is in the units of the x axis."""
    epoch = run.per_step("epoch")
    return {"epoch": 1, "images": run.per_step("images") / epoch, "step": 1 / epoch}


def _picture(text: object) -> str | None:
    """A picture that is within the page, or None: nothing else may be loaded."""
    return text if isinstance(text, str) and PICTURE.fullmatch(text) else None


def _json(data: Any) -> Markup:
    """JSON that cannot end the script element which holds it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _hash(script: str) -> str:
    """What the page's policy names a script by: no other script can run in it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
