"""Advice rules based on probes of parts: layers alone, Fisher, curvature, random subspaces.

They come after rules on losses of the whole model and before those on weights. A rule does not apply without its
probe's records, or if the effect is within the noise of the measurement: standard errors paired by sequence, 95%
intervals of ρ, every seed. Significance over many units is corrected by Bonferroni: 3.7 standard errors for 20 units
and 100 sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lora_diag.metrics.correlation import interval, spearman
from lora_diag.metrics.equivalence import Estimate, freedom, paired_difference
from lora_diag.probes.curvature.record import LossBound
from lora_diag.probes.curvature.summary import LOOSE_RATIO
from lora_diag.probes.fisher.correlations import Correlations, correlations
from lora_diag.probes.fisher.record import Fisher
from lora_diag.probes.intrinsic.lines import Line, lines, reached
from lora_diag.probes.intrinsic.record import Intrinsic
from lora_diag.probes.sensitivity.gains import Gain, gains_of
from lora_diag.probes.sensitivity.record import Sensitivity
from lora_diag.records.probe import main_sets
from lora_diag.rendering.text import two_digits
from lora_diag.reports.budget import reference
from lora_diag.reports.evidence import ARTICLE, DEFAULT_RANK, Evidence, Source
from lora_diag.reports.findings import named, percent
from lora_diag.reports.step import Advice, command, format_ranks
from lora_diag.reports.worth import of, rejected_options

# Joint significance level of the units of a run.
LEVEL = 0.05
# A unit with a significant gain below this fraction of the best significant gain is skipped.
NEGLIGIBLE = 0.1
# Gains that differ by less than this factor get one rank.
UNEVEN_FACTOR = 2.0
# Minimum number of units or layers for an order.
MIN_COUNT = 5
# Upper confidence limit of ρ with the Fisher information below which energy has another order.
DIFFERENT_ORDER = 0.7


@dataclass(frozen=True, slots=True)
class Gains:
    """Significant gains of the units of one run of ``probe sensitivity``.

    Args:
        source: The run.
        name: The set that decides.
        known: Every unit with an error, the highest gain first.
        clear: Units with a significant gain.
        idle: Units with at most a tenth of the best significant gain.
        uneven: Whether the highest gain exceeds the lowest significantly, and by a relevant factor.
        errors: Number of standard errors of a significant gain.
    """

    source: Source
    name: str
    known: tuple[Gain, ...]
    clear: tuple[Gain, ...]
    idle: tuple[Gain, ...]
    uneven: bool
    errors: float


def place_by_gain(evidence: Evidence) -> Advice | None:
    """Distribute rank by the gain of each unit alone, if some gains are small or they differ."""
    for gains in _find_significant_gains(evidence):
        if not gains.idle and not gains.uneven:
            continue
        best, lowest = gains.known[0], (gains.idle or gains.known)[-1]
        largest = named([gain.unit for gain in (gains.clear if gains.idle else gains.known[:3])])
        smallest = f", little in {named([gain.unit for gain in gains.idle])}" if gains.idle else ""
        argv, params, budget_text = _make_allocate_command(evidence, gains.source)
        return Advice(
            "place by gain",
            f"{budget_text} by what each gains alone: most in {largest}{smallest}",
            f"Adapted alone at r={gains.source.results.run.settings['rank']}, {best.unit.removesuffix('.weight')} "
            f"lowers the loss on {gains.name} by {_format_gain(best)} nats, {lowest.unit.removesuffix('.weight')} by "
            f"{_format_gain(lowest)}; {len(gains.clear)} of {len(gains.known)} gains are significant, "
            f"{len(gains.idle)} are at most a tenth of the best. The gain of a unit alone is not its contribution "
            "to the joint gain.",
            f"some gain ≤ {NEGLIGIBLE:g} of the highest, or the highest ≥ {UNEVEN_FACTOR:g} times the lowest, beyond "
            f"{gains.errors:.1f} paired standard errors (95% over {len(gains.known)} units); {MIN_COUNT} units or more",
            f"{ARTICLE}, diagnostic 2 (layer sensitivity); Cochran 1977, section 2.11; Bonferroni over the units",
            argv,
            params=params,
            layers=tuple(layer for gain in gains.clear for layer in gain.layers),
        )
    return None


def negligible_layers(evidence: Evidence) -> set[str]:
    """Return the layers with a negligible gain alone, which no step adapts."""
    return {layer for gains in _find_significant_gains(evidence) for gain in gains.idle for layer in gain.layers}


def _find_significant_gains(evidence: Evidence) -> Iterator[Gains]:
    """Yield the gains of runs over all layers, unless not even the best unit has a significant gain."""
    for source, records in _find_runs(evidence, Sensitivity):
        settings = source.results.run.settings
        if settings.get("layers") or settings.get("exclude"):
            continue  # a selection of layers would leave the others without a rank
        name, gains = _compute_gains(source, records)
        known = sorted((gain for gain in gains if gain.error is not None), key=lambda gain: -gain.gain)
        if len(known) < MIN_COUNT:
            continue
        sequences = len(_find_base(records, name).predictions)
        errors = Estimate(0.0, 1.0, freedom(sequences)).half(1 - LEVEL / 2 / len(known))
        floor = known[0].gain - errors * (known[0].error or 0.0)
        if floor <= 0:
            continue
        clear = tuple(gain for gain in known if gain.gain > errors * (gain.error or 0.0))
        idle = tuple(gain for gain in known if gain.gain + errors * (gain.error or 0.0) <= NEGLIGIBLE * floor)
        uneven = _is_uneven(records, name, known, errors)
        yield Gains(source, name, tuple(known), clear, idle, uneven, errors)


def fit_rank(evidence: Evidence) -> Advice | None:
    """Compare the adapter's rank with the smallest LoRA that came close to full fine-tuning, or one that did not."""
    chosen = sorted({record.rank for records in evidence.adapted.values() for record in records if record.rank})
    if not chosen:
        return None
    for source, records in _find_runs(evidence, Intrinsic):
        settings = source.results.run.settings
        name, threshold = main_sets(records)[0], settings["share"]
        all_lines = lines(records, name, records[0].set, settings["seed"])
        full = next((line for line in all_lines if line.subject == "full"), None)
        repeated = [line for line in all_lines if line.subject == "lora" and len(line.shares) > 1]
        if full is None or full.edge or not full.shares:
            continue
        answer = reached(all_lines, "lora", threshold)
        insufficient = [line for line in repeated if (line.size or 0) >= chosen[-1] and max(line.shares) < threshold]
        dimension = _describe_dimension(all_lines, threshold)
        line = answer.line
        if (
            line is not None
            and line in repeated
            and answer.certain
            and not answer.missed
            and (line.size or 0) < chosen[0]
        ):
            action = f"Try r={line.size} instead of r={_format_range(chosen)}"
            reason = (
                f"On {name}, r={line.size} reached {_format_shares(line)} of full fine-tuning's gain with every seed"
            )
            candidates = [line.size or 0, chosen[0]]
        elif insufficient and not any(item.edge for item in insufficient) and line is None:
            higher = [2 * (insufficient[-1].size or 0), 4 * (insufficient[-1].size or 0)]
            action = (
                f"Expect r={_format_range(chosen)} to remain below full fine-tuning: also try {format_ranks(higher)}"
            )
            reason = (
                f"On {name}, even r={insufficient[-1].size} reached {_format_shares(insufficient[-1])} of full "
                "fine-tuning's gain"
            )
            candidates = [chosen[-1], *higher]
        else:
            continue
        if candidates[0] <= rejected_options(evidence).trained or (
            line is None and rejected_options(evidence).more_rank
        ):
            continue  # losses of the page take precedence
        return Advice(
            "fit the rank",
            action,
            f"{reason}; the adapters here have r={_format_range(chosen)}.{dimension} More steps may need more.",
            f"the smallest LoRA with ≥ {percent(threshold)} of full fine-tuning's gain at every seed has a lower rank "
            "than the adapter; or no LoRA of its rank or more reaches that at any seed, at a rate inside the grid",
            "Aghajanyan et al. 2020 (arXiv 2012.13255), d for 90% of full fine-tuning, carried over to ranks",
            command(
                "probe sweep",
                source.path_of("base"),
                data=source.path_of("data", "TEXT"),
                eval=source.path_of("eval", "HELD_OUT_TEXT"),
                ranks=candidates,
                o="sweep.jsonl",
            ),
            ranks=tuple(candidates),
        )
    return None


def prefer_fisher(evidence: Evidence) -> Advice | None:
    """Recommend ranks by Fisher information if it orders layers by measured cost and energy does not; or to measure."""
    for source, records in _find_runs(evidence, Fisher):
        ranks: list[int] = source.results.run.settings["ranks"]
        rank = DEFAULT_RANK if DEFAULT_RANK in ranks else ranks[0]
        chosen = next((at_rank for at_rank in correlations(records, ranks) if at_rank.rank == rank), None)
        step = (
            _advise_measurement(source, records, rank) if chosen is None else _advise_fisher(evidence, source, chosen)
        )
        if step is not None:
            return step
    return None


def _advise_fisher(evidence: Evidence, source: Source, chosen: Correlations) -> Advice | None:
    """Apply if the measured cost has the order of the Fisher information, and significantly not that of energy."""
    fisher, energy = (_bound_correlation(chosen.kl[name][0], chosen.n) for name in ("Fisher", "weight energy"))
    if fisher is None or energy is None or fisher[1] <= energy[2]:
        return None
    argv, params, budget_text = _make_allocate_command(evidence, source)
    return Advice(
        "rank by Fisher",
        f"{budget_text} by the Fisher information of the discarded part instead of energy",
        f"Spearman's ρ with the measured cost of truncating each of {chosen.n} layers to r={chosen.rank} is "
        f"{_format_interval(fisher)} for the Fisher information of the discarded part and {_format_interval(energy)} "
        "for its energy Σσ².",
        "95% interval of ρ of the Fisher information above that of energy",
        "SVD-LLM (arXiv 2403.07378) and Fisher-weighted SVD (arXiv 2207.00112); measured, Spearman 1904",
        argv,
        params=params,
    )


def _advise_measurement(source: Source, records: Sequence[Fisher], rank: int) -> Advice | None:
    """Without a measured cost, but with significantly different orders: recommend the measurement."""
    pairs = [(record.weight[str(rank)], record.at(rank)) for record in records if record.at(rank) > 0]
    rho = (
        _bound_correlation(spearman([first for first, _ in pairs], [second for _, second in pairs]), len(pairs))
        if pairs
        else None
    )
    if rho is None or rho[2] >= DIFFERENT_ORDER:
        return None
    base, tuned, data = source.path_of("base"), source.path_of("tuned"), source.path_of("data", "TEXT")
    return Advice(
        "rank by Fisher",
        "Measure whether energy or Fisher information predicts the cost of truncation, before choosing ranks by energy",
        f"They order {len(pairs)} layers differently: Spearman's ρ of the two at r={rank} is {_format_interval(rho)}.",
        f"95% interval of ρ between energy and Fisher information of the part beyond r={rank} is below "
        f"{DIFFERENT_ORDER}; no cost measured",
        "Fisher-weighted SVD (arXiv 2207.00112); Spearman 1904",
        command("probe fisher", base, tuned, data=data, eval="HELD_OUT_TEXT", ranks=(rank,), o="fisher-2.jsonl"),
        ranks=(rank,),
    )


def flag_loose_bound(evidence: Evidence) -> Advice | None:
    """Advise against ranks from a loose bound, unless the loss of truncations is measured."""
    if any(of(evidence, "truncation")):
        return None
    for source, records in _find_runs(evidence, LossBound):
        whole = [r for r in records if r.along == 1 and r.gap_half is not None and r.gap > r.gap_half]
        ratios = [record.upper / record.gap for record in whole]
        if len(ratios) < 2 or min(ratios) < LOOSE_RATIO:
            continue
        base, tuned, text = source.path_of("base"), source.path_of("tuned"), source.path_of("eval", "HELD_OUT_TEXT")
        whole_ranks = tuple(record.rank for record in whole)
        return Advice(
            "loose loss bound",
            "Do not choose a rank by the loss bound (λ/2)Σσ²: measure the loss of the update truncated to "
            f"{format_ranks(whole_ranks)}",
            f"On {whole[0].set} the bound is {min(ratios):.0f} to {max(ratios):.0f} times the measured gap at "
            f"{', '.join(f'r={record.rank}' for record in whole)}.",
            f"bound ≥ {LOOSE_RATIO:.0f} times the gap at two ranks or more with a significant gap; "
            "no truncation measured",
            f"{ARTICLE}, loss bound (L/2)Σσ²; Ghorbani et al. 2019 (arXiv 1901.10159): few eigenvalues are large",
            command("probe truncation", base, tuned, eval=text, ranks=whole_ranks, o="truncation.jsonl"),
            ranks=whole_ranks,
        )
    return None


PROBE_RULES = (place_by_gain, fit_rank, prefer_fisher, flag_loose_bound)


def _find_runs(evidence: Evidence, kind: type[Any]) -> Iterator[tuple[Source, list[Any]]]:
    for source in evidence.sources:
        records = [record for record in source.results.whole if isinstance(record, kind)]
        if records:
            yield source, records


def _compute_gains(source: Source, records: Sequence[Sensitivity]) -> tuple[str, list[Gain]]:
    settings, name = source.results.run.settings, main_sets(records)[0]
    return name, gains_of(records, name, records[0].set, settings["rank"], settings["seed"])


def _find_base(records: Sequence[Sensitivity], name: str) -> Sensitivity:
    return next(record for record in records if not record.unit and record.set == name)


def _is_uneven(records: Sequence[Sensitivity], name: str, known: Sequence[Gain], errors: float) -> bool:
    """Return whether the highest gain exceeds the lowest significantly and by a relevant factor, by sequence."""
    best, worst = known[0], known[-1]
    gap, error = paired_difference(worst.nll, best.nll, _find_base(records, name).predictions)
    return error is not None and gap > errors * error and best.gain >= UNEVEN_FACTOR * worst.gain


def _format_gain(gain: Gain) -> str:
    return f"{gain.gain:+.4f} ± {two_digits(gain.error or 0.0)}"


def _describe_dimension(all_lines: Sequence[Line], share: float) -> str:
    line = reached(all_lines, "subspace", share).line
    return "" if line is None else f" {line.size} random directions reached the same."


def _format_shares(line: Line) -> str:
    return f"{percent(min(line.shares))} to {percent(max(line.shares))}"


def _format_range(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _bound_correlation(rho: float | None, n: int) -> tuple[float, float, float] | None:
    """Return ρ and its interval; None if unknown.

    For ρ = 1 the interval is that of a ρ reduced by half a swap of neighbours, since few layers in order are not
    certain.
    """
    if rho is None or n < MIN_COUNT:
        return None
    ends = interval(math.copysign(min(abs(rho), 1 - 6 / (n * (n * n - 1))), rho), n)
    return None if ends is None else (rho, *ends)


def _format_interval(rho: tuple[float, float, float]) -> str:
    return f"{rho[0]:.2f} [{rho[1]:.2f}, {rho[2]:.2f}]"


def _make_allocate_command(evidence: Evidence, weights: Source) -> tuple[tuple[str, ...], int | None, str]:
    """Return the command that spends a budget by these weights, the budget, and both as text.

    Without a spectrum, return the command that measures one.
    """
    if evidence.update is None:
        base, tuned = weights.path_of("base"), evidence.path_of("tuned")
        return command("spectrum", base, tuned, o="spectrum.jsonl"), None, "Measure the spectrum, then allocate ranks"
    params, words = reference(evidence)
    argv = command("allocate", evidence.update.name, params=params, layer_weights=weights.name, o="adapter_config.json")
    return argv, params, f"Allocate {params:,} trainable parameters, {words},"
