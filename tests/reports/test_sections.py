"""Sections of the report: tables with the numbers of the records, thousands of adapters, merges,
unfinished runs.
"""

import json
from dataclasses import replace

import numpy as np
import pytest

from lora_diag.catalog import features
from lora_diag.reports.html import html_report, images_of
from lora_diag.reports.markdown import markdown_report
from lora_diag.reports.subject import answers, sections_of
from tests.building import results
from tests.diagnostics.verify_merge import test_summary as merges
from tests.messages import assert_names
from tests.plots import making
from tests.reports.making import low_rank, questions
from tests.reports.test_html import Elements, evidence

pytestmark = pytest.mark.slow

# Of each probe: settings, and its records for parts of this name and sets of that name.
MORE = {
    "probe sensitivity": {"rank": 8, "delta": None, "by": "type", "kind": "LoRA"},
    "probe curvature": {"ranks": [0, 4, 16]},
    "probe intrinsic": {
        "ranks": [1, 8],
        "dims": [10, 100, 1000],
        "share": 0.9,
        "method": "plain",
        "params": 10**6,
    },
    "probe fisher": {"ranks": [4, 8]},
    "probe strength": {"by": "type", "scales": [0.0]},
    "probe outputs": {"adapters": ("runs/r4", "runs/r16")},
}
RECORDS = {
    "probe sensitivity": lambda name, set: making.adapted(
        units=(f"{name}.up", "self_attn.q_proj"), sets=(set, "b")
    ),
    "probe curvature": lambda name, set: making.curved(
        layers=(f"layers.0.{name}", "layers.1.up"), sets=(set,)
    ),
    "probe intrinsic": lambda name, set: making.reached(sets=(set, f"{name} other")),
    "probe fisher": lambda name, set: making.fishers(types=(name, "self_attn.q_proj")),
    "probe outputs": lambda name, set: making.said(
        sets=(set, "b"), distance=0.654, kl=0.21, agreement=0.83, kept=0.6
    ),
    "probe sweep": lambda name, set: making.swept(sets=(set, "b")),
    "probe strength": lambda name, set: making.scaled(parts=(name,), sets=(set, "b")),
    "probe truncation": lambda name, set: making.truncated(sets=(set, "b")),
}


def probed(command, name="mlp.up_proj", set="held_out"):
    return making.probed(RECORDS[command](name, set), command=command, **MORE.get(command, {}))


@pytest.mark.parametrize("command", RECORDS)
def test_answers_of_two_probe_runs_name_their_run(command):
    one = probed(command)
    alone, both = answers(evidence(one)), answers(evidence(one, one))
    assert alone
    titles = [section.title for section in sections_of(evidence(one, one))]
    assert [answer.more[-1] for answer in both] == [title for title in titles for _ in alone]
    assert [answer.more[:-1] for answer in both] == [answer.more for answer in alone] * 2


@pytest.mark.parametrize("command", RECORDS)
def test_unfinished_run_is_shown_partially(command):
    whole = probed(command)
    for count in range(min(len(whole.whole), 5)):
        cut = evidence(replace(whole, end=None, whole=whole.whole[:count]))
        assert 'role="alert"' in html_report(cut)
        assert markdown_report(cut)


def test_every_probe_with_table_has_section():
    probes = [
        feature
        for feature in features()
        if feature.statements and feature.name.startswith("probe ")
    ]
    assert all(feature.section for feature in probes)


def test_thousand_adapters_are_not_thousand_lines():
    names = [f"runs/adapter-{i:04}" for i in range(1000)]
    rng = np.random.default_rng(0)
    records = [
        making.adapter(name, float(rng.uniform(0.9, 1.1)), 0.2, sketch=rng.normal(size=64))
        for name in names
    ]
    many = results(
        records, command="spectrum --adapters", inputs=[("adapter", name) for name in names]
    )
    page = html_report(evidence(many), images_of(evidence(many)))
    assert "and 980 more" in page
    assert len(page) < 3e6
    assert len(markdown_report(evidence(many))) < 10_000


def merged(*statuses):
    layers = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(len(statuses))]
    records = [
        merges.record(layer=layer, status=status, differing_share=i / 8, scale=1 - i / 4)
        for i, (layer, status) in enumerate(zip(layers, statuses, strict=True))
    ]
    sides = [("base", "base"), ("adapter", "runs/a"), ("merged", "runs/m")]
    return results(records, command="verify-merge", inputs=sides)


def test_merge_comes_first_and_one_wrong_layer_decides():
    runs = evidence(merged("ok", "dropped", "ok"))
    page, text = html_report(runs, images_of(runs)), markdown_report(runs)
    for message in (" ".join(Elements(page).words), text):
        assert_names(message, *questions("verify-merge"), "no", "1 of 3", "ΔW")
        assert low_rank() not in message
    fields = {
        field["title"]: field["values"]
        for field in json.loads(Elements(page).scripts["data"])["fields"]
    }
    assert fields["merge"] == ["ok", "dropped", "ok"]
    assert fields["differing"] == [0, 0.125, 0.25]
    assert fields["scale c"] == [1, 0.75, 0.5]
    assert_names(
        markdown_report(evidence(merged("ok", "ok"))), *questions("verify-merge"), "yes", 2, "ΔW"
    )
