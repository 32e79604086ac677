"""Terminal output of ``probe sensitivity``: gain of each unit alone, and cheaper predictors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lora_diag.probes.sensitivity.gains import (
    Correlation,
    Gain,
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
from lora_diag.rendering.tables import Grid, Rows, columns_of, title_of
from lora_diag.rendering.text import format_shown, quantity, short

# Maximum number of rows of the table in a terminal; the file and the HTML report have all.
MAX_ROWS = 40
# Maximum number of units named in a sentence.
_NAMED = 3
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
        "Decrease of the loss in Adam's first step, per unit of learning rate",
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
    first = Gain.undivided(next(iter(gains.values()), []))
    proxies = _describe_proxies(first, _index_first_order(results))
    return probe_summary(
        results,
        *(_describe_set(name, records, gains[name], settings) for name in gains),
        make_statement("cheaper", "Proxies", *proxies),
        make_statement("more_rank", "More rank", _describe_marginals(marginals, settings)),
        make_statement("rates", "Rates", *_describe_rates(first, records)),
        reading=_READING,
    )


def _index_first_order(results: Results[Any]) -> dict[str, FirstOrder]:
    """Return the first-order records by layer."""
    return {record.layer: record for record in results.whole_of(FirstOrder)}


def _compute_gains(results: Results[Any]) -> tuple[dict[str, list[Gain]], list[Gain]]:
    """Return the gains by set, the deciding set first; and on that set those of the higher rank, if
    trained.
    """
    records, settings = results.whole_of(Sensitivity), results.run.settings
    sets, rank, seed = set_names(records), settings["rank"], settings["seed"]
    gains = {name: gains_of(records, name, sets[0], rank, seed) for name in sets}
    if not settings["delta"] or not sets:
        return gains, []
    higher = gains_of(records, sets[0], sets[0], rank + settings["delta"], seed)
    return gains, marginals_of(records, sets[0], gains[sets[0]], higher)


_READING = (
    "gains of layers adapted alone do not add up to that of all; results of few steps need not "
    "hold for many; rates were chosen on the first set, so gains there are slightly too high; "
    "layers of one model are not independent, so intervals of ρ are too narrow and p-values too "
    "small"
)


def sensitivity_grids(results: Results[Any], per: str = "type") -> list[Grid]:
    """Return the table, one row per unit, the highest gain first; none before one has a finite
    loss.
    """
    gains, marginals = _compute_gains(results)
    settings = results.run.settings
    rows = sorted(next(iter(gains.values()), []), key=lambda gain: -gain.gain)
    if not rows:
        return []
    rank, delta = settings["rank"], settings["delta"]
    names = [short(row.unit) for row in rows]

    def align(gains_of_units: Sequence[Gain]) -> Rows:
        by_unit = {gain.unit: [gain] for gain in gains_of_units}
        return [(name, by_unit.get(row.unit, [])) for name, row in zip(names, rows, strict=True)]

    shown_gain, shown_seeds, *others = Gain.shown
    columns = columns_of((shown_gain, shown_seeds), align(rows))
    if delta:
        marginal = replace(shown_gain, title=f"g({rank}→{rank + delta})")
        columns += columns_of([marginal], align(marginals))
    for name in [*gains][1:]:
        on_other = replace(shown_gain, title=f"on {short(name)}", drop=4)
        columns += columns_of([on_other], align(gains[name]))
    columns += columns_of(others, align(rows))
    scores = _index_first_order(results)
    score_rows = [(name, [scores_of(row, scores)]) for name, row in zip(names, rows, strict=True)]
    title = f"{title_of(settings['by'])} alone"
    columns += columns_of(_PROXIES, score_rows)
    return [Grid("", title, tuple(names), tuple(columns), _make_table_note(settings), MAX_ROWS)]


def _make_table_note(settings: dict[str, Any]) -> str:
    """Return the explanation below the table."""
    rank, delta = settings["rank"], settings["delta"]
    note = (
        f"Gain is the decrease of the held-out loss, in nats, by a LoRA of r={rank} on this "
        f"{title_of(settings['by'])} alone, with its standard error over sequences; a "
        "gain below two standard errors, more for few sequences, is not significant"
    )
    if delta:
        note += f"; g({rank}→{rank + delta}) is the additional gain of {delta} more ranks"
    return f"{note}. Σσ² to r and first step are predictions from one gradient at BASE."


def _describe_set(
    name: str, records: Sequence[Sensitivity], gains: Sequence[Gain], settings: dict[str, Any]
) -> Statement:
    base = next(record for record in records if record.set == name and not record.unit)
    if not gains:
        return on_set(name, f"loss {base.loss:.4f} of BASE; no run is finished with a finite loss")
    unit, gains = title_of(settings["by"]), Gain.undivided(gains)
    better, worse = _count_clear(gains)
    highest = sorted(gains, key=lambda gain: -gain.gain)[:_NAMED]
    named = ", ".join(f"{short(gain.unit)} {gain.gain:+.4f}" for gain in highest)
    lead = "highest gain alone" if highest[0].gain > 0 else f"no {unit} gains alone; best"
    significant = (
        f"{better} of {quantity(len(gains), unit)} lower the loss of BASE, {base.loss:.4f}, "
        "significantly"
    )
    if worse:
        significant += f", {worse} raise it"
    return on_set(name, f"{lead}: {named}", significant, shifted=base.shifted)


def _count_clear(gains: Sequence[Gain]) -> tuple[int, int]:
    """Return the number of significant gains, and of significant losses."""
    clear = [gain.gain > 0 for gain in gains if gain.is_clear]
    return clear.count(True), clear.count(False)


def _describe_marginals(marginals: Sequence[Gain], settings: dict[str, Any]) -> str:
    if not marginals:
        return ""
    up, down = _count_clear(marginals)
    rank, best = settings["rank"], max(marginals, key=lambda marginal: marginal.gain)
    return (
        f"from r={rank} to {rank + settings['delta']}, {up} of {len(marginals)} gain "
        f"significantly, {down} lose as much; highest: {short(best.unit)} {best.gain:+.4f}"
    )


def _describe_proxies(gains: Sequence[Gain], first_orders: dict[str, FirstOrder]) -> Iterator[str]:
    """Yield the rank correlation of first-order scores with the measured gains, and that of the
    layer size.
    """
    proxies = correlate_scores(gains, first_orders)
    if not proxies:
        if gains:
            yield "not known; at least three units must be measured"
        return
    ordered = sorted(proxies, key=lambda correlation: -(correlation.rho or 0.0))
    clear = sum(gain.is_clear for gain in gains)
    if 2 * clear < len(gains):  # noise has no order to predict
        yield (
            f"not known: {clear} of {len(gains)} gains are significant; use more --steps or a "
            "longer --eval"
        )
    else:
        of_gradient = (correlation for correlation in ordered if correlation.score != "size")
        yield _judge_proxy(next(of_gradient, ordered[0]), proxies[-1])
    within = [proxy.within_p for proxy in proxies if proxy.within_p is not None]
    legend = "Spearman's ρ with the gains, 95% interval, p by permutation"
    if within:
        legend += "; within a type"
        if min(within) > _SIGNIFICANT_P:
            yield "within module types, no score is significantly better than chance"
    yield legend
    for proxy in ordered:
        text = _format_rho(proxy.rho, proxy.p, proxy.ends)
        if proxy.within_p is not None:
            text += f"; {_format_rho(proxy.within, proxy.within_p)}"
        yield f"{text}: {_SCORES[proxy.score]}"


def _judge_proxy(best: Correlation, size: Correlation) -> str:
    """State whether the best score of the gradient ranks the units better than chance and the
    number of parameters.
    """
    if best.p is None or best.rho is None or best.p > _SIGNIFICANT_P or best.rho <= 0:
        return f"no: no score from one gradient ranks the {best.n} significantly better than chance"
    score = _SCORES[best.score]
    if size.rho is not None and size.rho >= best.rho:
        return (
            f"no: the number of parameters ranks the {best.n} as well as the best gradient score, "
            f"{score}"
        )
    answer = "yes" if best.rho >= STRONG_CORRELATION else "in part"
    return (
        f"{answer}: {score} ranks the {best.n} with ρ = {best.rho:.2f}, the number of parameters "
        f"with {_format_rho(size.rho)}"
    )


def _format_rho(
    rho: float | None, p: float | None = None, ends: tuple[float, float] | None = None
) -> str:
    """Return a rank correlation with its interval and its p-value, as far as they are known."""
    text = format_shown(rho, "{:+.2f}".format)
    if ends:
        text += f" [{ends[0]:+.2f}, {ends[1]:+.2f}]"
    if p is not None:
        text += " p <0.001" if p < 0.001 else f" p {p:.2g}"
    return text


def _describe_rates(gains: Sequence[Gain], records: Sequence[Sensitivity]) -> list[str]:
    lines = describe_diverged(records)
    if at_edge := sum(gain.edge != 0 for gain in gains):
        tried = f"{at_edge} of {len(gains)} at the edge of the rates tried"
        lines.insert(0, f"{tried}: they may gain more with a wider --lr")
    return lines
