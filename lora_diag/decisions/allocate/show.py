"""Terminal output of ``allocate``: ranks by layer, energy kept, and distance from the optimum.

Without a budget: ranks of several rules side by side.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from lora_diag.decisions.allocate.measure import head_of, task_type_of
from lora_diag.decisions.allocate.record import UNFINISHED, Allocation, Baseline, Certificate, Policies
from lora_diag.feature import Hint
from lora_diag.probes.sweep.verdict import swept_rate
from lora_diag.records import Results
from lora_diag.records.base import Shown
from lora_diag.records.names import part_of
from lora_diag.rendering.statements import Statement, left_out, make_statement, notes
from lora_diag.rendering.tables import WIDE, Column, grid_of, grids_table, rows_of
from lora_diag.rendering.text import list_layers, list_names, number, percent, quantity, safe, short, span, strip

# Maximum number of layers named in a statement.
_NAMED = 3


def policies_table(
    records: Sequence[Policies],
    width: int = 80,
    color: bool = False,
    per: str = "type",
    next_command: str | None = None,
) -> str:
    """Return the ranks of several rules side by side, and their disagreements.

    Args:
        records: One per layer.
        width: Columns of the terminal.
        color: Whether to use ANSI colours.
        per: ``type`` for medians over a module type, ``layer`` for one row per layer.
        next_command: The suggested next command, printed last; None without one.
    """
    shown = [
        Shown("full_rank", "of", "min(out, in)", main=True, pool="range", drop=2),
        *(
            Shown(f"ranks.{rule}", rule, "rank", main=True, form=".0f", pool=_make_median(rule))
            for rule in records[0].ranks
        ),
    ]
    grid = grid_of(shown, rows_of(records, per), per)
    return grids_table([grid], _describe_disagreements(records), width, color, next_command)


def _make_median(rule: str) -> Callable[[Sequence[Policies]], float | None]:
    """Return the function that gives the median rank by a rule; None where it cannot be applied to all records."""

    def median_of(group: Sequence[Policies]) -> float | None:
        known = [rank for record in group if (rank := record.ranks[rule]) is not None]
        return median(known) if len(known) == len(group) else None

    return median_of


def _describe_disagreements(records: Sequence[Policies]) -> list[Statement]:
    """State where the rules differ and by how much, noise, the meaning of each rule, and where rules do not apply."""
    spread = {}
    for record in records:
        ranks = {name: rank for name, rank in record.ranks.items() if rank and name != "signal"}
        if len(ranks) > 1:
            low, high = min(ranks, key=ranks.__getitem__), max(ranks, key=ranks.__getitem__)
            spread[record.layer] = (ranks[high] / ranks[low], f"{low} {ranks[low]}, {high} {ranks[high]}")
    worst = sorted(spread, key=lambda layer: -spread[layer][0])[:_NAMED]
    differing = sum(ratio >= 2 for ratio, _ in spread.values())
    noisy = sum(
        (energy := record.ranks["energy 90%"]) is not None
        and (signal := record.ranks["signal"]) is not None
        and energy > signal
        for record in records
    )
    excess = f"90% of the energy needs more than the signal rank in {noisy} layers, where it includes rounding noise"
    missing = sum(None in record.ranks.values() for record in records)
    unknown = f"- in {missing} layers: the rule needs all min(out, in) singular values, or more than --top kept"
    lead = f"by a factor of 2 or more in {differing} of {len(records)} layers; most in"
    statements = [
        make_statement(
            "disagree",
            "Disagreement",
            lead if spread else "",
            *(f"{short(layer)}: {spread[layer][1]}" for layer in worst),
        ),
        make_statement("noise", "Noise", excess if noisy else ""),
        make_statement(
            "rules",
            "Rules",
            "energy 90%: smallest r that keeps 90% of Σσ²; knee: point of the curve C(r) farthest above its chord",
            "effective: exp of the entropy of the energy; signal: values above the rounding noise of the files, an "
            "upper limit",
            "Gavish–Donoho: values above a threshold for spectra of mostly noise, unlike those of full updates",
        ),
        make_statement("not_known", "Unknown", unknown if missing else ""),
    ]
    return [statement for statement in statements if statement.lead]


# Differences of energy fractions below these are called "a negligible gain" and "a small gain"; the value is printed.
_NEGLIGIBLE, _SMALL = 0.005, 0.02


_CAPS = {
    "signal_rank": "by their signal rank, beyond which is rounding noise",
    "values_kept": "by the values kept by --top: measure with a larger --top, or without",
    "update_rank": "by the rank of their own update",
    "break_even": "by break-even: a larger rank has more parameters than the matrix",
    "shape": "by their shape",
    "max_rank": "by --max-rank",
    "ranks_from": "by the ranks of --allowed-ranks",
}
_UNITS = {"params": "parameters", "total_rank": "ranks", "bytes": "bytes", "energy": "parameters"}


def allocation_table(
    results: Results[Allocation],
    width: int = 80,
    color: bool = False,
    per: str = "type",
    next_command: str | None = None,
    sweep: Path | str | None = None,
) -> str:
    """Return the table and the summary of an allocation.

    Args:
        results: An allocation and its certificate.
        width: Width of the terminal in columns; the layout adapts from 80 to 140.
        color: Whether to use ANSI colours.
        per: ``type`` for one row per module type, ``layer`` for one row per layer.
        next_command: The suggested next command, printed last; None without one.
        sweep: Results of ``probe sweep``, source of a learning rate; None without one.

    Returns:
        Lines of text, without a trailing newline.
    """
    rows = rows_of(results, per)
    rate = [make_statement("rate", "Learning rate", swept_rate(sweep))] if sweep is not None else []
    extra = []
    if per == "type":
        largest = max((record.rank for record in results), default=0) or 1
        bins = 24 if width >= WIDE else 8
        strips = tuple(strip([record.rank / largest or None for record in group], bins) for _, group in rows)
        extra.append(Column("by depth", strips, "left", drop=3))
    grid = grid_of(Allocation.shown, rows, per, extra=extra)
    return grids_table([grid], [*allocation_lines(results), *rate], width, color, next_command)


def suggest_next(results: Results[Allocation] | list[Policies], values: Mapping[str, Any]) -> Hint | str:
    """Return the next step: a command, or advice on the written file."""
    output = values["output"]
    if isinstance(results, list):
        params = 8 * sum(sum(record.shape) for record in results if part_of(record.layer) == "matrices")
        return Hint(f"--params {params} -o adapter_config.json", "divides a budget, here that of r=8 in every layer")
    if output is None:
        return Hint("-o adapter_config.json", "for training with PEFT; .jsonl for loradiag extract")
    paths: dict[str, list[str]] = {}
    for run_input in results.run.inputs:
        paths.setdefault(run_input.role, []).append(run_input.path)
    if output.name == "adapter_config.json":
        advice = f"train with peft.LoraConfig.from_pretrained({str(output.parent)!r})"
        if values["check"] is not None:
            return advice
        purpose = f"once, as PEFT ignores names that the model in memory lacks; then {advice}"
        return Hint(f"--overwrite --check {shlex.quote(paths.get('base', ['BASE'])[0])}", purpose)
    if output.suffix == ".json":
        return "rename it to adapter_config.json, the only name that PEFT reads"
    if output.suffix != ".jsonl":
        return f"put the lines of {shlex.quote(str(output))} into the configuration of your training"
    models = [path for role in ("base", "tuned", "adapter") for path in paths.get(role, ())]
    metric = [word for path in paths.get("activations", ()) for word in ("--activations", path)]
    metric += ["--kfac"] if results.run.settings.get("metric") == "kfac" else []
    return shlex.join(["loradiag", "extract", *models, "--allocation", str(output), *metric, "-o", "adapter"])


def allocation_lines(results: Results[Allocation]) -> list[Statement]:
    """Return the statements of the summary."""
    certificate = next((item for item in results.whole if isinstance(item, Certificate)), None)
    if certificate is None:
        problem = "the file is incomplete: the certificate and possibly layers are missing; allocate again"
        return [make_statement("unfinished", "Warning", problem, level="failure")]
    settings = results.run.settings
    heuristic, portable = settings.get("method") == "heuristic", settings.get("portable")
    allocated = "ranks chosen for energy" if heuristic else "allocated ranks"
    baselines = [_compare_with_baseline(baseline, allocated) for baseline in certificate.baselines]
    more = "" if heuristic or not certificate.price else _describe_marginal_gain(certificate)
    statements = [
        make_statement("allocated", "Allocated", *_describe_allocation(results, heuristic)),
        make_statement("budget", "Budget", _describe_budget(results, certificate)),
        make_statement("heads", "Heads", *_describe_heads(results, certificate)),
        make_statement("keeps", "Energy kept", *_describe_kept_energy(results, certificate)),
        make_statement("portable", "Portable", *(_describe_portability(results) if portable else ())),
        make_statement("against", "Baselines", *(baselines if certificate.price else ())),
        make_statement("more", "Marginal gain", more),
        make_statement("limits", "Limits", *(() if portable else _describe_limits(results))),
        make_statement("note", "Note", _describe_limits_of_energy(results)),
        replace(left_out(results, *_describe_outside(results)), priority=1),
        *(make_statement("warning", "Warning", warning, level="failure") for warning in _make_warnings(results)),
    ]
    return [statement for statement in statements if statement.lead]


_LIMITS_OF_ENERGY = {
    "fisher": "F estimates the cost of truncating each layer alone on its text; the joint cost may differ from the sum",
    "data": "energy is the change of the outputs on that text, not the importance for the loss",
    "kfac": "energy is the K-FAC estimate of the change of the loss",
    "weights": "energy is the size of the weight change, not the importance for the loss",
}


def _describe_limits_of_energy(results: Results[Allocation]) -> str:
    """State the limits of energy as a criterion."""
    text = f"{_LIMITS_OF_ENERGY[_name_criterion(results)]}: compare the held-out loss"
    if any(record.cap and not record.rank for record in results):
        text += "; a layer of rank 0 learns nothing: --min-rank sets a minimum, --relative counts all layers equally"
    return text


def _describe_allocation(results: Results[Allocation], heuristic: bool) -> Iterator[str]:
    if heuristic:
        yield "ranks by the heuristic prior r ∝ s·√(d_in+d_out), within the caps; not chosen for energy"
    ranks = [record.rank for record in results if record.rank]
    yield f"{len(ranks)} of {len(results)} layers get a rank, {span(ranks)}" if ranks else "none"
    if unranked := [record for record in results if not record.rank]:
        unchanged = sum(record.fro == 0 for record in unranked)
        noise = sum(record.cap == 0 and record.fro > 0 for record in unranked)
        reasons = [
            f"; {unchanged} did not change" * bool(unchanged),
            f"; {noise} are only rounding noise" * bool(noise),
        ]
        yield f"rank 0: {list_layers(unranked)}{''.join(reasons)}"
    yield from (f"{item.role} {safe(item.path)} ({item.kind})" for item in results.run.inputs if item.path)
    yield from notes(results.run)


def _describe_budget(results: Results[Allocation], certificate: Certificate) -> str:
    requested, unit = safe(str(results.run.settings.get("budget", ""))), _UNITS[certificate.unit]
    if certificate.budget is None:
        return f"{requested}: takes {certificate.params:,} parameters"
    left = certificate.budget - certificate.spent
    text = f"{requested}: {certificate.spent:,.0f} of {certificate.budget:,.0f} {unit} spent, {left:,.0f} left"
    if not certificate.price:
        text += "; every layer is at its cap, so a larger budget has no effect"
    return text if certificate.unit == "params" else f"{text}; {certificate.params:,} parameters"


def _describe_portability(results: Results[Allocation]) -> Iterator[str]:
    """State the property of a portable allocation, and what programs still refuse or drop."""
    yield "one rank and no patterns, which every program scales alike; bound and gap are those of one rank"
    ranked = {record.layer.removesuffix(".weight") for record in results if record.rank}
    for module in sorted(ranked):
        owner, _, leaf = module.rpartition(".")
        sibling = {"q_proj": "v_proj", "v_proj": "q_proj", "k_proj": "q_proj"}.get(leaf)
        if sibling is not None and f"{owner}.{sibling}" not in ranked:
            yield f"SGLang refuses {short(module)} without {sibling}: --min-rank gives both a rank"
            break
    if any(item.reason == "saved" for item in results.left_out):
        yield "heads trained in full: vLLM takes classifier and score alone, SGLang drops, llama.cpp refuses them"


def _describe_heads(results: Results[Allocation], certificate: Certificate) -> list[str]:
    """Name the heads that are trained in full, with their cost; empty without one."""
    if not certificate.saved:
        return []
    names = sorted({head_of(item.layer) or item.layer for item in results.left_out if item.reason == "saved"})
    payment = "not counted by this budget" if certificate.unit in {"total_rank", "energy"} else "paid for first"
    task = task_type_of(results, names)
    return [
        f"{list_names(names)}: {certificate.saved:,} parameters, trained in full (modules_to_save), {payment}",
        f"task_type {task}, from the config of the fine-tune"
        if task
        else "task_type: not in the config of the fine-tune; set it in the PEFT config",
    ]


def _describe_kept_energy(results: Results[Allocation], certificate: Certificate) -> list[str]:
    kept = f"{_format_points(certificate.kept)} of {_name_energy(results)}; "
    if certificate.unit == "energy":
        best = f"an unconstrained choice with as many parameters could keep at most {_format_points(certificate.bound)}"
    elif certificate.optimal:
        best = "optimal within budget and caps"
    else:
        bound, gap = _format_points(certificate.bound), _format_gap(certificate.gap)
        best = f"the optimum within budget and caps keeps at most {bound} (gap {gap})"
    lines = [kept + best]
    if _name_criterion(results) == "fisher":
        left = math.fsum(record.fisher or 0.0 for record in results)
        lines.append(f"Σ½F = {number(left / 2)} nats per prediction remain beyond these ranks")
    lines.append(
        f"ε_min = {number(certificate.epsilon_min)}: lower bound on the distance of any adapter of these ranks from "
        "this update"
    )
    if certificate.energy_error > 1e-4:
        lines.append(f"the measured spectra have an error of ±{percent(certificate.energy_error)}")
    return lines


def _name_energy(results: Results[Allocation]) -> str:
    """Describe the energy that fractions refer to."""
    criterion = _name_criterion(results)
    if criterion == "fisher":
        return "ΣF(0), the Fisher information of discarding the whole update"
    weights = "weighted " if results.run.settings.get("weights") is not None else ""
    if results.run.settings.get("relative"):
        return f"the layers' {weights}energies (Σσ²), each counted as 1"
    metric = {"data": ", in the data metric", "kfac": ", in K-FAC's metric"}.get(criterion, "")
    return f"these layers' {weights}energy (Σσ²{metric})"


def _name_criterion(results: Results[Allocation]) -> str:
    """Return the criterion of the ranks: ``fisher``, or the metric of the energies."""
    if any(record.fisher is not None for record in results):
        return "fisher"
    return str(results.run.settings.get("metric", "weights"))


def _compare_with_baseline(baseline: Baseline, allocated: str) -> str:
    """Compare another rule with the optimal ranks at the same cost."""
    if not baseline.kept:
        return f"{baseline.name}: no rank of this rule fits the budget"
    gain = baseline.equal - baseline.kept
    sizes = ((0.0, ", no gain"), (_NEGLIGIBLE, ", a negligible gain"), (_SMALL, ", a small gain"))
    verdict = next((text for limit, text in sizes if gain <= limit), "")
    text = (
        f"{baseline.name} keeps {_format_points(baseline.kept)} (ε_min {number(baseline.epsilon_min)}); {allocated} "
        f"at the same cost, {baseline.spent:,.0f}, keep {_format_points(baseline.equal)}: "
        f"{gain * 100:+.2f} points{verdict}"
    )
    if baseline.lead is not None and baseline.lead_gain is not None:
        text += f", {baseline.lead_gain * 100:+.2f} in {short(baseline.lead)} alone"
    return text


def _describe_marginal_gain(certificate: Certificate) -> str:
    """Bound the gain of a further part of the budget: one rank, or a power of ten small against the cost."""
    if certificate.unit == "total_rank":
        return f"one more rank keeps at most another {_format_points_up(certificate.more_at_most(1))}"
    part = 10 ** math.floor(math.log10(max(certificate.spent, 100) / 10))
    gain = _format_points_up(certificate.more_at_most(part))
    return f"{part:,.0f} more {_UNITS[certificate.unit]} keep at most another {gain}"


def _describe_limits(results: Results[Allocation]) -> list[str]:
    """State how many layers end at a cap, by its reason, and how many do not reach a requested energy fraction."""
    counts = Counter(record.capped_by for record in results if record.rank == record.cap and record.fro > 0)
    lines = [f"{quantity(n, 'layer')} at a cap set {_CAPS[reason]}" for reason, n in counts.most_common()]
    share = results.run.settings.get("energy")
    if isinstance(share, float) and (short_of := [r for r in results if r.kept is not None and r.kept < share - 1e-6]):
        lines.append(
            f"below {percent(share)} at the cap: {quantity(len(short_of), 'layer')}, such as {short(short_of[0].layer)}"
        )
    return lines


def _describe_outside(results: Results[Allocation]) -> list[str]:
    """State the fraction of the change that an adapter cannot reach, and embeddings or heads that could get a rank.

    This fraction exists in the metric of the weights only: norms, biases and tables have no energy in others.
    """
    inside = math.fsum(record.fro**2 for record in results)
    outside = math.fsum(item.fro**2 for item in results.left_out if item.fro is not None and item.reason != "saved")
    lines = []
    not_selected = [item for item in results.left_out if item.reason == "not_selected" and item.fro]
    tables = [short(item.layer) for item in not_selected if part_of(item.layer) == "vocabulary"]
    if outside and results.run.settings.get("metric", "weights") == "weights":
        share = percent(outside / (inside + outside))
        unknown = any(item.reason == "not_selected" and item.fro is None for item in results.left_out)
        scope = " among the measured tensors" if unknown else ""
        lines.append(f"{share} of the whole change ‖Δ‖²{scope} is there, outside this adapter")
    if tables:
        lines.append(f"select {' or '.join(tables[:_NAMED])} with --layers to give it a rank")
    return lines


def _make_warnings(results: Results[Allocation]) -> list[str]:
    lines = []
    if any(record.source == "gradients" for record in results):
        lines.append("these are spectra of gradients: ranks for a first-order step, not for an update")
    if unresolved := [r for r in results if r.verdict == "unresolved" and r.fro > 0]:
        lines.append(
            f"mostly rounding noise: {quantity(len(unresolved), 'layer')}, with ranks up to the signal and an energy "
            "that is not the update's; measure the adapter or a float32 fine-tune"
        )
    if any(UNFINISHED in run_input.notes for run_input in results.run.inputs):
        lines.append("the spectrum run did not finish: missing layers have no rank")
    return lines


def _format_points(share: float) -> str:
    """Return a fraction as a percentage with two decimals, in which allocations differ.

    >>> _format_points(0.353812), _format_points(1.0)
    ('35.38%', '100.00%')
    """
    return f"{share * 100:.2f}%"


def _format_points_up(share: float) -> str:
    """Return an upper bound as a percentage, rounded up to remain a bound.

    >>> _format_points_up(0.001201), _format_points_up(0.0012)
    ('0.13%', '0.12%')
    """
    return f"{math.ceil(share * 1e4 - 1e-9) / 100:.2f}%"


def _format_gap(gap: float) -> str:
    return "below 0.01%" if gap < 1e-4 else f"{gap * 100:.2f}%"
