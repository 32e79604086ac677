"""One layer of a merge: the merged update, its factors or the new weight, and what is left of each
update in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_diag.adapters.writing import store_factors
from lora_diag.decisions.extract.measure import NUMERICALLY_ZERO, split_factors
from lora_diag.decisions.merge import METHODS, MergeMethod
from lora_diag.decisions.merge import methods as mergers
from lora_diag.decisions.merge.methods import Request
from lora_diag.decisions.merge.record import Merged
from lora_diag.deltas import FactoredDelta, Side, footprint, row_blocks
from lora_diag.errors import InputError
from lora_diag.layers.change import (
    COMPUTED_ENTRY_BYTES,
    compute_on_device,
    load_change,
    measure_on_device,
    why_not_comparable,
)
from lora_diag.layers.task import leave_out, not_finite
from lora_diag.linalg import exact
from lora_diag.linalg.devices import resolve_device
from lora_diag.linalg.difference import norm
from lora_diag.linalg.distance import (
    Matrix,
    frobenius_distance,
    frobenius_inner,
    rows_of,
    shape_of,
    sum_matrices,
    take_rows,
)
from lora_diag.linalg.methods import Allowance, decompose, require_memory, whole_bytes
from lora_diag.metrics.energy import energy_curve, rank_at
from lora_diag.records import LeftOut
from lora_diag.running.updates import Update
from lora_diag.storage.rewriting import write_tensors

# Rows in which signs are compared.
SAMPLED_ROWS = 64


@dataclass(frozen=True, slots=True)
class MergeTask:
    """One layer, the updates that change it, and where the merge goes.

    Args:
        layer: Its name in BASE.
        shape: ``(out, in)`` as stored in BASE; a 1-D tensor of n entries is ``(1, n)``.
        updates: The updates with their weights.
        base: Location of W, for a checkpoint; None for an adapter.
        transposed: Whether PEFT's B·A is the transpose of the stored ΔW.
    """

    layer: str
    shape: tuple[int, int]
    updates: tuple[Update, ...]
    base: Side | None = None
    transposed: bool = False

    @property
    def is_matrix(self) -> bool:
        """False for 1-D tensors."""
        return self.updates[0].delta.is_matrix

    @property
    def factored(self) -> bool:
        """Whether all updates have factors."""
        return all(isinstance(update.delta, FactoredDelta) for update in self.updates)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeSettings:
    """Settings of a merge.

    Args:
        method: Name of a method.
        count: K, the number of inputs.
        scale: λ.
        density: Fraction of entries to keep.
        rank: Largest rank of a layer; None for that of the merge, or by ``energy``.
        energy: Fraction of ‖M‖² that the factors keep; None for all.
        dtype: Dtype of the output; None for that of BASE.
        seed: Seed of random masks, rows and updates.
        device: As in ``--device``.
        memory: Memory limit of a layer in bytes; None without limit.
    """

    method: str
    count: int
    scale: float = 1.0
    density: float = 1.0
    rank: int | None = None
    energy: float | None = None
    dtype: str | None = "float32"
    seed: int = 0
    device: str = "auto"
    memory: int | None = None


# The merge as written: M itself or its factors in their dtype, its decomposition if it has factors,
# fields of records.
Written = tuple[Matrix, exact.Factors | None, dict[str, Any]]


def estimate_bytes(task: MergeTask, settings: MergeSettings) -> int:
    """Return an upper bound on the memory of a layer in bytes: all updates, their merge, and its
    decomposition.
    """
    entries = math.prod(task.shape)
    count = len(task.updates)
    method = METHODS[settings.method]
    weight = 8 * entries if task.base is not None else 0
    if task.factored and not method.entrywise:
        return 4 * sum(footprint(update.delta) for update in task.updates) + weight
    blocks = 96 * min(2**20, entries) * count
    # Of a method that makes singular values equal, all directions are computed.
    top = settings.rank if method.linear else None
    step = whole_bytes(task.shape, Allowance(0, "auto", top, vectors=True), 8)
    if not (method.linear or method.entrywise):
        step = max(step, 48 * min(task.shape) * sum(task.shape))
    return COMPUTED_ENTRY_BYTES * entries * (count + 2) + weight + blocks + step


def merge_layer(
    task: MergeTask, files: Mapping[str, Path], settings: MergeSettings
) -> tuple[Merged | LeftOut, ...]:
    """Merge the updates of one layer, write the result, and measure what is left of each.

    Args:
        task: The layer.
        files: By layer, the file that gets ``B`` and ``A``, or for a checkpoint ``W``.
        settings: Settings of the merge.

    Returns:
        One record per update; if an update is not finite, or all are zero, one ``left_out`` record.
    """
    records: tuple[Merged | LeftOut, ...] = measure_on_device(
        partial(_merge_layer, task, settings, files[task.layer]), settings.device
    )
    return records


@dataclass(frozen=True, slots=True)
class _Merge:
    """A merge of one layer as it was written.

    Args:
        changed: The updates that are not zero, each with its ΔW and norm.
        request: What the method got.
        merge: The method.
        fro: ‖M‖_F before truncation and rounding.
        written: What was written, its decomposition, and fields of records.
    """

    changed: Sequence[tuple[Update, Matrix, float]]
    request: Request
    merge: mergers.Merger
    fro: float
    written: Written


def write_merge(task: MergeTask, settings: MergeSettings, file: Path) -> LeftOut | None:
    """Write the merge of one layer without measuring what it keeps; return why there is none."""
    merged, _ = compute_on_device(
        partial(_write_merge, task, settings, file), resolve_device(settings.device)
    )
    return merged if isinstance(merged, LeftOut) else None


def _write_merge(
    task: MergeTask, settings: MergeSettings, file: Path, device: torch.device
) -> _Merge | LeftOut:
    """Write the merge of one layer; a layer that has to be formed must fit into the
    memory limit.
    """
    if settings.memory is not None and (METHODS[settings.method].entrywise or not task.factored):
        needed = estimate_bytes(task, settings)
        use = "its updates and their merge take"
        require_memory(needed, settings.memory, task.shape, use, "$exclude it")
    changed: list[tuple[Update, Matrix, float]] = []
    for update in task.updates:
        change = load_change(update.delta, device)
        size = 0.0
        part = change.factors if change.factors is not None else change.matrix
        if part is not None:
            size = math.sqrt(max(0.0, frobenius_inner(part, part)))
        if problem := change.non_finite or why_not_comparable(size):
            left_out = not_finite(update.delta, problem)
            return left_out.model_copy(update={"detail": f"{update.name}: {left_out.detail}"})
        if part is not None and size > 0:
            changed.append((update, part, size))
    if not changed:
        return leave_out(task.updates[0].delta, "rank_0", "every update of it is zero")
    updates, parts, norms = zip(*changed, strict=True)
    weights = [update.weight for update in updates]
    names = [update.name for update in updates]
    request = Request(
        weights, settings.density, f"{settings.seed}:{task.layer}", names, settings.count
    )
    merge = choose_merger(METHODS[settings.method], task.is_matrix)
    merged = sum_matrices([merge(parts, request)], [settings.scale])
    factors = None
    if isinstance(merged, tuple):
        factors = exact.decompose_factored(*merged, vectors=True)
        fro, zero = factors.fro, exact.ZERO_FACTORED
    else:
        fro, zero = norm([merged]), exact.ZERO_DENSE
    sizes = [abs(weight) * size for weight, size in zip(weights, norms, strict=True)]
    # Updates that cancel leave only rounding.
    if fro <= zero * abs(settings.scale) * sum(sizes):
        merged = sum_matrices([merged], [0.0])
        factors = None
        fro = 0.0
    if task.base is None:
        total = _find_sum(settings, parts, weights)
        written = _write_factors(task, settings, merged, fro, factors, file, total)
    else:
        written = _write_weight(task, settings, merged, fro, factors, file)
    return _Merge(changed, request, merge, fro, written)


def _merge_layer(
    task: MergeTask, settings: MergeSettings, file: Path, device: torch.device
) -> tuple[Merged | LeftOut, ...]:
    done = _write_merge(task, settings, file, device)
    if isinstance(done, LeftOut):
        return (done,)
    written, factors, fields = done.written
    parts = [part for _, part, _ in done.changed]
    chances = _measure_chance(task, settings, parts, done.request, done.merge, factors)
    signs = _compare_signs(parts, done.request) if task.is_matrix else [{} for _ in parts]
    return tuple(
        Merged(
            layer=task.layer,
            shape=task.shape if task.is_matrix else task.shape[1:],
            update=update.name,
            weight=update.weight,
            fro=size,
            merged_fro=done.fro,
            norm_ratio=done.fro / size,
            kept=frobenius_inner(written, part) / size**2,
            directions=_measure_directions(factors, part, size),
            **_compare_others(done.changed, index, settings.count, math.prod(task.shape)),
            **chances[index],
            **signs[index],
            **fields,
        )
        for index, (update, part, size) in enumerate(done.changed)
    )


def _compare_others(
    changed: Sequence[tuple[Update, Matrix, float]], index: int, count: int, entries: int
) -> dict[str, float]:
    """Return what the mean keeps of an update, what the others add to it, and the latter's root
    mean square by chance.

    For a uniformly rotated ΔW_j, ⟨ΔW_j, ΔW_k⟩ has the variance ‖ΔW_j‖²‖ΔW_k‖²/(mn).

    Args:
        changed: The updates with their norms.
        index: k.
        count: K.
        entries: mn.
    """
    own, part, size = changed[index]
    products = [frobenius_inner(matrix, part) / size**2 for _, matrix, _ in changed]
    found = {"kept_mean": sum(products) / count}
    if own.weight:
        added, norms = [], []
        for (other, _, norm), product in zip(changed, products, strict=True):
            if other is not own:
                weight = other.weight / own.weight
                added.append(weight * product)
                norms.append(weight * norm)
        found["others"] = sum(added)
        found["others_random"] = math.hypot(*norms) / size / math.sqrt(entries)
    return found


def choose_merger(method: MergeMethod, is_matrix: bool) -> mergers.Merger:
    """Return the function of a method; for 1-D tensors, of methods of matrices, that of the
    weighted mean.

    The authors of TSV-Merge and Iso-C average 1-D tensors, too.
    """
    if not is_matrix and not (method.linear or method.entrywise):
        return _average
    merger: mergers.Merger = getattr(mergers, method.run or method.name)
    return merger


def _average(parts: Sequence[Matrix], request: Request) -> Matrix:
    """Return the weighted mean."""
    total = sum(request.weights)
    return sum_matrices(parts, [weight / total for weight in request.weights])


def _factor(matrix: Matrix, top: int | None) -> exact.Factors:
    """Return the singular values and vectors of M."""
    if isinstance(matrix, tuple):
        return exact.decompose_factored(*matrix, top=top, vectors=True)
    return decompose(matrix, "auto", top, vectors=True)


def _write_factors(
    task: MergeTask,
    settings: MergeSettings,
    merged: Matrix,
    fro: float,
    factors: exact.Factors | None,
    file: Path,
    total: Callable[[], Matrix] | None,
) -> Written:
    """Write B = U√Σ and A = √ΣVᵀ of the best update of the requested rank; ``total`` as in
    ``_keep_leading``.
    """
    dtype = settings.dtype or "float32"
    if fro == 0.0:
        return merged, None, {"rank": 0, "params": 0, "dtype": dtype}
    top = min(settings.rank or min(task.shape), *task.shape)
    factors = factors or _factor(merged, top if total is None else top + 1)
    curve = energy_curve(factors.s.numpy(), factors.fro, factors.complete)
    rank = min(top, int((factors.s > NUMERICALLY_ZERO * factors.s[:1]).sum()))
    if settings.energy is not None:
        rank = min(rank, rank_at(curve, settings.energy) or rank)
    kept = _keep_leading(merged, factors, rank, total)
    b, a = (
        part.to(dtype=getattr(torch, dtype)).cpu()
        for part in split_factors(kept, rank, task.transposed, "both")
    )
    _check_finite(task, dtype, b, a)
    b, a = store_factors(file, b, a)
    if task.transposed:
        b, a = a.T, b.T
    device = factors.vectors[0].device
    stored = b.to(device), a.to(device)
    fields = {
        "rank": rank,
        "params": rank * sum(task.shape),
        "epsilon": frobenius_distance(merged, stored) / fro,
        "epsilon_min": math.sqrt(max(0.0, 1 - float(curve[rank - 1]))),
        "energy_error": factors.energy_error,
        "dtype": dtype,
        "method": factors.method,
    }
    return stored, kept, fields


def _keep_leading(
    merged: Matrix, factors: exact.Factors, rank: int, total: Callable[[], Matrix] | None
) -> exact.Factors:
    """Return the first directions of M; among equal singular values, those with most of the sum of
    the updates.

    Args:
        merged: M.
        factors: Its decomposition, one direction more than ``rank`` if it has more.
        rank: Number of directions to keep.
        total: As of ``_find_sum``.
    """
    if total is not None and mergers.has_equal(factors.s, rank):
        if not factors.complete:
            factors = _factor(merged, None)
        u, vh = factors.vectors
        u, vh = mergers.order_equal(u, factors.s, vh, rank, total())
        factors = replace(factors, u=u, vh=vh)
    return _keep_directions(factors, rank)


def _find_sum(
    settings: MergeSettings, parts: Sequence[Matrix], weights: Sequence[float]
) -> Callable[[], Matrix] | None:
    """Return a function that computes λΣ w_kΔW_k; None if M is that sum."""
    if METHODS[settings.method].linear:
        return None
    return partial(sum_matrices, parts, [settings.scale * weight for weight in weights])


def _keep_directions(factors: exact.Factors, rank: int) -> exact.Factors:
    """Return the first directions of a decomposition."""
    u, vh = factors.vectors
    return replace(factors, s=factors.s[:rank], complete=False, u=u[:, :rank], vh=vh[:rank])


def _write_weight(
    task: MergeTask,
    settings: MergeSettings,
    merged: Matrix,
    fro: float,
    factors: exact.Factors | None,
    file: Path,
) -> Written:
    """Write W + M, rounded once."""
    assert task.base is not None
    dtype = settings.dtype or task.base.dtype
    weight = torch.empty(task.shape, dtype=getattr(torch, dtype))
    row, squares = 0, 0.0
    for block, change in zip(row_blocks(task.base, task.shape), rows_of(merged), strict=True):
        exact_rows = block.double() + change.cpu()
        rows = weight[row : row + len(block)]
        rows.copy_(exact_rows)
        squares += float((rows.double() - exact_rows).square().sum())
        row += len(block)
    _check_finite(task, dtype, weight)
    write_tensors(file, {"W": weight})
    epsilon = math.sqrt(squares) / fro if fro else None
    fields = {"dtype": dtype, "method": "", "epsilon": epsilon}
    if factors is not None:
        rank = int((factors.s > NUMERICALLY_ZERO * factors.s[:1]).sum())
        factors = _keep_directions(factors, rank)
        fields["method"] = factors.method
    return merged, factors, fields


def _check_finite(task: MergeTask, dtype: str, *tensors: Tensor) -> None:
    """Refuse output that is not finite.

    Raises:
        InputError: An entry overflows the dtype, or BASE holds one that is not finite.
    """
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise InputError(
            task.layer,
            f"{dtype} cannot hold its merge",
            "give $output_dtype float32, or $exclude it",
        )


def _measure_directions(factors: exact.Factors | None, part: Matrix, fro: float) -> float | None:
    """Return ‖UᵀΔWV‖²/‖ΔW‖², U and V the vectors of a decomposition; None without one."""
    if factors is None:
        return None
    u, vh = factors.vectors
    return min(1.0, float((mergers.project(u, part, vh) / fro).square().sum()))


def _measure_chance(
    task: MergeTask,
    settings: MergeSettings,
    parts: Sequence[Matrix],
    request: Request,
    merge: mergers.Merger,
    written: exact.Factors | None,
) -> list[dict[str, float | None]]:
    """Return what random updates with the same singular values keep: exact for the sum, else from
    one draw.
    """
    if METHODS[settings.method].linear and settings.rank is None and settings.energy is None:
        return [{"kept_random": settings.scale * weight} for weight in request.weights]
    pairs = [part for part in parts if isinstance(part, tuple)]
    if not task.is_matrix or len(pairs) < len(parts):
        return [{} for _ in parts]
    generator = mergers.make_generator(f"{request.seed}:random")
    drawn: list[Matrix] = [_draw_update(pair, generator) for pair in pairs]
    merged = sum_matrices([merge(drawn, request)], [settings.scale])
    factors = None
    if written is not None:
        rank = len(written.s)
        total = _find_sum(settings, drawn, request.weights)
        factors = _keep_leading(merged, _factor(merged, rank + 1), rank, total)
        u, vh = factors.vectors
        merged = u * factors.s.to(u.device), vh
    found: list[dict[str, float | None]] = []
    for part in drawn:
        size = math.sqrt(frobenius_inner(part, part))
        kept = frobenius_inner(merged, part) / size**2
        directions = _measure_directions(factors, part, size)
        found.append({"kept_random": kept, "directions_random": directions})
    return found


def _draw_update(pair: tuple[Tensor, Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a random update with the singular values of another: uniform orthonormal vectors on
    either side.
    """
    s = exact.decompose_factored(*pair).s
    left, right = (
        torch.linalg.qr(torch.randn(size, len(s), generator=generator, dtype=torch.float64))[0]
        for size in shape_of(pair)
    )
    return (left * s).to(pair[0].device), right.T.to(pair[0].device)


def _compare_signs(parts: Sequence[Matrix], request: Request) -> list[dict[str, float | None]]:
    """Return the fraction of entries with opposite signs in each update and the sum of the others,
    from random rows.
    """
    m, _ = shape_of(parts[0])
    generator = mergers.make_generator(f"{request.seed}:rows")
    rows = torch.randperm(m, generator=generator)[:SAMPLED_ROWS].sort().values
    sampled = torch.stack([take_rows(part, rows).cpu() for part in parts])
    weighted = sampled * torch.tensor(request.weights, dtype=torch.float64).view(-1, 1, 1)
    total = weighted.sum(0)
    found: list[dict[str, float | None]] = []
    for own in weighted:
        products = own * (total - own)
        differing, both = (products < 0).sum(1).double(), (products != 0).sum(1).double()
        share = float(differing.sum() / both.sum())  # not a number without an entry of both
        spread = ((differing - share * both).square().sum() / max(1, len(rows) - 1)).sqrt()
        error = 0.0 if len(rows) == m else float(spread / both.mean() / math.sqrt(len(rows)))
        found.append({"sign_conflict": share, "sign_conflict_error": error} if both.any() else {})
    return found
