"""Terminal output of ``probe gain``: where the gain is, in how many directions, and whether the
path is fair.

Uses records only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lora_diag.metrics.statistics import paired_errors, paired_half, paired_ratio
from lora_diag.probes.gain.record import Gain, LayerGain, count_parts
from lora_diag.probes.gain.show_losses import (
    choice_grids,
    choice_lines,
    format_share,
    group_columns,
)
from lora_diag.records import Results
from lora_diag.records.names import module_type_of
from lora_diag.rendering.losses import caption_of, probe_summary
from lora_diag.rendering.statements import Level, Statement, make_statement
from lora_diag.rendering.tables import Column, Grid, grid_of, rows_of
from lora_diag.rendering.text import number, plus_minus, quantity, short, with_limits

# Residual, as a fraction of the gain, above which more nodes are needed.
LARGE_RESIDUAL = 0.05
# Σ|a_ℓ|/|Σ a_ℓ| above which layers counteract one another.
LARGE_CANCELLATION = 2.0
# Types that are named.
NAMED = 3

_READING = (
    "a row's part of the gain is attributed along the straight path from BASE to TUNED, which "
    "training did not take, and adds up over rows; lost without: what TUNED loses without the "
    "row's update; alone: what BASE has with it only; none says what training without it would "
    "reach; ± is the interval that decides, by blocks of neighbouring sequences; a sum of the "
    "largest directions, chosen on this text, is too high for other text"
)


def is_significant(gain: Gain) -> bool:
    """Return whether the loss of TUNED differs from that of BASE."""
    half = paired_half(gain.gain_error, len(gain.predictions))
    return half is not None and abs(gain.gain) > half


def share_of(records: Sequence[LayerGain], gain: Gain) -> tuple[float, float | None]:
    """Return the fraction of the gain that layers carry together, and half of its interval."""
    own = np.sum([record.by_sequence for record in records], axis=0)
    whole = np.subtract(gain.base_nll, gain.tuned_nll)
    share, error = paired_ratio(own, whole, gain.predictions)
    assert share is not None
    return share, paired_half(error, len(gain.predictions))


def records_on(results: Results[Any], gain: Gain) -> list[LayerGain]:
    """Return the records of layers on the text of a gain."""
    return [record for record in results.whole_of(LayerGain) if record.set == gain.set]


def gain_lines(results: Results[Any]) -> list[Statement]:
    """Return the statements of every text: its gain, where it is, the directions, and the path."""
    statements: list[Statement] = []
    for gain in results.whole_of(Gain):
        statements += _describe(gain, records_on(results, gain))
    return probe_summary(results, *statements, *choice_lines(results), reading=_READING)


def gain_grids(results: Results[Any], per: str = "type") -> list[Grid]:
    """Return the table of each module ``type`` or ``layer``: its gain, energy, and what it costs on
    a shifted text.
    """
    gains = results.whole_of(Gain)
    if not gains:
        return []
    gain, *others = gains
    rows = rows_of(records_on(results, gain), per)
    groups = [group for _, group in rows]
    columns = _list_columns(groups, gain)
    for other in others:
        by_layer = {record.layer: record for record in records_on(results, other)}
        costs = [[by_layer[r.layer] for r in group if r.layer in by_layer] for group in groups]
        cells = tuple(_format_nats(group, other, -1) if group else "-" for group in costs)
        columns.append(Column(f"{short(other.set)} loss", cells))
    columns += group_columns(results, groups)
    grid = grid_of([], rows, per, caption_of(results, *gains), _ABOUT, extra=columns)
    return [grid, *choice_grids(results)]


_ABOUT = (
    "Gain is the part of the decrease of the loss that the layers carry, energy their part of "
    "Σ‖ΔW‖². @90%: the fewest directions with 90% of the row's gain, or energy. Of a shifted text "
    "the part of the increase of its loss."
)


def _list_columns(groups: Sequence[Sequence[LayerGain]], gain: Gain) -> list[Column]:
    energy = sum(record.energy for group in groups for record in group)

    def column(title: str, cell: Callable[[Sequence[LayerGain]], str], **options: Any) -> Column:
        return Column(title, tuple(map(cell, groups)), **options)

    columns = [column("gain", lambda group: _format_nats(group, gain), drop=2)]
    if is_significant(gain):
        columns.append(column("of gain", lambda group: format_share(*share_of(group, gain))))
    if energy:
        columns.append(
            column("energy", lambda group: format_share(sum(r.energy for r in group) / energy))
        )
    columns += [
        column("gain @90%", lambda group: _count(_gains(group)), drop=1),
        column("energy @90%", lambda group: _count(_energies(group)), drop=3),
        column("quadrature", lambda group: f"±{number(_noise(group))}", detail=True),
    ]
    return columns


def _format_nats(group: Sequence[LayerGain], gain: Gain, sign: int = 1) -> str:
    """Return what layers carry together, and half of its interval."""
    sums = np.sum([record.by_sequence for record in group], axis=0)
    errors = paired_errors(sums[:, None], gain.predictions)
    half = paired_half(None if errors is None else float(errors[0]), len(gain.predictions))
    return f"{sign * sum(record.gain for record in group):+.4f}{plus_minus(half)}"


def _noise(group: Sequence[LayerGain]) -> float:
    return sum(record.quadrature_error for record in group)


def _gains(records: Sequence[LayerGain]) -> list[float]:
    return [gain for record in records for gain, _ in record.parts]


def _energies(records: Sequence[LayerGain]) -> list[float]:
    return [energy for record in records for _, energy in record.parts]


def _count(values: Sequence[float]) -> str:
    count = count_parts(values, sum(values), 0.9)
    return "-" if count is None else f"{count} of {len(values)}"


def _describe(gain: Gain, records: Sequence[LayerGain]) -> list[Statement]:
    on = f" on {short(gain.set)}" if gain.shifted else ""
    statements = [_describe_gain(gain, on), _describe_sum(gain, records, on)]
    if is_significant(gain):
        where = make_statement("where", f"Where{on}", _describe_types(gain, records), priority=0)
        statements.append(where)
        if not gain.shifted:
            statements.append(
                make_statement("directions", "Directions", *_describe_directions(records))
            )
    return [*statements, _describe_path(gain, on)]


def _describe_gain(gain: Gain, on: str) -> Statement:
    """State the change of the loss; a warning if it cannot be attributed."""
    half = paired_half(gain.gain_error, len(gain.predictions))
    text = f"{with_limits(gain.gain, half)} nats, loss {gain.losses[0]:.4f} of BASE → "
    text += f"{gain.losses[-1]:.4f} of TUNED"
    if gain.shifted:
        text = f"{with_limits(-gain.gain, half)} nats, loss {gain.losses[0]:.4f} → "
        text += f"{gain.losses[-1]:.4f}"
    if is_significant(gain):
        label = f"Cost{on}" if gain.shifted else "Gain"
        text += "" if gain.gain > 0 or gain.shifted else "; the update raises the loss"
        return make_statement("gain", label, text, priority=0)
    reason = "not known from one sequence" if half is None else "not significant"
    text = f"the change of the loss is {reason}, so no fractions of it are given: {text}"
    level: Level = "note" if gain.shifted else "warning"
    return make_statement("gain", f"Gain{on}", text, level=level, priority=0)


def _describe_types(gain: Gain, records: Sequence[LayerGain]) -> str:
    """State the types with the largest parts of the gain, beside their parts of the energy."""
    types: dict[str, list[LayerGain]] = {}
    for record in records:
        types.setdefault(module_type_of(record.layer), []).append(record)
    energy = sum(record.energy for record in records)
    shares = {kind: share_of(group, gain) for kind, group in types.items()}
    largest = sorted(shares, key=lambda kind: -abs(shares[kind][0]))[:NAMED]
    named = []
    for kind in largest:
        part = sum(record.energy for record in types[kind]) / energy if energy else 0.0
        named.append(
            f"{short(kind)} {format_share(*shares[kind])} (of energy {format_share(part)})"
        )
    return "; ".join(named)


def _describe_directions(records: Sequence[LayerGain]) -> list[str]:
    gains, energies = _gains(records), _energies(records)
    rest = sum(record.rest for record in records)
    by_gain = count_parts(gains, sum(gains) + rest, 0.9)
    by_energy = count_parts(energies, sum(record.energy for record in records), 0.9)
    if by_gain is None:
        lines = ["90% of the gain is not reached by the directions that were split"]
    else:
        lines = [f"90% of the gain in {by_gain} of {quantity(len(gains), 'direction')}"]
        lines[0] += f", 90% of the energy in {by_energy}" if by_energy else ""
    negative = sum(value for value in gains if value < 0)
    lines.append(f"directions that raise the loss: {negative:+.4f} nats in all, noise included")
    if rest:
        lines.append(f"beyond --top: {rest:+.4f} nats")
    return lines


def _describe_sum(gain: Gain, records: Sequence[LayerGain], on: str) -> Statement:
    """State how well the layers add up to the gain."""
    sign = -1 if gain.shifted else 1
    error = f"error of quadrature about {number(_noise(records))} at most, summed over layers"
    if gain.residual is None:
        text = f"{quantity(len(records), 'layer')} {sign * gain.attributed:+.4f} nats of "
        text += f"{sign * gain.gain:+.4f}; not all of the update; {error}"
        return make_statement("sum", f"Sum{on}", text)
    share = abs(gain.residual / gain.gain) if gain.gain else 0.0
    text = f"the layers add up to {sign * gain.attributed:+.4f}, residual "
    text += f"{sign * gain.residual:+.1e}"
    if is_significant(gain):
        text += f" ({share:.2%} of the change)"
    is_large = is_significant(gain) and share > LARGE_RESIDUAL
    text += "; use more --nodes" if is_large else f"; {error}"
    return make_statement("sum", f"Sum{on}", text, level="warning" if is_large else "note")


def _describe_path(gain: Gain, on: str) -> Statement:
    """State whether the straight path is a fair one."""
    problems = []
    half = paired_half(gain.barrier_error, len(gain.predictions))
    if gain.barrier > 0 and half is not None and gain.barrier > half:
        problems.append(f"the loss rises by {gain.barrier:.4f}{plus_minus(half)} on the way")
    lowest = min(range(len(gain.losses)), key=lambda index: gain.losses[index])
    if not gain.shifted and lowest not in {0, len(gain.losses) - 1}:
        problems.append(f"it is lowest at t = {gain.nodes[lowest]:.2f}: see probe strength")
    if gain.cancellation is not None and gain.cancellation > LARGE_CANCELLATION:
        problems.append(f"layers counteract one another, Σ|a|/|Σa| = {gain.cancellation:.1f}")
    along = ", ".join(f"{loss:.4f}" for loss in gain.losses)
    if not problems:
        text = f"losses along it: {along}"
        return make_statement("path", f"Path{on}", text, priority=2)
    return make_statement("path", f"Path{on}", f"{'; '.join(problems)} (losses {along})")
