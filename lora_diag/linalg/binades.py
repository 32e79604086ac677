"""Check whether one size explains the changed entries: their fraction by binade of |W|, observed and expected."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

# A fit is rejected if both are exceeded: χ² per degree of freedom, and the misplaced fraction of the changed (or
# unchanged) entries. Scaled updates of the sample model's layers have fractions up to 0.10 (both starts, χ² up to 14);
# training without master weights has 0.6 and more with rounding to nearest (start: stored), 0.087 to 0.26 with
# stochastic rounding, which resembles a rounded start. There a rejected fit has χ² above 40.
WORST_CHI, WORST_MISPLACED = 20.0, {"stored": 0.12, "rounded": 0.07}

# Binades with fewer expected changes or expected unchanged entries are excluded from χ².
LEAST = 10.0

# Exponents of float64 numbers.
_LOWEST, _BINADES = -1100, 2200


@dataclass(slots=True)
class Binades:
    """Counts by ⌊log2|W|⌋.

    Args:
        entries: Number of entries.
        changed: Number of changed entries.
        expected: Σ of the probabilities of a change.
        variance: Σ p(1 − p).
    """

    entries: Tensor = field(default_factory=lambda: torch.zeros(_BINADES, dtype=torch.float64))
    changed: Tensor = field(default_factory=lambda: torch.zeros(_BINADES, dtype=torch.float64))
    expected: Tensor = field(default_factory=lambda: torch.zeros(_BINADES, dtype=torch.float64))
    variance: Tensor = field(default_factory=lambda: torch.zeros(_BINADES, dtype=torch.float64))

    def add(self, base: Tensor, changed: Tensor, probability: Tensor) -> None:
        """Add a block.

        Args:
            base: W.
            changed: Which entries changed.
            probability: Probability of a change under the model.
        """
        exponent = torch.frexp(base.double())[1]
        at = torch.where(base == 0, 0, exponent.clamp(_LOWEST + 1, 1099) - _LOWEST).reshape(-1).cpu().long()
        p = probability.double().clamp(0.0, 1.0).reshape(-1).cpu()
        for sums, values in (
            (self.entries, torch.ones_like(p)),
            (self.changed, changed.reshape(-1).double().cpu()),
            (self.expected, p),
            (self.variance, p * (1 - p)),
        ):
            sums.index_add_(0, at, values)

    @property
    def chi(self) -> float | None:
        """χ² per degree of freedom; None with fewer than two usable binades."""
        judged = torch.minimum(self.expected, self.entries - self.expected) >= LEAST
        if int(judged.sum()) < 2:
            return None
        off = (self.changed - self.expected)[judged] ** 2 / self.variance[judged]
        return float(off.sum()) / (int(judged.sum()) - 1)  # one size was fitted

    @property
    def misplaced(self) -> float:
        """Σ|changed − expected| over the binades, over the number of changed or unchanged entries, the smaller one."""
        fewer = min(float(self.changed.sum()), float((self.entries - self.changed).sum()))
        off = float((self.changed - self.expected).abs().sum())
        return off / fewer if fewer > 0 else 0.0

    def is_bad(self, start: str) -> bool:
        """Return whether the model does not fit, given the assumed start of training."""
        return (self.chi or 0.0) > WORST_CHI and self.misplaced > WORST_MISPLACED[start]
