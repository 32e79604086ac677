"""``interference``: compare several updates of one model."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from lora_diag.adapters import is_adapter
from lora_diag.checkpoints import as_path, locate
from lora_diag.deltas import Delta, Pairing, StoredDelta, Unpaired, natural_order
from lora_diag.diagnostics.interference.measure import interference as measure
from lora_diag.diagnostics.interference.measure import size
from lora_diag.diagnostics.interference.options import InterferenceOptions
from lora_diag.diagnostics.interference.parts import InterferenceSettings, LayerUpdates, Update
from lora_diag.diagnostics.interference.record import Interference, Union
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.errors import InputError, NothingComparedError, UsageError
from lora_diag.linalg import check_request
from lora_diag.records import Results, totals
from lora_diag.running.inputs import Comparison
from lora_diag.running.layers import LayerRun
from lora_diag.running.measuring import check_ranks, without_rank
from lora_diag.running.options import show_options


@show_options
def interference(
    updates: Sequence[Path | str],
    *,
    base: Path | str | None = None,
    **options: Unpack[InterferenceOptions],
) -> Results[Interference | Union]:
    r"""Compare several updates of one model, pair by pair and all together, layer by layer.

    Args:
        updates: Two or more checkpoints or adapters.
        base: Base checkpoint; not needed for adapters.
        weights: w_k > 0 of each update in the sum Σ w_kΔW_k; all 1 by default.
        ranks: Ranks at which spaces are compared, and to which merges are recompressed.
        density: Fraction of the entries of each update that TIES keeps; 0 to skip TIES and sign conflicts, which need
            every entry of every layer.
        **options: ``InterferenceOptions``.

    Returns:
        One ``interference`` record for each layer and pair of updates that change it, and one ``union`` record for each
        layer that any changes.

    Raises:
        UsageError: An option is invalid, or there are fewer than two updates.
        InputError: An input cannot be read, or two of them are not of one model.
        NothingComparedError: No weight is changed by two of them.

    Example:
        >>> adapters = ["sample_checkpoints/lora_r4", "sample_checkpoints/lora_r16"]
        >>> found = interference(adapters, layers=r"0\.mlp\.up_proj")
        >>> [record.record for record in found], found.layers[1].ranks
        (['interference', 'union'], (4, 16))
    """
    run = LayerRun("interference", options, InterferenceOptions)
    weights, ranks, density = (run.options[name] for name in ("weights", "ranks", "density"))
    settings = run.settings(
        InterferenceSettings, ranks=check_ranks(ranks), weights=_check_weights(weights, len(updates)), density=density
    )
    check_request(settings.method, 1, settings.tol)
    if not 0 <= density <= 1:
        raise UsageError(f"--density {density}: must lie between 0 and 1")
    _refuse_repeated_updates(updates)
    base = as_path(base) if base is not None else None  # opened once, so that its headers are not read again
    compared = [run.compare(*((path, None) if base is None else (base, path))) for path in updates]
    tasks = _align_layers(compared, settings.weights)
    unmeasured = Pairing(
        tuple(_list_vectors(compared)), tuple(_list_unpaired(compared, {task.layer for task in tasks}))
    )
    return run.over(
        tasks,
        measure,
        size,
        settings,
        lambda layout, _, __: without_rank(unmeasured, layout, run.where.here),
        (*compared[0].inputs[:-1], *(side.inputs[-1] for side in compared)),
        {"weights": list(settings.weights), "ranks": list(settings.ranks), "density": density},
    )


def split_base(inputs: Sequence[Path | str]) -> tuple[Path | str | None, list[Path | str]]:
    """Return BASE and the updates: adapters alone have no BASE, else it comes first.

    Raises:
        UsageError: An adapter comes first, but not all inputs are adapters.
    """
    inputs = [as_path(path) for path in inputs]
    adapters = [is_adapter(locate(path)) for path in inputs]
    if all(adapters):
        return None, list(inputs)
    if adapters[0]:
        raise UsageError(f"{inputs[0]}: is an adapter, not BASE; give BASE first, then the updates")
    return inputs[0], list(inputs[1:])


def union_spectra(results: Results[Interference | Union]) -> Results[Spectrum]:
    """Return the spectra of the sums in the form of ``spectrum``, for ``allocate``, ``plot`` and ``gate``.

    Args:
        results: Results of ``interference``.
    """
    spectra = tuple(record.spectrum for record in results if isinstance(record, Union))
    end = totals(spectra, results.left_out) if results.end is not None else None
    return Results(results.run.model_copy(update={"command": "spectrum"}), spectra, results.left_out, end)


def _check_weights(requested: Sequence[float] | None, number: int) -> tuple[float, ...]:
    weights = tuple(requested) if requested is not None else (1.0,) * number
    if len(weights) != number:
        raise UsageError(f"--weights: {len(weights)} weights for {number} updates; give one for each, in their order")
    if not all(0 < weight < math.inf for weight in weights):
        raise UsageError("--weights: must be positive; subtraction of updates is not measured")
    return weights


def _refuse_repeated_updates(updates: Sequence[Path | str]) -> None:
    """Refuse fewer than two updates, or one that is given twice.

    Raises:
        UsageError: There are fewer than two, or one is given twice.
    """
    if len(updates) < 2:
        raise UsageError(
            "interference: fewer than two updates; give BASE and at least two updates, or at least two adapters"
        )
    seen: set[str] = set()
    for path in updates:
        if (real := os.path.realpath(path)) in seen:
            raise UsageError(f"{path}: given twice; give each path once")
        seen.add(real)


def _align_layers(compared: Sequence[Comparison], weights: Sequence[float]) -> list[LayerUpdates]:
    """Align the updates by the names of the layers.

    Raises:
        InputError: Two have different shapes for one name.
        NothingComparedError: No layer is changed by two.
    """
    by_layer: dict[str, list[Update]] = {}
    for side, weight in zip(compared, weights, strict=True):
        for delta in side.pairing.deltas:
            if delta.is_matrix:
                without_base = delta if isinstance(delta, StoredDelta) else replace(delta, base=None)
                by_layer.setdefault(delta.layer, []).append(Update(_path_of_side(side), weight, without_base))
    if not any(len(updates) > 1 for updates in by_layer.values()):
        examples = "; ".join(f"{_path_of_side(side)} has {_first_layer(side)}" for side in compared)
        raise NothingComparedError(f"no weight is changed by two of the inputs, so nothing was compared: {examples}")
    for layer, updates in by_layer.items():
        for other in updates[1:]:
            if other.delta.shape != updates[0].delta.shape:
                raise InputError(
                    f"{layer}: {list(updates[0].delta.shape)} in {updates[0].name} but {list(other.delta.shape)} in "
                    f"{other.name}, so these are not updates of one model; skip the weight with --exclude"
                )
    names = sorted(by_layer, key=natural_order)
    return [LayerUpdates(name, by_layer[name][0].delta.shape, tuple(by_layer[name])) for name in names]


def _path_of_side(side: Comparison) -> str:
    return side.inputs[-1].path


def _first_layer(side: Comparison) -> str:
    return min((delta.layer for delta in side.pairing.deltas), default="no layer")


def _list_vectors(compared: Sequence[Comparison]) -> Iterator[Delta]:
    """Yield each 1-D tensor of the updates, once."""
    seen: set[str] = set()
    for delta in (delta for side in compared for delta in side.pairing.deltas if not delta.is_matrix):
        if delta.layer not in seen:
            seen.add(delta.layer)
            yield delta


def _list_unpaired(compared: Sequence[Comparison], known: set[str]) -> Iterator[Unpaired]:
    """Yield the tensors that could not be compared, once each, except those of the known layers."""
    names = set(known)
    for side in compared:
        for item in side.pairing.unpaired:
            if item.layer not in names:
                names.add(item.layer)
                yield replace(item, detail=f"{_path_of_side(side)}: {item.detail}")
