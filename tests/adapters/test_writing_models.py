"""Model by model: the whole update, written as an adapter, loaded and merged by PEFT, is the
fine-tune again.

What a model is called in memory differs from its files, and PEFT treats mixtures of experts in its
own way; a name that PEFT does not find is dropped without a word, so only the merged weights tell.
"""

import re

import numpy as np
import pytest
import torch

import lora_diag
from tests.adapters.test_writing import SMALL, merged_by_peft, perturbed, saved, state
from tests.conftest import ROOT

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

BLOCKS = {"num_hidden_layers": 2}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
OLD = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_attention_heads": 2,
} | BLOCKS
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "image_size": 8, "patch_size": 4} | BLOCKS
VISION = SIZES | {"intermediate_size": 20}


def llava():
    vision, text = (
        transformers.CLIPVisionConfig(**VISION),
        transformers.LlamaConfig(**SMALL | BLOCKS),
    )
    return transformers.LlavaConfig(vision_config=vision, text_config=text)


def qwen2_vl():
    text = SMALL | BLOCKS | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2}
    return transformers.Qwen2VLConfig(text_config=text, vision_config=vision)


def deepseek():
    latent = {
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    }
    mixture = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    dense = {"first_k_dense_replace": 1, "moe_intermediate_size": 12}
    return transformers.DeepseekV3Config(**SMALL | BLOCKS | latent | mixture | dense)


def qwen3_vl_moe():
    rotary = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    mixture = {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "head_dim": 8,
    }
    vision = {
        "depth": 1, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 2, "intermediate_size": 20,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    return transformers.Qwen3VLMoeConfig(
        text_config=SMALL | BLOCKS | mixture | {"rope_scaling": rotary}, vision_config=vision
    )


def llama4():
    text = (
        SMALL
        | BLOCKS
        | {"head_dim": 8, "intermediate_size_mlp": 20, "num_local_experts": 3, "pad_token_id": 0}
    )
    vision = VISION | {
        "vision_output_dim": 16,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
    }
    return transformers.Llama4Config(text_config=text, vision_config=vision)


def jamba():
    layout = {
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    }
    mixture = {"num_experts": 3, "num_experts_per_tok": 2, "mamba_d_state": 4}
    return transformers.JambaConfig(**SMALL | BLOCKS | layout | mixture)


def nemotron_h():
    mamba = {"mamba_num_heads": 2, "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 1}
    mixture = {"n_routed_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    layers = {
        "layers_block_type": ["mamba", "moe"],
        "moe_shared_expert_intermediate_size": 12,
        "head_dim": 8,
    }
    return transformers.NemotronHConfig(**SMALL | mamba | mixture | layers)


def qwen2_moe():
    mixture = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    return transformers.Qwen2MoeConfig(
        **SMALL | BLOCKS | mixture, shared_expert_intermediate_size=12, mlp_only_layers=[1]
    )


def small(name, **more):
    return lambda: getattr(transformers, name)(**SMALL | BLOCKS | more)


MODELS = {
    "LlavaForConditionalGeneration": llava,
    "Qwen2VLForConditionalGeneration": qwen2_vl,
    "GPTNeoXForCausalLM": lambda: transformers.GPTNeoXConfig(**OLD),
    "BertForSequenceClassification": lambda: transformers.BertConfig(**OLD),
    "ViTForImageClassification": lambda: transformers.ViTConfig(**VISION),
    "T5ForConditionalGeneration": lambda: transformers.T5Config(
        vocab_size=24, d_model=16, d_ff=20, d_kv=8, num_layers=2, num_heads=2
    ),
    "DeepseekV3ForCausalLM": deepseek,
    "Qwen2MoeForCausalLM": qwen2_moe,
    "PhimoeForCausalLM": small("PhimoeConfig", **EXPERTS),
    "GraniteMoeForCausalLM": small("GraniteMoeConfig", **EXPERTS),
    "OlmoeForCausalLM": small("OlmoeConfig", num_experts=3, num_experts_per_tok=2),
    "Gemma3ForCausalLM": small("Gemma3TextConfig", head_dim=8),
    "Phi3ForCausalLM": small("Phi3Config", pad_token_id=0),
    "MambaForCausalLM": lambda: transformers.MambaConfig(
        vocab_size=24, hidden_size=16, state_size=4, num_hidden_layers=2
    ),
    "Dinov2ForImageClassification": lambda: transformers.Dinov2Config(**SIZES, mlp_ratio=2),
    "SwinForImageClassification": lambda: transformers.SwinConfig(
        image_size=16, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2
    ),
    "Qwen3VLMoeForConditionalGeneration": qwen3_vl_moe,
    "Llama4ForConditionalGeneration": llama4,
    "JambaForCausalLM": jamba,
    "NemotronHForCausalLM": nemotron_h,
}

BARE = "a bare parameter"

# What has no factors, with the reason that is given.
LEFT_OUT = {
    "ViTForImageClassification": {"cls_token": BARE, "position_embeddings": BARE},
    "MambaForCausalLM": {"A_log": BARE, "conv1d.weight": "PEFT refuses", "out_proj.weight": "PEFT refuses"},
    "Dinov2ForImageClassification": {"cls_token": BARE, "position_embeddings": BARE, "mask_token": BARE},
    "SwinForImageClassification": {"relative_position_bias_table": BARE},
    "Llama4ForConditionalGeneration": {"positional_embedding_vlm": BARE},
    "JambaForCausalLM": {"A_log": BARE, "conv1d.weight": "a convolution in groups"},
    "NemotronHForCausalLM": {"conv1d.weight": "PEFT refuses", "out_proj.weight": "PEFT refuses"},
}  # fmt: skip


def merge(model, folder, kept, **options):
    """Extract the whole update of a fine-tune, and compare what PEFT merges with it, but for
    weights that are kept.
    """
    tuned = perturbed(model)
    results = lora_diag.extract(
        *saved(model, tuned, folder), folder / "adapter", rank=64, **options
    )
    before, after = state(model), state(tuned)
    for name, value in merged_by_peft(model, folder / "adapter").items():
        expected = (before if value.ndim < 2 or re.search(kept, name) else after)[name]
        assert np.linalg.norm(value - expected) <= 3e-6 * np.linalg.norm(expected), name
    return results


@pytest.mark.parametrize("name", MODELS)
def test_peft_merges_whole_update(tmp_path, name):
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    model = getattr(transformers, name)(MODELS[name]())
    reasons = LEFT_OUT.get(name, {})
    results = merge(model, tmp_path, rf"({'|'.join(map(re.escape, reasons)) or 'nothing'})$")
    for item in results.left_out:
        if item.reason != "vector":
            leaf = next(leaf for leaf in reasons if leaf in item.layer)
            assert item.detail.startswith(reasons[leaf])


def test_skipped_experts_are_not_targets(tmp_path):
    """``experts.gate_up_proj`` would mean those of the layer without factors, too."""
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL | BLOCKS | EXPERTS))
    merge(model, tmp_path, r"layers\.0\.mlp\.experts", exclude=r"layers\.0\..*experts")
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert not any("layers.0.mlp.experts" in key and "lora" in key for key in wrapped.state_dict())


def test_sample_with_all_its_rank_answers_like_fine_tune(tmp_path):
    """Full rank and the rest in full: the logits are those of TUNED, merged or not."""
    samples = ROOT / "sample_checkpoints"
    lora_diag.extract(
        samples / "base", samples / "full_ft", tmp_path / "adapter", rank=128, unfactored="save"
    )
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(
            samples / side, dtype=torch.float32
        ).eval()
        for side in ("base", "full_ft")
    ]
    adapted = peft.PeftModel.from_pretrained(models[0], tmp_path / "adapter").eval()
    tokens = torch.arange(1, 40)[None]
    with torch.no_grad():
        expected, apart = models[1](tokens).logits, adapted(tokens).logits
        merged = adapted.merge_and_unload()(tokens).logits
    assert (apart - expected).norm() < 1e-5 * expected.norm()
    assert (merged - expected).norm() < 1e-5 * expected.norm()
