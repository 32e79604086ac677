"""A package of its own adds a command with a record, a table, a figure, a section of the report and gate fields."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.messages import assert_names
from tests.served import ROOT

pytestmark = pytest.mark.slow

EXAMPLE = ROOT / "examples" / "loradiag-nuclear"
SAMPLES = ROOT / "sample_checkpoints"


@pytest.fixture(scope="module")
def plugins(tmp_path_factory) -> Path:
    """Install the example beside, not into, the environment that runs the tests."""
    target = tmp_path_factory.mktemp("plugins")
    words = [
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--target",
        str(target),
        str(EXAMPLE),
    ]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, capture_output=True)
    return target


def run(plugins: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(map(str, (ROOT, plugins)))
    return subprocess.run(
        [sys.executable, "-m", "lora_diag", *map(str, words)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


@pytest.fixture(scope="module")
def measured(plugins, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    found = run(plugins, folder, "nuclear", SAMPLES / "base", SAMPLES / "lora_r4", "-o", "nuclear.jsonl")
    assert found.returncode == 0, found.stderr
    return folder


def test_example_is_small():
    files = sorted((EXAMPLE / "loradiag_nuclear").glob("*.py"))
    assert sum(len(file.read_text().splitlines()) for file in files) <= 150


def test_example_measures_what_numpy_does(measured):
    records = [json.loads(line) for line in (measured / "nuclear.jsonl").read_text().splitlines()]
    layers = [record for record in records if record["record"] == "nuclear"]
    adapter = load_file(SAMPLES / "lora_r4" / "adapter_model.safetensors")
    config = json.loads((SAMPLES / "lora_r4" / "adapter_config.json").read_text())
    for record in layers:
        name = f"base_model.model.{record['layer'].removesuffix('.weight')}"
        product = adapter[f"{name}.lora_B.weight"].astype(float) @ adapter[f"{name}.lora_A.weight"].astype(float)
        expected = np.linalg.svd(product * config["lora_alpha"] / config["r"], compute_uv=False).sum()
        assert record["nuclear"] == pytest.approx(expected, rel=1e-6)
    assert len(layers) == 28


def test_example_is_documented(plugins):
    """The site's tables of its options and fields, without a line for it in the docs."""
    paths = os.pathsep.join(map(str, (ROOT, plugins)))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, ROOT / "docs" / "hooks.py", "nuclear"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", check=True)
    assert "| `--tol` | `T` | `0.0005` |" in found.stdout
    assert "| `flatness` | flatness |" in found.stdout


@pytest.mark.parametrize("command", ["inspect", "plot", "report", "csv"])
def test_example_is_shown_by_every_command(plugins, measured, tmp_path, command):
    results = measured / "nuclear.jsonl"
    words = {
        "inspect": ["inspect", results],
        "plot": ["plot", results, "--figure", "nuclear", "-o", "n.png"],
        "report": ["report", results, "-o", "n.html"],
        "csv": ["report", results, "--format", "csv"],
    }[command]
    found = run(plugins, tmp_path, *words)
    assert found.returncode == 0, found.stderr
    if command == "inspect":
        assert "flatness" in found.stdout
    elif command == "plot":
        assert (tmp_path / "n.png").read_bytes().startswith(b"\x89PNG")
    elif command == "report":
        page = (tmp_path / "n.html").read_text(encoding="utf-8")
        assert_names(page, "nuclear norm")
        assert "Nuclear norms" in page
    else:
        assert "flatness" in found.stdout.splitlines()[0]


def test_example_is_function_of_package(plugins, tmp_path):
    words = "import lora_diag; print('nuclear' in dir(lora_diag), lora_diag.nuclear.__module__)"
    found = subprocess.run(
        [sys.executable, "-c", words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, plugins)))},
        capture_output=True,
        text=True,
    )
    assert found.stdout.split() == ["True", "loradiag_nuclear.run"], found.stderr


def test_example_can_be_judged(plugins, measured, tmp_path):
    for limit, code in ((1.0, 0), (0.0, 1)):
        (tmp_path / "policy.toml").write_text(f'[[rule]]\nname = "flat"\nrequire = "flatness <= {limit}"\n')
        found = run(plugins, tmp_path, "gate", "policy.toml", measured / "nuclear.jsonl")
        assert found.returncode == code, found.stdout + found.stderr


def test_results_without_plugin_are_refused_in_one_line(measured, tmp_path):
    found = run(tmp_path, tmp_path, "inspect", measured / "nuclear.jsonl")
    assert found.returncode == 3
    assert len(found.stderr.splitlines()) == 1
    assert "nuclear" in found.stderr


def test_broken_plugin_is_named_once_and_breaks_nothing(tmp_path):
    broken = tmp_path / "broken-1.0.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (broken / "entry_points.txt").write_text("[loradiag.features]\nbroken = broken_plugin:FEATURE\n")
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('no such thing')\n")
    found = run(tmp_path, tmp_path, "inspect", SAMPLES / "base")
    assert found.returncode == 0
    assert found.stderr.count("broken_plugin") == 1
    assert "RuntimeError" in found.stderr
