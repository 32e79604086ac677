"""Averages and extrapolations of the checkpoints of a run, all of the form ΔW = Σ_t c_tΔW_t.

- ``uniform``: c_t = 1/T, and ``last:K`` that of the last K (Kaddour 2022, "Stop Wasting My Time! Saving Days of
  ImageNet and BERT Training with Latest Weight Averaging", arXiv 2209.14981).
- ``ema:D``: c_t ∝ D^(T−t), an exponential moving average without bias to its start.
- ``linear:F``: ΔW_T + F(ΔW_T − ΔW_{T−1}).
- ``rank1:F``, layer by layer: the first right singular vector v of the trajectory, the T×N matrix with the rows ΔW_t,
  and the line through its coefficients ⟨ΔW_t, v⟩ over the steps s_t by least squares, at s_T + F(s_T − s_{T−1}). With
  σ_1 and u of the Gram matrix ⟨ΔW_s, ΔW_t⟩, the coefficients are σ_1u_t and v = Σ_t u_tΔW_t/σ_1, so that no row is
  formed (RELEX: Wei et al. 2026, "You Only Need Minimal RLVR Training: Extrapolating LLMs via Rank-1 Trajectories",
  arXiv 2605.21468).

An average of products B_tA_t is not the product of averages: it has the factors [c_1B_1 … c_TB_T] and [A_1; …; A_T].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from lora_diag.deltas import Delta, DenseDelta, FactoredDelta, row_spans
from lora_diag.errors import UsageError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

# Rules by option, each with its default number: None for a rule without one, NaN for one that needs it.
RULES: dict[str, dict[str, float | None]] = {
    "--average": {"uniform": None, "ema": 0.8, "last": math.nan},
    "--extrapolate": {"linear": 1.0, "rank1": 1.0},
}


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule that combines checkpoints.

    Args:
        kind: A key of ``RULES``.
        number: D, K or F; 0 for a rule without a number.
    """

    kind: str
    number: float = 0.0

    @property
    def name(self) -> str:
        """The rule as an option states it, with its number."""
        return f"{self.kind}:{self.number:g}" if self.kind != "uniform" else self.kind

    @property
    def by_layer(self) -> bool:
        """Whether the weights follow from the updates of a layer, and differ by layer."""
        return self.kind == "rank1"

    def weigh(self, steps: Sequence[int], gram: Array | None = None) -> Array:
        """Return c_t ``(T,)``.

        Args:
            steps: s_t, ascending, at least two.
            gram: ⟨ΔW_s, ΔW_t⟩ of the layer ``(T, T)``; only ``rank1`` needs it.

        Example:
            >>> Rule("last", 2).weigh([10, 20, 30]).tolist(), Rule("linear", 0.5).weigh([10, 20, 30]).tolist()
            ([0.0, 0.5, 0.5], [0.0, -0.5, 1.5])
        """
        count = len(steps)
        if self.by_layer:
            assert gram is not None
            return _extrapolate_rank1(np.asarray(steps, np.float64), gram, self.number)
        weights = np.zeros(count)
        if self.kind == "linear":
            weights[-2:] = -self.number, 1 + self.number
            return weights
        kept = count if self.kind == "uniform" else int(self.number)
        weights[-kept:] = 1.0
        if self.kind == "ema":
            weights = np.power(self.number, np.arange(count - 1.0, -1.0, -1.0))
        return np.asarray(weights / weights.sum(), np.float64)


def _extrapolate_rank1(steps: Array, gram: Array, factor: float) -> Array:
    values, vectors = np.linalg.eigh(gram)
    if values[-1] <= 0:
        return np.zeros(len(steps))
    sigma, u = math.sqrt(values[-1]), vectors[:, -1]
    origin, scale = steps[-1], steps[-1] - steps[-2]
    slope, at_last = np.polyfit((steps - origin) / scale, sigma * u, 1)
    return np.asarray((at_last + slope * factor) * u / sigma, np.float64)


def read_rules(option: str, texts: Sequence[str], count: int) -> list[Rule]:
    """Return the rules of an option.

    Args:
        option: A key of ``RULES``.
        texts: Its values.
        count: T, the number of checkpoints.

    Raises:
        UsageError: A rule is unknown, or its number is missing or out of range.
    """
    rules = []
    for text in texts:
        kind, separator, number = text.partition(":")
        if kind not in RULES[option] or (separator and RULES[option][kind] is None):
            forms = (name if default is None else f"{name}:N" for name, default in RULES[option].items())
            raise UsageError(f"{option} {text}: unknown rule; use {', '.join(forms)}")
        try:
            value = float(number) if separator else RULES[option][kind]
        except ValueError:
            value = math.nan
        if value is not None and (need := _find_need(kind, value, count)):
            raise UsageError(f"{option} {text}: {need}; use such as {kind}:{2 if kind == 'last' else 0.5}")
        rules.append(Rule(kind, value or 0.0))
    return rules


def _find_need(kind: str, value: float, count: int) -> str:
    """Return what a rule needs in place of its number; empty if it fits."""
    if kind == "last":
        fits = value.is_integer() and 2 <= value <= count
        return "" if fits else f"needs a number of checkpoints, from 2 to the {count} that are finite"
    if kind == "ema":
        return "" if 0 < value < 1 else "needs a decay between 0 and 1"
    return "" if 0 < value < math.inf else "needs a finite factor above 0"


def combine(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """Return Σ c_tΔW_t of one layer: in factored form if all updates are, else computed in full.

    Args:
        deltas: ΔW_t, of one shape.
        weights: c_t.
    """
    first, used = deltas[0], [weight for weight in weights if weight]
    factored = [delta for delta in deltas if isinstance(delta, FactoredDelta)]
    if len(factored) == len(deltas) and used:
        chosen = [delta for delta, weight in zip(factored, weights, strict=True) if weight]
        rank = sum(delta.rank for delta in chosen)
        load = partial(_stack, chosen, used)
        return FactoredDelta(first.layer, first.shape, load, factored[0].dtypes, first.base, rank=rank)
    load_sum = partial(_add, list(deltas), list(weights))
    return DenseDelta(first.layer, first.shape, load_sum, first.dtypes, first.base, first.is_matrix)


def _stack(deltas: Sequence[FactoredDelta], weights: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of a sum of products."""
    from lora_diag.linalg.distance import stack_products  # deferred: imports torch

    return stack_products([delta.load() for delta in deltas], weights)


def _add(deltas: Sequence[Delta], weights: Sequence[float]) -> torch.Tensor:
    """Return a sum of updates, float64; each is read in row blocks."""
    import torch

    from lora_diag.layers.change import load_addend  # deferred: imports torch

    total = torch.zeros(deltas[0].shape, dtype=torch.float64)
    for delta, weight in zip(deltas, weights, strict=True):
        addend = load_addend(delta)
        for first, last in row_spans(delta.shape):
            total[first:last] += weight * addend.rows(first, last)
    return total
