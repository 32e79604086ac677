"""What a layer's name says: its depth, its module type, its part of the model.

Names are only grouped here, for tables, plots and selectors; nothing that is computed depends on these guesses.
"""

from __future__ import annotations

import re
from typing import Literal

Part = Literal["matrices", "vocabulary"]

# Tables whose rows are vocabulary entries, so that a fine-tune may have added some. Meta's own Llama files call the
# head ``output``; deeper in a model that is the name of other layers, so only the whole name counts.
RESIZABLE = re.compile(
    r"(^|\.)(embed_tokens|tok_embeddings|wte|word_embeddings|embed_in|shared|lm_head|embed_out)(\.weight)?$"
    r"|^output\.weight$"
)
# Other tables, such as those of positions. An adapter's usual placement reaches neither kind.
_TABLES = re.compile(r"(^|\.)(embed_\w+|wpe|\w+_embeddings|embeddings)(\.\w+)?$")
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


def part_of(layer: str) -> Part:
    """Return the part of the model in which a matrix is counted: with embeddings and head, or with the others.

    >>> part_of("model.embed_tokens.weight"), part_of("model.layers.0.mlp.up_proj.weight")
    ('vocabulary', 'matrices')
    >>> part_of("gpt_neox.embed_in.weight"), part_of("output.weight"), part_of("layer.0.attention.output.weight")
    ('vocabulary', 'vocabulary', 'matrices')
    """
    return "vocabulary" if RESIZABLE.search(layer) or _TABLES.search(layer) else "matrices"
