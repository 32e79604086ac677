"""Names from files stay text in the page and in Markdown, in any kind of results and in any mix."""

import itertools
import json
import re

import numpy as np
import pytest
from markdown_it import MarkdownIt

from lora_diag.diagnostics.intruders.record import Direction, Intruders
from lora_diag.reports.evidence import Evidence, Source
from lora_diag.reports.html import html_report, images_of
from lora_diag.reports.markdown import markdown_report
from tests.building import build, results
from tests.plots import making
from tests.reports.making import (
    decay,
    overlap,
    overlaps,
    residual,
    residuals,
    spectra,
    spectrum,
    vector,
)
from tests.reports.test_html import HOSTILE, Elements
from tests.reports.test_sections import RECORDS, probed

pytestmark = pytest.mark.slow

GITHUB = MarkdownIt("commonmark").enable("table")


def compared(name, layers):
    """Return runs on layers that have curves, columns and a heat map."""
    return (
        spectra(
            [spectrum(n, decay(64, 0.1)) for n in layers],
            [vector(name, 9.0)],
            [("base", name), ("tuned", name)],
        ),
        residuals([residual(n, 8, 0.2, adapter=name) for n in layers], adapters=[name]),
        overlaps([overlap(n, 0, 0.01, 0.2) for n in layers]),
    )


def several(name, layers):
    """Return runs on several updates and adapters."""
    updates = (name, f"x/{name}", "other")
    pairs = [
        making.interference(layer, {8: [0.5] * 8}, {8: [0.2] * 8}, first=first, second=second)
        for layer, (first, second) in itertools.product(layers, itertools.combinations(updates, 2))
    ]
    sums = [making.union(layer, 7, 12, 13, updates=updates) for layer in layers]
    one = Direction(
        sigma=2.0,
        similarity=0.1,
        nearest=1,
        window=1,
        projection=0.1,
        projection_random=0.1,
        kind="intruder",
    )
    found = {"k": 1, "count": 1, "intruders": 1, "share": 1.0, "directions": (one,)}
    fleet = [making.adapter(f"{name}{end}", 1.0, 0.25, sketch=np.ones(64)) for end in ("/a", "b")]
    sides = [("base", name), ("tuned", name)]
    return (
        results(
            [*pairs, *sums],
            command="interference",
            inputs=[("adapter", update) for update in updates],
        ),
        results(
            [build(Intruders, layer=n, **found) for n in layers], command="intruders", inputs=sides
        ),
        results(
            fleet,
            command="spectrum --adapters",
            inputs=[("adapter", each.adapter) for each in fleet],
        ),
    )


KINDS = {
    "layers": compared,
    "several": several,
    "probes": lambda name, _: tuple(probed(command, name, name) for command in RECORDS),
}


def report(kind, name, images):
    """Return the page and the Markdown of runs whose files, layers, adapters or sets have this
    name.
    """
    runs = Evidence(
        tuple(Source(name, run) for run in KINDS[kind](name, (name, f"model.layers.0.{name}")))
    )
    return html_report(runs, images_of(runs) if images else (), "now"), markdown_report(runs)


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_names_stay_text(kind):
    plain = Elements(report(kind, "plain", False)[0]).seen
    tags = [tag for tag, _ in plain]
    for place, name in enumerate(HOSTILE):
        page, text = report(kind, name, images=not place)
        result = Elements(page)
        assert {tag for tag, _ in result.seen} <= {*tags, "br", "img", "figure", "figcaption"}
        assert [tag for tag, _ in result.seen].count("script") == tags.count("script")
        for _, attributes in result.seen:
            assert not [attribute for attribute in attributes if attribute.startswith("on")]
            assert attributes.get("src", "data:image/svg+xml;base64,").startswith(
                "data:image/svg+xml;base64,"
            )
            assert "x.example" not in attributes.get("href", "")
        assert "<" not in result.scripts.get("data", "")
        assert len(json.loads(result.scripts.get("data", '{"layers": [0, 0]}'))["layers"]) == 2
        rendered = Elements(GITHUB.render(text))
        assert not {"script", "img", "b", "a"} & {tag for tag, _ in rendered.seen}
        for written in (page, text):
            assert not re.search("[\x00-\x08\x0e-\x1f\u202e]", written)
        for mark in ("alert(1)", "{{7*7}}"):
            assert mark not in name or all(
                mark in "".join(each.words) for each in (result, rendered)
            )
