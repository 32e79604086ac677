"""``probe curvature``: measure the curvature of the loss and its prediction for truncations."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from lora_diag.checkpoints import open_checkpoint
from lora_diag.deltas import natural_order, selector
from lora_diag.errors import NothingComparedError, UsageError
from lora_diag.linalg.eigenpairs import basis_size
from lora_diag.models.losses import measure
from lora_diag.models.opening import Model, Weights
from lora_diag.models.swapping import FULL, Swapped
from lora_diag.models.truncating import truncated_layers
from lora_diag.probes.curvature.loss_bound import TunedPoint, loss_bounds
from lora_diag.probes.curvature.measure import LossFunction
from lora_diag.probes.curvature.options import CurvatureOptions
from lora_diag.probes.curvature.record import Curvature, LossBound, Matrix
from lora_diag.probes.curvature.records_of import Effort, Point, curvatures
from lora_diag.records import LeftOut, Results
from lora_diag.records.names import part_of
from lora_diag.rendering.text import duration
from lora_diag.running.measuring import check_ranks
from lora_diag.running.options import show_options
from lora_diag.running.probing import ProbeRun, check_files, describe_texts, left_out, pluralize
from lora_diag.running.progress import RunRecords


@show_options
def probe_curvature(
    base: Path | str,
    tuned: Path | str | None = None,
    **options: Unpack[CurvatureOptions],
) -> Results[Any]:
    r"""Measure eigenvalues, trace and gradient of the loss at TUNED, and compare the loss bound with the measured gap.

    For every rank, with E = ΔW_r − ΔW over all truncated layers: ⟨∇L, E⟩, ½⟨E, HE⟩, (λ/2)‖E‖² = (λ/2)Σ_{i>r}σ_i², and
    L(W_0 + ΔW_r) − L(W_tuned) measured on the same sequences. Without TUNED all quantities are at BASE, and the
    gradient is projected on the top eigenpairs instead.

    Args:
        base: Base model: a folder that transformers can open, or a Hub id.
        tuned: Fine-tuned checkpoint or adapter; None for the curvature at BASE.
        evaluate: One text or JSONL file; the mean negative log-likelihood of all its predictions is differentiated.
        ranks: Ranks r; 0 restores the truncated layers of ``base``.
        along: Fractions t of the distance from TUNED to the truncated update; 1 is added.
        eigenvalues: Number of largest eigenvalues.
        trace_vectors: Number of random vectors of the trace estimate.
        ggn: Measure the generalised Gauss–Newton matrix instead of the Hessian: the Hessian without the part from the
            model's own curvature, positive semidefinite.
        granularity: ``all`` for eigenvalues of all layers jointly; ``layer`` also for those of every layer's own block.
        seed: Seed of the Lanczos start and of the random vectors of the trace.
        **options: ``CurvatureOptions``.

    Returns:
        The records are in ``whole``: ``Curvature`` jointly and of every layer, then ``LossBound`` of every rank.

    Raises:
        UsageError: An option is invalid, ``dtype`` is not ``float32`` (Lanczos does not converge in others), or the
            extra ``train`` is not installed.
        InputError: An input cannot be read, transformers cannot open BASE, or Lanczos did not converge.
        NothingComparedError: No matrix is selected.

    Reference:
        Pearlmutter 1994, "Fast exact multiplication by the Hessian"; Yao et al. 2020, PyHessian.

    Example:
        >>> found = probe_curvature("sample_checkpoints/base",  # doctest: +SKIP
        ...     evaluate=["sample_checkpoints/eval/in_domain.txt"], layers="q_proj",
        ...     max_sequences=2)
        >>> found.whole[0].eigenvalues  # doctest: +SKIP
    """
    run = ProbeRun("probe curvature", options, CurvatureOptions)
    names = ("evaluate", "along", "eigenvalues", "trace_vectors", "ggn", "granularity", "seed")
    evaluate, along, top, probes, ggn, per, seed = (run.options[name] for name in names)
    requested, fractions = list(check_ranks(run.options["ranks"], 0)), _check(along, top, probes, seed)
    # products in bfloat16 have errors of 2%; Lanczos converges to 1e-4
    if (dtype := run.options["dtype"]) != "float32":
        raise UsageError(
            f"--dtype {dtype}: Hessian-vector products have errors of several percent, too large for Lanczos; use "
            "float32"
        )
    check_files([base, *([tuned] if tuned is not None else [])], evaluate)
    if len(evaluate) > 1:
        raise UsageError("--eval: curvature is computed for one evaluation set; give one file")
    compared = run.compare(base, tuned) if tuned is not None else None
    deltas = compared.pairing.deltas if compared is not None else ()
    chosen = truncated_layers(deltas, **run.selection) if compared is not None else {}
    model = run.open(base)
    (texts,) = run.read_sets(evaluate)
    swapped = Swapped(model, deltas, requested[-1]) if compared is not None else None
    if compared is None:
        chosen = _select_matrices(base, model, run.selection)
    matrix: Matrix = "ggn" if ggn else "hessian"
    settings = {
        "ranks": requested if swapped else [],
        "along": fractions if swapped else [],
        "top": top,
        "probes": probes,
        "matrix": matrix,
        "per": per,
        **run.selection,
        "seed": seed,
    }
    watch = run.watch
    loss_function = LossFunction(model, texts, run.batch, chosen, matrix, partial(watch.batch, "products"))
    point = Point(model, loss_function, swapped, texts, run.batch, "tuned" if swapped else "base", matrix)
    effort = Effort(top, probes, seed)

    def measure_missing(kept: RunRecords[Any]) -> list[LeftOut]:
        if swapped is not None:
            swapped.arrange(dict.fromkeys(swapped.layers, FULL))
        _measure(point, effort, per, _list_todo(kept, requested, chosen), fractions, kept, run.batches([texts]))
        return left_out(compared.pairing, swapped.absent) if compared and swapped else _list_skipped(base, chosen)

    inputs = compared.inputs if compared else (run.describe(open_checkpoint(base)),)
    return run.over([*inputs, describe_texts(texts)], settings, measure_missing)


def _check(along: Sequence[float], top: int, probes: int, seed: int) -> list[float]:
    """Check numeric options; return the points between TUNED and the truncation, including the end.

    Raises:
        UsageError: An option is invalid.
    """
    if not all(0 < t <= 1 for t in along):
        raise UsageError(f"--along {','.join(f'{t:g}' for t in along)}: fractions must lie in (0, 1]")
    for option, value in (("--eigenvalues", top), ("--trace-vectors", probes)):
        if value < 1:
            raise UsageError(f"{option} {value}: must be at least 1")
    if not 0 <= seed < 2**31:
        raise UsageError(f"--seed {seed}: must be a whole number from 0 to 2^31 - 1")
    return sorted({*map(float, along), 1.0})


def _select_matrices(base: Path | str, model: Model, selection: Mapping[str, str | None]) -> dict[str, tuple[int, int]]:
    """Return the selected matrices of BASE outside embeddings and head that the model uses.

    Raises:
        NothingComparedError: No matrix is selected.
    """
    selected, weights, stored = selector(**selection), Weights(model.module), open_checkpoint(base)
    matrices = {
        name: (shape[0], shape[1])
        for name in sorted(stored, key=natural_order)
        if len(shape := stored[name].shape) == 2
        and part_of(name) == "matrices"
        and selected(name)
        and weights.find(name) is not None
    }
    if not matrices:
        raise NothingComparedError(
            f"{base}: no matrix outside embeddings and head is selected; change --layers or --exclude"
        )
    return matrices


def _list_skipped(base: Path | str, chosen: dict[str, tuple[int, int]]) -> list[LeftOut]:
    stored = open_checkpoint(base)
    shapes = {name: stored[name].shape for name in stored if name not in chosen}
    return [
        LeftOut(layer=name, shape=shape, reason="vector" if len(shape) < 2 else "not_selected", detail="")
        for name, shape in shapes.items()
    ]


def _list_todo(kept: RunRecords[Any], ranks: Sequence[int], chosen: dict[str, tuple[int, int]]) -> list[int]:
    """Return the ranks that truncate a layer and are not measured yet."""
    done = {record.rank for record in kept.records if isinstance(record, LossBound)}
    largest = max(min(shape) for shape in chosen.values())
    return [rank for rank in ranks if rank < largest and rank not in done]


def _measure(
    point: Point,
    effort: Effort,
    per: str,
    ranks: list[int],
    fractions: list[float],
    kept: RunRecords[Any],
    batches: int,
) -> None:
    """Measure records that are not in the file: joint curvature, layers, ranks."""
    done = {record.layer: record for record in kept.records if isinstance(record, Curvature)}
    loss_function, watch = point.loss_function, kept.watch
    missing = [layer for layer in loss_function.layers if layer not in done]
    products, note = _estimate_cost(point, effort, None in done, missing if per == "layer" else [], ranks, fractions)
    watch.total = watch.done + products * batches
    watch.note(note)
    gradient = loss_function.gradient()
    losses = measure(point.model, point.texts, point.batch, partial(watch.batch, "loss"))
    for records in curvatures(point, effort, per, gradient, losses, None not in done, missing):
        kept.put(*records)
    joint = next(record for record in kept.records if isinstance(record, Curvature) and record.layer is None)
    if point.swapped is not None:
        smallest = joint.smallest if joint.strongly_convex else None
        tuned = TunedPoint(loss_function.weights(), gradient, losses, joint.eigenvalues[0], smallest)
        for rank in ranks:
            after = partial(watch.batch, f"r={rank}")
            kept.put(
                *loss_bounds(
                    point.model, loss_function, point.swapped, tuned, rank, fractions, point.texts, point.batch, after
                )
            )


def _estimate_cost(
    point: Point, effort: Effort, joint_done: bool, layers: list[str], ranks: list[int], fractions: list[float]
) -> tuple[int, str]:
    """Time one product; return the estimated number of products, and a note on the duration."""
    start = time.perf_counter()
    point.loss_function.product(point.loss_function.weights())
    seconds = time.perf_counter() - start
    lanczos = 0 if joint_done else _estimate_products(effort.top) + _estimate_products(1)
    products = lanczos + effort.probes + len(layers) * (_estimate_products(effort.top) + _estimate_products(1))
    products += len(ranks) * (1 + len(fractions)) if point.swapped else 0
    memory = 4 * point.loss_function.params * basis_size(point.loss_function.params, effort.top) / 2**30
    basis = f"; Lanczos takes {memory:.1f} GiB" if memory >= 0.1 else ""
    blocks = f" and {pluralize(len(layers), 'block', 'blocks')}" if layers else ""
    return products, (
        f"about {duration(products * seconds)}: some {products} Hessian-vector products of {seconds:.2g} s each, all "
        f"layers jointly{blocks}{basis}"
    )


def _estimate_products(count: int) -> int:
    """Estimate the number of products that Lanczos needs for a number of eigenpairs."""
    return 25 + 5 * count
