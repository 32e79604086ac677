"""One layer → its update in the files, the estimate of the update before rounding, and the requested output."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from lora_diag.decisions.extract.measure import NUMERICALLY_ZERO, split_factors
from lora_diag.decisions.recover.record import Recovery
from lora_diag.deltas import StoredDelta, row_blocks
from lora_diag.layers.change import Change, append_note, bytes_of, compute_on_device, load_change
from lora_diag.layers.left_out import not_finite
from lora_diag.layers.recovery import DEFAULT_RANKS, Estimate, recover_layer, recovery_bytes, refuse_cells
from lora_diag.layers.task import LayerSettings, LayerTask
from lora_diag.linalg import Allowance, require_memory, resolve_device
from lora_diag.metrics import THRESHOLDS, energy_curve, rank_at
from lora_diag.records import LeftOut

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Puts tensors into the file of a layer, and reads them back.
Store = Callable[[dict[str, Tensor]], None]
Load = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class OutputRequest:
    """The output for a layer; none if all fields are unset.

    Args:
        rank: Factors of this rank.
        energy: Factors of the smallest rank that carries this share of the estimated energy; all directions that were
            found where they carry less.
        full: The weight itself, W_base + E[X | cells], in float32.
        every: Factors of all directions that were found, of which ``truncate_stored`` keeps some.
        leave_out_refused: Whether a refused layer has no factors; else it gets the truncated SVD of D.
        transposed: Whether PEFT's B·A is the update's transpose.
        keep_length: Whether E[X | cells] is scaled to the estimated ‖X‖_F.
    """

    rank: int | None = None
    energy: float | None = None
    full: bool = False
    every: bool = False
    leave_out_refused: bool = False
    transposed: bool = False
    keep_length: bool = False

    @property
    def factors(self) -> bool:
        """Whether factors are written."""
        return self.rank is not None or self.energy is not None or self.every


@dataclass(frozen=True, slots=True)
class RecoveryTask(LayerTask):
    """One layer, and the output to write for it.

    Args:
        delta: Its ΔW, from two stored sides.
        request: The requested output.
        known: An earlier estimate, with the factors of all directions in its file, of which those of
            ``request.rank`` are to be kept; None to estimate.
    """

    delta: StoredDelta
    request: OutputRequest
    known: Recovery | None = None


def estimate_bytes(layer: RecoveryTask, settings: LayerSettings) -> int:
    """Estimate the memory of a layer in bytes: D with its decomposition, then the cells."""
    needed = bytes_of(layer.delta, None) + recovery_bytes(layer.shape)
    return needed if settings.memory is None else min(needed, settings.memory)


def _exceeds_memory(layer: RecoveryTask, settings: LayerSettings) -> bool:
    """Return whether the layer exceeds the memory limit, and is read in row blocks."""
    needed = bytes_of(layer.delta, None) + recovery_bytes(layer.shape)
    return settings.memory is not None and needed > settings.memory


def truncate_stored(known: Recovery, request: OutputRequest, store: Store, load: Load) -> Recovery:
    """Keep the first directions of the factors that are stored. Doing it again changes nothing.

    Raises:
        InputError: The file could not be read or written.
    """
    assert request.rank is not None
    rank = min(request.rank, known.rank)
    written: Literal["posterior", "file", "nothing"] = known.written if rank else "nothing"
    if 0 < rank < known.rank:
        factors = load()
        b, a = factors["B"], factors["A"]
        store({"B": b[:, :rank].contiguous(), "A": a[:rank].contiguous()})
    return known.model_copy(update={"rank": rank, "params": rank * sum(known.shape), "written": written})


def measure(layer: RecoveryTask, settings: LayerSettings, store: Store, load: Load) -> Recovery | LeftOut:
    """Measure one layer and store the requested output.

    Args:
        layer: The layer.
        settings: Settings of the measurement.
        store: Puts ``B`` and ``A``, or ``W``, into a file.
        load: Reads them back.

    Raises:
        InputError: A file could not be read or written.
        MemoryLimitError: The layer does not fit, even in row blocks.
    """
    if layer.known is not None:
        return truncate_stored(layer.known, layer.request, store, load)
    if settings.memory is not None:
        refuse_cells(layer.shape, settings.memory)
        if layer.request.full:
            weight = 4 * math.prod(layer.shape)
            require_memory(
                weight, settings.memory, layer.shape, "its float32 weight takes", "write an adapter with --rank"
            )
    return append_note(*compute_on_device(partial(_measure, layer, settings, store), resolve_device(settings.device)))


def _measure(layer: RecoveryTask, settings: LayerSettings, store: Store, device: torch.device) -> Recovery | LeftOut:
    delta, request = layer.delta, layer.request
    limit = settings.memory if _exceeds_memory(layer, settings) else None
    allowance = None if limit is None else Allowance(limit, settings.method)
    change = load_change(delta, device, allowance=allowance)
    if change.non_finite is not None:
        return not_finite(delta, change)
    fro, base_fro = change.fro, change.base_fro
    assert fro is not None
    assert base_fro is not None
    factors = change.decompose(settings.method, seed=settings.seed, tol=settings.tol)
    curve = energy_curve(factors.s.numpy(), fro, factors.complete) if fro else np.zeros(0)
    if limit is not None:
        change = replace(change, matrix=None)  # read again if it is to be written
    estimate = recover_layer(delta, fro, DEFAULT_RANKS, settings.seed, device, limit)
    written, rank, values = _write(request, delta, change, estimate, curve, replace(settings, memory=limit), store)
    hidden = estimate.hidden.model_dump()
    if estimate.hidden.status == "not_hidden":
        values = factors.s
    if hidden["values_estimate"] is None and values is not None:
        hidden["values_estimate"] = tuple(float(f"{value:.9g}") for value in values.tolist())
    return Recovery(
        **hidden,
        layer=layer.layer,
        shape=layer.shape,
        dtypes=delta.dtypes,
        fro=fro,
        base_fro=base_fro,
        energy={str(r): float(curve[min(r, len(curve)) - 1]) if len(curve) else None for r in DEFAULT_RANKS},
        rank_at={str(threshold): rank_at(curve, threshold) if len(curve) else 0 for threshold in THRESHOLDS},
        energy_error=factors.energy_error,
        method=factors.method,
        written=written,
        rank=rank,
        params=rank * sum(layer.shape),
    )


def _write(
    request: OutputRequest,
    delta: StoredDelta,
    change: Change,
    estimate: Estimate,
    curve: NDArray[np.float64],
    settings: LayerSettings,
    store: Store,
) -> tuple[Literal["posterior", "file", "nothing"], int, Tensor | None]:
    """Store the requested output.

    Returns:
        Its source, the rank of factors, and for a budget their singular values, without the scaling to ‖X‖: the energy
        that a direction of E[X | cells] is expected to have in X.
    """
    status = estimate.hidden.status
    if request.full:
        if estimate.cells is None:
            return "file", 0, None  # TUNED's own weights
        _store_weight(delta, estimate, _estimate_length_factor(estimate) if request.keep_length else 1.0, store)
        return "posterior", 0, None
    if not request.factors or not change.fro or (status == "refused" and request.leave_out_refused):
        return "nothing", 0, None
    rank = min(request.rank or _choose_rank(request, delta.shape, estimate, curve), min(delta.shape))
    factor = 1.0
    if estimate.cells is not None:
        factor = _estimate_length_factor(estimate) if request.keep_length else 1.0
        change = estimate.change(settings.memory, factor)
    elif settings.memory is not None:
        allowance = Allowance(settings.memory, settings.method, rank, vectors=True)
        change = load_change(delta, torch.device("cpu"), allowance=allowance)
    best = change.decompose(settings.method, rank, True, settings.tol, settings.seed)
    rank = int((best.s > NUMERICALLY_ZERO * best.s[:1]).sum())
    b, a = (part.float().cpu() for part in split_factors(best, rank, request.transposed, "both"))
    store({"B": b.contiguous(), "A": a.contiguous()})
    values = best.s[:rank] / factor if request.every else None
    return ("posterior" if estimate.cells is not None else "file"), rank, values


def _choose_rank(request: OutputRequest, shape: tuple[int, int], estimate: Estimate, curve: NDArray[np.float64]) -> int:
    """Return the smallest rank with the requested fraction of the energy, or the largest useful rank."""
    if request.energy is None:
        largest = len(curve) if estimate.hidden.status != "recovered" else len(estimate.curve)
        return max(1, min(largest, math.prod(shape) // sum(shape)))  # beyond, factors are larger than the matrix
    if estimate.hidden.status != "recovered":
        return rank_at(curve, request.energy) or len(curve)
    return rank_at(np.array(estimate.curve), request.energy) or len(estimate.curve)


def _estimate_length_factor(estimate: Estimate) -> float:
    """Return ‖X‖_F as estimated over ‖E[X | cells]‖_F, at least 1."""
    length = math.hypot(*(float(torch.linalg.vector_norm(block, dtype=torch.float64)) for block in estimate.mean()))
    return max(1.0, (estimate.hidden.fro_estimate or 0.0) / length) if length else 1.0


def _store_weight(delta: StoredDelta, estimate: Estimate, factor: float, store: Store) -> None:
    """Store W_base + factor·E[X | cells] in float32."""
    weight, row = torch.empty(delta.shape), 0
    for part in row_blocks(delta.base, delta.shape):
        weight[row : row + len(part)] = part
        row += len(part)
    row = 0
    for block in estimate.mean():
        weight[row : row + len(block)] += factor * block.cpu()
        row += len(block)
    store({"W": weight})
