"""Terminal output of ``geometry``: kind of movement, what rounding alone gives, and what exceeds
both baselines.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from lora_diag.diagnostics.geometry.record import Geometry, TokenDirection
from lora_diag.diagnostics.intruders.show import describe_intruders
from lora_diag.records import Results
from lora_diag.records.base import value_at
from lora_diag.records.names import depth_of, part_of
from lora_diag.rendering.statements import Statement, make_statement, summarize
from lora_diag.rendering.tables import Grid, grid_of, rows_of
from lora_diag.rendering.text import format_shown, number, percent, quantity, safe, short, span

# Published points of whole models, all of Qwen3-8B: fraction of unchanged bfloat16 weights, mean
# principal angle in degrees, normalised spectral shift, changed weights among the 30% smallest. The
# angles are bounds: more than 10, less than 0.5.
SOURCE = "Qwen3-8B, arXiv 2606.07082"
POINTS = {
    "SFT": (0.081, 10.0, 1e-3, 0.319),
    "OPD": (0.516, 1.0, 1e-4, 0.536),
    "RLVR": (0.772, 0.5, 1e-5, 0.735),
}

EXPERT = re.compile(r"expert.*[.\[]\d+(\]|\.)")

# What is compared with both baselines, and its name in a sentence.
COMPARED = {
    "low_30": "changes in small weights",
    "principal_30": "changes in principal weights",
    "row_spread": "changes by row",
    "column_spread": "changes by column",
    "angle": "rotation",
    "shift": "spectral shift",
    "scaling": "scaling of directions",
    "mixing": "mixing of directions",
    "energy_left": "left alignment",
    "energy_right": "right alignment",
    "spectral_ratio": "σ_1(ΔW)/σ_1(W)",
}

# A statistic exceeds a baseline if it does by this factor in the median layer, and at all in this
# fraction of layers.
CLEAR_FACTOR, CLEAR_SHARE = 1.05, 0.9
MOST_NAMED = 3

# Level of the test of tokens, and tokens of a direction in a sentence.
LEVEL, MOST_WORDS = 0.05, 5


@dataclass(frozen=True, slots=True)
class PooledMovement:
    """The statistics of ``POINTS`` over several layers.

    Args:
        unchanged: Fraction of unchanged entries; None unless TUNED holds bfloat16, as the published
            models.
        angle: Mean over layers.
        shift: ‖σ(W + ΔW) − σ(W)‖ / ‖σ(W)‖ of all layers as one block-diagonal matrix.
        low: Fraction of the changed entries among the 30% smallest of their layer; None as for
            ``unchanged``, or without changed entries.
    """

    unchanged: float | None
    angle: float
    shift: float
    low: float | None

    @classmethod
    def of(cls, records: Sequence[Geometry]) -> PooledMovement:
        """Return the statistics of layers with an update."""
        changed = []
        low = []
        shifts = []
        angles = []
        for record in records:
            moved = record.moved
            assert moved is not None
            count = (1 - moved.unchanged) * math.prod(record.shape)
            changed.append(count)
            low.append(count * (moved.low_30 or 0.0))
            shifts.append(moved.shift * record.base_fro)
            angles.append(moved.angle)
        unchanged = low_share = None
        if all(record.stored == "bfloat16" for record in records):
            unchanged = 1 - math.fsum(changed) / sum(math.prod(record.shape) for record in records)
            if any(changed):
                low_share = math.fsum(low) / math.fsum(changed)
        shift = math.hypot(*shifts) / math.hypot(*(record.base_fro for record in records))
        return cls(unchanged, fmean(angles), shift, low_share)

    def distances(self) -> dict[str, float]:
        """Return the distance to each published point, the nearest first; 1 is the distance from
        SFT to RLVR.

        Root mean square over the known statistics; angles and shifts on a logarithmic scale.
        """
        sft, rlvr = _scale(POINTS["SFT"]), _scale(POINTS["RLVR"])
        angle = min(POINTS["SFT"][1], max(POINTS["RLVR"][1], self.angle))
        own = _scale((self.unchanged, angle, self.shift, self.low))
        found = {}
        for name, point in POINTS.items():
            steps = []
            for x, y, a, b in zip(own, _scale(point), sft, rlvr, strict=True):
                if x is not None and y is not None and a and b:
                    steps.append((x - y) / (b - a))
            found[name] = math.sqrt(fmean(step**2 for step in steps))
        return dict(sorted(found.items(), key=lambda item: item[1]))


def _scale(point: tuple[float | None, float, float, float | None]) -> tuple[float | None, ...]:
    """Return the statistics of a point, the logarithm of the angle and of the shift."""
    return point[0], math.log10(point[1]), math.log10(max(point[2], 1e-12)), point[3]


def _percent(share: float | None) -> str:
    """Return a percentage; a dash for None."""
    return format_shown(share, percent)


def select_compared(results: Iterable[Any]) -> list[Geometry]:
    """Return the records of updated matrices within the blocks; of all matrices where there are
    none.
    """
    moved = [record for record in results if isinstance(record, Geometry) and record.moved]
    return [record for record in moved if part_of(record.layer) == "matrices"] or moved


def geometry_grids(results: Results[Geometry], per: str = "type") -> list[Grid]:
    """Return the table; each number with that of the stricter baseline in brackets."""
    records = [record for record in results if isinstance(record, Geometry)]
    nulls = sorted({"rounding null" if record.rounding else "chance" for record in records})
    caption = f"in brackets: {' or '.join(nulls)}"
    return [grid_of(Geometry.shown, rows_of(results, per), per, caption)]


def geometry_lines(results: Results[Geometry]) -> list[Statement]:
    """Return the statements of the summary."""
    records = select_compared(results)
    if not records:
        return summarize(
            results, make_statement("movement", "Movement", "none: no weight changed", priority=0)
        )
    is_dora = any("DoRA" in side.kind for side in results.run.inputs)
    whole, rank = PooledMovement.of(records), 1 if records[0].lens else 0
    return summarize(
        results,
        make_statement("movement", "Movement", _describe_movement(whole), priority=0),
        make_statement("rounding", "Rounding", _describe_rounding(records), priority=rank),
        make_statement("lens", "Lens", *_describe_lens(records), priority=0),
        make_statement("above", "Above both", *_describe_excess(records), priority=rank),
        make_statement("intruders", "Intruders", *_describe_intruders(records)),
        make_statement("rank", "Rank", _describe_rank(records)),
        make_statement("heads", "Heads", *_describe_heads(records)),
        make_statement("experts", "Experts", *_describe_experts(records)),
        make_statement(
            "rows", "Row lengths", _describe_rows(records), priority=1 if is_dora else 2
        ),
        make_statement("published", "Published", *_describe_published(whole), priority=2),
        make_statement("baselines", "Baselines", *_describe_baselines(records), priority=2),
        make_statement("angles", "Angles", _describe_angles(records), priority=2),
    )


def _describe_movement(whole: PooledMovement) -> str:
    """State the distances to the published points, the nearest first."""
    (name, nearest), *others = whole.distances().items()
    rest = ", ".join(f"{other} {distance:.2f}" for other, distance in others)
    return (
        f"nearest to {name} of Qwen3-8B: distance {nearest:.2f} ({rest}); no proof: size alone "
        "can place it there"
    )


def _describe_published(whole: PooledMovement) -> list[str]:
    """State the compared statistics, and those of the published points."""
    found = [f"angle {number(whole.angle)}°", f"spectral shift {whole.shift:.0e}"]
    if whole.unchanged is not None:
        found += [f"unchanged {percent(whole.unchanged)}", f"low overlap {_percent(whole.low)}"]
    points = (f"{name}: {_describe_point(point)}" for name, point in POINTS.items())
    return [
        f"here: {', '.join(found)}",
        *points,
        f"of {SOURCE}; distance 1 is that of its SFT and RLVR",
    ]


def _describe_point(point: tuple[float, float, float, float]) -> str:
    """State the numbers of a published point."""
    return f"{number(point[1])}°, {point[2]:.0e}, {percent(point[0])}, {percent(point[3])}"


def _describe_rounding(records: Sequence[Geometry]) -> str:
    """State the low overlap next to chance and the rounding null."""
    measured = _percent(_pool(records, "moved", "low_30"))
    chance = _percent(_pool(records, "chance", "low_30"))
    if all(record.rounding for record in records):
        null = _percent(_pool(records, "rounding", "low_30"))
        formats = "/".join(sorted({record.stored or "" for record in records}))
        return (
            f"{measured} of changes in the 30% smallest weights; independent changes stored in "
            f"{formats} have {null}, unrounded ones {chance}"
        )
    why = "an update that is not stored has no rounding"
    if records[0].stored:
        why = "rounding removes all of it"
    return f"{why}; {measured} of changed entries in the 30% smallest weights, {chance} by chance"


def _describe_excess(records: Sequence[Geometry]) -> list[str]:
    """State which statistics exceed both baselines, and by how much."""
    found = []
    for name, title in COMPARED.items():
        rows = [_compare(record, name) for record in records]
        known = [row for row in rows if row is not None]
        if not known:
            continue
        value = median(own for own, _ in known)
        level = median(baseline for _, baseline in known)
        above = sum(own > baseline for own, baseline in known)
        if value > CLEAR_FACTOR * level and above >= CLEAR_SHARE * len(known):
            ratio = value / level if level else math.inf
            found.append((ratio, f"{title} {number(value)} ({number(level)})"))
    if not found:
        return ["nothing: as an update that is independent of W"]
    texts = [text for _, text in sorted(found, reverse=True)]
    first = ", ".join(texts[:MOST_NAMED])
    return [f"{first}; in brackets the larger baseline", ", ".join(texts[MOST_NAMED:])]


def _compare(record: Geometry, name: str) -> tuple[float, float] | None:
    """Return a statistic and the larger of its baselines; None where one is not known."""
    values = [
        value_at(side, name) for side in (record.moved, record.chance, record.rounding) if side
    ]
    return None if None in values else (values[0], max(values[1:]))


def _describe_rank(records: Sequence[Geometry]) -> str:
    """State the rank of ΔW next to that of its support and magnitudes."""
    known = [record for record in records if record.rank_90_random]
    if not known:
        return f"median {median(record.rank for record in records):.0f}, that of the factors"
    of = median(min(record.shape) for record in known)
    ninety, random = median(r.rank_90 for r in known), median(r.rank_90_random or 0 for r in known)
    full = sum(record.rank == min(record.shape) for record in known)
    return (
        f"90% of ‖ΔW‖² needs rank {ninety:.0f} of {of:.0f}, {random:.0f} with random signs on the "
        f"same entries; numerically full in {full} of {quantity(len(known))}"
    )


def _describe_intruders(records: Sequence[Geometry]) -> list[str]:
    """State the number of intruder dimensions; nothing in results without them."""
    found = [record.intruders for record in records if record.intruders]
    if not found:
        return []
    return describe_intruders(found)[:1]


def _describe_heads(records: Sequence[Geometry]) -> list[str]:
    """State the heads that changed most and least relative to their size; nothing without heads."""
    heads = [
        (head.relative, f"{head.kind} {head.index} of block {depth_of(record.layer)}")
        for record in records
        for head in record.heads
        if head.relative is not None
    ]
    return _describe_extremes(heads, "head")


def _describe_experts(records: Sequence[Geometry]) -> list[str]:
    """State the experts that changed most and least relative to their size; nothing without
    experts.
    """
    experts = [
        (record.fro / record.base_fro, short(record.layer))
        for record in records
        if EXPERT.search(record.layer) and record.base_fro
    ]
    return _describe_extremes(experts, "matrix")


def _describe_extremes(parts: Sequence[tuple[float, str]], noun: str) -> list[str]:
    """State the parts with the largest and the smallest ‖ΔW‖/‖W‖; nothing of fewer than two."""
    if len(parts) < 2:
        return []
    (least, least_name), *_, (most, most_name) = sorted(parts)
    middle = number(median(value for value, _ in parts))
    return [
        f"‖ΔW‖/‖W‖ from {number(least)} ({least_name}) to {number(most)} ({most_name}), median "
        f"{middle} of {quantity(len(parts), noun)}"
    ]


def _describe_lens(records: Sequence[Geometry]) -> list[str]:
    """State the directions whose tokens are beyond chance; nothing without ``--lens``."""
    looked = [record for record in records if record.lens]
    seen = [(min(1.0, len(looked) * x.p), record, x) for record in looked for x in record.lens]
    if not seen:
        return []
    found = [item for item in seen if item[0] <= LEVEL]
    found.sort(key=lambda item: (item[0], -abs(item[2].cosines[0])))
    lines = []
    for p, record, direction in found[:MOST_NAMED]:
        cosine = f"cosine {abs(direction.cosines[0]):.2f}, {direction.cosine_random:.2f} at random"
        where = f"{direction.number} of {short(record.layer)} {direction.side}"
        probability = "<1e-99" if p < 1e-99 else number(p)
        lines.append(f"{where} {_list_words(direction)}: {cosine}, p {probability}")
    level = f"p ≤ {LEVEL}, corrected for all tokens, directions and {quantity(len(looked))}"
    lead = f"{len(found)} of {quantity(len(seen), 'direction')} beyond chance"
    if not lines:
        return [f"{lead} ({level})"]
    return [f"{lead}; {lines[0]}", *lines[1:], level]


def _list_words(direction: TokenDirection) -> str:
    """Return the tokens of a direction that have the sign of the first, the others after
    ``against``.
    """
    same: list[str] = []
    other: list[str] = []
    words = list(zip(direction.words, direction.cosines, strict=True))
    for word, cosine in words[:MOST_WORDS]:
        side = same if cosine * direction.cosines[0] > 0 else other
        side.append(repr(safe(word)))
    text = ", ".join(same)
    if other:
        text += f" against {', '.join(other)}"
    return text


def _describe_rows(records: Sequence[Geometry]) -> str:
    """State the fraction of ‖ΔW‖² in the lengths of rows, with that of a random direction."""
    share = median(record.magnitude or 0.0 for record in records)
    chance = median(1 / record.shape[1] for record in records)
    return (
        f"{percent(share)} of ‖ΔW‖² changes lengths of rows (DoRA's magnitude), a random one "
        f"{percent(chance)}"
    )


def _describe_baselines(records: Sequence[Geometry]) -> list[str]:
    """State what the baselines are, with their draws and errors, and when η is bit identity."""
    nulls = [record.null for record in records if record.null]
    errors = [null.errors["low_30"] for null in nulls if null.errors.get("low_30") is not None]
    lines = ["chance: Gaussian updates of the same norm, not rounded"]
    if records[0].stored:
        lines.append(
            "rounding: the entries of ΔW as before rounding, at random places of the layer, stored "
            "as TUNED"
        )
    draws = f"draws per layer: {span((null.draws for null in nulls), ' to ')}"
    if errors:
        error = number(median(errors))
        draws += f"; standard error of the low overlap {error} in the median layer"
    lines.append(draws)
    if all(record.stored == "bfloat16" and record.eta == 1e-3 for record in records):
        lines.append(
            "η = 0.001: distinct normal bfloat16 numbers differ by 2^-8 or more, so unchanged is "
            "bit identity"
        )
    return lines


def _describe_angles(records: Sequence[Geometry]) -> str:
    """State the bound on the error of angles, and the angles at the signal rank."""
    error = max(record.angle_error for record in records)
    ks = sorted({record.k for record in records})
    text = f"of the {'/'.join(map(str, ks))} leading directions; error at most {number(error)}°"
    if known := [r for r in records if r.signal_left is not None and r.signal_right is not None]:
        angle = median(((r.signal_left or 0) + (r.signal_right or 0)) / 2 for r in known)
        text += f"; {number(angle)}° at the rank of ΔW above rounding, in {quantity(len(known))}"
    return text


def _pool(records: Sequence[Geometry], side: str, name: str) -> float | None:
    """Return the mean of a statistic of ``moved``, ``chance`` or ``rounding`` over the changed
    entries of layers.
    """
    weights, products = [], []
    for record in records:
        movement = getattr(record, side)
        value = None if movement is None else value_at(movement, name)
        if value is not None:
            weight = (1 - movement.unchanged) * math.prod(record.shape)
            weights.append(weight)
            products.append(weight * value)
    total = math.fsum(weights)
    return math.fsum(products) / total if total else None
