"""Results of something else than what would ship: older than the adapter, incomplete, of another
base, too old.
"""

import json
import re
import shutil
from datetime import date
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import lora_diag
from lora_diag.catalog import read_results
from lora_diag.gating.policy import read_policy, ready_policy
from lora_diag.gating.run import gate
from tests.conftest import ROOT
from tests.gating.making import LAYERS, judge, spectrum, write

SAMPLES = ROOT / "sample_checkpoints"
TODAY = date(2023, 11, 20)  # results of tests are made on 2023-11-14, by SOURCE_DATE_EPOCH
POLICY = ready_policy("adapter-basic")


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A base, an adapter on it and results of it, in one folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SAMPLES / "base", "base")
    shutil.copytree(SAMPLES / "lora_r4", "adapter")
    lora_diag.spectrum("base", "adapter", output="r.jsonl")
    return tmp_path


def change(adapter, edit):
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    save_file(edit(weights), path)


def blocking(*results, policy=POLICY, **options):
    """What the gate comes to, and the rules that keep it from passing."""
    status, verdicts = judge(policy, *results, today=TODAY, **options)
    return status, {verdict.rule for verdict in verdicts if verdict.blocks}


def measure(base="base", adapter="adapter", **options):
    return lora_diag.spectrum(base, adapter, output="new.jsonl", **options) and "new.jsonl"


def test_unchanged_inputs_pass(shop):
    assert blocking("r.jsonl") == ("passed", set())
    verdicts = [v for v in gate(POLICY, "r.jsonl", today=TODAY).whole if v.rule == "inputs"]
    assert [(v.group, v.status, v.measured) for v in verdicts] == [
        ("base base", "passed", "unchanged"),
        ("adapter adapter", "passed", "unchanged"),
    ]


def scaled(weights):
    return {name: 100 * value if "lora_B" in name else value for name, value in weights.items()}


def test_results_older_than_adapter_do_not_pass(shop, loradiag):
    change(shop / "adapter", scaled)
    assert blocking("r.jsonl") == ("inconclusive", {"inputs"})
    ran = loradiag(
        "gate", "--policy", "adapter-basic", "r.jsonl", "--model-card", "card.md", "--github"
    )
    assert (ran.code, ran.out.count("::error ")) == (5, 1)
    assert "PASSED" not in (shop / "card.md").read_text()


@pytest.mark.parametrize("number", range(0, 56, 11))
def test_fingerprint_covers_every_adapter_entry(shop, number):
    def one(weights):
        name = sorted(weights)[number]
        weights[name].view(-1)[number] += 1e-4
        return weights

    change(shop / "adapter", one)
    assert blocking("r.jsonl") == ("inconclusive", {"inputs"})


def test_fingerprint_covers_config_and_base(shop):
    config = json.loads((shop / "adapter" / "adapter_config.json").read_text())
    (shop / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 80}))
    assert blocking("r.jsonl")[0] == "inconclusive"
    (shop / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert blocking("r.jsonl")[0] == "passed"
    part, weights = (
        shop / "base" / "model-00002-of-00003.safetensors",
        shop / "adapter" / "adapter_model.safetensors",
    )
    for file, content in (
        (part, part.read_bytes()[:-1] + b"\x01"),
        (weights, b"\0" * 100),
    ):  # the latter unreadable
        before = file.read_bytes()
        file.write_bytes(content)
        assert blocking("r.jsonl") == ("inconclusive", {"inputs"})
        file.write_bytes(before)


def test_change_does_not_hide_failure(shop):
    change(shop / "adapter", lambda weights: {name: 0 * value for name, value in weights.items()})
    measure()
    change(shop / "adapter", lambda weights: {name: value + 1 for name, value in weights.items()})
    assert blocking("new.jsonl") == ("failed", {"dead", "inputs"})


def test_results_are_of_what_for_names(shop):
    shutil.move("adapter", "elsewhere")
    assert blocking("r.jsonl") == ("passed", set())  # nothing is there to compare, and that is said
    verdicts = gate(POLICY, "r.jsonl", today=TODAY).whole
    assert [v.status for v in verdicts if v.group == "adapter adapter"] == ["not judged"]
    assert blocking("r.jsonl", for_=["elsewhere"]) == ("passed", set())
    change(shop / "elsewhere", scaled)
    assert blocking("r.jsonl", for_=["elsewhere"]) == ("inconclusive", {"inputs"})
    # The recorded path is not read if --for gives the present one.
    shutil.copytree(SAMPLES / "lora_r16", "adapter")
    assert blocking("r.jsonl", for_=[SAMPLES / "lora_r4"]) == ("passed", set())


def test_each_results_file_matches_for_option(shop):
    measure(adapter=SAMPLES / "lora_r16")
    shutil.rmtree("adapter")
    assert blocking("r.jsonl", "new.jsonl", for_=[SAMPLES / "lora_r16"]) == (
        "inconclusive",
        {"inputs"},
    )
    both = [SAMPLES / "lora_r16", SAMPLES / "lora_r4", "base"]
    assert blocking("r.jsonl", "new.jsonl", for_=both) == ("passed", set())
    assert blocking("new.jsonl", for_=both) == ("inconclusive", {"inputs"})


def test_pinned_fingerprint_must_be_that_of_results(shop):
    base, adapter = lora_diag.read_results("r.jsonl").run.inputs
    text = 'about = "adapter"\n[checks]\n[inputs]\nadapter = "{}"\n'
    assert blocking("r.jsonl", policy=read_policy("p", text.format(adapter.fingerprint))) == (
        "passed",
        set(),
    )
    other = read_policy("p", text.format(base.fingerprint))
    assert blocking("r.jsonl", policy=other) == ("failed", {"inputs"})
    lone = write(
        shop / "made.jsonl", [spectrum(LAYERS[0])], inputs=(("base", "b"), ("adapter", "a"))
    )
    assert blocking(lone, policy=other) == ("inconclusive", {"inputs"})
    full = write(shop / "full.jsonl", [spectrum(LAYERS[0])])
    assert "inputs" in blocking(full, policy=other)[1]


def test_old_results_do_not_pass(shop):
    assert blocking("r.jsonl", max_age="6d")[0] == "passed"
    assert blocking("r.jsonl", max_age="5d") == ("inconclusive", {"inputs"})
    assert blocking("r.jsonl", max_age="122h")[0] == "passed"
    strict = read_policy("p.toml", '[checks]\n[inputs]\nmax_age = "5d"\n')
    assert blocking("r.jsonl", policy=strict, max_age="2w") == ("inconclusive", {"inputs"})
    undated = write(shop / "made.jsonl", [spectrum(LAYERS[0])])
    assert "inputs" in blocking(undated, max_age="9w")[1]
    assert judge(POLICY, "r.jsonl", today=date(2023, 11, 10), max_age="9w")[0] == "inconclusive"


def test_adapter_with_missing_layers_is_incomplete(shop):
    change(
        shop / "adapter",
        lambda w: {name: value for name, value in w.items() if ".layers.0." in name},
    )
    measure()
    assert blocking("new.jsonl") == ("failed", {"complete"})
    result = gate(POLICY, "new.jsonl", today=TODAY).whole
    lost = {v.layer for v in result if v.rule == "complete"}
    whole = {record.layer for record in lora_diag.read_results("r.jsonl")}
    assert lost == {layer for layer in whole if ".layers.0." not in layer}
    lora_diag.residual(
        "base", SAMPLES / "full_ft", ["adapter"], layers="layers.0", output="res.jsonl"
    )
    assert "complete" in blocking("res.jsonl")[1]


def with_config(shop, **values):
    path = shop / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_only_targeted_weights_are_missed(shop):
    change(
        shop / "adapter",
        lambda w: {n: v for n, v in w.items() if ".layers.1." in n and "q_proj" in n},
    )
    for config, lacking in (
        ({"target_modules": ["q_proj"]}, 3),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, 0),
        (
            {
                "target_modules": ["q_proj"],
                "layers_to_transform": [1, 2],
                "layers_pattern": "layers",
            },
            1,
        ),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 2], "layers_pattern": 5}, 1),
        ({"target_modules": r"model\.layers\.1\.self_attn\.(q|k)_proj"}, 1),
        (
            {
                "target_modules": ["q_proj", "k_proj"],
                "exclude_modules": r".*(k_proj|layers\.[023].*)",
            },
            0,
        ),
        ({"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}, 3),
        ({"target_modules": "all-linear"}, None),
    ):
        keep = {
            "layers_to_transform": None,
            "layers_pattern": None,
            "exclude_modules": None,
            "modules_to_save": None,
        }
        with_config(shop, **keep | config)
        result = lora_diag.spectrum("base", "adapter").run.inputs[-1]
        assert (None if result.targets is None else len(result.lacking)) == lacking, config


def test_gate_fails_for_base_other_than_in_config(shop):
    shutil.copytree("base", "other")
    measure(base="other", overwrite=True)
    assert blocking("new.jsonl") == ("inconclusive", {"base"})
    with_config(shop, base_model_name_or_path="meta-llama/Llama-2-7b-hf")
    measure(overwrite=True)
    assert blocking("new.jsonl") == ("inconclusive", {"base"})
    base = lora_diag.read_results("new.jsonl").run.inputs[0]
    pinned = f'about = "adapter"\n[checks]\n[inputs]\nbase = "{base.fingerprint}"\n'
    assert blocking("new.jsonl", policy=read_policy("p.toml", pinned)) == ("passed", set())
    with_config(shop, base_model_name_or_path=None)
    measure()
    assert blocking("new.jsonl") == ("passed", set())
    assert [v.status for v in gate(POLICY, "new.jsonl", today=TODAY).whole if v.rule == "base"] == [
        "not judged"
    ]


def test_fully_hidden_updates_do_not_pass(tmp_path):
    drift = ready_policy("full-ft-drift")
    hidden = [spectrum(name, verdict="unresolved") for name in LAYERS]
    path = write(tmp_path / "r.jsonl", hidden)
    assert blocking(path, policy=drift) == ("inconclusive", {"unresolved"})
    seen = write(tmp_path / "s.jsonl", [spectrum(LAYERS[0], s=(5.0, 2.0)), *hidden[1:]])
    assert blocking(seen, policy=drift)[0] == "passed"


def test_results_without_hash_are_inconclusive(shop):
    content = Path("r.jsonl").read_text()
    unhashed = re.sub(r',"sha256":"\w+"\}\n$', "}\n", content)
    assert unhashed != content
    Path("unhashed.jsonl").write_text(unhashed)
    assert blocking("unhashed.jsonl") == ("inconclusive", {"inputs"})
    assert blocking(read_results("unhashed.jsonl")) == ("passed", set())  # in memory
    policy = read_policy("p.toml", '[[baseline]]\nfield = "relative"\nworse = "higher"\n')
    assert blocking("r.jsonl", policy=policy, baseline="r.jsonl") == ("passed", set())
    assert blocking("r.jsonl", policy=policy, baseline="unhashed.jsonl") == (
        "inconclusive",
        {"inputs"},
    )
