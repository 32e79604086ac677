"""Every loradiag command of the shipped workflows, run on the sample checkpoints."""

import hashlib
import json
import math
import os
import re
import shlex
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests.conftest import save_model
from tests.served import PREPARE, PROGRAM, ROOT

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
    return (
        [line for line in value.splitlines() if line.startswith("loradiag ")]
        if isinstance(value, str)
        else []
    )


@pytest.fixture
def repository(tmp_path):
    """A repository as the page describes it, and a ``loradiag`` on the path."""
    tmp_path = tmp_path / "repository"
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
        environment = {
            **os.environ,
            "PATH": path,
            "OMP_NUM_THREADS": "1",
            PREPARE: "tests.served:draw_nothing",
        }
        environment |= variables
        return subprocess.run(
            line, shell=True, cwd=repository, env=environment, check=False
        ).returncode

    return run


def workflow() -> dict:
    return yaml.safe_load(blocks("yaml")[0])


def given() -> dict[str, str]:
    """Return what the workflow of the page gives to the action, as environment variables."""
    (inputs,) = (
        step["with"]
        for step in workflow()["jobs"]["gate"]["steps"]
        if "loradiag@" in step.get("uses", "")
    )
    assert set(inputs) <= set(
        yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))["inputs"]
    )
    return {name.upper(): value for name, value in inputs.items()}


def test_every_command_of_the_page_runs(shell, repository):
    """The action, then all commands in the order of the page; each has to end with 0."""
    code, result = action(shell, repository, **given(), GITHUB_ACTIONS="true", **{PREPARE: ""})
    assert (code, result["verdict"]) == (0, "passed")
    assert (repository / "summary.md").read_text().startswith("## loradiag gate: PASSED")
    shutil.copy(repository / "loradiag" / "results.jsonl", repository / "gates" / "main.jsonl")
    shutil.copy(repository / "loradiag" / "results.jsonl", repository / "results.jsonl")
    _, *others = (yaml.safe_load(text) for text in blocks("yaml"))
    lines = [line for document in others for line in commands(document)]
    assert len(lines) >= 2
    hooks = {
        hook["id"]: hook
        for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text("utf-8"))
    }
    (used,) = (document["repos"][0]["hooks"] for document in others if "repos" in document)
    lines += [shlex.join([*hooks[hook["id"]]["entry"].split(), *hook["args"]]) for hook in used]
    for line in lines:
        assert shell(line) == 0, line


def test_failed_gate_stops_shell_chain(shell, repository):
    assert shell("loradiag spectrum base adapter --quiet -o results.jsonl") == 0
    (repository / "gates" / "adapter.toml").write_text(
        '[[rule]]\nname = "x"\nrequire = "relative <= 1e-6"\n'
    )
    gate = ROOT / ".github" / "action" / "gate.sh"
    assert shell(f"set -e\nbash {gate}\ntouch uploaded", **given(), RESULTS="results.jsonl") == 1
    assert not (repository / "uploaded").exists()


def test_pre_commit_hook_runs(shell):
    hook, _ = blocks("sh")
    assert shell(hook) == 0


@pytest.fixture
def merged(repository):
    """A merge made here: W + (alpha / r) B A, in float32."""
    weights = base_weights()
    factors = load_file(SAMPLES / "lora_r4" / "adapter_model.safetensors")
    scaling = json.loads((SAMPLES / "lora_r4" / "adapter_config.json").read_text())
    for name in [name for name in factors if "lora_A" in name]:
        layer = name.removeprefix("base_model.model.").replace(".lora_A", "")
        weights[layer] += (
            scaling["lora_alpha"]
            / scaling["r"]
            * (factors[name.replace("lora_A", "lora_B")] @ factors[name])
        )
    save_model(repository / "merged", weights)
    return "merged"


def base_weights() -> dict:
    weights = {}
    for file in (SAMPLES / "base").glob("*.safetensors"):
        weights |= load_file(file)
    return weights


def test_merge_gate_fails_dropped_adapter(shell, repository, merged):
    _, lines = blocks("sh")
    verify, gate = lines.splitlines()
    assert shell(verify) == 0
    assert shell(gate) == 0
    save_model(repository / merged, base_weights())
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
    assert (
        shell(f"bash {scripts / 'key.sh'}", **given, RUNNER_TEMP=str(repository.parent / "runner"))
        == 0
    )
    cache = outputs_of(output)["cache"]
    code = shell(f"bash {scripts / 'gate.sh'}", **given, CACHE=cache)
    return code, outputs_of(output)


def outputs_of(file) -> dict[str, str]:
    return dict(line.split("=", 1) for line in file.read_text().splitlines())


def test_action_measures_judges_and_reports(shell, repository):
    code, result = action(shell, repository)
    assert (code, result["verdict"]) == (0, "passed")
    assert (repository / result["report"]).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "| " in (repository / "summary.md").read_text(encoding="utf-8")
    (repository / "gates" / "strict.toml").write_text(
        '[[rule]]\nname = "x"\nrequire = "relative <= 1e-6"\n'
    )
    code, repeated = action(
        shell, repository, POLICY="gates/strict.toml", RESULTS=result["results"]
    )
    assert (code, repeated["verdict"], repeated["key"]) == (1, "failed", result["key"])
    code, other = action(
        shell, repository, TUNED="base", POLICY="nowhere.toml", RESULTS=result["results"]
    )
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
    keys = [
        action(shell, repository, BASE="org/x", RESULTS="none", GITHUB_RUN_ID=run)[1]["key"]
        for run in "12"
    ]
    assert keys[0] != keys[1]


def test_action_measures_despite_committed_results(shell, repository):
    """A file that claims to be finished results of these weights, with small updates and the right
    hash.
    """
    config = repository / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 320}))
    code, result = action(shell, repository)
    assert (code, result["verdict"]) == (1, "failed")
    committed = repository / "loradiag" / "results.jsonl"
    forge(committed)
    assert (
        shell(f"loradiag gate gates/adapter.toml {committed} --for adapter") == 0
    )  # which is why it is not read
    code, result = action(shell, repository)
    assert (code, result["verdict"]) == (1, "failed")
    forge(committed)
    assert gitlab(shell, POLICY="gates/adapter.toml") == 1


LAX = '[checks]\nspike = "off"\n[[rule]]\nname = "overwritten"\nrequire = "relative <= 1000"\n'


@pytest.mark.parametrize("policy", ["", "adapter-basic"])
def test_committed_file_is_no_built_in_policy(shell, repository, policy):
    """A file of the checkout with the name of a built-in policy, and lax rules."""
    config = repository / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 320}))
    (repository / "adapter-basic").write_text(LAX)
    code, result = action(shell, repository, POLICY=policy)
    assert (code, result["verdict"]) == (1, "failed")
    assert gitlab(shell, POLICY=policy) == 1
    results = result["results"]
    assert shell(f"loradiag gate adapter-basic {results} --for adapter") == 1
    assert shell(f"loradiag gate --policy adapter-basic --for adapter {results}") == 1


@pytest.mark.parametrize("policy", ["./adapter-basic", "gates/merge", "lax.toml"])
def test_policy_of_path_is_a_file(shell, repository, policy):
    (repository / policy).write_text(LAX.replace("1000", "1e-9"))
    code, result = action(shell, repository, POLICY=policy)
    assert (code, result["verdict"]) == (1, "failed")
    assert gitlab(shell, POLICY=policy) == 1


def test_file_without_folder_or_suffix_is_no_policy(shell, repository):
    (repository / "lax").write_text(LAX)
    code, result = action(shell, repository, POLICY="lax")
    assert (code, result["verdict"]) == (2, "error")
    assert gitlab(shell, POLICY="lax") == 2


@pytest.mark.parametrize(
    ("link", "folder"),
    [
        *(
            ("loradiag", "loradiag"),
            ("loradiag", "loradiag//"),
            ("loradiag", "./loradiag/."),
            ("out", "out/a/b"),
        ),
        ("gates/out", "gates/out/x"),
    ],
)
def test_action_writes_through_no_committed_link(shell, repository, tmp_path, link, folder):
    outside = tmp_path / "outside"
    outside.mkdir()
    (repository / link).symlink_to(outside)
    for name in (folder, f"{repository}/{folder}"):
        code, result = action(shell, repository, FOLDER=name, CONFIG="adapter")
        assert (code, result["verdict"], result["folder"]) == (2, "error", "")
    if link == "loradiag":
        assert gitlab(shell, POLICY="adapter-basic") == 2
    assert not any(outside.iterdir())


def test_action_writes_below_link_outside_checkout(shell, repository, tmp_path):
    """Folders of a runner may be links, such as /tmp of macOS."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    code, result = action(shell, repository, FOLDER=str(tmp_path / "link" / "out"))
    assert (code, result["verdict"]) == (0, "passed")
    assert (tmp_path / "real" / "out" / "gate.xml").is_file()


def test_action_carries_no_command_of_a_tensor_name(shell, repository, capfd):
    weights = load_file(repository / "adapter" / "adapter_model.safetensors")
    weights["base_model.model.##[set-output name=verdict;]passed.lora_A.weight"] = next(
        iter(weights.values())
    ).clone()
    save_file(weights, repository / "adapter" / "adapter_model.safetensors")
    capfd.readouterr()
    code, result = action(shell, repository, GITHUB_ACTIONS="true")
    printed = "".join(capfd.readouterr())
    assert (code, result["verdict"]) == (3, "error")
    assert "set-output" in printed
    assert "##[" not in printed


def forge(results) -> None:
    """Give every weight a hundred times the norm, which makes the update relatively small."""
    *records, end = map(json.loads, results.read_text().splitlines())
    layers = [record for record in records if "base_fro" in record]
    for record in layers:
        record["base_fro"] = 100 * record["fro"]
    text = "".join(
        json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n" for record in records
    )
    end["base_fro"] = math.sqrt(sum(record["base_fro"] ** 2 for record in layers))
    end["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    results.write_text(text + json.dumps(end))


def test_action_takes_results_from_its_cache(shell, repository, capfd):
    _, result = action(shell, repository)
    measured = Path(result["cache"], "results.jsonl")
    content = measured.read_bytes()
    assert content == (repository / result["results"]).read_bytes()
    assert not measured.is_relative_to(repository)
    gate = ROOT / ".github" / "action" / "gate.sh"
    capfd.readouterr()
    variables = {
        "BASE": "base",
        "TUNED": "adapter",
        "POLICY": "gates/adapter.toml",
        "CACHE": result["cache"],
    }
    assert shell(f"bash {gate}", **variables) == 0
    assert hashlib.sha256(content).hexdigest() in capfd.readouterr().out
    assert measured.read_bytes() == content
    action(shell, repository, BASE="nowhere")
    assert not list(repository.parent.joinpath("runner").glob("*/results.jsonl"))[1:]


def test_action_verifies_and_judges_merge(shell, repository, merged):
    code, result = action(shell, repository, MERGED=merged, POLICY="")
    assert (code, result["verdict"]) == (0, "passed")
    save_model(repository / merged, base_weights())
    code, stale = action(shell, repository, MERGED=merged, POLICY="", RESULTS=result["results"])
    assert (code, stale["verdict"]) == (5, "inconclusive")
    code, dropped = action(shell, repository, MERGED=merged, POLICY="")
    assert (code, dropped["verdict"]) == (1, "failed")
    assert dropped["key"] != result["key"]


def test_action_refuses_results_of_unnamed_model(shell, repository):
    assert shell("loradiag spectrum base adapter --quiet -o results.jsonl") == 0
    code, result = action(shell, repository, BASE="", TUNED="", RESULTS="results.jsonl")
    assert (code, result["verdict"]) == (2, "error")


@pytest.mark.parametrize("name", ["FOLDER", "RESULTS", "TUNED"])
def test_action_outputs_have_no_lines_of_inputs(shell, repository, name):
    code, result = action(shell, repository, **{name: "x\nverdict=passed"})
    assert (code, result["verdict"], result["folder"]) == (2, "error", "")


@pytest.mark.parametrize("name", ["-delete", "--help"])
def test_action_takes_names_for_no_options(shell, repository, name):
    (repository / "odd").mkdir()
    shutil.move(repository / "adapter", repository / "odd" / name)
    shutil.copytree(repository / "odd" / name, repository / name)
    before = set(repository.rglob("*"))
    code, below = action(shell, repository, TUNED=f"odd/{name}")
    assert (code, below["verdict"]) == (0, "passed")
    code, here = action(shell, repository, TUNED=name)
    assert (code, here["verdict"], here["key"]) == (0, "passed", below["key"])
    assert gitlab(shell, TUNED=name, POLICY="gates/adapter.toml") == 0
    assert before <= set(repository.rglob("*"))


def gitlab(shell, **variables: str) -> int:
    _, jobs = yaml.safe_load_all((ROOT / "templates" / "gate.yml").read_text(encoding="utf-8"))
    lines = [line for line in jobs["loradiag-gate"]["script"] if "pip install" not in line]
    inputs = {"BASE": "base", "TUNED": "adapter", "MERGED": "", **variables}
    return shell("\n".join(["set -e", *lines]), **inputs)


def test_gitlab_component_runs(shell, repository, merged):
    assert gitlab(shell, POLICY="gates/adapter.toml") == 0
    assert gitlab(shell, POLICY="adapter-basic") == 0
    assert gitlab(shell, POLICY="", MERGED=merged) == 0
    save_model(repository / merged, base_weights())
    assert gitlab(shell, POLICY="", MERGED=merged) == 1
