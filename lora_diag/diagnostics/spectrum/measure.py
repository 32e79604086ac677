"""Spectrum of a layer's update: ΔW → singular values and derived quantities."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from lora_diag.deltas import Delta, StoredDelta
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.layers.change import OVERFLOW, Change, bytes_of, load_change, on_device
from lora_diag.layers.left_out import not_finite
from lora_diag.layers.metric import Weighed, Weighting, extra, weigh
from lora_diag.layers.recovery import recover_layer, recovery_bytes
from lora_diag.layers.resolution import resolution
from lora_diag.layers.task import LayerSettings, LayerTask
from lora_diag.linalg import Allowance, Factors, resolve_device
from lora_diag.metrics import (
    RANKS,
    THRESHOLDS,
    effective_rank,
    energy_curve,
    rank_at,
    spectral_error,
    stable_rank,
    truncation_error,
)
from lora_diag.records import LeftOut, Resolution, Tail
from lora_diag.records.vocabulary import Hidden

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectrumSettings(LayerSettings):
    """Settings of the measurement of a layer.

    Args:
        ranks: Ranks r of C(r) and the truncation errors.
        top: Number of largest singular values to keep; None for all.
        recover: Whether to estimate the update before rounding where the files do not resolve it.
    """

    ranks: tuple[int, ...] = RANKS
    top: int | None = None
    recover: bool = False

    @property
    def allowance(self) -> Allowance | None:
        """Return the method's settings and memory limit for a layer."""
        return None if self.memory is None else Allowance(self.memory, self.method, self.top)


@dataclass(frozen=True, slots=True)
class Layer(LayerTask):
    """One layer's update and its weighting; None for the plain metric."""

    weighting: Weighting | None = None


def size(layer: Layer, settings: SpectrumSettings) -> int:
    """Estimate the memory of measuring a layer in bytes: ΔW, and the data metric."""
    more = extra(layer.weighting, layer.shape) if layer.weighting is not None else 0
    if settings.recover and isinstance(layer.delta, StoredDelta):
        more += recovery_bytes(layer.shape)
    return bytes_of(layer.delta, settings.allowance) + more


def spectrum(delta: Delta, settings: SpectrumSettings, weighting: Weighting | None = None) -> Spectrum | LeftOut:
    """Measure the spectrum of one ΔW.

    Args:
        delta: The layer.
        settings: Settings of the measurement.
        weighting: Second moments of the layer's input, and of the gradient by its output; None for the plain metric.

    Returns:
        The spectrum, or, if ΔW is not finite, a ``left_out`` record with the position of the first such entry.
    """
    compute = partial(_compute, delta, settings, weighting)
    (change, factors, weighed), fallback = on_device(compute, resolve_device(settings.device))
    if factors is None:
        return not_finite(delta, change)
    factors = replace(factors, method=factors.method + fallback)
    gains = weighed.gains if weighed else None
    seen = resolution(change.rounding, factors, gains)
    record = record_of(delta.layer, delta.shape, delta.dtypes, change.base_fro, factors, settings.ranks, seen)
    if settings.recover and isinstance(delta, StoredDelta) and seen.verdict != "resolved" and record.fro > 0:
        record = record.model_copy(update={"hidden": _hidden(delta, record.fro, settings)})
    if change.row_blocks is not None:
        record = record.model_copy(update={"blocks": change.row_blocks})
    if weighed is None or weighting is None:
        return record
    metric = "kfac" if weighting.gradients else "data"
    return record.model_copy(update={"metric": metric, "weights_fro": weighed.plain_fro})


def _hidden(delta: StoredDelta, fro: float, settings: SpectrumSettings) -> Hidden:
    """Return what the rounding cells say about the update before rounding."""
    needed = recovery_bytes(delta.shape)
    if settings.memory is not None and needed > settings.memory:
        reason = f"its rounding cells need {needed >> 20} MiB; give --memory more"
        return Hidden(status="refused", reason=reason, unchanged=0.0)
    compute = partial(recover_layer, delta, fro, settings.ranks, settings.seed)
    return on_device(compute, resolve_device(settings.device))[0].hidden


def record_of(
    layer: str,
    shape: tuple[int, int],
    dtypes: tuple[str | None, str],
    base_fro: float | None,
    factors: Factors,
    ranks: tuple[int, ...],
    seen: Resolution,
) -> Spectrum:
    """Return the record of a matrix from its singular values.

    Args:
        layer: Its name.
        shape: ``(out, in)``.
        dtypes: As in the record.
        base_fro: ‖W_base‖_F; None if it is not known.
        factors: The singular values.
        ranks: Ranks of C(r) and the truncation errors.
        seen: Resolution under the rounding of the files.
    """
    fro = factors.fro
    exact = factors.s.numpy()
    s = _nine_digits(exact)
    zero = fro == 0.0
    rounding = 0.0 if zero else float((np.abs(s - exact) / fro * ((s + exact) / fro)).sum())
    error = min(1.0, factors.energy_error + rounding)
    curve = np.zeros(len(s)) if zero else energy_curve(s, fro, factors.complete)
    return Spectrum(
        layer=layer,
        shape=shape,
        dtypes=dtypes,
        fro=fro,
        base_fro=base_fro,
        s=tuple(s.tolist()),
        complete=factors.complete,
        method=factors.method,
        energy_error=error,
        energy={str(r): None if zero else _at(curve, r, factors.complete) for r in ranks},
        rank_at={str(share): 0 if zero else rank_at(curve, share) for share in THRESHOLDS},
        tail={str(r): _tail(s, fro, r, factors.complete, error) for r in ranks},
        stable_rank=None if zero else stable_rank(s, fro),
        effective_rank=effective_rank(s) if factors.complete and not zero else None,
        resolution=seen,
    )


def _compute(
    delta: Delta, settings: SpectrumSettings, weighting: Weighting | None, device: torch.device
) -> tuple[Change, Factors | None, Weighed | None]:
    """Read ΔW, apply the metric, and compute its singular values; None if it is not finite."""
    allowance = settings.allowance
    if allowance is not None and weighting is not None:
        allowance = replace(allowance, limit=allowance.limit - extra(weighting, delta.shape))
    change, weighed = load_change(delta, device, allowance=allowance), None
    if change.non_finite is not None:
        return change, None, None
    if weighting is not None:
        weighed = weigh(change, delta, weighting, device)
        change = weighed.change
    factors = change.decompose(settings.method, settings.top, tol=settings.tol, seed=settings.seed)
    if not math.isfinite(factors.fro):
        return replace(change, non_finite=OVERFLOW), None, None
    if weighed is not None:
        factors = replace(factors, energy_error=min(1.0, factors.energy_error + weighed.error))
    return change, factors, weighed


def _nine_digits(s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round to 9 significant digits: half the file size at an error of 1e-9 of the energy."""
    return np.array([float(f"{value:.9g}") for value in s.tolist()])


def _at(curve: NDArray[np.float64], rank: int, complete: bool) -> float | None:
    if rank <= len(curve):
        return float(curve[rank - 1])
    return 1.0 if complete else None


def _tail(s: NDArray[np.float64], fro: float, rank: int, complete: bool, energy_error: float) -> Tail | None:
    errors = truncation_error(s, fro, rank, complete)
    if errors is None:
        return None
    spectral, error = errors[1], None
    if spectral is not None:
        error = spectral_error(spectral, fro, energy_error) if rank < len(s) else 0.0
    return Tail(fro=errors[0], spectral=spectral, spectral_error=error)
