"""Check whether one size explains the changed entries: how many changed and how far, by binade of |W|.

The size of a binade's updates relative to that of all is one scoring step, log s_b − log s = ½·log g/q, g = mean
E[(x − L)²]/s² over its entries and q the mean fraction of the variance that a cell removes. Steps of optimizers do not
depend on |W|; errors of stochastic rounding grow with the spacing of the numbers, hence with |W|.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

# A fit is rejected if both are exceeded: χ² per degree of freedom, and the misplaced fraction of the changed (or
# unchanged) entries. Scaled updates of the sample model's layers have fractions up to 0.10 (both starts, χ² up to 14);
# training without master weights has 0.6 and more with rounding to nearest (start: stored), 0.087 to 0.26 with
# stochastic rounding, which resembles a rounded start. There a rejected fit has χ² above 40.
MAX_CHI, MAX_MISPLACED = 20.0, {"stored": 0.12, "rounded": 0.07}

# It is rejected, too, if the size varies so much with |W|, and by so many times its error. In 190 scaled updates of the
# sample model's layers it varied by up to 0.07, and by 2 times its error; in training without master weights and with
# stochastic rounding by 0.10 to 0.51, and by 6 to 28 times (256², tests/benchmarks/recovery.py).
MAX_UNEVENNESS, MAX_UNEVENNESS_ERRORS = 0.08, 3.0

# Binades with fewer expected changes or expected unchanged entries are excluded from χ².
MIN_EXPECTED = 10.0

# Exponents of float64 numbers.
_LOWEST, _BINADES = -1100, 2200

# Binades with fewer entries, or whose cells remove less of the variance, have no size.
MIN_COUNT, MIN_INFORMATION = 50, 0.01


def _make_zeros() -> Tensor:
    return torch.zeros(_BINADES, dtype=torch.float64)


@dataclass(slots=True)
class Binades:
    """Counts of entries and sums over them, by ⌊log2|W|⌋.

    Args:
        entries: Number of entries.
        changed: Number of changed entries.
        expected: Σ of the probabilities of a change.
        variance: Σ p(1 − p).
        square: Σ E[(x − L)²]/s².
        scatter: Σ of its squares.
        known: Σ of the fractions of the variance that cells remove.
        most_uneven: Largest ``uneven`` of an accepted fit.
    """

    entries: Tensor = field(default_factory=_make_zeros)
    changed: Tensor = field(default_factory=_make_zeros)
    expected: Tensor = field(default_factory=_make_zeros)
    variance: Tensor = field(default_factory=_make_zeros)
    square: Tensor = field(default_factory=_make_zeros)
    scatter: Tensor = field(default_factory=_make_zeros)
    known: Tensor = field(default_factory=_make_zeros)
    most_uneven: float = MAX_UNEVENNESS

    def add(self, base: Tensor, changed: Tensor, probability: Tensor, square: Tensor, known: Tensor) -> None:
        """Add a block.

        Args:
            base: W.
            changed: Which entries changed.
            probability: Probability of a change under the model.
            square: E[(x − L)²]/s² given the cells.
            known: 1 − Var[x]/s² given the cells.
        """
        exponent = torch.frexp(base.double())[1]
        indices = torch.where(base == 0, 0, exponent.clamp(_LOWEST + 1, 1099) - _LOWEST).reshape(-1).cpu().long()
        p = probability.double().clamp(0.0, 1.0).reshape(-1).cpu()
        second = square.double().reshape(-1).cpu()
        for sums, values in (
            (self.entries, torch.ones_like(p)),
            (self.changed, changed.reshape(-1).double().cpu()),
            (self.expected, p),
            (self.variance, p * (1 - p)),
            (self.square, second),
            (self.scatter, second**2),
            (self.known, known.double().reshape(-1).cpu()),
        ):
            sums.index_add_(0, indices, values)

    @property
    def chi(self) -> float | None:
        """χ² per degree of freedom; None with fewer than two usable binades."""
        judged = torch.minimum(self.expected, self.entries - self.expected) >= MIN_EXPECTED
        if int(judged.sum()) < 2:
            return None
        terms = (self.changed - self.expected)[judged] ** 2 / self.variance[judged]
        return float(terms.sum()) / (int(judged.sum()) - 1)  # one size was fitted

    @property
    def misplaced(self) -> float:
        """Σ|changed − expected| over the binades, over the number of changed or unchanged entries, the smaller one."""
        fewer = min(float(self.changed.sum()), float((self.entries - self.changed).sum()))
        off = float((self.changed - self.expected).abs().sum())
        return off / fewer if fewer > 0 else 0.0

    @property
    def _variation(self) -> tuple[float, float]:
        """Return the standard deviation of log s_b over binades, weighted by Σq, and that of its errors.

        Both are 0 with fewer than two usable binades.
        """
        used = (self.entries >= MIN_COUNT) & (self.known >= MIN_INFORMATION * self.entries)
        count = self.entries[used]
        if len(count) < 2:
            return 0.0, 0.0
        mean, q = self.square[used] / count, self.known[used] / count
        log_size = mean.log() / 2 / q
        error = ((self.scatter[used] / count - mean**2).clamp(min=0.0) / count).sqrt() / 2 / q
        weight = count * q / (count * q).sum()
        variance = float((weight * (log_size - (weight * log_size).sum()) ** 2).sum())
        return math.sqrt(variance), math.sqrt(float((weight * error**2).sum()))

    @property
    def uneven(self) -> float:
        """Standard deviation of the logarithm of the size over binades, beyond its error."""
        spread, error = self._variation
        return math.sqrt(max(0.0, spread**2 - error**2))

    def is_rejected(self, start: str) -> bool:
        """Return whether the model does not fit, given the assumed start of training."""
        spread, error = self._variation
        if self.uneven > self.most_uneven and spread > MAX_UNEVENNESS_ERRORS * error:
            return True
        return (self.chi or 0.0) > MAX_CHI and self.misplaced > MAX_MISPLACED[start]
