"""Outputs as their readers parse them: JUnit by XML, workflow commands by GitHub's runner; and a
model card.
"""

import re
from collections import Counter
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_diag.rendering.verdicts import junit, step_summary, workflow_commands
from tests.gating.gated import HOSTILE, ONE_OF_EACH, results, verdict

BEGIN, END = "<!-- loradiag gate: begin -->", "<!-- loradiag gate: end -->"
UNESCAPED = (("%3A", ":"), ("%2C", ","), ("%0D", "\r"), ("%0A", "\n"), ("%25", "%"))


def parsed(line: str) -> tuple[str, dict[str, str], str]:
    """What the runner makes of a line (actions/runner, ActionCommand.cs): a command, its
    properties, its text.
    """
    result = re.fullmatch(r"::(?P<command>\w+)(?: (?P<properties>.*?))?::(?P<text>.*)", line)
    assert result, line
    properties = dict(
        item.split("=", 1) for item in (result["properties"] or "").split(",") if item
    )

    def unescape(text, pairs):
        for code, char in pairs:
            text = text.replace(code, char)
        return text

    return (
        result["command"],
        {key: unescape(value, UNESCAPED) for key, value in properties.items()},
        unescape(result["text"], UNESCAPED[2:]),
    )


def test_annotations_are_one_per_rule_on_policys_lines():
    result = [parsed(line) for line in workflow_commands(results(*ONE_OF_EACH))]
    assert [command for command, _, _ in result] == ["error", "error", "warning"]
    assert result[0][1] == {"file": "gates/p.toml", "line": "7", "title": "loradiag gate: drift"}
    assert "model.layers.2.mlp.up_proj: failed, measured 0.7" in result[0][2]
    assert "file" not in result[2][1]


@given(st.text(), st.text(min_size=1))
def test_text_stays_quoted_in_commands(text, path):
    lines = workflow_commands(results(verdict(layer=text, message=text, group=text), path=path))
    assert len(lines) == 1
    assert not re.search(r"[\r\n]", lines[0])
    command, properties, _ = parsed(lines[0])
    assert command == "error"
    assert properties["file"] == path


def test_step_summary_stays_within_github_limit():
    many = [verdict(layer=f"model.layers.{i}.{'ü' * 200}.weight") for i in range(5000)]
    text = step_summary(results(*many))
    assert len(text.encode()) <= 900 * 1024
    rows = text.count("\n| failed |")
    assert re.search(r"\n(\d+) more are in the records", text)[1] == str(5000 - rows)
    short = step_summary(results(*ONE_OF_EACH))
    assert "more are in" not in short
    assert short.count("\n| ") == len(ONE_OF_EACH) + 2


def test_unsafe_name_stays_in_one_cell():
    text = step_summary(results(verdict(layer=HOSTILE)))
    (row,) = [line for line in text.splitlines() if line.startswith("| failed")]
    assert row.count("|") == 6
    assert not re.search(r"[<>`*]", row)
    text.encode("utf-8")


def cases(text: str) -> dict[tuple[str, str], str]:
    root = ElementTree.fromstring(text)
    assert root.tag == "testsuites"
    result = {}
    for suite in root.findall("testsuite"):
        own = {}
        for case in suite.findall("testcase"):
            outcomes = [child.tag for child in case if child.tag != "system-out"]
            assert len(outcomes) < 2
            own[suite.get("name"), case.get("name")] = outcomes[0] if outcomes else "passed"
        check_counts(suite, Counter(own.values()))
        result |= own
    check_counts(root, Counter(result.values()))
    return result


def check_counts(element: ElementTree.Element, outcomes: Counter) -> None:
    counts = {f"{name}s": outcomes[name] for name in ("failure", "error")} | {
        "skipped": outcomes["skipped"]
    }
    counts["tests"] = outcomes.total()
    assert {name: int(element.get(name)) for name in counts} == counts


def test_junit_case_is_rule_and_module_type():
    assert cases(junit(results(*ONE_OF_EACH))) == {
        ("drift", "mlp.up_proj"): "failure",
        ("drift", "embed_tokens"): "skipped",
        ("rank", "lm_head"): "error",
        ("rank", "self_attn.q_proj"): "skipped",
        ("spike", "lm_head"): "passed",
        ("finished", "all layers"): "passed",
    }


def test_layer_that_does_not_block_makes_no_error():
    """Nor is a case skipped of which one layer passed."""
    unknown = results(verdict("inconclusive", severity="warning"))
    assert list(cases(junit(unknown)).values()) == ["passed"]
    assert [parsed(line)[0] for line in workflow_commands(unknown)] == ["warning"]
    waived = verdict("waived"), verdict("passed", layer="model.layers.1.mlp.up_proj.weight")
    assert list(cases(junit(results(*waived))).values()) == ["passed"]


@pytest.mark.parametrize("text", [HOSTILE, "\x00\x08\ufffe\uffff", "]]>", "<!--", "&amp;"])
def test_hostile_names_are_text(text):
    report = junit(results(verdict(layer=text, group=text, message=text, allowed=text, rule="r")))
    report.encode("utf-8")
    assert list(cases(report).values()) == ["failure"]
