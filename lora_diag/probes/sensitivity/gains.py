"""Gain of each unit alone, and predictors of it, from records of ``probe sensitivity``.

Uses records only. At every rank a unit has the learning rate with its lowest loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import ClassVar

from lora_diag.metrics.statistics import (
    p_value,
    paired_difference,
    paired_half,
    spearman,
    spearman_interval,
)
from lora_diag.probes.sensitivity.record import FirstOrder, Sensitivity
from lora_diag.records.base import Shown
from lora_diag.records.names import module_type_of
from lora_diag.running.amounts import edge, find_best_rates


def _describe_gain(group: Sequence[Gain]) -> str | None:
    """Return the first gain of a group with its standard error, as text; None for an
    empty group.
    """
    if not group:
        return None
    text = f"{group[0].gain:+.4f}"
    if group[0].error is not None:
        text += f" ±{group[0].error:.4f}"
    return text


@dataclass(frozen=True, slots=True)
class Gain:
    """Gain of one unit alone at one rank, mean over seeds.

    Args:
        unit: Name of the unit.
        layers: Weights of the unit.
        params: Number of parameters of its factors.
        lr: The rate with the lowest loss of the first seed.
        gain: Loss of BASE minus the loss with the unit adapted.
        error: Standard error of ``gain`` over sequences; None for one sequence.
        seeds: The gain of each seed.
        nll: Negative log-likelihood of each sequence, mean over seeds.
        edge: −1 or 1 if the rate is the lowest or the highest of several, else 0.
    """

    shown: ClassVar[tuple[Shown, ...]] = (
        Shown(
            "gain", "gain", "Loss of BASE minus loss after training", main=True, pool=_describe_gain
        ),
        Shown(
            "seeds",
            "seeds",
            "Smallest and largest gain",
            form=".4f",
            pool="ends",
            drop=1,
            terminal=True,
        ),
        Shown(
            "lr",
            "lr",
            "Learning rate with the lowest loss at the first seed",
            main=True,
            form="g",
            drop=3,
        ),
        Shown("params", "params", "Of its factors", main=True, form="count", drop=6),
    )
    unit: str
    layers: tuple[str, ...]
    params: int
    lr: float
    gain: float
    error: float | None
    seeds: tuple[float, ...]
    nll: tuple[float, ...]
    edge: int

    @property
    def half(self) -> float | None:
        """Half-width of the interval of ``gain`` (``paired_half``); None for one sequence."""
        return paired_half(self.error, len(self.nll))

    @property
    def is_clear(self) -> bool:
        """Whether ``gain`` differs significantly from zero."""
        return self.half is not None and abs(self.gain) > self.half

    @staticmethod
    def undivided(gains: Sequence[Gain]) -> list[Gain]:
        """Return the gains of units that are not a part of another unit."""
        return [
            gain for gain in gains if not any({*gain.layers} < {*other.layers} for other in gains)
        ]


@dataclass(frozen=True, slots=True)
class Correlation:
    """Rank correlation of a score with the measured gains.

    Args:
        score: Name of the score.
        rho: Spearman's ρ over all units; None if it is not defined.
        ends: 95% interval of ``rho``; None for fewer than five units, or if ``rho`` is None, −1 or
            1.
        p: p-value of ``rho`` by a permutation test; None if ``rho`` is.
        within: ρ within module types; None if it is not defined, no type has three layers, or a
            unit has several.
        within_p: p-value of ``within``; None if that is.
        n: Number of units.
    """

    score: str
    rho: float | None
    ends: tuple[float, float] | None
    p: float | None
    within: float | None
    within_p: float | None
    n: int


def gains_of(
    records: Sequence[Sensitivity], name: str, deciding_set: str, rank: int, seed: int
) -> list[Gain]:
    """Return the gain of each unit on one set, in the order of the run; empty without BASE's record
    on it.

    Units without a finite loss of the first seed on the deciding set, or without a gain on this
    one, are skipped.

    Args:
        records: Records of one run.
        name: The set.
        deciding_set: The set that decides on the rates.
        rank: r.
        seed: The first seed.
    """
    base = next((r for r in records if not r.unit and r.set == name), None)
    if base is None:
        return []
    at_rank = [r for r in records if r.unit and r.rank == rank]
    first = [r for r in at_rank if (r.set, r.seed) == (deciding_set, seed)]
    rates = find_best_rates((r.unit, r.loss, r.lr) for r in first)
    gains = []
    for unit in dict.fromkeys(r.unit for r in at_rank):
        if unit not in rates:
            continue
        lr = rates[unit]
        of_unit = [r for r in at_rank if r.unit == unit]
        runs = [r for r in of_unit if (r.lr, r.set) == (lr, name) and r.gain is not None]
        if not runs:
            continue
        nll = tuple(map(fmean, zip(*(r.nll for r in runs), strict=True)))
        gain, error = paired_difference(base.nll, nll, base.predictions)
        tried = {r.lr for r in of_unit if r.lr is not None}
        seeds = tuple(r.gain or 0.0 for r in sorted(runs, key=lambda r: r.seed))
        layers, params = runs[0].layers, runs[0].params
        gains.append(Gain(unit, layers, params, lr, gain, error, seeds, nll, edge(tried, lr)))
    return gains


def marginals_of(
    records: Sequence[Sensitivity], name: str, lower: Sequence[Gain], higher: Sequence[Gain]
) -> list[Gain]:
    """Return g(r → r + δ) = L(r) − L(r + δ) of units with both, each rank at its best rate.

    ``gain`` and ``error`` are those of g, ``error`` paired over sequences; the other fields are
    those of ``lower``.

    Args:
        records: Records of one run.
        name: The set.
        lower: Gains at r on that set.
        higher: Gains at r + δ on it.
    """
    predictions = next((r.predictions for r in records if not r.unit and r.set == name), ())
    at_higher_rank = {gain.unit: gain.nll for gain in higher}
    marginals = []
    for gain in lower:
        if gain.unit in at_higher_rank:
            value, error = paired_difference(gain.nll, at_higher_rank[gain.unit], predictions)
            marginals.append(replace(gain, gain=value, error=error))
    return marginals


# Names of the scores that may predict gains.
SCORES = ("top", "fresh", "adam", "fro²", "size")


def scores_of(gain: Gain, layers: dict[str, FirstOrder]) -> dict[str, float]:
    """Return the scores of a unit, summed over its layers; only ``size`` if a layer has no
    first-order record.
    """
    scores = {"size": float(gain.params)}
    if all(layer in layers for layer in gain.layers):
        first_orders = [layers[layer] for layer in gain.layers]
        scores["top"] = math.fsum(record.top for record in first_orders)
        scores["fresh"] = math.fsum(record.fresh for record in first_orders)
        scores["adam"] = math.fsum(record.adam for record in first_orders)
        scores["fro²"] = math.fsum(record.gradient_fro**2 for record in first_orders)
    return scores


def correlate_scores(gains: Sequence[Gain], layers: dict[str, FirstOrder]) -> list[Correlation]:
    """Return the rank correlation of each score that all units have with the gains; none for fewer
    than three units.

    Args:
        gains: Gains of all units.
        layers: First-order records, by layer.
    """
    n = len(gains)
    if n < 3:
        return []
    scores = [scores_of(gain, layers) for gain in gains]
    measured = [gain.gain for gain in gains]
    kinds = []
    if all(len(gain.layers) == 1 for gain in gains):
        kinds = [module_type_of(gain.layers[0]) for gain in gains]
    grouped = max(map(kinds.count, kinds), default=0) >= 3
    by_score = []
    for name in SCORES:
        values = [score[name] for score in scores if name in score]
        if len(values) < n:
            continue
        rho = spearman(measured, values)
        ends = None if rho is None else spearman_interval(rho, n)
        within = within_p = None
        if grouped:
            within = spearman(measured, values, kinds)
        if within is not None:
            within_p = p_value(measured, values, kinds)
        p = p_value(measured, values)
        by_score.append(Correlation(name, rho, ends, p, within, within_p, n))
    return by_score
