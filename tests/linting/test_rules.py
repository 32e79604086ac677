"""Every rule finds a case that triggers it, and not the one next to it; numbers by hand; published
recipes.
"""

import pytest

from lora_diag import lint
from lora_diag.adapters import patterns
from lora_diag.linting.record import LintFinding
from lora_diag.linting.rules import RULES
from tests.linting.making import MODULES, PEFT, make_adapter, make_base, write_config
from tests.linting.recipes import RECIPES
from tests.messages import assert_names

BF16 = {"finetuning_type": "full", "dtype": "bfloat16"}
AXOLOTL = {"base_model": "x", "learning_rate": 1e-2, "bf16": True}

# Rule -> the case that triggers it, the one next to it, and what the evidence names. A case is a
# configuration (or the arguments of a saved adapter in ``saved``), options, and ``tied`` for a BASE
# with a tied head.
CASES = {
    "bf16-step": ({**BF16, "lr": 1e-6}, {**BF16, "lr": 1e-3}, ["1.0e-06", "moves"]),
    "lora-16bit": (
        {"config": PEFT, "dtype": "bfloat16", "lr": 1e-6},
        {"config": PEFT, "lr": 1e-6},
        ["bfloat16", "lr 1.0e-06", "0.553%"],  # of A, uniform within 1/√128: below 2^-11
    ),
    "adam-bf16": (
        {**BF16, "lr": 0.01, "optimizer": "adamw"},
        {**BF16, "lr": 0.01, "optimizer": "paged_adamw_32bit"},
        ["β₂ = 0.999"],
    ),
    "fp16-weights": (
        {"config": PEFT, "dtype": "float16"},
        {"config": PEFT, "dtype": "float32"},
        ["float16"],
    ),
    "full-quantized": (
        {"config": {**AXOLOTL, "load_in_4bit": True}},
        {
            "config": {
                **AXOLOTL,
                "load_in_4bit": True,
                "adapter": "qlora",
                "lora_r": 8,
                "lora_alpha": 16,
            }
        },
        ["4 or 8 bits"],
    ),
    "pattern-invalid": (
        {"config": {**PEFT, "target_modules": ".*(q_proj"}},
        {"config": {**PEFT, "target_modules": ".*(q_proj)"}},
        ["q_proj", "not a valid regular expression"],
    ),
    "target-unmatched": (
        {"config": {**PEFT, "target_modules": ["q_porj"]}},
        {"config": {**PEFT, "target_modules": ["q_proj"]}},
        ["q_porj", "q_proj"],
    ),
    "target-no-mlp": (
        {"config": {**PEFT, "target_modules": ["q_proj"]}},
        {"config": {**PEFT, "target_modules": ["q_proj", "down_proj"]}},
        ["self_attn.q_proj", "6 matrices"],
    ),
    "trained-twice": (
        {"config": {**PEFT, "modules_to_save": ["q_proj", "lm_head"]}},
        {"config": {**PEFT, "modules_to_save": ["lm_head"]}},
        ["q_proj", "target_modules"],
    ),
    "save-unmatched": (
        {"config": {**PEFT, "modules_to_save": ["score"]}},
        {"config": {**PEFT, "modules_to_save": ["score"], "task_type": "SEQ_CLS"}},
        ["score"],
    ),
    "tied-weights": (
        {"config": {**PEFT, "target_modules": ["q_proj", "lm_head"]}, "tied": True},
        {"config": {**PEFT, "target_modules": ["q_proj", "lm_head"]}},
        ["lm_head"],
    ),
    "rank-pattern": (
        {
            "config": {
                **PEFT,
                "rank_pattern": {"base_model.model.model.layers.0.self_attn.q_proj": 4},
            }
        },
        {"config": {**PEFT, "rank_pattern": {"layers.0.self_attn.q_proj": 4}}},
        ["layers.0.self_attn.q_proj", "matches no module"],
    ),
    "scale": (
        {"config": {**PEFT, "r": 128, "lora_alpha": 8}},
        {"config": {**PEFT, "r": 128, "lora_alpha": 16}},
        ["lora_alpha 8", "rank 128", "0.0625"],
    ),
    "rank-excess": (
        {"config": PEFT, "rank": 64},  # 64·(128 + 128) = 128·128
        {"config": PEFT, "rank": 63},
        ["rank 64 of 128×128", "16,384", "16,384"],
    ),
    "rank-rate": (
        {"config": {**PEFT, "r": 256, "lora_alpha": 512}, "lr": 2e-4},
        {"config": {**PEFT, "r": 64, "lora_alpha": 128}, "lr": 2e-4},
        ["rank 256", "scale 2", "1.7e-04"],  # 2e-4·√(256/16)
    ),
    "rate-low": (
        {"config": {**PEFT, "r": 8, "lora_alpha": 16}, "lr": 5e-7},
        {
            "config": {**PEFT, "r": 64, "lora_alpha": 32},
            "lr": 3e-6,
        },  # an example of verl, at the limit
        ["5.0e-07", "rank 8", "scale 2", "7.1e-06", "8.5e-04"],  # 5e-6 and 6e-4 over √(8/16)
    ),
    "capacity": (
        {"config": PEFT, "tokens": 18_433},  # 16·2·(128 + 128 + 128 + 192) parameters
        {"config": PEFT, "tokens": 18_432},
        ["18.4 k", "rank 17"],
    ),
    "memory": (
        {
            "config": PEFT,
            "optimizer": "paged_adamw_32bit",
            "gpu_memory": "820KB",
        },  # 18,432·16 bytes, and 2 bytes for each of 262,784 entries
        {"config": PEFT, "optimizer": "adamw", "gpu_memory": "821KB"},
        ["295 kB", "526 kB", "820 kB"],
    ),
    "length": (
        {"config": {**AXOLOTL, "adapter": "lora", "sequence_len": 4096}},
        {"config": {**AXOLOTL, "adapter": "lora", "sequence_len": 2048}},
        ["4096", "2048"],
    ),
    "server": (
        {"config": {**PEFT, "use_dora": True}, "consumers": ["vllm"]},
        {"config": PEFT, "consumers": ["vllm"]},
        ["vLLM", "DoRA"],
    ),
    "merge-storage": ({"saved": {"size": 1e-5}}, {"saved": {"size": 1e-2}}, ["bfloat16", "‖ΔW‖"]),
    "adapter-mismatch": ({"saved": {"r": 8}}, {"saved": {}}, ["rank 16", "8"]),
    "adapter-incomplete": (
        {"saved": {"without": MODULES[:1]}},
        {"saved": {}},
        ["1 of 4", MODULES[0]],
    ),
    "adapter-zero": ({"saved": {"size": 0.0}}, {"saved": {}}, ["4 of 4"]),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {tied: make_base(folder / f"{tied}", tied) for tied in (False, True)}


def find(case, bases, folder, suffix=".json"):
    """Return the findings of a case by rule."""
    case, config = dict(case), None
    if "saved" in case:
        config = make_adapter(folder / "adapter", **case.pop("saved"))
    elif "config" in case:
        values = case.pop("config")
        config = write_config(
            folder / f"adapter_config{suffix if 'peft_type' in values else '.yaml'}", values
        )
    results = lint(bases[case.pop("tied", False)], config, **case)
    return {finding.id: finding for finding in results.whole_of(LintFinding)}


def test_every_rule_has_cases():
    assert CASES.keys() == RULES.keys()


@pytest.mark.parametrize("rule", CASES)
def test_rule_finds_its_case_and_not_its_neighbour(rule, bases, tmp_path):
    case, neighbour, facts = CASES[rule]
    found = find(case, bases, tmp_path)
    assert rule in found
    assert_names(found[rule].evidence, *facts)
    assert min(len(found[rule].fix), len(found[rule].source)) > 10
    assert rule not in find(neighbour, bases, tmp_path)


@pytest.mark.parametrize(
    ("case", "rule", "severity"),
    [
        ({"config": {**PEFT, "target_modules": ["q_proj", "wq"]}}, "target-unmatched", "warning"),
        (
            {"config": {**PEFT, "rank_pattern": {"q_proj": 4, "0.self_attn.q_proj": 8}}},
            "rank-pattern",
            "warning",
        ),
        ({"config": {"peft_type": "LORA", "r": 32}}, "scale", "note"),  # α = 8 by default
        ({**BF16, "lr": 1e-5, "optimizer": "adamw"}, "adam-bf16", "note"),
        ({**BF16, "lr": 1e-5}, "bf16-step", "warning"),
        ({**BF16, "lr": 1e-6}, "bf16-step", "error"),
        ({"config": PEFT, "dtype": "bfloat16", "lr": 2e-3}, "lora-16bit", "note"),
        (
            {"config": {**PEFT, "r": 32, "lora_alpha": 64}},
            "server",
            "note",
        ),  # vLLM's --max-lora-rank
        ({"saved": {"r": 8, "rank_pattern": {"(": 1}}}, "pattern-invalid", "error"),
    ],
)
def test_severity_depends_on_numbers(case, rule, severity, bases, tmp_path):
    found = find(case, bases, tmp_path)
    assert found[rule].severity == severity


BF16_FULL = {
    "trl": ({"model_name_or_path": "x", "dtype": "bfloat16", "learning_rate": 1e-5}, "optim"),
    "axolotl": ({"base_model": "x", "bf16": True, "learning_rate": 1e-5}, "optimizer"),
    "llamafactory": (
        {"finetuning_type": "full", "pure_bf16": True, "learning_rate": 1e-5},
        "optim",
    ),
    "torchtune": ({"model": {"_component_": "m"}, "dtype": "bf16"}, "optimizer"),
}


@pytest.mark.parametrize("family", BF16_FULL)
@pytest.mark.parametrize("found", [True, False])
def test_state_of_bitsandbytes_is_float32(family, found, tmp_path):
    values, key = BF16_FULL[family]
    name = "adamw_torch" if found else "paged_adamw_32bit"
    if family == "torchtune":
        name = {
            "_component_": "torch.optim.AdamW" if found else "bitsandbytes.optim.PagedAdamW",
            "lr": 1e-5,
        }
    results = lint(write_config(tmp_path / "c.yaml", {**values, key: name}))
    assert "adam-bf16" in results.run.settings["judged"]
    assert ("adam-bf16" in {finding.id for finding in results.whole_of(LintFinding)}) == found


@pytest.mark.parametrize(
    ("values", "options", "found"),
    [
        ({"r": 16}, {"lr": 1e-6, "steps": 60}, True),
        ({"r": 16}, {"lr": 1e-6, "steps": 10_000}, False),  # as far as 100 steps of 1e-4
        ({"r": 32}, {"lr": 1e-6}, True),
        ({"r": 16, "use_rslora": True}, {"lr": 1e-6}, False),  # s = 8
        ({"r": 16}, {"lr": 1e-6, "optimizer": "adafactor"}, False),  # steps of another size
        ({"r": 16}, {"lr": 2e-4, "steps": 3}, False),
        (
            {"r": 16, "rank_pattern": {"up_proj": 256}, "alpha_pattern": {"up_proj": 512}},
            {"lr": 1e-6},
            False,
        ),
        ({"r": 16, "lora_alpha": 0}, {"lr": 1e-6}, False),  # "scale" names it
    ],
)
def test_low_rate_depends_on_rank_scale_and_steps(values, options, found, bases, tmp_path):
    case = {"config": {**PEFT, "lora_alpha": 2 * values["r"], **values}, **options}
    assert ("rate-low" in find(case, bases, tmp_path)) == found


def test_low_rate_counts_given_steps(bases, tmp_path):
    found = find({"config": PEFT, "lr": 1e-6, "steps": 60}, bases, tmp_path)["rate-low"]
    assert_names(found.evidence, "60 steps", "like 12 at")  # 60·1e-6 / 5e-6
    assert found.severity == "warning"


def test_invalid_pattern_is_located_at_its_key(bases, tmp_path):
    found = find({"config": {**PEFT, "rank_pattern": ["q_proj"]}}, bases, tmp_path)
    assert found["pattern-invalid"].where.endswith("rank_pattern")


def test_pattern_of_exponential_time_is_found(bases, tmp_path, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    found = find({"config": {**PEFT, "target_modules": r"(\w+\.?)+x"}}, bases, tmp_path)
    assert found["pattern-invalid"].severity == "error"


def test_path_is_simulated_for_given_steps(bases, tmp_path):
    found = find({**BF16, "lr": 1e-6, "steps": 50}, bases, tmp_path)
    assert_names(found["bf16-step"].evidence, "50 simulated steps", "one direction", "random signs")


def test_missing_facts_are_named_and_not_judged():
    results = lint("sample_checkpoints/lora_r4")
    settings = results.run.settings
    assert settings["not_judged"]["target-unmatched"] == "BASE"
    assert settings["not_judged"]["rank-rate"] == "--lr"
    assert {*settings["judged"]} | {*settings["not_judged"]} == {
        name for name, rule in RULES.items() if rule.method != "full"
    }


def test_shapes_of_config_alone_suffice_for_targets(bases, tmp_path):
    config = write_config(tmp_path / "adapter_config.json", {**PEFT, "target_modules": ["wq"]})
    results = lint(bases[False] / "config.json", config, lr=1e-4)
    assert [finding.id for finding in results.whole_of(LintFinding)] == ["target-unmatched"]
    assert "merge-storage" in results.run.settings["not_judged"]


@pytest.mark.parametrize("name", RECIPES)
def test_published_recipe_gives_no_error(name, bases, tmp_path):
    suffix = ".json" if name.startswith("PEFT") else ".yaml"
    results = lint(bases[False], write_config(tmp_path / f"recipe{suffix}", RECIPES[name]))
    findings = results.whole_of(LintFinding)
    assert len(results.run.settings["judged"]) >= 4
    assert [finding for finding in findings if finding.severity == "error"] == []
