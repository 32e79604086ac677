"""Choices of singular directions by their gain in loss, and what was measured of these choices.

Uses records only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any

from lora_diag.catalog import read_results
from lora_diag.errors import Given, InputError, UsageError
from lora_diag.metrics.statistics import paired_half
from lora_diag.probes.gain.record import GainLoss, LayerGain
from lora_diag.records import Results

# Fraction of the gain that a choice is to keep.
SUFFICIENT = 0.9

# Largest gain of a direction that is dropped, as fractions of what it costs on a shifted text.
THRESHOLDS = (0.0, 0.25, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Direction:
    """One singular direction of a layer's update.

    Args:
        layer: The layer.
        place: Its position, 0 for the largest singular value.
        sigma: The singular value.
        gain: Its part of the gain, a_i.
        params: out + in of the layer.
    """

    layer: str
    place: int
    sigma: float
    gain: float
    params: int


def directions_of(records: Iterable[LayerGain]) -> list[Direction]:
    """Return all directions of layers that were split."""
    return [
        Direction(record.layer, place, sigma, gain, sum(record.shape))
        for record in records
        for place, (sigma, gain) in enumerate(zip(record.sigma, record.directions, strict=True))
    ]


def order_directions(records: Iterable[LayerGain]) -> list[Direction]:
    """Return the directions that lower the loss, those with the largest gain per parameter
    first.
    """
    helpful = [direction for direction in directions_of(records) if direction.gain > 0]
    return sorted(helpful, key=lambda direction: -direction.gain / direction.params)


def find_costly(
    records: Iterable[LayerGain], elsewhere: Iterable[LayerGain], threshold: float
) -> list[Direction]:
    """Return the directions that raise the loss on a shifted text, and gain at most a fraction of
    that.

    Args:
        records: The layers on the text of the gain.
        elsewhere: The same layers on the shifted text.
        threshold: The fraction.
    """
    costs = {(d.layer, d.place): -d.gain for d in directions_of(elsewhere)}
    return [
        direction
        for direction in directions_of(records)
        if (cost := costs.get((direction.layer, direction.place), 0.0)) > 0
        and direction.gain <= threshold * cost
    ]


def half_of(record: GainLoss, comparisons: int | None = None) -> float:
    """Return half of the interval of ``gap``, of 95% for so many comparisons together; infinite
    without an error.
    """
    half = paired_half(record.gap_error, record.sequences, comparisons)
    return math.inf if half is None else half


def find_best_drop(results: Results[Any]) -> list[GainLoss]:
    """Return the measured losses on both texts of what is best dropped: the loss on the shifted
    text falls most and significantly, and on the other one the lower limit of the gain that is kept
    is sufficient. Empty if nothing is to be gained by dropping.
    """
    dropped = [r for r in results.whole_of(GainLoss) if r.subject == "dropped"]
    count = sum(record.shifted for record in dropped)
    best: list[GainLoss] = []
    for other in dropped:
        if not other.shifted or other.gap + half_of(other, count) >= 0:
            continue
        own = next(r for r in dropped if not r.shifted and r.name == other.name)
        half = paired_half(own.kept_error, own.sequences, count)
        is_kept = own.kept is not None and half is not None and own.kept - half >= SUFFICIENT
        if is_kept and (not best or other.gap < best[1].gap):
            best = [own, other]
    return best


@dataclass(frozen=True, slots=True)
class Chosen:
    """Directions for an adapter.

    Args:
        directions: The directions.
        measured: What was measured of them: of this choice, or of the nearest smaller and larger
            ones.
        is_exact: Whether it is of this choice.
    """

    directions: Sequence[Direction]
    measured: Sequence[GainLoss]
    is_exact: bool


def choose_directions(
    path: Path | str, params: int | None, keep: float | None, drop: bool
) -> Chosen:
    """Return the directions to keep, by results of ``probe gain``.

    Args:
        path: The results.
        params: As many as such a number of parameters allows, by gain per parameter.
        keep: The fewest measured ones that keep this fraction of the gain.
        drop: All but those that are best dropped.

    Raises:
        UsageError: The budget is too small, no measured choice keeps the fraction, or nothing is to
            be gained by dropping.
        InputError: The file cannot be read, or is of another command or of an unfinished run.
    """
    results = read_results(path)
    subject = Given("directions", path)
    if results.run.command != "probe gain" or results.end is None:
        problem = f"holds results of loradiag {results.run.command}"
        problem = "the run did not finish" if results.end is None else problem
        raise InputError(subject, problem, "give those of a finished probe gain")
    records = [record for record in results.whole_of(LayerGain) if not record.shifted]
    if drop:
        return _drop(results, records, subject)
    ordered = order_directions(records)
    measured = [record for record in results.whole_of(GainLoss) if not record.shifted]
    searched = [record for record in measured if record.subject == "directions"]
    counts = sorted(searched, key=lambda record: record.amount)
    if keep is not None:
        found = next((r for r in counts if r.kept is not None and r.kept >= keep), None)
        if found is None:
            problem = f"no measured number of directions keeps {keep:.0%} of the gain"
            fix = "measure with $eval" if not counts else "give a smaller fraction, or $params"
            raise UsageError(subject, problem, fix)
        return Chosen(ordered[: found.amount], [found], True)
    spent = accumulate(direction.params for direction in ordered)
    amount = len([*takewhile(lambda total: total <= (params or 0), spent)])
    if not amount:
        problem = f"is too small for one direction, which has {ordered[0].params:,} parameters"
        if not ordered:
            problem = "buys nothing: no direction lowers the loss"
        raise UsageError(Given("params", params), problem)
    below = [r for r in counts if r.amount <= amount][-1:]
    above = [r for r in counts if r.amount >= amount][:1]
    return Chosen(ordered[:amount], [*below, *above], bool(below) and below == above)


def _drop(results: Results[Any], records: Sequence[LayerGain], subject: Given) -> Chosen:
    """Return all directions but those that are best dropped.

    Raises:
        UsageError: Nothing is to be gained by dropping, or not all directions were split.
    """
    best = find_best_drop(results)
    if not best:
        problem = "of the measured choices none lowers the loss on the shifted text significantly"
        fix = "keep all, or measure with $eval and $shifted if it was not"
        raise UsageError(subject, f"{problem} and keeps {SUFFICIENT:.0%} of the gain", fix)
    if results.run.settings.get("top") is not None:
        raise UsageError(subject, "not all directions were split", "measure without $top")
    elsewhere = [record for record in results.whole_of(LayerGain) if record.shifted]
    costly = set(find_costly(records, elsewhere, float(best[0].name)))
    kept = [direction for direction in directions_of(records) if direction not in costly]
    return Chosen(kept, best, True)
