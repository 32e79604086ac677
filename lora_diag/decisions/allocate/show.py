"""Terminal output of ``allocate``: ranks by layer, energy kept, and distance from the optimum.

Without a budget: ranks of several rules side by side.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from lora_diag.decisions.allocate.measure import head_of, task_type_of
from lora_diag.decisions.allocate.record import (
    UNFINISHED,
    Allocation,
    AllocationBaseline,
    Certificate,
    Policies,
)
from lora_diag.feature import Hint
from lora_diag.probes.sweep.verdict import swept_rate
from lora_diag.records import Results
from lora_diag.records.base import Shown
from lora_diag.records.names import part_of
from lora_diag.rendering.statements import (
    Statement,
    left_out,
    left_out_level,
    make_statement,
    summarize,
)
from lora_diag.rendering.tables import WIDE, Column, grid_of, grids_table, rows_of
from lora_diag.rendering.text import (
    list_layers,
    list_names,
    percent,
    quantity,
    safe,
    short,
    span,
    strip,
)

_UNITS = {"params": "parameters", "total_rank": "ranks", "bytes": "bytes", "energy": "parameters"}


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
    shown = [Shown("full_rank", "of", "Min(out, in)", main=True, pool="range", drop=2)]
    for rule in records[0].ranks:
        rank = _make_median(rule)
        shown.append(Shown(f"ranks.{rule}", rule, "Rank", main=True, form=".0f", pool=rank))
    grid = grid_of(shown, rows_of(records, per), per)
    return grids_table([grid], _describe_disagreements(records), width, color, next_command)


def _make_median(rule: str) -> Callable[[Sequence[Policies]], float | None]:
    """Return the function that gives the median rank by a rule; None where it cannot be applied to
    all records.
    """

    def median_of(group: Sequence[Policies]) -> float | None:
        ranks = [record.ranks[rule] for record in group]
        known = [rank for rank in ranks if rank is not None]
        return median(known) if len(known) == len(ranks) else None

    return median_of


def _describe_disagreements(records: Sequence[Policies]) -> list[Statement]:
    """State in how many layers rules differ by a factor of 2, where they differ most, and the
    meaning of each rule.
    """
    spread = []
    for record in records:
        ranks = {rank: name for name, rank in record.ranks.items() if rank and name != "signal"}
        if len(ranks) > 1:
            low, high = min(ranks), max(ranks)
            text = f"{short(record.layer)}: {ranks[low]} {low}, {ranks[high]} {high}"
            spread.append((high / low, text))
    statements = []
    if spread:
        differing = sum(ratio >= 2 for ratio, _ in spread)
        lead = f"by a factor of 2 or more in {differing} of {len(records)} layers; most in"
        statements.append(make_statement("disagree", "Disagreement", lead, max(spread)[1]))
    rules = make_statement(
        "rules",
        "Rules",
        "energy 90%: smallest r that keeps 90% of Σσ²; knee: point of the curve C(r) farthest "
        "above its chord",
        "effective: exp of the entropy of the energy; signal: values above the rounding noise of "
        "the files, an upper limit",
        "Gavish–Donoho: values above a threshold for spectra of mostly noise, unlike those of full "
        "updates",
    )
    return [*statements, rules]


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
        width: Columns of the terminal.
        color: Whether to use ANSI colours.
        per: ``type`` for one row per module type, ``layer`` for one row per layer.
        next_command: The suggested next command, printed last; None without one.
        sweep: Results of ``probe sweep``, source of a learning rate; None without one.

    Returns:
        Lines of text, without a trailing newline.
    """
    rows = rows_of(results, per)
    extra = []
    if per == "type":
        largest = max((record.rank for record in results), default=0) or 1
        bins = 24 if width >= WIDE else 8
        shares = [[record.rank / largest or None for record in group] for _, group in rows]
        strips = tuple(strip(of_row, bins) for of_row in shares)
        extra.append(Column("by depth", strips, "left", drop=3))
    grid = grid_of(Allocation.shown, rows, per, extra=extra)
    lines = allocation_lines(results)
    if sweep is not None:
        lines.append(make_statement("rate", "Learning rate", swept_rate(sweep)))
    return grids_table([grid], lines, width, color, next_command)


def suggest_next(
    results: Results[Allocation] | list[Policies], values: Mapping[str, Any]
) -> Hint | str:
    """Return the next step: a command, or advice on the written file."""
    output = values["output"]
    if isinstance(results, list):
        matrices = [record for record in results if part_of(record.layer) == "matrices"]
        params = 8 * sum(sum(record.shape) for record in matrices)
        command = f"--params {params} -o adapter_config.json"
        return Hint(command, "divides a budget, here that of r=8 in every layer")
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
        return (
            f"put the lines of {shlex.quote(str(output))} into the configuration of your training"
        )
    words = ["loradiag", "extract"]
    for role in ("base", "tuned", "adapter"):
        words += paths.get(role, [])
    words += ["--allocation", str(output)]
    for path in paths.get("activations", ()):
        words += ["--activations", path]
    if results.run.settings.get("metric") == "kfac":
        words.append("--kfac")
    return shlex.join([*words, "-o", "adapter"])


def allocation_lines(results: Results[Allocation]) -> list[Statement]:
    """Return the statements of the summary."""
    certificate = next((item for item in results.whole if isinstance(item, Certificate)), None)
    outside = left_out(results, _describe_outside(results))
    outside = replace(outside, level=left_out_level(results, "saved"), priority=1)
    findings = [] if certificate is None else _describe_findings(results, certificate)
    return summarize(
        results, *findings, skipped=outside, so_far="ranks of an incomplete file; allocate again"
    )


# Criterion of the ranks -> what fractions refer to, and the limits of the criterion.
_CRITERIA = {
    "gain": (
        "Σa_i of the directions that lower the loss",
        "a_i is a part of the gain along the straight path, not what training at these ranks gains",
    ),
    "fisher": (
        "ΣF(0), the Fisher information of discarding the whole update",
        "F estimates the cost of truncating each layer alone on its text; the joint cost may "
        "differ from the sum",
    ),
    "data": (
        "these layers' energy (Σσ², in the data metric)",
        "energy is the change of the outputs on that text, not the importance for the loss",
    ),
    "kfac": (
        "these layers' energy (Σσ², in K-FAC's metric)",
        "energy is the K-FAC estimate of the change of the loss",
    ),
    "weights": (
        "these layers' energy (Σσ²)",
        "energy is the size of the weight change, not the importance for the loss",
    ),
}


def _describe_findings(results: Results[Allocation], certificate: Certificate) -> list[Statement]:
    """State the ranks, their cost, the energy that they keep compared with the optimum and other
    rules, and limits.
    """
    settings = results.run.settings
    portable = settings.get("portable")
    is_loss = any(record.fisher is not None for record in results)
    by_loss = settings.get("criterion", "fisher")
    whole, limits = _CRITERIA[by_loss if is_loss else settings.get("metric", "weights")]
    if not is_loss and settings.get("layer_weights") is not None:
        whole = whole.replace("energy", "weighted energy")
    if settings.get("relative"):
        whole += ", each layer's counted as 1"
    keeps = [f"{certificate.kept:.2%} of {whole}; {_describe_optimum(certificate)}"]
    if certificate.energy_error > 1e-4:
        error = percent(certificate.energy_error)
        keeps.append(f"the measured spectra have an error of ±{error}")
    findings = [
        make_statement("allocated", "Allocated", *_describe_ranks(results)),
        make_statement("budget", "Budget", _describe_budget(results, certificate)),
        make_statement("heads", "Heads", *_describe_heads(results, certificate)),
        make_statement("keeps", "Gain kept" if by_loss == "gain" else "Energy kept", *keeps),
    ]
    if portable:
        refusals = _describe_refusals(results)
        findings.append(make_statement("portable", "Portable", *refusals, level="warning"))
    if certificate.price:
        compared = map(_compare_with_baseline, certificate.baselines)
        findings.append(make_statement("against", "Baselines", *compared))
        findings.append(make_statement("more", "Marginal gain", _describe_more(certificate)))
    if not portable:
        findings.append(make_statement("limits", "Limits", *_describe_limits(results)))
    findings.append(make_statement("note", "Note", f"{limits}: compare the held-out loss"))
    for text in _make_warnings(results):
        findings.append(make_statement("warning", "Warning", text, level="failure"))
    return findings


def _describe_ranks(results: Results[Allocation]) -> Iterator[str]:
    ranks = [record.rank for record in results if record.rank]
    zero = [record for record in results if not record.rank]
    if ranks:
        yield f"{len(ranks)} of {len(results)} layers get a rank, {span(ranks)}"
    else:
        yield "none"
    if zero:
        yield f"rank 0: {list_layers(zero)}; --min-rank sets a minimum"


def _describe_more(certificate: Certificate) -> str:
    """State what about a tenth more of the budget, or one more rank, can keep at most."""
    more = 1
    if certificate.unit != "total_rank":
        more = 10 ** int(math.log10(max(certificate.spent, 100) / 10))
    # An upper bound is rounded up.
    gain = math.ceil(certificate.more_at_most(more) * 1e4 - 1e-9) / 1e4
    return f"{more:,} more {_UNITS[certificate.unit]} keep at most another {gain:.2%}"


def _describe_budget(results: Results[Allocation], certificate: Certificate) -> str:
    requested = safe(str(results.run.settings.get("budget", "")))
    if certificate.budget is None:
        return f"{requested}: takes {certificate.params:,} parameters"
    spent = (
        f"{certificate.spent:,.0f} of {certificate.budget:,.0f} {_UNITS[certificate.unit]} spent"
    )
    text = f"{requested}: {spent}, {certificate.budget - certificate.spent:,.0f} left"
    if not certificate.price:
        text += "; every layer is at its cap, so a larger budget has no effect"
    return text if certificate.unit == "params" else f"{text}; {certificate.params:,} parameters"


def _describe_refusals(results: Results[Allocation]) -> Iterator[str]:
    """State what programs still refuse or drop in a portable allocation."""
    ranked = {record.layer.removesuffix(".weight") for record in results if record.rank}
    for module in sorted(ranked):
        owner, _, leaf = module.rpartition(".")
        sibling = {"q_proj": "v_proj", "v_proj": "q_proj", "k_proj": "q_proj"}.get(leaf)
        if sibling is not None and f"{owner}.{sibling}" not in ranked:
            yield f"SGLang refuses {short(module)} without {sibling}: --min-rank gives both a rank"
            break
    if any(item.reason == "saved" for item in results.left_out):
        yield (
            "heads trained in full: vLLM takes classifier and score alone, SGLang drops, "
            "llama.cpp refuses them"
        )


def _describe_heads(results: Results[Allocation], certificate: Certificate) -> Iterator[str]:
    """Name the heads that are trained in full, with their cost, and a task type that the user must
    set.
    """
    names = sorted(
        {head_of(item.layer) or item.layer for item in results.left_out if item.reason == "saved"}
    )
    if names:
        yield (
            f"{list_names(names)}: {certificate.saved:,} parameters, trained in full "
            "(modules_to_save)"
        )
        if task_type_of(results, names) is None:
            yield "task_type: not in the config of the fine-tune; set it in the PEFT config"


def _describe_optimum(certificate: Certificate) -> str:
    """State the distance from the optimum."""
    if certificate.unit == "energy":
        return (
            "an unconstrained choice with as many parameters could keep at most "
            f"{certificate.bound:.2%}"
        )
    if certificate.optimal:
        return "optimal within budget and caps"
    gap = "below 0.01%" if certificate.gap < 1e-4 else f"{certificate.gap:.2%}"
    return f"the optimum within budget and caps keeps at most {certificate.bound:.2%} (gap {gap})"


def _compare_with_baseline(baseline: AllocationBaseline) -> str:
    """Compare another rule with the ranks chosen for energy at its cost."""
    if not baseline.kept:
        return f"{baseline.name}: no rank of this rule fits the budget"
    return (
        f"{baseline.name} keeps {baseline.kept:.2%}; an allocation of its cost {baseline.equal:.2%}"
    )


def _describe_limits(results: Results[Allocation]) -> Iterator[str]:
    """State how many layers need more measured values for a larger rank, or do not reach a
    requested fraction.
    """
    few = sum(record.rank == record.cap and record.capped_by == "values_kept" for record in results)
    if few:
        layers = quantity(few, "layer")
        yield f"{layers} at a cap set by the values kept by --top: measure with a larger --top"
    share = results.run.settings.get("energy")
    if isinstance(share, float):
        below = [r for r in results if r.kept is not None and r.kept < share - 1e-6]
        if below:
            yield f"below {percent(share)} at the cap: {list_layers(below)}"


def _describe_outside(results: Results[Allocation]) -> str:
    """State the fraction of the change that an adapter cannot reach.

    It exists in the metric of the weights only: norms, biases and tables have no energy in others.
    """
    inside = math.fsum(record.fro**2 for record in results)
    skipped = [item for item in results.left_out if item.reason != "saved"]
    outside = math.fsum((item.fro or 0.0) ** 2 for item in skipped)
    if not outside or results.run.settings.get("metric", "weights") != "weights":
        return ""
    share = percent(outside / (inside + outside))
    return f"{share} of ‖Δ‖² of the measured tensors is outside this adapter"


def _make_warnings(results: Results[Allocation]) -> Iterator[str]:
    if any(record.source == "gradients" for record in results):
        yield "these are spectra of gradients: ranks for a first-order step, not for an update"
    if unresolved := [r for r in results if r.verdict == "unresolved" and r.fro > 0]:
        yield (
            f"mostly rounding noise: {quantity(len(unresolved), 'layer')}, with ranks up to the "
            "signal and an energy "
            "that is not the update's; measure the adapter or a float32 fine-tune"
        )
    if any(UNFINISHED in run_input.notes for run_input in results.run.inputs):
        yield "the spectrum run did not finish: missing layers have no rank"
