"""Plans: every number of the article's 7B tables and its worked example, headers against config,
and bad input.
"""

import json

import pytest

import lora_diag
from lora_diag.errors import InputError, UsageError
from tests.conftest import ROOT, save_model, weights

LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "torch_dtype": "float16",
}  # fmt: skip


def plan(tmp_path, config=LLAMA_7B, **options):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return lora_diag.plan(tmp_path, **options)


def types(found):
    return {row.name: row for row in found.types}


def test_plan_matches_article_table_of_matrices(tmp_path):
    result = types(plan(tmp_path))
    attention, up, down = result["self_attn.q_proj"], result["mlp.up_proj"], result["mlp.down_proj"]
    assert attention.params // attention.matrices == 16_777_216
    assert up.params // up.matrices == down.params // down.matrices == 45_088_768
    assert [r * attention.per_rank // 32 for r in (1, 4, 8, 16, 64)] == [
        8192,
        32_768,
        65_536,
        131_072,
        524_288,
    ]
    assert [r * up.per_rank // 32 for r in (1, 4, 8, 16, 64)] == [
        15_104,
        60_416,
        120_832,
        241_664,
        966_656,
    ]
    shares = [
        [f"{r * row.per_rank / row.params:.3%}" for r in (4, 8, 16, 64)] for row in (attention, up)
    ]
    assert shares == [
        ["0.195%", "0.391%", "0.781%", "3.125%"],
        ["0.134%", "0.268%", "0.536%", "2.144%"],
    ]


def test_plan_matches_article_query_value_totals(tmp_path):
    result = plan(tmp_path, layers="q_proj|v_proj")
    assert [(row.rank, row.params) for row in result.ranks] == [
        (4, 2_097_152), (8, 4_194_304), (16, 8_388_608), (64, 33_554_432),
    ]  # fmt: skip
    assert result.per_rank == 524_288
    assert [row.rho for row in result.ranks] == [2 * r / 4096 for r in (4, 8, 16, 64)]


def test_plan_matches_article_example(tmp_path):
    """r ≤ 19 under 10 M; r=16 leaves about 1.6 M.

    Rank 32 in the article's 8 blocks would take 2.1 M: 6 fit.
    """
    fit = plan(tmp_path, layers="q_proj|v_proj", params="10M").fit
    assert (fit.rank, fit.spent, fit.left) == (19, 9_961_472, 38_528)
    assert (fit.listed, fit.listed_left) == (16, 1_611_392)
    assert (fit.doubled, fit.blocks) == (6, 32)
    assert 6 * 16 * 16_384 <= fit.listed_left < 8 * 16 * 16_384


def test_whole_model_and_its_memory(tmp_path):
    result = plan(tmp_path)
    assert result.params == 6_738_415_616  # as published for Llama 2 7B
    assert result.base_bytes == 2 * result.params
    assert result.full_bytes["adamw"] == 16 * result.params
    assert result.full_bytes["sgd"] == 8 * result.params
    eight = result.ranks[1]
    assert eight.params == 8 * 32 * (4 * 8192 + 3 * 15_104)
    assert eight.bytes["adamw"] == 16 * eight.params
    assert eight.bytes["adamw8bit"] == 10.03125 * eight.params
    assert eight.of_model == eight.params / result.params
    bf16 = plan(tmp_path, adapter_dtype="bfloat16")
    assert bf16.full_bytes["adamw"] == (2 + 2 + 8) * result.params


def test_flops_count_matrices_multiplied_per_token(tmp_path):
    eight = plan(tmp_path).ranks[1]
    inside = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert eight.flops == pytest.approx(eight.params / (inside + 32000 * 4096))
    tied = plan(tmp_path, {**LLAMA_7B, "tie_word_embeddings": True})
    assert tied.ranks[1].flops == pytest.approx(eight.flops)
    assert tied.params == 6_738_415_616 - 32000 * 4096


def test_plan_of_mixture_counts_only_active_experts(tmp_path):
    config = {
        **LLAMA_7B, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 1,
    }  # fmt: skip
    result = plan(tmp_path, config)
    row = types(result)["mlp.experts.gate_up_proj"]
    assert (row.matrices, row.shape, row.per_rank) == (8, (22016, 4096), 8 * (22016 + 4096))
    assert not types(result)["mlp.gate"].targeted
    experts = 2 * (3 * 4096 * 11008)
    extra = 4 * (2 * ((22016 + 4096) + 15_104) + 4 * 8192)
    assert result.ranks[0].flops == pytest.approx(
        extra / (experts + 4 * 4096**2 + 8 * 4096 + 32000 * 4096)
    )
    assert "2 of 8" in result.notes[0]


def test_headers_and_config_agree():
    base = ROOT / "sample_checkpoints/base"
    by_headers, by_config = lora_diag.plan(base), lora_diag.plan(base / "config.json")
    assert by_headers.params == by_config.params == 853_120
    assert by_headers.base_bytes == by_config.base_bytes == 4 * 853_120
    assert by_headers.ranks == by_config.ranks
    assert sorted(by_headers.types, key=str) == sorted(by_config.types, key=str)


def test_checkpoint_without_config(tmp_path):
    result = lora_diag.plan(save_model(tmp_path / "model", weights(0)), params=1000, ranks=[2])
    assert result.params == sum(value.numel() for value in weights(0).values())
    per_rank = 2 * ((12 + 12) + (6 + 12) + 2 * (16 + 12))
    assert (result.fit.rank, result.fit.left) == (1000 // per_rank, 1000 % per_rank)


def test_memory_budget_includes_optimizer_state(tmp_path):
    fit = plan(tmp_path, layers="q_proj|v_proj", memory_budget="160MB").fit
    assert (fit.budget, fit.rank) == (10_000_000, 19)
    assert (
        plan(tmp_path, layers="q_proj|v_proj", memory_budget="80MB", optimizer="sgd").fit.rank == 19
    )
    assert plan(tmp_path, layers="q_proj|v_proj", params=524_287).fit.rank == 0


def test_budget_beyond_full_rank_is_unused(tmp_path):
    """No 4096 × 4096 matrix takes a rank above 4096, which costs twice its entries."""
    for params, rank in ((4096 * 524_288 - 1, 4095), (4096 * 524_288, 4096), ("9000B", 4096)):
        fit = plan(tmp_path, layers="q_proj|v_proj", params=params).fit
        assert (fit.rank, fit.full_rank, fit.spent) == (rank, 4096, rank * 524_288)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"params": "10M", "memory_budget": "1GB"}, "cannot be combined with params"),
        ({"memory_budget": "2"}, "memory_budget=2"),
        ({"layers": "nothing"}, "layers=nothing"),
        ({"layers": "("}, "layers"),
        ({"ranks": [0]}, "ranks=0"),
        ({"optimizer": "lion"}, "optimizer=lion"),
        ({"adapter_dtype": "int4"}, "adapter_dtype='int4'"),
        ({"tokens": "none"}, "tokens=none"),
        ({"tokens": 5, "data": "config.json"}, "cannot be combined with data"),
    ],
)
def test_invalid_options_are_refused(tmp_path, options, message):
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        plan(tmp_path, **options)


def test_plan_refuses_adapters_and_unreadable_configs(tmp_path):
    with pytest.raises(UsageError, match="is an adapter"):
        lora_diag.plan(ROOT / "sample_checkpoints/lora_r4")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="not an object"):
        lora_diag.plan(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        lora_diag.plan(tmp_path / "nothing.json")


def test_capacity_rules_choose_rank_for_tokens(tmp_path):
    """By hand: r(4·8192 + 3·15104)·32 parameters have to be as many as tokens, or 2 bits each hold
    1 bit a token.
    """
    per_rank = 32 * (4 * 8192 + 3 * 15_104)
    result = plan(tmp_path, tokens="100M").capacity
    assert result.tokens == 100_000_000
    options = [(rule.params, rule.rank) for rule in result.rules]
    assert options == [
        (100_000_000, -(-100_000_000 // per_rank)),
        (50_000_000, -(-50_000_000 // per_rank)),
    ]
    assert [rule.rank for rule in plan(tmp_path, tokens=10**12).capacity.rules] == [None, None]
    assert plan(tmp_path).capacity is None


@pytest.mark.slow
def test_data_size_counts_predicted_tokens(tmp_path):
    """Bytes are tokens here: a window of 8 predicts 7; of a completion every byte, and the prompt
    none.
    """
    pytest.importorskip("transformers")
    config = {
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 256,
        "num_attention_heads": 2, "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 8,
    }  # fmt: skip
    (tmp_path / "text.txt").write_text("x" * 20)  # two windows of 8, and a rest
    assert plan(tmp_path, config, data=tmp_path / "text.txt").capacity.tokens == 14
    rows = [{"prompt": "ab", "completion": "xyz"}, {"prompt": "a", "completion": "longer than it"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert plan(tmp_path, config, data=tmp_path / "rows.jsonl").capacity.tokens == 3 + 7
    assert plan(tmp_path, config, data=tmp_path / "rows.jsonl", length=4).capacity.tokens == 2 + 3
