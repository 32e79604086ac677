"""Matrices of a model, and names and shapes of its weights from its ``config.json``, for common
decoders.

Names are those of transformers in memory (experts fused into stacks, as since version 5). No
checkpoint is opened, and an unknown architecture is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora_diag.deltas import CONVOLUTION, EXPERTS
from lora_diag.errors import InputError, quote

Shape = tuple[int, ...]
Weights = Iterator[tuple[str, Shape]]

# Published decoders have at most 200 blocks, and no size above 300,000 (vocabularies).
MAX_BLOCKS, MAX_SIZE = 1_000, 2**31


@dataclass(frozen=True, slots=True)
class Matrix:
    """The matrices of one tensor.

    Args:
        name: The tensor's name.
        shape: ``(out, in)`` of each.
        count: Number of matrices in the tensor: the experts of a stack, else 1.
    """

    name: str
    shape: tuple[int, int]
    count: int = 1

    @property
    def entries(self) -> int:
        """Total number of entries."""
        return self.count * math.prod(self.shape)

    @property
    def per_rank(self) -> int:
        """Number of parameters of one rank on all of them."""
        return self.count * sum(self.shape)


def make_matrix(name: str, shape: tuple[int, ...]) -> Matrix:
    """Return a tensor's matrices, as ``deltas`` does: a 3-D tensor is a stack of experts, unless it
    is a convolution.

    The kernels of a convolution are flattened to ``(out, rest)``.
    """
    if len(shape) == 3 and (EXPERTS.search(name) or not CONVOLUTION.search(name)):
        return Matrix(name, (shape[1], shape[2]), shape[0])
    return Matrix(name, (shape[0], math.prod(shape[1:])))


def split_experts(matrix: Matrix) -> list[Matrix]:
    """Return the gate and up matrices of a stack of experts that holds both as one; another matrix
    unchanged.
    """
    if matrix.count == 1 or not matrix.name.endswith("gate_up_proj"):
        return [matrix]
    half = (matrix.shape[0] // 2, matrix.shape[1])
    return [
        Matrix(matrix.name.replace("gate_up", part), half, matrix.count) for part in ("gate", "up")
    ]


@dataclass(frozen=True)
class Reader:
    """Reader of sizes in one ``config.json``.

    Args:
        values: Its content.
        where: Its name in messages.
    """

    values: Mapping[str, Any]
    where: str

    def size(self, *keys: str, default: int | None = None) -> int:
        """Return the value of the first of these keys that exists and is not null; the default
        without one.

        Raises:
            InputError: No key exists and there is no default, or the value is not a positive whole
                number.
        """
        value = next(
            (self.values[key] for key in keys if self.values.get(key) is not None), default
        )
        if value is None:
            raise InputError(f"{self.where}: has no {keys[0]}; give the checkpoint itself")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
            raise InputError(
                f"{self.where}: {keys[0]} must be a whole number from 1 to 2^31, not {quote(value)}"
            )
        return value

    def blocks(self, *keys: str) -> int:
        """Return the number of blocks.

        Raises:
            InputError: As ``size``; or the number is implausibly large.
        """
        if (number := self.size(*keys)) > MAX_BLOCKS:
            raise InputError(
                f"{self.where}: {keys[0]} is {number:,}; at most {MAX_BLOCKS:,} blocks are "
                "supported"
            )
        return number

    def flag(self, key: str, default: bool) -> bool:
        """Return a value as a Boolean; the default where it is missing or null."""
        value = self.values.get(key)
        return bool(default if value is None else value)


def select_text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the ``text_config`` of a vision-language model's ``config.json``; the config itself
    without one.
    """
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


@dataclass(frozen=True)
class Llama:
    """Differences of an architecture from Llama.

    Args:
        tied: Whether the head is the embedding by default.
        qkv_bias: Whether the query, key and value projections have biases by default.
        qk_norm: Norms on queries and keys: ``head`` for each head, ``all`` for all heads together,
            empty for none.
        norms: Norms of a block.
        fused: Whether query, key, value are one matrix, and gate and up another.
        head_dim: Default width of a head; None for hidden_size / heads.
    """

    tied: bool = False
    qkv_bias: bool = False
    qk_norm: str = ""
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    fused: bool = False
    head_dim: int | None = None


_GEMMA = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)

# model_type -> differences from Llama.
LLAMAS = {
    "llama": Llama(),
    "mistral": Llama(),
    "qwen2": Llama(qkv_bias=True),
    "qwen3": Llama(qk_norm="head", head_dim=128),
    "gemma": Llama(tied=True, head_dim=256),
    "gemma2": Llama(tied=True, norms=_GEMMA, head_dim=256),
    "gemma3_text": Llama(tied=True, norms=_GEMMA, qk_norm="head", head_dim=256),
    "olmo2": Llama(qk_norm="all", norms=_GEMMA[1::2]),
    "phi3": Llama(fused=True),
    "smollm3": Llama(tied=True),
    "mixtral": Llama(),
    "olmoe": Llama(qk_norm="all"),
    "qwen2_moe": Llama(qkv_bias=True),
    "qwen3_moe": Llama(qk_norm="head"),
}


def weights_of(config: Mapping[str, Any], where: str) -> list[tuple[str, Shape]]:
    """Return the name and shape of every weight and bias, block by block.

    Args:
        config: Content of ``config.json``; for a vision-language model, its ``text_config`` is
            used.
        where: Its name in messages.

    Raises:
        InputError: The architecture is unknown, or a size is missing or invalid.

    Example:
        >>> config = {
        ...     "model_type": "llama",
        ...     "hidden_size": 8,
        ...     "intermediate_size": 16,
        ...     "num_hidden_layers": 1,
        ...     "num_attention_heads": 2,
        ...     "vocab_size": 32,
        ... }
        >>> weights_of(config, "config.json")[1]
        ('model.layers.0.self_attn.q_proj.weight', (8, 8))
    """
    reader = Reader(select_text_config(config), where)
    model_type = reader.values.get("model_type")
    build = BUILDERS.get(model_type) if isinstance(model_type, str) else None
    if build is None:
        supported = ", ".join(BUILDERS)
        raise InputError(
            f"{where}: model_type {quote(model_type)} is not supported ({supported}); give the "
            "checkpoint itself, of which only headers are read"
        )
    return list(build(reader))


def _list_layer(name: str, shape: Shape, biased: bool = True) -> Weights:
    """Yield the weight of a layer or norm and, if it is ``biased``, its bias of one
    value per row.
    """
    yield f"{name}.weight", shape
    if biased:
        yield f"{name}.bias", shape[:1]


def _list_decoder(
    reader: Reader, kind: Llama, list_block: Callable[[str, int], Weights]
) -> Weights:
    """Yield the weights of a model with the names of Llama outside its blocks.

    Args:
        reader: Reader of the config.
        kind: Differences from Llama.
        list_block: Yields the weights of a block but ``kind.norms``, from the prefix of their names
            and its index.
    """
    hidden, vocabulary = reader.size("hidden_size"), reader.size("vocab_size")
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for index in range(reader.blocks("num_hidden_layers")):
        prefix = f"model.layers.{index}."
        yield from list_block(prefix, index)
        yield from ((f"{prefix}{norm}.weight", (hidden,)) for norm in kind.norms)
    yield "model.norm.weight", (hidden,)
    if not reader.flag("tie_word_embeddings", kind.tied):
        yield "lm_head.weight", (vocabulary, hidden)


def _list_llama(reader: Reader) -> Weights:
    kind, hidden = LLAMAS[reader.values["model_type"]], reader.size("hidden_size")

    def list_block(prefix: str, index: int) -> Weights:
        yield from _list_attention(reader, kind, hidden, prefix + "self_attn.")
        yield from _list_mlp(reader, kind, hidden, prefix + "mlp.", index)

    return _list_decoder(reader, kind, list_block)


def _list_attention(reader: Reader, kind: Llama, hidden: int, prefix: str) -> Weights:
    heads = reader.size("num_attention_heads")
    kv_heads = reader.size("num_key_value_heads", default=heads)
    width = reader.size("head_dim", default=kind.head_dim or hidden // heads)
    query_size, key_size = heads * width, kv_heads * width
    all_biased = reader.flag("attention_bias", False)
    biased = all_biased or reader.flag("qkv_bias", kind.qkv_bias)
    if kind.fused:
        yield prefix + "qkv_proj.weight", (query_size + 2 * key_size, hidden)
    else:
        for name, rows in (("q_proj", query_size), ("k_proj", key_size), ("v_proj", key_size)):
            yield from _list_layer(prefix + name, (rows, hidden), biased)
    yield from _list_layer(prefix + "o_proj", (hidden, query_size), all_biased and not kind.fused)
    if kind.qk_norm:
        yield prefix + "q_norm.weight", (width if kind.qk_norm == "head" else query_size,)
        yield prefix + "k_norm.weight", (width if kind.qk_norm == "head" else key_size,)


def _list_mlp(reader: Reader, kind: Llama, hidden: int, prefix: str, index: int) -> Weights:
    """Yield the weights of a block's dense MLP or mixture of experts."""
    model_type = reader.values["model_type"]
    if model_type not in {"mixtral", "olmoe", "qwen2_moe", "qwen3_moe"} or _is_dense(reader, index):
        yield from _list_dense(reader, kind, hidden, prefix, reader.size("intermediate_size"))
        return
    experts = reader.size("num_local_experts", "num_experts")
    inner = reader.size("moe_intermediate_size", "intermediate_size")
    yield from _list_experts(hidden, prefix, experts, inner)
    if model_type == "qwen2_moe":
        shared = reader.size("shared_expert_intermediate_size")
        yield from _list_dense(reader, kind, hidden, prefix + "shared_expert.", shared)
        yield prefix + "shared_expert_gate.weight", (1, hidden)


def _list_experts(hidden: int, prefix: str, experts: int, inner: int) -> Weights:
    """Yield the weights of a router, and of its experts fused into stacks."""
    yield prefix + "gate.weight", (experts, hidden)
    yield prefix + "experts.gate_up_proj", (experts, 2 * inner, hidden)
    yield prefix + "experts.down_proj", (experts, hidden, inner)


def _is_dense(reader: Reader, index: int) -> bool:
    """Return whether a block of a mixture of experts is dense (Qwen: ``mlp_only_layers``,
    ``decoder_sparse_step``).
    """
    step = reader.size("decoder_sparse_step", default=1)
    dense = reader.values.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise InputError(f"{reader.where}: mlp_only_layers must be a list, not {quote(dense)}")
    return index in dense or (index + 1) % step > 0


def _list_dense(reader: Reader, kind: Llama, hidden: int, prefix: str, inner: int) -> Weights:
    biased = reader.flag("mlp_bias", False)
    for name in ("gate_up_proj",) if kind.fused else ("gate_proj", "up_proj"):
        yield from _list_layer(prefix + name, (2 * inner if kind.fused else inner, hidden), biased)
    yield from _list_layer(prefix + "down_proj", (hidden, inner), biased)


def _list_gpt2(reader: Reader) -> Weights:
    """Yield the weights of GPT-2, whose Conv1D stores ``(in, out)``; the head is the embedding by
    default.
    """
    hidden, vocabulary = reader.size("n_embd", "hidden_size"), reader.size("vocab_size")
    inner = reader.size("n_inner", default=4 * hidden)
    yield "transformer.wte.weight", (vocabulary, hidden)
    yield "transformer.wpe.weight", (reader.size("n_positions"), hidden)
    matrices = {"attn.c_attn": (hidden, 3 * hidden), "attn.c_proj": (hidden, hidden)}
    matrices |= {"mlp.c_fc": (hidden, inner), "mlp.c_proj": (inner, hidden)}
    for index in range(reader.blocks("n_layer", "num_hidden_layers")):
        prefix = f"transformer.h.{index}."
        for norm in ("ln_1", "ln_2"):
            yield from _list_layer(prefix + norm, (hidden,))
        for name, shape in matrices.items():
            yield f"{prefix}{name}.weight", shape
            yield f"{prefix}{name}.bias", shape[1:]
    yield from _list_layer("transformer.ln_f", (hidden,))
    if not reader.flag("tie_word_embeddings", True):
        yield "lm_head.weight", (vocabulary, hidden)


def _list_gpt_neox(reader: Reader) -> Weights:
    hidden, vocabulary = reader.size("hidden_size"), reader.size("vocab_size")
    inner = reader.size("intermediate_size")
    attention = {
        "attention.query_key_value": (3 * hidden, hidden),
        "attention.dense": (hidden, hidden),
    }
    others: dict[str, Shape] = dict.fromkeys(
        ("input_layernorm", "post_attention_layernorm"), (hidden,)
    )
    others |= {"mlp.dense_h_to_4h": (inner, hidden), "mlp.dense_4h_to_h": (hidden, inner)}
    yield "gpt_neox.embed_in.weight", (vocabulary, hidden)
    for index in range(reader.blocks("num_hidden_layers")):
        for name, shape in {**attention, **others}.items():
            biased = name in others or reader.flag("attention_bias", True)
            yield from _list_layer(f"gpt_neox.layers.{index}.{name}", shape, biased)
    yield from _list_layer("gpt_neox.final_layer_norm", (hidden,))
    if not reader.flag("tie_word_embeddings", False):
        yield "lm_head.weight", (vocabulary, hidden)


def _list_deepseek(reader: Reader) -> Weights:
    """Yield the weights of DeepSeek V3: low-rank attention (MLA), and a mixture of experts after
    the first blocks.
    """
    kind, hidden = Llama(), reader.size("hidden_size")

    def list_block(prefix: str, index: int) -> Weights:
        yield from _list_latent_attention(reader, hidden, prefix + "self_attn.")
        if index < reader.size("first_k_dense_replace"):
            yield from _list_dense(
                reader, kind, hidden, prefix + "mlp.", reader.size("intermediate_size")
            )
            return
        experts, inner = reader.size("n_routed_experts"), reader.size("moe_intermediate_size")
        yield from _list_experts(hidden, prefix + "mlp.", experts, inner)
        shared = inner * reader.size("n_shared_experts")
        yield from _list_dense(reader, kind, hidden, prefix + "mlp.shared_experts.", shared)

    return _list_decoder(reader, kind, list_block)


def _list_latent_attention(reader: Reader, hidden: int, prefix: str) -> Weights:
    heads, values = reader.size("num_attention_heads"), reader.size("v_head_dim")
    rotated, unrotated = reader.size("qk_rope_head_dim"), reader.size("qk_nope_head_dim")
    kv_rank, biased = reader.size("kv_lora_rank"), reader.flag("attention_bias", False)
    if reader.values.get("q_lora_rank", 0) is None:  # as in the smaller models: full-rank queries
        yield prefix + "q_proj.weight", (heads * (unrotated + rotated), hidden)
    else:
        rank = reader.size("q_lora_rank")
        yield from _list_layer(prefix + "q_a_proj", (rank, hidden), biased)
        yield prefix + "q_a_layernorm.weight", (rank,)
        yield prefix + "q_b_proj.weight", (heads * (unrotated + rotated), rank)
    yield from _list_layer(prefix + "kv_a_proj_with_mqa", (kv_rank + rotated, hidden), biased)
    yield prefix + "kv_a_layernorm.weight", (kv_rank,)
    yield prefix + "kv_b_proj.weight", (heads * (unrotated + values), kv_rank)
    yield from _list_layer(prefix + "o_proj", (hidden, heads * values), biased)


BUILDERS: dict[str, Callable[[Reader], Weights]] = {
    **dict.fromkeys(LLAMAS, _list_llama),
    "deepseek_v3": _list_deepseek,
    "gpt2": _list_gpt2,
    "gpt_neox": _list_gpt_neox,
}
