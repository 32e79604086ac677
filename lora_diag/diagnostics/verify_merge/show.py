"""Terminal output of ``verify-merge``: the worst layers first, and a summary with likely causes and
fixes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from lora_diag.diagnostics.verify_merge.record import ORDER, Merge, MergeStatus, outcome
from lora_diag.feature import Hint
from lora_diag.records import Results
from lora_diag.records.names import module_type_of, type_order
from lora_diag.rendering.statements import (
    Level,
    Statement,
    describe_lineage,
    left_out,
    make_statement,
    summarize,
)
from lora_diag.rendering.tables import Grid, grid_of
from lora_diag.rendering.text import list_layers, number, percent, quantity, safe, short

# Remedy for each fault.
REMEDIES: dict[MergeStatus, str] = {
    "missing": "save the whole merged model again, under BASE's names",
    "dropped": "merge again, and check that the merge finds these modules in the adapter (names, "
    "target_modules)",
    "partial": "merge again from complete weights: a shard, a rank or a block of rows is missing",
    "wrong scale": "merge again with the scaling that adapter_config.json gives, once",
    "transposed": "merge again with the model's own class, which handles weights stored as (in, "
    "out)",
    "wrong order": "merge again with versions of peft and transformers that use the same order of "
    "experts and halves",
    "other base": "give the BASE of the merge, or merge again into this one",
    "changed": "merge again from BASE, or find what else changed these weights",
    "other": "check that this is the merged adapter; else merge again from BASE (peft's "
    "merge_and_unload())",
}

# A correct merge that kept less than this fraction of ΔW in a layer gets a warning.
WEAK_RETENTION = 0.9

# Maximum number of causes stated per fault.
SHOWN = 3
_ERROR = re.compile(r"(?<=\d) ± [\d.e+-]+(?=[,:])")


def merge_grids(results: Results[Merge], per: str = "type") -> list[Grid]:
    """Return the table, the worst status first; empty without layers."""
    rows = _group_rows(results, per)
    return [grid_of(Merge.shown, rows, per)] if rows else []


def _group_rows(results: Results[Merge], per: str) -> list[tuple[str, list[Merge]]]:
    """Return the layers by name and status, the worst status first; intact layers without an update
    share a name.
    """
    groups: dict[tuple[str, MergeStatus], list[Merge]] = {}
    for record in results:
        name = short(module_type_of(record.layer) if per == "type" else record.layer)
        if not record.adapted and not record.failed:
            name = "(not adapted)"
        groups.setdefault((name, record.status), []).append(record)

    def order(row: tuple[str, list[Merge]]) -> tuple[int, bool, Any]:
        first = row[1][0]
        return ORDER.index(first.status), not first.adapted, type_order(first.layer)

    return sorted(((name, records) for (name, _), records in groups.items()), key=order)


_LEVELS: dict[str, Level] = {"failed": "failure", "inconclusive": "warning"}


def suggest_next(results: Results[Merge], values: Mapping[str, Any]) -> Hint | None:
    """Return the hint to show the results per layer; None after a correct merge."""
    if outcome(results) == "correct":
        return None
    command = "--by layer" if values["output"] is None else "inspect {output} --by layer"
    return Hint(command, "layer by layer")


def merge_lines(results: Results[Merge]) -> list[Statement]:
    """Return the statements of the summary."""
    findings = []
    if len(results):
        level = _LEVELS.get(outcome(results), "ok")
        correct = _describe_correctness(results)
        findings = [
            describe_lineage(results, "MERGED"),
            make_statement("correct", "Correctness", correct, level=level, priority=0),
            *_describe_faults(results),
            make_statement("rounding", "Rounding", _describe_rounding(results)),
            make_statement("lost", "Lost update", *_describe_weakened(results), level="warning"),
        ]
    skipped = left_out(results)
    return summarize(
        results,
        *findings,
        skipped=replace(skipped, lead=skipped.lead.replace("TUNED", "MERGED")),
        so_far="layers checked so far",
    )


def _describe_correctness(results: Results[Merge]) -> str:
    """State whether the merge is correct, and why not."""
    adapted = [record for record in results if record.adapted]
    layers = quantity(len(adapted), "adapted layer")
    status = outcome(results)
    if status == "inconclusive":
        return f"inconclusive: {_explain_inconclusive(adapted)}"
    if status == "failed":
        clauses = []
        if failed := sum(record.failed for record in adapted):
            clauses.append(f"{failed} of {layers} are not W + ΔW")
        if changed := sum(record.failed for record in results if not record.adapted):
            clauses.append(f"{quantity(changed, 'layer')} without an update changed")
        return f"no: {' and '.join(clauses)}"
    text = f"yes: all {layers} are W + ΔW, every entry within what rounding allows"
    if others := len(results) - len(adapted):
        text += f"; the {others} others are BASE"
    return text


def _explain_inconclusive(adapted: Sequence[Merge]) -> str:
    """State why adapted layers without a failure do not show whether the merge is correct."""
    expected = [record for record in adapted if record.expected_fro]
    if not expected:
        return "the adapter's update is zero everywhere (was it trained?), so the merge is BASE"
    if all(record.unchanged == 1 for record in expected):
        return (
            "MERGED is BASE in every adapted layer. The update is so small that rounding gives the "
            "same result as a "
            "merge that did not happen; merge into float32, or serve the adapter unmerged"
        )
    unclear = [record for record in adapted if record.status == "inconclusive"]
    return (
        f"in {len(unclear)} of {quantity(len(adapted), 'adapted layer')} MERGED's values are too "
        "coarse to distinguish BASE + ΔW from BASE, or from BASE + c·ΔW with another c: "
        f"{list_layers(unclear)}; merge into a finer dtype"
    )


def _describe_faults(results: Results[Merge]) -> list[Statement]:
    """State the layers, cause and fix of every failing status, then its further causes."""
    by_status: dict[MergeStatus, dict[str, list[Merge]]] = {}
    for record in sorted(results, key=lambda record: ORDER.index(record.status)):
        if record.failed:
            cause = _ERROR.sub("", record.cause)  # layers with one scale differ in its error
            by_status.setdefault(record.status, {}).setdefault(cause, []).append(record)
    lines = []
    for status, causes in by_status.items():
        listed = [f"{list_layers(layers)}: {safe(cause)}" for cause, layers in causes.items()]
        text = [f"{listed[0]} → {REMEDIES[status]}", *listed[1:SHOWN]]
        if remaining := sum(len(layers) for layers in list(causes.values())[SHOWN:]):
            layers = quantity(remaining, "layer")
            text.append(f"and {layers} more; --by layer and the records name each")
        key = status.replace(" ", "_")
        lines.append(make_statement(key, status.capitalize(), *text, level="failure"))
    return lines


def _describe_rounding(results: Results[Merge]) -> str:
    """State how much of the update the dtype of MERGED kept where the merge is correct."""
    correct = _list_correct(results)
    if not correct:
        return "unknown: no adapted layer is correct"
    least, worst = correct[0]
    middle = _format_kept(median(kept for kept, _ in correct))
    text = (
        f"at least {_format_kept(least)} of ΔW was kept ({middle} at the median), least in "
        f"{short(worst.layer)}"
    )
    errors = [record.scale_error for _, record in correct if record.scale_error is not None]
    return f"{text}; standard error at most {number(100 * max(errors))}%" if errors else text


def _list_correct(results: Results[Merge]) -> list[tuple[float, Merge]]:
    """Return the correct adapted layers with the fraction of ΔW that each kept, in ascending order
    of it.
    """
    correct = [
        (record.retained, record)
        for record in results
        if record.adapted and record.retained is not None
    ]
    return sorted(correct, key=lambda pair: pair[0])


def _format_kept(share: float) -> str:
    """Return a fraction as a percentage, with two decimals near 100%."""
    return f"{share:.2%}" if 0.99 < share < 1.01 else percent(share)


def _describe_weakened(results: Results[Merge]) -> tuple[str, ...]:
    """State the layers in which rounding removed much of the update or added much noise; empty
    without any.
    """
    weak = [
        record
        for kept, record in _list_correct(results)
        if kept < WEAK_RETENTION or (record.residual or 0.0) > 1
    ]
    if not weak:
        return ()
    return (
        f"rounding removed more than {1 - WEAK_RETENTION:.0%} of ΔW, or added more noise than "
        f"‖ΔW‖, in {quantity(len(weak), 'layer')}: {list_layers(weak)}",
        "the dtype is too coarse for this adapter: serve it unmerged, or merge into float32",
    )
