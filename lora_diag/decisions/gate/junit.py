"""Verdicts → JUnit XML: one case for each rule and module type, as shown by CI servers.

A failure is ``failure``; inconclusive is ``error``, which no server counts as a pass; waived is ``skipped``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from lora_diag.decisions.gate.record import Verdict
from lora_diag.decisions.gate.summary import measured, subject_name, weights_of
from lora_diag.records import Results
from lora_diag.records.names import module_type_of
from lora_diag.rendering.text import safe

# Maximum number of layers of a group named.
NAMED = 50


def junit(results: Results[Any]) -> str:
    """Return a JUnit report of a run of ``gate``."""
    suites: dict[str, dict[str, list[Verdict]]] = {}
    for record in results.whole:
        if isinstance(record, Verdict):
            suites.setdefault(record.rule, {}).setdefault(_name_case(record), []).append(record)
    metric = results.run.settings.get("metric")
    root = Element("testsuites", name=safe(f"loradiag gate{f', spectra in {metric}' if metric else ''}"))
    if weights := weights_of(results):
        properties = SubElement(root, "properties")
        for run_input in weights:
            SubElement(
                properties, "property", name=safe(f"{run_input.role} {run_input.path}"), value=run_input.fingerprint
            )
    for rule, cases in suites.items():
        suite = SubElement(root, "testsuite", name=safe(rule))
        for name, verdicts in cases.items():
            _set_result(
                SubElement(suite, "testcase", classname=safe(f"loradiag.{rule}"), name=safe(name), time="0"), verdicts
            )
        _set_counts(suite, suite)
    _set_counts(root, root)
    indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + tostring(root, encoding="unicode") + "\n"


def _name_case(verdict: Verdict) -> str:
    kind = module_type_of(verdict.layer) if verdict.layer is not None else "all layers"
    return f"{kind} ({verdict.group})" if verdict.group else kind


def _set_result(case: Element, verdicts: Sequence[Verdict]) -> None:
    """Set the result of a case: its worst verdict."""
    for status, tag in (("failed", "failure"), ("inconclusive", "error")):
        bad = [verdict for verdict in verdicts if verdict.status == status and verdict.blocks]
        if bad:
            SubElement(case, tag, type=status, message=_make_message(bad)).text = _make_details(bad)
            return
    waived = [verdict for verdict in verdicts if verdict.status == "waived"]
    if waived and not any(verdict.status == "passed" for verdict in verdicts):
        SubElement(case, "skipped", message=safe(waived[0].message))
        return
    skipped = [verdict for verdict in verdicts if verdict.status == "not judged"]
    if len(skipped) == len(verdicts):
        SubElement(case, "skipped", message=safe(skipped[0].message))
        return
    others = [verdict for verdict in verdicts if verdict.status != "passed"]
    if others:
        SubElement(case, "system-out").text = _make_details(others)


def _make_message(verdicts: Sequence[Verdict]) -> str:
    first = verdicts[0]
    suffix = f" and {len(verdicts) - 1} more" if len(verdicts) > 1 else ""
    text = f": {safe(first.message)}" if first.message else ""
    return f"{subject_name(first)}{suffix}: {measured(first)}, allowed {safe(first.allowed)}{text}"


def _make_details(verdicts: Sequence[Verdict]) -> str:
    lines = [
        f"{subject_name(v)}: {v.status}, measured {measured(v)}, allowed {safe(v.allowed)}. {safe(v.message)}".strip()
        for v in verdicts[:NAMED]
    ]
    return "\n".join([*lines, *([f"and {len(verdicts) - NAMED} more"] if len(verdicts) > NAMED else [])])


def _set_counts(element: Element, within: Element) -> None:
    for name, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        element.set(name, str(sum(1 for _ in within.iter(tag))))
