"""The terminal's answer to ``probe sensitivity``: what each unit gains alone, and what would have said so for less."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from lora_diag.metrics.correlation import spearman
from lora_diag.planning.sensitivity import (
    Correlation,
    Gain,
    Marginal,
    correlations,
    gains_of,
    marginals_of,
    scores_of,
)
from lora_diag.reports.columns import WIDE, Column, table_of
from lora_diag.reports.lines import answers, inputs, notes
from lora_diag.reports.probe import ending, measured
from lora_diag.reports.text import count, number, short, to_text
from lora_diag.results import FirstOrder, Results, Sensitivity

# More rows than these are in the file only.
MOST = 40
# So many units are named in a sentence.
_NAMED = 3
_UNITS = {"layer": ("layer", "layers"), "block": ("block", "blocks"), "type": ("module type", "module types")}
# What each score is, in the words of docs/probe-sensitivity.md.
_SCORES = {
    "top": "Σσ_i(G)² to r",
    "fresh": "‖P_T G‖² of a fresh LoRA",
    "adam": "Adam's first step",
    "fro²": "‖G‖²",
    "size": "parameters, no gradient",
}
# From this ρ on, an order is called told; the number is beside the word.
_WELL = 0.7
# Above this p, an order is not told from chance.
_CHANCE = 0.05
# Which columns go first where there is too little room, by how their titles begin.
_SPARED = ("params", "Σσ² to r", "on ", "lr", "first step", "seeds")


def sensitivity_table(
    results: Results[Any], width: int = 80, color: bool = False, per: str = "type", then: str | None = None
) -> str:
    """Return the table and the summary of ``probe sensitivity``.

    Args:
        results: What was measured.
        width: Columns of the terminal.
        color: Whether to use ANSI colours.
        per: Not used: a row is what the run adapted alone.
        then: The command that a user would run next.
    """
    settings = results.run.settings
    records = [record for record in results.whole if isinstance(record, Sensitivity)]
    scores = {record.layer: record for record in results.whole if isinstance(record, FirstOrder)}
    sets = list(dict.fromkeys(record.set for record in records))
    rank, seed = settings["rank"], settings["seed"]
    gains = {name: gains_of(records, name, sets[0], rank, seed) for name in sets}
    more: dict[str, list[Marginal]] = {}
    if settings["delta"]:
        for name in sets:
            higher = gains_of(records, name, sets[0], rank + settings["delta"], seed)
            more[name] = marginals_of(records, name, gains[name], higher)
    parts: list[RenderableType] = []
    if sets and gains[sets[0]]:
        parts += _table(gains, more, scores, sets, settings, width)
    told = [("Compared", "\n".join([*inputs(results.run), *notes(results.run)])), ("Measured", measured(results.run))]
    told.append(("Trained", _trained(settings)))
    for name in sets:
        told += [(f"On {short(name)}", _said(records, gains[name], name, settings))]
    if sets and gains[sets[0]]:
        told += _marginal(more.get(sets[0], []), settings)
        told += _repeats(gains[sets[0]])
        told += _others(gains, sets)
        told += [("Cheaper?", _cheaper(correlations(gains[sets[0]], scores), gains[sets[0]]))]
        told += [("Rates", _rates(gains[sets[0]], records))]
    told += [("Read it so", _READING), *ending(results), *([("Next", then)] if then else [])]
    return to_text(Group(*parts, answers(told)), width, color)


_READING = (
    "what a layer gains alone is not its share of what all gain together; a short budget says little about a long one; "
    "rates were chosen on the first set, so gains there are a little too high; layers of one model are not "
    "independent, so intervals and p-values of ρ are too good"
)


def _table(
    gains: dict[str, list[Gain]],
    more: dict[str, list[Marginal]],
    scores: dict[str, FirstOrder],
    sets: Sequence[str],
    settings: dict[str, Any],
    width: int,
) -> list[RenderableType]:
    """Return one row a unit, the most sensitive first."""
    ordered = sorted(gains[sets[0]], key=lambda gain: -gain.gain)
    rows = ordered[:MOST]
    first = [scores_of(row, scores) for row in rows]
    columns = [Column("gain", tuple(_with_error(row.gain, row.error) for row in rows))]
    if any(len(row.seeds) > 1 for row in rows):
        columns.append(Column("seeds", tuple(_range(row.seeds) for row in rows)))
    rank, delta = settings["rank"], settings["delta"]
    for name in sets:
        by_unit = {each.unit: each for each in more.get(name, [])}
        other = {each.unit: each for each in gains[name]}
        if name != sets[0]:
            cells = tuple(
                _with_error(other[r.unit].gain, other[r.unit].error) if r.unit in other else "-" for r in rows
            )
            columns.append(Column(f"on {short(name)}", cells))
        elif delta:
            cells = tuple(
                _with_error(by_unit[r.unit].gain, by_unit[r.unit].error) if r.unit in by_unit else "-" for r in rows
            )
            columns.append(Column(f"g({rank}→{rank + delta})", cells))
    columns += [
        Column("lr", tuple(f"{row.lr:g}" for row in rows)),
        Column("params", tuple(count(row.params) for row in rows)),
        Column("Σσ² to r", tuple(_score(each, "top") for each in first)),
        Column("first step", tuple(_score(each, "adam") for each in first)),
    ]
    title = f"{_UNITS[settings['per']][0]} alone"
    names = [short(row.unit.removesuffix(".weight")) for row in rows]
    if width < WIDE:  # names that are cut at their beginning lose their block
        room = width - max(map(len, [title, *names])) - 2
        for spared in _SPARED:
            if sum(column.width + 1 for column in columns) > room:
                columns = [column for column in columns if not column.title.startswith(spared)]
    shown: list[RenderableType] = [table_of(title, names, columns, width)]
    if len(ordered) > MOST:
        shown.append(Text(f"and {len(ordered) - MOST} more that gain less"))
    return shown


def _with_error(gain: float, error: float | None) -> str:
    return f"{gain:+.4f}" + ("" if error is None else f" ±{error:.4f}")


def _range(seeds: Sequence[float]) -> str:
    """Return the span of the gains; a minus sign beside a dash is not to be read.

    >>> _range([0.25, 0.125]), _range([0.25, -0.125]), _range([0.25])
    ('0.1250-0.2500', '-0.1250 to 0.2500', '-')
    """
    if len(seeds) < 2:
        return "-"
    return f"{min(seeds):.4f}{' to ' if min(seeds) < 0 else '-'}{max(seeds):.4f}"


def _score(scores: dict[str, float], name: str) -> str:
    return number(scores[name]) if name in scores else "-"


def _trained(settings: dict[str, Any]) -> str:
    ranks = f"r={settings['rank']}" + (f" and {settings['rank'] + settings['delta']}" if settings["delta"] else "")
    return (
        f"{settings['kind']}, {ranks} on one {_UNITS[settings['per']][0]} at a time, {settings['steps']} steps of "
        f"{settings['batch']} sequences; {settings['optimizer']}"
    )


def _said(records: Sequence[Sensitivity], gains: Sequence[Gain], name: str, settings: dict[str, Any]) -> str:
    base = next(record for record in records if record.set == name and not record.unit)
    if not gains:
        return f"loss {base.loss:.4f} of BASE; no run is finished yet"
    one, many = _UNITS[settings["per"]]
    better = sum(gain.is_clear and gain.gain > 0 for gain in gains)
    worse = sum(gain.is_clear and gain.gain < 0 for gain in gains)
    ordered = sorted(gains, key=lambda gain: -gain.gain)
    lines = [
        f"loss {base.loss:.4f} of BASE; alone, {better} of {len(gains)} {many if len(gains) > 1 else one} lower it by "
        f"more than two standard errors{f', {worse} raise it by that' if worse else ''}",
        f"highest: {_named(ordered[:_NAMED])}",
    ]
    if len(ordered) > 2 * _NAMED:
        lines.append(f"lowest: {_named(ordered[-_NAMED:])}")
    if base.shifted:
        lines[0] = f"shifted: {lines[0]}"
    return "\n".join(lines)


def _named(gains: Sequence[Gain] | Sequence[Marginal]) -> str:
    return ", ".join(f"{short(gain.unit.removesuffix('.weight'))} {gain.gain:+.4f}" for gain in gains)


def _marginal(more: Sequence[Marginal], settings: dict[str, Any]) -> list[tuple[str, str]]:
    if not more:
        return []
    clear = [each for each in more if each.error is not None and abs(each.gain) > 2 * each.error]
    up = sum(each.gain > 0 for each in clear)
    ordered = sorted(more, key=lambda each: -each.gain)
    rank = settings["rank"]
    said = (
        f"from r={rank} to {rank + settings['delta']}, {up} of {len(more)} gain more than two standard errors, "
        f"{len(clear) - up} lose as much; highest: {_named(ordered[:_NAMED])}"
    )
    return [("More rank", said)]


def _repeats(gains: Sequence[Gain]) -> list[tuple[str, str]]:
    """Say whether another seed orders the units alike."""
    both = [gain.seeds for gain in gains if len(gain.seeds) > 1]
    if len(both) < 3:
        return []
    rho = spearman([seeds[0] for seeds in both], [seeds[1] for seeds in both])
    return [("Repeats?", f"the order by the first seed and by the second: ρ = {_rho(rho)}, {len(both)} compared")]


def _others(gains: dict[str, list[Gain]], sets: Sequence[str]) -> list[tuple[str, str]]:
    """Say whether other sets order the units alike."""
    lines = []
    for name in sets[1:]:
        other = {gain.unit: gain.gain for gain in gains[name]}
        both = [(gain.gain, other[gain.unit]) for gain in gains[sets[0]] if gain.unit in other]
        if len(both) > 2:
            rho = spearman([one for one, _ in both], [two for _, two in both])
            lines.append(f"on {short(name)} and on {short(sets[0])}: ρ = {_rho(rho)}, {len(both)} compared")
    return [("Same order?", "\n".join(lines))] if lines else []


def _cheaper(found: Sequence[Correlation], gains: Sequence[Gain]) -> str:
    """Say how well scores from one gradient order the measured gains, and whether the size of a layer does as well."""
    if not found:
        return "not known: three units at least have to be measured"
    ordered = sorted(found, key=lambda each: -(each.rho or 0.0))
    best, size = next(each for each in ordered if each.score != "size" or len(ordered) == 1), found[-1]
    clear = sum(gain.is_clear for gain in gains)
    lines = [_verdict(best, size)]
    if 2 * clear < len(gains):  # noise has no order that anything could predict
        lines = [f"not known: {clear} of {len(gains)} gains are told from nothing; more --steps, or a longer --eval"]
    inside = [each.within_p for each in found if each.within_p is not None]
    if inside and min(inside) > _CHANCE:
        lines.append("within a module type no score is told from chance")
    lines.append("Spearman's ρ with the gains, 95% interval, p by permutation" + ("; within a type" if inside else ""))
    for each in ordered:
        ends = f" [{each.ends[0]:+.2f}, {each.ends[1]:+.2f}]" if each.ends else ""
        p = "" if each.p is None else f" p {_p(each.p)}"
        within = "" if each.within is None or each.within_p is None else f"; {each.within:+.2f} p {_p(each.within_p)}"
        lines.append(f"{_rho(each.rho)}{ends}{p}{within}: {_SCORES[each.score]}")
    return "\n".join(lines)


def _verdict(best: Correlation, size: Correlation) -> str:
    """Say whether the best score of the gradient is worth having."""
    name = _SCORES[best.score]
    if best.p is None or best.rho is None or best.p > _CHANCE or best.rho <= 0:
        return f"no: no score of one gradient orders the {best.n} better than chance"
    if size.rho is not None and size.rho >= best.rho:
        return f"no: parameters alone order the {best.n} as well as the gradient's best score, {name}"
    word = "yes" if best.rho >= _WELL else "in part"
    return f"{word}: {name} orders the {best.n} with ρ = {best.rho:.2f}, parameters alone with {_rho(size.rho)}"


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.2g}"


def _rho(rho: float | None) -> str:
    return "-" if rho is None else f"{rho:+.2f}"


def _rates(gains: Sequence[Gain], records: Sequence[Sensitivity]) -> str:
    counts = Counter(gain.lr for gain in gains)
    told = "lowest loss of the first seed at " + ", ".join(f"{lr:g} for {n}" for lr, n in sorted(counts.items()))
    low, high = (sum(gain.edge == end for gain in gains) for end in (-1, 1))
    if len({record.lr for record in records if record.lr is not None}) == 1:
        told += "\none rate for all: what suits some better than others cannot be told from what they could gain"
    elif high > low and high == len(gains):
        told += "\nthe highest rate for all: extend --lr upwards"
    elif low == len(gains):
        told += "\nthe lowest rate for all: extend --lr downwards"
    diverged = sum(record.loss is None for record in records)
    return told + (f"\n{diverged} losses are not finite: those runs diverged" if diverged else "")
