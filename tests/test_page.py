"""The report of a run: what is read, what is drawn and written. tests/e2e/test_report_page.py opens it in a browser."""

import importlib.util
import json
import random
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import ROOT
from tests.made_run import BLOCKS, make_run, make_vip_s7
from vip.page import figures, write_report
from vip.page.chart import MAX_POINTS, shown, thinned
from vip.page.classes import classes
from vip.page.curves import learning, stability
from vip.page.gates import gates
from vip.page.published import published_for, published_lr
from vip.page.run import read_run

HOSTILE = "</script><img src=x onerror=alert(1)><b>7</b>"


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text by element."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.inside = ""
        self.data = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = "data" if dict(attrs).get("id") == "data" else tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "data":
            self.data += data
        elif self.inside not in ("script", "style"):
            self.text.append(data)

    @property
    def charts(self) -> dict[str, dict[str, Any]]:
        return {chart["key"]: chart for chart in json.loads(self.data)["charts"]}

    def all_of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def report(*folders: Path) -> Page:
    out = folders[0].parent / "out" / "report.html"
    write_report(folders, out)
    return Page(out)


def test_a_run_folder_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "x", epochs=4, resumes=[22])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 44, "epoch": 4.0, "train/loss": null, "train/lr": NaN}\n[1]\n{"epoch": 3}\n{"step": 45, "trai'
        )
    run = read_run(folder)
    assert (run.name, run.model, run.last_step, run.total_steps) == ("x", "vip_tiny", 44, 44)
    assert [start["step"] for start in run.starts] == [0, 22]
    assert run.series("train/loss").values[-1] is None
    assert run.series("train/lr").values[-1] is None
    assert run.series("val/top1").epochs == [1.0, 2.0, 3.0, 4.0]
    assert sorted(run.gates) == [11, 22, 33, 44]
    assert run.validation["step"] == 44


def test_a_folder_that_is_no_run_is_one_line_of_error_and_exit_status_2(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"^{re.escape(str(folder))}: .*give runs/<name>$"):
            write_report([folder], tmp_path / "report.html")
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"^.*config.yaml: no YAML .*$"):
        read_run(tmp_path)
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/report.py"), "nowhere"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "report.py: error: nowhere: not a folder; give runs/<name>\n"


def test_the_script_says_where_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / "runs" / name, epochs=2)
    monkeypatch.chdir(tmp_path)
    for arguments, written in (
        (["runs/a"], "runs/a/report.html"),
        (["runs/a", "runs/b"], "runs/comparison.html"),
        (["runs/b", "--out", "deep/b.html"], "deep/b.html"),
    ):
        monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
        runpy.run_path(str(ROOT / "scripts/report.py"), run_name="__main__")
        assert capsys.readouterr().out.splitlines() == [written]
        assert (tmp_path / written).stat().st_size > 1_000_000
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("done", ["config alone", "no step", "three steps"])
def test_a_run_that_failed_early_has_a_page(tmp_path: Path, done: str) -> None:
    folder = make_run(tmp_path / "x", epochs=1, log_every=1)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:3]) if done == "three steps" else "")
    start = (folder / "views.jsonl").read_text().splitlines(keepends=True)[0]
    (folder / "views.jsonl").write_text(start)
    if done == "config alone":
        (folder / "metrics.jsonl").unlink()
        (folder / "views.jsonl").unlink()
    page = report(folder)
    text = " ".join(page.text)
    if done == "three steps":
        assert "at step 3 of 11" in text
        assert page.charts["loss"]["data"][0]["x"] == pytest.approx([1 / 11, 2 / 11, 3 / 11])
        assert "top1" not in page.charts
    else:
        assert "no metrics yet" in text
        assert page.charts == {}
    assert ("epochs: 300 -> 40" in text) == (done != "config alone")
    assert "model.name" in text


def test_a_run_whose_numbers_are_not_finite_has_a_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "x", epochs=2)
    for name in ("metrics.jsonl", "views.jsonl"):
        text = (folder / name).read_text()
        (folder / name).write_text(re.sub(r"-?\d+(?:\.\d+(?:e-\d+)?|e-\d+)(?=[],}])", "NaN", text))
    page = report(folder)
    assert list(page.charts) == ["per-class", "confusions"]
    assert len(page.all_of("img")) == 16 + 11


def test_names_from_files_are_text_everywhere(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "x", epochs=2, classes=[HOSTILE, *"123456789"], resumes=[11])
    config = (folder / "config.yaml").read_text().replace("datasets/digits", f"'{HOSTILE}'")
    (folder / "config.yaml").write_text(config)
    (folder / "code.diff").write_text(HOSTILE)
    views = (folder / "views.jsonl").read_text().replace("data:image/jpeg;base64", "http://tracker.example/x.jpg?", 1)
    (folder / "views.jsonl").write_text(views)
    page = report(folder)
    assert [script.get("type") for script in page.all_of("script")] == ["application/json", None, None]
    assert all((image["src"] or "").startswith("data:image/jpeg;base64,") for image in page.all_of("img"))
    assert len(page.all_of("img")) == 15 + 11  # one sample's address is none of a picture, one error has none
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert sum(HOSTILE in text for text in page.text) >= 3  # the configuration, the diff, the errors
    charts = json.dumps(page.charts["per-class"]) + json.dumps(page.charts["confusions"])
    assert "<img" not in charts
    assert "&lt;/script&gt;&lt;" in charts


def test_the_page_asks_for_nothing_from_elsewhere_and_lets_no_other_script_run(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "x", epochs=1))
    policies = [meta["content"] or "" for meta in page.all_of("meta") if "http-equiv" in meta]
    assert len(policies) == 1
    assert policies[0].startswith(
        "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'sha256-"
    )
    links = [
        attributes.get(name) for _, attributes in page.elements for name in ("src", "href") if attributes.get(name)
    ]
    assert all((link or "").startswith(("data:", "#")) for link in links)


def test_published_figures_stand_beside_the_same_network_on_imagenet_alone(tmp_path: Path) -> None:
    page = report(make_vip_s7(tmp_path / "s7", done=30, steps_per_epoch=20))
    points = page.charts["top1"]["data"][-1]
    assert (points["name"], points["x"], points["y"]) == ("vip_s7 published", [300, 310], [81.518, 81.498])
    assert page.charts["top1"]["layout"]["shapes"][-1]["y0"] == 81.48
    assert page.charts["top1"]["layout"]["xaxis"]["range"] == [0, 30]  # of the run, not of what it is compared to
    assert [trace["name"] for trace in page.charts["lr"]["data"]] == ["s7", "published"]
    for other in ({"model": "vip_s14"}, {"classes": "0123456789"}):
        run = read_run(make_vip_s7(tmp_path / str(len(other.get("model", ""))), done=2, steps_per_epoch=20, **other))
        assert published_for(run) is None
        assert all("published" not in trace["name"] for chart in learning([run]) for trace in chart.data)


def test_the_published_learning_rate_is_the_schedules() -> None:
    # Loaded by its path, since importing the package takes torch.
    spec = importlib.util.spec_from_file_location("schedule", ROOT / "vip/schedule.py")
    assert spec is not None
    assert spec.loader is not None
    schedule = importlib.util.module_from_spec(spec)
    sys.modules["schedule"] = schedule
    spec.loader.exec_module(schedule)
    config = schedule.ScheduleConfig("cosine", "epoch", 20, 1e-6, 1e-5, 10)
    epochs, rates = published_lr()
    assert len(epochs) == 311
    for epoch, rate in zip(epochs[:-1], rates, strict=False):
        assert rate == pytest.approx(schedule.lr_at(config, 2e-3, round(epoch * 625), 625, 300), rel=1e-12)


def test_several_runs_lie_over_each_other_with_what_differs(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", epochs=4, ema=True)
    second = make_run(tmp_path / "b", epochs=4, lr=1e-3, batch_size=64, resumes=[22])
    page = report(first, second)
    assert [trace["name"] for trace in page.charts["top1"]["data"]] == ["a", "b"]
    assert [trace["meta"]["run"] for trace in page.charts["lr"]["data"]] == [0, 1]
    averaged = read_run(first).series("val_ema/top1").values
    assert page.charts["top1"]["data"][0]["y"] == pytest.approx(averaged, rel=1e-5)
    units = json.loads(page.data)["units"]
    assert [unit["images"] for unit in units] == pytest.approx([11 * 128, 11 * 64])
    keys = [key for key, _ in figures.differences([read_run(first), read_run(second)])]
    assert keys == ["batch_size", "ema_decay", "optimizer.lr"]
    assert set(keys) <= set(page.text)
    assert not page.all_of("img")
    same = report(first, first)
    assert "In nothing but their names." in same.text


def test_resume_points_are_marked_with_when_and_where(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "x", epochs=4, resumes=[22, 33]))
    for chart in ("top1", "loss", "lr", "images_per_s", "grad_norm"):
        layout = page.charts[chart]["layout"]
        assert [shape["x0"] for shape in layout["shapes"]] == [2.0, 3.0]
        assert layout["annotations"][0]["hovertext"] == "x went on from step 22, 2026-11-23 19:20, on 2 processes"
    assert "of 44, resumed twice" in page.text


def test_averaged_weights_decide_where_there_are_any(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "x", epochs=4, ema=True))
    best = run.best()
    assert best is not None
    assert best[0] == max(value or 0 for value in run.series("val_ema/top1").values)
    assert [trace["name"] for trace in learning([run])[0].data] == ["validation", "averaged weights"]


def test_gates_are_three_maps_of_every_block_on_one_scale(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "x", epochs=3))
    maps = gates(run)
    assert [chart.key for chart in maps] == ["gate-height", "gate-width", "gate-channel"]
    heats = [chart.data[0] for chart in maps]
    assert len({(heat["zmin"], heat["zmax"]) for heat in heats}) == 1
    assert heats[0]["x"] == [0.0, 1.0, 2.0, 3.0]
    for block in range(len(BLOCKS)):
        for column in range(3):
            assert sum(heat["z"][block][column] for heat in heats) == pytest.approx(1, abs=1e-3)
    run.gates = {}
    assert gates(run) == []


def test_few_classes_have_a_bar_each_and_many_a_curve_and_the_worst(tmp_path: Path) -> None:
    few = {chart.key: chart for chart in classes([read_run(make_run(tmp_path / "few", epochs=1))])}
    assert list(few) == ["per-class", "confusions", "calibration"]
    assert few["per-class"].data[0]["type"] == "bar"
    run = read_run(make_vip_s7(tmp_path / "many", done=1, steps_per_epoch=50))
    many = {chart.key: chart for chart in classes([run])}
    assert list(many) == ["per-class", "worst", "confusions", "calibration"]
    accuracies = [100 * correct / num for num, correct in run.validation["per_class"]]
    assert many["per-class"].data[0]["y"] == pytest.approx(sorted(accuracies), abs=1e-3)
    assert many["worst"].data[0]["x"] == pytest.approx(sorted(accuracies)[:20])


def test_counts_of_faults_are_drawn_only_where_there_were_any(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "x", epochs=4)
    assert [chart.key for chart in stability([read_run(folder)])] == ["grad_norm", "loss_scale"]
    text = (folder / "metrics.jsonl").read_text().replace('"train/bad_images": 0', '"train/bad_images": 3', 2)
    (folder / "metrics.jsonl").write_text(text.replace('"train/drop_path": 0.1', '"train/drop_path": 0.0', 4))
    run = read_run(folder)
    assert [chart.key for chart in stability([run])] == ["grad_norm", "loss_scale", "bad_images", "drop_path"]
    assert figures.Figure("Bad images", "6") in figures.key_figures(run)


def test_training_time_follows_from_images_and_speed(tmp_path: Path) -> None:
    rows = [
        {"step": 10 * k, "epoch": k / 2, "images": 1000 * k, "train/images_per_s": speed}
        for k, speed in ((1, 100), (2, 50))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_run(tmp_path).training_seconds() == 30


def test_the_head_says_how_the_run_ended(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "x", epochs=4, done=2))
    assert figures.status(run) == ("open", "at step 22 of 44")
    (run.folder / "PREEMPTED").write_text("22\n")
    assert figures.status(run) == ("stopped", "interrupted at step 22 of 44")
    run.config["max_steps"] = 22
    assert figures.status(run) == ("done", "finished, 22 steps")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.25, "0.25 s"), (41, "41 s"), (60, "1 min"), (725, "12 min 5 s"), (106_800, "1 d 5 h"), (20_400, "5 h 40 min")],
)
def test_durations_have_two_units_at_most(seconds: float, said: str) -> None:
    assert figures.duration(seconds) == said


@settings(max_examples=30)
@given(st.integers(MAX_POINTS + 1, 5 * MAX_POINTS), st.sampled_from([0.0, 0.0001, 0.5, 1.0]), st.integers(0, 2**32))
def test_thinned_curves_keep_ends_extremes_and_gaps(num: int, missing: float, seed: int) -> None:
    draw = random.Random(seed)
    values = [None if draw.random() < missing else draw.gauss(0, 1e3) for _ in range(num)]
    x, y = thinned([float(place) for place in range(len(values))], values)
    assert len(x) == len(y) <= MAX_POINTS
    assert x == sorted(set(x))
    assert (x[0], x[-1]) == (0, len(values) - 1)
    finite = [value for value in values if value is not None]
    if finite:
        kept = [value for value in y if value is not None]
        assert (min(kept), max(kept)) == pytest.approx((min(finite), max(finite)), rel=1e-5)
    assert (None in y) == (None in values)


def test_text_in_charts_is_cut_and_escaped() -> None:
    assert shown("a <b>\n&  c", 100) == "a &lt;b&gt; &amp; c"
    assert shown("x" * 30, 10) == "x" * 9 + "…"
