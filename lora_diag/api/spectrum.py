"""``spectrum``: is the update low-rank, layer by layer?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lora_diag.api.inputs import compare
from lora_diag.deltas import Delta, Pairing, footprint, natural_order
from lora_diag.diagnostics.left_out import left_out_rows, left_out_vector
from lora_diag.diagnostics.spectrum import RANKS, SpectrumSettings
from lora_diag.diagnostics.spectrum import spectrum as measure
from lora_diag.engines import layout_for, run_local
from lora_diag.errors import UsageError
from lora_diag.linalg import check_request, resolve_device
from lora_diag.results import End, LeftOut, Results, ResultsWriter, Run, Spectrum, totals
from lora_diag.version import __version__

Record = Run | Spectrum | LeftOut | End


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is; sent when it starts and after every layer.

    Args:
        layer: The layer at hand.
        done: Layers finished.
        layers: Layers in all.
        entries_done: Matrix entries of the finished layers.
        entries: Matrix entries in all.
    """

    layer: str
    done: int
    layers: int
    entries_done: int
    entries: int


def spectrum(
    base: Path | str,
    tuned: Path | str | None = None,
    *,
    ranks: Sequence[int] = RANKS,
    layers: str | None = None,
    exclude: str | None = None,
    allow_unmatched: bool = False,
    method: str = "auto",
    top: int | None = None,
    tol: float = 1e-4,
    device: str = "auto",
    seed: int = 0,
    workers: int | None = None,
    output: Path | str | None = None,
    resume: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    on_record: Callable[[Record], None] | None = None,
) -> Results:
    r"""Measure the spectrum of ΔW = W_tuned − W_base for every weight that both checkpoints have.

    Layers are read one by one, as many at a time as cores and memory have room for.

    Args:
        base: The checkpoint before: a file, a folder, or a shard index.
        tuned: The checkpoint after, or an adapter; None if ``base`` is an adapter to be measured alone.
        ranks: Ranks r at which C(r) and the truncation errors are given.
        layers: Regular expression; only weights whose name contains a match.
        exclude: Regular expression; no weights whose name contains a match.
        allow_unmatched: Leave out what an adapter changes and ``base`` does not have, instead of stopping.
        method: ``auto``, ``exact``, ``gram`` or ``krylov``.
        top: Keep only so many of the largest singular values.
        tol: Bound to reach on the error of every energy fraction.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        seed: Of the random starts of ``krylov``.
        workers: Layers at once; by default as many as fit into 1 GiB and four copies of the largest matrix.
        output: Results file, appended line by line; a finished run there is replaced when this one is finished.
        resume: Go on behind what an interrupted run left in ``output``.
        on_progress: Called at the start and after every layer.
        on_record: Called with every record, in the order of the file, as it comes.

    Returns:
        All records of the run. Layers whose entries are not finite are in ``left_out``, the rest is measured.

    Raises:
        UsageError: An option makes no sense, or ``output`` holds something that would be lost.
        InputError: An input cannot be read.
        NothingComparedError: The checkpoints have no weight in common.

    Example:
        >>> results = spectrum("sample_checkpoints/base", "sample_checkpoints/full_ft", layers=r"layers\.0\..*q_proj")
        >>> [(record.layer, record.shape) for record in results]
        [('model.layers.0.self_attn.q_proj.weight', (128, 128))]
    """
    settings = _settings(ranks, method, top, tol, seed, device, workers)
    compared = compare(base, tuned, layers, exclude, allow_unmatched)
    run = Run(
        command="spectrum",
        version=__version__,
        inputs=compared.inputs,
        settings={
            "ranks": list(settings.ranks),
            "layers": layers,
            "exclude": exclude,
            "method": method,
            "top": top,
            "tol": tol,
            "device": resolve_device(device).type,
            "seed": seed,
        },
    )
    with ResultsWriter(Path(output) if output is not None else None, run, resume) as writer:
        return _measure(compared.pairing, settings, workers, writer, on_progress or _ignore, on_record or _ignore)


def _settings(
    ranks: Sequence[int], method: str, top: int | None, tol: float, seed: int, device: str, workers: int | None
) -> SpectrumSettings:
    """Check the options before anything is opened."""
    if not ranks or min(ranks) < 1:
        raise UsageError(f"--ranks {','.join(map(str, ranks))}: ranks must be whole numbers from 1 up")
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: must be at least 1")
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed {seed}: must be a whole number from 0 to 2^63 - 1")
    check_request(method, top, tol)
    resolve_device(device)
    return SpectrumSettings(tuple(sorted(set(ranks))), method, top, tol, seed, device)


def _measure(
    pairing: Pairing,
    settings: SpectrumSettings,
    workers: int | None,
    writer: ResultsWriter,
    on_progress: Callable[[Progress], None],
    on_record: Callable[[Record], None],
) -> Results:
    """Measure what is not yet in the results file; write and tell each record in the order of the file."""
    earlier = writer.earlier
    for old in earlier.records():
        on_record(old)
    if earlier.end is not None:
        return earlier

    def put(record: Record) -> None:
        writer.append(record)
        on_record(record)

    layers, not_finite = list(earlier.layers), []
    measured = {record.layer for record in earlier.layers}
    todo = [delta for delta in pairing.deltas if delta.is_matrix and delta.layer not in measured]
    device = resolve_device(settings.device)
    layout = layout_for(max((math.prod(delta.shape) for delta in todo), default=0), workers, device.type)
    found = run_local(partial(measure, settings=settings), todo, layout, footprint)
    for record in _with_progress(found, todo, on_progress):
        if isinstance(record, Spectrum):
            put(record)
            layers.append(record)
        else:
            not_finite.append(record)

    vectors = [delta for delta in pairing.deltas if not delta.is_matrix]
    left_out = [
        *not_finite,
        *run_local(partial(left_out_vector, device=device), vectors, layout, footprint),
        *run_local(partial(left_out_rows, device=device), pairing.unpaired, layout, lambda unpaired: 0),
    ]
    left_out.sort(key=lambda record: (natural_order(record.layer), record.reason))
    for record in left_out[len(earlier.left_out) :]:
        put(record)
    end = totals(layers, left_out)
    put(end)
    return Results(writer.run, tuple(layers), tuple(left_out), end)


def _with_progress(
    measured: Iterator[Spectrum | LeftOut], todo: list[Delta], on_progress: Callable[[Progress], None]
) -> Iterator[Spectrum | LeftOut]:
    sizes = [math.prod(delta.shape) for delta in todo]
    names = [delta.layer for delta in todo] + [""]
    entries_done, entries = 0, sum(sizes)
    on_progress(Progress(names[0], 0, len(todo), 0, entries))
    for done, record in enumerate(measured, 1):
        entries_done += sizes[done - 1]
        on_progress(Progress(names[done], done, len(todo), entries_done, entries))
        yield record


def _ignore(event: object) -> None:
    """Take no notice."""
