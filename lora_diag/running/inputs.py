"""The inputs of a command: paths → opened checkpoints and adapters → named ΔW, and descriptions for
the run record.

An input is located once, and opened once: the type of what is opened says whether it is a
checkpoint (sparse patches are read as one) or an adapter, and it is passed on.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from lora_diag import adapters
from lora_diag.adapters import Adapter, Input, Location, Orientation, Shape, locate
from lora_diag.adapters.contents import find_missing_targets
from lora_diag.adapters.placing import place_updates
from lora_diag.adapters.source import StatedAlpha
from lora_diag.deltas import Delta, Pairing, Side, StoredDelta, natural_order, pair, refuse_empty
from lora_diag.errors import Given, InputError, NothingComparedError, UsageError
from lora_diag.gradients import GradientStep, locate_rows
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
from lora_diag.storage import Checkpoint, open_checkpoint, read_checkpoint
from lora_diag.storage.locating import find_named_weights
from lora_diag.storage.patches import open_tuned
from lora_diag.storage.tensors import FLOAT_DTYPES

if TYPE_CHECKING:
    from lora_diag.layers.metric import MomentLocation, Weighting

# Metadata that ``probe activations`` writes: its matrices have names of weights, and would pair
# with them.
MOMENTS = "second moments of layers' inputs"


@dataclass(frozen=True, slots=True)
class Comparison:
    """The inputs of a command, opened by their headers and paired.

    Args:
        base: BASE; None for an adapter alone.
        update: TUNED: a checkpoint, or an adapter.
        inputs: Inputs for the run record, TUNED last.
        pairing: Compared layers, and skipped tensors.
    """

    base: Checkpoint | None
    update: Checkpoint | Adapter
    inputs: tuple[RunInput, ...]
    pairing: Pairing

    @property
    def matrices(self) -> list[Delta]:
        """The compared layers that are matrices."""
        return [delta for delta in self.pairing.deltas if delta.is_matrix]

    @property
    def params(self) -> int:
        """The number of parameters in TUNED's files."""
        stored = self.update.checkpoint if isinstance(self.update, Adapter) else self.update
        return sum(stored[name].numel for name in stored)


def open_base(source: Input) -> Checkpoint:
    """Open BASE by its headers.

    Raises:
        UsageError: It is an adapter, without a checkpoint in the same folder.
    """
    if source.is_adapter and find_named_weights(source.files) is None:
        raise UsageError(
            f"{source.path}: is an adapter, not BASE; give the model that it adapts first"
        )
    return read_checkpoint(source)


def open_update(
    source: Input, base: Checkpoint | None, stated_alpha: StatedAlpha = None
) -> Checkpoint | Adapter:
    """Open TUNED by its headers: an adapter, a checkpoint, or sparse patches over BASE.

    Args:
        source: TUNED.
        base: BASE; None for an adapter alone.
        stated_alpha: α of an adapter whose files give none.

    Raises:
        UsageError: It is no adapter and there is no BASE, or a side holds second moments.
    """
    if source.is_adapter:
        return adapters.read_adapter(source, stated_alpha)
    if base is None:
        raise UsageError(
            f"{source.path}: is not an adapter; give a checkpoint to compare it with, BASE before "
            "TUNED"
        )
    tuned = open_tuned(source, base)
    for side in (base, tuned):
        if any(file.metadata.get("kind") == MOMENTS for file in side.files):
            raise UsageError(
                side.path, f"contains {MOMENTS}, not a checkpoint", "pass it with $activations"
            )
    return tuned


def pair_update(
    base: Checkpoint | None,
    update: Checkpoint | Adapter,
    layers: str | None = None,
    exclude: str | None = None,
    allow_unmatched: bool = False,
) -> tuple[Pairing, Sequence[str]]:
    """Return the named ΔW of an opened update with the skipped tensors, and notes on the pairing;
    read no weight.
    """
    notes: Sequence[str]
    if isinstance(update, Adapter):
        pairing, notes = place_updates(
            update.source, update.reading, base, layers, exclude, allow_unmatched
        )
    else:
        assert base is not None
        pairing, notes = _pair_renamed(pair(base, update, layers, exclude), base, update)
        refuse_empty(pairing, base, update)
    _refuse_duplicate_names(pairing.deltas)
    return pairing, notes


def compare(
    base: Path | str | Checkpoint,
    tuned: Path | str | None,
    layers: str | None = None,
    exclude: str | None = None,
    allow_unmatched: bool = False,
    verify: bool = False,
    stated_alpha: StatedAlpha = None,
    role: str | None = None,
    refuse: tuple[type[Checkpoint] | type[Adapter], str] | None = None,
) -> Comparison:
    """Open both sides, pair their weights, and describe the inputs.

    Args:
        base: Base checkpoint, which may be open already; or an adapter, if ``tuned`` is None.
        tuned: Fine-tuned checkpoint or adapter; None to measure an adapter without BASE.
        layers: Only weights whose name contains a match.
        exclude: Skip weights whose name contains a match.
        allow_unmatched: Whether to skip weights that the adapter changes and BASE does not have,
            instead of raising an error.
        verify: Whether to hash every byte (SHA-256).
        stated_alpha: α of an adapter whose files give none.
        role: Role of TUNED in the run record; by default ``tuned`` or ``adapter``.
        refuse: A type of TUNED that is refused before it is paired, and why.

    Raises:
        InputError: A side cannot be read, the adapter does not fit BASE or cannot be measured
            without it, or two weights have one name.
        NothingComparedError: No weight is selected, or none can be compared.
        UsageError: The only side is not an adapter, the adapter comes first, a side holds second
            moments, TUNED is refused, or ``layers`` or ``exclude`` is not a valid regular
            expression.
    """
    if tuned is None:
        assert not isinstance(base, Checkpoint)
        before, update = None, open_update(locate(base), None, stated_alpha)
    else:
        before = base if isinstance(base, Checkpoint) else open_base(locate(base))
        update = open_update(locate(tuned), before, stated_alpha)
    if refuse is not None and isinstance(update, refuse[0]):
        raise UsageError(f"{update.path}: {refuse[1]}")
    pairing, notes = pair_update(before, update, layers, exclude, allow_unmatched)
    if isinstance(update, Adapter):
        notes = (*update.notes, *update.warnings(), *notes)
        described = describe_adapter(update, before, pairing, notes, verify)
    else:
        described = describe("tuned", update, notes, verify)
    if role is not None:
        described = described.model_copy(update={"role": role})
    unpaired = tuple(replace(tensor, detail=legible(tensor.detail)) for tensor in pairing.unpaired)
    inputs = (
        (described,) if before is None else (describe("base", before, verify=verify), described)
    )
    return Comparison(before, update, inputs, replace(pairing, unpaired=unpaired))


def refuse_without_rounding(compared: Comparison) -> None:
    """Refuse ``--recover`` for an update that no file rounded.

    Raises:
        UsageError: No layer is a difference of two stored weights.
    """
    if not any(isinstance(delta, StoredDelta) for delta in compared.pairing.deltas):
        raise UsageError(
            Given("recover"), "the factors of an adapter are the update", "nothing is rounded away"
        )


def refuse_repeated(paths: Sequence[Path | str], tuned: Path | str | None = None) -> None:
    """Refuse an input that is given twice, or that is TUNED itself.

    Raises:
        UsageError: There is such an input.
    """
    problems = (
        {} if tuned is None else {os.path.realpath(tuned): "TUNED itself; give another input"}
    )
    for path in paths:
        if (problem := problems.get(os.path.realpath(path))) is not None:
            raise UsageError(f"{path}: is {problem}")
        problems[os.path.realpath(path)] = "given twice; give each path once"


def _refuse_duplicate_names(deltas: tuple[Delta, ...]) -> None:
    """Refuse two weights with one name: a stack ``w`` holds ``w[0]``, which may also be the name of
    a tensor.

    Raises:
        InputError: Two weights have one name.
    """
    first_by_name: dict[str, Delta] = {}
    for delta in deltas:
        earlier = first_by_name.setdefault(delta.layer, delta)
        if earlier is not delta:
            names = " and ".join(
                each.base.name if each.base else each.layer for each in (earlier, delta)
            )
            raise InputError(
                delta.layer,
                f"two weights have this name, from {names}",
                "exclude one with $exclude",
            )


def _pair_renamed(
    pairing: Pairing, base: Checkpoint, tuned: Checkpoint
) -> tuple[Pairing, tuple[str, ...]]:
    """Return the pairing with tensors that TUNED stores under other names, and a note on them if
    there are any.

    An example is a stack of fused experts that BASE stores one by one.

    Two sides without a common name may be one model, saved with and without its head or inside a
    wrapper. They are paired if half of either side has a matching name, unless their configs name
    different models.
    """
    locations = _match_other_names(base, tuned)
    if not locations or not (pairing.deltas or _is_one_model(base, tuned, locations)):
        return pairing, ()
    only_in_base = {tensor.layer for tensor in pairing.unpaired if tensor.reason == "only_in_base"}
    only_in_tuned = {
        tensor.layer for tensor in pairing.unpaired if tensor.reason == "only_in_tuned"
    }
    renamed = {
        name: [_make_delta(base, location, tuned, name) for location in locations[name]]
        for name in locations
        if name in only_in_tuned
        and all(location.name in only_in_base for location in locations[name])
    }
    if not renamed:
        return pairing, ()
    used = {*renamed, *(delta.base.name for delta in chain(*renamed.values()))}
    deltas = sorted(
        (*pairing.deltas, *chain(*renamed.values())), key=lambda delta: natural_order(delta.layer)
    )
    unpaired = tuple(tensor for tensor in pairing.unpaired if tensor.layer not in used)
    name, layer = min((name, deltas[0].layer) for name, deltas in renamed.items())
    note = (
        f"{len(renamed)} tensors are stored under other names than in BASE, such as {name} for "
        f"{layer}"
    )
    return Pairing(tuple(deltas), unpaired), (note,)


def _match_other_names(base: Checkpoint, tuned: Checkpoint) -> dict[str, tuple[Location, ...]]:
    """Return the locations in BASE of tensors that only TUNED has by name, independent of the
    selection.

    Towers with equal internal names (text and vision) are not matched with each other, nor is a
    model named BERT with one named RoBERTa.
    """
    matched, _ = adapters.match_names(
        {name: tuned[name].shape for name in tuned if name not in base}, base
    )
    counts = Counter((adapters.drop_all_wrappers(name), base[name].shape) for name in base)

    def is_usable(name: str, location: Location) -> bool:
        """Return whether a location is a weight, or a matrix of a stack, that corresponds to a
        tensor of TUNED.
        """
        weight = base[location.name]
        return (
            location.name not in tuned
            and location.into is None
            and (len(weight.shape) > 2 or location.shape == weight.shape)
            and weight.dtype in FLOAT_DTYPES
            and adapters.is_same_part(
                name,
                location.name,
                counts[adapters.drop_all_wrappers(location.name), weight.shape] == 1,
            )
        )

    usable = {
        name: locations
        for name, locations in matched.items()
        if tuned[name].dtype in FLOAT_DTYPES and all(map(partial(is_usable, name), locations))
    }
    claimed = Counter(location.layer for locations in usable.values() for location in locations)
    return {
        name: locations
        for name, locations in usable.items()
        if all(claimed[location.layer] == 1 for location in locations)
    }


def _is_one_model(
    base: Checkpoint, tuned: Checkpoint, renamed: Mapping[str, Sequence[Location]]
) -> bool:
    """Return whether half of either side has a matching name and the configs do not name different
    models.
    """
    types = {str(kind) for side in (base, tuned) if (kind := side.config.get("model_type"))}
    common = {name for name in base if name in tuned}
    names = common | {location.name for locations in renamed.values() for location in locations}
    return len(types) < 2 and (
        2 * (len(common) + len(renamed)) >= len(tuned) or 2 * len(names) >= len(base)
    )


def _make_delta(base: Checkpoint, location: Location, tuned: Checkpoint, name: str) -> StoredDelta:
    """Return the difference between one weight of BASE and the rows of TUNED that
    correspond to it.
    """
    layer, shape, after = locate_rows(tuned, name, location)
    before = Side(base, location.name, location.offset)
    return StoredDelta(layer, shape, before, after, is_matrix=len(tuned[name].shape) > 1)


def describe_adapter(
    adapter: Adapter, base: Checkpoint | None, pairing: Pairing, notes: Sequence[str], verify: bool
) -> RunInput:
    """Return the description of an adapter for the run record."""
    config = adapter.source.config
    targets = find_missing_targets(adapter, base, pairing) if base is not None else None
    base_name = config.text("base_model_name_or_path") if config is not None else ""
    return RunInput(
        role="adapter",
        path=legible(adapter.path),
        kind=legible(adapter.kind),
        tensors=len(adapter.checkpoint),
        notes=tuple(map(legible, notes)),
        fingerprint=fingerprint_of_adapter(adapter.source),
        sha256=content_hash(files_of(adapter.checkpoint)) if verify else "",
        names=(legible(base_name),) if base_name else (),
        targets=targets[0] if targets is not None else None,
        lacking=tuple(map(legible, targets[1])) if targets is not None else (),
        scaling=adapter.scaling(),
    )


def describe(
    role: str, checkpoint: Checkpoint, notes: Sequence[str] = (), verify: bool = False
) -> RunInput:
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


def describe_steps(
    paths: Sequence[Path | str], steps: Sequence[GradientStep], verify: bool
) -> RunInput:
    """Return the description of the gradients of steps for the run record."""
    suffix = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    span = (
        f"{len(steps)} steps, {steps[0].step} to {steps[-1].step}"
        if len(steps) > 1
        else f"step {steps[0].step}"
    )
    digest = hashlib.sha256("".join(fingerprint(step.checkpoint) for step in steps).encode())
    notes = [note for step in steps for note in step.checkpoint.notes]
    notes += [
        f"step {step.step} is next to a config.json; check that these are gradients, not a "
        "checkpoint"
        for step in steps
        if step.checkpoint.config
    ]
    return RunInput(
        role="gradients",
        path=f"{legible(paths[0])}{suffix}",
        kind=f"{span}, each a {legible(steps[0].checkpoint.kind)}",
        tensors=sum(len(step.checkpoint) for step in steps),
        notes=tuple(dict.fromkeys(map(legible, notes))),
        fingerprint=digest.hexdigest()[:DIGITS],
        sha256=content_hash([file for step in steps for file in files_of(step.checkpoint)])
        if verify
        else "",
    )


# Problem and fix of ``kfac`` without second moments.
NEEDS_ACTIVATIONS = (
    "needs $activations FILE",
    "record it by probe activations with $output_gradients",
)

# Prefix of matrices that are not E[xxᵀ] of a layer's input but E[ggᵀ] of its output gradient.
GRADIENTS = "output_gradients."


@dataclass(frozen=True, slots=True)
class SecondMoments:
    """Second moments C = E[xxᵀ] of layers' inputs, and G = E[ggᵀ] of their output gradients.

    Args:
        described: For the run record.
        of: Location of C, by the layer's name in BASE.
        gradients: Location of G, by the layer's name in BASE.
    """

    described: RunInput
    of: dict[str, MomentLocation]
    gradients: dict[str, MomentLocation]

    def weighting(self, layer: str, kfac: bool) -> Weighting | None:
        """Return the weighting of a layer; None if the file does not have all it needs."""
        from lora_diag.layers.metric import Weighting  # deferred: imports torch

        inputs, gradients = self.of.get(layer), self.gradients.get(layer)
        if inputs is None or (kfac and gradients is None):
            return None
        return Weighting(inputs, gradients if kfac else None)


def second_moments(
    path: Path | str, base: Checkpoint, pairing: Pairing, verify: bool = False, kfac: bool = False
) -> SecondMoments:
    """Open second moments by their headers, and return them by the compared layers that they belong
    to.

    Args:
        path: A safetensors file, or a folder, with one ``(in, in)`` matrix under each weight's
            name, and perhaps one ``(out, out)`` under ``output_gradients.`` and its name.
        base: The checkpoint whose weights they belong to.
        pairing: The compared layers.
        verify: Whether to hash every byte (SHA-256).
        kfac: Whether second moments of output gradients are needed, too.

    Raises:
        InputError: The file cannot be read, a tensor is not a square floating-point matrix, or no
            matrix belongs to a compared weight.
        NothingComparedError: No matrix is compared.
        UsageError: ``kfac``, and there are none of output gradients of a compared weight.
    """
    from lora_diag.layers.metric import MomentLocation  # deferred: imports torch

    stored = open_checkpoint(path)
    sizes: dict[str, int] = {}
    for name in stored:
        shape = stored[name].shape
        if len(shape) != 2 or shape[0] != shape[1] or stored[name].dtype not in FLOAT_DTYPES:
            raise InputError(
                f"{stored.file_of(name)}: {name} is {stored[name].dtype} {list(shape)}, not a "
                "square floating-point "
                "matrix; record the second moments again with loradiag probe activations"
            )
        sizes[name] = shape[0]
    gradient_sizes = {
        name.removeprefix(GRADIENTS): sizes.pop(name)
        for name in list(sizes)
        if name.startswith(GRADIENTS)
    }
    shapes: dict[str, Shape] = {name: (None, size) for name, size in sizes.items()}
    matched, _ = adapters.match_names(shapes, base, transposed=True, parts=True)
    located = [(name, location) for name, locations in matched.items() for location in locations]
    orientation = Orientation(
        base, {location.name: shapes[name] for name, location in located}, flag=False
    )
    compared = {delta.layer for delta in pairing.deltas if delta.is_matrix}
    of: dict[str, MomentLocation] = {}
    gradients: dict[str, MomentLocation] = {}
    for name, location in located:
        on_rows = orientation.in_out(location.name, shapes[name], base[location.name].shape)
        if location.layer in compared and location.shape[0 if on_rows else 1] == sizes[name]:
            of[location.layer] = MomentLocation(Side(stored, name), sizes[name], on_rows)
            size = gradient_sizes.get(name)
            if size == location.shape[1 if on_rows else 0]:
                gradients[location.layer] = MomentLocation(
                    Side(stored, GRADIENTS + name), size, not on_rows
                )
    if not compared:
        raise NothingComparedError(
            Given("activations", path),
            "applies to matrices, and none is compared",
            "change $layers",
        )
    if not of:
        raise InputError(
            f"{path}: contains no second moment for a compared weight, such as {min(compared)}; "
            "record the activations of this BASE"
        )
    if kfac and not gradients:
        raise UsageError(
            Given("kfac"), f"{path} has no output gradients", "record it with $output_gradients"
        )
    notes = [f"second moments of {len(of)} of {len(compared)} matrices"]
    notes += [
        f"recorded over {file.metadata['tokens']} tokens"
        for file in stored.files
        if "tokens" in file.metadata
    ]
    return SecondMoments(describe("activations", stored, tuple(notes), verify), of, gradients)
