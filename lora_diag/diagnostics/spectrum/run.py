"""``spectrum``: is the update low-rank, layer by layer?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from lora_diag.deltas import Pairing, Unpaired
from lora_diag.diagnostics.spectrum.gradients_run import gradient_spectrum
from lora_diag.diagnostics.spectrum.measure import Layer, SpectrumSettings, size
from lora_diag.diagnostics.spectrum.measure import spectrum as measure
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.errors import UsageError
from lora_diag.linalg import check_request
from lora_diag.metrics import RANKS
from lora_diag.records import AnyRecord, LeftOut, Results, ResultsWriter, Run
from lora_diag.running.activations import SecondMoments, second_moments
from lora_diag.running.engines import Ray
from lora_diag.running.inputs import compare
from lora_diag.running.measuring import (
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
from lora_diag.version import __version__


def spectrum(
    base: Path | str | None = None,
    tuned: Path | str | None = None,
    *,
    gradients: Sequence[Path | str] = (),
    activations: Path | str | None = None,
    kfac: bool = False,
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
    memory: str | int | None = None,
    engine: Ray | None = None,
    output: Path | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    on_record: Callable[[AnyRecord], None] | None = None,
) -> Results[Spectrum]:
    r"""Measure the spectrum of ΔW = W_tuned − W_base for every weight that both checkpoints have.

    Layers are read one by one, as many at a time as cores and memory have room for.

    Args:
        base: The checkpoint before: a file, a folder, or a shard index; None only with ``gradients``.
        tuned: The checkpoint after, or an adapter; None if ``base`` is an adapter to be measured alone.
        gradients: Snapshots as ``overlap`` takes them. The spectrum is then that of the gradients of all steps,
            stacked: what a first-order pilot would show before any update exists. ``base`` only gives the names.
        activations: Second moments C = E[xxᵀ] of the layers' inputs, as ``probe_activations`` records them. Singular
            values are then those of ΔW·C^½, energies E‖ΔW x‖², and layers without a C are left out.
        kfac: Weigh the other side, too: G^½·ΔW·C^½ with G = E[ggᵀ] of the output gradients in the same file.
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
        memory: What the whole program may take, such as ``"8GB"`` or a number of bytes; a layer that does not fit is
            read in row blocks. Default: what the largest matrix needs.
        engine: A Ray cluster to measure on; None for this machine alone.
        output: Results file, appended line by line; a finished run there is replaced when this one is finished.
        resume: Go on behind what an interrupted run left in ``output``.
        overwrite: Replace a file in the place of ``output`` that loradiag did not write.
        verify: Let ``resume`` compare a SHA-256 of every byte of the inputs, not of samples.
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
    where = place(engine, device)
    settings = SpectrumSettings(checked_ranks(ranks), method, top, tol, seed, where.tasks)
    limit = read_memory(memory, engine)
    check_running(workers, seed)
    check_request(method, top, tol)
    if kfac and activations is None:
        raise UsageError("--kfac: needs --activations FILE, recorded with probe activations --gradients")
    if gradients:
        if activations is not None:
            raise UsageError("--activations: weighs an update, and --gradients are none; leave one of them out")
        if tuned is not None:
            raise UsageError("--gradients: are measured instead of an update; name BASE alone beside them, or nothing")
        watch = Watch(on_progress, on_record)
        return gradient_spectrum(
            base,
            gradients,
            settings,
            layers,
            exclude,
            workers,
            limit,
            output,
            resume,
            overwrite,
            verify,
            watch,
            where,
            engine,
        )
    if base is None:
        raise UsageError("spectrum: name BASE and TUNED, an adapter, or gradients with --gradients")
    compared = compare(base, tuned, layers, exclude, allow_unmatched, verify)
    pairing, moments = compared.pairing, None
    if activations is not None:
        if tuned is None:
            raise UsageError("--activations: needs BASE, to tell which layer is which; name it before the adapter")
        moments = second_moments(activations, base, pairing, verify)
        if kfac and not moments.gradients:
            raise UsageError(f"--kfac: {activations} holds no output gradients; record it with --gradients")
    run = Run(
        command="spectrum",
        version=__version__,
        inputs=(*compared.inputs, *((moments.described,) if moments else ())),
        settings={
            "ranks": list(settings.ranks),
            **({"metric": "kfac" if kfac else "data"} if moments else {}),
            "layers": layers,
            "exclude": exclude,
            "method": method,
            "top": top,
            "tol": tol,
            "device": where.kind,
            "seed": seed,
        },
    )
    pairing, matrices = _weighed(pairing, moments, kfac)
    layout = layout_of(matrices, workers, where.kind, limit)
    settings = replace(settings, memory=layout.limit)
    with ResultsWriter[Spectrum](output, run, resume, overwrite) as writer:
        return measure_layers(
            writer,
            matrices,
            partial(_one_layer, settings=settings),
            lambda: without_rank(pairing, layout, where.here),
            layout,
            partial(size, settings=settings),
            Watch(on_progress, on_record),
            engine,
        )


def _weighed(pairing: Pairing, moments: SecondMoments | None, kfac: bool) -> tuple[Pairing, list[Layer]]:
    """Return the rest, with the matrices that have nothing to be weighed by; and the others with what they have."""
    matrices = [delta for delta in pairing.deltas if delta.is_matrix]
    if moments is None:
        return pairing, [Layer(delta) for delta in matrices]
    layers = [Layer(delta, moments.weighting(delta.layer, kfac)) for delta in matrices]
    what = "second moment of its input" + (" and of its output's gradient" if kfac else "")
    without = [
        Unpaired(each.layer, each.shape, "no_activations", f"the file has no {what}")
        for each in layers
        if each.weighting is None
    ]
    lost = {item.layer for item in without}
    rest = Pairing(tuple(delta for delta in pairing.deltas if delta.layer not in lost), (*pairing.unpaired, *without))
    return rest, [each for each in layers if each.weighting is not None]


def _one_layer(layer: Layer, settings: SpectrumSettings) -> tuple[Spectrum | LeftOut]:
    return (measure(layer.delta, settings, layer.weighting),)
