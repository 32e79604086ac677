"""Adapters that ``extract`` writes, loaded and merged by the installed PEFT: W_base + the best
rank-r ΔW.
"""

import copy
import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_diag
from lora_diag.adapters import open_adapter
from lora_diag.adapters.writing import (
    Described,
    LayerFactors,
    check_written,
    read_config_ranks,
    store_factors,
    write_adapter,
)
from lora_diag.adapters.writing_targets import MemoryModel, PeftTarget
from lora_diag.deltas import pair
from lora_diag.errors import InputError
from lora_diag.storage import open_checkpoint
from tests import oracles
from tests.adapters.making import adapter, close, dense, normal
from tests.adapters.making import base as write_base
from tests.adapters.test_current_peft import Toy
from tests.merges import gpt2
from tests.messages import mentions, raises_naming

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


def best(change, rank, stack=False):
    """The best approximation of a rank; of a stack, of each matrix."""
    if stack:
        return np.stack([best(matrix, rank) for matrix in change])
    return oracles.best_approximation(change.reshape(len(change), -1), rank).reshape(change.shape)


def perturbed(model, seed=1, only=None):
    """The same model after a full fine-tune that moved every weight, or those whose name contains a
    match.
    """
    tuned = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if only is None or re.search(only, name):
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return tuned


def saved(model, tuned, folder):
    """Save both as transformers does; a plain module as one file."""
    for side, one in (("base", model), ("tuned", tuned)):
        if hasattr(one, "save_pretrained"):
            one.save_pretrained(folder / side)
        else:
            (folder / side).mkdir()
            save_file(one.state_dict(), folder / side / "model.safetensors")
    return folder / "base", folder / "tuned"


def merged_by_peft(model, adapter):
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), adapter)
    return {
        name: value.double().numpy()
        for name, value in wrapped.merge_and_unload().state_dict().items()
    }


def state(model):
    return {name: value.double().numpy() for name, value in model.state_dict().items()}


def check(model, tmp_path, rank, tuned=None, halves=(), kept=r"norm|ln_|bias", **options):
    """Extract and let PEFT merge: every weight is W_base + best ΔW, and what no factor carries is
    W_base.
    """
    tuned = tuned if tuned is not None else perturbed(model)
    base_path, tuned_path = saved(model, tuned, tmp_path)
    results = lora_diag.extract(base_path, tuned_path, tmp_path / "adapter", rank=rank, **options)
    before, after = state(model), state(tuned)
    merged = merged_by_peft(model, tmp_path / "adapter")
    for name, weight in before.items():
        change = after[name] - weight
        if change.ndim < 2 or re.search(kept, name):
            expected = weight
        elif name.endswith(tuple(halves)):
            half = change.shape[1] // 2
            parts = [best(part, rank, stack=True) for part in (change[:, :half], change[:, half:])]
            expected = weight + np.concatenate(parts, axis=1)
        else:
            expected = weight + best(change, rank, stack="experts" in name)
        close(merged[name], expected)
    return results, json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())


def llama(layers=2, **more):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(num_hidden_layers=layers, **SMALL | more)
    )


def test_llama_update_is_extracted(tmp_path):
    results, config = check(llama(), tmp_path, rank=3)
    assert config["r"] == config["lora_alpha"] == 3
    assert config["rank_pattern"] == {}
    assert config["task_type"] == "CAUSAL_LM"
    assert len(results) == 16


def test_rank_larger_than_matrix_gives_whole_update(tmp_path):
    model = llama()
    results, config = check(model, tmp_path, rank=1000)
    assert results["model.layers.0.self_attn.k_proj.weight"].rank == 8
    assert config["r"] == 16
    assert config["rank_pattern"] == {"k_proj": 8, "v_proj": 8}
    assert all(record.epsilon < 1e-6 for record in results)


@pytest.mark.parametrize("split", ["both", "b"])
def test_gpt2_conv1d_is_stored_in_out(tmp_path, split):
    results, written = check(gpt2(), tmp_path, rank=2, split=split)
    assert written["fan_in_fan_out"] is True
    kinds = {record.layer.split(".")[-2]: record.kind for record in results}
    assert kinds == {
        "wte": "embedding",
        "wpe": "embedding",
        "c_attn": "conv1d",
        "c_proj": "conv1d",
        "c_fc": "conv1d",
    }


def test_gpt2_with_hub_names(tmp_path):
    """``h.0.attn.c_attn``: saved from the model without its head, while its config names the one
    with it.
    """
    model = gpt2()
    tuned = perturbed(model)
    for side, one in zip(saved(model, tuned, tmp_path), (model, tuned), strict=True):
        names = {
            k.removeprefix("transformer."): v.clone()
            for k, v in one.state_dict().items()
            if "lm_head" not in k
        }
        save_file(names, side / "model.safetensors", {"format": "pt"})
        assert "GPT2LMHeadModel" in (side / "config.json").read_text()
    lora_diag.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=2)
    merged, before, after = merged_by_peft(model, tmp_path / "adapter"), state(model), state(tuned)
    name = "transformer.h.1.attn.c_attn.weight"
    close(merged[name], before[name] + best(after[name] - before[name], 2))


def test_tied_embeddings_are_changed_once(tmp_path):
    results, _ = check(llama(tie_word_embeddings=True), tmp_path, rank=2)
    assert results.run.inputs[-1].notes == (
        "model.embed_tokens.weight is tied to the head: its update reaches the head only after "
        "merging",
    )


def test_untied_head_update_needs_untied_base(tmp_path):
    """TUNED untied the head that BASE ties: PEFT would add its update to the embedding as well."""
    model = llama(tie_word_embeddings=True)
    base, after = saved(model, perturbed(model), tmp_path)
    tensors = load_file(after / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, after / "model.safetensors")
    results = lora_diag.extract(base, after, tmp_path / "adapter", rank=2)
    (head,) = (item for item in results.left_out if item.layer == "lm_head.weight")
    assert head.reason == "no_factors"
    assert head.fro > 19
    assert (
        "lm_head"
        not in json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())[
            "target_modules"
        ]
    )


def test_convolutions_and_embeddings(tmp_path):
    torch.manual_seed(0)
    toy = Toy()
    toy.depthwise_conv = nn.Conv1d(8, 8, 3, groups=8)
    results, _ = check(toy, tmp_path, rank=3, kept="norm|bias|depthwise")
    assert {record.layer: record.kind for record in results} == {
        "conv.weight": "convolution", "conv1d.weight": "convolution", "embed_tokens.weight": "embedding",
        "q_proj.weight": "linear", "up_proj.weight": "linear", "lm_head.weight": "linear",
    }  # fmt: skip
    left_out = {item.layer: item for item in results.left_out}
    assert left_out["depthwise_conv.weight"].reason == "no_factors"
    assert left_out["depthwise_conv.weight"].fro > 0


MIXTURE = {"num_local_experts": 3, "num_experts_per_tok": 2, "num_hidden_layers": 2}


def mixtral():
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL | MIXTURE))


def qwen3_moe():
    config = transformers.Qwen3MoeConfig(
        **SMALL,
        num_hidden_layers=2,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        head_dim=8,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def gpt_oss():
    config = transformers.GptOssConfig(
        **SMALL | MIXTURE | {"head_dim": 8, "layer_types": ["full_attention"] * 2}
    )
    return transformers.GptOssForCausalLM(config)


@pytest.mark.parametrize("make", [mixtral, qwen3_moe, gpt_oss])
def test_fused_experts_are_target_parameters(tmp_path, make):
    torch.manual_seed(0)
    halves = ("gate_up_proj",) if make is not gpt_oss else ()
    results, config = check(make(), tmp_path, rank=2, halves=halves, kept="norm|bias|sinks")
    assert config["target_parameters"][:2] == ["experts.down_proj", "experts.gate_up_proj"]
    assert sum(record.kind == "parameter" for record in results) >= 12


def test_experts_of_different_ranks_share_largest(tmp_path):
    """One expert at energy 0.5 may need more than another; the smaller is filled up with zeros."""
    torch.manual_seed(0)
    model = mixtral()
    base, tuned = saved(model, perturbed(model), tmp_path)
    results = lora_diag.extract(base, tuned, tmp_path / "adapter", energy=0.5)
    ranks = {record.layer: record.rank for record in results if "experts" in record.layer}
    assert len(set(ranks.values())) > 1
    before, after = open_checkpoint(base), open_checkpoint(tuned)
    pairing, _ = open_adapter(tmp_path / "adapter").pair(before)
    for delta in pairing.deltas:
        shape = before[delta.layer].shape
        change = (
            (after.read(delta.layer).double() - before.read(delta.layer).double())
            .view(shape)
            .numpy()
        )
        rank = results[delta.layer].rank
        gap = np.linalg.norm(dense(delta) - best(change, rank))
        assert gap <= 3e-6 * np.linalg.norm(change), delta.layer
    peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")


def test_layer_1_is_not_layer_11(tmp_path):
    """Every layer has its own rank: a pattern for layer 1 must not speak for layers 10 and 11, nor
    the other way.
    """
    model = llama(layers=12)
    tuned = perturbed(model, only="q_proj")
    base, after = saved(model, tuned, tmp_path)
    ranks = {f"model.layers.{i}.self_attn.q_proj.weight": i for i in range(1, 12)}
    lines = [
        {"record": "run", "schema": 1, "command": "allocate", "version": "0", "inputs": [], "settings": {}},
        *(
            {"record": "allocation", "layer": layer, "shape": [16, 16], "rank": rank, "params": 32 * rank,
             "kept": 0.5, "fro": 1.0, "cap": 16, "capped_by": "shape"}
            for layer, rank in ranks.items()
        ),
    ]  # fmt: skip
    (tmp_path / "ranks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = lora_diag.extract(
        base, after, tmp_path / "adapter", allocation=tmp_path / "ranks.jsonl"
    )
    assert {record.layer: record.rank for record in results} == ranks
    merged, w0, w1 = merged_by_peft(model, tmp_path / "adapter"), state(model), state(tuned)
    for layer in range(12):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        close(merged[name], w0[name] + best(w1[name] - w0[name], layer))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (
        "model.layers.1.self_attn.q_proj" in config["target_modules"]
    )  # layer 0 has none: "q_proj" would add it
    given = tmp_path / "adapter" / "adapter_config.json"
    repeated = lora_diag.extract(base, after, tmp_path / "again", allocation=given)
    assert {record.layer: record.rank for record in repeated} == ranks


def test_unfactored_tensors_are_saved_in_full(tmp_path):
    """Norms, biases of adapted layers and of others, and a table whose vocabulary grew."""
    model = gpt2()
    tuned = perturbed(model)
    base, after = saved(model, tuned, tmp_path)
    results = lora_diag.extract(
        base, after, tmp_path / "adapter", rank=16, exclude=r"h\.1\.mlp\.c_fc", unfactored="save"
    )
    merged, w0, w1 = merged_by_peft(model, tmp_path / "adapter"), state(model), state(tuned)
    for name, weight in merged.items():
        close(weight, w0[name] if "h.1.mlp.c_fc" in name else w1[name], 2e-6)
    assert {item.reason for item in results.left_out} == {"saved", "not_selected"}
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["bias"] == "all"


def test_grown_vocabulary_is_saved_in_full(tmp_path):
    model = llama()
    tuned = perturbed(model)
    tuned.resize_token_embeddings(30, mean_resizing=False)
    base, after = saved(model, tuned, tmp_path)
    lora_diag.extract(base, after, tmp_path / "adapter", rank=16, unfactored="save")
    model.resize_token_embeddings(30, mean_resizing=False)
    merged, w1 = merged_by_peft(model, tmp_path / "adapter"), state(tuned)
    for name, weight in merged.items():
        close(weight, w1[name], 2e-6)


def test_adapter_is_compressed_under_its_own_names(tmp_path):
    """LLaVA-like: the file says ``language_model.model``, the module in memory and the adapter say
    otherwise.
    """
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    on = write_base(tmp_path, {name: normal(12, 10)})
    b, a = normal(12, 4, seed=1), normal(4, 10, seed=2)
    module = "model.language_model.layers.0.self_attn.q_proj"
    path = adapter(
        tmp_path, {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, r=4, lora_alpha=8
    )
    results = lora_diag.extract(on, path, tmp_path / "small", rank=2)
    assert results.layers[0].module == module
    assert results.layers[0].method == "factored"
    pairing, _ = open_adapter(tmp_path / "small").pair(open_checkpoint(on))
    expected = best(2 * b @ a, 2)
    assert np.linalg.norm(dense(pairing.deltas[0]) - expected) < 1e-6 * np.linalg.norm(expected)


def test_untested_model_type_is_noted(tmp_path):
    for kind, message in (("llama", 0), ("segformer", 1)):
        tensors = {"stages.0.q_proj.weight": normal(8, 6)}
        model = write_base(tmp_path / kind, tensors, {"model_type": kind})
        tuned = write_base(
            tmp_path / kind / "tuned", {name: value + 1 for name, value in tensors.items()}
        )
        run = lora_diag.extract(model, tuned, tmp_path / kind / "adapter", rank=1).run
        assert sum(mentions(note, "segformer", "PEFT") for note in run.inputs[1].notes) == message
    smaller = lora_diag.extract(
        model, tmp_path / "segformer" / "adapter", tmp_path / "smaller", rank=1
    ).run
    assert smaller.inputs[1].notes == (
        "adapts 1 of 1 tensors of BASE",
    )  # that adapter tells the names


def test_updates_of_weight_used_twice_have_no_adapter(tmp_path):
    name = "model.layers.{}.mlp.up_proj"
    tensors = {f"{name.format(i)}.lora_{part}.weight": normal(*shape) for i in (0, 1) for part, shape in
               (("A", (2, 6)), ("B", (8, 2)))}  # fmt: skip
    model = write_base(tmp_path, {f"{name.format(0)}.weight": normal(8, 6)})
    replicated = adapter(tmp_path, tensors, layer_replication=[[0, 1], [0, 1]])
    with raises_naming(InputError, "layers.0", "layers.1", "BASE"):
        lora_diag.extract(model, replicated, tmp_path / "again", rank=2)
    assert not list(tmp_path.glob("again*"))


def test_adapter_that_reads_back_differently_is_refused(tmp_path):
    """The errors that were measured must be those of the file."""
    torch.manual_seed(0)
    base = open_checkpoint(write_base(tmp_path, {"q_proj.weight": np.zeros((6, 5))}))
    target = PeftTarget("q_proj.weight", (6, 5), "q_proj", "linear")
    part = LayerFactors(target, 2, tmp_path / "factors.safetensors")
    store_factors(part.file, torch.randn(6, 2), torch.randn(2, 5))
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_adapter(folder, [part], [], Described("base", "", frozenset({"q_proj"}), frozenset()))
    check_written(folder, base, [part])
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 4}))
    with raises_naming(InputError, "q_proj.weight"):
        check_written(folder, base, [part])


def test_ranks_of_config_are_shared_by_halves_of_fused_parameter(tmp_path):
    target = PeftTarget(
        "experts.0.w1.weight", (5, 8), "experts.gate_up_proj", "parameter", half=(0, 2)
    )
    path = tmp_path / "adapter_config.json"
    for rank, each in ((6, 3), (1, 1)):
        path.write_text(
            json.dumps({"peft_type": "LORA", "r": rank, "target_parameters": ["gate_up_proj"]})
        )
        assert read_config_ranks(path, {target.layer: target}) == {target.layer: each}
    for names in (3, {"q_proj": 1}, ["q_proj", 1]):
        path.write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": names}))
        with raises_naming(InputError, "regular expression"):
            read_config_ranks(path, {target.layer: target})


def test_square_experts_are_not_transposed_and_towers_keep_names(tmp_path):
    experts = "model.language_model.layers.0.mlp.experts.down_proj"
    base = open_checkpoint(
        write_base(tmp_path, {experts: normal(2, 6, 6)}, {"model_type": "qwen3_vl_moe"})
    )
    targets = [MemoryModel(base).find_target(delta) for delta in pair(base, base).deltas]
    assert [(target.expert, target.transposed) for target in targets] == [
        ((0, 2), False),
        ((1, 2), False),
    ]
    towers = ("audio_tower", "vision_tower", "multi_modal_projector")
    names = ["language_model.model.fc.weight", *(f"{tower}.fc.weight" for tower in towers)]
    model = MemoryModel(
        open_checkpoint(
            write_base(tmp_path / "qwen2_audio", {name: normal(4, 6) for name in names})
        )
    )
    expected = ["language_model", *towers]
    assert [model.in_memory(name) for name in names] == [
        f"model.{tower}.fc.weight" for tower in expected
    ]
