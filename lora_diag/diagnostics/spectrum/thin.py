"""Spectrum of a LoRA adapter's layer from its two stored factors, with NumPy alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_diag.deltas import FactoredDelta
from lora_diag.diagnostics.spectrum.task import Layer, SpectrumSettings
from lora_diag.diagnostics.spectrum.values import record_of
from lora_diag.layers.resolution import make_unrounded
from lora_diag.thin import MAX_RANK, thin_values, triangle

# Entries of a layer's factors from which layers are measured concurrently. Below, threads wait for each other between
# calls of NumPy: on all layers of a 7B model, two threads took 0.60 s at rank 32 where one took 0.52; at rank 64, with
# 0.7 million entries, 0.77 s where one took 0.99.
CONCURRENT = 2**19

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lora_diag.diagnostics.spectrum.record import Spectrum


@dataclass(frozen=True, slots=True)
class _Kept:
    """The values that are kept: a ``Values``."""

    s: NDArray[np.float64]
    complete: bool
    energy_error: float
    fro: float
    method: str = "factored"


def is_thin(layer: Layer, settings: SpectrumSettings) -> bool:
    """Return whether a layer is measured here; this depends only on the input and the options.

    Its factors are stored as they are, in safetensors and of a rank of at most ``MAX_RANK``; nothing of BASE is
    measured; and no GPU is requested.
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


def is_quick(layers: Sequence[Layer]) -> bool:
    """Return whether one thread measures thin layers as fast as several would: their factors are small."""
    entries = [layer.delta.rank * sum(layer.delta.shape) for layer in layers if isinstance(layer.delta, FactoredDelta)]
    return sum(entries) < CONCURRENT * len(entries)


def thin_spectrum(layer: Layer, settings: SpectrumSettings) -> Spectrum | None:
    """Measure the spectrum of a layer that ``is_thin``.

    Returns:
        The spectrum; None if a number is not finite, or overflows: ``measure.spectrum`` then states where.
    """
    delta = layer.delta
    assert isinstance(delta, FactoredDelta)
    assert delta.thin is not None
    left, right = triangle(delta.thin.read_b()), triangle(delta.thin.read_a().T)
    if left is None or right is None:
        return None
    computed = thin_values(left, right, delta.thin.read_scale())
    fro = float(computed.fro[0])
    if not math.isfinite(fro):
        return None
    s = computed.s[0, : settings.top]
    values = _Kept(s, len(s) == computed.s.shape[1], float(computed.energy_error[0]), fro)
    file_resolution = make_unrounded(s, fro, values.complete)
    return record_of(delta.layer, delta.shape, delta.dtypes, None, values, settings.ranks, file_resolution)
