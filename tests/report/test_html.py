"""The page: what it holds, that nothing in a manifest can break out of it, and how it behaves in a browser."""

import html
import json
import re
import shutil

import pytest

from rdeploy import api, bundle, runs
from rdeploy.cli import execute
from rdeploy.errors import ConfigError, MissingDependency
from rdeploy.report import charts, points
from rdeploy.report import html as page
from rdeploy.report.searched import Outcome
from rdeploy.types import REPORTS

pytest.importorskip("vl_convert", reason="the page is drawn with vl-convert-python: pip install 'rdeploy[report]'")
pytest.importorskip("jinja2", reason="the page is a Jinja template: pip install 'rdeploy[report]'")


def without_scripts(text):
    return re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)


def test_the_page_holds_the_pick_every_engine_the_plots_and_the_command(run):
    text = page.render(runs.read(run), Outcome(pick="r168-int8@openvino", reason="Lowest latency within 10 points."))
    shown = html.unescape(without_scripts(text))

    assert (
        "r168-int8@openvino: 2.17 times as fast as the native model (95 % interval 2.13 to 2.22), top-1 84.0 %" in shown
    )
    assert "Lowest latency within 10 points." in shown
    assert shown.count("<tr id=") == 17
    assert all(f'id="chart-{name}"' in shown for name in ("pareto", "ladder", "latencies", "memory"))
    assert "tiger cat 55\u00a0%" in shown
    assert "rdeploy build" in shown
    assert len(text) < 6_000_000


def test_a_search_without_a_pick_shows_its_reason_and_no_pick(run):
    reason = "no point satisfies the budget: the nearest has 3.00 points too much drop"
    outcome = Outcome(pick=None, reason=reason, others=("net-r96-int8",))

    shown = html.unescape(without_scripts(page.render(runs.read(run), outcome)))

    assert '<h2 id="pick">No pick</h2>' in shown
    assert reason in shown
    assert "net-r96-int8 lies in the same folder and is not of this search" in shown
    assert "Nothing was picked." in shown
    assert "<tr id=" in shown
    assert 'class="pick"' not in shown
    assert 'class="card"' not in shown


def test_a_pick_that_is_the_native_model_is_compared_with_nothing(run):
    outcome = Outcome(pick="r224-fp32@openvino", reason="lowest latency", front=("r224-fp32@openvino",))

    shown = html.unescape(without_scripts(page.render(runs.read(run), outcome)))

    assert "native@openvino: the native model as it is." in shown
    assert "The pick is the native model" in shown
    assert "<span>median latency</span><b>5.00 ms</b><span></span>" in shown


def test_nothing_is_asked_of_any_server(run):
    text = page.render(runs.read(run))

    assert "default-src 'none'" in text
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']?(?:https?:)?//", text)


def test_what_a_manifest_says_stays_text(run):
    file = run / "net-r168-int8" / "manifest.json"
    for folder in run.glob("net-*"):
        if folder != file.parent:
            shutil.rmtree(folder)
    content = json.loads(file.read_text())
    content["model"]["name"] = content["reproduce"] = "</script><script>alert(1)</script>"
    content["notes"] = ["<img src=x onerror=alert(2)>"]
    content["variant"]["id"] = "</script><b>"
    file.write_text(json.dumps(content))
    bundle.seal(file.parent)

    text = page.render(runs.read(run))

    assert "<script>alert(1)" not in text
    assert "<img src=x" not in text
    assert "</script><b>" not in text


def test_plots_without_data_are_left_out(written):
    content = json.loads((written / "manifest.json").read_text())
    for engine in content["engines"]:
        engine["measurement"] = None
        engine["not_run"] = "no"
    (written / "manifest.json").write_text(json.dumps(content))
    (written / "measurements.json").unlink()
    bundle.seal(written)
    bundles = runs.read(written)

    specs = charts.charts(bundles, [p for p in points.points(bundles) if p.role != "native"], metric="top-1")

    assert specs == {}


@pytest.mark.parametrize(("kind", "start"), [("svg", b"<svg"), ("png", b"\x89PNG")])
def test_the_plots_are_files_too(run, tmp_path, kind, start):
    written = api.report(run, out=tmp_path / "plots", kind=kind)

    assert [file.name for file in written] == [f"{name}.{kind}" for name in ("pareto", "ladder", "latencies", "memory")]
    assert all(file.read_bytes().startswith(start) for file in written)


def test_the_verb_writes_the_page_into_the_run_and_says_where(run, capsys):
    assert execute(["report", str(run)]) == 0

    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("kind", REPORTS)
def test_the_report_of_one_bundle_lies_beside_it_and_leaves_it_alone(run, kind):
    folder = run / "net-r168-int8"
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    written = api.report(folder / "manifest.json", kind=kind)

    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert {file.relative_to(run).parts[0].partition(".")[0] for file in written} == {"net-r168-int8-report"}


def test_a_kind_of_report_that_there_is_not_is_refused(run):
    with pytest.raises(ConfigError, match="no report of kind 'pdf'; choose one of html, markdown, csv, svg, png"):
        api.report(run, kind="pdf")


@pytest.mark.parametrize("kind", ["markdown", "csv"])
def test_markdown_and_csv_need_no_extra(run, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(page, "_load", lambda module: pytest.fail(f"{module} was loaded"))

    (file,) = api.report(run, out=tmp_path / "x", kind=kind)

    assert "r168-int8@openvino" in file.read_text()


def test_a_missing_extra_is_named(run, monkeypatch):
    monkeypatch.setattr("builtins.__import__", _without("jinja2"))

    with pytest.raises(MissingDependency, match=r"the HTML report needs jinja2.*pip install 'rdeploy\[report\]'"):
        page.render(runs.read(run))


def _without(name):
    original = __import__

    def load(module, *rest, **more):
        if module == name:
            raise ImportError(name)
        return original(module, *rest, **more)

    return load


def test_a_place_that_cannot_be_written_to_is_one_line(run, tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match="cannot write .*report.csv: .*choose another --out"):
        api.report(run, out=tmp_path / "file" / "report.csv", kind="csv")


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="drives the browser: pip install 'rdeploy[test]'")
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        arguments = [
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--no-first-run",
            "--disable-sync",
        ]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 390)])
def test_in_a_browser_it_draws_filters_sorts_and_shows_what_is_under_the_pointer(run, browser, tmp_path, scheme, width):
    file = tmp_path / "report.html"
    file.write_text(page.render(runs.read(run)))
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
    tab = context.new_page()
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))

    tab.goto(f"file://{file}")
    tab.wait_for_selector(f"html[data-drawn={scheme}]")

    assert tab.locator("#chart-pareto svg").count() == 1
    framed = "(place) => getComputedStyle(document.querySelector(place)).borderTopStyle"
    assert (tab.evaluate(framed, ".pairs figure"), tab.evaluate(framed, "#pareto + figure")) == ("solid", "none")
    # Two CPU engines of five variants, and the native model on both, of one of which the memory is not known.
    assert tab.locator("#chart-pareto svg .mark-symbol.role-mark path").count() == 12
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    tab.fill("#filter", "r168 openvino")
    assert tab.locator("#table tbody tr:visible").count() == 2
    assert tab.inner_text("#shown") == "2 of 17"
    tab.fill("#filter", "")
    tab.locator(".precision[value=fp32]").uncheck()
    assert tab.locator("#table tbody tr:visible").count() == 12
    tab.locator("#table thead button").nth(4).focus()
    tab.keyboard.press("Enter")  # by keyboard: ascending latency
    assert tab.locator("#table tbody tr").first.get_attribute("id") == "r112-int8@openvino"
    tab.locator("#chart-pareto").scroll_into_view_if_needed()
    place = tab.locator("#chart-pareto svg .mark-symbol path").first.bounding_box()
    tab.mouse.move(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2)  # another point may lie over it
    tab.wait_for_selector("#vg-tooltip-element.visible")
    assert "median ms" in tab.inner_text("#vg-tooltip-element")
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    context.close()


@pytest.mark.slow
def test_a_click_selects_a_point_shift_adds_another_and_the_legend_a_precision(run, browser, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(page.render(runs.read(run)))
    tab = browser.new_context(viewport={"width": 1200, "height": 900}).new_page()
    tab.goto(f"file://{file}")
    tab.wait_for_selector("html[data-drawn=light]")
    points_drawn = tab.locator("#chart-pareto svg .mark-symbol.role-mark path")

    def bright():
        return sum(float(one.get_attribute("opacity") or 1) > 0.5 for one in points_drawn.all())

    def click(place, *keys):
        place.scroll_into_view_if_needed()
        place.click(modifiers=list(keys), force=True)
        tab.wait_for_timeout(100)

    assert bright() == 12
    fastest, slowest = (
        tab.locator(f"#chart-pareto path[aria-label*='point: {name};']")
        for name in ("r112-int8@openvino", "native@onnxruntime")
    )
    click(fastest)
    assert bright() == 1
    click(slowest, "Shift")
    assert bright() == 2
    assert len(tab.context.pages) == 1
    click(fastest)
    click(fastest)
    click(tab.locator("#chart-pareto .role-legend-symbol path").first)
    assert 0 < bright() < 12


@pytest.mark.slow
def test_on_paper_the_plots_are_dark_on_white_whatever_the_screens_theme_is(run, browser, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(page.render(runs.read(run)))
    tab = browser.new_context(color_scheme="dark", viewport={"width": 1200, "height": 900}).new_page()
    tab.goto(f"file://{file}")
    tab.wait_for_selector("html[data-drawn=dark]")
    colour = "() => getComputedStyle(document.querySelector('#chart-pareto .role-axis-title text')).fill"
    on_screen = tab.evaluate(colour)

    tab.emulate_media(media="print", color_scheme="dark")
    tab.set_viewport_size({"width": 720, "height": 1000})  # A4 within its margins

    assert (on_screen, tab.evaluate(colour)) == ("rgb(232, 234, 237)", "rgb(0, 0, 0)")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.slow
def test_a_printed_page_holds_every_plot_and_every_table(run, browser, tmp_path):
    """`--print-to-pdf`'s way: nobody waits for a drawing once printing has begun."""
    file = tmp_path / "report.html"
    file.write_text(page.render(runs.read(run)))
    tab = browser.new_context(color_scheme="dark").new_page()
    tab.goto(f"file://{file}")
    tab.wait_for_selector("html[data-drawn=dark]")

    printed = tab.pdf(format="A4")

    assert printed.startswith(b"%PDF")
    assert tab.locator("details:not([open])").count() == 0
    assert tab.locator(".chart svg").count() == 4


def test_a_machine_that_was_not_fit_is_in_the_notes(run):
    file = next(run.iterdir()) / "manifest.json"
    content = json.loads(file.read_text())
    content["engines"][1]["measurement"]["unfit"] = ["load 3.1 on 2 cores"]
    file.write_text(json.dumps(content))
    bundle.seal(file.parent)

    shown = html.unescape(without_scripts(page.render(runs.read(run))))

    assert "The machine was not fit to measure on: load 3.1 on 2 cores" in shown
