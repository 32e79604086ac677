"""``loradiag allocate`` as a user runs it."""

import json
import shlex

import pytest

import lora_diag
from tests.conftest import ROOT
from tests.messages import assert_names

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A results file of the sample checkpoints."""
    path = tmp_path_factory.mktemp("spectrum") / "s.jsonl"
    lora_diag.spectrum(
        ROOT / "sample_checkpoints/base", ROOT / "sample_checkpoints/full_ft", output=path
    )
    return path


def test_config_records_and_json_agree(run, measured, tmp_path):
    ran = run("allocate", measured, "--energy", "0.5", "-o", "adapter_config.json", "--json")
    assert ran.code == 0
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    ranks = {
        record["layer"]: record["rank"]
        for record in ran.records
        if record["record"] == "allocation"
    }
    assert config["r"] in ranks.values()
    assert ran.records[-2]["record"] == "left_out"
    assert [record["record"] for record in ran.records].count("certificate") == 1
    assert run("allocate", measured, "--energy", "0.5", "-o", "a.jsonl", "-q").out == ""
    assert (tmp_path / "a.jsonl").read_text() == ran.out
    repeated = run("inspect", "a.jsonl").out
    live = run("allocate", measured, "--energy", "0.5").out
    assert repeated.strip() == live[: live.index("Next")].strip()


def test_config_check_builds_model(run, measured, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    words = ["allocate", measured, "--params", "50k", "-q"]
    checked = run(*words, "-o", "adapter_config.json", "--check", ROOT / "sample_checkpoints/base")
    assert (checked.code, checked.out) == (0, "")
    assert (tmp_path / "adapter_config.json").exists()
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_config.json").unlink()
    other = run(*words, "-o", "adapter_config.json", "--check", "config.json")
    assert other.code == 3
    assert_names(other.err, "PEFT", "accept")
    assert not (tmp_path / "adapter_config.json").exists()


def test_without_a_budget_ranks_of_rules_are_shown(loradiag, measured):
    """The suggested next command divides a budget, and runs."""
    ran = loradiag("allocate", measured, env={"COLUMNS": "200"})
    assert ran.code == 0
    records = loradiag("allocate", measured, "--json").records
    spectra = lora_diag.read_results(measured)
    assert [(each["layer"], each["ranks"]["energy 90%"]) for each in records] == [
        (record.layer, record.rank_at["0.9"]) for record in spectra
    ]
    suggested = next(line for line in ran.out.splitlines() if line.startswith("Next"))
    words = shlex.split(suggested.removeprefix("Next").partition("(")[0])
    assert loradiag(*words[1:]).code == 0
