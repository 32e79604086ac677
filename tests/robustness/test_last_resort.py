"""Exit code 1 means that a check failed: whatever else goes wrong ends with another code and one
message.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_diag.deltas import natural_order
from tests.conftest import ROOT, save_model
from tests.messages import assert_names

SAMPLES = ROOT / "sample_checkpoints"

DEFECT = """
import sys
from lora_diag.cli import app
def fail():
    raise {error}
app._run = fail
from lora_diag.__main__ import main
sys.argv = ["loradiag", "spectrum", "http://me:it's secret@host/x"]
main()
"""


def start(
    *words: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "LORADIAG_TRACEBACK"}
    return subprocess.run(
        words,
        cwd=ROOT,
        env={**kept, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("error", "facts"),
    [
        (
            "ValueError('odd\\nwords')",
            ["unexpected ValueError", "odd", "defect", "report", "LORADIAG_TRACEBACK=1"],
        ),
        ("OSError(12, 'Cannot allocate memory')", ["out of memory", "ulimit -v"]),
        ("MemoryError()", ["out of memory", "ulimit -v"]),
        ("KeyError(sys.argv[2])", ["unexpected KeyError", "http://host/x"]),
        (
            "type('PanicException', (BaseException,), {})('odd')",
            ["unexpected PanicException", "odd", "defect"],
        ),
        ("GeneratorExit()", ["unexpected GeneratorExit", "defect"]),
    ],
)
def test_unexpected_error_is_one_message_with_exit_code_3(error: str, facts: list[str]) -> None:
    done = start(sys.executable, "-c", DEFECT.format(error=error))
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr
    assert_names(done.stderr, *facts)


@pytest.mark.parametrize("code", ["0", "1", "'stop'"])
def test_exit_of_a_library_is_no_verdict(code: str) -> None:
    """A tokenizer or a plugin that calls ``sys.exit`` while a command runs neither passes nor fails
    a check.
    """
    script = DEFECT.replace(
        "app._run = fail", "app.commands = lambda names: lambda words, **options: fail()"
    )
    done = start(sys.executable, "-c", script.format(error=f"SystemExit({code})"))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1)
    assert_names(done.stderr, "library", code)


def test_traceback_is_shown_on_request_without_secrets() -> None:
    script = DEFECT.format(error="KeyError(sys.argv[2])")
    done = start(sys.executable, "-c", script, environment={"LORADIAG_TRACEBACK": "1"})
    assert done.returncode == 3
    assert "Traceback (most recent call last)" in done.stderr
    assert "in _run" in done.stderr or "in fail" in done.stderr
    assert "secret" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [40_000, 300_000, 650_000])
def test_small_address_space_is_one_message(kilobytes: int) -> None:
    words = [
        sys.executable,
        "-m",
        "lora_diag",
        "spectrum",
        str(SAMPLES / "base"),
        str(SAMPLES / "full_ft"),
    ]
    environment = {"OMP_NUM_THREADS": "1"}
    done = start(
        "sh", "-c", f'ulimit -v {kilobytes}; exec "$@"', "sh", *words, environment=environment
    )
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("\n") == 1
    assert_names(done.stderr, "out of memory", "ulimit -v")


def test_long_name_of_tensor_is_refused(loradiag, tmp_path: Path) -> None:
    name = f"model.layers.{'9' * 5000}.q_proj.weight"
    for side in ("base", "tuned"):
        save_model(tmp_path / side, {name: torch.eye(3)})
    (tmp_path / "p.toml").write_text('[[rule]]\nname = "r"\nrequire = "fro < 1"\n')
    for words in (["inspect", "base"], ["spectrum", "base", "tuned"],
                  ["gate", "p.toml", "--base", "base", "--tuned", "tuned"]):  # fmt: skip
        ran = loradiag(*words)
        assert ran.code == 3
        assert_names(ran.err, "base/model.safetensors", "5,027 characters")
        assert len(ran.err) < 300


def test_numbers_of_many_digits_are_ordered() -> None:
    names = ["h.2.w", "h.010.w", "h.10.w", f"h.{'9' * 5000}.w", f"h.1{'0' * 5000}.w", "h.a.w", "a"]
    assert sorted(names, key=natural_order) == [
        "a",
        "h.2.w",
        "h.010.w",
        "h.10.w",
        names[3],
        names[4],
        "h.a.w",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("key", ["lora_alpha", "alpha_pattern"])
def test_infinite_scale_is_refused(loradiag, tmp_path: Path, key: str) -> None:
    folder = shutil.copytree(SAMPLES / "lora_r4", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    config[key] = 1e308 if key == "lora_alpha" else {"q_proj": 1e308}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "p.toml").write_text('[[rule]]\nname = "r"\nrequire = "fro < 1"\n')
    base, merged = SAMPLES / "base", SAMPLES / "full_ft"
    for words in (["spectrum", base, "adapter"], ["spectrum", "adapter"], ["verify-merge", base, "adapter", merged],
                  ["portability", "adapter"], ["fleet", "adapter"],
                  ["gate", "p.toml", "--base", base, "--tuned", "adapter"]):  # fmt: skip
        ran = loradiag(*words)
        assert ran.code == 3, ran.out + ran.err
        assert_names(ran.err, "adapter/adapter_config.json", key, "1e+308")


@pytest.mark.slow
def test_norm_beyond_float64_is_null_or_refused(loradiag, tmp_path: Path) -> None:
    """Each layer's norm is finite; that of all layers is not."""
    names = [f"model.layers.{index}.q_proj" for index in range(4)]
    save_model(
        tmp_path / "base", {f"{name}.weight": torch.eye(2).double() * 1.2e308 for name in names}
    )
    save_model(tmp_path / "tuned", {f"{name}.weight": torch.zeros(2, 2).double() for name in names})
    ran = loradiag("spectrum", "base", "tuned", "--json")
    assert ran.code in {0, 3}, ran.err
    assert ran.records[-1]["record"] == "end"
    assert ran.records[-1]["fro"] is None or ran.records[-1]["layers"] == 0


def test_policy_with_long_number_is_refused(loradiag, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(f"x = {'1' * 10_000}\n")
    ran = loradiag("gate", "p.toml", "results.jsonl")
    assert ran.code == 2
    assert_names(ran.err, "p.toml", "too many digits")


@pytest.mark.slow
@pytest.mark.parametrize("length", [246, 251, 300])
def test_long_output_name_is_refused_before_work(loradiag, tmp_path: Path, length: int) -> None:
    name = "a" * length
    base, tuned = SAMPLES / "base", SAMPLES / "full_ft"
    for words in (["extract", base, tuned, "--rank", "2"], ["recover", base, tuned, "--rank", "2"],
                  ["spectrum", base, tuned]):  # fmt: skip
        ran = loradiag(*words, "-o", name)
        assert ran.code == 3, ran.err
        assert_names(ran.err, "cannot be written", "name too long")
    assert not list(tmp_path.iterdir())
