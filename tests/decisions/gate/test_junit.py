"""JUnit, read by an XML parser: a case for each rule and module type, and nothing that is no pass counted as one."""

from collections import Counter
from xml.etree import ElementTree

import pytest

from lora_diag.decisions.gate.junit import junit
from tests.decisions.gate.gated import HOSTILE, ONE_OF_EACH, results, verdict


def cases(text: str) -> dict[tuple[str, str], str]:
    root = ElementTree.fromstring(text)
    assert root.tag == "testsuites"
    result = {}
    for suite in root.findall("testsuite"):
        tags = Counter(child.tag for case in suite for child in case)
        counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
        assert counts == {
            "tests": len(suite.findall("testcase")),
            "failures": tags["failure"],
            "errors": tags["error"],
            "skipped": tags["skipped"],
        }
        for case in suite:
            outcomes = [child.tag for child in case if child.tag != "system-out"]
            assert len(outcomes) < 2
            result[suite.get("name"), case.get("name")] = outcomes[0] if outcomes else "passed"
    totals = Counter(result.values())
    assert [int(root.get(name)) for name in ("tests", "failures", "errors", "skipped")] == [
        len(result),
        totals["failure"],
        totals["error"],
        totals["skipped"],
    ]
    return result


def test_junit_case_is_rule_and_module_type():
    assert cases(junit(results(*ONE_OF_EACH))) == {
        ("drift", "mlp.up_proj"): "failure",
        ("drift", "embed_tokens"): "skipped",
        ("rank", "lm_head"): "error",
        ("rank", "self_attn.q_proj"): "skipped",
        ("spike", "lm_head"): "passed",
        ("finished", "all layers"): "passed",
    }


def test_failure_names_its_layers_values_and_what_to_do():
    root = ElementTree.fromstring(junit(results(*ONE_OF_EACH)))
    failure = root.find(".//failure")
    assert "what to do about drift" in failure.get("message")
    assert "model.layers.2.mlp.up_proj: failed, measured 0.7, allowed relative <= 0.3" in failure.text


@pytest.mark.parametrize("text", [HOSTILE, "\x00\x08\ufffe\uffff", "]]>", "<!--", "&amp;"])
def test_hostile_names_are_text(text):
    report = junit(results(verdict(layer=text, group=text, message=text, allowed=text, rule="r")))
    report.encode("utf-8")
    assert list(cases(report).values()) == ["failure"]


def test_adapter_groups_are_separate_cases():
    result = cases(junit(results(verdict(group="adapter a"), verdict("passed", group="adapter b"))))
    assert result == {("drift", "mlp.up_proj (adapter a)"): "failure", ("drift", "mlp.up_proj (adapter b)"): "passed"}
