"""Terminal output of ``spectrum`` and ``gradient-spectrum``: a table by module type or layer, and a summary.

The summary states the size of the change, its resolution by the files, the rank needed, the update before rounding, and
when ``recover`` is worth running; of gradients, how far their spectrum predicts that of an update.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import median

from lora_diag.diagnostics.spectrum.record import Spectrum, usual_ranks
from lora_diag.metrics import verdict
from lora_diag.records import Results
from lora_diag.records.names import part_of
from lora_diag.records.vocabulary import NORMS, Hidden
from lora_diag.rendering.statements import (
    REASONS,
    Level,
    Statement,
    compared,
    final_statements,
    left_out,
    make_statement,
    qualify_fractions,
    subject,
)
from lora_diag.rendering.tables import WIDE, Column, grid_of, grids_table, rows_of
from lora_diag.rendering.text import count, median_rank, number, percent, safe, short, spark, strip

# From this share of entries on that rounding left unchanged recover is named: at a third the recovered checkpoint has
# the loss of the stored one, at 65% it keeps 3 points more of the gain, at 89% twice as much (see docs/reference).
HIDDEN_FRACTION = 0.5

WORDS = {"recovered": "recovered", "size_only": "size only", "not_hidden": "not hidden", "refused": "refused"}


def suggested_fix(changed: Sequence[Spectrum]) -> str:
    """Return a clause that names ``recover`` if rounding left most entries unchanged and it was not run; else empty."""
    candidates = [
        record
        for record in changed
        if record.hidden is None
        and record.metric == "weights"
        and record.resolution.verdict != "resolved"
        and (record.resolution.unchanged or 0.0) - (record.resolution.untouched or 0.0) >= HIDDEN_FRACTION
    ]
    if not candidates:
        return ""
    suffix = "" if len(candidates) == len(changed) else f" in {len(candidates)} of {len(changed)} matrices"
    return f"; loradiag recover (or --recover here) can estimate the update before rounding{suffix}"


def before_rounding(changed: Sequence[Spectrum]) -> list[Statement]:
    """Return the statement on size, ranks and directions before rounding; none where they were not requested."""
    tried = [(record, record.hidden) for record in changed if record.hidden is not None]
    if not tried:
        return []
    counts: Counter[str] = Counter(hidden.status for _, hidden in tried)
    status_counts = ", ".join(f"{counts[status]} {phrase}" for status, phrase in WORDS.items() if counts[status])
    lines = []
    sized = [(record, hidden) for record, hidden in tried if hidden.fro_interval is not None]
    if sized:
        norm = math.hypot(*(hidden.fro_estimate or 0.0 for _, hidden in sized))
        stored_norm = math.hypot(*(record.fro for record, _ in sized))
        errors = [(high - low) / (high + low) for _, hidden in sized for low, high in [hidden.fro_interval or (1, 1)]]
        lines.append(
            f"‖X‖ = {number(norm)}, ± {percent(median(errors))} in the median matrix; the files' ‖ΔW‖ is "
            f"{number(stored_norm / norm)} times that"
        )
    lines.append(f"of {len(tried)} matrices that the files do not resolve {status_counts}")
    recovered = [(record, hidden) for record, hidden in sized if hidden.status == "recovered"]
    if recovered:
        middle, lowest, highest = (
            _median_text(ranks) for ranks in zip(*(_list_ranks(hidden) for _, hidden in recovered), strict=True)
        )
        stored_rank = _median_text([record.rank_at["0.9"] for record, _ in recovered])
        lines.append(
            f"rank at 90% {middle} (interval {lowest} to {highest}) at the median, where the files read {stored_rank}"
        )
        signal = _median_text([record.resolution.signal_rank for record, _ in recovered])
        directions = _median_text([hidden.directions for _, hidden in recovered])
        lines.append(f"signal rank {directions} by rounding cells at the median, {signal} by the files' noise edge")
    refused = [(record, hidden) for record, hidden in tried if hidden.status == "refused"]
    if refused:
        lines.append(f"{short(refused[0][0].layer)}: {refused[0][1].reason}")
    return [make_statement("before_rounding", "Before rounding", *lines)]


def _list_ranks(hidden: Hidden) -> tuple[int | None, int | None, int | None]:
    """Return the rank at 90% and the ends of its interval."""
    lowest, highest = (hidden.rank_at_interval or {}).get("0.9", (None, None))
    return (hidden.rank_at_estimate or {}).get("0.9"), lowest, highest


def _median_text(ranks: Sequence[int | None]) -> str:
    """Return the median of the known ranks; ``unknown`` if at most half are known."""
    known = [rank for rank in ranks if rank is not None]
    return str(int(median(known))) if 2 * len(known) > len(ranks) else "unknown"


def gradient_lines(records: Sequence[Spectrum]) -> list[Statement]:
    """State which gradients were stacked, and how far their spectrum predicts that of an update.

    Args:
        records: The records of the judged layers, each with its stack.
    """
    steps = sorted({step for record in records if record.stack for step in record.stack.steps})
    span = f"steps {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"
    total = math.hypot(*(record.fro for record in records))
    text = f"{len(steps)} of {span}, stacked; √Σ‖G‖² = {number(total)} over {len(records)} matrices"
    rank_pairs = _pair_ranks(records)
    shown_rank, other_rank = (median(rank) for rank in zip(*rank_pairs, strict=True)) if rank_pairs else (0, 0)
    if shown_rank:
        suffix = "" if len(rank_pairs) == len(records) else f", in the {len(rank_pairs)} layers small enough for both"
        text += (
            f"; r@90% on each layer's smaller side, which is shown, {shown_rank:g} at the median, "
            f"on the other {other_rank:g}{suffix}"
        )
    return [
        make_statement("gradients", "Gradients", text),
        make_statement(
            "interpretation",
            "Interpretation",
            "gradients rank the layers approximately as the update does, but have a lower rank than the update: "
            "compare layers by these numbers, do not derive a rank from them",
        ),
    ]


def _pair_ranks(records: Sequence[Spectrum]) -> list[tuple[int, int]]:
    """Return the ranks at 90% on both sides, for layers with both."""
    pairs = [
        (record.rank_at["0.9"], record.stack.other_rank_at["0.9"])
        for record in records
        if record.stack and record.stack.other_rank_at
    ]
    return [(rank, other_rank) for rank, other_rank in pairs if rank is not None and other_rank is not None]


def spectrum_table(
    results: Results[Spectrum], width: int = 80, color: bool = False, per: str = "type", next_command: str | None = None
) -> str:
    """Return the table and the summary of a spectrum run.

    Args:
        results: The results.
        width: Width of the terminal in columns; the layout adapts from 80 to 140.
        color: Whether to shade C(r) with ANSI colours.
        per: ``type`` for one row per module type (medians over its layers), ``layer`` for one row per layer.
        next_command: The suggested next command, printed last.

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
    """Show the spectrum of the layer with the median stable rank, over all its values."""
    record = sorted(records, key=lambda record: record.stable_rank or 0)[len(records) // 2]
    return spark(record.s, len(record.s) if record.complete else min(record.shape), 7)


def _make_depth_column(rows: Sequence[tuple[str, Sequence[Spectrum]]], rank: int, width: int) -> Column:
    """Show C(r) from the first to the last layer of each row."""
    title, bins = (f"C({rank}) by depth", 24) if width >= WIDE else ("by depth", 8)
    cells = tuple(strip([record.energy[str(rank)] for record in group], bins) for _, group in rows)
    return Column(title, cells, "left", drop=5)


# Minimum median C(16) of a low-rank update, and of a partly low-rank one. Conventions: the statement has the number.
LOW_RANK, PARTLY = 0.9, 0.5

# Minimum fraction of unchanged entries of a sparse update.
SPARSE = 0.5

# β of all layers together shows the start if it is within 0.5 of 0 and this many errors from 1, as that of one layer.
# Simulated (docs/explanation/mathematics.md): right in all 137 of 172 models of 5 or 7 layers that it decided.
ERRORS = 5


METRICS = {
    "data": "the data's, not the weights': energies are those of ΔW·C^½ with C = E[xxᵀ] of each layer's input, so "
    "Σσ² = E‖ΔW x‖², the mean square change of the layer's output on that text",
    "kfac": "K-FAC's, not the weights': energies are those of G^½·ΔW·C^½ with C = E[xxᵀ] of each layer's input and G = "
    "E[ggᵀ] of the loss's gradient by its output, so Σσ² estimates E⟨∇ℓ, ΔW⟩²",
}


def summary_lines(results: Results[Spectrum]) -> list[Statement]:
    """Return the statements of the summary."""
    changed, ranks = _select_changed(results), results.run.settings["ranks"]
    lines = [compared(results, *([_describe_measured(results)] if len(results) else []))]
    if metric := METRICS.get(next((record.metric for record in results), "weights")):
        lines.append(make_statement("metric", "Metric", metric))
    if stacked := [record for record in changed if record.stack is not None]:
        lines += gradient_lines(stacked)
        # Gradients are not differences of rounded weights, so they are always resolved.
        lines += [
            statement
            for statement in _describe_ranks_needed(changed, ranks)
            if statement.key != "resolved" or statement.level != "note"
        ]
    else:
        lines.append(make_statement("moved", "Change", *_describe_changes(results, changed)))
        if changed:
            lines += _describe_ranks_used(changed) if _is_factored(changed) else _describe_ranks_needed(changed, ranks)
    if not metric and (coverage := _describe_coverage(results)):
        lines.append(make_statement("where", "Distribution", coverage))
    return [*lines, left_out(results), *final_statements(results)]


def _select_changed(results: Results[Spectrum]) -> list[Spectrum]:
    """Return the changed matrices: those that adapters usually target, or else the others."""
    changed = [record for record in results if record.fro > 0]
    return [record for record in changed if part_of(record.layer) == "matrices"] or changed


def _describe_measured(results: Results[Spectrum]) -> str:
    entries = sum(math.prod(record.shape) for record in results)
    vocabulary = sum(part_of(record.layer) == "vocabulary" for record in results)
    tables = f" ({vocabulary} of them embeddings or head)" if vocabulary else ""
    dtypes = sorted({"/".join(dict.fromkeys(filter(None, record.dtypes))) for record in results})
    return f"{_matrices(len(results))}{tables}, {count(entries)} entries, {', '.join(dtypes)}"


def _matrices(number_of: int) -> str:
    return f"{number_of} {'matrix' if number_of == 1 else 'matrices'}"


def _describe_changes(results: Results[Spectrum], changed: Sequence[Spectrum]) -> list[str]:
    """State how far the weights changed, and which of them did."""
    inside = [record for record in results if part_of(record.layer) == "matrices"]
    if not len(results):
        reasons = Counter(item.reason for item in results.left_out)
        why = ", ".join(f"{number_of} {REASONS[reason]}" for reason, number_of in reasons.items())
        return [f"no matrix could be measured{f': {why}' if why else ''}"]
    if not changed:
        return [_describe_no_change(results)]
    if part_of(changed[0].layer) == "vocabulary":
        outside_note = f"; ΔW is zero in the {_matrices(len(inside))} outside them" if inside else ""
        return [
            f"only embeddings and head{outside_note}",
            *_describe_relative_change(changed, f"over the {_matrices(len(changed))} that changed"),
        ]
    outside = " outside embeddings and head" if len(inside) < len(results) else ""
    article = "the" if outside or len(inside) == 1 else "all"
    return _describe_relative_change(inside, f"over {article} {_matrices(len(inside))}{outside}")


def _describe_no_change(results: Results[Spectrum]) -> str:
    if any(item.reason == "vector" and item.fro for item in results.left_out):
        return "only norms and biases: ΔW is zero in every matrix"
    hint = f" Check that {safe(subject(results.run))} is the intended checkpoint." if results.run.inputs else ""
    return f"nothing: ΔW is zero in every matrix.{hint}"


def _describe_relative_change(records: Sequence[Spectrum], extent: str) -> list[str]:
    total = math.hypot(*(record.fro for record in records))
    ratios = {record.layer: ratio for record in records if (ratio := record.relative) is not None}
    update, weights = NORMS[records[0].metric]
    if not ratios:
        return [f"{update} = {number(total)} {extent}"]
    base = math.hypot(*(record.base_fro or 0.0 for record in records))
    lines = [f"{update}/{weights} = {number(total / base)} {extent}"]
    if len(ratios) > 1:
        largest, smallest = max(ratios, key=ratios.__getitem__), min(ratios, key=ratios.__getitem__)
        lines.append(f"most {number(ratios[largest])} in {short(largest)}")
        lines.append(f"least {number(ratios[smallest])} in {short(smallest)}")
    return lines


def _is_factored(records: Sequence[Spectrum]) -> bool:
    """Return whether these are updates with known factors, whose rank is a setting, not a result."""
    return all(record.method == "factored" for record in records)


def _describe_ranks_used(records: Sequence[Spectrum]) -> list[Statement]:
    """State how much of an adapter's rank is used."""
    ranks = [record.rank_at["0.9"] for record in records]
    known = [rank for rank in ranks if rank is not None]
    kept_counts = sorted({len(record.s) for record in records})
    counts = str(kept_counts[0]) if len(kept_counts) == 1 else f"{kept_counts[0]} to {kept_counts[-1]}"
    middle = median_rank(ranks, kept_counts[-1])
    used = f"90% of the energy is in {middle} of {counts} directions at the median"
    if not all(record.complete for record in records):
        not_reached = (
            f"{len(ranks) - len(known)} of {len(ranks)} layers need more than the {kept_counts[-1]} that --top kept"
        )
        used = f"90% of the energy in {middle} directions at the median; {not_reached}: measure without --top"
    elif known:
        used += f", from {min(known)} to {max(known)}"
    return [
        make_statement(
            "resolved", "Resolution", "yes: the factors define the update, without rounding of merged weights"
        ),
        make_statement("rank_used", "Rank used", used),
    ]


def _describe_ranks_needed(changed: Sequence[Spectrum], ranks: Sequence[int]) -> list[Statement]:
    """State which rank the update needs, as far as the files resolve it."""
    readable = [record for record in changed if record.resolution.verdict != "unresolved"]
    return [
        _describe_resolution(changed),
        *_describe_start(changed),
        *before_rounding(changed),
        make_statement("low_rank", "Low rank", *_describe_low_rank(readable, len(changed), ranks)),
        make_statement("rank_at_90", "Rank at 90%", _describe_rank_at_90(readable, len(changed))),
    ]


def _describe_resolution(changed: Sequence[Spectrum]) -> Statement:
    """State whether the files resolve the update, before any rank is printed."""
    counts: Counter[str] = Counter(record.resolution.verdict for record in changed)
    shares = [(record.resolution.noise_fro / record.fro) ** 2 for record in changed]
    if counts["resolved"] == len(changed):
        worst = f"{percent(max(shares))} of {NORMS[changed[0].metric][0]}²"
        sentence = f"yes: rounding is expected to make up {worst} in the worst layer"
        return make_statement("resolved", "Resolution", sentence)
    word = "no" if counts["unresolved"] > len(changed) / 2 else "partly" if counts["resolved"] else "limited"
    unchanged = max(record.resolution.unchanged or 0.0 for record in changed)
    unchanged_note = f", up to {percent(unchanged)} of the entries are unchanged" if unchanged >= 0.01 else ""
    return make_statement(
        "resolved",
        "Resolution",
        f"{word}: {_describe_unresolved(counts)}: rounding is expected to make up "
        f"{percent(min(1.0, median(shares)))} of the median {NORMS[changed[0].metric][0]}²{unchanged_note}; "
        f"ranks beyond the signal rank count noise. "
        f"Measure the adapter, not its merge, or save the fine-tune in float32{suggested_fix(changed)}",
        level="failure" if word == "no" else "warning",
    )


def _describe_start(changed: Sequence[Spectrum]) -> list[Statement]:
    """State which start of training is assumed or was found where that matters, and how many updates are sparse."""
    resolutions = [record.resolution for record in changed]
    of_all = f"of {_matrices(len(changed))}"
    rounded = [
        resolution
        for resolution in resolutions
        if resolution.start == "rounded" and resolution.base_rounding is not None
    ]
    unknown = [record for record in changed if record.resolution.start == "unknown"]
    exact = sum(resolution.start == "exact" for resolution in resolutions)
    pooled = _pool_base_rounding(changed)
    lines = []
    if exact and rounded:
        lines.append(
            f"the matrices disagree: {exact} {of_all} show that training started at BASE, {len(rounded)} that BASE is "
            f"a rounded copy of the start; do not rely on ranks of the {exact}. Measure against the BASE that training "
            "started from"
        )
    elif rounded:
        lines.append(
            f"in {len(rounded)} {of_all} BASE is a rounded copy of the start of training; its rounding is counted as "
            "noise"
        )
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
        beta, error = pooled
        lines.append(f"β = {beta:.2f} ± {error:.2f} over all layers: 0 if BASE is the start, 1 if a rounded copy")
    sparse = [
        resolution.untouched
        for resolution in resolutions
        if resolution.untouched is not None and resolution.untouched >= SPARSE
    ]
    if sparse:
        lines.append(
            f"{len(sparse)} {of_all} have sparse updates: training did not change about {percent(median(sparse))} of "
            "the entries, which have no noise"
        )
    level: Level = "warning" if exact and rounded else "note"
    return [make_statement("start", "Start", *lines, level=level, priority=2)] if lines else []


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


def _describe_unresolved(counts: Counter[str]) -> str:
    """State how many matrices are not resolved, by verdict and its mark in the table."""
    labels = {"floor-limited": "floor-limited (~)", "unresolved": "unresolved (!)"}
    parts = [f"{counts[verdict]} {label}" for verdict, label in labels.items() if counts[verdict]]
    if len(counts) > 1:
        return f"of {counts.total()} matrices {' and '.join(parts)}"
    (verdict,) = counts
    subject_text = f"all {counts.total()} matrices are" if counts.total() > 1 else "the matrix is"
    return f"{subject_text} {labels[verdict]}"


def _describe_low_rank(readable: Sequence[Spectrum], changed: int, ranks: Sequence[int]) -> list[str]:
    """State what each common rank keeps at the median and in the worst layer, with a verdict.

    There is neither if fewer than half of the changed matrices are readable.
    """
    if 2 * len(readable) < changed or not readable:
        extent = f"only {len(readable)} of {_matrices(changed)}" if readable else "no matrix"
        return [f"not known: these files resolve {extent}"]
    shown_ranks = [rank for rank in ranks if rank in {8, 16, 64}] or list(ranks)[:3]
    by_rank = {rank: _describe_rank(rank, readable) for rank in shown_ranks}
    shares_by_rank = {rank: shares for rank, (shares, _) in by_rank.items() if shares}
    lines = [line for _, line in by_rank.values()]
    if not shares_by_rank:
        return lines[:1]
    judged_rank = 16 if 16 in shares_by_rank else max(shares_by_rank)
    middle = median(shares_by_rank[judged_rank])
    word = "yes" if middle >= LOW_RANK else "partly" if middle >= PARTLY else "no"
    number_of = len(shares_by_rank[judged_rank])
    basis = f"{number_of} of" if number_of < changed else "all"
    judged_by = f"the median of {basis} {_matrices(changed)}" if changed > 1 else "the matrix"
    return [f"{word}, judged at r={judged_rank} by the energy (Σσ²) of {judged_by}", *lines]


def _describe_rank(rank: int, records: Sequence[Spectrum]) -> tuple[Sequence[float], str]:
    """Return the energy fraction that a rank keeps of each layer, empty if unknown, and the line that states it.

    A layer that is not larger than the rank keeps everything for any update and is not counted.
    """
    larger = {record.layer: record.energy[str(rank)] for record in records if min(record.shape) > rank}
    shares = {layer: share for layer, share in larger.items() if share is not None}
    if not larger:
        return (), f"r={rank} has no meaning: no layer is larger"
    if len(shares) < len(larger):
        return (), f"C({rank}) was not computed; use --top {rank} or more"
    kept, worst = [*shares.values()], min(shares, key=shares.__getitem__)
    suffix = ""
    if len(larger) < len(records):
        suffix = (
            f" at the median of the {len(larger)} layers larger than r"
            if len(larger) > 1
            else " of the one layer larger"
        )
    return kept, f"r={rank} keeps {percent(median(kept))}{suffix}, at worst {percent(shares[worst])} in {short(worst)}"


def _describe_rank_at_90(records: Sequence[Spectrum], changed: int) -> str:
    if 2 * len(records) < changed or not records:
        return "not shown, for the same reason"
    ranks = [record.rank_at["0.9"] for record in records]
    known = [rank for rank in ranks if rank is not None]
    kept_count, not_reached = max(len(record.s) for record in records), len(ranks) - len(known)
    if not known:
        return f"beyond the {kept_count} values kept in each of {not_reached} layers: measure without --top"
    largest = f"> {kept_count}" if not_reached else max(known)
    full = sorted({min(record.shape) for record in records})
    possible = f"of {full[0]}" if len(full) == 1 else f"of {full[0]} to {full[-1]}"
    suffix = (
        f"; beyond the {kept_count} values kept in {not_reached} of {len(ranks)} layers: measure without --top"
        if not_reached
        else ""
    )
    return f"median {median_rank(ranks, kept_count)}, from {min(known)} to {largest} {possible} possible{suffix}"


def _describe_coverage(results: Results[Spectrum]) -> str:
    """State which fractions of ‖Δ‖² are in matrices, in vocabulary tables, and in norms and biases; empty if Δ = 0."""
    norms = dict.fromkeys(("matrices", "vocabulary", "vectors"), 0.0)
    for record in results:
        norms[part_of(record.layer)] = math.hypot(norms[part_of(record.layer)], record.fro)
    for item in results.left_out:
        if item.fro is not None and item.reason == "vector":
            norms["vectors"] = math.hypot(norms["vectors"], item.fro)
    total = math.hypot(*norms.values())
    if total == 0:
        return ""
    labels = {"matrices": "the matrices", "vocabulary": "embeddings and head", "vectors": "norms and biases"}
    shares = ", ".join(f"{percent((norms[part] / total) ** 2)} in {labels[part]}" for part in labels if norms[part])
    whole = "Σ‖G‖²" if any(record.stack for record in results) else "the whole change ‖Δ‖²"
    return f"of {whole}{qualify_fractions(results.left_out)}, {shares}"
