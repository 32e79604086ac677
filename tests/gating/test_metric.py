"""Spectra in another metric: named in every verdict, selected by ``where``, not compared with those
of weights.
"""

import pytest

from lora_diag.errors import UsageError
from lora_diag.gating.policy import read_policy
from lora_diag.gating.run import gate_init
from tests.gating.making import LAYERS, judge, left_out, spectrum, write
from tests.messages import assert_names

RULE = '[[rule]]\nname = "r"\nrequire = "energy.4 >= {}"\n{}\n'
BASELINE = '[[baseline]]\nfield = "energy.4"\nworse = "lower"\ntolerance = 0.02\n'


def file(path, metric="weights", s=(4.0, 2.0, 1.0, 1.0, 1.0, 1.0), lost=(), **changes):
    own = {} if metric == "weights" else {"metric": metric, "weights_fro": 3.0}
    inputs = [("base", "base/"), ("tuned", "tuned/"), *([("activations", "a")] if own else [])]
    return write(
        path, [spectrum(name, s=s, **own, **changes) for name in LAYERS], lost, inputs=inputs
    )


def test_where_selects_metric_and_must_match(tmp_path):
    files = file(tmp_path / "w.jsonl", s=(1.0,) * 20), file(tmp_path / "d.jsonl", "data")
    assert judge(RULE.format(0.9, ""), *files)[0] == "failed"
    status, on_data = judge(RULE.format(0.9, 'where = {metric = "data"}'), *files)
    assert status == "passed"
    assert sum(v.rule == "r" for v in on_data) == len(LAYERS)
    with pytest.raises(UsageError, match="no spectrum record matches 'where'"):
        judge(RULE.format(0.9, 'where = {metric = "kfac"}'), *files)


def test_baseline_in_another_metric_is_rejected(tmp_path):
    now, main = file(tmp_path / "d.jsonl", "data"), file(tmp_path / "w.jsonl")
    status, verdicts = judge(BASELINE, now, baseline=main)
    assert status == "inconclusive"
    assert_names(
        " ".join(v.message for v in verdicts), "baseline", "weights' metric", "data's metric"
    )
    same = file(tmp_path / "d2.jsonl", "data")
    assert judge(BASELINE, now, baseline=same)[0] == "passed"


def test_ratchet_puts_no_other_metric_into_baseline(tmp_path):
    main = file(tmp_path / "w.jsonl")
    before = main.read_bytes()
    better = file(tmp_path / "d.jsonl", "data", s=(4.0, 2.0, 1.0, 1.0))
    assert (
        judge(BASELINE + 'severity = "warning"\n', better, baseline=main, ratchet=True)[0]
        == "passed"
    )
    assert main.read_bytes() == before
    judge(
        BASELINE, file(tmp_path / "w2.jsonl", s=(4.0, 2.0, 1.0, 1.0)), baseline=main, ratchet=True
    )
    assert main.read_bytes() != before


def test_rank_one_or_no_data_is_no_spike_and_not_dead(tmp_path):
    policy = RULE.format(0.5, "")
    spiky = {"s": (100.0, 1.0), "base_fro": 1.0}
    status = {v.rule: v.status for v in judge(policy, file(tmp_path / "w.jsonl", **spiky))[1]}
    assert status["spike"] == "warned"
    result = {v.rule: v for v in judge(policy, file(tmp_path / "d.jsonl", "data", **spiky))[1]}
    assert result["spike"].status == result["unused_rank"].status == "not judged"
    assert result["spike"].message == "every spectrum is in the data's metric, not in the weights'"
    assert result["dead"].status == "passed"
    outside = [spectrum(name, s=(0.0,), metric="data", weights_fro=1.0) for name in LAYERS]
    result = {v.rule: v for v in judge(policy, write(tmp_path / "d.jsonl", outside))[1]}
    assert result["dead"].status == "passed"


def test_drafted_policy_names_metric_of_baseline(tmp_path):
    lost = [left_out("model.embed_tokens.weight", "no_activations")]
    files = file(tmp_path / "w.jsonl"), file(tmp_path / "d.jsonl", "data", s=(9.0, 2.0), lost=lost)
    policy = read_policy("p.toml", gate_init(files[1]))
    assert {item.where["metric"] for item in policy.regressions} == {"data"}
    assert judge(policy, files[1], baseline=files[1])[0] == "passed"
    with pytest.raises(UsageError, match="no spectrum record matches 'where'"):
        judge(policy, files[0], baseline=files[0])
    both = read_policy("p.toml", gate_init(*files))
    assert {item.where["metric"] for item in both.regressions} == {"weights", "data"}
    assert judge(both, *files, baseline=files)[0] == "passed"
    worse = file(tmp_path / "worse.jsonl", "data", s=(12.0, 2.0), lost=lost)
    assert judge(both, files[0], worse, baseline=files)[0] == "failed"
    assert "metric =" not in gate_init(files[0])
