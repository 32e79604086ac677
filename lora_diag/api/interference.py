"""``interference``: do several updates fight?"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from lora_diag.adapters import is_adapter
from lora_diag.api.inputs import Comparison, compare
from lora_diag.api.measuring import (
    Progress,
    Watch,
    check_running,
    checked_ranks,
    layout_of,
    measure_layers,
    place,
    read_memory,
    without_rank,
)
from lora_diag.checkpoints import as_path, locate
from lora_diag.deltas import Delta, Pairing, StoredDelta, Unpaired, natural_order
from lora_diag.diagnostics.interference import interference as measure
from lora_diag.diagnostics.interference import size
from lora_diag.diagnostics.parts import InterferenceSettings, Several, Update
from lora_diag.diagnostics.spectrum import RANKS
from lora_diag.engines import Ray
from lora_diag.errors import InputError, NothingComparedError, UsageError
from lora_diag.linalg import check_request
from lora_diag.results import (
    AnyRecord,
    Interference,
    Results,
    ResultsWriter,
    Run,
    Spectrum,
    Union,
    totals,
)
from lora_diag.version import __version__


def interference(
    updates: Sequence[Path | str],
    *,
    base: Path | str | None = None,
    weights: Sequence[float] | None = None,
    ranks: Sequence[int] = RANKS,
    density: float = 0.2,
    layers: str | None = None,
    exclude: str | None = None,
    allow_unmatched: bool = False,
    method: str = "auto",
    tol: float = 1e-4,
    device: str = "auto",
    seed: int = 0,
    workers: int | None = None,
    memory: str | int | None = None,
    engine: Ray | None = None,
    output: Path | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    on_record: Callable[[AnyRecord], None] | None = None,
) -> Results[Interference | Union]:
    r"""Hold several updates of one model against each other, pair by pair and all together, layer by layer.

    Args:
        updates: Two or more checkpoints or adapters.
        base: The checkpoint before them; adapters alone need none.
        weights: w_k > 0 of each update in the sum Σ w_kΔW_k; all 1 by default.
        ranks: Ranks at which spaces are compared, and to which merges are recompressed.
        density: Share of the entries of each update that TIES keeps; 0 for no TIES and no sign conflicts, which take
            every entry of every layer.
        layers: Regular expression; only weights whose name contains a match.
        exclude: Regular expression; no weights whose name contains a match.
        allow_unmatched: Leave out what an adapter changes and ``base`` does not have, instead of stopping.
        method: ``auto``, ``exact``, ``gram`` or ``krylov``; of updates that have no factors.
        tol: Bound to reach on the error of every energy fraction.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        seed: Of random starts.
        workers: Layers at once; by default as many as fit into memory.
        memory: What the whole program may take, such as ``"8GB"``; a layer that does not fit is left out.
        engine: A Ray cluster to measure on; None for this machine alone.
        output: Results file, appended layer by layer.
        resume: Go on behind what an interrupted run left in ``output``.
        overwrite: Replace a file in the place of ``output`` that loradiag did not write.
        verify: Let ``resume`` compare a SHA-256 of every byte of the inputs, not of samples.
        on_progress: Called at the start and after every layer.
        on_record: Called with every record, in the order of the file, as it comes.

    Returns:
        One ``interference`` record for each layer and pair of updates that change it, and one ``union`` record for each
        layer that any changes.

    Raises:
        UsageError: An option makes no sense, or there are not two updates.
        InputError: An input cannot be read, or two of them are not of one model.
        NothingComparedError: No weight is changed by two of them.

    Example:
        >>> adapters = ["sample_checkpoints/lora_r4", "sample_checkpoints/lora_r16"]
        >>> found = interference(adapters, layers=r"0\.mlp\.up_proj")
        >>> [record.record for record in found], found.layers[1].ranks
        (['interference', 'union'], (4, 16))
    """
    where = place(engine, device)
    settings = InterferenceSettings(
        checked_ranks(ranks), _weights(weights, len(updates)), density, method, tol, seed, where.tasks
    )
    limit = read_memory(memory, engine)
    check_running(workers, seed)
    check_request(method, 1, tol)
    if not 0 <= density <= 1:
        raise UsageError(f"--density {density}: must lie between 0 and 1")
    _check_names(updates)
    base = as_path(base) if base is not None else None  # once, so that what is known of it is not asked again
    compared = [_compare(base, path, layers, exclude, allow_unmatched, verify) for path in updates]
    tasks = _tasks(compared, settings.weights)
    rest = Pairing(tuple(_vectors(compared)), tuple(_unpaired(compared, {task.layer for task in tasks})))
    run = Run(
        command="interference",
        version=__version__,
        inputs=(*compared[0].inputs[:-1], *(side.inputs[-1] for side in compared)),
        settings={
            "weights": list(settings.weights),
            "ranks": list(settings.ranks),
            "density": density,
            "layers": layers,
            "exclude": exclude,
            "method": method,
            "tol": tol,
            "device": where.kind,
            "seed": seed,
        },
    )
    layout = layout_of(tasks, workers, where.kind, limit)
    settings = replace(settings, memory=layout.limit)
    writer: ResultsWriter[Interference | Union]
    with ResultsWriter(output, run, resume, overwrite) as writer:
        return measure_layers(
            writer,
            tasks,
            partial(measure, settings=settings),
            lambda: without_rank(rest, layout, where.here),
            layout,
            partial(size, settings=settings),
            Watch(on_progress, on_record),
            engine,
        )


def split_base(inputs: Sequence[Path | str]) -> tuple[Path | str | None, list[Path | str]]:
    """Return BASE and the updates: adapters alone have no BASE, else it comes first.

    Raises:
        UsageError: An adapter comes first, and what follows is not all adapters.
    """
    inputs = [as_path(path) for path in inputs]
    adapters = [is_adapter(locate(path)) for path in inputs]
    if all(adapters):
        return None, list(inputs)
    if adapters[0]:
        raise UsageError(f"{inputs[0]}: is an adapter; give BASE first, and the updates after it")
    return inputs[0], list(inputs[1:])


def union_spectra(results: Results[Interference | Union]) -> Results[Spectrum]:
    """Return the spectra of the sums, as ``spectrum`` would have written them, for ``allocate``, ``plot`` and ``gate``.

    Args:
        results: What ``interference`` measured.
    """
    spectra = tuple(record.spectrum for record in results if isinstance(record, Union))
    end = totals(spectra, results.left_out) if results.end is not None else None
    return Results(results.run.model_copy(update={"command": "spectrum"}), spectra, results.left_out, end)


def _weights(given: Sequence[float] | None, number: int) -> tuple[float, ...]:
    weights = tuple(given) if given is not None else (1.0,) * number
    if len(weights) != number:
        raise UsageError(f"--weights: {len(weights)} weights for {number} updates; give one for each, in their order")
    if not all(0 < weight < math.inf for weight in weights):
        raise UsageError("--weights: must be above 0; subtracting an update is not a merge that is measured here")
    return weights


def _check_names(updates: Sequence[Path | str]) -> None:
    if len(updates) < 2:
        raise UsageError("interference: name at least two updates, BASE before them unless all are adapters")
    seen: set[str] = set()
    for path in map(os.path.realpath, updates):
        if path in seen:
            raise UsageError(f"{path}: is named twice")
        seen.add(path)


def _compare(
    base: Path | str | None,
    path: Path | str,
    layers: str | None,
    exclude: str | None,
    allow_unmatched: bool,
    verify: bool,
) -> Comparison:
    if base is None:
        return compare(path, None, layers, exclude, allow_unmatched, verify)
    return compare(base, path, layers, exclude, allow_unmatched, verify)


def _tasks(compared: Sequence[Comparison], weights: Sequence[float]) -> list[Several]:
    """Align the updates by the names of the layers.

    Raises:
        InputError: Two have different shapes for one name.
        NothingComparedError: No layer is changed by two.
    """
    by_layer: dict[str, list[Update]] = {}
    for side, weight in zip(compared, weights, strict=True):
        for delta in side.pairing.deltas:
            if delta.is_matrix:
                alone = delta if isinstance(delta, StoredDelta) else replace(delta, base=None)
                by_layer.setdefault(delta.layer, []).append(Update(_path(side), weight, alone))
    if not any(len(found) > 1 for found in by_layer.values()):
        examples = "; ".join(f"{_path(side)} has {_first_layer(side)}" for side in compared)
        raise NothingComparedError(f"no weight is changed by two of the inputs, so nothing was compared: {examples}")
    for layer, found in by_layer.items():
        for other in found[1:]:
            if other.delta.shape != found[0].delta.shape:
                raise InputError(
                    f"{layer}: {list(found[0].delta.shape)} in {found[0].name} against {list(other.delta.shape)} in "
                    f"{other.name}: these are not updates of one model; leave the weight out with --exclude"
                )
    names = sorted(by_layer, key=natural_order)
    return [Several(name, by_layer[name][0].delta.shape, tuple(by_layer[name])) for name in names]


def _path(side: Comparison) -> str:
    return side.inputs[-1].path


def _first_layer(side: Comparison) -> str:
    return min((delta.layer for delta in side.pairing.deltas), default="no layer")


def _vectors(compared: Sequence[Comparison]) -> Iterator[Delta]:
    """Yield each 1-D tensor once: it is left out, whoever changes it."""
    seen: set[str] = set()
    for delta in (delta for side in compared for delta in side.pairing.deltas if not delta.is_matrix):
        if delta.layer not in seen:
            seen.add(delta.layer)
            yield delta


def _unpaired(compared: Sequence[Comparison], known: set[str]) -> Iterator[Unpaired]:
    """Yield what no update can be compared in, once, and what only one could not."""
    seen = set(known)
    for side in compared:
        for item in side.pairing.unpaired:
            if item.layer not in seen:
                seen.add(item.layer)
                yield replace(item, detail=f"{_path(side)}: {item.detail}")
