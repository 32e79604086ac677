"""The PEFT config of an allocation: names resolved, and the model that PEFT builds from it on the
meta device.
"""

import json
import math
import re

import numpy as np
import pytest

import lora_diag
from lora_diag.decisions.allocate.measure import Budget, Constraints, allocate
from lora_diag.decisions.allocate.peft_config import (
    PeftScaling,
    check_config,
    compare_with_peft,
    make_peft_config,
    module_of,
)
from lora_diag.errors import InputError, UsageError
from lora_diag.records import LeftOut, Results, totals
from tests.decisions.allocate.records import llama, record, results

# PEFT asks transformers by a name that will go; nothing of ours.
WITH_PEFT = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def allocation(spectra, amount, tensors=None, left_out=(), **constraints):
    """An allocation of made-up spectra, as ``lora_diag.allocate`` returns it."""
    measured = results(*spectra, left_out=left_out, tensors=tensors)
    result = allocate(
        spectra, Budget("params", amount, f"--params {amount}"), Constraints(**constraints)
    )
    rest = (*result.left_out, *left_out)
    return Results(
        measured.run, result.layers, rest, totals(result.layers, rest), (result.certificate,)
    )


def resolved(config, module):
    """The rank and scaling that PEFT gives a module; None if it does not adapt it.

    From PEFT's documentation.
    """
    names = [*config["target_modules"], *config.get("target_parameters", [])]
    if not any(module == name or module.endswith("." + name) for name in names):
        return None
    rank, alpha = config["r"], config["lora_alpha"]
    for key, value in config["rank_pattern"].items():
        if re.match(rf"(.*\.)?({key})$", module):
            rank = value
            break
    for key, value in config["alpha_pattern"].items():
        if re.match(rf"(.*\.)?({key})$", module):
            alpha = value
            break
    return rank, alpha / (math.sqrt(rank) if config["use_rslora"] else rank)


@pytest.mark.parametrize("tensors", [48, 100], ids=["every tensor known", "some unknown"])
def test_every_layer_has_requested_rank_and_scaling(tensors):
    """12 layers: ``layers.1.`` must not speak for ``layers.11.``."""
    result = allocation(llama(12), 5000, tensors)
    assert len({r.rank for r in result}) > 3
    assert any(r.rank == 0 for r in result)
    config = make_peft_config(result, PeftScaling(1.5))
    for r in result:
        assert resolved(config, module_of(r.layer)) == (
            (r.rank, pytest.approx(1.5)) if r.rank else None
        )
    assert config["r"] in {r.rank for r in result}
    assert 0 not in config["rank_pattern"].values()


def test_names_are_minimal_and_unique():
    spectra = [
        record(f"model.layers.{i}.mlp.{name}.weight", (8, 8), np.ones(8))
        for i in range(2)
        for name in "ab"
    ]
    assert make_peft_config(allocation(spectra, 10**6))["target_modules"] == ["a", "b"]
    assert make_peft_config(allocation(spectra, 10**6))["rank_pattern"] == {}
    # another tensor of BASE is called so, or BASE has tensors that the results do not name
    elsewhere = LeftOut(layer="vision.a.weight", shape=(8, 8), reason="not_selected", detail="")
    assert "a" not in make_peft_config(allocation(spectra, 10**6, 5, [elsewhere]))["target_modules"]
    assert make_peft_config(allocation(spectra, 10**6, 5))["target_modules"][0] == "layers.0.mlp.a"


def test_ambiguous_module_name_is_written_in_full():
    """``merger.mlp.0`` ends in ``0``, and so does ``blocks.0``, which is no layer and which PEFT
    refuses.
    """
    names = ["visual.blocks.0.attn.qkv", "visual.blocks.0.mlp.fc1", "visual.merger.mlp.0"]
    spectra = [record(f"{name}.weight", (8, 8), np.ones(8)) for name in names]
    assert make_peft_config(allocation(spectra, 10**6))["target_modules"] == [
        "visual.merger.mlp.0",
        "fc1",
        "qkv",
    ]


def test_stacks_as_module_weights_are_module_targets():
    """``weight`` alone would be a parameter of every module."""
    names = ["mlp.input_linear.weight[0]", "mlp.input_linear.weight[1]", "attn.q_proj.weight"]
    spectra = [record(f"model.layers.0.{name}", (8, 8), np.ones(8)) for name in names]
    result = allocation(spectra, 10**6, 2)
    config = make_peft_config(result)
    assert (config["target_modules"], config["target_parameters"]) == (
        ["q_proj"],
        ["input_linear.weight"],
    )
    ranks = {"model.layers.0.mlp.input_linear": (4, 2.0), "model.layers.0.attn.q_proj": (4, 2.0)}
    compare_with_peft(result, ranks, PeftScaling(2.0))


def test_equal_ranks_share_one_pattern_key():
    spectra = [
        record(
            f"model.layers.{i}.{name}.weight",
            (8, 8),
            np.ones(rank),
            fro=math.sqrt(rank),
            complete=False,
        )
        for i in range(3)
        for name, rank in (("q", 2), ("k", 2), ("v", 4))
    ]
    config = make_peft_config(allocation(spectra, 10**6))
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (2, {"v": 4}, {"v": 8})


def test_rslora_keeps_one_alpha():
    config = make_peft_config(allocation(llama(4), 3000), PeftScaling(2.0, rslora=True))
    assert config["use_rslora"]
    assert config["alpha_pattern"] == {}
    assert config["lora_alpha"] == pytest.approx(2 * math.sqrt(config["r"]))
    with pytest.raises(UsageError, match="--scaling 0"):
        PeftScaling(0.0)


def test_single_experts_are_refused_and_stacks_become_parameters():
    one_by_one = [
        record(f"model.layers.0.mlp.experts.{i}.w1.weight", (8, 8), np.ones(8)) for i in range(2)
    ]
    with pytest.raises(InputError, match="stores one by one"):
        make_peft_config(allocation(one_by_one, 10**6))
    stack = [
        record(f"model.layers.{i // 2}.mlp.experts.up[{i % 2}]", (8, 8), np.ones(8))
        for i in range(4)
    ]
    config = make_peft_config(allocation(stack, 10**6, tensors=2))
    assert (config["target_modules"], config["target_parameters"]) == ([], ["up"])


def test_conv1d_is_detected_by_shape():
    spectra = [record("transformer.h.0.attn.c_attn.weight", (8, 24), np.ones(8))]
    assert make_peft_config(allocation(spectra, 10**6))["fan_in_fan_out"]
    spectra = [record("transformer.h.0.attn.c_attn.weight", (24, 8), np.ones(8))]
    assert not make_peft_config(allocation(spectra, 10**6))["fan_in_fan_out"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_modules": ["q", "nothing"]}, "'nothing' matches no layer"),
        ({"target_modules": ["q", "k"]}, "cannot tell a.k from other layers"),
        ({"rank_pattern": {"nothing": 3}}, "'nothing' matches no layer"),
        ({"rank_pattern": {"q": 3}}, "rank"),
        ({"rank_pattern": {"a.q": 2, ".*q": 3}}, "rank"),
    ],
)
def test_config_with_other_effect_is_refused(change, message):
    good = {"r": 2, "rank_pattern": {}, "target_modules": ["q"]}
    check_config(good, {"a.q": 2}, {}, {"a.q", "a.k"})
    with pytest.raises(InputError, match=message):
        check_config({**good, **change}, {"a.q": 2}, {}, {"a.q", "a.k"})


def built(config, model_config, tmp_path):
    """Build the model without weights, put the adapter in, and return rank and scaling by module or
    parameter.
    """
    torch = pytest.importorskip("torch")
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = getattr(transformers, model_config.architectures[0])(model_config)
        wrapped = peft.get_peft_model(model, peft.LoraConfig.from_pretrained(tmp_path))
    result = {}
    for name, module in wrapped.named_modules():
        if hasattr(module, "lora_A") and "default" in module.r:
            path = name.removeprefix("base_model.model.").replace(".base_layer", "")
            parameter = getattr(module, "parameter_name", None)
            whole = f"{path}.{parameter}" if parameter not in {None, "weight"} else path
            result[whole] = (module.r["default"], module.scaling["default"])
    return result


def wanted(found):
    return {module_of(r.layer): (r.rank, 2.0) for r in found if r.rank}


@WITH_PEFT
def test_peft_builds_gpt2_as_allocated(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    config = transformers.GPT2Config(
        n_layer=12,
        n_embd=8,
        n_head=2,
        vocab_size=16,
        n_positions=8,
        architectures=["GPT2LMHeadModel"],
    )
    rng = np.random.default_rng(0)
    spectra = [
        record(
            f"h.{i}.{name}.weight", shape, rng.exponential(size=8)
        )  # as GPT-2 lies on the hub, without wrapper
        for i in range(12)
        for name, shape in {
            "attn.c_attn": (8, 24),
            "attn.c_proj": (8, 8),
            "mlp.c_fc": (8, 32),
        }.items()
    ]
    result = allocation(spectra, 3000, tensors=60)
    assert any(r.rank == 0 for r in result)
    made = built(make_peft_config(result), config, tmp_path)
    assert made == {f"transformer.{name}": value for name, value in wanted(result).items()}


@WITH_PEFT
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
def test_peft_builds_mixture_of_experts_as_allocated(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")
    pytest.importorskip("peft")
    config = transformers.Qwen3MoeConfig(
        num_hidden_layers=2, hidden_size=8, intermediate_size=12, moe_intermediate_size=6, num_experts=3,
        num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=1, head_dim=4, vocab_size=16,
        architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    rng = np.random.default_rng(0)
    spectra = [
        record(f"model.layers.{i}.{name}{suffix}", shape, rng.exponential(size=min(shape)))
        for i in range(2)
        for name, shape, suffixes in (
            ("mlp.experts.gate_up_proj", (12, 8), ("[0]", "[1]", "[2]")),
            ("mlp.experts.down_proj", (8, 6), ("[0]", "[1]", "[2]")),
            ("self_attn.q_proj", (8, 8), (".weight",)),
        )
        for suffix in suffixes
    ]
    result = allocation(spectra, 600, tensors=6)
    assert len({r.rank for r in result}) > 1
    assert built(make_peft_config(result), config, tmp_path) == wanted(result)


def test_peft_model_is_compared_with_intended_ranks():
    result = allocation(llama(2), 1000)
    good = {f"wrapped.{name}": value for name, value in wanted(result).items()}
    compare_with_peft(result, good, PeftScaling(2.0))
    first = next(iter(good))
    rank, scaling = good[first]
    for wrong, message in (
        ({**good, first: (rank + 1, scaling)}, "PEFT gives"),
        ({**good, first: (rank, 1.0)}, "scaling 1 instead of"),
        ({name: value for name, value in good.items() if name != first}, "has no module"),
        ({**good, "wrapped.other": (2, 2.0)}, "also adapts wrapped.other"),
    ):
        with pytest.raises(InputError, match=message):
            compare_with_peft(result, wrong, PeftScaling(2.0))


ENCODER = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50,
    "max_position_embeddings": 40,
}  # fmt: skip
SMALL = {
    "BertForSequenceClassification": ("SEQ_CLS", {"classifier", "pooler"}, ENCODER),
    "BertForTokenClassification": ("TOKEN_CLS", {"classifier"}, ENCODER),
    "BertForQuestionAnswering": ("QUESTION_ANS", {"qa_outputs"}, ENCODER),
    "RobertaForSequenceClassification": ("SEQ_CLS", {"classifier"}, ENCODER),
    "DistilBertForSequenceClassification": (
        "SEQ_CLS",
        {"classifier", "pre_classifier"},
        {
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 64,
            "vocab_size": 50,
            "max_position_embeddings": 40,
        },
    ),
    "LlamaForSequenceClassification": (
        "SEQ_CLS",
        {"score"},
        ENCODER | {"num_key_value_heads": 2, "pad_token_id": 0},
    ),
    "LlamaForCausalLM": ("CAUSAL_LM", set(), ENCODER | {"num_key_value_heads": 2}),
}


@pytest.mark.slow
@WITH_PEFT
@pytest.mark.parametrize("name", SMALL)
def test_peft_trains_as_many_parameters_as_budget_counts(tmp_path, name):
    """The head is new: TUNED has another number of labels than BASE."""
    transformers, peft, torch = (
        pytest.importorskip(module) for module in ("transformers", "peft", "torch")
    )
    task, heads, sizes = SMALL[name]
    kind = getattr(transformers, name)
    base, tuned = (kind(kind.config_class(**sizes, num_labels=labels)) for labels in (2, 3))
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for (key, value), other in zip(tuned.named_parameters(), base.parameters(), strict=True):
            if value.shape == other.shape:
                value.copy_(other + 0.01 * torch.randn_like(other))
            assert key
    tuned.save_pretrained(tmp_path / "tuned")
    spectra = lora_diag.spectrum(tmp_path / "base", tmp_path / "tuned")
    result = lora_diag.allocate(spectra, params=9000)
    config = make_peft_config(result)
    assert (config["task_type"], set(config.get("modules_to_save", []))) == (task, heads)
    assert (result.whole[0].saved > 0) == bool(heads)
    assert built(config, tuned.config, tmp_path) == wanted(result)
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    model = peft.get_peft_model(tuned, peft.LoraConfig.from_pretrained(folder))
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert trained == result.whole[0].params == result.whole[0].spent <= 9000
