"""Checkpoints made on the spot, and the command run as a user runs it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from tests import slow_tests
from tests.served import PATIENCE, ROOT, SOCKET, Server

if (
    TYPE_CHECKING
):  # torch takes seconds to import, and the process that hands tests to workers runs none
    import numpy as np
    import torch

# Compiled once, not by every worker and command, also where the environment asks for the latter.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Every run tries the same examples, and none fails because a machine is slow; ``make fuzz`` tries
# others.
PATIENT = hypothesis.settings(
    deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("same", PATIENT, derandomize=True)
hypothesis.settings.register_profile("others", PATIENT, print_blob=True)
hypothesis.settings.load_profile("same")

# What whoever runs the tests has set for other programs; and no proxy reaches the servers that they
# start here.
FOREIGN = {
    "COLUMNS",
    "LINES",
    "FORCE_COLOR",
    "PY_COLORS",
    "GITHUB_ACTIONS",
    "GITHUB_STEP_SUMMARY",
    "RAY_ADDRESS",
}
for name in FOREIGN & set(os.environ):
    del os.environ[name]
# A defect shows its traceback, which tests look for; users get one message
# (``tests/robustness/test_last_resort.py``).
os.environ["LORADIAG_TRACEBACK"] = "1"
# The time in a run record, in which alone two runs of the same input differ.
os.environ["SOURCE_DATE_EPOCH"] = "1700000000"
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"

# Small real adapters and checkpoints with their truth, malformed ones, and storage formats.
DATA = ROOT / "tests" / "data"


def pytest_configure(config):
    """Name the socket of the one server of this run, which workers inherit; and find the slow
    tests.
    """
    config.pluginmanager.register(slow_tests)
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="loradiag-")  # a socket's path is short
        config.add_cleanup(folder.cleanup)
        os.environ[SOCKET] = str(Path(folder.name) / "socket")


def pytest_xdist_auto_num_workers(config):
    """Return the number of workers of ``-n auto``: one more than cores where slow tests wait for
    processes.
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return cores + (config.option.markexpr != "not slow")


@pytest.fixture(autouse=True)
def same_numbers():
    """Begin every test with the same random numbers, whatever ran before it in this process.

    Matrices here are small, and several threads on a busy machine spin for each other: one is
    fastest.
    """
    import torch

    torch.set_num_threads(1)
    torch.default_generator.manual_seed(
        0
    )  # torch.manual_seed formats the stack for devices that are not here


@pytest.fixture(autouse=True)
def whole_summaries(monkeypatch):
    """Let commands in this process show every line of their summaries, as ``show_all`` does for
    those in others.
    """
    monkeypatch.setattr("lora_diag.cli.options.LINES", None)


@pytest.fixture
def undrawn(monkeypatch):
    """Leave the static figures out of the HTML reports of this process, as ``draw_nothing`` does in
    others.
    """
    monkeypatch.setattr("lora_diag.reports.html.images_of", lambda evidence: [])


@pytest.fixture(autouse=True)
def ctrl_c():
    """Let the commands that a test starts be interrupted.

    Children inherit whether Ctrl-C is ignored: a shell starts so what runs behind it, and ``main``
    ends so, also where a test calls it in this process.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


def edit_results(path: Path, change) -> None:
    """Change the text of a results file; its last line gets the hash of what it then
    stands behind.
    """
    *lines, last = change(path.read_text()).splitlines(keepends=True)
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    path.write_text("".join([*lines, re.sub(r'("sha256": ?)"\w*"', rf'\g<1>"{digest}"', last)]))


@contextlib.contextmanager
def time_limit(seconds: float):
    """Fail where the block takes longer, also where it waits for a file or a process; not where a
    thread does.
    """

    def fail(*_):
        pytest.fail(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def records(self) -> list[dict]:
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Runs commands in processes of their own that need not start anew."""
    running = Server(tmp_path_factory.mktemp("printed"))
    yield running
    running.close()


@pytest.fixture
def loradiag(tmp_path, server):
    """Run the command in a process of its own; a traceback is always a failure.

    ``anew`` starts Python anew, for what it reads of its environment only when it starts. Summaries
    are whole, as with ``--verbose``, unless they are to be ``brief``. After ``patience`` seconds
    the command is ended.
    """

    def run(*words, cwd=tmp_path, env=None, anew=False, brief=False, patience=PATIENCE) -> Ran:
        env = {**os.environ, "NO_COLOR": "1", "OMP_NUM_THREADS": "1", **(env or {})}
        if anew:
            done = subprocess.run(
                [sys.executable, "-m", "lora_diag", *map(str, words)],
                capture_output=True,
                cwd=cwd,
                env=env,
                check=False,
                timeout=patience,
            )
            code, out, err = done.returncode, done.stdout, done.stderr
        else:
            whole = {} if brief else {"prepare": "tests.served:show_all"}
            code, out, err = server.run(words, cwd, environment=env, patience=patience, **whole)
        ran = Ran(code, out.decode(), err.decode())
        assert "Traceback" not in ran.err, ran.err
        return ran

    return run


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run a command in this process, which has imported everything already, in the folder of the
    test.
    """
    from lora_diag.cli.app import main
    from lora_diag.storage import addresses

    monkeypatch.setattr(addresses, "FIRST_WAIT", 0.001)
    monkeypatch.chdir(tmp_path)

    def command(*words, width=200) -> Ran:
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr(sys, "argv", ["loradiag", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        return Ran(int(stopped.value.code or 0), printed.out, printed.err)

    return command


def weights(seed: int, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """A two-block model in Hugging Face names, with every kind of tensor a reader meets."""
    import torch

    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (torch.randn(*shape, generator=rng) * 0.02).to(dtype or torch.float32)

    tensors = {"model.embed_tokens.weight": normal(20, 12), "lm_head.weight": normal(20, 12)}
    for block in range(2):
        prefix = f"model.layers.{block}."
        tensors |= {
            prefix + "self_attn.q_proj.weight": normal(12, 12),
            prefix + "self_attn.k_proj.weight": normal(6, 12),
            prefix + "mlp.up_proj.weight": normal(16, 12),
            prefix + "mlp.down_proj.weight": normal(12, 16),
            prefix + "input_layernorm.weight": normal(12),
        }
    return tensors


@pytest.fixture
def pair_of_models(tmp_path):
    """Return (base, tuned) folders of float32 safetensors, and their tensors."""
    return save_pair(tmp_path)


def save_pair(folder: Path):
    before = weights(1)
    after = {name: value + weights(2)[name] * 0.1 for name, value in before.items()}
    return save_model(folder / "base", before), save_model(folder / "tuned", after), before, after


def save_model(
    folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None
) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors"
    )
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_sharded(
    folder: Path, tensors: dict[str, torch.Tensor], shards: int = 3, suffix: str = "safetensors"
) -> Path:
    """Write shards and their index, as ``save_pretrained`` lays them out."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05d}-of-{shards:05d}.{suffix}"
        part = {name: tensors[name].contiguous() for name in names[shard::shards]}
        if suffix == "safetensors":
            save_file(part, folder / file)
        else:
            torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    import torch

    return tensor.to(torch.float64).numpy()
