"""Information in a layer's name: depth, module type, part of the model; and short labels of paths.

Used to group names in tables, plots and selectors; no computed value depends on these guesses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Literal

Part = Literal["matrices", "vocabulary"]

# Tables whose rows are vocabulary entries, so that a fine-tune may have added some. Meta's own
# Llama files name the head ``output``, which is the name of other layers inside a model, so only
# the whole name matches.
RESIZABLE = re.compile(
    r"(^|\.)(embed_tokens|tok_embeddings|wte|word_embeddings|embed_in|shared|lm_head|embed_out)(\.weight)?$"
    r"|^output\.weight$"
)
# Other tables, such as position embeddings. Adapters usually target neither kind.
_TABLES = re.compile(
    r"(^|\.)(embed_\w+|pos_embed|wpe|(?!patch_)\w*embeddings?|relative_attention_bias)(\.\w+)?(\[\d+\])?$"
)
_NUMBER = re.compile(r"(?:\.|^)(\d{1,9})(?=\.|$)")

# Usual order of the types in a block; others follow in the order of the file.
_ORDER = (
    "qkv",
    "c_attn",
    "q_proj",
    "query",
    "k_proj",
    "key",
    "v_proj",
    "value",
    "o_proj",
    "gate",
    "up_proj",
    "down",
)


def depth_of(layer: str) -> int | None:
    """Return the index of the block a weight belongs to; None outside the blocks.

    >>> depth_of("model.layers.17.mlp.experts.3.w1.weight"), depth_of("lm_head.weight")
    (17, None)
    """
    match = _NUMBER.search(layer)
    return int(match[1]) if match else None


def module_type_of(layer: str) -> str:
    """Return the type of a weight within its block, with expert numbers replaced by ``*``.

    >>> module_type_of("model.layers.17.self_attn.q_proj.weight")
    'self_attn.q_proj'
    >>> module_type_of("h.0.mlp.experts.3.w1.weight"), module_type_of("mlp.experts.down_proj[3]")
    ('mlp.experts.*.w1', 'mlp.experts.down_proj')
    >>> module_type_of("lm_head.weight"), module_type_of("model.embed_tokens.weight")
    ('lm_head', 'embed_tokens')
    """
    name = re.sub(r"\[\d+\]$", "", layer).removesuffix(".weight")
    match = _NUMBER.search(name)
    inside = name[match.end() :].lstrip(".") if match else name
    return _NUMBER.sub(".*", inside).removeprefix("model.") or name


def part_of(layer: str) -> Part:
    """Return the part of the model of a matrix: embeddings and head, or the others.

    >>> part_of("model.embed_tokens.weight"), part_of("model.layers.0.mlp.up_proj.weight")
    ('vocabulary', 'matrices')
    >>> (
    ...     part_of("gpt_neox.embed_in.weight"),
    ...     part_of("output.weight"),
    ...     part_of("layer.0.attention.output.weight"),
    ... )
    ('vocabulary', 'vocabulary', 'matrices')
    >>> (
    ...     part_of("model.visual.pos_embed.weight"),
    ...     part_of("text_model.embeddings.token_embedding.weight"),
    ... )
    ('vocabulary', 'vocabulary')
    """
    return "vocabulary" if RESIZABLE.search(layer) or _TABLES.search(layer) else "matrices"


def type_order(layer: str) -> tuple[bool, bool, int]:
    """Return a sort key of module types: attention before MLP before vocabulary tables.

    >>> names = [
    ...     "lm_head.weight",
    ...     "h.0.mlp.up_proj.weight",
    ...     "h.0.attn.v_proj.weight",
    ...     "h.0.attn.q_proj.weight",
    ... ]
    >>> [module_type_of(name) for name in sorted(names, key=type_order)]
    ['attn.q_proj', 'attn.v_proj', 'mlp.up_proj', 'lm_head']
    """
    name = module_type_of(layer)
    positions = [i for i, word in enumerate(_ORDER) if word in name]
    return (
        part_of(layer) == "vocabulary",
        "mlp" in name or "expert" in name,
        min(positions, default=len(_ORDER)),
    )


def tower_of(layer: str) -> tuple[str, ...]:
    """Return the parts of a name before its block's number, as of encoder or decoder; none outside
    the blocks.

    >>> tower_of("vision_tower.layers.3.fc1.weight"), tower_of("lm_head.weight")
    (('vision_tower', 'layers'), ())
    """
    match = _NUMBER.search(layer)
    return tuple(layer[: match.start()].split(".")) if match else ()


def name_unit(layer: str, per: str) -> str:
    """Return the name of a layer's unit: itself, its block or ``part`` of it, or its module type,
    also outside blocks.

    >>> [name_unit("model.layers.3.mlp.up_proj.weight", per) for per in ("block", "part", "type")]
    ['model.layers.3', 'model.layers.3.mlp', 'mlp.up_proj']
    >>> name_unit("lm_head.weight", "block")
    'lm_head'
    """
    if per == "layer":
        return layer
    depth = depth_of(layer)
    if per == "type" or depth is None:
        return module_type_of(layer)
    parts = [module_type_of(layer).partition(".")[0]] if per == "part" else []
    return ".".join((*tower_of(layer), str(depth), *parts))


def short_names(paths: Iterable[str], display: Callable[[str], str] = str) -> dict[str, str]:
    """Return labels of paths: their last part, or as many last parts as needed to distinguish them.

    Args:
        paths: Paths, such as those of a run's inputs.
        display: Returns the displayed form of a name; names must differ in this form.

    >>> short_names(["runs/full", "runs/lora"]), short_names(["a/x/lora", "b/y/lora"])
    ({'runs/full': 'full', 'runs/lora': 'lora'}, {'a/x/lora': 'x/lora', 'b/y/lora': 'y/lora'})
    """
    parts = {path: path.replace("\\", "/").rstrip("/").split("/") for path in dict.fromkeys(paths)}
    for last in range(1, max(map(len, parts.values()), default=0) + 1):
        names = {
            path: display("/".join(part[-last:])) or display(path) for path, part in parts.items()
        }
        if len(set(names.values())) == len(parts):
            return names
    return {path: display(path) for path in parts}
