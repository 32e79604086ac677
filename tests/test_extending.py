"""A package of its own adds a command with a record, a table, a figure, a section of the report and
gate fields.
"""

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
    flags = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    words = ["install", *flags, "--target", str(target), str(EXAMPLE)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, capture_output=True)
    return target


def started(plugins: Path, folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run Python with these packages installed."""
    paths = os.pathsep.join(map(str, (ROOT, plugins)))
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


# Runs several commands in one process, and prints the exit code and the output of each.
COMMANDS = """
import contextlib, io, json, sys
import lora_diag
from lora_diag.cli import main
found = [("nuclear" in dir(lora_diag), lora_diag.nuclear.__module__)]
for words in json.loads(sys.argv[1]):
    sys.argv, out, code = ["loradiag", *words], io.StringIO(), 0
    with contextlib.redirect_stdout(out):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    found.append((code, out.getvalue()))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def measured(plugins, tmp_path_factory) -> tuple[Path, list]:
    """Return a folder with results, and what commands of one process with the example
    made of them.
    """
    folder = tmp_path_factory.mktemp("measured")
    for name, limit in (("passes", 1.0), ("fails", 0.0)):
        (folder / f"{name}.toml").write_text(
            f'[[rule]]\nname = "flat"\nrequire = "flatness <= {limit}"\n'
        )
    commands = [
        ["nuclear", SAMPLES / "base", SAMPLES / "lora_r4", "-o", "nuclear.jsonl"],
        [
            "nuclear",
            SAMPLES / "base",
            SAMPLES / "full_ft",
            "--layers",
            "q_proj",
            "-o",
            "pair.jsonl",
        ],
        ["inspect", "nuclear.jsonl"],
        ["plot", "nuclear.jsonl", "--figure", "nuclear", "-o", "n.png"],
        ["report", "nuclear.jsonl", "-o", "n.html"],
        ["report", "nuclear.jsonl", "--format", "csv"],
        ["gate", "passes.toml", "nuclear.jsonl"],
        ["gate", "fails.toml", "nuclear.jsonl"],
    ]
    words = ["-c", COMMANDS, json.dumps([list(map(str, command)) for command in commands])]
    result = started(plugins, folder, *words)
    assert result.returncode == 0, result.stderr
    return folder, json.loads(result.stdout.splitlines()[-1])


def layers_of(path: Path) -> list[dict]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record for record in records if record["record"] == "nuclear"]


def change_of_adapter(layer):
    """Return B·A with its scale: such a ΔW has factors and no matrix."""
    adapter = load_file(SAMPLES / "lora_r4" / "adapter_model.safetensors")
    config = json.loads((SAMPLES / "lora_r4" / "adapter_config.json").read_text())
    name = f"base_model.model.{layer.removesuffix('.weight')}"
    product = adapter[f"{name}.lora_B.weight"].astype(float) @ adapter[
        f"{name}.lora_A.weight"
    ].astype(float)
    return product * config["lora_alpha"] / config["r"]


def change_of_pair(layer):
    sides = [{}, {}]
    for side, folder in zip(sides, ("base", "full_ft"), strict=True):
        for file in (SAMPLES / folder).glob("*.safetensors"):
            side |= load_file(file)
    return sides[1][layer].astype(float) - sides[0][layer].astype(float)


@pytest.mark.parametrize(
    ("name", "change", "count"), [("nuclear", change_of_adapter, 28), ("pair", change_of_pair, 4)]
)
def test_example_measures_as_numpy_does(measured, name, change, count):
    layers = layers_of(measured[0] / f"{name}.jsonl")
    for record in layers:
        delta = change(record["layer"])
        assert record["nuclear"] == pytest.approx(
            np.linalg.svd(delta, compute_uv=False).sum(), rel=1e-4
        )
        assert record["peak"] == pytest.approx(np.abs(delta).max(), rel=1e-6)
    assert len(layers) == count


def test_example_plugin_has_function_command_and_pages(measured):
    folder, (function, nuclear, _, inspect, plot, report, csv, passes, fails) = measured
    assert function == [True, "loradiag_nuclear.run"]
    assert [code for code, _ in (nuclear, inspect, plot, report, csv, passes, fails)] == [
        0,
        0,
        0,
        0,
        0,
        0,
        1,
    ]
    assert "flatness" in inspect[1]
    assert (folder / "n.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "n.html").read_text(encoding="utf-8")
    assert_names(page, "nuclear norm")
    assert "Nuclear norms" in page
    assert "flatness" in csv[1].splitlines()[0]


def test_commands_load_example_without_error(plugins, tmp_path):
    for words in (("--version",), ("inspect", SAMPLES / "base"), ("nuclear", "--help")):
        result = started(plugins, tmp_path, "-m", "lora_diag", *words)
        assert (result.returncode, result.stderr) == (0, "")
    result = started(plugins, tmp_path, "-c", "import lora_diag; lora_diag.spectrum")
    assert (result.returncode, result.stderr) == (0, "")


def test_results_without_plugin_are_refused_in_one_line(measured, tmp_path):
    result = started(
        tmp_path, tmp_path, "-m", "lora_diag", "inspect", measured[0] / "nuclear.jsonl"
    )
    assert result.returncode == 3
    assert len(result.stderr.splitlines()) == 1
    assert "nuclear" in result.stderr


def install_broken(folder, code):
    """Install a plugin of this code."""
    broken = folder / "broken-1.0.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (broken / "entry_points.txt").write_text(
        "[loradiag.features]\nbroken = broken_plugin:FEATURE\n"
    )
    (folder / "broken_plugin.py").write_text(code)


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(0)",
        "raise KeyboardInterrupt",
        "raise GeneratorExit",
        "raise BaseException('x\\n::y')",
    ],
)
def test_plugin_stops_no_command(tmp_path, code):
    install_broken(tmp_path, code)
    result = started(tmp_path, tmp_path, "-m", "lora_diag", "inspect", SAMPLES / "base")
    assert result.returncode == 0
    assert "tensors" in result.stdout
    assert len(result.stderr.splitlines()) == 1
    assert "broken_plugin" in result.stderr


def test_plugin_may_import_public_functions(tmp_path):
    code = "from lora_diag import spectrum\nfrom lora_diag.feature import Feature\n"
    install_broken(tmp_path, f"{code}FEATURE = Feature(__name__, 'fine', 'Understand')\n")
    for words in (("-m", "lora_diag", "--version"), ("-c", "from lora_diag import spectrum")):
        result = started(tmp_path, tmp_path, *words)
        assert (result.returncode, result.stderr) == (0, "")


GATE = [
    "-m",
    "lora_diag",
    "gate",
    "--base",
    SAMPLES / "base",
    "--adapter",
    SAMPLES / "lora_r4",
    "--policy",
]


def test_gate_loads_no_plugin_unless_asked(tmp_path):
    """Not even one that ends its process."""
    install_broken(
        tmp_path, f"open({str(tmp_path / 'ran')!r}, 'w').close(); import os; os._exit(0)"
    )
    (tmp_path / "strict.toml").write_text('[[rule]]\nname = "x"\nrequire = "relative <= 1e-9"\n')
    result = started(tmp_path, tmp_path, *GATE, "strict.toml")
    assert (result.returncode, result.stderr) == (1, "")
    assert not (tmp_path / "ran").exists()
    assert started(tmp_path, tmp_path, *GATE, "strict.toml", "--plugins").returncode == 0
    assert (tmp_path / "ran").exists()


def test_no_command_loads_plugins_if_switched_off(tmp_path, monkeypatch):
    install_broken(tmp_path, "import os; os._exit(0)")
    monkeypatch.setenv("LORADIAG_PLUGINS", "0")
    result = started(tmp_path, tmp_path, "-m", "lora_diag", "inspect", "nowhere")
    assert result.returncode == 3


def test_gate_judges_results_of_plugin_with_plugins(measured, plugins):
    words = ["-m", "lora_diag", "gate", "fails.toml", "nuclear.jsonl"]
    assert started(plugins, measured[0], *words, "--plugins").returncode == 1
    refused = started(plugins, measured[0], *words)
    assert refused.returncode == 2
    assert_names(refused.stderr, "flatness", "--plugins")
    (measured[0] / "any.toml").write_text('[[rule]]\nname = "x"\nrequire = "relative <= 1"\n')
    refused = started(plugins, measured[0], *words[:3], "any.toml", "nuclear.jsonl")
    assert refused.returncode == 3
    assert_names(refused.stderr, "nuclear", "--plugins")


def test_broken_plugin_is_named_once(tmp_path):
    install_broken(tmp_path, "raise RuntimeError('no such thing')\n")
    result = started(tmp_path, tmp_path, "-m", "lora_diag", "inspect", SAMPLES / "base")
    assert result.returncode == 0
    assert result.stderr.count("broken_plugin") == 1
    assert "RuntimeError" in result.stderr
