"""Sections of the report: tables with the numbers of the records, thousands of adapters, merges, unfinished runs."""

import json
import re
from dataclasses import replace
from statistics import fmean

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
    "probe sensitivity": {"rank": 8, "delta": None, "per": "type", "kind": "LoRA"},
    "probe curvature": {"ranks": [0, 4, 16]},
    "probe intrinsic": {"ranks": [1, 8], "dims": [10, 100, 1000], "share": 0.9, "method": "plain", "params": 10**6},
    "probe fisher": {"ranks": [4, 8]},
    "probe outputs": {"adapters": ("runs/r4", "runs/r16")},
}
RECORDS = {
    "probe sensitivity": lambda name, set: making.adapted(units=(f"{name}.up", "self_attn.q_proj"), sets=(set, "b")),
    "probe curvature": lambda name, set: making.curved(layers=(f"layers.0.{name}", "layers.1.up"), sets=(set,)),
    "probe intrinsic": lambda name, set: making.reached(sets=(set, f"{name} other")),
    "probe fisher": lambda name, set: making.fishers(types=(name, "self_attn.q_proj")),
    "probe outputs": lambda name, set: making.said(sets=(set, "b"), distance=0.654, kl=0.21, agreement=0.83, kept=0.6),
    "probe sweep": lambda name, set: making.swept(sets=(set, "b")),
    "probe truncation": lambda name, set: making.truncated(sets=(set, "b")),
}


def probed(command, name="mlp.up_proj", set="held_out"):
    return making.probed(RECORDS[command](name, set), command=command, **MORE.get(command, {}))


def cells(page):
    """Return the rows of the sections' tables by their names: of one name the last one's cells follow."""
    result = {}
    for name, row in re.findall(r'<tr><th scope="row" class="name">(.*?)</th>(.*?)</tr>', page):
        result.setdefault(name, []).extend(re.findall(r"<td[^>]*>(.*?)</td>", row))
    return result


def test_numbers_equal_records():
    result = cells(html_report(evidence(probed("probe sensitivity"))))
    records = [r for r in probed("probe sensitivity").whole if r.set == "held_out" and r.unit and r.lr == 1e-3]
    for record in records:
        assert result[record.unit][0].startswith(f"{record.gain:+.4f} ±")

    result = cells(html_report(evidence(probed("probe curvature"))))
    _, *layers = [r for r in probed("probe curvature").whole if r.record == "curvature"]
    assert result["all layers"][2:6] == ["50", "-1", "9", "1"]
    assert [result[r.layer][2] for r in layers] == ["2", "3"]
    for bound in (r for r in probed("probe curvature").whole if r.record == "loss_bound" and r.along == 1):
        assert f"{bound.gap:+.4f}" in result[f"r={bound.rank}"]
        assert f"{bound.linear + bound.quadratic:+.4f}" in result[f"r={bound.rank}"]

    result = cells(html_report(evidence(probed("probe intrinsic"))))
    for dim in (10, 100, 1000):
        losses = [r.loss for r in probed("probe intrinsic").whole if (r.set, r.dim, r.lr) == ("held_out", dim, 1e-3)]
        assert f"{fmean(losses):.4f}" in result[f"d={dim}"]
        assert f"{(2 - fmean(losses)) / (2 - 1.02):.0%}" in result[f"d={dim}"]

    result = cells(html_report(evidence(probed("probe fisher"))))
    records = probed("probe fisher").whole
    for record in records:
        row = result[record.layer.removesuffix(".weight")]
        share = record.fisher[8] / sum(r.fisher[8] for r in records)
        assert abs(float(row[3].rstrip("%")) / 100 - share) < 0.005
        assert float(row[4]) == pytest.approx(record.fisher[8] / 2, rel=0.005)
        assert float(row[5]) == pytest.approx(record.effect["8"].kl, rel=0.005)
    assert result["Fisher"] == ["1.00 | 1.00", "1.00 | 1.00"]


def test_tables_of_losses_equal_records():
    runs = [probed(f"probe {name}") for name in ("outputs", "truncation", "sweep")]
    words = Elements(html_report(evidence(*runs))).words
    outputs, truncation, _ = (run.whole for run in runs)
    assert {f"{record.loss:.4f}" for record in (*outputs, *truncation)} <= set(words)
    assert {f"{record.energy:.2f}" for record in truncation if record.energy is not None} <= set(words)
    # The hidden states, depth by depth; where TUNED has BASE's there is no distance.
    depths = [value for record in outputs if record.name for value in record.hidden if value is not None]
    assert {"0 (input)", "same", *(f"{value:.2f}" for value in depths), "0.654", "83%", "0.21"} <= set(words)


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
    probes = [feature for feature in features() if feature.statements and feature.name.startswith("probe ")]
    assert all(feature.section for feature in probes)


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
