"""Verdicts with hostile names, of every status, for the reports of a gate."""

from lora_diag.records import Results
from lora_diag.records.verdict import Verdict
from tests import building

HOSTILE = "model.\x1b[2J::error::x%0A,:\n|<b>`*&\"'\u202e\ud800 ]]>.weight"


def verdict(
    status="failed", rule="drift", layer="model.layers.0.mlp.up_proj.weight", **changes
) -> Verdict:
    given = {
        "rule": rule,
        "layer": layer,
        "measured": 0.5,
        "allowed": "relative <= 0.3",
        "status": status,
        "line": 7,
    }
    given |= {
        "severity": "warning" if status == "warned" else "error",
        "message": f"what to do about {rule}",
    }
    return Verdict(**(given | changes))


def results(*verdicts: Verdict, role="policy", path="gates/p.toml") -> Results:
    inputs = ((role, path), ("results", "r.jsonl"))
    return building.results((), command="gate", inputs=inputs, whole=verdicts, today="2026-11-25")


ONE_OF_EACH = (
    verdict("passed", layer="model.layers.1.mlp.up_proj.weight", measured=0.1, message=""),
    verdict("failed"),
    verdict("failed", layer="model.layers.2.mlp.up_proj.weight", measured=0.7),
    verdict(
        "inconclusive", "rank", layer="lm_head.weight", measured=None, message="null: not computed"
    ),
    verdict("warned", "spike", layer="lm_head.weight", line=None, message="look"),
    verdict(
        "waived",
        "drift",
        layer="model.embed_tokens.weight",
        message="waived to 2027-01-01: new tokens",
    ),
    verdict(
        "not judged",
        "rank",
        layer="model.layers.0.self_attn.q_proj.weight",
        measured=None,
        message="zero",
    ),
    verdict("passed", "finished", layer=None, measured=None, message="", line=None),
)
