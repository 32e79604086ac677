"""Names and shapes from a config against the models that transformers builds from it."""

import pytest

from lora_diag.decisions.plan.architectures import BUILDERS, weights_of
from lora_diag.errors import InputError

SMALL = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
MOE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 10}
LATENT = {
    "moe_intermediate_size": 10, "n_routed_experts": 4, "n_shared_experts": 2, "q_lora_rank": 6, "kv_lora_rank": 5,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 3, "v_head_dim": 7, "first_k_dense_replace": 1, "n_group": 2,
    "topk_group": 1, "num_experts_per_tok": 2, "num_key_value_heads": 4,
}  # fmt: skip
CASES = [
    *[(kind, {}) for kind in BUILDERS if kind not in {"gpt2", "gpt_neox", "deepseek_v3"}],
    ("deepseek_v3", LATENT),
    (
        "deepseek_v3",
        {**LATENT, "q_lora_rank": None, "attention_bias": True, "tie_word_embeddings": True},
    ),
    ("deepseek_v3", {**LATENT, "attention_bias": True}),
    (
        "llama",
        {"head_dim": 6, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    ("mixtral", {"num_local_experts": 3}),
    ("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 12, "mlp_only_layers": [0]}),
    ("qwen3_moe", {**MOE, "decoder_sparse_step": 2, "head_dim": 4}),
    ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 12, "vocab_size": 20}),
    (
        "gpt2",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 40, "tie_word_embeddings": False},
    ),
    ("gpt_neox", {}),
]


@pytest.mark.parametrize(
    ("kind", "more"), CASES, ids=lambda value: value if isinstance(value, str) else len(value)
)
def test_names_and_shapes_equal_transformers(kind, more):
    torch, transformers = (
        pytest.importorskip("torch"),
        pytest.importorskip("transformers", minversion="5"),
    )
    sizes = more if kind == "gpt2" else {**SMALL, **more}
    config = transformers.AutoConfig.for_model(kind, **sizes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert dict(weights_of(config.to_dict(), "config.json")) == wanted
    # what a config.json may leave out, because it is the default of the class
    diff = {"model_type": kind, **config.to_diff_dict()}
    try:
        assert dict(weights_of(diff, "config.json")) == wanted
    except InputError as error:
        assert "has no " in str(error)  # noqa: PT017  (a refusal is right, a guess is not)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "model_type None is not supported"),
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"model_type": "llama", "hidden_size": 8}, "has no vocab_size"),
        ({"model_type": "llama", "hidden_size": -8}, "hidden_size must be a whole number"),
        ({"model_type": "llama", "hidden_size": True}, "hidden_size must be a whole number"),
        ({"model_type": ["llama"]}, "is not supported"),
        ({"model_type": "llama", **SMALL, "num_hidden_layers": 10**9}, "at most 1,000 blocks"),
        ({"model_type": "llama", **SMALL, "num_hidden_layers": 10**4}, "at most 1,000 blocks"),
        (
            {"model_type": "llama", "hidden_size": 10**4000},
            "hidden_size must be .* not a whole number of 13,288 bits",
        ),
        ({"model_type": "x" * 100_000}, "is not supported"),
    ],
)
def test_incomplete_config_is_refused(config, message):
    with pytest.raises(InputError, match=message) as caught:
        weights_of(config, "config.json")
    assert len(str(caught.value)) < 500


def test_text_part_of_larger_model_is_read():
    inner = {"model_type": "llama", **SMALL}
    assert weights_of({"model_type": "llava", "text_config": inner}, "c") == weights_of(inner, "c")
