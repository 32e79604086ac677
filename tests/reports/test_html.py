"""The page without a browser: its numbers are the records', names stay text, nothing is loaded; its
size and time.
"""

import html.parser
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_diag.metrics.energy import thinned_ranks
from lora_diag.records.base import value_at
from lora_diag.rendering.text import select_evenly
from lora_diag.reports.evidence import Evidence, Source
from lora_diag.reports.html import html_report, images_of
from lora_diag.reports.subject import labels
from tests.reports.making import (
    decay,
    names,
    overlap,
    overlaps,
    residual,
    residuals,
    spectra,
    spectrum,
    vector,
)

pytestmark = pytest.mark.slow

HOSTILE = (
    "</script><script>alert(1)</script>.weight",
    "<img src=x onerror=alert(2)>",
    "\"'`${alert(3)}{{7*7}}{% raw %}\\u003c",
    "a\u202eb\x1b[31m\u2028\u2029\x00.weight",
    "<!--<script>",
    '<b>bold</b><a href="https://x.example">y</a>',
    "javascript:alert(4)//|**bold**@me",
)


def evidence(*results) -> Evidence:
    return Evidence(
        tuple(Source(f"{item.run.command}{i}.jsonl", item) for i, item in enumerate(results))
    )


def small():
    layers = names(2)
    rng = np.random.default_rng(1)
    return (
        spectra(
            [spectrum(n, decay(300, rng.uniform(0.2, 1.2))) for n in layers],
            [vector("model.norm.weight", 0.1)],
        ),
        residuals(
            [residual(n, 8, rng.uniform(0.3, 0.9), scale=rng.uniform(0.3, 3)) for n in layers]
        ),
        overlaps(
            [
                overlap(n, step, rng.uniform(0, 0.3), rng.uniform(0.3, 1))
                for n in layers
                for step in (0, 50, 99)
            ]
        ),
    )


class Elements(html.parser.HTMLParser):
    """Every element with its attributes, and the text of scripts by id."""

    def __init__(self, page: str):
        super().__init__()
        self.seen, self.scripts, self.words, self._in = [], {}, [], None
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        self._in = (tag, dict(attrs).get("id", "")) if tag in {"script", "style"} else None

    def handle_endtag(self, tag):
        self._in = None

    def handle_data(self, text):
        if self._in is None:
            self.words.append(text)
        else:
            self.scripts[self._in[1] or self._in[0]] = (
                self.scripts.get(self._in[1] or self._in[0], "") + text
            )


def embedded(page: str) -> dict:
    return json.loads(Elements(page).scripts["data"])


SPECTRUM_FIELDS = (
    "fro",
    "energy.8",
    "energy.64",
    "rank_at.0.9",
    "rank_at.0.99",
    "stable_rank",
    "relative",
)
SPECTRUM_FIELDS += ("resolution.signal_rank", "resolution.verdict")
RESIDUAL_FIELDS = ("epsilon", "epsilon_min", "cosine", "best_scale", "norm_ratio", "limited_by")


def test_page_numbers_equal_records():
    runs = small()
    spectrum_run, residual_run, overlap_run = runs
    data = embedded(html_report(evidence(*runs)))
    fields = {field["id"]: field["values"] for field in data["fields"]}
    for prefix, run, shown in (
        ("s0", spectrum_run, SPECTRUM_FIELDS),
        ("a0", residual_run, RESIDUAL_FIELDS),
    ):
        for name in shown:
            assert fields[f"{prefix}.{name}"] == [
                value_at(run[layer], name) for layer in data["layers"]
            ]
    (drawn,) = data["spectra"]
    assert len(drawn["curves"]) == len(spectrum_run)
    for curve in drawn["curves"]:
        record = spectrum_run[data["layers"][curve["layer"]]]
        ranks = drawn["ranks"][str(curve["kept"])]
        assert curve["s"] == [record.s[r - 1] for r in ranks]
        energy = np.cumsum(np.square(record.s)) / np.sum(np.square(record.s))
        assert curve["c"] == pytest.approx([energy[r - 1] for r in ranks], rel=1e-5)
        assert (ranks[0], ranks[-1]) == (1, 300)
    (drawn,) = data["overlaps"]
    rows = {
        (data["layers"][c["layer"]], row[0]): row[1:] for c in drawn["curves"] for row in c["rows"]
    }
    assert rows == {
        (r.layer, r.step): [r.kappa, r.kappa_random, r.tangent, r.tangent_random] for r in overlap_run
    }  # fmt: skip


def test_page_makes_no_requests():
    page = html_report(evidence(*small()))
    parsed = Elements(page)
    (policy,) = [
        a["content"] for tag, a in parsed.seen if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert "default-src 'none'" in policy
    assert "connect-src" not in policy
    assert not [
        a
        for tag, a in parsed.seen
        if tag in {"link", "iframe", "object", "embed", "base"} or "src" in a
    ]
    assert all(a.get("href", "#").startswith("#") for _, a in parsed.seen)


def test_run_without_layers_has_page():
    page = html_report(evidence(spectra([])))
    assert 'class="steps"' not in page
    assert "<script" not in page


def test_page_of_7b_model_is_small():
    """224 layers of 4,096 values."""
    results = spectra(
        [spectrum(n, decay(4096, 0.3 + i / 400, 1 + i / 200)) for i, n in enumerate(names(32))]
    )
    runs = evidence(results)
    page = html_report(runs, images_of(runs))
    assert len(page.encode()) < 8e6
    data = embedded(page)
    assert len(data["layers"]) == 224
    (fro,) = [field["values"] for field in data["fields"] if field["id"] == "s0.fro"]
    assert fro == [record.fro for record in results]


@given(st.integers(1, 5000), st.integers(2, 300))
def test_thinned_ranks_are_ascending_and_end_at_last(values, points):
    ranks = thinned_ranks(values, points)
    assert ranks == sorted(set(ranks))
    assert (ranks[0], ranks[-1]) == (1, values)
    assert len(ranks) <= points or values <= points


@given(st.lists(st.integers(), min_size=2, max_size=300), st.integers(2, 50))
def test_evenly_spaced_keeps_first_and_last(items, most):
    kept = select_evenly(items, most)
    assert len(kept) == min(most, len(items))
    assert (kept[0], kept[-1]) == (items[0], items[-1])


@given(st.lists(st.text("ab/", min_size=1), min_size=1, max_size=5, unique=True))
def test_labels_are_one_each(paths):
    assert len(labels(paths)) == len(paths)
