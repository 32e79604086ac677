"""What a layer's name says: its depth, its module type, its part of the model.

Names are only grouped here, for tables, plots and selectors; nothing that is computed depends on these guesses.
"""

from __future__ import annotations

import re
from typing import Literal

Part = Literal["matrices", "vocabulary", "vectors"]

# Tables indexed by tokens or positions, and the output head: what an adapter's usual placement does not reach.
_VOCABULARY = re.compile(
    r"(^|\.)(embed_\w+|tok_embeddings|wte|wpe|\w+_embeddings|embeddings|shared|lm_head|embed_out)(\.\w+)?$"
)
_NUMBER = re.compile(r"(?:\.|^)(\d+)(?=\.|$)")


def depth_of(layer: str) -> int | None:
    """Return the index of the block a weight belongs to; None outside the blocks.

    >>> depth_of("model.layers.17.mlp.experts.3.w1.weight"), depth_of("lm_head.weight")
    (17, None)
    """
    found = _NUMBER.search(layer)
    return int(found[1]) if found else None


def module_type_of(layer: str) -> str:
    """Return what the weight is within its block, numbers of experts replaced by ``*``.

    >>> module_type_of("model.layers.17.self_attn.q_proj.weight")
    'self_attn.q_proj'
    >>> module_type_of("h.0.mlp.experts.3.w1.weight"), module_type_of("mlp.experts.down_proj[3]")
    ('mlp.experts.*.w1', 'mlp.experts.down_proj')
    >>> module_type_of("lm_head.weight"), module_type_of("model.embed_tokens.weight")
    ('lm_head', 'embed_tokens')
    """
    name = re.sub(r"\[\d+\]$", "", layer).removesuffix(".weight")
    found = _NUMBER.search(name)
    inside = name[found.end() :].lstrip(".") if found else name
    return _NUMBER.sub(".*", inside).removeprefix("model.") or name


def part_of(layer: str, is_matrix: bool = True) -> Part:
    """Return the part of the model in which coverage is counted.

    >>> part_of("model.embed_tokens.weight"), part_of("model.layers.0.mlp.up_proj.weight")
    ('vocabulary', 'matrices')
    """
    if not is_matrix:
        return "vectors"
    return "vocabulary" if _VOCABULARY.search(layer) else "matrices"
