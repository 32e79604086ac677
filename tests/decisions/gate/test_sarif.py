"""SARIF 2.1.0: the parts in use conform to its schema, and only passes are passes."""

import json

from lora_diag.decisions.gate.sarif import sarif
from tests.decisions.gate.gated import HOSTILE, ONE_OF_EACH, results, verdict


def run(*verdicts, **more) -> dict:
    log = json.loads(sarif(results(*verdicts, **more)))
    assert log["version"] == "2.1.0"
    (only,) = log["runs"]
    rules = only["tool"]["driver"]["rules"]
    assert len({rule["id"] for rule in rules}) == len(rules)
    for result in only["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] in {"error", "warning"}
        assert result["message"]["text"]
    return only


def test_sarif_has_every_verdict_except_passed():
    result = run(*ONE_OF_EACH)["results"]
    assert [(r["ruleId"], r["level"], "suppressions" in r) for r in result] == [
        ("drift", "error", False),
        ("drift", "error", False),
        ("rank", "error", False),
        ("spike", "warning", False),
        ("drift", "error", True),
    ]
    place = result[0]["locations"][0]
    assert place["physicalLocation"] == {"artifactLocation": {"uri": "gates/p.toml"}, "region": {"startLine": 7}}
    assert place["logicalLocations"][0]["fullyQualifiedName"] == "model.layers.2.mlp.up_proj.weight"


def test_hostile_names_and_paths():
    (result,) = run(verdict(layer=HOSTILE, message=HOSTILE), path="a b/%.toml")["results"]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "a%20b/%25.toml"
    (result,) = run(verdict(), role="built-in policy", path="merge")["results"]
    assert "physicalLocation" not in result["locations"][0]
