"""Lineage: whether TUNED descends from BASE, by the cosine of W_base and W_tuned of each weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lora_diag.errors import InputError
from lora_diag.records.base import Record, Shown

Verdict = Literal["descends", "unrelated"]

# Cosine of W_base and W_tuned from which a weight descends, and the magnitude below which it is
# unrelated. An update of norm ρ‖W_base‖ that is independent of W_base leaves a cosine of 1/√(1 +
# ρ²): at most ρ = 4.9 descends, from 9.9 on it is unrelated. Measured null:
# docs/explanation/mathematics.md#lineage.
DESCENDS, UNRELATED = 0.2, 0.1

# Standard deviations of the cosine of independent entries that ``DESCENDS`` must be above chance.
MIN_ERRORS = 5.0

# Maximum ratio of ‖W_tuned‖ and ‖W_base‖. The rounding of ΔW in float32 changes a cosine by at most
# 2^-24 times this.
MAX_RATIO = 1e4

COSINE_TO_BASE = Shown(
    "cosine_to_base",
    "cos(W, W + ΔW)",
    "Cosine of the base weight and the tuned weight; in brackets: by chance",
    axis="cosine of W_base and W_tuned",
    drop=11,
    head="cos W",
    terminal=True,
    chance="chance_cosine",
    detail=True,
)


class Lineage(Record):
    """Whether a weight of TUNED descends from that of BASE; the shape is a field of the record.

    Args:
        cosine_to_base: ⟨W_base, W_tuned⟩ / (‖W_base‖_F·‖W_tuned‖_F). Null for an adapter, whose
            factors give no W_tuned, for 1-D tensors, for zero weights, if one is 10⁴ times larger
            than the other, and in older results.
    """

    cosine_to_base: float | None = None

    @property
    def chance_cosine(self) -> float | None:
        """1/√(mn), the standard deviation of the cosine of independent weights; None without a
        cosine.
        """
        return None if self.cosine_to_base is None else 1 / math.sqrt(_count_entries(self))

    @property
    def lineage(self) -> Verdict | None:
        """``descends`` or ``unrelated``, as of ``judge_cosine``; None if it is not known."""
        return (
            None
            if self.cosine_to_base is None
            else judge_cosine(self.cosine_to_base, _count_entries(self))
        )


def _count_entries(record: Lineage) -> int:
    """Return the number of entries of a layer."""
    shape: tuple[int, ...] = record.shape  # type: ignore[attr-defined]
    return math.prod(shape)


def cosine_of_norms(base_fro: float, tuned_fro: float, fro: float) -> float | None:
    """Return the cosine of W_base and W_tuned from the norms of both and of their difference.

    ⟨W_base, W_tuned⟩ = (‖W_base‖² + ‖W_tuned‖² − ‖ΔW‖²) / 2, here with all norms over ‖W_base‖.

    Args:
        base_fro: ‖W_base‖_F.
        tuned_fro: ‖W_tuned‖_F.
        fro: ‖ΔW‖_F.

    Returns:
        The cosine; None if a norm is zero, not finite, or ``MAX_RATIO`` times larger than the
            other.

    Example:
        >>> (
        ...     round(cosine_of_norms(1.0, 1.0, 1.0), 12),
        ...     cosine_of_norms(1.0, 2.0, 1.0),
        ...     cosine_of_norms(0.0, 1.0, 1.0),
        ... )
        (0.5, 1.0, None)
    """
    smaller, larger = sorted((base_fro, tuned_fro))
    if not 0 < larger <= MAX_RATIO * smaller < math.inf:
        return None
    tuned, change = tuned_fro / base_fro, fro / base_fro
    cosine = (1 / tuned + (tuned - change) * (1 + change / tuned)) / 2
    return max(-1.0, min(1.0, cosine))


def judge_cosine(cosine: float, entries: int) -> Verdict | None:
    """Return whether a weight descends from another; None between both limits, and for few entries.

    Args:
        cosine: Cosine of both weights.
        entries: Number of their entries.

    Example:
        >>> (
        ...     judge_cosine(0.9, 10_000),
        ...     judge_cosine(0.01, 10_000),
        ...     judge_cosine(0.15, 10_000),
        ...     judge_cosine(0.01, 100),
        ... )
        ('descends', 'unrelated', None, None)
    """
    least = MIN_ERRORS / math.sqrt(entries)
    if cosine >= max(DESCENDS, least):
        return "descends"
    return "unrelated" if abs(cosine) < UNRELATED and least <= DESCENDS else None


def make_unrelated_error(base: Path | str, tuned: Path | str, layers: Sequence[str]) -> InputError:
    """Return the error of a command that writes an update, if most weights are unrelated:
    ``layers``.
    """
    return InputError(
        f"{tuned}: {len(layers)} weights, such as {layers[0]}, are unrelated to those of {base}, "
        "so nothing was written; give the BASE that TUNED was trained from"
    )
