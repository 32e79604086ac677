"""``gate init``: a policy that reads back, passes where it is from, and fails a quarter beyond."""

import re
from datetime import date

import pytest

from lora_diag.decisions.gate.reading import read_policy
from lora_diag.decisions.gate.record import outcome
from lora_diag.decisions.gate.run import gate, gate_init
from lora_diag.errors import InputError
from tests.decisions.gate.making import LAYERS, residual, spectrum, write
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


def test_drafted_policy_passes_source_and_fails_beyond_margin(tmp_path):
    policy = read_policy("p.toml", gate_init(*files(tmp_path)))
    assert {rule.name for rule in policy.rules} == {"drift", "one-direction", "distance", "direction"}

    def failed(scale):
        verdicts = gate(policy, *files(tmp_path, scale), today=TODAY).whole
        return outcome(verdicts), {v.rule for v in verdicts if v.status == "failed"}

    assert failed(1.0) == ("passed", set())
    assert failed(1.24) == ("passed", set())
    assert failed(1.3) == (
        "failed",
        {"drift", "distance", "direction"} - ({"direction"} if 0.8 / 1.3 >= 0.6 else set()),
    )


def test_drafted_policy_states_source_of_limits(tmp_path):
    text = gate_init(files(tmp_path)[0])
    assert re.search(r"# relative: median 0\.03742, highest 0\.03742 in .*; the limit is 25% beyond", text)
    limit = float(re.search(r"spectrum\.relative <= (\S+)\"", text)[1])
    assert 1.25 <= limit / (14**0.5 / 100) <= 1.26


def test_value_missing_in_layers_lowers_drafted_coverage(tmp_path):
    records = [residual(LAYERS[0], "a", 0.5, cosine=0.9, fro=3.0), residual(LAYERS[1], "a", 1.0, fro=4.0, rank=0)]
    path = write(tmp_path / "r.jsonl", records, inputs=ADAPTER)
    text = gate_init(path)
    assert_names(text, "0.36", 1, "2 layers")
    assert outcome(gate(read_policy("p.toml", text), path, today=TODAY).whole) == "passed"


def test_own_rank_of_adapter_is_not_a_limit(tmp_path):
    path = write(tmp_path / "r.jsonl", [spectrum(LAYERS[0], s=(1.0,) * 8, method="factored")])
    assert "rank_at" not in gate_init(path)
    wide = write(tmp_path / "w.jsonl", [spectrum(LAYERS[0], s=(1.0, 1.0) + (0.01,) * 6)])
    assert "rank_at.0.9 <= 3" in gate_init(wide)


def test_hostile_names_stay_in_their_comment(tmp_path):
    name = 'a"\n[[rule]]\nname = "x".weight'
    path = write(tmp_path / "r.jsonl", [spectrum(name)])
    assert "x" not in {rule.name for rule in read_policy("p.toml", gate_init(path)).rules}


def test_limit_without_value_is_error(tmp_path):
    with pytest.raises(InputError, match="did not finish"):
        gate_init(write(tmp_path / "u.jsonl", [spectrum(LAYERS[0])], finished=False))
    with pytest.raises(InputError, match="no value for a limit"):
        gate_init(write(tmp_path / "z.jsonl", [spectrum(LAYERS[0], s=(0.0,), base_fro=None)]))
