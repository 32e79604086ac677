"""``gate init``: a policy that reads back, passes where it is from, and fails a layer that is 10% worse."""

from datetime import date

import pytest

from lora_diag.catalog import read_results
from lora_diag.errors import InputError
from lora_diag.gating.policy import read_policy
from lora_diag.gating.record import outcome
from lora_diag.gating.run import gate, gate_init
from lora_diag.records import Results, Run, totals
from lora_diag.records.probe import Probe
from tests.gating.making import LAYERS, residual, spectrum, write
from tests.messages import assert_names

TODAY = date(2026, 11, 25)
ADAPTER = (("base", "b"), ("adapter", "a"))


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
        verdicts = gate(policy, *files(tmp_path, scale), baseline=first, today=TODAY).whole
        return outcome(verdicts), {v.rule for v in verdicts if v.status == "failed"}

    assert failed(1.0) == ("passed", set())
    assert failed(1.09) == ("passed", set())
    assert failed(1.2) == ("failed", {f"baseline.{name}" for name in fields} - {"baseline.spectrum.spike"})


def test_drafted_policy_finds_its_baseline_from_its_folder(tmp_path, monkeypatch):
    before = write(tmp_path / "main.jsonl", [spectrum(name, s=(3.0, 1.0)) for name in LAYERS])
    after = write(tmp_path / "new.jsonl", [spectrum(name, s=(3.6, 1.2)) for name in LAYERS])
    (tmp_path / "gates").mkdir()
    policy = tmp_path / "gates" / "p.toml"
    policy.write_text(gate_init(before, name=str(policy)))
    monkeypatch.chdir(tmp_path / "gates")
    assert outcome(gate(policy, before, today=TODAY).whole) == "passed"
    assert outcome(gate(policy, after, today=TODAY).whole) == "failed"
    assert outcome(gate(policy, after, baseline=after, today=TODAY).whole) == "passed"
    in_memory = read_policy("q.toml", gate_init(read_results(before)))
    assert outcome(gate(in_memory, after, today=TODAY).whole) == "inconclusive"


def test_losses_of_probe_are_compared(tmp_path):
    def results(loss):
        record = Probe.model_construct(record="probe", probe="outputs", loss=loss)
        run = Run(command="probe outputs", version="0", inputs=(), settings={})
        return Results(run, (), (), totals((), ()), (record,))

    policy = read_policy("p.toml", gate_init(results(2.0)))
    assert [(item.field, item.tolerance) for item in policy.regressions] == [("probe.loss", "1%")]


def test_value_missing_in_layers_lowers_drafted_coverage(tmp_path):
    records = [residual(LAYERS[0], "a", 0.5, cosine=0.9, fro=3.0), residual(LAYERS[1], "a", 1.0, fro=4.0, rank=0)]
    path = write(tmp_path / "r.jsonl", records, inputs=ADAPTER)
    text = gate_init(path)
    assert_names(text, "0.36", 1, "2 layers")
    assert outcome(gate(read_policy("p.toml", text), path, baseline=path, today=TODAY).whole) == "passed"


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
