"""Spectra in another metric: named in every verdict, selected by ``where``, not compared with those of weights."""

from datetime import date

import pytest

from lora_diag.errors import UsageError
from lora_diag.gating.policy import read_policy
from lora_diag.gating.record import outcome
from lora_diag.gating.run import gate, gate_init
from tests.gating.making import LAYERS, left_out, spectrum, write
from tests.messages import assert_names

TODAY = date(2026, 11, 25)
RULE = '[[rule]]\nname = "r"\nrequire = "energy.4 >= {}"\n{}\n'
BASELINE = '[[baseline]]\nfield = "energy.4"\nworse = "lower"\ntolerance = 0.02\n'


def file(path, metric="weights", s=(4.0, 2.0, 1.0, 1.0, 1.0, 1.0), lost=(), **changes):
    own = {} if metric == "weights" else {"metric": metric, "weights_fro": 3.0}
    inputs = [("base", "base/"), ("tuned", "tuned/"), *([("activations", "a")] if own else [])]
    return write(path, [spectrum(name, s=s, **own, **changes) for name in LAYERS], lost, inputs=inputs)


def judged(policy, *files, **more):
    return gate(read_policy("p.toml", policy), *files, today=TODAY, **more)


def test_where_selects_metric_and_must_match(tmp_path):
    files = file(tmp_path / "w.jsonl", s=(1.0,) * 20), file(tmp_path / "d.jsonl", "data")
    assert outcome(judged(RULE.format(0.9, ""), *files).whole) == "failed"
    on_data = judged(RULE.format(0.9, 'where = {metric = "data"}'), *files)
    assert outcome(on_data.whole) == "passed"
    assert sum(v.rule == "r" for v in on_data.whole) == len(LAYERS)
    with pytest.raises(UsageError, match="no spectrum record matches 'where'"):
        judged(RULE.format(0.9, 'where = {metric = "kfac"}'), *files)


def test_baseline_in_another_metric_is_rejected(tmp_path):
    now, main = file(tmp_path / "d.jsonl", "data"), file(tmp_path / "w.jsonl")
    results = judged(BASELINE, now, baseline=main)
    assert outcome(results.whole) == "inconclusive"
    assert_names(" ".join(v.message for v in results.whole), "baseline", "weights' metric", "data's metric")
    same = file(tmp_path / "d2.jsonl", "data")
    assert outcome(judged(BASELINE, now, baseline=same).whole) == "passed"


def test_ratchet_puts_no_other_metric_into_baseline(tmp_path):
    main = file(tmp_path / "w.jsonl")
    before = main.read_bytes()
    better = file(tmp_path / "d.jsonl", "data", s=(4.0, 2.0, 1.0, 1.0))
    results = judged(BASELINE + 'severity = "warning"\n', better, baseline=main, ratchet=True)
    assert outcome(results.whole) == "passed"
    assert main.read_bytes() == before
    judged(BASELINE, file(tmp_path / "w2.jsonl", s=(4.0, 2.0, 1.0, 1.0)), baseline=main, ratchet=True)
    assert main.read_bytes() != before


def test_rank_one_data_does_not_diverge(tmp_path):
    policy = RULE.format(0.5, "")
    spiky = {"s": (100.0, 1.0), "base_fro": 1.0}
    status = {v.rule: v.status for v in judged(policy, file(tmp_path / "w.jsonl", **spiky)).whole}
    assert status["spike"] == "warned"
    result = {v.rule: v for v in judged(policy, file(tmp_path / "d.jsonl", "data", **spiky)).whole}
    assert result["spike"].status == result["unused_rank"].status == "not judged"
    assert result["spike"].message == "every spectrum is in the data's metric, not in the weights'"
    assert result["dead"].status == "passed"


def test_update_outside_data_is_not_dead(tmp_path):
    records = [spectrum(name, s=(0.0,), metric="data", weights_fro=1.0) for name in LAYERS]
    result = {v.rule: v for v in judged(RULE.format(0.5, ""), write(tmp_path / "d.jsonl", records)).whole}
    assert result["dead"].status == "passed"


def test_drafted_policy_names_metric_of_baseline(tmp_path):
    lost = [left_out("model.embed_tokens.weight", "no_activations")]
    files = file(tmp_path / "w.jsonl"), file(tmp_path / "d.jsonl", "data", s=(9.0, 2.0), lost=lost)
    policy = read_policy("p.toml", gate_init(files[1]))
    assert {item.where["metric"] for item in policy.regressions} == {"data"}
    assert outcome(gate(policy, files[1], baseline=files[1], today=TODAY).whole) == "passed"
    with pytest.raises(UsageError, match="no spectrum record matches 'where'"):
        gate(policy, files[0], baseline=files[0], today=TODAY)
    both = read_policy("p.toml", gate_init(*files))
    assert {item.where["metric"] for item in both.regressions} == {"weights", "data"}
    assert outcome(gate(both, *files, baseline=files, today=TODAY).whole) == "passed"
    worse = file(tmp_path / "worse.jsonl", "data", s=(12.0, 2.0), lost=lost)
    assert outcome(gate(both, files[0], worse, baseline=files, today=TODAY).whole) == "failed"
    assert "metric =" not in gate_init(files[0])
