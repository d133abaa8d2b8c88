"""The report in a real browser, without a network: every chart drawn, hovered, zoomed; light, dark, phone, paper."""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.made_run import make_run, make_vip_s7
from vip.page import write_report

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt install chromium)"),
    pytest.mark.xdist_group("browser"),
]

# What a chart shows of its data, by the kind of trace.
MARKS = ".scatterlayer .trace path, .barlayer .point path, .heatmaplayer image"
CONTRASTS = """() => {
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255).map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color.length === 3 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *:not(script)")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.getClientRects().length || element.closest(".bartext, .bars, .modebar-container")) continue;
    const color = parse(getComputedStyle(element)[element.namespaceURI.endsWith("svg") ? "fill" : "color"]);
    const [a, b] = [light(color), light(behind(element))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), element.textContent.slice(0, 40)]);
  }
  return found;
}"""


@dataclass
class Tab:
    """An opened report and all that went wrong or out."""

    page: Any
    address: str
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def chart(self, key: str) -> Any:
        return self.page.locator(f"#chart-{key}")

    def range(self, key: str) -> list[float]:
        return [float(end) for end in self.page.evaluate(f"document.getElementById('chart-{key}').layout.xaxis.range")]

    def drag(self, key: str, start: float, end: float) -> None:
        """Draw a box over a chart's middle, from one share of its width to another."""
        self.chart(key).scroll_into_view_if_needed()
        box = self.chart(key).locator(".nsewdrag").first.bounding_box()
        self.page.mouse.move(box["x"] + start * box["width"], box["y"] + box["height"] / 2)
        self.page.mouse.down()
        self.page.mouse.move(box["x"] + end * box["width"], box["y"] + box["height"] / 2, steps=5)
        self.page.mouse.up()

    def redrawn(self, change: Callable[[], object]) -> None:
        """Make a change that draws all charts anew, and wait until they are."""
        times = int(self.page.evaluate("document.documentElement.dataset.drawn"))
        change()
        self.until(f"document.documentElement.dataset.drawn > {times}")

    def until(self, expression: str) -> None:
        """Wait for a condition; Playwright's own way evaluates within the page, whose policy forbids it."""
        deadline = time.monotonic() + 60
        while not self.page.evaluate(expression):
            assert time.monotonic() < deadline, expression
            self.page.wait_for_timeout(20)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders digits, s7 and hostile, each with its report, and a comparison."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "digits", epochs=12, resumes=[44])
    make_vip_s7(folder / "s7", done=40, steps_per_epoch=100, resumes=[1000], ema=True)
    make_run(folder / "hostile", epochs=2, classes=["<script>alert(1)</script>", "</script><b>x</b>", "$ink", *"012"])
    for name in ("digits", "s7", "hostile"):
        write_report([folder / name], folder / name / "report.html")
    write_report([folder / "digits", folder / "s7"], folder / "comparison.html")
    return folder


def opened(browser: Any, path: Path, **options: Any) -> Tab:
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}, "offline": True} | options))
    tab = Tab(context.new_page(), path.as_uri())
    tab.page.on("console", lambda message: tab.complaints.append(f"{message.type}: {message.text}"))
    tab.page.on("pageerror", lambda error: tab.complaints.append(str(error)))
    tab.page.on("dialog", lambda dialog: (tab.complaints.append(dialog.message), dialog.dismiss()))
    tab.page.on("request", lambda request: tab.requests.append(request.url))
    tab.page.goto(tab.address)
    tab.page.wait_for_selector("html[data-drawn]", timeout=120_000)
    return tab


@pytest.fixture(scope="module")
def tabs(browser: Any, runs: Path) -> dict[str, Tab]:
    """Each page is opened once: tests leave it as it was, drawn on a light desktop screen."""
    names = ("digits/report.html", "s7/report.html", "hostile/report.html", "comparison.html")
    return {Path(name).parts[0].removesuffix(".html"): opened(browser, runs / name) for name in names}


@pytest.fixture
def tab(tabs: dict[str, Tab]) -> Tab:
    """A finished run's."""
    return tabs["digits"]


@pytest.fixture(autouse=True)
def _nothing_goes_wrong_or_out(tabs: dict[str, Tab]) -> Iterator[None]:
    yield
    for tab in tabs.values():
        assert tab.complaints == []
        assert tab.requests == [tab.address]


@pytest.mark.parametrize("name", ["digits", "s7", "comparison"])
def test_every_chart_is_drawn(tabs: dict[str, Tab], name: str) -> None:
    tab = tabs[name]
    charts = tab.page.locator(".chart")
    assert charts.count() >= 10
    for place in range(charts.count()):
        assert charts.nth(place).locator(MARKS).count() > 0, charts.nth(place).get_attribute("id")
        assert charts.nth(place).get_attribute("aria-label")


def test_what_is_drawn_is_what_there_is_to_see(tabs: dict[str, Tab]) -> None:
    tab = tabs["s7"]
    assert tab.chart("top1").locator(".scatterlayer .trace").count() == 3
    names = tab.chart("top1").locator(".legendtext").all_text_contents()
    assert names == ["validation", "averaged weights", "vip_s7 published"]
    assert tab.chart("gate-height").locator(".heatmaplayer image").count() == 1
    assert tab.chart("worst").locator(".barlayer .point").count() == 20
    assert tabs["digits"].chart("per-class").locator(".barlayer .point").count() == 10
    pictures = "[...document.images].filter((image) => image.naturalWidth > 0).length"
    assert tabs["digits"].page.evaluate(pictures) == 16 + 11


def test_names_that_look_like_html_are_shown_as_they_are(tabs: dict[str, Tab]) -> None:
    tab = tabs["hostile"]
    names = tab.chart("per-class").locator(".xtick text").all_text_contents()
    assert names == ["<script>alert(1)</scr…", "</script><b>x</b>", "$ink", "0", "1", "2"]
    assert tab.chart("confusions").locator(".ytick text").filter(has_text="<script>").count() > 0
    assert tab.page.get_by_text("</script><b>x</b>", exact=True).count() > 0
    assert tab.page.locator("b").count() == 0
    # And if a name did become an element, the policy would keep its script from running.
    tab.page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=data:, onerror=alert(2)>')")
    tab.until("document.images[document.images.length - 1].complete")
    tab.page.wait_for_timeout(100)
    assert len(tab.complaints) == 1
    assert "Content Security Policy" in tab.complaints.pop()


def test_hovering_shows_the_values_and_what_a_resume_point_was(tab: Tab) -> None:
    tab.chart("loss").scroll_into_view_if_needed()
    box = tab.chart("loss").locator(".nsewdrag").first.bounding_box()
    tab.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    label = tab.chart("loss").locator(".hoverlayer .legend")
    label.wait_for()
    assert "training" in label.text_content()
    assert "validation" in label.text_content()
    mark = tab.chart("loss").locator(".annotation text").first.bounding_box()
    tab.page.mouse.move(mark["x"] + mark["width"] / 2, mark["y"] + mark["height"] / 2)
    tab.chart("loss").locator(".hoverlayer .hovertext").filter(has_text="went on from step 44").wait_for()
    tab.page.mouse.move(1, 1)


def test_no_button_of_a_chart_sends_it_anywhere(tab: Tab) -> None:
    buttons = tab.chart("loss").locator(".modebar-btn")
    titles = [button.get_attribute("data-title") for button in buttons.all()]
    assert titles == ["Download plot as a PNG", "Zoom", "Pan", "Reset axes"]


def test_dragging_zooms_all_charts_over_training_and_a_double_click_goes_back(tab: Tab) -> None:
    whole = tab.range("loss")
    tab.drag("loss", 0.25, 0.5)
    tab.until("document.getElementById('chart-gate-channel').layout.xaxis.range[0] > 2")
    assert tab.range("loss") == pytest.approx([0.25 * whole[1], 0.5 * whole[1]], rel=0.05)
    for key in ("top1", "lr", "grad_norm", "gate-channel"):
        assert tab.range(key) == tab.range("loss")
    assert tab.range("calibration") == [-3, 103]
    # A redrawing, as for another theme, leaves the zoom.
    tab.redrawn(lambda: tab.page.emulate_media(color_scheme="dark"))
    assert tab.range("top1") == tab.range("loss") != whole
    tab.redrawn(lambda: tab.page.emulate_media(color_scheme="light"))
    box = tab.chart("loss").locator(".nsewdrag").first.bounding_box()
    tab.page.mouse.dblclick(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tab.until("document.getElementById('chart-top1').layout.xaxis.range[0] == 0")


def test_the_x_axis_can_count_images_and_steps(tab: Tab) -> None:
    for unit, end, title in (("images", 12 * 11 * 128, "images"), ("step", 12 * 11, "steps"), ("epoch", 12, "epochs")):
        tab.page.select_option("#unit", unit)
        tab.until(f"document.getElementById('chart-gate-channel').layout.xaxis.title.text == '{title}'")
        assert tab.range("lr")[1] == pytest.approx(end * 1.02)
        x = tab.page.evaluate("document.getElementById('chart-lr').data[0].x.at(-1)")
        resumed = tab.page.evaluate("document.getElementById('chart-lr').layout.shapes[0].x0")
        assert x == pytest.approx(end * 130 / 132)
        assert resumed == pytest.approx(end / 3)


def test_light_and_dark_differ_and_both_can_be_read(tab: Tab) -> None:
    backgrounds = {}
    for scheme in ("dark", "light"):
        tab.redrawn(lambda scheme=scheme: tab.page.emulate_media(color_scheme=scheme))
        panel = tab.page.evaluate("getComputedStyle(document.querySelector('.card')).backgroundColor")
        drawn = tab.page.evaluate("getComputedStyle(document.querySelector('#chart-loss .main-svg')).backgroundColor")
        assert drawn == panel
        backgrounds[scheme] = panel
        contrasts = tab.page.evaluate(CONTRASTS)
        assert len(contrasts) > 200
        assert min(contrasts) >= [4.5], min(contrasts)
    assert backgrounds["light"] != backgrounds["dark"]


def test_nothing_is_wider_than_a_phone_and_a_finger_in_a_chart_scrolls(browser: Any, runs: Path) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
    tab = opened(browser, runs / "s7/report.html", **phone)
    assert is_within(tab, 390)
    assert tab.page.evaluate("document.getElementById('chart-loss').layout.dragmode") is False
    assert tab.complaints == []
    tab.page.context.close()


def test_charts_follow_the_width_of_the_window(tabs: dict[str, Tab]) -> None:
    tab = tabs["comparison"]
    for width in (390, 820, 1280):
        tab.redrawn(lambda width=width: tab.page.set_viewport_size({"width": width, "height": 900}))
        assert is_within(tab, width)


def is_within(tab: Tab, width: int) -> bool:
    boxes = "document.querySelectorAll('.chart .main-svg, .card, .figure, h1')"
    right = tab.page.evaluate(f"Math.max(...[...{boxes}].map((box) => box.getBoundingClientRect().right))")
    return right <= width and tab.page.evaluate("document.documentElement.scrollWidth") <= width


def test_runs_are_hidden_and_shown_again_in_all_charts(tabs: dict[str, Tab]) -> None:
    tab = tabs["comparison"]
    button = tab.page.get_by_role("button", name="digits")
    lines = tab.chart("lr").locator(".scatterlayer .trace")
    assert lines.count() == 3  # two runs and what was published
    tab.redrawn(button.click)
    assert lines.count() == 2
    assert button.get_attribute("aria-pressed") == "false"
    assert tab.chart("lr").locator(".annotation").count() == 1
    tab.redrawn(button.click)
    assert lines.count() == 3


def test_on_paper_it_is_light_and_whole(tab: Tab, tmp_path: Path) -> None:
    tab.redrawn(lambda: tab.page.emulate_media(color_scheme="dark"))
    tab.redrawn(lambda: tab.page.pdf(path=tmp_path / "report.pdf", prefer_css_page_size=True))
    content = (tmp_path / "report.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert 3 <= content.count(b"/Type /Page\n") <= 8
    tab.redrawn(lambda: tab.page.set_viewport_size({"width": 700, "height": 1000}))  # about A4 without its margins
    tab.redrawn(lambda: tab.page.emulate_media(media="print"))
    drawn = "getComputedStyle(document.querySelector('#chart-loss .main-svg')).backgroundColor"
    assert tab.page.evaluate(drawn) == "rgb(255, 255, 255)"
    assert not tab.page.locator("nav").is_visible()
    assert is_within(tab, 700)
    tab.redrawn(lambda: tab.page.emulate_media(media="screen", color_scheme="light"))
    tab.redrawn(lambda: tab.page.set_viewport_size({"width": 1280, "height": 900}))


def test_a_real_run_ends_with_its_report(browser: Any, run: Run, digits: Path, tmp_path: Path) -> None:
    done = run("train.py", "experiment=digits", f"data.root={digits}", "max_steps=22", "name=real")
    assert "report: runs/real/report.html" in done.stdout
    tab = opened(browser, tmp_path / "runs/real/report.html")
    assert "finished, 22 steps" in tab.page.locator(".badge").text_content()
    for key in (
        "top1",
        "loss",
        "lr",
        "images_per_s",
        "grad_norm",
        "per-class",
        "confusions",
        "calibration",
        "gate-width",
    ):
        assert tab.chart(key).locator(MARKS).count() > 0, key
    assert tab.page.evaluate("[...document.images].filter((image) => image.naturalWidth > 0).length") == 16 + 12
    assert tab.complaints == []
    assert tab.requests == [tab.address]
    tab.page.context.close()
