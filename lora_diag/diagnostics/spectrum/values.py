"""Singular values of a layer's update → its record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.metrics import (
    THRESHOLDS,
    effective_rank,
    energy_curve,
    rank_at,
    spectral_error,
    stable_rank,
    truncation_error,
)
from lora_diag.records import Resolution, Tail

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Values(Protocol):
    """Singular values, as an array or a tensor on the CPU, with their errors: ``lora_diag.linalg.Factors``."""

    @property
    def s(self) -> Any:
        """The values, descending."""

    @property
    def complete(self) -> bool:
        """Whether these are all that can be nonzero."""

    @property
    def method(self) -> str:
        """Method of the computation."""

    @property
    def energy_error(self) -> float:
        """Bound on the error of every energy fraction."""

    @property
    def fro(self) -> float:
        """‖A‖_F."""


def record_of(
    layer: str,
    shape: tuple[int, int],
    dtypes: tuple[str | None, str],
    base_fro: float | None,
    values: Values,
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
    s = _round_to_nine_digits(exact)
    zero = fro == 0.0
    rounding = 0.0 if zero else float((np.abs(s - exact) / fro * ((s + exact) / fro)).sum())
    error = min(1.0, values.energy_error + rounding)
    curve = np.zeros(len(s)) if zero else energy_curve(s, fro, values.complete)
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
        energy={str(r): None if zero else _curve_at_rank(curve, r, values.complete) for r in ranks},
        rank_at={str(share): 0 if zero else rank_at(curve, share) for share in THRESHOLDS},
        tail={str(r): _compute_tail(s, fro, r, values.complete, error) for r in ranks},
        stable_rank=None if zero else stable_rank(s, fro),
        effective_rank=effective_rank(s) if values.complete and not zero else None,
        resolution=resolution,
    )


def _round_to_nine_digits(s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round to 9 significant digits: half the file size at an error of 1e-9 of the energy."""
    return np.array([float(f"{value:.9g}") for value in s.tolist()])


def _curve_at_rank(curve: NDArray[np.float64], rank: int, complete: bool) -> float | None:
    if rank <= len(curve):
        return float(curve[rank - 1])
    return 1.0 if complete else None


def _compute_tail(s: NDArray[np.float64], fro: float, rank: int, complete: bool, energy_error: float) -> Tail | None:
    errors = truncation_error(s, fro, rank, complete)
    if errors is None:
        return None
    spectral, error = errors[1], None
    if spectral is not None:
        error = spectral_error(spectral, fro, energy_error) if rank < len(s) else 0.0
    return Tail(fro=errors[0], spectral=spectral, spectral_error=error)
