"""Matching of names in memory (adapters, gradients) with names on disk (BASE).

transformers 5 names modules differently from the files on the Hub, wrappers add prefixes, and a
mixture's experts are one tensor in memory and three per expert on disk. A name is tried, in this
order: unchanged; without leading wrappers; without any wrapper; under an alternative name of the
module; with ``_`` for its dots, as in kohya; a stack of experts as their own matrices, or one
expert as a part of a stack; and a tied head as the embedding. A match must be unique and fit by
shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lora_diag.adapters.updates import Shape, flatten_shape
from lora_diag.deltas import HEAD, matrices
from lora_diag.records.names import RESIZABLE
from lora_diag.storage import Checkpoint

# First parts of names that only denote a wrapper of the model.
WRAPPERS = frozenset({
    "model", "language_model", "transformer", "base_model", "module", "_orig_mod",
    "_fsdp_wrapped_module", "text_model", "backbone", "thinker", "bert", "roberta", "distilbert",
    "deberta", "electra", "albert", "gpt_neox", "vit", "unet", "text_encoder", "text_encoder_2",
    "mpnet", "rwkv", "beit", "data2vec_vision", "deit", "dinov2", "swin", "swinv2", "convnext",
    "resnet", "hubert", "wav2vec2",
})  # fmt: skip

# The same within a name, if a tower of a larger model is wrapped again.
INNER_WRAPPERS = WRAPPERS | {"vision_model"}

# Wrappers that denote a kind of model or one of its towers; the others are neutral.
DISTINGUISHING_WRAPPERS = INNER_WRAPPERS - {
    "model", "transformer", "base_model", "module", "_orig_mod", "_fsdp_wrapped_module", "backbone",
}  # fmt: skip

# In memory -> on disk, by model type: all replacements of a line together.
Dialect = tuple[tuple[str, str], ...]


def _make_vision_dialect(query_key_value: str, *others: tuple[str, str]) -> Dialect:
    """Return other names, and those of attention in a vision model, given the path of query, key
    and value on disk.
    """
    attention = (
        (f".attention.{name[0]}_proj.", f".attention.{query_key_value}.{name}.")
        for name in ("query", "key", "value")
    )
    return (*others, *attention, (".attention.o_proj.", ".attention.output.dense."))


_VISION_MLP = ((".mlp.fc1.", ".intermediate.dense."), (".mlp.fc2.", ".output.dense."))
MIXTRAL: Dialect = ((".mlp.", ".block_sparse_moe."),)
PHI_MOE: Dialect = ((".mlp.router.", ".block_sparse_moe.gate."),)
GRANITE_MOE: tuple[Dialect, ...] = (
    ((".block_sparse_moe.router.weight", ".block_sparse_moe.router.layer.weight"),),
    ((".block_sparse_moe.experts.gate_up_proj", ".block_sparse_moe.input_linear.weight"),),
    ((".block_sparse_moe.experts.down_proj", ".block_sparse_moe.output_linear.weight"),),
)
GPT_NEOX: Dialect = (("lm_head.", "embed_out."),)
SWIN: Dialect = (*_make_vision_dialect("self"), *_VISION_MLP)
DINOV2 = _make_vision_dialect("attention")
VIT: Dialect = (*_make_vision_dialect("attention", ("layers.", "encoder.layer.")), *_VISION_MLP)
DIALECTS = (MIXTRAL, PHI_MOE, *GRANITE_MOE, GPT_NEOX, SWIN, DINOV2, VIT)

# A fused parameter -> the matrices of one expert that it consists of, first rows first.
FUSED = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
    "up_proj": (("up_proj",),),
}
EXPERT = re.compile(r"(?P<owner>.+\.experts)\.(?P<index>\d+)\.(?P<leaf>\w+)\.weight")
EMBEDDINGS = re.compile(
    r"(^|\.)(embed_tokens|wte|tok_embeddings|word_embeddings|shared|embed_in)\.weight$"
)


@dataclass(frozen=True, slots=True)
class Location:
    """The location in BASE of one matrix, or of some of its rows.

    Args:
        layer: The name of the matrix.
        name: The tensor.
        shape: The stored shape as a matrix, ``(rows, columns)``, or ``(n,)``; with another
            vocabulary size, only the common rows.
        offset: The first entry of the matrix in the tensor.
        index: The index of the matrix in the requested stack; 0 without a stack.
        rows: The rows of the requested weight that are here; None for all.
        into: The rows of the layer that the requested weight is, if it is a part of the layer; None
            for all.
        whole: The shape of the tensor.
    """

    layer: str
    name: str
    shape: tuple[int, ...]
    offset: int = 0
    index: int = 0
    rows: tuple[int, int] | None = None
    into: tuple[int, int] | None = None
    whole: tuple[int, ...] = ()


def match_names(
    expected: Mapping[str, Shape], base: Checkpoint, transposed: bool = False, parts: bool = False
) -> tuple[dict[str, tuple[Location, ...]], dict[str, str]]:
    """Return the locations of requested weights in BASE.

    Args:
        expected: Shape by name; ``(out, in)``, ``(E, out, in)`` or ``(n,)``; None for an unknown
            dimension.
        base: The base checkpoint.
        transposed: Whether ``(in, out)`` also fits.
        parts: Whether a weight may be a part of a stored one: one expert of a stack.

    Returns:
        The locations of each name that was found, in the order of the stack and of the rows; and
            the reason for each
        name that was not.
    """
    index = _Index(base)
    found = {name: _find(name, shape, index, transposed, parts) for name, shape in expected.items()}
    missing = {name: reason for name, reason in found.items() if isinstance(reason, str)}
    return {
        name: locations for name, locations in found.items() if not isinstance(locations, str)
    }, missing


def get_own_names(matched: Mapping[str, Sequence[Location]]) -> dict[str, str]:
    """Return the requested names of whole tensors by their names in BASE, of what ``match_names``
    found; stacks and their matrices are left out.
    """
    single = {name: found[0] for name, found in matched.items() if len(found) == 1}
    return {
        location.name: name
        for name, location in single.items()
        if not location.layer.startswith(f"{location.name}[")
    }


def drop_leading_wrappers(name: str) -> str:
    """Return a name without its leading wrappers.

    >>> drop_leading_wrappers("model.language_model.layers.0.mlp.up_proj.weight")
    'layers.0.mlp.up_proj.weight'
    """
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in WRAPPERS:
        parts.pop(0)
    return ".".join(parts)


def drop_all_wrappers(name: str) -> str:
    """Return a name without any wrapper.

    >>> drop_all_wrappers("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight")
    'vision_tower.encoder.layers.0.mlp.fc1.weight'
    """
    return ".".join(part for part in name.split(".") if part not in INNER_WRAPPERS)


def is_same_part(first: str, second: str, alone: bool) -> bool:
    """Return whether two names that are equal without wrappers denote the same part of one model.

    Args:
        first: A name.
        second: The name on the other side.
        alone: Whether no other name on the side of ``second`` is equal without wrappers.

    >>> is_same_part("text_model.fc.weight", "vision_model.fc.weight", alone=True)
    False
    >>> is_same_part("fc.weight", "vision_model.fc.weight", alone=True)
    True
    """
    fewer, more = sorted(
        (DISTINGUISHING_WRAPPERS.intersection(name.split(".")) for name in (first, second)), key=len
    )
    return fewer == more or (alone and fewer <= more)


def flatten_name(name: str) -> str:
    """Return a name in kohya's form, with ``_`` for every dot within the module.

    >>> flatten_name("down_blocks.0.resnets.0.conv1.weight")
    'down_blocks_0_resnets_0_conv1.weight'
    """
    module, dot, leaf = name.rpartition(".")
    return module.replace(".", "_") + dot + leaf


def list_dialects(name: str) -> Iterator[str]:
    """Yield a name unchanged, and in the forms of model types that store it differently.

    >>> list(list_dialects("model.layers.0.mlp.gate.weight"))[:2]
    ['model.layers.0.mlp.gate.weight', 'model.layers.0.block_sparse_moe.gate.weight']
    """
    yield name
    for dialect in DIALECTS:
        translated = name
        for in_memory, on_disk in dialect:
            translated = translated.replace(in_memory, on_disk)
        if translated != name:
            yield translated


class _Index:
    """The names of BASE, by each form under which a name is looked up.

    Args:
        base: The base checkpoint.
    """

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self.canonical: dict[str, list[str]] = {}
        self.bare: dict[str, list[str]] = {}
        self.flattened: dict[str, list[str]] = {}
        self.experts: dict[str, dict[str, dict[int, str]]] = {}
        for name in base:
            self.canonical.setdefault(drop_leading_wrappers(name), []).append(name)
            self.bare.setdefault(drop_all_wrappers(name), []).append(name)
            for form in dict.fromkeys((name, drop_leading_wrappers(name))):
                self.flattened.setdefault(flatten_name(form), []).append(name)
            if match := EXPERT.fullmatch(name):
                leaves = self.experts.setdefault(drop_all_wrappers(match["owner"]), {})
                leaves.setdefault(match["leaf"], {})[int(match["index"])] = name

    def list_candidates(self, name: str) -> Iterator[list[str]]:
        """Yield lists of stored names that may match a name, the most certain first; a list may be
        empty.
        """
        for candidate in list_dialects(name):
            yield [candidate] if candidate in self.base else []
            yield self.canonical.get(drop_leading_wrappers(candidate), [])
            yield self.bare.get(drop_all_wrappers(candidate), [])
        if "." not in name.rpartition(".")[0]:
            yield self.flattened.get(flatten_name(name), [])
            # CLIP of transformers 5 has no ``text_model``.
            yield self.flattened.get(flatten_name(name).removeprefix("text_model_"), [])

    def select_fitting(self, names: Iterable[str], shape: Shape, transposed: bool) -> list[str]:
        """Return the stored names whose weights fit a requested shape."""
        return [
            name
            for name in names
            if _is_possible_match(name, shape, self.base[name].shape, transposed)
        ]


def _find(
    name: str, shape: Shape, index: _Index, transposed: bool, parts: bool
) -> tuple[Location, ...] | str:
    """Return the locations of one requested weight, or the reason why it has none."""
    problem = "BASE has no weight of this name"
    for names in index.list_candidates(name):
        fitting = index.select_fitting(names, shape, transposed)
        if len(fitting) == 1:
            return _find_locations(fitting[0], shape, index.base[fitting[0]].shape)
        if fitting:
            return f"several weights of BASE could be meant: {', '.join(sorted(fitting)[:3])}"
        if names:
            stored = f"{names[0]} {list(index.base[names[0]].shape)}"
            problem = f"its shape {_describe_shape(shape)} does not fit {stored} in BASE"
        if names == [name]:
            return problem
    locations = _find_expert_locations(name, shape, index)
    if parts and not locations:
        locations = _find_part_of_stack(name, shape, index)
    if locations:
        return locations
    if HEAD.search(name) and not any(map(HEAD.search, index.base)):
        fitting = index.select_fitting(filter(EMBEDDINGS.search, index.base), shape, False)
        if len(fitting) == 1:
            return _find_locations(fitting[0], shape, index.base[fitting[0]].shape, layer=name)
    return problem


def _describe_shape(shape: Shape) -> str:
    """Return a shape as text, with ``?`` for an unknown size."""
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def shapes_agree(expected: Shape, stored: tuple[int, ...]) -> bool:
    """Return whether a stored shape is the expected one; None stands for any size."""
    return len(expected) == len(stored) and all(
        size in (None, actual) for size, actual in zip(expected, stored, strict=True)
    )


def _is_possible_match(
    name: str, expected: Shape, stored: tuple[int, ...], transposed: bool
) -> bool:
    """Return whether a stored weight may be the requested one, by their shapes and, for a
    vocabulary of another size, by its name.
    """
    if shapes_agree(expected, stored):
        return True
    if len(expected) == 2 and len(stored) > 2:
        return shapes_agree(expected, flatten_shape(stored))
    if (
        transposed
        and len(expected) > 1
        and shapes_agree((*expected[:-2], expected[-1], expected[-2]), stored)
    ):
        return True
    return (
        len(expected) == len(stored) == 2
        and expected[1] == stored[1]
        and bool(RESIZABLE.search(name))
    )


def _find_locations(
    name: str, expected: Shape, stored: tuple[int, ...], layer: str = ""
) -> tuple[Location, ...]:
    """Return the locations of a weight in one stored tensor: of a stack, those of its matrices."""
    if len(expected) == 3 and len(stored) == 3:
        step = stored[1] * stored[2]
        return tuple(
            Location(matrix, name, shape, index * step, index, whole=stored)
            for index, (matrix, shape) in enumerate(matrices(name, stored))
        )
    shape = flatten_shape(stored) if len(stored) > 1 else stored
    rows = None
    if (
        len(expected) == 2
        and expected[0] is not None
        and expected[1] == shape[1]
        and expected[0] != shape[0]
    ):
        common = min(expected[0], shape[0])  # an embedding with a resized vocabulary
        shape, rows = (common, shape[1]), (0, common)
    return (Location(layer or name, name, shape, rows=rows, whole=stored),)


def _find_expert_locations(name: str, expected: Shape, index: _Index) -> tuple[Location, ...]:
    """Return the locations of a fused parameter in a BASE that stores experts separately; empty if
    none.
    """
    owner, _, leaf = name.rpartition(".")
    if len(expected) != 3 or leaf not in FUSED:
        return ()
    for candidate in list_dialects(f"{owner}."):
        leaves = index.experts.get(drop_all_wrappers(candidate.rstrip(".")), {})
        for pieces in FUSED[leaf]:
            locations = _find_pieces(pieces, leaves, expected, index.base)
            if locations:
                return locations
    return ()


def _find_pieces(
    pieces: tuple[str, ...], leaves: dict[str, dict[int, str]], expected: Shape, base: Checkpoint
) -> tuple[Location, ...]:
    """Return the locations of a fused parameter in the matrices of its experts; empty if they do
    not make it up.
    """
    count, out, columns = expected
    if (
        not all(set(leaves.get(piece, {})) == set(range(count or 0)) for piece in pieces)
        or not count
    ):
        return ()
    locations = []
    for expert in range(count):
        start = 0
        for piece in pieces:
            name = leaves[piece][expert]
            shape = base[name].shape
            if len(shape) != 2 or shape[1] != columns:
                return ()
            rows = (start, start + shape[0]) if len(pieces) > 1 else None
            locations.append(Location(name, name, shape, 0, expert, rows, whole=shape))
            start += shape[0]
        if start != out:
            return ()
    return tuple(locations)


def _find_part_of_stack(name: str, expected: Shape, index: _Index) -> tuple[Location, ...]:
    """Return the location of one expert's matrix in a BASE that stores all experts as one tensor;
    empty if none.
    """
    match = EXPERT.fullmatch(name)
    if match is None or len(expected) != 2 or expected[0] is None:
        return ()
    out, expert = expected[0], int(match["index"])
    for fused, namings in FUSED.items():
        for pieces in (pieces for pieces in namings if match["leaf"] in pieces):
            for names in index.list_candidates(f"{match['owner']}.{fused}"):
                shape = index.base[names[0]].shape if len(names) == 1 else ()
                if (
                    len(shape) == 3
                    and expert < shape[0]
                    and shape[1:] == (out * len(pieces), expected[1])
                ):
                    start = pieces.index(match["leaf"]) * out
                    into = (start, start + out) if len(pieces) > 1 else None
                    layer = f"{names[0]}[{expert}]"
                    return (
                        Location(
                            layer,
                            names[0],
                            shape[1:],
                            expert * shape[1] * shape[2],
                            into=into,
                            whole=shape,
                        ),
                    )
    return ()
