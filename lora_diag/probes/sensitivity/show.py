"""Terminal output of ``probe sensitivity``: gain of each unit alone, and cheaper predictors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lora_diag.probes.sensitivity.gains import (
    Correlation,
    Gain,
    Marginal,
    correlate_scores,
    gains_of,
    marginals_of,
    scores_of,
)
from lora_diag.probes.sensitivity.record import FirstOrder, Sensitivity
from lora_diag.records import Results
from lora_diag.records.base import Shown
from lora_diag.records.probe import set_names
from lora_diag.rendering.losses import describe_diverged, on_set, probe_summary
from lora_diag.rendering.statements import Statement, make_statement
from lora_diag.rendering.tables import Grid, Rows, columns_of
from lora_diag.rendering.text import list_counts, short

# Maximum number of rows of the table in a terminal; the file and the HTML report have all.
MAX_ROWS = 40
# Maximum number of units named in a sentence.
_NAMED = 3
# Singular and plural of the units, by granularity.
_UNITS = {"layer": ("layer", "layers"), "block": ("block", "blocks"), "type": ("module type", "module types")}
# Descriptions of the scores, as in docs/reference/probe-sensitivity.md.
_SCORES = {
    "top": "Σσ_i(G)² to r",
    "fresh": "‖P_T G‖² of a fresh LoRA",
    "adam": "Adam's first step",
    "fro²": "‖G‖²",
    "size": "parameters, no gradient",
}
# Scores from one gradient that the table shows.
_PROXIES = (
    Shown("top", "Σσ² to r", "Σ_{i≤r}σ_i(G)²", terminal=True, drop=5),
    Shown(
        "adam",
        "first step",
        "decrease of the loss in Adam's first step, per unit of learning rate",
        terminal=True,
        drop=2,
    ),
)
# ρ from which a score predicts the order; below it, the statement says "in part". Both print ρ.
STRONG_CORRELATION = 0.7
# Largest p-value of a significant correlation.
_SIGNIFICANT_P = 0.05


def sensitivity_lines(results: Results[Any]) -> list[Statement]:
    """Return the statements: gains by set; first-order scores; higher rank; learning rates."""
    settings, records = results.run.settings, results.whole_of(Sensitivity)
    gains, marginals = _compute_gains(results)
    first = next(iter(gains.values()), [])
    findings = []
    if first:
        proxies = correlate_scores(first, _index_first_order(results))
        findings = [
            make_statement("cheaper", "Proxies", *_describe_proxies(proxies, first)),
            make_statement("more_rank", "More rank", _describe_marginals(next(iter(marginals.values())), settings)),
            make_statement("rates", "Rates", *_describe_rates(first, records), priority=2),
        ]
    return probe_summary(
        results,
        *(_describe_set(name, records, gains[name], settings) for name in gains),
        *findings,
        reading=_READING,
    )


def _index_first_order(results: Results[Any]) -> dict[str, FirstOrder]:
    """Return the first-order records by layer."""
    return {record.layer: record for record in results.whole_of(FirstOrder)}


def _compute_gains(results: Results[Any]) -> tuple[dict[str, list[Gain]], dict[str, list[Marginal]]]:
    """Return by set, the deciding set first: the gains, and those of the higher rank over the lower, if trained."""
    records, settings = results.whole_of(Sensitivity), results.run.settings
    sets, rank, seed = set_names(records), settings["rank"], settings["seed"]
    gains = {name: gains_of(records, name, sets[0], rank, seed) for name in sets}
    if not settings["delta"]:
        return gains, {name: [] for name in sets}
    higher = {name: gains_of(records, name, sets[0], rank + settings["delta"], seed) for name in sets}
    return gains, {name: marginals_of(records, name, gains[name], higher[name]) for name in sets}


_READING = (
    "gains of layers adapted alone do not add up to that of all; results of few steps need not hold for many; "
    "rates were chosen on the first set, so gains there are slightly too high; layers of one model are not "
    "independent, so intervals of ρ are too narrow and p-values too small"
)


def sensitivity_grids(results: Results[Any], per: str = "type") -> list[Grid]:
    """Return the table, one row per unit, the highest gain first; none before one has a finite loss."""
    (gains, marginals), scores, settings = _compute_gains(results), _index_first_order(results), results.run.settings
    rows = sorted(next(iter(gains.values()), []), key=lambda gain: -gain.gain)
    if not rows:
        return []
    rank, delta = settings["rank"], settings["delta"]
    names = [short(row.unit) for row in rows]

    def align(gains_of_units: Sequence[Gain] | Sequence[Marginal]) -> Rows:
        by_unit = {gain.unit: [gain] for gain in gains_of_units}
        return [(name, by_unit.get(row.unit, [])) for name, row in zip(names, rows, strict=True)]

    shown_gain, shown_seeds, *others = Gain.shown
    first_set, *other_sets = gains
    columns = columns_of((shown_gain, shown_seeds), align(rows))
    if delta:
        columns += columns_of([replace(shown_gain, title=f"g({rank}→{rank + delta})")], align(marginals[first_set]))
    for name in other_sets:
        columns += columns_of([replace(shown_gain, title=f"on {short(name)}", drop=4)], align(gains[name]))
    columns += columns_of(others, align(rows))
    score_rows = [(name, [scores_of(row, scores)]) for name, row in zip(names, rows, strict=True)]
    title = f"{_UNITS[settings['per']][0]} alone"
    columns += columns_of(_PROXIES, score_rows)
    return [Grid("", title, tuple(names), tuple(columns), _make_table_note(settings), MAX_ROWS)]


def _make_table_note(settings: dict[str, Any]) -> str:
    """Return the explanation below the table."""
    rank, delta = settings["rank"], settings["delta"]
    suffix = f"; g({rank}→{rank + delta}) is the additional gain of {delta} more ranks" if delta else ""
    return (
        f"Gain is the decrease of the held-out loss, in nats, by a LoRA of r={rank} on this "
        f"{_UNITS[settings['per']][0]} alone, with its standard error over sequences; a gain below two standard "
        f"errors, more for few sequences, is not significant{suffix}. Σσ² to r and first step are predictions from one "
        "gradient at BASE."
    )


def _describe_set(
    name: str, records: Sequence[Sensitivity], gains: Sequence[Gain], settings: dict[str, Any]
) -> Statement:
    base = next(record for record in records if record.set == name and not record.unit)
    if not gains:
        return on_set(name, f"loss {base.loss:.4f} of BASE; no run is finished with a finite loss")
    singular, plural = _UNITS[settings["per"]]
    better = sum(gain.is_clear and gain.gain > 0 for gain in gains)
    worse = sum(gain.is_clear and gain.gain < 0 for gain in gains)
    ordered = sorted(gains, key=lambda gain: -gain.gain)
    best = "highest gain alone" if ordered[0].gain > 0 else f"no {singular} gains alone; best"
    lines = [
        f"{best}: {_list_gains(ordered[:_NAMED])}",
        f"{better} of {len(gains)} {plural if len(gains) > 1 else singular} lower the loss of BASE, {base.loss:.4f}, "
        f"significantly{f', {worse} raise it' if worse else ''}",
    ]
    if len(ordered) > 2 * _NAMED:
        lines.append(f"lowest: {_list_gains(ordered[-_NAMED:])}")
    return on_set(name, *lines, shifted=base.shifted)


def _list_gains(gains: Sequence[Gain] | Sequence[Marginal]) -> str:
    return ", ".join(f"{short(gain.unit)} {gain.gain:+.4f}" for gain in gains)


def _describe_marginals(marginals: Sequence[Marginal], settings: dict[str, Any]) -> str:
    if not marginals:
        return ""
    clear = [marginal for marginal in marginals if marginal.is_clear]
    up = sum(marginal.gain > 0 for marginal in clear)
    ordered = sorted(marginals, key=lambda marginal: -marginal.gain)
    rank = settings["rank"]
    return (
        f"from r={rank} to {rank + settings['delta']}, {up} of {len(marginals)} gain significantly, "
        f"{len(clear) - up} lose as much; highest: {_list_gains(ordered[:_NAMED])}"
    )


def _describe_proxies(proxies: Sequence[Correlation], gains: Sequence[Gain]) -> list[str]:
    """State the rank correlation of first-order scores with the measured gains, and that of the layer size."""
    if not proxies:
        return ["not known; at least three units must be measured"]
    ordered = sorted(proxies, key=lambda correlation: -(correlation.rho or 0.0))
    best = next(correlation for correlation in ordered if correlation.score != "size" or len(ordered) == 1)
    clear = sum(gain.is_clear for gain in gains)
    lines = [_judge_proxy(best, proxies[-1])]
    if 2 * clear < len(gains):  # noise has no order to predict
        lines = [f"not known: {clear} of {len(gains)} gains are significant; use more --steps or a longer --eval"]
    within_p_values = [correlation.within_p for correlation in proxies if correlation.within_p is not None]
    if within_p_values and min(within_p_values) > _SIGNIFICANT_P:
        lines.append("within module types, no score is significantly better than chance")
    within = "; within a type" if within_p_values else ""
    lines.append(f"Spearman's ρ with the gains, 95% interval, p by permutation{within}")
    for proxy in ordered:
        text = _format_rho(proxy.rho)
        text += f" [{proxy.ends[0]:+.2f}, {proxy.ends[1]:+.2f}]" if proxy.ends else ""
        text += "" if proxy.p is None else f" p {_format_p(proxy.p)}"
        if proxy.within is not None and proxy.within_p is not None:
            text += f"; {proxy.within:+.2f} p {_format_p(proxy.within_p)}"
        lines.append(f"{text}: {_SCORES[proxy.score]}")
    return lines


def _judge_proxy(best: Correlation, size: Correlation) -> str:
    """State whether the best score of the gradient ranks the units better than chance and the number of parameters."""
    name = _SCORES[best.score]
    if best.p is None or best.rho is None or best.p > _SIGNIFICANT_P or best.rho <= 0:
        return f"no: no score from one gradient ranks the {best.n} significantly better than chance"
    if size.rho is not None and size.rho >= best.rho:
        return f"no: the number of parameters ranks the {best.n} as well as the best gradient score, {name}"
    word = "yes" if best.rho >= STRONG_CORRELATION else "in part"
    return (
        f"{word}: {name} ranks the {best.n} with ρ = {best.rho:.2f}, the number of parameters with "
        f"{_format_rho(size.rho)}"
    )


def _format_p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.2g}"


def _format_rho(rho: float | None) -> str:
    return "-" if rho is None else f"{rho:+.2f}"


def _describe_rates(gains: Sequence[Gain], records: Sequence[Sensitivity]) -> list[str]:
    counts, tried = Counter(gain.lr for gain in gains), {record.lr for record in records}
    lines = ["lowest loss of the first seed at " + ", ".join(f"{lr:g} for {n}" for lr, n in sorted(counts.items()))]
    edges = list_counts(
        (str(gain.edge) for gain in gains), {"-1": "at the lowest rate tried", "1": "at the highest rate tried"}
    )
    if len(tried - {None}) == 1:
        lines.append("one rate for all: the effect of the rate cannot be separated from the gain")
    elif edges:
        lines.append(f"of {len(gains)}, {' and '.join(edges)}: they may gain more with a wider --lr")
    return [*lines, *describe_diverged(records)]
