"""The pages in a real browser: nothing fails, everything is drawn, in both colours and on a phone."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import bench, large_report, report, score, write_bench, write_evaluation, write_run

from llmprune.pages import compare, write_comparison, write_report

api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")

pytestmark = pytest.mark.browser

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_LOADS = 3
_PHONE = {"viewport": {"width": 375, "height": 812}, "is_mobile": True, "has_touch": True}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium: playwright's own, or one of the system."""
    with api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = own if Path(own).exists() else next(filter(None, map(shutil.which, _BROWSERS)), None)
        if path is None:
            pytest.skip("no Chromium: `playwright install chromium`, or install the system's package chromium")
        # The sandbox of a browser needs rights that containers do not give; the pages are ours.
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every section: 80 layers of 7 matrices, some with 64 experts."""
    folder = write_run(tmp_path_factory.mktemp("large"), large_report())
    write_evaluation(folder, score("arc", "acc", 0.5, 0.6))
    write_bench(folder, bench())
    return write_report(folder)


class Visit:
    """A page that was opened, with everything that it complained about and asked for."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page = browser.new_context(**options).new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("html[data-charts=drawn]", timeout=60_000)

    def __enter__(self) -> "Visit":
        return self

    def __exit__(self, *_: object) -> None:
        self.page.context.close()

    def colour(self, selector: str, name: str) -> str:
        return str(self.page.evaluate(f"getComputedStyle(document.querySelector('{selector}'))['{name}']"))

    def switch(self) -> None:
        """Click the button of the theme, and wait until all charts have followed."""
        before = self.page.evaluate("document.documentElement.dataset.painted")
        self.page.click("#theme")
        self.page.wait_for_function(f"document.documentElement.dataset.painted !== '{before}'")


@pytest.mark.parametrize("kind", ["report", "comparison"])
def test_everything_is_drawn_and_nothing_fetched(browser: Any, large: Path, tmp_path: Path, kind: str) -> None:
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", report(layers=2))]
    file = large if kind == "report" else write_comparison(compare(folders), tmp_path / "c.html")
    with Visit(browser, file) as visit:
        assert visit.complaints == []
        charts = visit.page.locator("figure").count()
        # Both runs store as many bytes: that is a sentence instead of a chart.
        assert charts == (11 if kind == "report" else 1)
        assert visit.page.locator("figure .plot:has(.cartesianlayer .trace)").count() == charts
        assert visit.page.locator("#failure").is_hidden()
        assert [url for url in visit.requests if not url.startswith(("file:", "blob:", "data:"))] == []
        assert len(visit.requests) == 1


def test_a_line_says_more_where_the_pointer_is(browser: Any, large: Path) -> None:
    with Visit(browser, large) as visit:
        point = visit.page.locator("#chart-error .scatterlayer .trace").nth(0).locator(".point").nth(3)
        point.scroll_into_view_if_needed()
        box = point.bounding_box()
        visit.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        visit.page.wait_for_selector("#chart-error .hoverlayer .hovertext")
        assert "layer 3: " in visit.page.locator("#chart-error .hoverlayer .hovertext").first.text_content()


@pytest.mark.parametrize("system", ["light", "dark"])
def test_colours_follow_the_system_and_the_button(browser: Any, large: Path, system: str) -> None:
    with Visit(browser, large, color_scheme=system) as visit:
        shown = [(visit.colour("body", "backgroundColor"), visit.colour("#chart-error .xtick text", "fill"))]
        visit.switch()
        shown.append((visit.colour("body", "backgroundColor"), visit.colour("#chart-error .xtick text", "fill")))
        brightness = [[sum(map(int, part[4:-1].split(", "))) for part in pair] for pair in shown]
        (first_page, first_text), (second_page, second_text) = brightness
        assert (first_page > first_text) == (system == "light")
        assert (second_page > second_text) == (system == "dark")
        assert abs(first_page - first_text) > 400
        assert abs(second_page - second_text) > 400
        visit.page.reload()
        visit.page.wait_for_selector("html[data-charts=drawn]")
        assert visit.colour("body", "backgroundColor") == shown[1][0]
        assert visit.complaints == []


def test_a_phone_scrolls_tables_not_the_page(browser: Any, large: Path) -> None:
    with Visit(browser, large, **_PHONE) as visit:
        for details in visit.page.locator("details").all():
            details.evaluate("element => element.open = true")
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 375
        wide = "element => element.scrollWidth > element.clientWidth"
        assert any(scroll.evaluate(wide) for scroll in visit.page.locator(".scroll").all())
        outside = """elements => elements.filter(e => e.getBoundingClientRect().right > 376).length"""
        assert visit.page.locator("figure, .tile, .card, header, nav").evaluate_all(outside) == 0
        assert visit.page.locator("#chart-error .main-svg").first.bounding_box()["width"] <= 375


@pytest.mark.parametrize("kind", ["report", "comparison"])
def test_a_phone_shows_titles_and_legends_whole(browser: Any, large: Path, tmp_path: Path, kind: str) -> None:
    folders = [write_run(tmp_path / name, report(layers=2)) for name in ("a-run-with-a-rather-long-name", "b")]
    file = large if kind == "report" else write_comparison(compare(folders), tmp_path / "c.html")
    cut = """plots => plots.flatMap(plot => {
        const outer = plot.getBoundingClientRect();
        const texts = [...plot.querySelectorAll(".xtitle, .ytitle, .legendtext, .textpoint text")];
        return texts.filter(text => {
            const box = text.getBoundingClientRect();
            return box.left < outer.left || box.right > outer.right || box.top < outer.top || box.bottom > outer.bottom;
        }).map(text => text.textContent);
    })"""
    with Visit(browser, file, **_PHONE) as visit:
        assert visit.complaints == []
        assert visit.page.locator(".plot .xtitle").count() >= 1
        assert visit.page.locator(".plot").evaluate_all(cut) == []


def test_a_large_model_is_interactive_in_seconds(browser: Any, large: Path) -> None:
    """The first screen is drawn and the page answers, in seconds of the page's own thread.

    Other work on the machine counts as little as can be: the best of some loads, and time on the processor.
    """
    seconds = [_seconds_to_first_screen(browser, large) for _ in range(_LOADS)]
    # The aim is 2 on an idle machine, which took 1.0; a second process of tests is at work here.
    assert 0 < min(seconds) < 3


def _seconds_to_first_screen(browser: Any, file: Path) -> float:
    context = browser.new_context()
    page = context.new_page()
    session = context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-charts]")
    assert page.locator("#chart-error .trace").count() == 10
    metrics = {entry["name"]: entry["value"] for entry in session.send("Performance.getMetrics")["metrics"]}
    context.close()
    return float(metrics["TaskDuration"])


def test_what_is_printed_is_complete(browser: Any, large: Path) -> None:
    """Printing from the first drawn chart on: none is missing on paper, and none is wider than it."""
    with Visit(browser, large, color_scheme="dark") as visit:
        visit.page.add_init_script(
            """new MutationObserver((_, observer) => {
                if (!document.documentElement.dataset.charts) return;
                observer.disconnect();
                const drawn = () => document.querySelectorAll(".plot:has(.cartesianlayer .trace)").length;
                const before = drawn();
                dispatchEvent(new Event("beforeprint"));
                const widths = [...document.querySelectorAll(".plot .main-svg")].map((svg) => svg.clientWidth);
                const colour = getComputedStyle(document.body).backgroundColor;
                window.printed = [before, drawn(), Math.max(...widths), colour];
            }).observe(document, {subtree: true, attributes: true, attributeFilter: ["data-charts"]});"""
        )
        visit.page.reload()
        visit.page.wait_for_function("window.printed")
        printed = visit.page.evaluate("window.printed")
        charts = visit.page.locator(".plot").count()
        assert 0 < printed[0] < printed[1] == charts
        assert printed[2] <= 640
        assert printed[3] == "rgb(246, 247, 249)"
        visit.page.evaluate("dispatchEvent(new Event('afterprint'))")
        visit.page.wait_for_selector("html[data-charts=drawn]")
        assert visit.page.locator(".plot:has(.cartesianlayer .trace)").count() == charts
        assert visit.colour("body", "backgroundColor") == "rgb(15, 19, 23)"
        assert visit.complaints == []


def test_no_toolbar_lies_over_a_legend(browser: Any, large: Path) -> None:
    with Visit(browser, large) as visit:
        visit.page.hover("#chart-error .main-svg >> nth=0")
        assert visit.page.locator(".modebar").count() == 0


def test_without_decompression_the_numbers_are_there(browser: Any, large: Path) -> None:
    context = browser.new_context()
    context.add_init_script("delete window.DecompressionStream")
    page = context.new_page()
    page.goto(large.as_uri())
    page.wait_for_selector("html[data-charts=failed]")
    assert page.locator("#failure").is_visible()
    assert page.locator("figure details[open] table").first.is_visible()
    context.close()
