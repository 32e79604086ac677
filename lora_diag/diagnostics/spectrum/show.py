"""Terminal output of ``spectrum``: a table by module type or layer, and a summary.

The summary states the rank needed, the resolution by the files, the update before rounding, and the
size of the change; of gradients, how far their spectrum predicts that of an update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from lora_diag.diagnostics.spectrum.record import Spectrum, usual_ranks
from lora_diag.feature import Hint
from lora_diag.metrics.resolution import verdict
from lora_diag.records import Results
from lora_diag.records.names import part_of
from lora_diag.records.vocabulary import NOISE_MARKS, NORMS, metric_of
from lora_diag.rendering.statements import (
    FACTORED,
    Statement,
    describe_estimate,
    describe_lineage,
    describe_resolution,
    is_unrelated,
    make_statement,
    qualify_fractions,
    summarize,
)
from lora_diag.rendering.tables import WIDE, Column, grid_of, grids_table, rows_of
from lora_diag.rendering.text import (
    median_rank,
    number,
    percent,
    quantity,
    short,
    span,
    spark,
    strip,
)

# Fraction of entries left unchanged by rounding from which recover is suggested: at a third the
# recovered checkpoint has the loss of the stored one, at 54 to 56% it keeps 22 points more of the
# gain on one model and 0.7 fewer on another, at 66% 26 more, at 89% three times as much
# (docs/reference/recover.md).
HIDDEN_FRACTION = 0.5


def _needs_recovery(record: Spectrum) -> bool:
    """Return whether rounding undid the change of at least half of a layer's entries, and
    ``recover`` was not run.
    """
    resolution = record.resolution
    hidden_fraction = (resolution.unchanged or 0.0) - (resolution.untouched or 0.0)
    is_rounded = resolution.verdict != "resolved" and hidden_fraction >= HIDDEN_FRACTION
    return is_rounded and record.hidden is None and record.metric == "weights"


def suggest_next(results: Results[Spectrum], values: Mapping[str, Any]) -> Hint | None:
    """Return the next step after no update, NaN or Inf, an adapter, a hidden update, or another
    metric; else None.
    """
    changed = _select_changed(results)
    if not changed or (values["tuned"] is not None and is_unrelated(results)):
        return Hint("inspect {tuned}", "what this checkpoint holds")
    selection = "".join(f" --{name} {{{name}}}" for name in ("layers", "exclude") if values[name])
    if results.non_finite:
        base = "" if values["tuned"] is None else "{base} "
        return Hint(f"spectrum {base}EARLIER_CHECKPOINT{selection}", "this one holds NaN or Inf")
    if any(side.role == "adapter" for side in results.run.inputs):
        if values["tuned"] is None:
            return Hint(
                f"portability {{base}}{selection}", "the update that each serving program applies"
            )
        return Hint(
            "probe outputs {base} {tuned} --eval held_out.txt", "what the adapter does to the loss"
        )
    unresolved = [record for record in changed if record.resolution.verdict == "unresolved"]
    is_unresolved = 2 * len(unresolved) > len(changed)
    is_estimate = any(record.hidden is not None for record in changed)
    if 2 * sum(map(_needs_recovery, changed)) > len(changed) or (
        is_unresolved and not is_estimate and values["tuned"] is not None
    ):
        return Hint(
            f"recover {{base}} {{tuned}}{selection}", "estimates the update before rounding"
        )
    if is_unresolved and values["tuned"] is not None:
        return Hint(
            "probe outputs {base} {tuned} --eval held_out.txt",
            "what is left of the update in the loss",
        )
    if values["output"] or values["tuned"] is None:
        return None
    # Not the rank at 90% of the energy: for the loss it was 50 times too large on a language model
    # (docs/evidence.md).
    return Hint(
        f"probe gain {{base}} {{tuned}}{selection} --data text.txt --eval held_out.txt",
        "where the gain in loss is, and which rank it needs",
    )


def spectrum_table(
    results: Results[Spectrum],
    width: int = 80,
    color: bool = False,
    per: str = "type",
    next_command: str | None = None,
) -> str:
    """Return the table and the summary of a spectrum run.

    Args:
        results: The results.
        width: Width of the terminal in columns.
        color: Whether to use ANSI colours, which shade C(r).
        per: ``type`` for one row per module type (medians over its layers), ``layer`` for one row
            per layer.
        next_command: The suggested next command, printed last; None without one.

    Returns:
        Lines of text, without a trailing newline.
    """
    rows = rows_of(results, per)
    extra = [Column("σ decay", tuple(_draw_spark(group) for _, group in rows), "left", drop=4)]
    if per == "type":
        extra.append(_make_depth_column(rows, usual_ranks(results.run.settings["ranks"])[0], width))
    shown = Spectrum.shown_of(results.run.settings, results.layers)
    grids = [grid_of(shown, rows, per, extra=extra)] if rows else []
    return grids_table(grids, summary_lines(results), width, color, next_command)


def _draw_spark(records: Sequence[Spectrum]) -> str:
    """Return a drawing of the spectrum of the layer with the median stable rank, over all its
    values, as text.
    """
    record = sorted(records, key=lambda record: record.stable_rank or 0)[len(records) // 2]
    return spark(record.s, len(record.s) if record.complete else min(record.shape), 7)


def _make_depth_column(
    rows: Sequence[tuple[str, Sequence[Spectrum]]], rank: int, width: int
) -> Column:
    """Return the column that draws C(r) from the first to the last layer of each row."""
    title, bins = (f"C({rank}) by depth", 24) if width >= WIDE else ("by depth", 8)
    cells = tuple(strip([record.energy[str(rank)] for record in group], bins) for _, group in rows)
    return Column(title, cells, "left", drop=5)


# Minimum median C(r) of a low-rank update, and of a partly low-rank one; r is 16 if measured.
# Conventions: the statement has the number.
LOW_RANK, PARTLY = 0.9, 0.5

# β of all layers together shows the start if it is within 0.5 of 0 and this many errors from 1, as
# that of one layer. Simulated (docs/explanation/mathematics.md): right in all 137 of 172 models of
# 5 or 7 layers that it decided.
ERRORS = 5

METRICS = {
    "data": "energies are of the outputs on the activations' text, Σσ² = E‖ΔW x‖², not of the "
    "weights",
    "kfac": "energies estimate the effect on the loss by K-FAC, Σσ² = ‖G^½·ΔW·C^½‖², not that on "
    "the weights",
}


def summary_lines(results: Results[Spectrum]) -> list[Statement]:
    """Return the statements of the summary: the rank first, then the size of the change."""
    changed = _select_changed(results)
    stacked = any(record.stack is not None for record in changed)
    metric = METRICS.get(metric_of(results), "")
    findings = [make_statement("metric", "Metric", metric, priority=0)]
    related = [record for record in changed if record.lineage != "unrelated"]
    if changed and not related:
        text = "not known: ΔW of unrelated weights is no update, and has no rank to choose"
        findings.append(make_statement("low_rank", "Low rank", text, priority=0))
    elif changed and not stacked and all(record.method == "factored" for record in changed):
        # The rank of an update with known factors is a setting, not a result.
        rank = f"90% of the energy at rank {_describe_rank_at_90(changed)}"
        findings.append(make_statement("rank_used", "Rank used", rank, priority=0))
        findings.append(make_statement("resolved", "Resolution", FACTORED, priority=2))
    elif changed:
        findings += _describe_ranks_needed(related, results.run.settings["ranks"])
    if stacked:
        text = (
            "compare layers by these ranks; the update itself usually needs a higher rank than "
            "its gradients"
        )
        findings.append(make_statement("interpretation", "Interpretation", text))
    else:
        moved = _describe_change(results, changed)
        findings.append(make_statement("moved", "Change", *moved, priority=1 if changed else 0))
        findings.append(describe_lineage(results, priority=1))
    findings.append(
        make_statement("where", "Location", "" if metric else _describe_coverage(results))
    )
    return summarize(results, *findings)


def _select_changed(results: Results[Spectrum]) -> list[Spectrum]:
    """Return the changed matrices: those that adapters usually target, or else the others."""
    changed = [record for record in results if record.fro > 0]
    return [record for record in changed if part_of(record.layer) == "matrices"] or changed


def _describe_change(results: Results[Spectrum], changed: Sequence[Spectrum]) -> list[str]:
    """State ‖ΔW‖/‖W‖, or ‖ΔW‖ without a base, over the matrices of the part that changed, and the
    layer with most.
    """
    if not results.layers:
        return ["no matrix could be measured"]
    if not changed:
        return ["nothing: ΔW is zero in every matrix"]
    part = part_of(changed[0].layer)
    records = [record for record in results if part_of(record.layer) == part]
    scope = quantity(len(records))
    if len(records) < len(results):
        scope += " outside embeddings and head" if part == "matrices" else " of embeddings and head"
    update, weights = NORMS[records[0].metric]
    total = math.hypot(*(record.fro for record in records))
    base = math.hypot(*(record.base_fro or 0.0 for record in records))
    if not base:
        return [f"{update} = {number(total)} over {scope}"]
    lines = [f"{update}/{weights} = {number(total / base)} over {scope}"]
    if len(records) > 1:
        largest = max(records, key=lambda record: record.relative or 0.0)
        lines.append(f"most {number(largest.relative or 0.0)} in {short(largest.layer)}")
    return lines


def _describe_ranks_needed(changed: Sequence[Spectrum], ranks: Sequence[int]) -> list[Statement]:
    """Return the statements on the rank, which is known if the files resolve half of the layers,
    and on rounding.
    """
    readable = [record for record in changed if record.resolution.verdict != "unresolved"]
    low_rank = f"not known: these files resolve {len(readable)} of {quantity(len(changed))}"
    rank_at_90 = ""
    if readable and 2 * len(readable) >= len(changed):
        low_rank = _describe_low_rank(readable, len(changed), ranks)
        rank_at_90 = _describe_rank_at_90(readable)
    return [
        make_statement("low_rank", "Low rank", low_rank, priority=0),
        make_statement("rank_at_90", "Rank at 90%", rank_at_90),
        _describe_resolution(changed),
        make_statement("before_rounding", "Before rounding", *_describe_before_rounding(changed)),
        _describe_start(changed),
    ]


def _describe_low_rank(
    readable: Sequence[Spectrum], changed_count: int, ranks: Sequence[int]
) -> str:
    """State what a common rank keeps at the median and in the worst layer, with a verdict.

    Args:
        readable: The changed layers that the files resolve.
        changed_count: Number of changed layers.
        ranks: The measured ranks.
    """
    shares_by_rank = {rank: _list_shares(rank, readable) for rank in ranks}
    shares_by_rank = {rank: shares for rank, shares in shares_by_rank.items() if shares}
    if not shares_by_rank:
        if all(min(record.shape) <= min(ranks) for record in readable):
            return f"r={min(ranks)} has no meaning: no layer is larger"
        return f"C({min(ranks)}) was not computed; use --top {min(ranks)} or more"
    rank = 16 if 16 in shares_by_rank else max(shares_by_rank)
    shares = shares_by_rank[rank]
    middle = median(shares.values())
    if middle >= LOW_RANK:
        word = "yes"
    elif middle >= PARTLY:
        word = "partly"
    else:
        word = "no"
    text = f"{word}: r={rank} keeps {percent(middle)} of the energy Σσ² in"
    worst = min(shares, key=shares.__getitem__)
    if changed_count == 1:
        return f"{text} {short(worst)}"
    basis = "all" if len(shares) == changed_count else f"{len(shares)} of"
    text += f" the median of {basis} {quantity(changed_count)}"
    if len(shares) > 1:
        text += f", at worst {percent(shares[worst])} in {short(worst)}"
    return text


def _list_shares(rank: int, records: Sequence[Spectrum]) -> dict[str, float]:
    """Return the energy fraction that a rank keeps of each layer that is larger than it; empty if
    one is not known.

    A rank of at least the layer's size keeps any update whole.
    """
    shares = {
        record.layer: record.energy[str(rank)] for record in records if min(record.shape) > rank
    }
    known = {layer: share for layer, share in shares.items() if share is not None}
    return known if len(known) == len(shares) else {}


def _describe_rank_at_90(records: Sequence[Spectrum]) -> str:
    """State the median of the rank at 90% of the energy and, if all are known, its range and the
    possible rank.
    """
    ranks = [record.rank_at["0.9"] for record in records]
    kept = max(len(record.s) for record in records)
    known = [rank for rank in ranks if rank is not None]
    text = f"{median_rank(ranks, kept)} at the median"
    if beyond := len(ranks) - len(known):
        return (
            f"{text}; more than the {kept} values kept in {beyond} of {len(ranks)} layers: "
            "measure without --top"
        )
    text += f", {min(known)} to {max(known)}"
    if all(record.method == "factored" and record.complete for record in records):
        return f"{text}; the adapter has {span((len(record.s) for record in records), ' to ')}"
    return f"{text}; full rank is {span((min(record.shape) for record in records), ' to ')}"


def _describe_resolution(changed: Sequence[Spectrum]) -> Statement:
    """State whether the files resolve the update, and how much of it rounding is expected to make
    up.
    """
    verdicts = [record.resolution.verdict for record in changed]
    shares = [(record.resolution.noise_fro / record.fro) ** 2 for record in changed]
    norm = f"{NORMS[changed[0].metric][0]}²"
    source, remedy = "rounding", "save the fine-tune in float32"
    if 2 * sum((record.resolution.mantissa or (0, 1))[1] == 0 for record in changed) > len(changed):
        source = "rounding to a quantized format"
        remedy = "measure the fine-tune before it was quantized"
    statement = describe_resolution(
        verdicts,
        f"yes: rounding is expected to make up {percent(max(shares))} of {norm} in the layer with "
        "most",
        f"{source} is expected to make up {percent(min(1.0, median(shares)))} of the median {norm}",
        f"ranks beyond the signal rank count noise; {remedy}, or measure the adapter instead of "
        "its merge",
        marks=NOISE_MARKS,
    )
    if statement.level == "note":
        return statement
    if verdicts.count("unresolved") > len(changed) / 2:
        return replace(statement, lead=f"no: {statement.lead}", level="failure")
    word = "partly" if "resolved" in verdicts else "limited"
    return replace(statement, lead=f"{word}: {statement.lead}")


def _describe_before_rounding(changed: Sequence[Spectrum]) -> list[str]:
    """State size and ranks before rounding; empty where they were not requested."""
    tried = [(record, record.hidden) for record in changed if record.hidden is not None]
    if not tried:
        return []
    stored, estimates, lowest, highest = [], [], [], []
    for record, hidden in tried:
        if hidden.status == "recovered":
            stored.append(record.rank_at["0.9"])
            estimates.append((hidden.rank_at_estimate or {}).get("0.9"))
            low, high = (hidden.rank_at_interval or {}).get("0.9", (None, None))
            lowest.append(low)
            highest.append(high)
    ranks = f"{len(stored)} of {quantity(len(tried))} that the files do not resolve have a rank"
    if stored:
        interval = f"{_format_median(lowest)} to {_format_median(highest)}"
        ranks += (
            f": median at 90% {_format_median(estimates)} (interval {interval}); in the files "
            f"{_format_median(stored)}"
        )
    return [*describe_estimate([(hidden, record.fro) for record, hidden in tried]), ranks]


def _format_median(ranks: Sequence[int | None]) -> str:
    """Return the median of the known ranks as text; ``unknown`` if at most half are known."""
    known = [rank for rank in ranks if rank is not None]
    return str(int(median(known))) if 2 * len(known) > len(ranks) else "unknown"


def _describe_start(changed: Sequence[Spectrum]) -> Statement:
    """Warn of layers that contradict each other on the start of training, or state what only all
    together show.
    """
    starts = [
        record.resolution.start for record in changed if record.resolution.base_rounding is not None
    ]
    exact, rounded = starts.count("exact"), starts.count("rounded")
    if exact and rounded:
        text = (
            f"the matrices disagree: {exact} of {quantity(len(changed))} show that training "
            f"started at BASE, {rounded} that BASE is a rounded copy of the start; do not rely on "
            f"ranks of the {exact}. Measure against the BASE that training started from"
        )
        return make_statement("start", "Start", text, level="warning")
    pooled = None if rounded else _pool_base_rounding(changed)
    if pooled is None or not -0.5 < pooled[0] < min(0.5, 1 - ERRORS * pooled[1]):
        return make_statement("start", "Start")
    unknown = [record for record in changed if record.resolution.start == "unknown"]
    cleared = sum(
        record.resolution.verdict != "resolved"
        and _judge_without_base_rounding(record) == "resolved"
        for record in unknown
    )
    text = (
        f"training started at BASE as stored, as all layers together show (β = {pooled[0]:.2f} ± "
        f"{pooled[1]:.2f}; of a "
        f"rounded copy 1): marked ~ or ! but resolved are {cleared} of {quantity(len(changed))}"
    )
    return make_statement("start", "Start", text if cleared else "", priority=2)


def _pool_base_rounding(changed: Sequence[Spectrum]) -> tuple[float, float] | None:
    """Return β of all layers together and its standard error; None for fewer than two layers that
    have one.
    """
    pairs = [record.resolution.base_rounding for record in changed]
    known = [pair for pair in pairs if pair is not None and pair[1] > 0]
    if len(known) < 2:
        return None
    weight = math.fsum(error**-2 for _, error in known)
    beta = math.fsum(beta / error**2 for beta, error in known) / weight
    spread = math.fsum(((value - beta) / error) ** 2 for value, error in known) / (len(known) - 1)
    # Layers that differ by more than their errors have less weight.
    return beta, math.sqrt(max(1.0, spread) / weight)


def _judge_without_base_rounding(record: Spectrum) -> str:
    """Return the verdict without the rounding of BASE; the signal rank can only be larger."""
    resolution = record.resolution
    noise = math.sqrt(max(0.0, resolution.noise_fro**2 - (resolution.base_noise_fro or 0.0) ** 2))
    return verdict(noise, record.fro, resolution.signal_rank or None)


def _describe_coverage(results: Results[Spectrum]) -> str:
    """State which fractions of ‖Δ‖² are in matrices, in vocabulary tables, and in norms and biases;
    empty if Δ = 0.
    """
    norms = {"matrices": 0.0, "vocabulary": 0.0, "vectors": 0.0}
    for record in results:
        part = part_of(record.layer)
        norms[part] = math.hypot(norms[part], record.fro)
    for skipped in results.left_out:
        if skipped.reason == "vector":
            norms["vectors"] = math.hypot(norms["vectors"], skipped.fro or 0.0)
    total = math.hypot(*norms.values())
    if total == 0:
        return ""
    shares = [
        f"{percent((norms[part] / total) ** 2)} {_PARTS[part]}" for part in norms if norms[part]
    ]
    whole = "Σ‖G‖²" if any(record.stack for record in results) else "‖Δ‖²"
    return f"{whole}{qualify_fractions(results.left_out)}: {', '.join(shares)}"


_PARTS = {
    "matrices": "matrices",
    "vocabulary": "embeddings and head",
    "vectors": "norms and biases",
}
