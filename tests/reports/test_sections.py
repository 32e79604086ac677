"""A thousand adapters and a merge in the report."""

import json

import numpy as np
import pytest

from lora_diag.diagnostics.verify_merge.record import Merge
from lora_diag.reports.html import html_report, images_of
from lora_diag.reports.markdown import markdown_report
from tests.building import results
from tests.diagnostics.verify_merge.test_summary import RIGHT
from tests.messages import assert_names
from tests.plots import making
from tests.reports.making import low_rank, questions
from tests.reports.test_html import Elements, evidence

pytestmark = pytest.mark.slow


def test_thousand_adapters_are_not_thousand_lines():
    names = [f"runs/adapter-{i:04}" for i in range(1000)]
    rng = np.random.default_rng(0)
    records = [making.adapter(name, float(rng.uniform(0.9, 1.1)), 0.2, sketch=rng.normal(size=64)) for name in names]
    many = results(records, command="spectrum --adapters", inputs=[("adapter", name) for name in names])
    page = html_report(evidence(many), images_of(evidence(many)))
    assert "and 980 more" in page
    assert len(page) < 3e6
    assert len(markdown_report(evidence(many))) < 10_000


def merged(*statuses):
    layers = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(len(statuses))]
    records = [
        Merge(**RIGHT | {"layer": layer, "status": status, "differing_share": i / 8, "scale": 1 - i / 4})
        for i, (layer, status) in enumerate(zip(layers, statuses, strict=True))
    ]
    sides = [("base", "base"), ("adapter", "runs/a"), ("merged", "runs/m")]
    return results(records, command="verify-merge", inputs=sides)


def test_merge_comes_first_and_one_wrong_layer_decides():
    runs = evidence(merged("ok", "dropped", "ok"))
    page, text = html_report(runs, images_of(runs)), markdown_report(runs)
    for message in (" ".join(Elements(page).words), text):
        assert_names(message, *questions("verify-merge"), "no", "1 of 3", "ΔW")
        assert_names(message, "a in m")
        assert low_rank() not in message
        assert "Failure modes" not in message
    fields = {field["title"]: field["values"] for field in json.loads(Elements(page).scripts["data"])["fields"]}
    assert fields["merge"] == ["ok", "dropped", "ok"]
    assert fields["differing"] == [0, 0.125, 0.25]
    assert fields["scale c"] == [1, 0.75, 0.5]
    by_type = text[text.index("## By module type") :]
    assert "| `self_attn.q_proj` | 3 | dropped |" in by_type
    assert_names(markdown_report(evidence(merged("ok", "ok"))), *questions("verify-merge"), "yes", 2, "ΔW")
