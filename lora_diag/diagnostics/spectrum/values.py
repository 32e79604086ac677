"""Input and record of a layer's spectrum, and the spectrum of an adapter's layer without torch.

The input is the update, its weighting and the settings; the record follows from the singular
values. Layers whose two stored factors are thin are measured here, with NumPy alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_diag.deltas import FactoredDelta
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.layers.resolution import make_resolution
from lora_diag.layers.task import LayerSettings, LayerTask
from lora_diag.metrics.energy import (
    RANKS,
    THRESHOLDS,
    effective_rank,
    energy_curve,
    rank_at,
    spectral_error,
    stable_rank,
    truncation_error,
)
from lora_diag.records import Resolution, Tail
from lora_diag.thin import MAX_RANK, compute_triangle, thin_values

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_diag.layers.metric import Weighting
    from lora_diag.linalg.exact import Factors
    from lora_diag.linalg.methods import Allowance


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
        """The method, the number of values and the memory limit of a layer; None
        without a limit.
        """
        from lora_diag.linalg.methods import Allowance  # deferred: imports torch

        return None if self.memory is None else Allowance(self.memory, self.method, self.top)


@dataclass(frozen=True, slots=True)
class WeightedLayer(LayerTask):
    """One layer's update and its weighting.

    Args:
        weighting: Second moments of the data metric; None for the plain metric.
    """

    weighting: Weighting | None = None


@dataclass(frozen=True, slots=True)
class KeptValues:
    """The largest singular values of the product of two thin factors; fields as in
    ``linalg.exact.Factors``.
    """

    s: NDArray[np.float64]
    complete: bool
    energy_error: float
    fro: float
    method: str = "factored"


def record_of(
    layer: str,
    shape: tuple[int, int],
    dtypes: tuple[str | None, str],
    base_fro: float | None,
    values: Factors | KeptValues,
    ranks: tuple[int, ...],
    resolution: Resolution,
) -> Spectrum:
    """Return the record of a matrix from its singular values.

    Args:
        layer: Its name.
        shape: ``(out, in)``.
        dtypes: As in the record.
        base_fro: ‖W_base‖_F; None if it is not known.
        values: The singular values, with their errors.
        ranks: Ranks of C(r) and the truncation errors.
        resolution: Resolution under the rounding of the files.
    """
    fro = values.fro
    exact: NDArray[np.float64] = np.asarray(values.s)
    # 9 significant digits: half the file size at an error of 1e-9 of the energy.
    s = np.array([float(f"{value:.9g}") for value in exact.tolist()])
    zero = fro == 0.0
    rounding = 0.0 if zero else float((np.abs(s - exact) / fro * ((s + exact) / fro)).sum())
    error = min(1.0, values.energy_error + rounding)
    curve = np.zeros(len(s)) if zero else energy_curve(s, fro, values.complete)
    beyond = 1.0 if values.complete and not zero else None
    known = [None if zero else float(share) for share in curve]
    return Spectrum(
        layer=layer,
        shape=shape,
        dtypes=dtypes,
        fro=fro,
        base_fro=base_fro,
        s=tuple(s.tolist()),
        complete=values.complete,
        method=values.method,
        energy_error=error,
        energy={str(r): known[r - 1] if r <= len(known) else beyond for r in ranks},
        rank_at={str(share): 0 if zero else rank_at(curve, share) for share in THRESHOLDS},
        tail={str(r): _compute_tail(s, fro, r, values.complete, error) for r in ranks},
        stable_rank=None if zero else stable_rank(s, fro),
        effective_rank=effective_rank(s) if values.complete and not zero else None,
        resolution=resolution,
    )


def _compute_tail(
    s: NDArray[np.float64], fro: float, rank: int, complete: bool, energy_error: float
) -> Tail | None:
    """Return the errors of the best approximation of a rank; None if too few values are known."""
    errors = truncation_error(s, fro, rank, complete)
    if errors is None:
        return None
    spectral, error = errors[1], None
    if spectral is not None:
        error = spectral_error(spectral, fro, energy_error) if rank < len(s) else 0.0
    return Tail(fro=errors[0], spectral=spectral, spectral_error=error)


# Mean entries of a layer's factors from which layers are measured concurrently. Below, threads wait
# for each other between calls of NumPy: on all layers of a 7B model, two threads took 0.60 s at
# rank 32 where one took 0.52; at rank 64, with 0.7 million entries, 0.77 s where one took 0.99.
CONCURRENT = 2**19


def is_thin(layer: WeightedLayer, settings: SpectrumSettings) -> bool:
    """Return whether ``thin_spectrum`` can measure a layer; this depends only on the input and the
    options.

    Its factors are stored as they are, in safetensors and of a rank of at most ``MAX_RANK``;
    nothing of BASE is measured; the metric is that of the weights; and no GPU is requested.
    """
    delta = layer.delta
    return (
        isinstance(delta, FactoredDelta)
        and delta.thin is not None
        and delta.base is None
        and delta.rank <= MAX_RANK
        and layer.weighting is None
        and settings.device in {"auto", "cpu"}
    )


def is_quick(layers: Sequence[WeightedLayer]) -> bool:
    """Return whether one thread measures thin layers as fast as several would, because their
    factors are small.
    """
    entries = [
        layer.delta.rank * sum(layer.delta.shape)
        for layer in layers
        if isinstance(layer.delta, FactoredDelta)
    ]
    return sum(entries) < CONCURRENT * len(entries)


def thin_spectrum(layer: WeightedLayer, settings: SpectrumSettings) -> Spectrum | None:
    """Measure the spectrum of a layer that ``is_thin``.

    Returns:
        The spectrum; None if a number is not finite, or overflows: ``measure.spectrum`` then states
            where.
    """
    delta = layer.delta
    assert isinstance(delta, FactoredDelta)
    assert delta.thin is not None
    left, right = compute_triangle(delta.thin.read_b()), compute_triangle(delta.thin.read_a().T)
    if left is None or right is None:
        return None
    computed = thin_values(left, right, delta.thin.read_scale())
    fro = float(computed.fro[0])
    if not math.isfinite(fro):
        return None
    s = computed.s[0, : settings.top]
    values = KeptValues(s, len(s) == computed.s.shape[1], float(computed.energy_error[0]), fro)
    file_resolution = make_resolution(s, fro, values.complete)
    return record_of(
        delta.layer, delta.shape, delta.dtypes, None, values, settings.ranks, file_resolution
    )
