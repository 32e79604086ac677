"""In the browser: tables of sections that sort, curves of one metric at a time, links to the parts
of the page.
"""

import html

import pytest

from lora_diag.reports.html import TEMPLATES, html_report
from tests.browser.chromium import Page, find_chromium
from tests.browser.test_page import put
from tests.reports.making import spectra
from tests.reports.test_html import evidence, small
from tests.reports.test_sections import probed

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium here (apt-get install chromium)"
)

CAPTIONS = "[...document.querySelectorAll('figcaption .of')].map((e) => e.textContent)"


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    plain = small()[0]
    layers = tuple(
        r.model_copy(update={"metric": "kfac", "weights_fro": 1.0, "fro": 2 * r.fro}) for r in plain
    )
    weighted = spectra(
        layers, inputs=(("base", "base"), ("tuned", "full_ft"), ("activations", "a.safetensors"))
    )
    path = tmp_path_factory.mktemp("report") / "report.html"
    runs = evidence(plain, weighted, probed("probe fisher"), probed("probe curvature"))
    path.write_text(html_report(runs), encoding="utf-8")
    with Page(tmp_path_factory.mktemp("profile")) as page:
        page.size(1280)
        page.open(path)
        yield page, path


def test_curves_of_two_metrics_have_separate_axes(tab):
    page, path = tab
    for metric, of in (("weights", "ΔW"), ("kfac", "G^½·ΔW·C^½")):
        put(page, "metric", metric, "change")
        for chart in ("spectrum", "energy"):
            assert (
                page.js(
                    f"document.getElementById('{chart}').data.filter((t) => t.showlegend !== "
                    "false).length"
                )
                == 2
            )
            assert f" of {of} of model." in page.js(
                f"document.getElementById('{chart}').getAttribute('aria-label')"
            )
        assert page.js(CAPTIONS) == [of, of]
    page.js("document.querySelector('nav a[href=\"#explore\"]').click()")
    page.wait("location.hash === '#metric=kfac'")
    assert page.js("document.getElementById('metric').value") == "kfac"
    page.open(path, "#metric=kfac")
    assert page.js(CAPTIONS) == ["G^½·ΔW·C^½"] * 2
    assert (page.problems, page.requests) == ([], [])


# Cells of a column, and the places of those in ascending order.
ORDERS = [
    (["+0.2 ±0.1", "-0.3 ±0.1", "-", "+0.1"], [1, 3, 0, 2]),
    (["9%", "<0.1%", "0.1%", ">99.9%", "100%"], [1, 2, 0, 3, 4]),
    (["1.05 M", "12 k", "999", "2 B"], [2, 1, 0, 3]),
    (["1.2e-04", "3", "diverged", "1e-05"], [3, 0, 1, 2]),
    (["> 64", "64", "8"], [2, 1, 0]),
    (["fails", "dead", ""], [2, 1, 0]),
]


def test_cells_are_sorted_by_leading_numbers(tab, tmp_path):
    page, _ = tab
    script = (TEMPLATES / "sections.js").read_text(encoding="utf-8")
    tables = "".join(
        "<table><thead><tr><th>place</th><th>cell</th></tr></thead><tbody>"
        + "".join(
            f"<tr><td>{i}</td><td>{html.escape(cell)}</td></tr>" for i, cell in enumerate(cells)
        )
        + "</tbody></table>"
        for cells, _ in ORDERS
    )
    path = tmp_path / "cells.html"
    path.write_text(
        f'<meta charset="utf-8"><div class="several">{tables}</div><script>{script}</script>',
        "utf-8",
    )
    page.open(path, ready="document.readyState === 'complete'")
    page.js("document.querySelectorAll('th:last-child button').forEach((button) => button.click())")
    result = (
        "[...document.querySelectorAll('tbody')].map((body) => [...body.rows].map((row) => "
        "+row.cells[0].textContent))"
    )
    assert page.js(result) == [order for _, order in ORDERS]
