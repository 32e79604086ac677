"""Names and row orders of GGUF tensors, by architecture, and the corresponding ones of transformers.

llama.cpp's converter renames every tensor and, for models of Llama's family, reorders the rows of q and k: transformers
stores the rows of a head as two halves, llama.cpp as pairs, because their rotary embeddings rotate halves and pairs.

Reference: ``gguf.tensor_mapping`` (gguf 0.19.0); ggml-org/llama.cpp ``conversion/llama.py`` (``LlamaModel.permute``)
and the classes that inherit it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")

_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_UNGATED = {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_AROUND = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_AFTER = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_LLAMA = {**_ATTENTION, **_GATED, **_NORMS}
_QWEN_MOE = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
_PHI3 = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
    **_NORMS,
}
_STARCODER2 = {**_ATTENTION, **_NORMS, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}

# Tensors outside of blocks -> modules outside of layers.
OUTSIDE_BLOCKS = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}


@dataclass(frozen=True)
class Names:
    """The names of an architecture.

    Args:
        architecture: ``general.architecture``.
        model_types: ``model_type`` of the configs that are converted to it.
        block: A tensor of a block -> the module in a layer; ``{}`` for the number of an expert.
        halves_to_pairs: Whether the rows of q and k are reordered.
    """

    architecture: str
    model_types: tuple[str, ...]
    block: Mapping[str, str]
    halves_to_pairs: bool = False

    def in_transformers(self, name: str) -> str | None:
        """Return transformers' name of a tensor; None if it is not known.

        >>> ARCHITECTURES["llama"].in_transformers("blk.3.attn_q.weight")
        'model.layers.3.self_attn.q_proj.weight'
        """
        stem, _, leaf = name.rpartition(".")
        if match := _BLOCK.fullmatch(stem):
            module = self.block.get(match[2])
            return f"model.layers.{int(match[1])}.{module}.{leaf}" if module is not None else None
        return f"{OUTSIDE_BLOCKS[stem]}.{leaf}" if stem in OUTSIDE_BLOCKS else None

    def in_gguf(self, name: str) -> str | None:
        """Return GGUF's name of a tensor of transformers; None if it is not known.

        >>> ARCHITECTURES["llama"].in_gguf("model.layers.3.self_attn.q_proj.weight")
        'blk.3.attn_q.weight'
        """
        stem, _, leaf = name.rpartition(".")
        if match := _LAYER.fullmatch(stem):
            tensor = next(
                (in_gguf for in_gguf, in_transformers in self.block.items() if in_transformers == match[2]), None
            )
            return f"blk.{match[1]}.{tensor}.{leaf}" if tensor is not None else None
        return next(
            (f"{in_gguf}.{leaf}" for in_gguf, in_transformers in OUTSIDE_BLOCKS.items() if in_transformers == stem),
            None,
        )

    def heads_key(self, name: str) -> str:
        """Return the setting of ``config.json`` with the number of heads whose rows are reordered; empty if none are.

        Args:
            name: GGUF's name of a tensor.
        """
        match = _BLOCK.fullmatch(name.rpartition(".")[0])
        if not self.halves_to_pairs or match is None:
            return ""
        return {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(match[2], "")


ARCHITECTURES = {
    names.architecture: names
    for names in (
        Names("llama", ("llama", "mistral", "mixtral"), {**_LLAMA, **_MIXTRAL}, halves_to_pairs=True),
        Names("granite", ("granite",), _LLAMA, halves_to_pairs=True),
        Names("smollm3", ("smollm3",), _LLAMA, halves_to_pairs=True),
        Names("arcee", ("arcee",), {**_ATTENTION, **_NORMS, **_UNGATED}, halves_to_pairs=True),
        Names("olmo", ("olmo",), {**_ATTENTION, **_GATED}, halves_to_pairs=True),
        Names("olmo2", ("olmo2", "olmo3"), {**_ATTENTION, **_GATED, **_QK_NORMS, **_AFTER}),
        Names("qwen2", ("qwen2",), _LLAMA),
        Names("qwen2moe", ("qwen2_moe",), {**_ATTENTION, **_NORMS, **_QWEN_MOE, **_SHARED}),
        Names("qwen3", ("qwen3",), {**_LLAMA, **_QK_NORMS}),
        Names("qwen3moe", ("qwen3_moe",), {**_ATTENTION, **_NORMS, **_QK_NORMS, **_QWEN_MOE}),
        Names("gemma", ("gemma",), _LLAMA),
        Names("gemma2", ("gemma2",), {**_ATTENTION, **_GATED, **_AROUND}),
        Names("gemma3", ("gemma3", "gemma3_text"), {**_ATTENTION, **_GATED, **_AROUND, **_QK_NORMS}),
        Names("phi3", ("phi3",), _PHI3),
        Names("starcoder2", ("starcoder2",), _STARCODER2),
    )
}


def of_config(config: Mapping[str, Any]) -> Names | None:
    """Return the names of the model that a ``config.json`` describes; None if they are not known."""
    text = config.get("text_config")
    kinds = [settings.get("model_type") for settings in (config, text if isinstance(text, dict) else {})]
    return next((names for names in ARCHITECTURES.values() for kind in kinds if kind in names.model_types), None)


def heads(config: Mapping[str, Any], key: str) -> int | None:
    """Return a number of heads of a ``config.json``; None if it gives none.

    Without ``num_key_value_heads``, k has as many heads as q.
    """
    text = config.get("text_config")
    for settings in (config, text if isinstance(text, dict) else {}):
        for name in (key, "num_attention_heads"):
            value = settings.get(name)
            if type(value) is int and value > 0:
                return value
    return None


def to_pairs(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return rows in llama.cpp's order: of each head, row j of the first half, then row j of the second.

    Args:
        rows: In transformers' order; the first dimension must be a multiple of twice the number of heads.
        count: Number of heads.
    """
    return rows.reshape(count, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def to_halves(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return rows in transformers' order: the inverse of ``to_pairs``."""
    return rows.reshape(count, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
