"""Verdicts → a block of a model card, which replaces an earlier one."""

from __future__ import annotations

from collections import Counter
from typing import Any

from lora_diag.decisions.gate.github import cell
from lora_diag.decisions.gate.record import Verdict
from lora_diag.decisions.gate.summary import headline, verdicts_of, weights_of
from lora_diag.records import Results, RunInput
from lora_diag.rendering.cards import with_section


def model_card(results: Results[Any], card: str = "") -> str:
    """Return a model card with the result of a gate.

    Args:
        results: A run of ``gate``.
        card: The existing card; the block replaces an earlier one, or is appended. Line endings are kept.
    """
    return with_section(card, "gate", _make_block(results))


def _make_block(results: Results[Any]) -> str:
    policy = results.run.inputs[0]
    lines = [
        "## Checks before release",
        "",
        f"`loradiag gate` {results.run.version}, {results.run.settings['today']}: {cell(headline(results))}",
        f"(policy {cell(policy.path)}: {cell(policy.kind)}).",
        *map(_describe_weights, weights_of(results)),
        "",
        "| rule | allowed | outcome |",
        "| --- | --- | --- |",
    ]
    for rule in dict.fromkeys(verdict.rule for verdict in results.whole if isinstance(verdict, Verdict)):
        of_rule = [verdict for verdict in verdicts_of(results) if verdict.rule == rule]
        counts = Counter(verdict.status for verdict in of_rule)
        summary = ", ".join(f"{number} {status}" for status, number in counts.items())
        lines.append(f"| {cell(rule)} | {cell(of_rule[0].condition)} | {summary} |")
    return "\n".join(lines)


def _describe_weights(run_input: RunInput) -> str:
    text = cell(", ".join(run_input.notes))
    return f"Measured: {run_input.role} {cell(run_input.path)}, fingerprint `{run_input.fingerprint}`, {text}."
