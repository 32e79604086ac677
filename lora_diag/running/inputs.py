"""The inputs of a command: paths → descriptions for the run record, and named ΔW."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_diag.adapters import Adapter, Location, drop_all_wrappers, is_adapter, is_same_part, match_names, open_adapter
from lora_diag.adapters.complete import targets_of
from lora_diag.adapters.placing import place
from lora_diag.adapters.source import StatedAlpha
from lora_diag.checkpoints import Checkpoint, as_path, locate, open_checkpoint
from lora_diag.checkpoints.patches import open_tuned
from lora_diag.checkpoints.tensors import FLOAT_DTYPES
from lora_diag.deltas import Delta, Pairing, Side, StoredDelta, natural_order, pair, refuse_empty
from lora_diag.errors import InputError, UsageError
from lora_diag.gradients import Step
from lora_diag.records import RunInput
from lora_diag.running.fingerprint import (
    DIGITS,
    content_hash,
    files_of,
    fingerprint,
    fingerprint_of_adapter,
    legible,
    names_of,
)

# Metadata that ``probe activations`` writes: its matrices have names of weights, and would pair with them.
MOMENTS = "second moments of layers' inputs"


@dataclass(frozen=True, slots=True)
class Comparison:
    """The inputs of a command, opened by their headers and paired.

    Args:
        inputs: Inputs for the run record.
        pairing: Compared layers, and skipped tensors.
    """

    inputs: tuple[RunInput, ...]
    pairing: Pairing


def compare(
    base: Path | str,
    tuned: Path | str | None,
    layers: str | None = None,
    exclude: str | None = None,
    allow_unmatched: bool = False,
    verify: bool = False,
    stated_alpha: StatedAlpha = None,
) -> Comparison:
    """Open both sides, pair their weights, and describe the inputs.

    Args:
        base: Base checkpoint; or an adapter, if ``tuned`` is None.
        tuned: Fine-tuned checkpoint or adapter; None to measure an adapter without BASE.
        layers: Only weights whose name contains a match.
        exclude: Skip weights whose name contains a match.
        allow_unmatched: Whether to skip weights that the adapter changes and BASE does not have, instead of raising an
            error.
        verify: Whether to hash every byte (SHA-256).
        stated_alpha: α of an adapter whose files give none.

    Raises:
        InputError: A side cannot be read, the adapter does not fit BASE, or two weights have one name.
        NothingComparedError: The sides have no weight in common.
        UsageError: The only side is not an adapter, or the adapter comes first.
    """
    base, tuned = as_path(base), as_path(tuned) if tuned is not None else None
    first = locate(base)  # before TUNED, so that an error names the first argument first
    if tuned is None and not is_adapter(first):
        raise UsageError(f"{base}: is not an adapter; give a checkpoint to compare it with, BASE before TUNED")
    last = base if tuned is None else tuned
    ends_with_adapter = is_adapter(locate(last))
    if not ends_with_adapter and is_adapter(first):
        raise UsageError(f"{base}: is an adapter; give BASE first, then the adapter")
    base_checkpoint = open_checkpoint(base) if tuned is not None else None
    if base_checkpoint is None or ends_with_adapter:
        adapter = open_adapter(locate(last), stated_alpha)
        pairing, notes = adapter.pair(base_checkpoint, layers, exclude, allow_unmatched)
        described = describe_adapter(adapter, last, base_checkpoint, pairing, notes, verify)
    else:
        tuned_checkpoint = open_tuned(last, base_checkpoint)
        for side in (base_checkpoint, tuned_checkpoint):
            if any(file.metadata.get("kind") == MOMENTS for file in side.files):
                raise UsageError(f"{side.path}: contains {MOMENTS}, not a checkpoint; pass it with --activations")
        pairing, notes = _pair_renamed(
            pair(base_checkpoint, tuned_checkpoint, layers, exclude), base_checkpoint, tuned_checkpoint
        )
        refuse_empty(pairing, base_checkpoint, tuned_checkpoint)
        described = describe("tuned", tuned_checkpoint, notes, verify)
    _refuse_duplicate_names(pairing.deltas)
    unpaired = tuple(replace(item, detail=legible(item.detail)) for item in pairing.unpaired)
    inputs = (described,) if base_checkpoint is None else (describe("base", base_checkpoint, verify=verify), described)
    return Comparison(inputs, replace(pairing, unpaired=unpaired))


def adapter_deltas(
    path: Path, base: Checkpoint | None, layers: str | None, exclude: str | None, stated_alpha: StatedAlpha
) -> tuple[str, tuple[Delta, ...]]:
    """Open an adapter and return its kind and its ΔW, without reading a weight or describing the files.

    Raises:
        InputError: It cannot be read, does not fit BASE, or two weights have one name.
        NothingComparedError: Nothing is selected.
    """
    adapter = open_adapter(locate(path), stated_alpha)
    deltas = place(adapter.source, adapter.reading, base, layers, exclude)[0].deltas
    _refuse_duplicate_names(deltas)
    return legible(adapter.kind), deltas


def _refuse_duplicate_names(deltas: tuple[Delta, ...]) -> None:
    """Refuse two weights with one name: a stack ``w`` holds ``w[0]``, which may also be the name of a tensor.

    Raises:
        InputError: Two weights have one name.
    """
    first_by_name: dict[str, Delta] = {}
    for delta in deltas:
        earlier = first_by_name.setdefault(delta.layer, delta)
        if earlier is not delta:
            names = " and ".join(item.base.name if item.base else item.layer for item in (earlier, delta))
            raise InputError(f"{delta.layer}: two weights have this name, from {names}; exclude one with --exclude")


def _pair_renamed(pairing: Pairing, base: Checkpoint, tuned: Checkpoint) -> tuple[Pairing, tuple[str, ...]]:
    """Return the pairing with tensors that TUNED stores under other names, and a note on them if there are any.

    Such are fused experts that BASE stores one by one.

    Two sides without a common name may be one model, saved with and without its head or inside a wrapper. They are
    paired if half of either side has a matching name, unless their configs name different models.
    """
    locations = _match_other_names(base, tuned)
    if not locations or not (pairing.deltas or _is_one_model(base, tuned, locations)):
        return pairing, ()
    only_in_base = {item.layer for item in pairing.unpaired if item.reason == "only_in_base"}
    only_in_tuned = {item.layer for item in pairing.unpaired if item.reason == "only_in_tuned"}
    renamed = {
        name: [_make_delta(base, location, tuned, name) for location in locations[name]]
        for name in locations
        if name in only_in_tuned and all(location.name in only_in_base for location in locations[name])
    }
    if not renamed:
        return pairing, ()
    used = {*renamed, *(delta.base.name for deltas in renamed.values() for delta in deltas)}
    deltas = sorted(
        (*pairing.deltas, *(d for new in renamed.values() for d in new)), key=lambda d: natural_order(d.layer)
    )
    unpaired = tuple(item for item in pairing.unpaired if item.layer not in used)
    name, layer = min((name, deltas[0].layer) for name, deltas in renamed.items())
    note = f"{len(renamed)} tensors are stored under other names than in BASE, such as {name} for {layer}"
    return Pairing(tuple(deltas), unpaired), (note,)


def _match_other_names(base: Checkpoint, tuned: Checkpoint) -> dict[str, tuple[Location, ...]]:
    """Return the locations in BASE of tensors that only TUNED has by name, independent of the selection.

    Towers with equal internal names (text and vision) are not matched with each other, nor is a model named BERT with
    one named RoBERTa.
    """
    matched, _ = match_names({name: tuned[name].shape for name in tuned if name not in base}, base)
    counts = Counter((drop_all_wrappers(name), base[name].shape) for name in base)
    usable = {
        name: locations
        for name, locations in matched.items()
        if all(location.name not in tuned and location.into is None for location in locations)
        and all(location.shape == _matrix_shape(base, location) for location in locations)
        and {tuned[name].dtype, *(base[location.name].dtype for location in locations)} <= FLOAT_DTYPES
        and all(
            is_same_part(name, p.name, counts[drop_all_wrappers(p.name), base[p.name].shape] == 1) for p in locations
        )
    }
    claimed = Counter(location.layer for locations in usable.values() for location in locations)
    return {
        name: locations
        for name, locations in usable.items()
        if all(claimed[location.layer] == 1 for location in locations)
    }


def _is_one_model(base: Checkpoint, tuned: Checkpoint, renamed: Mapping[str, Sequence[Location]]) -> bool:
    """Return whether half of either side has a matching name and the configs do not name different models."""
    types = {str(kind) for side in (base, tuned) if (kind := side.config.get("model_type"))}
    common = {name for name in base if name in tuned}
    names = common | {location.name for locations in renamed.values() for location in locations}
    return len(types) < 2 and (2 * (len(common) + len(renamed)) >= len(tuned) or 2 * len(names) >= len(base))


def _matrix_shape(base: Checkpoint, location: Location) -> tuple[int, ...]:
    """Return the shape of a location that covers a whole weight, or one matrix of a stack; only these are paired."""
    shape = base[location.name].shape
    return shape if len(shape) < 3 else location.shape


def _make_delta(base: Checkpoint, location: Location, tuned: Checkpoint, name: str) -> StoredDelta:
    """Return the difference between one weight of BASE and the rows of TUNED that correspond to it."""
    shape = location.shape if len(location.shape) == 2 else (1, math.prod(location.shape))
    stored = tuned[name].shape
    row = location.index * (stored[1] if len(stored) == 3 else 0) + (location.rows[0] if location.rows else 0)
    sides = Side(base, location.name, location.offset), Side(tuned, name, row * shape[1])
    return StoredDelta(location.layer, (shape[0], shape[1]), *sides, is_matrix=len(stored) > 1)


def describe_adapter(
    adapter: Adapter,
    path: Path | str,
    base: Checkpoint | None,
    pairing: Pairing,
    notes: tuple[str, ...],
    verify: bool,
) -> RunInput:
    """Return the description of an adapter for the run record."""
    config = adapter.source.config
    targets = targets_of(adapter, base, pairing) if base is not None else None
    base_name = config.text("base_model_name_or_path") if config is not None else ""
    return RunInput(
        role="adapter",
        path=legible(path),
        kind=legible(adapter.kind),
        tensors=len(adapter.checkpoint),
        notes=tuple(map(legible, notes)),
        fingerprint=fingerprint_of_adapter(adapter.source),
        sha256=content_hash(files_of(adapter.checkpoint)) if verify else "",
        names=(legible(base_name),) if base_name else (),
        targets=targets[0] if targets is not None else None,
        lacking=tuple(map(legible, targets[1])) if targets is not None else (),
    )


def describe(role: str, checkpoint: Checkpoint, notes: tuple[str, ...] = (), verify: bool = False) -> RunInput:
    """Return the description of a checkpoint for the run record."""
    classes = checkpoint.config.get("architectures")
    class_name = classes[0] if isinstance(classes, list) and classes else None
    return RunInput(
        role=role,
        path=legible(checkpoint.path),
        kind=legible(checkpoint.kind),
        tensors=len(checkpoint),
        notes=tuple(map(legible, (*checkpoint.notes, *notes))),
        fingerprint=fingerprint(checkpoint),
        sha256=content_hash(files_of(checkpoint)) if verify else "",
        architecture=legible(class_name) if isinstance(class_name, str) else "",
        names=tuple(map(legible, names_of(checkpoint))) if role == "base" else (),
    )


def describe_steps(paths: Sequence[Path | str], steps: Sequence[Step], verify: bool) -> RunInput:
    """Return the description of the gradients of steps for the run record."""
    suffix = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    span = f"{len(steps)} steps, {steps[0].step} to {steps[-1].step}" if len(steps) > 1 else f"step {steps[0].step}"
    digest = hashlib.sha256("".join(fingerprint(step.checkpoint) for step in steps).encode())
    return RunInput(
        role="gradients",
        path=f"{legible(paths[0])}{suffix}",
        kind=f"{span}, each a {legible(steps[0].checkpoint.kind)}",
        tensors=sum(len(step.checkpoint) for step in steps),
        notes=tuple(dict.fromkeys(legible(note) for step in steps for note in _make_notes(step))),
        fingerprint=digest.hexdigest()[:DIGITS],
        sha256=content_hash([file for step in steps for file in files_of(step.checkpoint)]) if verify else "",
    )


def _make_notes(step: Step) -> tuple[str, ...]:
    if not step.checkpoint.config:
        return step.checkpoint.notes
    return (
        *step.checkpoint.notes,
        f"step {step.step} is next to a config.json; check that these are gradients, not a checkpoint",
    )
