"""Terminal output of ``spectrum``: a table by module type or layer, and a summary.

The summary states the rank needed, the resolution by the files, the update before rounding, and the size of the change;
of gradients, how far their spectrum predicts that of an update.
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
from lora_diag.records.vocabulary import NOISE_MARKS, NORMS
from lora_diag.rendering.statements import (
    FACTORED,
    REASONS,
    Statement,
    describe_estimate,
    describe_resolution,
    make_statement,
    qualify_fractions,
    subject,
    summarize,
)
from lora_diag.rendering.tables import WIDE, Column, grid_of, grids_table, rows_of
from lora_diag.rendering.text import (
    count,
    list_counts,
    median_rank,
    number,
    percent,
    quantity,
    safe,
    short,
    span,
    spark,
    strip,
)

# Fraction of entries left unchanged by rounding from which recover is suggested: at a third the recovered checkpoint
# has the loss of the stored one, at 65% it keeps 3 points more of the gain, at 89% twice as much (see docs/reference).
HIDDEN_FRACTION = 0.5

_STATUSES = {"recovered": "recovered", "size_only": "size only", "not_hidden": "not hidden", "refused": "refused"}


def _needs_recovery(record: Spectrum) -> bool:
    """Return whether rounding undid the change of at least half of a layer's entries, and ``recover`` was not run."""
    resolution = record.resolution
    hidden_fraction = (resolution.unchanged or 0.0) - (resolution.untouched or 0.0)
    is_rounded = resolution.verdict != "resolved" and hidden_fraction >= HIDDEN_FRACTION
    return is_rounded and record.hidden is None and record.metric == "weights"


def suggest_next(results: Results[Spectrum], values: Mapping[str, Any]) -> Hint | None:
    """Return the next step after no update, NaN or Inf, an adapter, a hidden update, or another metric; else None."""
    changed = _select_changed(results)
    if not changed:
        return Hint("inspect {tuned}", "what this checkpoint holds")
    if results.non_finite:
        base = "" if values["tuned"] is None else "{base} "
        return Hint(f"spectrum {base}EARLIER_CHECKPOINT", "this one holds NaN or Inf")
    if any(side.role == "adapter" for side in results.run.inputs):
        if values["tuned"] is None:
            return Hint("portability {base}", "the update that each serving program applies")
        return Hint("probe outputs {base} {tuned} --eval held_out.txt", "what the adapter does to the loss")
    if 2 * sum(map(_needs_recovery, changed)) > len(changed):
        return Hint("recover {base} {tuned}", "estimates the update before rounding")
    if values["activations"] and not values["output"]:
        metric = "--activations {activations}" + (" --kfac" if values["kfac"] else "")
        return Hint(f"extract {{base}} {{tuned}} {metric} --energy 0.9 -o adapter/", "an adapter without training")
    return None


def _describe_before_rounding(changed: Sequence[Spectrum]) -> list[str]:
    """State size, ranks and directions before rounding; empty where they were not requested."""
    tried = [(record, record.hidden) for record in changed if record.hidden is not None]
    if not tried:
        return []
    counts = list_counts((hidden.status for _, hidden in tried), _STATUSES)
    lines = [*describe_estimate([(hidden, record.fro) for record, hidden in tried])]
    lines.append(f"{', '.join(counts)} of {quantity(len(tried))} that the files do not resolve")
    if recovered := [(record, hidden) for record, hidden in tried if hidden.status == "recovered"]:
        estimates = [(hidden.rank_at_estimate or {}).get("0.9") for _, hidden in recovered]
        intervals = [(hidden.rank_at_interval or {}).get("0.9", (None, None)) for _, hidden in recovered]
        lowest, highest = (_format_median(ranks) for ranks in zip(*intervals, strict=True))
        in_files = _format_median([record.rank_at["0.9"] for record, _ in recovered])
        lines.append(
            f"median rank at 90%: {_format_median(estimates)} (interval {lowest} to {highest}); in the files {in_files}"
        )
    return lines


def _format_median(ranks: Sequence[int | None]) -> str:
    """Return the median of the known ranks as text; ``unknown`` if at most half are known."""
    known = [rank for rank in ranks if rank is not None]
    return str(int(median(known))) if 2 * len(known) > len(ranks) else "unknown"


def spectrum_table(
    results: Results[Spectrum], width: int = 80, color: bool = False, per: str = "type", next_command: str | None = None
) -> str:
    """Return the table and the summary of a spectrum run.

    Args:
        results: The results.
        width: Width of the terminal in columns; the layout adapts from 80 to 140.
        color: Whether to shade C(r) with ANSI colours.
        per: ``type`` for one row per module type (medians over its layers), ``layer`` for one row per layer.
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
    """Return a drawing of the spectrum of the layer with the median stable rank, over all its values, as text."""
    record = sorted(records, key=lambda record: record.stable_rank or 0)[len(records) // 2]
    return spark(record.s, len(record.s) if record.complete else min(record.shape), 7)


def _make_depth_column(rows: Sequence[tuple[str, Sequence[Spectrum]]], rank: int, width: int) -> Column:
    """Return the column that draws C(r) from the first to the last layer of each row."""
    title, bins = (f"C({rank}) by depth", 24) if width >= WIDE else ("by depth", 8)
    cells = tuple(strip([record.energy[str(rank)] for record in group], bins) for _, group in rows)
    return Column(title, cells, "left", drop=5)


# Minimum median C(r) of a low-rank update, and of a partly low-rank one; r is 16 if measured. Conventions: the
# statement has the number.
LOW_RANK, PARTLY = 0.9, 0.5

# Minimum fraction of unchanged entries of a sparse update.
SPARSE = 0.5

# β of all layers together shows the start if it is within 0.5 of 0 and this many errors from 1, as that of one layer.
# Simulated (docs/explanation/mathematics.md): right in all 137 of 172 models of 5 or 7 layers that it decided.
ERRORS = 5


GRADIENTS = "compare layers by these ranks; the update itself usually needs a higher rank than its gradients"

METRICS = {
    "data": "energies are of the outputs on the activations' text, Σσ² = E‖ΔW x‖², not of the weights",
    "kfac": "energies estimate the effect on the loss by K-FAC, Σσ² = ‖G^½·ΔW·C^½‖², not that on the weights",
}


def summary_lines(results: Results[Spectrum]) -> list[Statement]:
    """Return the statements of the summary: the rank first, then the size of the change."""
    changed, ranks = _select_changed(results), results.run.settings["ranks"]
    stacked = any(record.stack is not None for record in changed)
    metric = METRICS.get(next((record.metric for record in results), "weights"), "")
    findings: list[Statement] = []
    if changed and not stacked and all(record.method == "factored" for record in changed):
        # The rank of an update with known factors is a setting, not a result.
        findings = _describe_ranks_used(changed)
    elif changed:
        # Gradients are not differences of rounded weights, so they are always resolved.
        findings = [
            statement
            for statement in _describe_ranks_needed(changed, ranks)
            if not stacked or statement.key != "resolved" or statement.level != "note"
        ]
    if stacked:
        findings.append(make_statement("interpretation", "Interpretation", GRADIENTS))
    else:
        moved = _describe_changes(results, changed)
        findings.append(make_statement("moved", "Change", *moved, priority=1 if changed else 0))
    coverage = "" if metric else _describe_coverage(results)
    findings = [make_statement("metric", "Metric", metric, priority=0), *findings]
    findings.append(make_statement("where", "Location", coverage))
    return summarize(results, *findings, extra=[_describe_measured(results)] if len(results) else [])


def _select_changed(results: Results[Spectrum]) -> list[Spectrum]:
    """Return the changed matrices: those that adapters usually target, or else the others."""
    changed = [record for record in results if record.fro > 0]
    return [record for record in changed if part_of(record.layer) == "matrices"] or changed


def _describe_measured(results: Results[Spectrum]) -> str:
    """State the number of measured matrices, of their entries, and their dtypes."""
    entries = sum(math.prod(record.shape) for record in results)
    vocabulary = sum(part_of(record.layer) == "vocabulary" for record in results)
    tables = f" ({vocabulary} of them embeddings or head)" if vocabulary else ""
    dtypes = sorted({"/".join(dict.fromkeys(filter(None, record.dtypes))) for record in results})
    return f"{quantity(len(results))}{tables}, {count(entries)} entries, {', '.join(dtypes)}"


def _describe_changes(results: Results[Spectrum], changed: Sequence[Spectrum]) -> list[str]:
    """State how far the weights changed, and which of them did."""
    inside = [record for record in results if part_of(record.layer) == "matrices"]
    if not results.layers:
        why = ", ".join(list_counts((skipped.reason for skipped in results.left_out), REASONS))
        return [f"no matrix could be measured{f': {why}' if why else ''}"]
    if not changed:
        if any(skipped.reason == "vector" and skipped.fro for skipped in results.left_out):
            return ["only norms and biases: ΔW is zero in every matrix"]
        hint = f" Check that {safe(subject(results.run))} is the intended checkpoint." if results.run.inputs else ""
        return [f"nothing: ΔW is zero in every matrix.{hint}"]
    if part_of(changed[0].layer) == "vocabulary":
        outside_note = f"; ΔW is zero in the {quantity(len(inside))} outside them" if inside else ""
        return [
            f"only embeddings and head{outside_note}",
            *_describe_relative_change(changed, f"over the {quantity(len(changed))} that changed"),
        ]
    outside = " outside embeddings and head" if len(inside) < len(results) else ""
    article = "the" if outside or len(inside) == 1 else "all"
    return _describe_relative_change(inside, f"over {article} {quantity(len(inside))}{outside}")


def _describe_relative_change(records: Sequence[Spectrum], extent: str) -> list[str]:
    """State ‖ΔW‖/‖W‖ of several layers together, or ‖ΔW‖ without a base, and the layer with most.

    Args:
        records: The layers.
        extent: A phrase that says over which layers.
    """
    total = math.hypot(*(record.fro for record in records))
    ratios = {record.layer: ratio for record in records if (ratio := record.relative) is not None}
    update, weights = NORMS[records[0].metric]
    if not ratios:
        return [f"{update} = {number(total)} {extent}"]
    base = math.hypot(*(record.base_fro or 0.0 for record in records))
    lines = [f"{update}/{weights} = {number(total / base)} {extent}"]
    if len(ratios) > 1:
        largest = max(ratios, key=ratios.__getitem__)
        lines.append(f"most {number(ratios[largest])} in {short(largest)}")
    return lines


def _describe_ranks_used(records: Sequence[Spectrum]) -> list[Statement]:
    """State that the factors resolve an adapter's update, and how much of its rank is used."""
    ranks = [record.rank_at["0.9"] for record in records]
    known = [rank for rank in ranks if rank is not None]
    kept = [len(record.s) for record in records]
    middle_rank = median_rank(ranks, max(kept))
    if all(record.complete for record in records):
        used = f"{middle_rank} of {span(kept, ' to ')} at the median hold 90% of the energy"
        used += f"; from {min(known)} to {max(known)}" if known else ""
    else:
        used = (
            f"{middle_rank} at the median hold 90% of the energy; {len(ranks) - len(known)} of {len(ranks)} layers "
            f"need more than the {max(kept)} that --top kept: measure without --top"
        )
    return [
        make_statement("rank_used", "Rank used", used, priority=0),
        make_statement("resolved", "Resolution", FACTORED, priority=2),
    ]


def _describe_ranks_needed(changed: Sequence[Spectrum], ranks: Sequence[int]) -> list[Statement]:
    """State whether the files resolve the update and, if of at least half of its layers, which rank it needs."""
    readable = [record for record in changed if record.resolution.verdict != "unresolved"]
    if readable and 2 * len(readable) >= len(changed):
        low_rank, rank_at_90 = _describe_low_rank(readable, len(changed), ranks), _describe_rank_at_90(readable)
    else:
        extent = f"only {len(readable)} of {quantity(len(changed))}" if readable else "no matrix"
        low_rank, rank_at_90 = [f"not known: these files resolve {extent}"], ""
    return [
        make_statement("low_rank", "Low rank", *low_rank, priority=0),
        make_statement("rank_at_90", "Rank at 90%", rank_at_90),
        _describe_resolution(changed),
        make_statement("before_rounding", "Before rounding", *_describe_before_rounding(changed)),
        _describe_start(changed),
    ]


def _describe_resolution(changed: Sequence[Spectrum]) -> Statement:
    """State whether the files resolve the update, and how much of it rounding is expected to make up."""
    verdicts = [record.resolution.verdict for record in changed]
    unresolved, resolved = verdicts.count("unresolved"), verdicts.count("resolved")
    shares = [(record.resolution.noise_fro / record.fro) ** 2 for record in changed]
    norm = f"{NORMS[changed[0].metric][0]}²"
    word = "no" if unresolved > len(changed) / 2 else "partly" if resolved else "limited"
    unchanged = max(record.resolution.unchanged or 0.0 for record in changed)
    statement = describe_resolution(
        verdicts,
        f"yes: rounding is expected to make up {percent(max(shares))} of {norm} in the layer with most",
        f"rounding is expected to make up {percent(min(1.0, median(shares)))} of the median {norm}\n"
        "ranks beyond the signal rank count noise; save the fine-tune in float32, or measure the adapter instead of "
        f"its merge{f'. Up to {percent(unchanged)} of the entries are unchanged' if unchanged >= 0.01 else ''}",
        marks=NOISE_MARKS,
    )
    if resolved == len(changed):
        return statement
    return replace(statement, lead=f"{word}: {statement.lead}", level="failure" if word == "no" else "warning")


def _describe_start(changed: Sequence[Spectrum]) -> Statement:
    """State which start of training is assumed or was found where that matters, and how many updates are sparse."""
    resolutions = [record.resolution for record in changed]
    of_all = f"of {quantity(len(changed))}"
    rounded = sum(each.start == "rounded" and each.base_rounding is not None for each in resolutions)
    unknown = [record for record in changed if record.resolution.start == "unknown"]
    exact = sum(each.start == "exact" for each in resolutions)
    pooled = _pool_base_rounding(changed)
    lines = []
    if exact and rounded:
        lines.append(
            f"the matrices disagree: {exact} {of_all} show that training started at BASE, {rounded} that BASE is a "
            f"rounded copy of the start; do not rely on ranks of the {exact}. Measure against the BASE that training "
            "started from"
        )
    elif rounded:
        lines.append(f"in {rounded} {of_all} BASE is a rounded copy of the start; its rounding is counted as noise")
    elif unknown and pooled is not None and -0.5 < pooled[0] < min(0.5, 1 - ERRORS * pooled[1]):
        marked = [record for record in unknown if record.resolution.verdict != "resolved"]
        if cleared := sum(_judge_without_base_rounding(record) == "resolved" for record in marked):
            lines.append(
                f"training started at BASE as stored, as all layers together show: {cleared} {of_all} marked ~ or ! "
                f"{'is' if cleared == 1 else 'are'} resolved"
            )
    elif unknown:
        counted = max(((record.resolution.base_noise_fro or 0.0) / record.fro) ** 2 for record in unknown)
        lines.append(
            f"in {len(unknown)} {of_all} the files do not show whether BASE is a rounded copy of the start of "
            f"training; its rounding, up to {percent(min(1.0, counted))} of ‖ΔW‖², is counted as noise"
        )
    if lines and pooled is not None:
        lines.append(f"β = {pooled[0]:.2f} ± {pooled[1]:.2f} over all layers (BASE as stored: 0, a rounded copy: 1)")
    if sparse := [share for each in resolutions if (share := each.untouched) is not None and share >= SPARSE]:
        lines.append(
            f"{len(sparse)} {of_all} have sparse updates: training did not change about {percent(median(sparse))} of "
            "the entries, which have no noise"
        )
    return make_statement("start", "Start", *lines, level="warning" if exact and rounded else "note", priority=2)


def _pool_base_rounding(changed: Sequence[Spectrum]) -> tuple[float, float] | None:
    """Return β of all layers together and its standard error; None for fewer than two layers that have one."""
    known = [pair for record in changed if (pair := record.resolution.base_rounding) is not None and pair[1] > 0]
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


def _describe_low_rank(readable: Sequence[Spectrum], changed: int, ranks: Sequence[int]) -> list[str]:
    """State what a common rank keeps at the median and in the worst layer, with a verdict; then other ranks.

    Args:
        readable: The changed layers that the files resolve.
        changed: Number of changed layers.
        ranks: The measured ranks.
    """
    shares_by_rank = {rank: _list_shares(rank, readable) for rank in ranks}
    known = [rank for rank in ranks if shares_by_rank[rank]]
    if not known:
        if all(min(record.shape) <= min(ranks) for record in readable):
            return [f"r={min(ranks)} has no meaning: no layer is larger"]
        return [f"C({min(ranks)}) was not computed; use --top {min(ranks)} or more"]
    judged_rank = 16 if 16 in known else max(rank for rank in known if rank in {8, 64} or not {8, 64} & {*known})
    shares = shares_by_rank.pop(judged_rank)
    middle = median(shares.values())
    word = "yes" if middle >= LOW_RANK else "partly" if middle >= PARTLY else "no"
    basis = f"{len(shares)} of" if len(shares) < changed else "all"
    worst = min(shares, key=shares.__getitem__)
    of = f"the median of {basis} {quantity(changed)}" if changed > 1 else short(worst)
    lead = f"{word}: r={judged_rank} keeps {percent(middle)} of the energy Σσ² in {of}"
    if len(shares) > 1:
        lead += f", at worst {percent(shares[worst])} in {short(worst)}"
    others = (
        f"r={rank} keeps {percent(median(each.values()))}"
        for rank, each in shares_by_rank.items()
        if each and rank in {8, 64}
    )
    return [lead, ", ".join(others)]


def _list_shares(rank: int, records: Sequence[Spectrum]) -> dict[str, float]:
    """Return the energy fraction that a rank keeps of each layer that is larger than it; empty if one is not known.

    Any update of a smaller layer is kept whole, which says nothing about the update.
    """
    shares = {record.layer: record.energy[str(rank)] for record in records if min(record.shape) > rank}
    known = {layer: share for layer, share in shares.items() if share is not None}
    return known if len(known) == len(shares) else {}


def _describe_rank_at_90(records: Sequence[Spectrum]) -> str:
    """State the median and the range of the rank at 90% of the energy."""
    ranks = [record.rank_at["0.9"] for record in records]
    known = [rank for rank in ranks if rank is not None]
    kept_count, not_reached = max(len(record.s) for record in records), len(ranks) - len(known)
    beyond = f"beyond the {kept_count} values kept in {not_reached} of {len(ranks)} layers: measure without --top"
    if not known:
        return beyond
    largest, suffix = (f"> {kept_count}", f"; {beyond}") if not_reached else (str(max(known)), "")
    possible = span((min(record.shape) for record in records), " to ")
    return f"{median_rank(ranks, kept_count)} at the median, {min(known)} to {largest}; full rank is {possible}{suffix}"


def _describe_coverage(results: Results[Spectrum]) -> str:
    """State which fractions of ‖Δ‖² are in matrices, in vocabulary tables, and in norms and biases; empty if Δ = 0."""
    labels = {"matrices": "matrices", "vocabulary": "embeddings and head", "vectors": "norms and biases"}
    norms = dict.fromkeys(labels, 0.0)
    parts: list[tuple[str, float]] = [(part_of(record.layer), record.fro) for record in results]
    parts += [("vectors", skipped.fro or 0.0) for skipped in results.left_out if skipped.reason == "vector"]
    for part, fro in parts:
        norms[part] = math.hypot(norms[part], fro)
    total = math.hypot(*norms.values())
    if total == 0:
        return ""
    shares = ", ".join(f"{percent((norms[part] / total) ** 2)} {labels[part]}" for part in labels if norms[part])
    whole = "Σ‖G‖²" if any(record.stack for record in results) else "‖Δ‖²"
    return f"{whole}{qualify_fractions(results.left_out)}: {shares}"
