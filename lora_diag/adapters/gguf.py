"""GGUF adapters, as llama.cpp's converter writes them: ``NAME.lora_a`` and ``NAME.lora_b``, one α
for the file.

s = α/r with the r of each tensor, and 1 where α is 0 or missing. ``lora_a`` is ``(r, in)`` and
``lora_b`` ``(out, r)``; of the token embedding, ``lora_a`` is ``(vocab, r)`` and ΔW =
s·lora_a·lora_bᵀ. Names are llama.cpp's, and in models of the Llama family the rows of q and k are
in its order; the number of heads comes from BASE.

Reference: ggml-org/llama.cpp ``convert_lora_to_gguf.py``, ``src/llama-adapter.cpp``
(``llama_adapter_lora_init_impl``), ``src/llama-adapter.h`` (``get_scale``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from lora_diag.adapters.source import AdapterFiles, is_number
from lora_diag.adapters.updates import (
    AdapterReading,
    Family,
    UpdateSite,
    WeightUpdate,
    format_ranks,
    read,
)
from lora_diag.errors import damaged
from lora_diag.storage import Checkpoint
from lora_diag.storage.gguf import GgufFile, Value
from lora_diag.storage.gguf_model import ARCHITECTURES, Names, heads, to_halves

if TYPE_CHECKING:
    from lora_diag.adapters.updates import Factors

ALPHA = "adapter.lora.alpha"
FACTORS = (".lora_a", ".lora_b")
TABLE = "token_embd.weight"
CONVERT = "convert the adapter again"


def get_fields(source: AdapterFiles) -> Mapping[str, Value] | None:
    """Return the fields of a GGUF file's header; None for another file."""
    file = source.checkpoint.files[0]
    return file.fields if isinstance(file, GgufFile) else None


def read_gguf(source: AdapterFiles) -> AdapterReading:
    """Return the contents of a GGUF adapter.

    Raises:
        InputError: It is no LoRA adapter, its α is no finite number, it holds tensors that
            llama.cpp refuses, a factor is missing, or the factors do not fit together.
    """
    fields = get_fields(source) or {}
    kinds = fields.get("general.type"), fields.get("adapter.type")
    if kinds != ("adapter", "lora"):
        problem = (
            f"is not a LoRA adapter: general.type is {kinds[0]!r} and adapter.type {kinds[1]!r}"
        )
        raise damaged(source.path, problem, "give a file that convert_lora_to_gguf.py wrote")
    alpha = fields.get(ALPHA, 0.0)
    if not is_number(alpha):
        raise damaged(source.path, f"{ALPHA} is {alpha!r}, not a finite number", CONVERT)
    names = ARCHITECTURES.get(str(fields.get("general.architecture")))
    pairs, norms = _pair_factors(source)
    updates = [
        update
        for name, parts in pairs.items()
        for update in _read_updates(source, name, parts, float(alpha), names)
    ]
    kind = f"GGUF LoRA, r={format_ranks(updates)}, alpha={alpha:g}, {len(pairs)} modules"
    notes = _make_notes(fields, names, norms)
    if not alpha:
        notes += source.note_missing_alpha([*pairs], "llama.cpp")
    return AdapterReading(
        kind, tuple(updates), (), tuple(notes), tuple(norms), f"{ALPHA} / r of each tensor"
    )


def _pair_factors(source: AdapterFiles) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return the two factors of each tensor by its name, and the norms, which llama.cpp skips."""
    pairs: dict[str, dict[str, str]] = {}
    norms = []
    for key in source.checkpoint:
        name, part = key[:-7], key[-7:]
        if part in FACTORS:
            pairs.setdefault(name, {})[part] = key
        elif key.endswith("_norm.weight"):
            norms.append(key)
        else:
            problem = (
                f"{key} is neither a factor (.lora_a, .lora_b) nor a norm, so llama.cpp "
                "refuses the file"
            )
            raise damaged(source.path, problem, CONVERT)
    return pairs, norms


def _make_notes(fields: Mapping[str, Value], names: Names | None, norms: list[str]) -> list[str]:
    """Return notes on an unknown architecture and norms."""
    notes = []
    if names is None:
        architectures = ", ".join(ARCHITECTURES)
        notes.append(
            f"the names of architecture {fields.get('general.architecture')!r} are not known, so "
            f"the weights keep their GGUF names; known are {architectures}"
        )
    if norms:
        notes.append(
            f"{len(norms)} norms are in the file, such as {norms[0]}; llama.cpp skips them"
        )
    return notes


def _read_updates(
    source: AdapterFiles, name: str, parts: Mapping[str, str], alpha: float, names: Names | None
) -> list[WeightUpdate]:
    """Return the update of one tensor; of stacked experts, one for each."""
    for part in FACTORS:
        if part not in parts:
            raise damaged(source.path, f"{name} has no {part}, so the file is incomplete", CONVERT)
    keys = parts[".lora_a"], parts[".lora_b"]
    a, b = (source.checkpoint[key].shape for key in keys)
    weight = (names.in_transformers(name) if names is not None else None) or name
    is_table = name == TABLE
    most_dimensions = 2 if is_table else 3
    fits = 2 <= len(a) == len(b) <= most_dimensions and 0 not in (*a, *b)
    axis = -1 if is_table else -2
    if not fits or a[axis] != b[-1] or a[:-2] != b[:-2]:
        expected = "(vocab, r) and (dim, r)" if is_table else "(r, in) and (out, r)"
        raise damaged(
            source.path,
            f"{name}: lora_a {list(a)} and lora_b {list(b)} are not {expected}",
            CONVERT,
        )
    rank = b[-1]
    scale = alpha / rank if alpha else source.scale_without_alpha(rank)
    shape = (a[0], b[0]) if is_table else (b[-2], a[-1])
    update = WeightUpdate(
        weight=weight,
        shape=shape,
        load=partial(load_factors, source.checkpoint, keys, scale, is_table=is_table),
        factored=True,
        dtype=source.checkpoint[keys[1]].dtype,
        zero_if=keys[1],
        rank=rank,
        scale=scale,
        heads=names.heads_key(name) if names is not None else "",
    )
    if len(a) == 2:
        return [update]
    return [
        replace(
            update,
            weight=weight.format(index) if "{}" in weight else f"{weight}[{index}]",
            load=partial(load_factors, source.checkpoint, keys, scale, expert=index),
        )
        for index in range(a[0])
    ]


def load_factors(
    checkpoint: Checkpoint,
    keys: tuple[str, str],
    scale: float,
    site: UpdateSite,
    is_table: bool = False,
    expert: int | None = None,
) -> Factors:
    """Return s·lora_b ``(out, r)`` and lora_a ``(r, in)``, or those of one expert; s·lora_a and
    lora_bᵀ of a table.
    """
    a, b = (read(checkpoint, key) for key in keys)
    if expert is not None:
        a, b = a[expert], b[expert]
    return (a * scale, b.T) if is_table else (b * scale, a)


def reorder_rows(update: WeightUpdate, base: Checkpoint | None) -> WeightUpdate:
    """Return an update with its rows in the order of BASE; unchanged if they have that order, or
    without a BASE.

    Raises:
        InputError: BASE does not give the number of heads, or it does not divide the rows.
    """
    if not update.heads or base is None:
        return update
    count = heads(base.config, update.heads)
    rows = update.shape[0] or 0
    if count is None or rows % (2 * count):
        problem = (
            f"gives no {update.heads}" if count is None else f"gives {count} heads for {rows} rows"
        )
        unknown = f"so the row order of {update.weight} is not known"
        fix = "give the folder of the model that the adapter was trained on"
        raise damaged(base.path, f"its config.json {problem}, {unknown}", fix)
    return replace(update, load=partial(load_reordered, update.load, count), heads="")  # type: ignore[arg-type]


def load_reordered(load: partial[Factors], count: int, site: UpdateSite) -> Factors:
    """Return the factors with the rows of B in transformers' order."""
    b, a = load(site)
    return to_halves(b, count), a


FAMILY = Family("GGUF", lambda source: get_fields(source) is not None, read_gguf, "gguf")
