"""Sensitivity, curvature, intrinsic dimension and Fisher in the report: tables of the records' numbers."""

import re
from statistics import fmean

import pytest

from lora_diag.reports.html import html_report
from lora_diag.reports.subject import answers, sections_of
from tests.plots import making
from tests.reports.test_html import evidence
from tests.reports.test_losses import KINDS

pytestmark = pytest.mark.slow

MORE = {
    "probe sensitivity": {"rank": 8, "delta": None, "per": "type", "kind": "LoRA"},
    "probe curvature": {"ranks": [0, 4, 16]},
    "probe intrinsic": {"ranks": [1, 8], "dims": [10, 100, 1000], "share": 0.9, "method": "plain", "params": 10**6},
    "probe fisher": {"ranks": [4, 8]},
}
RECORDS = {
    "probe sensitivity": lambda name, set: making.adapted(units=(f"{name}.up", "self_attn.q_proj"), sets=(set, "b")),
    "probe curvature": lambda name, set: making.curved(layers=(f"layers.0.{name}", "layers.1.up"), sets=(set,)),
    "probe intrinsic": lambda name, set: making.reached(sets=(set, f"{name} other")),
    "probe fisher": lambda name, set: making.fishers(types=(name, "self_attn.q_proj")),
}


def probed(command, name="mlp.up_proj", set="held_out"):
    return making.probed(RECORDS[command](name, set), command=command, **MORE[command])


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


@pytest.mark.parametrize("command", [*MORE, "probe outputs", "probe sweep", "probe truncation"])
def test_answers_of_two_probe_runs_name_their_run(command):
    one = probed(command) if command in MORE else KINDS[command.removeprefix("probe ")]()
    alone, both = answers(evidence(one)), answers(evidence(one, one))
    assert alone
    titles = [section.title for section in sections_of(evidence(one, one))]
    assert [answer.more[-1] for answer in both] == [title for title in titles for _ in alone]
    assert [answer.more[:-1] for answer in both] == [answer.more for answer in alone] * 2
