"""Verdicts → SARIF 2.1.0 for code scanning: all verdicts that do not pass, at their rule's line of the policy."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

from lora_diag.decisions.gate.record import Verdict
from lora_diag.decisions.gate.summary import measured, policy_file, subject_name, verdicts_of, weights_of
from lora_diag.records import Results
from lora_diag.rendering.text import safe
from lora_diag.version import __version__

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def sarif(results: Results[Any]) -> str:
    """Return a SARIF log of a run of ``gate``."""
    verdicts = verdicts_of(results)
    policy = policy_file(results)
    rules = list(dict.fromkeys(verdict.rule for verdict in verdicts))
    driver = {
        "name": "loradiag",
        "version": __version__,
        "rules": [
            {"id": safe(rule), "shortDescription": {"text": safe(_find_allowed(verdicts, rule))}} for rule in rules
        ],
    }
    reported = [verdict for verdict in verdicts if verdict.status not in {"passed", "not judged"}]
    run: dict[str, Any] = {
        "tool": {"driver": driver},
        "results": [_make_result(verdict, rules.index(verdict.rule), policy) for verdict in reported],
    }
    if weights := weights_of(results):
        run["artifacts"] = [
            {
                "location": {"uri": quote(run_input.path)},
                "description": {"text": safe(f"{run_input.role}: {', '.join((run_input.kind, *run_input.notes))}")},
                "hashes": {"loradiag-fingerprint": run_input.fingerprint},
            }
            for run_input in weights
        ]
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2, ensure_ascii=False) + "\n"


def _find_allowed(verdicts: list[Verdict], rule: str) -> str:
    return next(verdict.allowed for verdict in verdicts if verdict.rule == rule)


def _make_result(verdict: Verdict, index: int, policy: str | None) -> dict[str, Any]:
    sentence = f" {verdict.message}" if verdict.message else ""
    text = (
        f"{subject_name(verdict)}: {verdict.status}, measured {measured(verdict)}, allowed {verdict.allowed}.{sentence}"
    )
    location: dict[str, Any] = {"logicalLocations": [{"fullyQualifiedName": safe(verdict.layer or "all layers")}]}
    if policy is not None:
        region = {"startLine": verdict.line or 1}
        location["physicalLocation"] = {"artifactLocation": {"uri": quote(policy)}, "region": region}
    result: dict[str, Any] = {
        "ruleId": safe(verdict.rule),
        "ruleIndex": index,
        "level": "error" if verdict.severity == "error" else "warning",
        "message": {"text": safe(text)},
        "locations": [location],
    }
    if verdict.status == "waived":
        result["suppressions"] = [{"kind": "external", "justification": safe(verdict.message)}]
    return result
