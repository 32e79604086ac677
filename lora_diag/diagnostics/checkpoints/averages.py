"""Averages and extrapolations of the checkpoints of a run, all Σ_t c_tΔW_t with the same c_t in all layers.

- ``uniform``: c_t = 1/T; ``last:K``: that of the last K (Kaddour 2022, "Stop Wasting My Time! Saving Days of ImageNet
  and BERT Training with Latest Weight Averaging", arXiv 2209.14981).
- ``ema:D``: c_t ∝ D^(T−t), an exponential moving average without bias to its start.
- ``linear:F``: ΔW_T + F(ΔW_T − ΔW_{T−1}).
- ``rank1:F``: the first right singular vector v of the trajectory, the matrix with the rows ΔW_t, and the line through
  its coefficients ⟨ΔW_t, v⟩ over the steps s_t, by least squares, at s_T + F(s_T − s_{T−1}). With σ_1 and u of the Gram
  matrix ⟨ΔW_s, ΔW_t⟩ the coefficients are σ_1u_t and v = Σ_t u_tΔW_t/σ_1, so that no row is formed. RELEX does this for
  each tensor; here v is that of all layers together (Wei et al. 2026, "You Only Need Minimal RLVR Training:
  Extrapolating LLMs via Rank-1 Trajectories", arXiv 2605.21468).

An average of products B_tA_t is not the product of averages: as an adapter it has the factors [c_1B_1 … c_TB_T] and
[A_1; …; A_T], which ``merge`` writes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_diag.deltas import Delta, DenseDelta, row_spans
from lora_diag.errors import InputError, UsageError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

# Rules by option, with the default of their numbers; NaN for one that must be given.
RULES = {"average": {"uniform": 0.0, "ema": 0.8, "last": math.nan}, "extrapolate": {"linear": 1.0, "rank1": 1.0}}


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule that combines checkpoints.

    Args:
        kind: A name in ``RULES``.
        number: D, K or F; 0 for ``uniform``.
    """

    kind: str
    number: float = 0.0

    @property
    def name(self) -> str:
        """The rule as an option states it, with its number."""
        return self.kind if self.kind == "uniform" else f"{self.kind}:{self.number:g}"

    def weigh(self, steps: Sequence[int], gram: Array | None = None) -> Array:
        """Return c_t ``(T,)``.

        Args:
            steps: s_t, ascending, at least two.
            gram: ⟨ΔW_s, ΔW_t⟩ over all layers ``(T, T)``, for ``rank1``; None if it is not known.

        Raises:
            InputError: The Gram matrix is needed and not known.

        Example:
            >>> Rule("last", 2).weigh([10, 20, 30]).tolist(), Rule("linear", 0.5).weigh([10, 20, 30]).tolist()
            ([0.0, 0.5, 0.5], [0.0, -0.5, 1.5])
        """
        ages = np.arange(len(steps) - 1.0, -1.0, -1.0)
        if self.kind == "linear":
            return np.where(ages == 0, 1 + self.number, np.where(ages == 1, -self.number, 0.0))
        if self.kind == "rank1":
            if gram is None:
                problem = "needs the products of all checkpoints in all layers"
                fix = "give finite checkpoints one by one, without --layers and --exclude"
                raise InputError(f"--extrapolate {self.name}: {problem}; {fix}")
            u, intervals = (
                np.linalg.eigh(gram).eigenvectors[:, -1],
                (np.array(steps) - steps[-1]) / (steps[-1] - steps[-2]),
            )
            return np.asarray(np.polyval(np.polyfit(intervals, u, 1), self.number) * u, np.float64)
        weights = self.number**ages if self.kind == "ema" else np.where(ages < (self.number or math.inf), 1.0, 0.0)
        return np.asarray(weights / weights.sum(), np.float64)


def read_rules(options: Mapping[str, Any], count: int) -> list[Rule]:
    """Return the rules of the options.

    Args:
        options: Options with the names of ``RULES``.
        count: T, the number of checkpoints.

    Raises:
        UsageError: A rule is unknown, or its number is missing or out of range.
    """
    rules = []
    for option, defaults in RULES.items():
        for text in options[option]:
            found = re.fullmatch(r"(\w+)(?::(\d*\.?\d+))?", text)
            kind, given = found.groups() if found else ("", None)
            number = defaults.get(kind, math.nan) if given is None else float(given)
            fits = {
                "uniform": given is None,
                "ema": 0 < number < 1,
                "last": number in range(2, count + 1),
                "linear": number > 0,
                "rank1": number > 0,
            }
            if kind not in defaults or not fits[kind]:
                forms = f"uniform, ema:D (D < 1), last:K (K from 2 to {count}); --extrapolate linear:F, rank1:F (F > 0)"
                raise UsageError(f"--{option} {text}: unknown rule, or number out of range; use --average {forms}")
            rules.append(Rule(kind, number))
    return list(dict.fromkeys(rules))


def combine(deltas: Sequence[Delta], weights: Sequence[float]) -> DenseDelta:
    """Return Σ c_tΔW_t of one layer, computed when it is read.

    Args:
        deltas: ΔW_t, of one shape.
        weights: c_t.
    """
    first, load = deltas[0], partial(_add, deltas, weights)
    return DenseDelta(first.layer, first.shape, load, first.dtypes, first.base, first.is_matrix)


def _add(deltas: Sequence[Delta], weights: Sequence[float]) -> torch.Tensor:
    """Return a sum of updates, float64; each is read in row blocks, and of factors no other product is formed."""
    import torch

    from lora_diag.layers.change import load_addend  # deferred: imports torch

    total = torch.zeros(deltas[0].shape, dtype=torch.float64)
    for delta, weight in zip(deltas, weights, strict=True):
        addend = load_addend(delta)
        for first, last in row_spans(delta.shape):
            total[first:last] += weight * addend.rows(first, last)
    return total
