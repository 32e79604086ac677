"""``probe curvature``: how the loss bends, and what that says of truncating an update."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lora_diag.checkpoints import open_checkpoint
from lora_diag.deltas import natural_order, selector
from lora_diag.errors import NothingComparedError, UsageError
from lora_diag.linalg import resolve_device
from lora_diag.linalg.eigenpairs import basis_size
from lora_diag.models.losses import measure
from lora_diag.models.opening import Model, Weights, open_model
from lora_diag.models.swapping import FULL, Swapped
from lora_diag.models.truncating import truncated_layers
from lora_diag.probes.curvature.loss_bound import TunedPoint, loss_bounds
from lora_diag.probes.curvature.measure import Curved
from lora_diag.probes.curvature.record import Curvature, LossBound, Matrix
from lora_diag.probes.curvature.records_of import Effort, Point, curvatures
from lora_diag.records import AnyRecord, LeftOut, Results, ResultsWriter, RunInput
from lora_diag.records.names import part_of
from lora_diag.rendering.text import duration
from lora_diag.running.inputs import compare, describe
from lora_diag.running.probing import (
    Kept,
    Watch,
    batches_of,
    check,
    check_files,
    counted,
    described,
    left_out,
    read_sets,
    run_of,
)

RANKS = (0, 1, 2, 4, 8, 16, 32, 64)
ALONG = (0.1, 1.0)
PER = ("all", "layer")


def probe_curvature(
    base: Path | str,
    tuned: Path | str | None = None,
    *,
    evaluate: Sequence[Path | str],
    ranks: Sequence[int] = RANKS,
    along: Sequence[float] = ALONG,
    top: int = 5,
    probes: int = 10,
    ggn: bool = False,
    per: str = "all",
    layers: str | None = None,
    exclude: str | None = None,
    seed: int = 0,
    length: int | None = None,
    batch: int = 8,
    max_sequences: int | None = None,
    tokenizer: str = "auto",
    dtype: str = "float32",
    device: str = "auto",
    output: Path | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
    on_record: Callable[[AnyRecord], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Results[Any]:
    r"""Measure eigenvalues, trace and gradient of the loss at TUNED, and hold the loss bound against the measured gap.

    For every rank, with E = ΔW_r − ΔW over all truncated layers: ⟨∇L, E⟩, ½⟨E, HE⟩, (λ/2)‖E‖² = (λ/2)Σ_{i>r}σ_i², and
    L(W_0 + ΔW_r) − L(W_tuned) as measured on the same sequences. Without TUNED everything is at BASE, and the gradient
    is projected on the top eigenpairs instead.

    Args:
        base: The model before: a folder that transformers can open, or a Hub id.
        tuned: The model after, or an adapter; None for the curvature at BASE.
        evaluate: One text or JSONL file; the mean negative log-likelihood of all its predictions is differentiated.
        ranks: Ranks r; 0 takes the truncated layers back to ``base``.
        along: Shares t of the way from TUNED to the truncated update; 1 is added.
        top: How many of the largest eigenvalues.
        probes: Random vectors of the trace's estimate.
        ggn: Measure the generalised Gauss–Newton matrix instead of the Hessian: the Hessian but for the part that
            comes from the model's own curvature, never negative.
        per: ``all`` for eigenvalues of all layers jointly; ``layer`` for those of every layer's own block, too.
        layers: Regular expression; only weights whose name contains a match.
        exclude: Regular expression; no weights whose name contains a match.
        seed: Of Lanczos' start and of the trace's random vectors.
        length: Tokens of a sequence; by default 512 or what the model has room for.
        batch: Sequences in a batch.
        max_sequences: Use the first so many sequences.
        tokenizer: ``auto``, ``bytes`` or a folder.
        dtype: ``float32``; others are refused, because Lanczos does not converge in them.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        output: Results file, appended record by record.
        resume: Go on behind what an interrupted run left in ``output``.
        overwrite: Replace a file in the place of ``output`` that loradiag did not write.
        verify: Let ``resume`` compare a SHA-256 of every byte of the models; of texts it does so anyway.
        on_progress: Called with what is being measured, batches done and (roughly) batches in all.
        on_record: Called with every record, in the order of the file, as it comes.
        on_note: Called with the estimate of what the run will cost, before it begins.

    Returns:
        The records are in ``whole``: ``Curvature`` jointly and of every layer, then ``LossBound`` of every rank.

    Raises:
        UsageError: An option makes no sense, or the extra ``train`` is not installed.
        InputError: An input cannot be read, transformers cannot open BASE, or Lanczos did not converge.
        NothingComparedError: No matrix is selected.

    Reference:
        Pearlmutter 1994, "Fast exact multiplication by the Hessian"; Yao et al. 2020, PyHessian.
    """
    check(batch, max_sequences, per=(per, PER))
    way = _check(ranks, along, top, probes, seed)
    if dtype != "float32":  # on the samples a product in bfloat16 is off by 2%, and Lanczos goes to 1e-4
        raise UsageError(
            f"--dtype {dtype}: Hessian-vector products in it are off by percents, more than Lanczos allows; use float32"
        )
    check_files(evaluate)
    if len(evaluate) > 1:
        raise UsageError("--eval: curvature is that of one loss; name one file")
    on = resolve_device(device)
    compared = compare(base, tuned, verify=verify) if tuned is not None else None
    deltas = compared.pairing.deltas if compared is not None else ()
    chosen = truncated_layers(deltas, layers, exclude) if compared is not None else {}
    model = open_model(base, on, dtype, length, tokenizer)
    (texts,) = read_sets(model, evaluate, [], max_sequences)
    swapped = Swapped(model, deltas, max(ranks)) if compared is not None else None
    if compared is None:
        chosen = _matrices(base, model, layers, exclude)
    inputs: tuple[RunInput, ...] = (
        compared.inputs if compared else (describe("base", open_checkpoint(base), verify=verify),)
    )
    settings = {
        "ranks": sorted(set(ranks)) if swapped else [],
        "along": way if swapped else [],
        "top": top,
        "probes": probes,
        "matrix": "ggn" if ggn else "hessian",
        "per": per,
        "layers": layers,
        "exclude": exclude,
        "seed": seed,
    }
    run = run_of("probe curvature", (*inputs, described(texts)), settings, model, batch, dtype)
    watch = Watch(on_progress, on_record, on_note)
    matrix: Matrix = "ggn" if ggn else "hessian"
    curved = Curved(model, texts, batch, chosen, matrix, lambda: _tick(watch, "products"))
    point = Point(model, curved, swapped, texts, batch, "tuned" if swapped else "base", matrix)
    effort = Effort(top, probes, seed)
    with ResultsWriter[Any](Path(output) if output is not None else None, run, resume, overwrite) as writer:
        kept = Kept(writer, watch)
        if kept.finished is not None:
            return kept.finished
        if swapped is not None:
            swapped.arrange(dict.fromkeys(swapped.layers, FULL))
        _measure(point, effort, per, _todo(kept, ranks, chosen), way, kept, watch)
        return kept.end(left_out(compared.pairing, swapped.absent) if compared and swapped else _skipped(base, chosen))


def _check(ranks: Sequence[int], along: Sequence[float], top: int, probes: int, seed: int) -> list[float]:
    """Refuse numbers that make no sense; return the points on the way, the end among them.

    Raises:
        UsageError: There are such.
    """
    if not ranks or min(ranks) < 0:
        raise UsageError(f"--ranks {','.join(map(str, ranks))}: ranks must be whole numbers from 0 up")
    if not all(0 < t <= 1 for t in along):
        raise UsageError(f"--along {','.join(f'{t:g}' for t in along)}: shares of the way must lie in (0, 1]")
    for option, value in (("--top", top), ("--probes", probes)):
        if value < 1:
            raise UsageError(f"{option} {value}: must be at least 1")
    if not 0 <= seed < 2**31:
        raise UsageError(f"--seed {seed}: must be a whole number from 0 to 2^31 - 1")
    return sorted({*map(float, along), 1.0})


def _matrices(base: Path | str, model: Model, layers: str | None, exclude: str | None) -> dict[str, tuple[int, int]]:
    """Return the matrices of BASE outside embeddings and head that are selected and that the model has.

    Raises:
        NothingComparedError: There is none.
    """
    selected, weights, stored = selector(layers, exclude), Weights(model.module), open_checkpoint(base)
    found = {
        name: (shape[0], shape[1])
        for name in sorted(stored, key=natural_order)
        if len(shape := stored[name].shape) == 2
        and part_of(name) == "matrices"
        and selected(name)
        and weights.find(name) is not None
    }
    if not found:
        raise NothingComparedError(f"{base}: no matrix outside embeddings and head is selected")
    return found


def _skipped(base: Path | str, chosen: dict[str, tuple[int, int]]) -> list[LeftOut]:
    stored = open_checkpoint(base)
    rest = {name: stored[name].shape for name in stored if name not in chosen}
    return [
        LeftOut(layer=name, shape=shape, reason="vector" if len(shape) < 2 else "not_selected", detail="")
        for name, shape in rest.items()
    ]


def _todo(kept: Kept, ranks: Sequence[int], chosen: dict[str, tuple[int, int]]) -> list[int]:
    """Return the ranks that truncate something and are not measured yet."""
    done = {record.rank for record in kept.records if isinstance(record, LossBound)}
    largest = max(min(shape) for shape in chosen.values())
    return [rank for rank in sorted(set(ranks)) if rank < largest and rank not in done]


def _tick(watch: Watch, label: str) -> None:
    watch.total = max(watch.total, watch.done + 1)  # how many products Lanczos takes is not known before
    watch.batch(label)


def _measure(
    point: Point, effort: Effort, per: str, ranks: list[int], way: list[float], kept: Kept, watch: Watch
) -> None:
    """Measure what is not in the file yet: the joint curvature, the layers, the ranks."""
    done = {record.layer: record for record in kept.records if isinstance(record, Curvature)}
    curved = point.curved
    missing = [layer for layer in curved.layers if layer not in done]
    _tell_cost(point, effort, None in done, missing if per == "layer" else [], ranks, way, watch)
    gradient = curved.gradient()
    losses = measure(point.model, point.texts, point.batch, lambda: _tick(watch, "loss"))
    for records in curvatures(point, effort, per, gradient, losses, None not in done, missing):
        kept.put(*records)
    joint = next(record for record in kept.records if isinstance(record, Curvature) and record.layer is None)
    if point.swapped is not None:
        least = joint.smallest if joint.strongly_convex else None
        tuned = TunedPoint(curved.weights(), gradient, losses, joint.eigenvalues[0], least)
        for rank in ranks:
            after = partial(_tick, watch, f"r={rank}")
            kept.put(
                *loss_bounds(point.model, curved, point.swapped, tuned, rank, way, point.texts, point.batch, after)
            )


def _tell_cost(
    point: Point,
    effort: Effort,
    joint_done: bool,
    layers: list[str],
    ranks: list[int],
    way: list[float],
    watch: Watch,
) -> None:
    """Time one product, and tell what the run will take."""
    start = time.perf_counter()
    point.curved.product(point.curved.weights())
    took = time.perf_counter() - start
    lanczos = 0 if joint_done else _products(effort.top) + _products(1)
    products = lanczos + effort.probes + len(layers) * (_products(effort.top) + _products(1))
    products += len(ranks) * (1 + len(way)) if point.swapped else 0
    watch.total = watch.done + products * batches_of([point.texts], point.batch)
    memory = 4 * point.curved.params * basis_size(point.curved.params, effort.top) / 2**30
    basis = f"; Lanczos holds {memory:.1f} GiB" if memory >= 0.1 else ""
    blocks = f" and {counted(len(layers), 'block', 'blocks')}" if layers else ""
    watch.note(
        f"about {duration(products * took)}: {products} or so Hessian-vector products of {took:.2g} s each, of all "
        f"layers jointly{blocks}{basis}"
    )


def _products(count: int) -> int:
    """Return about how many products Lanczos takes for so many eigenpairs."""
    return 25 + 5 * count
