"""The command: exit codes, records, JUnit and annotations, ``explain``, and what it costs."""

import json
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from lora_diag import catalog
from lora_diag.errors import MAX_MESSAGE
from lora_diag.explanations.terms import all_terms, remedy_of
from lora_diag.linting.record import LintFinding, StepShare
from lora_diag.linting.rules import RULES
from lora_diag.linting.run import MAX_FINDINGS, lint
from tests.linting.making import PEFT, make_base, write_config
from tests.messages import assert_names
from tests.served import ROOT


@pytest.fixture
def inputs(tmp_path):
    make_base(tmp_path / "base")
    write_config(tmp_path / "bad.yaml", {"base_model": "x", "learning_rate": 1e-6, "bf16": True})
    write_config(tmp_path / "adapter_config.json", {**PEFT, "r": 128, "lora_alpha": 8})
    return tmp_path


def test_exit_code_follows_severity(run, inputs):
    assert run("lint", "base", "bad.yaml").code == 1
    assert run("lint", "bad.yaml").code == 0
    assert run("lint", "base", "adapter_config.json").code == 0  # warnings
    assert run("lint", "base", "adapter_config.json", "--fail-on", "warning").code == 1
    assert run("lint", "base", "none.yaml").code == 3
    assert run("lint", "none", "bad.yaml").code == 3
    for words in (["bad.yaml", "base"], ["adapter_config.json", "base"]):
        swapped = run("lint", *words)
        assert swapped.code == 2
        assert_names(swapped.err, words[0], "the order is", "[BASE] CONFIG")
    assert run("lint", "base", "bad.yaml", "--consumers", "nginx").code == 2
    assert (
        run("lint", "base", "--finetuning-type", "full", "--lr", "1e-6", "--dtype", "bfloat16").code
        == 1
    )


def test_first_line_is_decision_then_evidence(loradiag, inputs):
    lines = loradiag("lint", "base", "bad.yaml", brief=True).out.splitlines()
    assert_names(lines[0], "Lint", "1 error")
    assert_names(lines[1], "bf16-step", "1.0e-06")
    assert len(lines) <= 8
    assert any(line.startswith("Next") and "explain bf16-step" in line for line in lines)
    assert "clean" in loradiag("lint", str(ROOT / "sample_checkpoints" / "lora_r4")).out


def test_records_are_written_and_judged_by_gate(run, inputs):
    assert run("lint", "base", "bad.yaml", "-o", "l.jsonl", "-q").code == 1
    results = catalog.read_results(inputs / "l.jsonl")
    (finding,) = results.whole_of(LintFinding)
    assert (finding.id, finding.where.endswith("learning_rate"), finding.line) == (
        "bf16-step",
        True,
        3,
    )
    assert results.whole_of(StepShare)[0].name == "all"
    lines = [
        json.loads(line) for line in run("lint", "base", "bad.yaml", "--json").out.splitlines()
    ]
    assert lines[1] == json.loads(finding.model_dump_json())
    (inputs / "p.toml").write_text('[[rule]]\nname = "r"\nrequire = "finding.severity != error"\n')
    ran = run("gate", "p.toml", "l.jsonl")
    assert (ran.code, "r " in ran.out) == (1, True)
    assert "bf16-step" in run("inspect", "l.jsonl").out


def test_junit_and_annotations_name_file_and_line(run, inputs):
    ran = run("lint", "base", "bad.yaml", "--junit", "l.xml", "--github")
    assert ran.code == 1
    (line,) = [line for line in ran.out.splitlines() if line.startswith("::error")]
    assert_names(line, "file=bad.yaml,line=3", "loradiag lint", "bf16-step")
    assert "float32 master weights" in line
    assert "measured" not in ran.out
    root = ElementTree.fromstring((inputs / "l.xml").read_text())
    suites = {suite.get("name"): suite for suite in root.findall("testsuite")}
    assert {name for name, suite in suites.items() if suite.get("failures") == "1"} == {"bf16-step"}
    assert suites["memory"].find("testcase/skipped") is not None


def test_notes_are_notices_unless_they_fail(run, inputs, monkeypatch):
    write_config(inputs / "adapter_config.json", {**PEFT, "target_modules": ["q_proj"]})
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(inputs / "summary.md"))
    levels = []
    for least in ("error", "note"):
        ran = run("lint", "base", "adapter_config.json", "--github", "--fail-on", least)
        lines = [line for line in ran.out.splitlines() if "target-no-mlp" in line]
        levels += [line.split(" ")[0] for line in lines if line.startswith("::")]
    assert levels == ["::notice", "::error"]
    assert_names((inputs / "summary.md").read_text(), "| note | target-no-mlp |")


def test_default_output_says_what_to_do(loradiag, inputs):
    out = loradiag("lint", "base", "bad.yaml", brief=True).out
    assert_names(" ".join(out.split()), *remedy_of("bf16-step")[0].split())


def test_every_rule_is_explained_by_one_section():
    sections = [term.word for term in all_terms() if term.role == "finding"]
    assert sections == list(RULES)
    assert all(min(map(len, remedy_of(rule))) > 10 for rule in RULES)


def test_hostile_names_stay_text(run, inputs):
    name = "q_proj\x1b[2J\n::error::x"
    write_config(inputs / "adapter_config.json", {**PEFT, "target_modules": ["q_proj", name]})
    ran = run("lint", "base", "adapter_config.json", "--github")
    assert "\x1b" not in ran.out
    assert not [line for line in ran.out.splitlines() if line.startswith("::error::")]


def test_findings_of_a_rule_are_limited(inputs):
    names = [f"{name}{number}" for number in range(5_000) for name in ("m", "\n::error::")]
    path = write_config(
        inputs / "c.json", {**PEFT, "target_modules": ["q_proj", *names, "a" * 100_000]}
    )
    found = [
        item
        for item in lint(inputs / "base", path).whole_of(LintFinding)
        if item.id == "target-unmatched"
    ]
    assert len(found) == MAX_FINDINGS
    assert "more" in found[-1].evidence
    path = write_config(inputs / "c.json", {**PEFT, "target_modules": ["q_proj", "a" * 100_000]})
    (long,) = [
        item
        for item in lint(inputs / "base", path).whole_of(LintFinding)
        if item.id == "target-unmatched"
    ]
    assert len(long.evidence) <= MAX_MESSAGE


@pytest.mark.slow
def test_lint_is_quick_and_needs_no_torch(inputs):
    """The best of three tries; a quiet machine takes 0.5 s of the processor, a busy one up to 0.9
    s.
    """
    code = (
        "import sys; from lora_diag.cli import main; sys.argv[1:] = {}\ntry: main()\nexcept "
        "SystemExit: pass\n"
    )
    code += "assert 'torch' not in sys.modules; import time; print(time.process_time())"
    words = ["lint", "base", "bad.yaml", "--steps", "100", "-q"]
    run = [sys.executable, "-c", code.format(words)]
    tries = [
        subprocess.run(run, cwd=inputs, capture_output=True, text=True, check=True).stdout
        for _ in range(3)
    ]
    assert min(map(float, tries)) < 1.2
