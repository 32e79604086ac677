"""Terminal output of ``plan-merge``: fraction kept, error of the format without an adapter, and conclusion."""

from __future__ import annotations

from collections.abc import Sequence

from lora_diag.decisions.plan_merge.record import (
    COEFFICIENT_TOLERANCE,
    MAX_ERROR,
    FormatEffect,
    PlannedMerge,
    conclusion,
    rms,
    total,
)
from lora_diag.records import Results
from lora_diag.rendering.statements import Level, Statement, compared, final_statements, left_out, make_statement
from lora_diag.rendering.text import count, factor, list_names, number, percent

_WHY = {
    "merge": "the format keeps the update",
    "serve unmerged": "rounding would lose too much of the update",
}
# The format keeps BASE within MAX_ERROR, but not the update.
_BASE_ONLY = "the format keeps BASE but not the update: BASE in this format with the adapter unmerged loses nothing"


def plan_lines(results: Results[PlannedMerge]) -> list[Statement]:
    """Return the statements of the summary."""
    lines = [compared(results)]
    records = list(results)
    if records:
        lines += [
            _describe_conclusion(records),
            _describe_kept_update(records),
            *_describe_overflow(records),
            *_describe_base(records),
        ]
        lines.append(
            make_statement(
                "rules",
                "Rules",
                f"merge if c is within 1 ± {number(COEFFICIENT_TOLERANCE)} and the error at most "
                f"{number(MAX_ERROR)} over all layers; rules of thumb, compared with the loss of one LoRA only",
            )
        )
    return [*lines, left_out(results), *final_statements(results)]


def _describe_conclusion(records: Sequence[PlannedMerge]) -> Statement:
    outcome, to = conclusion(records), records[0].to
    if outcome is None:
        return make_statement(
            "conclusion", "Conclusion", "nothing to merge: every update is zero", level="warning", priority=0
        )
    sixteen = _effects_of_16_bits(records)
    keeping = [name for name, effect in sixteen.items() if effect.survives]
    verb = "does" if len(keeping) == 1 else "do"
    why = _WHY.get(outcome, f"the format does not keep the update, {' and '.join(keeping)} {verb}")
    base_error = rms(records, lambda record: record.base_error)
    if (
        outcome == "serve unmerged"
        and to not in {"bf16", "fp16"}
        and base_error is not None
        and base_error <= MAX_ERROR
    ):
        why = _BASE_ONLY
    level: Level = "ok" if outcome == "merge" else "warning"
    advice = f"merge into {' or '.join(keeping)}" if outcome == "merge into 16 bit" else outcome
    lines = [f"{advice} ({to}): {why}"]
    others = [record.layer for record in records if record.conclusion not in {outcome, None}]
    if others:
        lines.append(
            f"a different conclusion for {len(others)} of {len(records)} layers by themselves: {list_names(others)}"
        )
    return make_statement("conclusion", "Conclusion", *lines, level=level, priority=0)


def _describe_effect(effect: FormatEffect) -> str:
    if effect.arrived is None or effect.error is None:
        return "overflows"
    return f"c = {factor(effect.arrived)}, error {number(effect.error)}"


def _describe_kept_update(records: Sequence[PlannedMerge]) -> Statement:
    to = records[0].to
    lines = [f"in {to}: {_describe_effect(total(records))} over all layers"]
    others = [(name, effect) for name, effect in _effects_of_16_bits(records).items() if name != to]
    lines.append("; ".join(f"in {name}: {_describe_effect(effect)}" for name, effect in others))
    return make_statement("arrived", "Kept", *lines)


def _effects_of_16_bits(records: Sequence[PlannedMerge]) -> dict[str, FormatEffect]:
    return {
        "bf16": total(records, lambda record: record.bf16),
        "fp16": total(records, lambda record: record.fp16),
    }


def _describe_overflow(records: Sequence[PlannedMerge]) -> list[Statement]:
    hit = [record for record in records if record.overflow]
    if not hit:
        return []
    entries = sum(record.overflow for record in hit)
    line = f"{count(entries)} entries of W + ΔW would be infinite, in {list_names([record.layer for record in hit])}"
    return [make_statement("overflow", "Overflow", line, level="warning")]


def _describe_base(records: Sequence[PlannedMerge]) -> list[Statement]:
    """State the error of the format on BASE alone, and of BASE's own format."""
    lines = []
    error = rms(records, lambda record: record.base_error)
    if error is not None:
        factored = [record for record in records if record.base_error_inside is not None]
        inside = rms(factored, lambda record: record.base_error_inside)
        inner = f", {number(inside)} ‖ΔW‖ of it in the adapter's input space" if inside is not None else ""
        lines.append(f"{records[0].to} alone changes BASE by {number(error)} ‖ΔW‖{inner}")
    noisy = [record for record in records if record.base_noise is not None]
    noise = rms(noisy, lambda record: record.base_noise)
    if noise is not None:
        share = percent(len(noisy) / len(records))
        lines.append(f"BASE is quantized in {share} of the layers: its own rounding noise is {number(noise)} ‖ΔW‖")
        if error is not None and error > MAX_ERROR:
            lines.append(
                f"{records[0].to} does not reuse BASE's scales: unchanged BASE with the adapter unmerged has no "
                "such error"
            )
    return [make_statement("base", "Base", *lines)] if lines else []
