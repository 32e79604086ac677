"""``intruders``: which of the largest directions of a fine-tuned weight are new?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from lora_diag.api.inputs import compare
from lora_diag.api.measuring import (
    Progress,
    Watch,
    check_running,
    layout_of,
    measure_layers,
    place,
    read_memory,
    without_rank,
)
from lora_diag.diagnostics.intruders import IntruderSettings, size
from lora_diag.diagnostics.intruders import intruders as measure
from lora_diag.engines import Ray
from lora_diag.errors import UsageError
from lora_diag.linalg import check_request
from lora_diag.results import AnyRecord, Intruders, Results, ResultsWriter, Run
from lora_diag.version import __version__


def intruders(
    base: Path | str,
    tuned: Path | str,
    *,
    top: int = 10,
    epsilon: float = 0.5,
    window: float = 0.1,
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
) -> Results[Intruders]:
    r"""Count intruder dimensions: largest left singular vectors of W_tuned that are unlike all of W_base.

    Args:
        base: The checkpoint before.
        tuned: The checkpoint after, or an adapter.
        top: k, how many of the largest directions of each weight are looked at.
        epsilon: ε in (0, 1): a direction with max_i |⟨u_i(W_base), u_j⟩| < ε is not one of W_base.
        window: Width of the window of nearly equal singular values, as a share of σ_j.
        layers: Regular expression; only weights whose name contains a match.
        exclude: Regular expression; no weights whose name contains a match.
        allow_unmatched: Leave out what an adapter changes and ``base`` does not have, instead of stopping.
        method: ``auto``, ``exact``, ``gram`` or ``krylov``, for the largest singular vectors of W_tuned.
        tol: Bound to reach on the error of every energy fraction.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        seed: Of the random starts of ``krylov``.
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
        One record for each matrix that both sides have.

    Raises:
        UsageError: An option makes no sense.
        InputError: An input cannot be read.
        NothingComparedError: The sides have no weight in common.

    Example:
        >>> found = intruders("sample_checkpoints/base", "sample_checkpoints/full_ft", layers=r"0\.mlp\.up_proj")
        >>> found.layers[0].k, found.layers[0].intruders
        (10, 0)
    """
    where = place(engine, device)
    settings = IntruderSettings(top, epsilon, window, method, tol, seed, where.tasks)
    limit = read_memory(memory, engine)
    check_running(workers, seed)
    check_request(method, top, tol)
    if not 0 < epsilon < 1:
        raise UsageError(f"--epsilon {epsilon}: must lie between 0 and 1")
    if not 0 <= window < 1:
        raise UsageError(f"--window {window}: must lie between 0 and 1")
    compared = compare(base, tuned, layers, exclude, allow_unmatched, verify)
    matrices = [delta for delta in compared.pairing.deltas if delta.is_matrix]
    run = Run(
        command="intruders",
        version=__version__,
        inputs=compared.inputs,
        settings={
            "top": top,
            "epsilon": epsilon,
            "window": window,
            "layers": layers,
            "exclude": exclude,
            "method": method,
            "tol": tol,
            "device": where.kind,
            "seed": seed,
        },
    )
    layout = layout_of(matrices, workers, where.kind, limit)
    settings = replace(settings, memory=layout.limit)
    writer: ResultsWriter[Intruders]
    with ResultsWriter(output, run, resume, overwrite) as writer:
        return measure_layers(
            writer,
            matrices,
            partial(measure, settings=settings),
            lambda: without_rank(compared.pairing, layout, where.here),
            layout,
            partial(size, settings=settings),
            Watch(on_progress, on_record),
            engine,
        )
