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


def workflow() -> dict:
    return yaml.safe_load(blocks("yaml")[0])


def given() -> dict[str, str]:
    """Return what the workflow of the page gives to the action, as environment variables."""
    (inputs,) = (step["with"] for step in workflow()["jobs"]["gate"]["steps"] if "loradiag@" in step.get("uses", ""))
    assert set(inputs) <= set(yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))["inputs"])
    return {name.upper(): value for name, value in inputs.items()}


def test_upload_of_the_page_comes_after_the_gate():
    steps = workflow()["jobs"]["gate"]["steps"]
    assert [bool("loradiag@" in step.get("uses", "")) for step in steps].index(True) < len(steps) - 1
    assert "hf upload" in steps[-1]["run"]
    assert "continue-on-error" not in blocks("yaml")[0]


def test_every_command_of_the_page_runs(shell, repository):
    """The action, then all commands in the order of the page; each has to end with 0."""
    code, result = action(shell, repository, **given(), GITHUB_ACTIONS="true")
    assert (code, result["verdict"]) == (0, "passed")
    assert (repository / "summary.md").read_text().startswith("## loradiag gate: PASSED")
    shutil.copy(repository / "loradiag" / "results.jsonl", repository / "gates" / "main.jsonl")
    shutil.copy(repository / "loradiag" / "results.jsonl", repository / "results.jsonl")
    _, *others = (yaml.safe_load(text) for text in blocks("yaml"))
    lines = [line for document in others for line in commands(document)]
    assert len(lines) >= 2
    hooks = {hook["id"]: hook for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text("utf-8"))}
    (used,) = (document["repos"][0]["hooks"] for document in others if "repos" in document)
    lines += [shlex.join([*hooks[hook["id"]]["entry"].split(), *hook["args"]]) for hook in used]
    for line in lines:
        assert shell(line) == 0, line


def test_failed_gate_stops_shell_chain(shell, repository):
    assert shell("loradiag spectrum base adapter --quiet -o results.jsonl") == 0
    (repository / "gates" / "adapter.toml").write_text('[[rule]]\nname = "x"\nrequire = "relative <= 1e-6"\n')
    gate = ROOT / ".github" / "action" / "gate.sh"
    assert shell(f"set -e\nbash {gate}\ntouch uploaded", **given(), RESULTS="results.jsonl") == 1
    assert not (repository / "uploaded").exists()


def test_pre_commit_hook_runs(shell):
    hook, _ = blocks("sh")
    assert shell(hook) == 0


def test_merge_gate_fails_dropped_adapter(shell, repository):
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


# The action and the GitLab component


def action(shell, repository, **variables) -> tuple[int, dict[str, str]]:
    """Run the action's scripts as its steps do; return the exit code and the outputs."""
    output = repository / "outputs"
    output.write_text("")
    given = {
        "BASE": "base",
        "TUNED": "adapter",
        "POLICY": "gates/adapter.toml",
        "RESULTS": "",
        "FOLDER": "loradiag",
        "GITHUB_OUTPUT": str(output),
        "GITHUB_STEP_SUMMARY": str(repository / "summary.md"),
        **variables,
    }
    scripts = ROOT / ".github" / "action"
    assert shell(f"bash {scripts / 'key.sh'}", **given) == 0
    code = shell(f"bash {scripts / 'gate.sh'}", **given)
    return code, dict(line.split("=", 1) for line in output.read_text().splitlines())


def test_action_measures_judges_and_reports(shell, repository):
    code, result = action(shell, repository)
    assert (code, result["verdict"]) == (0, "passed")
    assert (repository / result["report"]).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "| " in (repository / "summary.md").read_text(encoding="utf-8")
    (repository / "gates" / "strict.toml").write_text('[[rule]]\nname = "x"\nrequire = "relative <= 1e-6"\n')
    code, repeated = action(shell, repository, POLICY="gates/strict.toml", RESULTS=result["results"])
    assert (code, repeated["verdict"], repeated["key"]) == (1, "failed", result["key"])
    code, other = action(shell, repository, TUNED="base", POLICY="nowhere.toml", RESULTS=result["results"])
    assert (code, other["verdict"], other["report"]) == (2, "error", "")
    assert other["key"] != result["key"]
    weights = repository / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    _, changed = action(shell, repository, RESULTS=result["results"])
    assert changed["key"] != result["key"]  # results of other weights are not taken from the cache
    assert changed["verdict"] != "passed"  # nor judged as those of these


def test_action_never_reuses_a_key_of_a_remote_base(shell, repository):
    keys = [action(shell, repository, BASE="org/x", RESULTS="none", GITHUB_RUN_ID=run)[1]["key"] for run in "12"]
    assert keys[0] != keys[1]


def test_gitlab_component_runs(shell, repository):
    _, jobs = yaml.safe_load_all((ROOT / "templates" / "gate.yml").read_text(encoding="utf-8"))
    lines = [line for line in jobs["loradiag-gate"]["script"] if "pip install" not in line]
    script = "\n".join(["set -e", *lines])
    assert shell(script, BASE="base", TUNED="adapter", POLICY="gates/adapter.toml") == 0
    assert shell(script, BASE="base", TUNED="adapter", POLICY="adapter-basic") == 0
