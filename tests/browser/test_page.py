"""The page in headless Chromium: opened from disk, with no network, as a reader uses it."""

from pathlib import Path

import numpy as np
import pytest

from lora_diag.reports.evidence import Evidence, Source
from lora_diag.reports.html import html_report, images_of
from tests.browser.chromium import Page, find_chromium
from tests.reports.making import decay, names, residual, residuals, spectra, spectrum
from tests.reports.test_html import HOSTILE, evidence, small
from tests.reports.test_sections import probed

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium here (apt-get install chromium)"
)


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with Page(tmp_path_factory.mktemp("profile")) as page:
        page.size(1280)
        yield page


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    runs = evidence(*small())
    path.write_text(html_report(runs, images_of(runs), "today"), encoding="utf-8")
    return path


@pytest.fixture
def page(tab, report):
    """Return the tab with the report open; nothing may have gone wrong in it when a test ends."""
    tab.open(report)
    yield tab
    assert (tab.problems, tab.requests) == ([], [])


def curves(page) -> list[str]:
    return page.js("document.getElementById('energy').data.map((trace) => trace.name)")


def column(page, place: int) -> list[str]:
    return page.js(
        "[...document.querySelectorAll('#table tbody tr')].map((row) => "
        f"row.cells[{place}].textContent)"
    )


def center(page, selector: str) -> tuple[float, float]:
    box = page.js(
        f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: "
        "'center'}); "
        "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
    )
    return box[0], box[1]


def cell(page, row: int, col: int) -> tuple[float, float]:
    """Return where a cell of the heat map is on the screen."""
    x, y = page.js(
        "(() => { const g = document.getElementById('heat'); g.scrollIntoView({block: 'center'}); "
        "const b = g.getBoundingClientRect(), f = g._fullLayout; return [b.x + f.xaxis._offset + "
        f"f.xaxis.d2p({col}), b.y + f.yaxis._offset + f.yaxis.d2p({row})]; }})()"
    )
    return x, y


def click_cell(page, row: int, col: int) -> None:
    """Click a cell once the chart knows that the mouse is there, as it does for a hand."""
    x, y = cell(page, row, col)
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    page.wait(
        "(() => { const at = (document.getElementById('heat')._hoverdata || [])[0]; "
        f"return Boolean(at) && at.x === {col} && at.y === {row}; }})()"
    )
    page.click(x, y)


def put(page, element: str, value: str, event: str) -> None:
    """Give an input that can be seen its value, as a hand does."""
    assert page.js(f"document.getElementById('{element}').offsetParent !== null")
    page.js(
        f"(() => {{ const e = document.getElementById('{element}'); e.value = {value!r}; "
        f"e.dispatchEvent(new Event('{event}')); }})()"
    )


def test_clicking_cell_changes_curves(page):
    before = curves(page)
    click_cell(page, 3, 1)
    page.wait("document.getElementById('energy').data.length === 1")
    assert curves(page) == ["self_attn.o_proj 1"]
    click_cell(page, 0, 0)
    page.wait("document.getElementById('energy').data.length === 2")
    assert curves(page) == ["self_attn.o_proj 1", "self_attn.q_proj 0"] != before
    click_cell(page, 3, 1)
    page.wait("document.getElementById('energy').data.length === 1")
    assert curves(page) == ["self_attn.q_proj 0"]


def test_curves_equal_record(page):
    click_cell(page, 0, 0)
    page.wait("document.getElementById('spectrum').data.length === 1")
    record = small()[0]["model.layers.0.self_attn.q_proj.weight"]
    ranks, values = page.js(
        "(() => { const t = document.getElementById('spectrum').data[0]; return [t.x, t.y]; })()"
    )
    assert values == [record.s[rank - 1] for rank in ranks]
    residual_record = small()[1][record.layer]
    assert page.js("document.getElementById('residual').data[0].y") == [residual_record.epsilon]
    marks = page.js("document.getElementById('residual').data.slice(1).map((trace) => trace.base)")
    assert marks == [[residual_record.least_epsilon]]


def test_page_is_usable_by_keyboard(page):
    page.js("document.getElementById('heat').focus()")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.key(key)
    assert page.js("document.getElementById('cursor').textContent").startswith(
        "self_attn.v_proj, block 1: C(8) = 0."
    )
    page.key("Enter")
    page.wait("document.getElementById('energy').data.length === 1")
    assert curves(page) == ["self_attn.v_proj 1"]
    for _ in range(20):
        page.key("ArrowLeft")
        page.key("ArrowUp")
    page.key("Enter")
    page.wait("document.getElementById('energy').data.length === 2")
    assert curves(page) == ["self_attn.v_proj 1", "self_attn.q_proj 0"]
    order = (
        "[...document.querySelectorAll('select, input, button:not([disabled]), summary, "
        '[tabindex="0"]\')]'
    )
    assert page.js(f"{order}.filter((e) => e.tabIndex < 0).length") == 0


def test_page_sorts_rows(page):
    wanted = sorted((record.rank_at["0.9"], record.layer) for record in small()[0])
    titles = page.js(
        "[...document.querySelectorAll('#table thead th')].map((cell) => cell.textContent)"
    )
    place = titles.index("r@90%")
    for down in (False, True):
        page.click(*center(page, "#table button[data-sort='s0.rank_at.0.9']"))
        page.wait(
            f"document.querySelector('[aria-sort={'descending' if down else 'ascending'}]') !== "
            "null"
        )
        result = [int(text) for text in column(page, place)]
        assert result == sorted(result, reverse=down)
        assert sorted(result) == [rank for rank, _ in wanted]
    page.key("Enter")
    assert [int(text) for text in column(page, place)] == [rank for rank, _ in wanted]


FILTERS = {
    "O_PROJ": lambda record: "o_proj" in record.layer,
    "C(8) < 0.5": lambda record: record.energy["8"] < 0.5,
    "r@90% >= 100": lambda record: record.rank_at["0.9"] >= 100,
    "files = resolved": lambda record: True,
    "no such": lambda record: False,
}


def test_page_filters_rows(page):
    for text, kept in FILTERS.items():
        put(page, "filter", text, "input")
        wanted = [record.layer.removesuffix(".weight") for record in small()[0] if kept(record)]
        assert column(page, 0) == wanted, text
        assert (
            page.js("document.getElementById('count').textContent") == f"{len(wanted)} of 14 layers"
        )


def test_address_restores_page_state(page, report):
    put(page, "field", "a0.epsilon", "change")
    click_cell(page, 1, 1)
    page.click(*center(page, "#table button[data-sort='s0.energy.8']"))
    page.wait("location.hash.includes('sort=s0.energy.8')")
    fragment, shown, rows = page.js("location.hash"), curves(page), column(page, 0)
    page.open(report, fragment)
    assert (curves(page), column(page, 0)) == (shown, rows)
    assert page.js("document.getElementById('field').value") == "a0.epsilon"
    page.open(report, "#layer=no%20such&field=nor%20this&sort=<b>")
    assert len(curves(page)) == 2


def test_hostile_names_are_text_on_screen(tab, tmp_path):
    layers = [*HOSTILE, *(f"model.layers.0.{name}" for name in HOSTILE)]
    rng = np.random.default_rng(0)
    runs = (
        spectra(
            [spectrum(n, decay(64, rng.uniform(0.2, 1))) for n in layers],
            inputs=(("base", HOSTILE[0]), ("tuned", HOSTILE[1])),
        ),
        residuals([residual(n, 8, 0.2, adapter=HOSTILE[1]) for n in layers], adapters=[HOSTILE[1]]),
    )
    path = tmp_path / "hostile.html"
    path.write_text(
        html_report(Evidence(tuple(Source(HOSTILE[0], run) for run in runs))), encoding="utf-8"
    )
    tab.open(path)
    tab.js(
        f"for (const i of Array({len(layers)}).keys()) "
        "document.querySelector(`[data-layer='${i}']`).click()"
    )
    tab.wait("document.getElementById('energy').data.length === 8")
    x, y = cell(tab, 0, 0)
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    tab.freeze_layout()
    assert (tab.problems, tab.requests) == ([], [])
    outside = (
        "main img, main svg a, main svg image[href^=http], main script, svg b, svg i, "
        "tspan[style*=bold]"
    )
    assert tab.js(f"document.querySelectorAll('{outside}').length") == 0
    assert (
        tab.js("document.querySelector('#table button[data-layer=\"1\"]').textContent")
        == HOSTILE[1]
    )
    legend = tab.js(
        "[...document.querySelectorAll('#energy .legendtext')].map((e) => e.textContent)"
    )
    assert any("</a>" in text for text in legend)


@pytest.fixture
def scriptless(tab):
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    yield tab
    tab.call("Emulation.setScriptExecutionDisabled", value=False)


def test_page_without_javascript_has_figures_and_table(scriptless, report):
    page = scriptless
    page.open(report, ready="document.readyState === 'complete'")
    images = "[...document.querySelectorAll('.static-figures img')]"
    assert page.js(f"{images}.filter((i) => i.naturalWidth > 300 && i.alt).length") >= 4
    assert page.js(f"{images}.filter((i) => i.naturalWidth <= 300 || !i.alt).length") == 0
    assert len(column(page, 0)) == 14
    assert page.js("getComputedStyle(document.querySelector('.charts-only')).display") == "none"
    assert (page.problems, page.requests) == ([], [])


CONTRAST = """(() => {
  const channel = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).map(Number);
    return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (!color.endsWith(", 0)")) return color;
    }
  };
  const hasText = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  const low = [];
  for (const e of document.querySelectorAll('main *')) {
    if (!hasText(e) || !e.offsetParent || e.closest('svg') || e.disabled) continue;
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) low.push(`${e.tagName} ${e.className} ${e.textContent.slice(0, 30)}`);
  }
  return low;
})()"""


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_text_has_contrast_of_wcag_aa(page, report, scheme):
    page.call(
        "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
    )
    page.open(report)
    ground = page.js("getComputedStyle(document.documentElement).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    assert page.js(CONTRAST) == []


def test_page_elements_have_accessible_names(page):
    nameless = (
        "[...document.querySelectorAll('select, input, button, img, [role]')]"
        ".filter((e) => !(e.labels && e.labels.length) && !e.textContent.trim() && !e.alt)"
        ".filter((e) => !e.getAttribute('aria-label') && !e.getAttribute('aria-labelledby'))"
        ".map((e) => e.outerHTML.slice(0, 80))"
    )
    assert page.js(nameless) == []
    levels = page.js(
        "[...document.querySelectorAll('h1, h2, h3')].map((e) => Number(e.tagName[1]))"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1


def test_losses_page_fits_and_is_self_contained(tab, tmp_path):
    path = tmp_path / "losses.html"
    evil = probed("probe outputs", set=HOSTILE[1])
    runs = evidence(*small(), evil, probed("probe truncation"))
    path.write_text(html_report(runs, images_of(runs), "today"), encoding="utf-8")
    for width in (390, 1280):
        tab.size(width, 900, mobile=width < 500)
        tab.open(path)  # waits for the charts
        assert tab.js("document.documentElement.scrollWidth") <= width
        assert tab.js("document.body.textContent").count("<img src=x onerror=alert(2)>") > 3
    assert tab.js("document.querySelectorAll('img[src=x]').length") == 0
    assert (tab.problems, tab.requests) == ([], [])


def test_page_of_many_layers_has_pages_of_rows(tab, tmp_path):
    path, layers = tmp_path / "many.html", names(16)
    path.write_text(
        html_report(evidence(spectra([spectrum(n, decay(16, 0.5)) for n in layers]))),
        encoding="utf-8",
    )
    tab.open(path)
    assert len(column(tab, 0)) == 100
    tab.click(*center(tab, "#after"))
    tab.wait("document.getElementById('page').textContent === 'page 2 of 2'")
    assert column(tab, 0) == [name.removesuffix(".weight") for name in layers[100:]]
