"""What a release, a container, CI components and man pages are made from."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lora_diag.catalog import features
from tests.served import ROOT


def text(*parts: str) -> str:
    return ROOT.joinpath(*parts).read_text(encoding="utf-8")


def script(*parts: str):
    spec = importlib.util.spec_from_file_location(
        parts[-1].removesuffix(".py"), ROOT.joinpath(*parts)
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("tag", "changelog", "wrong"),
    [
        (
            "v1.2.0",
            "## Unreleased\n\n## 1.2.0 - 2026-11-27\n\n### Added\n\n- A thing.\n\n## 1.1.0 - "
            "2026-01-01\n",
            "",
        ),
        ("v1.2.0", "## [1.2.0] - 2026-11-27\n\n- A thing.\n", ""),
        ("1.2.0", "## 1.2.0 - 2026-11-27\n\n- A thing.\n", "the tag is 1.2.0"),
        ("v1.2.1", "## 1.2.0 - 2026-11-27\n\n- A thing.\n", "the tag is v1.2.1"),
        ("", "## 1.2.0 - 2026-11-27\n\n- A thing.\n", "missing"),
        ("v1.2.0", "## Unreleased\n\n- A thing.\n", "no line"),
        ("v1.2.0", "## 1x2.0 - 2026-11-27\n\n- A thing.\n", "no line"),
        (
            "v1.2.0",
            "## 1.2.0 - 2026-11-27\n\n## 1.1.0 - 2026-01-01\n\n- A thing.\n",
            "lists nothing",
        ),
    ],
)
def test_check_tag_requires_version_and_entry(tag, changelog, wrong):
    problem = script(".github", "check_tag.py").problem(tag, "1.2.0", changelog)
    assert wrong in problem
    assert bool(problem) == bool(wrong)


SHELLCHECK = Path(sys.executable).with_name("shellcheck")  # of the extra test


@pytest.mark.skipif(
    not SHELLCHECK.exists() and not shutil.which("shellcheck"), reason="ShellCheck is not installed"
)
def test_scripts_pass_shellcheck():
    scripts = {
        path.name: path.read_text(encoding="utf-8")
        for path in [*ROOT.glob(".github/action/*.sh"), ROOT / ".ci/run"]
    }
    _, jobs = yaml.safe_load_all(text("templates", "gate.yml"))
    scripts["gate.yml"] = "\n".join(["#!/bin/sh", *jobs["loradiag-gate"]["script"]])
    steps = [step for step in yaml.safe_load(text("action.yml"))["runs"]["steps"] if "run" in step]
    scripts |= {step["run"]: f"#!/bin/bash\n{step['run']}" for step in steps}
    program = str(SHELLCHECK) if SHELLCHECK.exists() else "shellcheck"
    for name, script in scripts.items():
        ended = subprocess.run(
            [program, "-"], input=script, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, f"{name}: {ended.stdout}{ended.stderr}"


def test_actions_are_pinned_by_commit():
    pages = [
        *ROOT.glob(".github/workflows/*.yml"),
        ROOT / "action.yml",
        ROOT / "docs/guides/ship-through-a-gate.md",
    ]
    used = [
        line
        for page in pages
        for line in re.findall(r"uses: (.*)", page.read_text(encoding="utf-8"))
    ]
    assert len(used) > 10
    assert [
        line for line in used if not re.fullmatch(r"[\w./-]+@([0-9a-f]{40}|COMMIT) # v[\d.]+", line)
    ] == []


def test_nothing_installs_loradiag_by_name():
    """The name is not registered: whoever registers it would run code where a pipeline or a reader
    installs it.
    """
    folders = [".ci", ".github", "docs", "examples", "lora_diag", "sample_checkpoints", "templates"]
    files = [*ROOT.iterdir(), *(file for folder in folders for file in (ROOT / folder).rglob("*"))]
    installs = re.compile(r"\b(?:install|run)\b[^\n|`,;]*[\s'\"]loradiag\b(?![-/.]|[^\n]*@ git\+)")
    found = []
    for file in files:
        if file.is_file() and file.suffix not in {".safetensors", ".png", ".pyc", ".jsonl", ".svg"}:
            lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
            found += [
                f"{file}: {line}"
                for line in lines
                if re.search(r"\bpip|\buvx?\b", line) and installs.search(line)
            ]
    assert found == []


def test_action_passes_inputs_by_environment():
    action = yaml.safe_load(text("action.yml"))
    steps = action["runs"]["steps"]
    assert all(step["shell"] == "bash" for step in steps if "run" in step)
    assert not any("${{" in step.get("run", "") for step in steps)  # an input is no code
    used = set(re.findall(r"\binputs\.([\w-]+)", text("action.yml")))
    assert used == set(action["inputs"])
    scripts = re.findall(r"GITHUB_ACTION_PATH/([\w./]+\.sh)", text("action.yml"))
    assert scripts
    assert all((ROOT / each).is_file() for each in scripts)


def test_hooks_run_existing_commands():
    names = {feature.name for feature in features()}
    hooks = yaml.safe_load(text(".pre-commit-hooks.yaml"))
    assert {hook["entry"].removeprefix("loradiag ") for hook in hooks} <= names
    assert all(re.compile(hook["files"]) for hook in hooks)


def test_container_is_not_root_and_copies_what_exists():
    lines = text("Dockerfile").splitlines()
    assert [line for line in lines if line.startswith("USER ")] == ["USER 1000:1000"]
    assert not any(":latest" in line for line in lines)
    copied = [
        line.split()[1:-1] for line in lines if line.startswith("COPY ") and "--from" not in line
    ]
    allowed = {line[1:] for line in text(".dockerignore").splitlines() if line.startswith("!")}
    assert copied
    assert {name for names in copied for name in names} <= allowed
    assert all((ROOT / name).exists() for name in allowed)


def test_lock_of_container_satisfies_requirements():
    project = tomllib.loads(text("pyproject.toml"))["project"]
    extras = re.findall(r"EXTRAS=([\w,]+)", text("Dockerfile"))
    names = {extra for each in extras for extra in each.split(",")}
    assert names == {"arrow", "hub", "ray", "remote", "report"}
    needed = [
        *project["dependencies"],
        *(line for name in names for line in project["optional-dependencies"][name]),
    ]
    locked = {
        canonicalize_name(Requirement(line).name): Requirement(line)
        for line in text("image.lock").splitlines()
    }
    assert len(locked) > len(needed)
    for requirement in map(Requirement, needed):
        if requirement.name != "torch":
            (pin,) = locked[canonicalize_name(requirement.name)].specifier
            assert pin.operator == "=="
            assert requirement.specifier.contains(pin.version)


def test_man_pages_have_every_option(tmp_path):
    man = script("tools", "man.py")
    man.main(tmp_path)
    for name, command in man.every(man.commands()):
        page = (tmp_path / f"{name.replace(' ', '-')}.1").read_text(encoding="utf-8")
        shown = [each for each in command.params if not getattr(each, "hidden", False)]
        assert all(
            man.roff(each.opts[-1]) in page for each in shown if each.param_type_name == "option"
        )
        assert not re.search(
            r"(?m)^\.(?!TH|SH|TP|B |br)", page
        )  # no line of text is taken for a request
