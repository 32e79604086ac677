"""An adapter and a BASE → named ΔW: every update is matched with its weight, or skipped with the
reason.

A weight of BASE is stored as ``(out, in)``, as by ``nn.Linear``, or as ``(in, out)``, as by the
``Conv1D`` of GPT-2. ``fan_in_fan_out`` in an adapter's config is unreliable: PEFT overwrites it
layer by layer during injection, so that the kind of the last layer is saved for all. Shapes decide;
a square weight takes the orientation of weights of the same name elsewhere (``mlp.c_proj`` for
``attn.c_proj``), then of its block, and only then of the flag.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from lora_diag import deltas
from lora_diag.adapters.gguf import reorder_rows
from lora_diag.adapters.names import Location, get_own_names, match_names, shapes_agree
from lora_diag.adapters.source import AdapterFiles
from lora_diag.adapters.updates import (
    AdapterReading,
    NewValue,
    Shape,
    UpdateSite,
    WeightUpdate,
    as_float64,
    flatten_shape,
)
from lora_diag.deltas import Delta, DenseDelta, FactoredDelta, Pairing, Side, StoredDelta, Unpaired
from lora_diag.errors import InputError, NothingComparedError, damaged
from lora_diag.records.names import depth_of
from lora_diag.storage import Checkpoint
from lora_diag.storage.tensors import FLOAT_DTYPES

if TYPE_CHECKING:
    import torch

    from lora_diag.adapters.updates import Factors


# Note on a GGUF adapter without BASE.
LLAMA_ROWS = (
    "rows of q and k are in llama.cpp's order, which BASE would undo; no singular value "
    "depends on it"
)

# Maximum number of names in a message.
SHOWN = 3


class Orientation:
    """Evidence of BASE's shapes for ``(in, out)`` storage.

    Args:
        base: The base.
        shapes: ``(out, in)`` of adapted weights by their names in BASE.
        flag: ``fan_in_fan_out`` of the config.
    """

    def __init__(self, base: Checkpoint, shapes: Mapping[str, Shape], flag: bool) -> None:
        self._flag = flag
        self._votes: Counter[str] = Counter()  # votes for (in, out) minus those against, by group
        for name in base:
            stored = base[name].shape
            if len(stored) != 2 or stored[0] == stored[1]:
                continue
            is_in_out = _infer_nonsquare_in_out(base, name, shapes)
            if is_in_out is not None:
                self._votes.update(dict.fromkeys(_list_groups(name), 1 if is_in_out else -1))

    def in_out(self, name: str, expected: Shape, stored: tuple[int, ...]) -> bool:
        """Return whether a weight is stored as ``(in, out)``."""
        if len(expected) != 2 or len(stored) != 2:
            return False
        fits_as_stored = shapes_agree(expected, stored)
        if fits_as_stored != shapes_agree(expected[::-1], stored):
            return not fits_as_stored
        for group in _list_groups(name):
            if votes := self._votes[group]:
                return votes > 0
        return self._flag


def _list_groups(name: str) -> tuple[str, str]:
    """Return the groups of a weight: weights of the same last name, and weights of the
    same block.
    """
    parts = name.split(".")
    return f"leaf {'.'.join(parts[-2:])}", f"block {depth_of(name)}"


def _infer_nonsquare_in_out(
    base: Checkpoint, name: str, shapes: Mapping[str, Shape]
) -> bool | None:
    """Return whether a weight that is not square is stored as ``(in, out)``; None if unknown."""
    stored = base[name].shape
    expected = shapes.get(name)
    if expected is not None:
        fits_as_stored = shapes_agree(expected, stored)
        if fits_as_stored != shapes_agree(expected[::-1], stored):
            return not fits_as_stored
    bias = name.removesuffix("weight") + "bias"
    if not name.endswith(".weight") or bias not in base or len(base[bias].shape) != 1:
        return None
    size = base[bias].shape[0]
    return size == stored[1] if size in stored else None


@dataclass(frozen=True, slots=True)
class Piece:
    """One update and its location in BASE.

    Args:
        update: The update.
        location: Location of its weight.
        site: Argument of the loader.
        base: Location of the whole layer; None without a BASE, or if BASE does not give floats.
    """

    update: WeightUpdate
    location: Location
    site: UpdateSite
    base: Side | None = None


def place_updates(
    source: AdapterFiles,
    reading: AdapterReading,
    base: Checkpoint | None,
    layers: str | None = None,
    exclude: str | None = None,
    allow_unmatched: bool = False,
) -> tuple[Pairing, list[str]]:
    """Return the named ΔW of an adapter with the skipped tensors, and notes.

    Args:
        source: The adapter.
        reading: Its contents.
        base: The checkpoint it was trained on; None to measure the adapter alone.
        layers: Regular expression; only layers whose name contains a match.
        exclude: Regular expression; no layers whose name contains a match.
        allow_unmatched: Whether to skip weights of the adapter that BASE does not have, instead of
            raising an error.

    Returns:
        The ΔW, the skipped tensors, and notes.

    Raises:
        InputError: BASE does not have a weight of the adapter (without ``allow_unmatched``), two
            weights are the same layer of BASE, an update cannot be computed from the stored weight,
            BASE gives no number of heads that fits a GGUF adapter, a file cannot be read, or there
            is no BASE and all of the adapter needs it.
        NothingComparedError: No ΔW is selected, or none can be measured.
        UsageError: A regular expression is not valid.
    """
    selected = deltas.selector(layers, exclude)
    if base is None:
        placed, notes = _place_without_base(source, reading)
    else:
        placed, notes = _place_on_base(source, reading, base)
        missing = [item for item in placed.unpaired if item.reason == "not_in_base"]
        if missing and not allow_unmatched:
            raise _make_unmatched_error(source, base, missing)
    chosen = []
    unpaired = list(placed.unpaired)
    for delta in placed.deltas:
        if selected(delta.layer):
            chosen.append(delta)
        else:
            unpaired.append(Unpaired.by_selection(delta.layer, delta.shape))
    if not chosen:
        raise _make_nothing_measured_error(source, unpaired)
    ordered = sorted(chosen, key=lambda delta: deltas.natural_order(delta.layer))
    return replace(placed, deltas=tuple(ordered), unpaired=tuple(unpaired)), notes


def _make_unmatched_error(
    source: AdapterFiles, base: Checkpoint, missing: list[Unpaired]
) -> InputError:
    """Return the error of an adapter with weights that match none of BASE."""
    examples = "; ".join(f"{item.layer} ({item.detail})" for item in missing[:SHOWN])
    suffix = f"; and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    problem = f"{len(missing)} of its weights match none of {base.path}: {examples}{suffix}"
    return InputError(
        source.path,
        f"{problem} (BASE has names like {min(base)})",
        "give the base it was trained on, or skip these weights with $allow_unmatched",
    )


def _make_nothing_measured_error(
    source: AdapterFiles, unpaired: list[Unpaired]
) -> InputError | NothingComparedError:
    """Return the error of an adapter of which no ΔW is measured."""
    reasons = {item.reason for item in unpaired}
    if reasons == {"needs_base"}:
        path = source.path
        fix = f"run loradiag spectrum BASE {path}, or loradiag fleet {path} --base BASE"
        return InputError(f"{path}: {unpaired[0].layer}: {unpaired[0].detail}; {fix}")
    listed = ", ".join(sorted(reasons)) or "it holds none"
    return NothingComparedError(
        f"{source.path}: no weight of the adapter can be measured ({listed})"
    )


def _place_without_base(source: AdapterFiles, reading: AdapterReading) -> tuple[Pairing, list[str]]:
    """Return the ΔW of an adapter without a BASE with the skipped weights, and notes."""
    changes: list[Delta] = []
    unpaired: list[Unpaired] = []
    for update in reading.updates:
        layer = update.layer
        shape = _known_sizes(update.shape)
        if update.needs_weight or len(shape) < len(update.shape):
            kind = update.needs_weight or reading.kind.partition(",")[0]
            why = f"{kind} computes its ΔW from the base weight, so BASE is needed"
            unpaired.append(Unpaired(layer, shape, "needs_base", why))
        elif not update.optional:
            piece = Piece(update, Location(layer, layer, shape), UpdateSite(shape))
            changes.append(_make_delta(layer, [piece], None))
    for value in reading.values:
        if not value.is_copy:
            shape = source.checkpoint[value.key].shape
            detail = "the adapter holds its new value and not its change, so BASE is needed"
            unpaired.append(Unpaired(value.weight, shape, "needs_base", detail))
    notes = []
    if any(update.heads for update in reading.updates):
        notes.append(LLAMA_ROWS)
    return Pairing(tuple(changes), tuple(unpaired)), notes


def _place_on_base(
    source: AdapterFiles, reading: AdapterReading, base: Checkpoint
) -> tuple[Pairing, list[str]]:
    """Return the ΔW of an adapter relative to its BASE with the skipped weights and rows, and
    notes.
    """
    copies, values = _sort_values(source, reading, base)
    expected = dict(update.expected for update in reading.updates)
    matched, missing = match_names(expected, base, transposed=True, parts=True)
    pieces = _make_pieces(source, reading, base, matched)
    optional = {update.expected[0] for update in reading.updates if update.optional}
    unpaired = []
    for name, why in missing.items():
        if name not in optional:
            unpaired.append(Unpaired(name, _known_sizes(expected[name]), "not_in_base", why))
    pieces_by_layer: dict[str, list[Piece]] = {}
    for piece in pieces:
        pieces_by_layer.setdefault(piece.location.layer, []).append(piece)
        unpaired += _note_added_rows(piece)
    changes: list[Delta] = []
    for layer, layer_pieces in pieces_by_layer.items():
        _refuse_overlap(source, layer, layer_pieces)
        plus = None
        if copy := copies.pop(layer_pieces[0].location.name, None):
            plus = partial(subtract_base, source.checkpoint, copy.key)
        changes.append(_make_delta(layer, layer_pieces, plus))
    value_deltas, skipped = _pair_new_values(source, [*values, *copies.values()], base)
    locations = [piece.location for piece in pieces]
    changed_names = {place.name for place in locations}
    changed_names.update(delta.base.name for delta in value_deltas)
    notes = [f"adapts {len(changed_names)} of {len(base)} tensors of BASE"]
    heads = {place.layer for place in locations if "lm_head" in place.layer != place.name}
    effect = (
        "its update is reported under its own name, and a merge adds it to the one stored weight"
    )
    notes += [f"{layer} is tied to an embedding in BASE; {effect}" for layer in sorted(heads)]
    own_names = get_own_names(matched) if source.peft_type else {}
    return Pairing((*changes, *value_deltas), (*unpaired, *skipped), own_names), notes


def _refuse_overlap(source: AdapterFiles, layer: str, pieces: list[Piece]) -> None:
    """Refuse updates of different weights that are the same rows of one layer in BASE.

    Raises:
        InputError: Two weights of the adapter are the same layer.
    """
    owners: dict[tuple[int, int] | None, str] = {}
    for piece in pieces:
        weight = piece.update.weight
        is_owned = owners.setdefault(piece.location.into, weight) != weight
        if is_owned or (None in owners and len(owners) > 1):
            names = " and ".join(sorted({other.update.weight for other in pieces})[:2])
            problem = f"{names} are both {layer} in BASE"
            raise InputError(f"{source.path}: {problem}; give the matching part of the model")


def _known_sizes(shape: Shape) -> tuple[int, ...]:
    """Return a shape without the sizes that only BASE determines."""
    return tuple(size for size in shape if size is not None)


def _make_pieces(
    source: AdapterFiles,
    reading: AdapterReading,
    base: Checkpoint,
    matched: Mapping[str, tuple[Location, ...]],
) -> list[Piece]:
    """Return every update that has a weight in BASE, with its location and orientation there."""
    expected = dict(update.expected for update in reading.updates)
    shapes = {
        locations[0].name: expected[name]
        for name, locations in matched.items()
        if len(expected[name]) == 2 and len(locations) == 1
    }
    flag = source.config is not None and source.config.flag("fan_in_fan_out")
    orientation = Orientation(base, shapes, flag)
    model_type = _read_model_type(base, source)
    pieces = []
    for update in reading.updates:
        update = reorder_rows(update, base)
        index = 0 if update.expert is None else update.expert[0]
        for location in matched.get(update.expected[0], ()):
            if location.index == index:
                in_out = _is_in_out(update, location, orientation, model_type)
                if update.keeps_name:
                    location = replace(location, layer=update.weight)
                pieces.append(_make_piece(update, location, base, in_out))
    return pieces


def _is_in_out(
    update: WeightUpdate, location: Location, orientation: Orientation, model_type: str
) -> bool:
    """Return whether BASE stores the weight of an update as ``(in, out)``."""
    if update.in_out is None:
        return orientation.in_out(location.name, update.shape, location.whole)
    if location.rows is not None or len(location.whole) != 3:
        return False  # an expert stored separately is a Linear
    out, columns = update.shape
    return update.in_out(model_type) if out == columns else location.shape != (out, columns)


def _make_piece(update: WeightUpdate, location: Location, base: Checkpoint, in_out: bool) -> Piece:
    """Return an update with its location, after checking that it can be computed there.

    Raises:
        InputError: The update needs W, of which BASE does not give floats, or all rows of a resized
            vocabulary.
    """
    name = location.name
    whole_side = side = None
    shape = location.shape
    if base[name].dtype in FLOAT_DTYPES:
        whole_side = side = Side(base, name, location.offset)
    elif update.needs_weight:
        need = f"{update.needs_weight} needs a float weight"
        problem = f"{name} is stored as {base[name].dtype}, but {need}"
        raise damaged(base.file_of(name), problem, "give the unquantized base")
    if location.into is not None:
        first, last = location.into
        shape = last - first, shape[1]
        if side is not None:
            side = replace(side, offset=side.offset + first * shape[1])
    if in_out:
        shape = shape[::-1]
    if update.expert is None and location.rows is not None and not update.factored:
        problem = (
            "has another vocabulary size in BASE than in the adapter, but its update needs all rows"
        )
        raise InputError(f"{location.name} {problem}; give the base with the resized vocabulary")
    return Piece(update, location, UpdateSite(shape, side, in_out), whole_side)


def _read_model_type(base: Checkpoint, source: AdapterFiles) -> str:
    """Return transformers' model type from BASE's config or from the adapter's; empty
    if unknown.
    """
    if isinstance(name := base.config.get("model_type"), str):
        return name
    if source.config is None:
        return ""
    library = source.config.table("auto_mapping").get("parent_library", "")
    return str(library).rpartition(".modeling_")[2]


def _make_delta(
    layer: str, pieces: list[Piece], plus: Callable[[UpdateSite], torch.Tensor] | None
) -> Delta:
    """Return the ΔW of one layer from its updates, and from ``plus``, the change of a saved copy of
    its weight.
    """
    first = pieces[0]
    location = first.location
    is_matrix = len(location.shape) == 2
    shape = (location.shape[0] if is_matrix else 1, location.shape[-1])
    dtypes = (first.base.dtype if first.base is not None else None, first.update.dtype)
    transposed = first.site.transposed
    common: dict[str, Any] = {"base": first.base, "transposed": transposed}
    if plus is not None or not all(piece.update.factored for piece in pieces):
        dense = partial(load_dense, pieces, plus)
        return DenseDelta(layer, shape, dense, dtypes, is_matrix=is_matrix, **common)
    scales = {piece.update.scale for piece in pieces}
    is_part = location.rows is not None or location.into is not None
    return FactoredDelta(
        layer,
        shape,
        partial(load_factors, pieces),
        dtypes,
        scale=scales.pop() if len(scales) == 1 else None,
        diagonal=any(piece.update.diagonal for piece in pieces),
        rank=sum(piece.update.rank or 0 for piece in pieces),
        thin=None if len(pieces) > 1 or is_part or transposed else first.update.thin,
        **common,
    )


def load_factors(pieces: list[Piece]) -> Factors:
    """Return B and A of a layer in its stored orientation; several updates are concatenated."""
    import torch

    factors = [_read_factors(piece) for piece in pieces]
    if len(factors) == 1:
        return factors[0]
    return torch.cat([b for b, _ in factors], dim=1), torch.cat([a for _, a in factors])


def _read_factors(piece: Piece) -> Factors:
    """Return B and A of one update in the stored orientation, for all rows of the layer."""
    b, a = cast("Factors", piece.update.load(piece.site))
    if piece.location.rows is not None:
        b = b[slice(*piece.location.rows)]
    if piece.site.transposed:
        b, a = a.T, b.T
    return _embed_in_layer(b, piece.location), a


def _embed_in_layer(part: torch.Tensor, location: Location) -> torch.Tensor:
    """Return a part of a layer's rows as a full matrix with zeros elsewhere; unchanged if it is the
    whole layer.
    """
    if location.into is None:
        return part
    whole = part.new_zeros(location.shape[0], part.shape[1])
    whole[slice(*location.into)] = part
    return whole


def load_dense(
    pieces: list[Piece], plus: Callable[[UpdateSite], torch.Tensor] | None
) -> torch.Tensor:
    """Return ΔW of a layer in its stored orientation, float32; that of a vector as one row."""
    total = _read_change(pieces[0])
    for piece in pieces[1:]:
        total = total + _read_change(piece)
    if plus is not None:
        total = total + plus(replace(pieces[0].site, transposed=False, shape=tuple(total.shape)))
    return total.float().reshape(total.shape if total.ndim == 2 else (1, -1))


def _read_change(piece: Piece) -> torch.Tensor:
    """Return ΔW of one update in the stored orientation, for all rows of the layer."""
    if piece.update.factored:
        b, a = _read_factors(piece)
        return b @ a
    change = cast("torch.Tensor", piece.update.load(piece.site))
    return _embed_in_layer(change.T if piece.site.transposed else change, piece.location)


def _note_added_rows(piece: Piece) -> Iterator[Unpaired]:
    """Yield a record of the vocabulary rows that only the adapter or only BASE has, if there are
    any.
    """
    expected, location = piece.update.shape[0], piece.location
    if piece.update.expert is not None or location.rows is None or expected is None:
        return
    common, stored = location.rows[1], location.whole[0]
    rows = common, max(expected, stored)
    yield Unpaired.by_rows(location.layer, rows, location.shape[1], expected > stored)


def _sort_values(
    source: AdapterFiles, reading: AdapterReading, base: Checkpoint
) -> tuple[dict[str, NewValue], list[NewValue]]:
    """Split stored values into copies that differ from BASE, by their names in it, and others; drop
    equal copies.
    """
    copies: dict[str, NewValue] = {}
    others: list[NewValue] = []
    for value in reading.values:
        if not value.is_copy:
            others.append(value)
            continue
        matched, _ = match_names({value.weight: source.checkpoint[value.key].shape}, base)
        name = matched[value.weight][0].name if value.weight in matched else value.weight
        if name not in base or not _equals_base(source, value.key, base, name):
            copies[name] = value
    return copies, others


def _equals_base(source: AdapterFiles, key: str, base: Checkpoint, name: str) -> bool:
    """Return whether a tensor of the adapter equals BASE's; False if one of them is not
    of floats.
    """
    import torch

    before, after = base[name], source.checkpoint[key]
    if before.shape != after.shape or not {before.dtype, after.dtype} <= FLOAT_DTYPES:
        return False
    delta = StoredDelta(
        name, flatten_shape(before.shape), Side(base, name), Side(source.checkpoint, key)
    )
    return all(torch.equal(as_float64(a), as_float64(b)) for a, b in delta.blocks())


def subtract_base(checkpoint: Checkpoint, key: str, site: UpdateSite) -> torch.Tensor:
    """Return the difference of the adapter's saved base from BASE, on common rows."""
    count = math.prod(site.shape)
    return as_float64(checkpoint.read(key, 0, count)).view(site.shape) - site.weight()


def _pair_new_values(
    source: AdapterFiles, values: list[NewValue], base: Checkpoint
) -> tuple[list[StoredDelta], list[Unpaired]]:
    """Return the changes of the weights stored in full, and the skipped weights and rows."""
    expected: dict[str, Shape] = {
        value.weight: source.checkpoint[value.key].shape for value in values
    }
    matched, missing = match_names(expected, base)
    changes: list[StoredDelta] = []
    unpaired: list[Unpaired] = []
    for value in values:
        shape = source.checkpoint[value.key].shape
        if value.weight in missing:
            unpaired.append(Unpaired(value.weight, shape, "not_in_base", missing[value.weight]))
            continue
        offset = 0
        for location in matched[value.weight]:
            layer = location.layer
            before = Side(base, location.name, location.offset)
            after = Side(source.checkpoint, value.key, offset)
            not_float = {before.dtype, after.dtype} - FLOAT_DTYPES
            if not_float:
                stored = f"stored as {', '.join(sorted(not_float))}"
                detail = f"{stored}, which is not a plain floating-point weight"
                unpaired.append(Unpaired(layer, shape, "not_float", detail))
            elif len(location.shape) == 1:
                row = (1, location.shape[0])
                changes.append(StoredDelta(layer, row, before, after, is_matrix=False))
            else:
                rows, columns = location.shape
                changes.append(StoredDelta(layer, (rows, columns), before, after))
                # Rows of a 3-D tensor are those of one matrix in a stack of experts.
                if location.rows is not None and len(shape) == 2:
                    unpaired.append(deltas.added_rows(layer, before, after))
            offset += math.prod(location.shape)
    return changes, unpaired
