"""``gate init``: a policy that reads back, passes where it is from, and fails a layer that is 10%
worse.
"""

import pytest
from scipy.stats import t as student_t

from lora_diag.catalog import read_results
from lora_diag.errors import InputError, UsageError
from lora_diag.gating.policy import read_policy
from lora_diag.gating.run import gate_init
from lora_diag.records.probe import Probe
from tests import building
from tests.gating.making import ADAPTER, LAYERS, judge, residual, spectrum, write
from tests.messages import assert_names


def files(tmp_path, scale=1.0):
    spectra = [spectrum(name, s=(3.0 * scale, 2.0 * scale, 1.0 * scale)) for name in LAYERS]
    residuals = [residual(name, "a", 0.7 * scale, cosine=0.8 / scale) for name in LAYERS]
    return (
        write(tmp_path / f"s{scale}.jsonl", spectra),
        write(tmp_path / f"r{scale}.jsonl", residuals, inputs=ADAPTER),
    )


def test_drafted_policy_passes_source_and_fails_beyond_tolerance(tmp_path):
    first = files(tmp_path)
    policy = read_policy("p.toml", gate_init(*first))
    fields = ["spectrum.relative", "spectrum.spike", "residual.epsilon", "residual.cosine"]
    assert [item.field for item in policy.regressions] == fields

    def failed(scale):
        status, verdicts = judge(policy, *files(tmp_path, scale), baseline=first)
        return status, {v.rule for v in verdicts if v.status == "failed"}

    assert failed(1.0) == ("passed", set())
    assert failed(1.09) == ("passed", set())
    assert failed(1.2) == (
        "failed",
        {f"baseline.{name}" for name in fields} - {"baseline.spectrum.spike"},
    )


def test_drafted_policy_finds_its_baseline_from_its_folder(tmp_path, monkeypatch):
    before = write(tmp_path / "main.jsonl", [spectrum(name, s=(3.0, 1.0)) for name in LAYERS])
    after = write(tmp_path / "new.jsonl", [spectrum(name, s=(3.6, 1.2)) for name in LAYERS])
    (tmp_path / "gates").mkdir()
    policy = tmp_path / "gates" / "p.toml"
    policy.write_text(gate_init(before, name=str(policy)))
    monkeypatch.chdir(tmp_path / "gates")
    policy = read_policy(policy)
    assert judge(policy, before)[0] == "passed"
    assert judge(policy, after)[0] == "failed"
    assert judge(policy, after, baseline=after)[0] == "passed"
    assert judge(gate_init(read_results(before)), after)[0] == "inconclusive"


def test_losses_of_probe_are_compared(tmp_path):
    record = building.build(Probe, loss=2.0)
    policy = read_policy(
        "p.toml", gate_init(building.results((), command="probe outputs", whole=[record]))
    )
    assert [(item.field, item.tolerance) for item in policy.regressions] == [("probe.loss", "1%")]


def test_limit_of_forgetting_is_written_and_judged_by_upper_end(tmp_path):
    def run(change, error, name='a "b"'):
        each = {
            "probe": "outputs",
            "tokens": 10,
            "data": "",
            "loss": 1.0,
            "set": name,
            "shifted": True,
        }
        upper = change + error * student_t.ppf(0.95, 3)
        lost = {
            "change": change,
            "change_error": error,
            "lost_at_most": upper,
            "subject": "adapter",
        }
        adapters = [
            Probe(**each, **lost, name="one"),
            Probe(**each, **lost | {"lost_at_most": 0.0}, name="two"),
        ]
        task = Probe(**each | {"set": "task", "shifted": False}, **lost | {"lost_at_most": 9.0})
        return building.results((), command="probe outputs", whole=[*adapters, task])

    before = run(0.1, 0.01)
    policy = read_policy("p.toml", gate_init(before))
    assert [rule.where for rule in policy.rules] == [{"set": 'a "b"'}]
    limit = policy.rules[0].require.test.value
    assert limit == pytest.approx(1.1 * (0.1 + 0.01 * student_t.ppf(0.95, 3)), rel=0.05)
    assert judge(policy, before, baseline=[before])[0] == "passed"
    status, verdicts = judge(
        policy, run(limit - 0.02, 0.01), baseline=[before]
    )  # not significantly below the limit
    failed = [verdict for verdict in verdicts if verdict.status == "failed"]
    assert (status, [verdict.rule for verdict in failed]) == ("failed", [policy.rules[0].name])
    assert "one" in failed[0].group
    assert judge(policy, run(limit - 0.03, 0.01), baseline=[before])[0] == "passed"
    with pytest.raises(UsageError):  # results of another text are no pass
        judge(policy, run(0.0, 0.01, "other"), baseline=[before])
    assert read_policy("p.toml", gate_init(run(0.1, 0.01, "\ud800\n[[rule]]"))).rules == []


def test_value_missing_in_layers_lowers_drafted_coverage(tmp_path):
    records = [
        residual(LAYERS[0], "a", 0.5, cosine=0.9, fro=3.0),
        residual(LAYERS[1], "a", 1.0, fro=4.0, rank=0),
    ]
    path = write(tmp_path / "r.jsonl", records, inputs=ADAPTER)
    text = gate_init(path)
    assert_names(text, "0.36", 1, "2 layers")
    assert judge(text, path, baseline=path)[0] == "passed"


def test_own_rank_of_adapter_is_not_a_limit(tmp_path):
    path = write(tmp_path / "r.jsonl", [spectrum(LAYERS[0], s=(1.0,) * 8, method="factored")])
    assert "rank_at" not in gate_init(path)
    wide = write(tmp_path / "w.jsonl", [spectrum(LAYERS[0], s=(1.0, 1.0) + (0.01,) * 6)])
    assert "spectrum.rank_at.0.9" in gate_init(wide)


def test_hostile_names_stay_in_their_comment(tmp_path):
    name = 'a"\n[[rule]]\nname = "x".weight'
    path = write(tmp_path / "r.jsonl", [spectrum(name)])
    assert not read_policy("p.toml", gate_init(path)).rules


def test_limit_without_value_is_error(tmp_path):
    with pytest.raises(InputError, match="did not finish"):
        gate_init(write(tmp_path / "u.jsonl", [spectrum(LAYERS[0])], finished=False))
    with pytest.raises(InputError, match="no value to compare"):
        gate_init(write(tmp_path / "z.jsonl", [spectrum(LAYERS[0], s=(0.0,), base_fro=None)]))
