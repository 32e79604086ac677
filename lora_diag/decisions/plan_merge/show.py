"""Terminal output of ``plan-merge``: fraction kept, error of the format without an adapter, and
conclusion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_diag.decisions.plan_merge.record import (
    MAX_ERROR,
    FormatEffect,
    PlannedMerge,
    conclude_together,
    is_no_worse_than_unmerged,
    pool_effects,
    pool_ratios,
)
from lora_diag.feature import Hint
from lora_diag.records import Results
from lora_diag.rendering.statements import Level, Statement, make_statement, summarize
from lora_diag.rendering.text import count, factor, list_layers, number

# Formats that ``merge`` writes itself.
OUTPUT_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}


def suggest_next(results: Results[PlannedMerge], values: Mapping[str, Any]) -> Hint | None:
    """Return the next step: the merge, or how programs serve the adapter; None with nothing to
    merge.
    """
    outcome = conclude_together(results.layers)
    if outcome is None:
        return None
    if outcome == "serve unmerged":
        return Hint("portability {base} {adapter}", "the update that each serving program applies")
    dtype = OUTPUT_DTYPES.get(results.layers[0].to)
    words = f"--output-dtype {dtype} -o merged/" if dtype else "-o merged/"
    purpose = "merges it" if dtype else f"merges it, before it is stored as {results.layers[0].to}"
    return Hint(f"merge {{base}} {{adapter}} --checkpoint {words}", purpose)


def plan_lines(results: Results[PlannedMerge]) -> list[Statement]:
    """Return the statements of the summary."""
    records = results.layers
    if not records:
        return summarize(results)
    to = records[0].to
    others = _effects_of_16_bits(records)
    others.pop(to, None)
    kept = f"{to}: {_describe_effect(pool_effects(records))}"
    kept_by_others = [f"{name}: {_describe_effect(effect)}" for name, effect in others.items()]
    overflow = ""
    if hit := [record for record in records if record.overflow]:
        entries = count(sum(record.overflow for record in hit))
        overflow = f"{entries} entries of W + ΔW would be infinite, in {list_layers(hit)}"
    priority = 2 if conclude_together(records) == "merge" else 1
    return summarize(
        results,
        _describe_conclusion(records),
        make_statement("arrived", "Kept", kept, "; ".join(kept_by_others)),
        make_statement("overflow", "Overflow", overflow, level="warning"),
        make_statement("base", "Unmerged", _describe_base(records), priority=priority),
    )


def _describe_conclusion(records: Sequence[PlannedMerge]) -> Statement:
    outcome = conclude_together(records)
    to = records[0].to
    if outcome is None:
        text = "nothing to merge: every update is zero"
        return make_statement("conclusion", "Conclusion", text, level="warning", priority=0)
    keeping = [name for name, effect in _effects_of_16_bits(records).items() if effect.survives]
    base_error = pool_ratios(records, lambda record: record.base_error)
    rule = f"the rule of thumb (error at most {number(MAX_ERROR)} ‖ΔW‖)"
    advice = {
        "merge": f"merge: {to} keeps the update, by {rule}",
        "merge into 16 bit": f"merge into {' or '.join(keeping)}: {to} does not meet {rule}",
        "serve unmerged": f"serve unmerged: {to} does not meet {rule}",
    }[outcome]
    keeps_base = base_error is not None and base_error <= MAX_ERROR
    if outcome == "serve unmerged" and to not in {"bf16", "fp16"} and keeps_base:
        advice += f", but keeps BASE: BASE in {to} and the adapter lose nothing"
    lines = [advice]
    if others := [record for record in records if record.conclusion not in {outcome, None}]:
        layers = f"{len(others)} of {len(records)} layers alone"
        lines.append(f"{layers} have a different conclusion: {list_layers(others)}")
    level: Level = "ok" if outcome == "merge" else "warning"
    return make_statement("conclusion", "Conclusion", *lines, level=level, priority=0)


def _describe_effect(effect: FormatEffect) -> str:
    if effect.arrived is None or effect.error is None:
        return "overflows"
    return f"{factor(effect.arrived)} of ΔW, with an error of {number(effect.error)} ‖ΔW‖"


def _effects_of_16_bits(records: Sequence[PlannedMerge]) -> dict[str, FormatEffect]:
    return {
        "bf16": pool_effects(records, lambda record: record.bf16),
        "fp16": pool_effects(records, lambda record: record.fp16),
    }


def _describe_base(records: Sequence[PlannedMerge]) -> str:
    """Compare the merge with the adapter on the rounded BASE; where BASE is quantized, also on BASE
    as it is.
    """
    effect = pool_effects(records)
    error = pool_ratios(records, lambda record: record.base_error)
    if effect.error is None or error is None:
        return ""
    result = "no worse (rule of thumb)" if is_no_worse_than_unmerged(effect, error) else "worse"
    text = (
        f"BASE in {records[0].to} with the adapter: an error of {number(error)} ‖ΔW‖; the merge is "
        f"{result}"
    )
    if error > MAX_ERROR and any(record.base_noise is not None for record in records):
        text += "; BASE as it is, with the adapter unmerged, has no such error"
    return text
