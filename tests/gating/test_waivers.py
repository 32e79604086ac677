"""Waivers let pass what they name, until their day, and say so."""

from datetime import date

import pytest

from tests.gating.making import LAYERS, TODAY, judge, left_out, spectrum, write

RULE = '[[rule]]\nname = "drift"\nrequire = "{require}"\n'
WAIVER = (
    '[[waiver]]\nrule = "{rule}"\nlayers = \'{layers}\'\nreason = "new tokens"\nexpires = '
    "{expires}\n"
)


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "r.jsonl", [spectrum(LAYERS[0]), spectrum(LAYERS[1], s=(9.0, 8.0))])


def judged(
    path, layers, require="relative <= 0.1", rule="drift", expires="2026-12-31", today=TODAY
):
    text = RULE.format(require=require) + WAIVER.format(rule=rule, layers=layers, expires=expires)
    return judge(text, path, today=today)


def test_waived_layer_passes_with_its_reason(path):
    status, verdicts = judged(path, "up_proj")
    assert status == "passed"
    (waived,) = [v for v in verdicts if v.status == "waived"]
    assert (waived.layer, waived.message) == (LAYERS[1], "waived to 2026-12-31: new tokens")
    assert not [v for v in verdicts if v.rule == "waiver"]


@pytest.mark.parametrize(
    ("today", "comes_to"),
    [(date(2026, 12, 30), "passed"), (date(2026, 12, 31), "passed"), (date(2027, 1, 1), "failed")],
)
def test_waiver_holds_through_last_day(path, today, comes_to):
    status, verdicts = judged(path, "up_proj", today=today)
    assert status == comes_to
    message = [v for v in verdicts if v.rule == "waiver"]
    assert bool(message) == (comes_to == "failed")
    assert all("expired on 2026-12-31" in v.message and v.status == "warned" for v in message)


@pytest.mark.parametrize("layers", ["q_proj", "nothing"])
def test_waiver_without_effect_is_reported(path, layers):
    status, verdicts = judged(path, layers)
    assert status == "failed"
    (message,) = [v for v in verdicts if v.rule == "waiver"]
    assert "delete it" in message.message
    assert message.line == 4


def test_waiver_of_one_layer_takes_it_out_of_aggregate(path):
    assert judged(path, "up_proj", "max relative <= 0.1")[0] == "passed"
    assert judged(path, "q_proj", "max relative <= 0.1")[0] == "failed"
    status, verdicts = judged(path, "up_proj", "max relative <= 0.2")
    assert status == "passed"
    assert [v.message for v in verdicts if v.rule == "waiver"] == [
        "the waiver of drift has no effect any more: delete it"
    ]


def test_built_in_check_can_be_waived_by_layer(tmp_path):
    path = write(tmp_path / "r.jsonl", [spectrum(LAYERS[0])], [left_out(LAYERS[1], "non_finite")])
    assert (
        judged(path, "up_proj", rule="non_finite")[0] == "inconclusive"
    )  # the rule lacks the layer, too
    text = RULE.format(require="relative <= 0.1") + "exclude = 'up_proj'\n"
    text += WAIVER.format(rule="non_finite", layers="up_proj", expires="2026-12-31")
    assert judge(text, path)[0] == "passed"


def test_waiver_applies_to_its_rule_only(path):
    assert judged(path, ".*", rule="spike")[0] == "failed"


def test_inconclusive_layer_can_be_waived(tmp_path):
    records = [spectrum(LAYERS[0]), spectrum(LAYERS[1], base_fro=None)]
    path = write(tmp_path / "r.jsonl", records)
    assert judged(path, "q_proj")[0] == "inconclusive"
    assert judged(path, "up_proj")[0] == "passed"
