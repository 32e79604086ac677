"""Every loradiag command of the shipped workflows, run on the sample checkpoints."""

import json
import os
import re
import shlex
import shutil
import stat
import subprocess

import pytest
import yaml
from safetensors.torch import load_file

from tests.conftest import save_model
from tests.served import PROGRAM, ROOT

pytestmark = pytest.mark.slow

SAMPLES = ROOT / "sample_checkpoints"
PAGE = (ROOT / "docs" / "guides" / "ship-through-a-gate.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


def commands(value) -> list[str]:
    """Every shell command line in a document, in its order."""
    if isinstance(value, dict):
        return [line for key, item in value.items() if key != "name" for line in commands(item)]
    if isinstance(value, list):
        return [line for item in value for line in commands(item)]
    return [line for line in value.splitlines() if line.startswith("loradiag ")] if isinstance(value, str) else []


@pytest.fixture
def repository(tmp_path):
    """A repository as the page describes it, and a ``loradiag`` on the path."""
    shutil.copytree(SAMPLES / "base", tmp_path / "base")
    shutil.copytree(SAMPLES / "lora_r4", tmp_path / "adapter")
    (tmp_path / "gates").mkdir()
    (policy,) = blocks("toml")
    (tmp_path / "gates" / "adapter.toml").write_text(policy)
    program = tmp_path / "bin" / "loradiag"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.join(PROGRAM)} "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return tmp_path


@pytest.fixture
def shell(repository, server):
    def run(line: str, **variables: str) -> int:
        path = f"{repository / 'bin'}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **variables}
        return subprocess.run(line, shell=True, cwd=repository, env=environment, check=False).returncode

    return run


def test_page_has_workflows_that_it_promises():
    github, *steps = (yaml.safe_load(text) for text in blocks("yaml"))
    assert list(github["jobs"]) == ["gate"]
    lines = commands(github["jobs"]["gate"]["steps"])
    assert [line.split()[1] for line in lines] == ["spectrum", "gate"]
    uploads = [step["run"] for step in github["jobs"]["gate"]["steps"] if "hf upload" in step.get("run", "")]
    assert len(uploads) == 1
    assert github["jobs"]["gate"]["steps"][-1]["run"] == uploads[0]
    assert "continue-on-error" not in blocks("yaml")[0]
    assert any("gate" in step and "release" in step for step in steps)


def test_every_command_of_workflows_runs(shell, repository):
    """All of them in the order of the page, with the variables that the workflows set; each has to end with 0."""
    github, *others = (yaml.safe_load(text) for text in blocks("yaml"))
    lines = commands(github)
    assert len(lines) == 2
    for line in lines:
        assert shell(line, **github["env"], GITHUB_STEP_SUMMARY=str(repository / "summary.md")) == 0, line
    assert (repository / "summary.md").read_text().startswith("## loradiag gate: PASSED")
    assert "PASSED" in (repository / "adapter" / "README.md").read_text()
    shutil.copy(repository / "results.jsonl", repository / "gates" / "main.jsonl")
    rest = [line for document in others for line in commands(document)]
    assert len(rest) >= 6
    for line in rest:
        assert shell(line, **github["env"]) == 0, line


def test_gate_that_fails_stops_what_comes_behind_it(shell, repository):
    assert shell("loradiag spectrum base adapter --quiet -o results.jsonl") == 0
    (repository / "gates" / "adapter.toml").write_text('[[rule]]\nname = "x"\nrequire = "relative <= 1e-6"\n')
    gate = next(line for line in commands(yaml.safe_load(blocks("yaml")[0])) if " gate " in line)
    assert shell(f"set -e\n{gate}\ntouch uploaded", ADAPTER="adapter") == 1
    assert not (repository / "uploaded").exists()


def test_hook_runs(shell):
    hook, _ = blocks("sh")
    assert shell(hook) == 0


def test_gate_of_merge_runs_and_fails_merge_that_dropped_adapter(shell, repository):
    """A merge made here: W + (alpha / r) B A, in float32."""
    weights = {}
    for file in (SAMPLES / "base").glob("*.safetensors"):
        weights |= load_file(file)
    factors = load_file(SAMPLES / "lora_r4" / "adapter_model.safetensors")
    scaling = json.loads((SAMPLES / "lora_r4" / "adapter_config.json").read_text())
    merged = dict(weights)
    for name in [name for name in factors if "lora_A" in name]:
        layer = name.removeprefix("base_model.model.").replace(".lora_A", "")
        merged[layer] = weights[layer] + scaling["lora_alpha"] / scaling["r"] * (
            factors[name.replace("lora_A", "lora_B")] @ factors[name]
        )
    _, lines = blocks("sh")
    verify, gate = lines.splitlines()
    save_model(repository / "merged", merged)
    assert shell(verify) == 0
    assert shell(gate) == 0
    save_model(repository / "merged", weights)
    shell(verify)
    assert shell(gate) == 1
