"""``loradiag probe`` as a user runs it, on models of a few thousand weights."""

import hashlib

import pytest

from lora_diag.catalog import read_results
from tests.messages import assert_names
from tests.probes.making import gpt2, moved, some_text

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = gpt2(folder / "base")
    return (
        base,
        moved(base, folder / "tuned"),
        some_text(folder),
        some_text(folder, "english", source="shifted"),
    )


def test_truncation_prints_only_records_and_states_its_cost(loradiag, pair, tmp_path):
    base, tuned, text, shifted = pair
    words = (
        "probe",
        "truncation",
        base,
        tuned,
        "--eval",
        text,
        "--shifted",
        shifted,
        "--ranks",
        "0,2,8",
    )
    ran = loradiag(*words, "--json", "-o", "t.jsonl", "--verify")
    assert ran.code == 0
    sides = {item["role"]: item["sha256"] for item in ran.records[0]["inputs"]}
    for role, folder in (("base", base), ("tuned", tuned)):
        assert (
            sides[role] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        )
    assert ran.out == (tmp_path / "t.jsonl").read_text()
    assert [record["record"] for record in ran.records] == ["run", *["probe"] * 10, "end"]
    assert ran.err.startswith("about ")
    assert len(ran.err.splitlines()) == 1
    assert max(map(len, loradiag("inspect", "t.jsonl").out.splitlines())) <= 80
    assert {record.set for record in read_results(tmp_path / "t.jsonl").whole} == {
        "held_out",
        "english",
    }


def test_activations_are_recorded_and_read_by_residual(run, pair, tmp_path):
    base, _, text, _ = pair
    ran = run("probe", "activations", base, "--data", text, "-o", "a.safetensors")
    assert ran.code == 0
    assert_names(ran.out, "--activations a.safetensors")
    repeated = run("probe", "activations", base, "--data", text, "-o", "a.safetensors")
    assert (repeated.code, "--overwrite" in repeated.err) == (2, True)


def test_outputs_are_shown_again_and_gated(run, pair, tmp_path):
    base, tuned, text, _ = pair
    other = moved(base, tmp_path / "other", seed=3)
    ran = run("probe", "outputs", base, tuned, other, "--eval", text, "-o", "o.jsonl")
    assert ran.code == 0
    rule = (
        '[[rule]]\nname = "gap"\nrequire = "probe.gap <= {}"\nwhere = {{ subject = "adapter" }}\n'
    )
    for limit, code in ((1e6, 0), (-1e6, 1)):
        (tmp_path / "policy.toml").write_text(rule.format(limit))
        assert run("gate", "policy.toml", "o.jsonl").code == code


def test_sweep_prints_its_cost_first_and_verdict_with_spread(run, pair, tmp_path):
    base, _, text, shifted = pair
    words = ("--ranks", "1,2", "--lr", "1e-2,3e-2", "--steps", "4", "-o", "s.jsonl")
    ran = run("probe", "sweep", base, "--data", text, "--eval", shifted, *words)
    assert ran.code == 0
    assert ran.err.startswith("about ")
    wrong = run("probe", "sweep", base, "--data", text, "--eval", shifted, "--lr", "x")
    assert (wrong.code, "--lr x" in wrong.err) == (2, True)


def test_layer_weights_of_other_commands_are_refused(run, pair, tmp_path):
    base, tuned, text, shifted = pair
    words = ("--rank", "1", "--lr", "1e-2", "--steps", "2", "-o", "s.jsonl")
    ran = run("probe", "sensitivity", base, "--data", text, "--eval", shifted, *words)
    assert ran.code == 0
    assert run("spectrum", base, tuned, "-q", "-o", "spectrum.jsonl").code == 0
    for other in ("s.jsonl", "spectrum.jsonl"):
        wrong = run("allocate", "spectrum.jsonl", "--total-rank", "9", "--layer-weights", other)
        assert wrong.code == 3
        assert_names(wrong.err, other, "probe fisher")
    assert run("allocate", "spectrum.jsonl", "--total-rank", "9", "-o", "ranks.jsonl").code == 0
    assert run("extract", base, tuned, "--allocation", "ranks.jsonl", "-o", "adapter").code == 0
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


@pytest.mark.slow
def test_error_is_only_line_of_standard_error(loradiag, tmp_path):
    """Libraries that transformers imports report objects that are alive at exit: nanobind in Triton
    in 23 lines.
    """
    base = gpt2(tmp_path / "base")
    (tmp_path / "empty.txt").write_text("")
    ran = loradiag(
        "probe",
        "truncation",
        base,
        moved(base, tmp_path / "tuned"),
        "--eval",
        "empty.txt",
        anew=True,
    )
    assert (ran.code, ran.err.count("\n")) == (3, 1), ran.err
