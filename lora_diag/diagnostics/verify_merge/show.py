"""Terminal output of ``verify-merge``: failures first, with likely cause and fix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from lora_diag.diagnostics.verify_merge.record import ORDER, Merge, MergeStatus, outcome
from lora_diag.feature import Hint
from lora_diag.records import Results
from lora_diag.records.names import module_type_of, type_order
from lora_diag.rendering.statements import Level, Statement, left_out, make_statement, summarize
from lora_diag.rendering.tables import Grid, grid_of
from lora_diag.rendering.text import list_layers, number, percent, quantity, safe, short

# Remedy for each fault.
REMEDIES: dict[MergeStatus, str] = {
    "missing": "save the whole merged model again, under BASE's names",
    "dropped": "merge again, and check that the merge finds these modules in the adapter (names, target_modules)",
    "partial": "merge again from complete weights: a shard, a rank or a block of rows is missing",
    "wrong scale": "merge again with the scaling that adapter_config.json gives, once",
    "transposed": "merge again with the model's own class, which handles weights stored as (in, out)",
    "wrong order": "merge again with versions of peft and transformers that use the same order of experts and halves",
    "other base": "give the BASE of the merge, or merge again into this one",
    "changed": "merge again from BASE, or find what else changed these weights",
    "other": "check that this is the merged adapter; else merge again from BASE (peft's merge_and_unload())",
}

# A correct merge that kept less than this fraction of ΔW in a layer gets a warning.
WEAK_RETENTION = 0.9
# Standard errors below this are not stated: fractions are shown as percentages with two decimals.
INVISIBLE_ERROR = 5e-5

# Maximum number of causes stated per fault.
SHOWN = 3


def merge_grids(results: Results[Merge], per: str = "type") -> list[Grid]:
    """Return the table, the worst status first; empty without layers."""
    rows = _group_rows(results, per)
    return [grid_of(Merge.shown, rows, per)] if rows else []


def _group_rows(results: Results[Merge], per: str) -> list[tuple[str, list[Merge]]]:
    """Return the layers by name and status, the worst status first; correct layers without an update are one row."""
    groups: dict[tuple[str, MergeStatus], list[Merge]] = {}
    for record in results:
        name = short(module_type_of(record.layer) if per == "type" else record.layer)
        if not record.adapted and not record.failed:
            name = "(not adapted)"
        groups.setdefault((name, record.status), []).append(record)

    def order(row: tuple[str, list[Merge]]) -> tuple[int, bool, tuple[bool, bool, int]]:
        """Return the sort key of a row: status, adapted or not, and place in the model."""
        first = row[1][0]
        return ORDER.index(first.status), not first.adapted, type_order(first.layer)

    return sorted(((name, records) for (name, _), records in groups.items()), key=order)


_LEVELS: dict[str, Level] = {"failed": "failure", "inconclusive": "warning"}


def suggest_next(results: Results[Merge], values: Mapping[str, Any]) -> Hint | None:
    """Return the hint to show the results per layer; None after a correct merge."""
    if outcome(results) == "correct":
        return None
    return Hint("--per layer" if values["output"] is None else "inspect {output} --per layer", "layer by layer")


def merge_lines(results: Results[Merge]) -> list[Statement]:
    """Return the statements of the summary."""
    findings = []
    if len(results):
        level = _LEVELS.get(outcome(results), "ok")
        findings = [
            make_statement("correct", "Correctness", _describe_correctness(results), level=level, priority=0),
            *_describe_faults(results),
            make_statement("rounding", "Rounding", _describe_rounding(results)),
            make_statement("lost", "Lost update", _describe_weakened(results), level="warning"),
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
    failed = [record for record in adapted if record.failed]
    changed = sum(record.failed for record in results if not record.adapted)
    status = outcome(results)
    if status == "failed":
        clauses = [f"{len(failed)} of {quantity(len(adapted), 'adapted layer')} are not W + ΔW"] if failed else []
        clauses += [f"{quantity(changed, 'layer')} without an update changed"] if changed else []
        return f"no: {' and '.join(clauses)}"
    if status == "inconclusive":
        return f"inconclusive: {_explain_inconclusive(adapted)}"
    coarse = sum(record.status == "coarse" for record in adapted)
    suffix = f"; {coarse} of them not to the last bit, because ΔW was computed less precisely" if coarse else ""
    layers = quantity(len(adapted), "adapted layer")
    others = f"; the {len(results) - len(adapted)} others are BASE" if len(adapted) < len(results) else ""
    return f"yes: all {layers} are W + ΔW, every entry within what rounding allows{suffix}{others}"


def _explain_inconclusive(adapted: Sequence[Merge]) -> str:
    """State why adapted layers without a failure do not show whether the merge is correct."""
    if all(not record.expected_fro for record in adapted):
        return "the adapter's update is zero everywhere (was it trained?), so the merge is BASE"
    is_base = all(record.unchanged == 1 for record in adapted if record.expected_fro)
    unclear = [record for record in adapted if record.status == "inconclusive"]
    if unclear and not is_base:
        return (
            f"in {len(unclear)} of {quantity(len(adapted), 'adapted layer')} MERGED's values are too coarse to "
            f"distinguish BASE + ΔW from BASE, or from BASE + c·ΔW with another c: {list_layers(unclear)}; merge into "
            "a finer dtype"
        )
    return (
        "MERGED is BASE in every adapted layer. The update is so small that rounding gives the same result as a "
        "merge that did not happen; merge into float32, or serve the adapter unmerged"
    )


def _describe_faults(results: Results[Merge]) -> list[Statement]:
    """State the layers, cause and fix of every failing status, then its further causes."""
    by_status: dict[MergeStatus, dict[str, list[Merge]]] = {}
    for record in sorted(results, key=lambda record: ORDER.index(record.status)):
        if record.failed:
            by_status.setdefault(record.status, {}).setdefault(record.cause, []).append(record)
    lines = []
    for status, causes in by_status.items():
        listed = [f"{list_layers(layers)}: {safe(cause)}" for cause, layers in list(causes.items())[:SHOWN]]
        if remaining := sum(len(layers) for layers in list(causes.values())[SHOWN:]):
            listed.append(f"and {quantity(remaining, 'layer')} more; --per layer and the records name each")
        key, text = status.replace(" ", "_"), [f"{listed[0]} → {REMEDIES[status]}", *listed[1:]]
        lines.append(make_statement(key, status.capitalize(), *text, level="failure"))
    return lines


def _describe_rounding(results: Results[Merge]) -> str:
    """State how much of the update the dtype of MERGED kept where the merge is correct."""
    correct = [record for record in results if record.adapted and record.retained is not None]
    if not correct:
        return "unknown: no adapted layer is correct"
    retained = {record.layer: record.retained for record in correct if record.retained is not None}
    worst = min(retained, key=retained.__getitem__)
    noise = median(record.residual for record in correct if record.residual is not None)
    unchanged = median(record.unchanged for record in correct if record.unchanged is not None)
    text = f"{_format_kept(retained[worst])} of ΔW was kept"
    if len(retained) > 1 and retained[worst] > 0.995:
        text = f"at least {text} in every layer"
    elif len(retained) > 1:
        text = f"{_format_kept(median(retained.values()))} of ΔW was kept at the median, least in {short(worst)}: "
        text += _format_kept(retained[worst])
    errors = [record.scale_error for record in correct if record.scale_error is not None]
    if errors and max(errors) >= INVISIBLE_ERROR:
        text += f" (standard error at most {number(100 * max(errors))}%)"
    if any(record.failed for record in results if record.adapted):
        text = f"where the merge is correct, {text}"
    return f"{text}; median noise {number(noise)} ‖ΔW‖, {percent(unchanged)} of the entries unchanged"


def _format_kept(share: float) -> str:
    """Return a fraction as a percentage, with two decimals near 100%."""
    return f"{share:.2%}" if 0.99 < share < 1.01 else percent(share)


def _describe_weakened(results: Results[Merge]) -> str:
    """State the layers in which rounding removed much of the update or added much noise; empty without any."""
    weakened = [
        (record.retained, record)
        for record in results
        if record.adapted and record.retained is not None and record.residual is not None
        if record.retained < WEAK_RETENTION or record.residual > 1
    ]
    if not weakened:
        return ""
    weak = [record for _, record in sorted(weakened, key=lambda pair: pair[0])]
    return (
        f"rounding removed more than {1 - WEAK_RETENTION:.0%} of ΔW, or added more noise than ‖ΔW‖, in "
        f"{quantity(len(weak), 'layer')}: {list_layers(weak)}\n"
        "the dtype is too coarse for this adapter: serve it unmerged, or merge into float32"
    )
