"""Spectrum of a layer's update: ΔW → singular values and derived quantities."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from lora_diag.deltas import Delta, StoredDelta
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.diagnostics.spectrum.values import SpectrumSettings, WeightedLayer, record_of
from lora_diag.errors import MemoryLimitError
from lora_diag.layers.change import (
    PRODUCT_OVERFLOW,
    Change,
    append_note,
    bytes_of,
    compute_on_device,
    load_change,
)
from lora_diag.layers.metric import Weighted, Weighting, weigh, weighting_bytes
from lora_diag.layers.recovery import check_cell_memory, recover_layer, recovery_bytes
from lora_diag.layers.resolution import resolution
from lora_diag.layers.task import not_finite
from lora_diag.linalg.devices import resolve_device
from lora_diag.linalg.exact import Factors
from lora_diag.linalg.largest import LargestValue
from lora_diag.records import LeftOut
from lora_diag.records.vocabulary import Hidden

if TYPE_CHECKING:
    import torch


def estimate_bytes(layer: WeightedLayer, settings: SpectrumSettings) -> int:
    """Estimate the memory of measuring a layer in bytes: ΔW, the data metric, and the estimate
    before rounding.
    """
    extra_bytes = weighting_bytes(layer.weighting, layer.shape)
    if settings.recover and isinstance(layer.delta, StoredDelta):
        extra_bytes += recovery_bytes(layer.shape)
    return bytes_of(layer.delta, settings.allowance) + extra_bytes


def spectrum(
    delta: Delta, settings: SpectrumSettings, weighting: Weighting | None = None
) -> Spectrum | LeftOut:
    """Measure the spectrum of one ΔW.

    Args:
        delta: The layer.
        settings: Settings of the measurement.
        weighting: Second moments of the layer's input and, for K-FAC, of the gradient by its
            output; None for the plain metric.

    Returns:
        The spectrum, or, if ΔW is not finite, a ``left_out`` record with the reason.
    """
    compute = partial(_compute, delta, settings, weighting)
    (change, factors, weighted), fallback = compute_on_device(
        compute, resolve_device(settings.device)
    )
    if factors is None:
        return not_finite(delta, change.non_finite or "")
    factors = replace(factors, method=factors.method + fallback)
    file_resolution = resolution(change.rounding, factors, weighted.gains if weighted else None)
    record = record_of(
        delta.layer,
        delta.shape,
        delta.dtypes,
        change.base_fro,
        factors,
        settings.ranks,
        file_resolution,
    )
    record = record.model_copy(update={"cosine_to_base": change.cosine_to_base})
    is_hidden = (
        file_resolution.verdict != "resolved" and record.fro > 0 and record.lineage != "unrelated"
    )
    if settings.recover and isinstance(delta, StoredDelta) and is_hidden:
        hidden, note = _estimate_hidden(delta, record.fro, settings)
        record = append_note(record.model_copy(update={"hidden": hidden}), "" if fallback else note)
    record = record.model_copy(
        update={"blocks": change.row_blocks, "base_sigma": change.base_sigma}
    )
    if record.lineage == "unrelated":
        record = record.without_ranks()
    if weighted is None or weighting is None:
        return record
    metric = "kfac" if weighting.gradients else "data"
    return record.model_copy(update={"metric": metric, "weights_fro": weighted.plain_fro})


def _estimate_hidden(
    delta: StoredDelta, fro: float, settings: SpectrumSettings
) -> tuple[Hidden, str]:
    """Return the estimate of the update before rounding by its cells, and the note of
    ``compute_on_device``.

    If the cells do not fit into memory, the estimate is refused.
    """
    try:
        check_cell_memory(delta.shape, settings.memory)
    except MemoryLimitError as error:
        return Hidden(status="refused", reason=str(error), unchanged=0.0), ""
    compute = partial(
        recover_layer, delta, fro, settings.ranks, settings.seed, memory=settings.memory
    )
    recovered, note = compute_on_device(compute, resolve_device(settings.device))
    return recovered.hidden, note


def _compute(
    delta: Delta, settings: SpectrumSettings, weighting: Weighting | None, device: torch.device
) -> tuple[Change, Factors | None, Weighted | None]:
    """Return ΔW in the metric, its singular values, and its weighting, None without one.

    If ΔW is not finite, the last two are None.
    """
    allowance = settings.allowance
    if allowance is not None and weighting is not None:
        allowance = replace(
            allowance, limit=allowance.limit - weighting_bytes(weighting, delta.shape)
        )
    largest = LargestValue(delta.shape)
    change, weighted = load_change(delta, device, allowance=allowance, on_base=largest.add), None
    if change.non_finite is not None:
        return change, None, None
    if weighting is None and change.base_fro:
        change = replace(change, base_sigma=largest.bound(change.base_fro))
    elif weighting is not None:
        weighted = weigh(change, delta, weighting, device)
        change = weighted.change
    factors = change.decompose(settings.method, settings.top, tol=settings.tol, seed=settings.seed)
    if not math.isfinite(factors.fro):
        return replace(change, non_finite=PRODUCT_OVERFLOW), None, None
    if weighted is not None:
        factors = replace(factors, energy_error=min(1.0, factors.energy_error + weighted.error))
    return change, factors, weighted
