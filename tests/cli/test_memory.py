"""``--memory``: runs under a hard limit of the system, messages, and results equal to those without
the option.
"""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import lora_diag
from lora_diag.errors import UsageError
from lora_diag.linalg import methods as limits
from lora_diag.linalg.methods import Allowance
from tests.conftest import PATIENCE, ROOT, Ran, as_numpy, save_model
from tests.messages import assert_names

pytestmark = pytest.mark.slow

NAME, SMALL = "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"
# 369 of them for the program; ΔW of NAME in float32 has 184, its Gram matrix and reading it 60
MEMORY = "510MB"

# MiB besides what a run on nothing large has: with --memory it takes 35 of them, without 195, give
# or take 10.
LIMIT = 110

# Prints how much address space a run takes whose matrices are small: torch alone maps hundreds of
# megabytes.
PLAIN = """
import atexit, sys
atexit.register(lambda: print(open("/proc/self/status").read().split("VmPeak:")[1].split()[0], file=sys.stderr))
base, tuned = "sample_checkpoints/base", "sample_checkpoints/full_ft"
sys.argv = ["loradiag", "spectrum", base, tuned, "--layers", "layers.0", "-q"]
from lora_diag.cli import main
main()
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A bf16 pair of a large and a small matrix."""
    folder = tmp_path_factory.mktemp("memory")
    rng = torch.Generator().manual_seed(0)
    before, after = {}, {}
    for name, (m, n) in {NAME: (180000, 256), SMALL: (96, 80)}.items():
        base = torch.randn(m, n, generator=rng) * 0.02
        low = torch.randn(m, 12, generator=rng) @ (torch.randn(12, n, generator=rng) * 1e-3)
        before[name], after[name] = base.bfloat16(), (base + low).bfloat16()
    return save_model(folder / "base", before), save_model(folder / "tuned", after), before, after


@pytest.fixture(scope="module")
def limited():
    """Run the command with so many MiB of address space besides what a run on nothing large has."""
    # One arena: each thread's own would reserve 64 MiB of address space that nothing uses.
    env = {**os.environ, "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    plain = subprocess.run(
        [sys.executable, "-c", PLAIN], capture_output=True, text=True, cwd=ROOT, env=env, check=True
    )
    size = int(plain.stderr.split()[-1])

    def run(extra, *words) -> Ran:
        command = f'ulimit -v {size + extra * 1024}; exec "$@"'
        words = ["sh", "-c", command, "sh", sys.executable, "-m", "lora_diag", *map(str, words)]
        done = subprocess.run(
            words, capture_output=True, text=True, env=env, check=False, timeout=PATIENCE
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Ran(done.returncode, done.stdout, done.stderr)

    return run


def test_matrix_larger_than_hard_limit_is_measured(pair, limited):
    base, tuned, before, after = pair
    assert 4 * before[NAME].numel() > LIMIT * 2**20
    without = limited(LIMIT, "spectrum", base, tuned, "--json")
    assert without.code == 3
    assert_names(without.err, NAME, "out of memory", "--memory")
    ran = limited(LIMIT, "spectrum", base, tuned, "--memory", MEMORY, "--json")
    assert ran.code == 0, ran.err
    large, small = (
        next(r for r in ran.records if r.get("layer") == name) for name in (NAME, SMALL)
    )
    assert (large["method"], large["blocks"], large["complete"]) == ("gram", 44, True)
    assert small["blocks"] is None
    delta = as_numpy(after[NAME]) - as_numpy(before[NAME])
    true = np.sqrt(np.linalg.eigvalsh(delta.T @ delta)[::-1].clip(0))
    assert np.abs(np.array(large["s"]) - true).max() <= 1e-7 * true[0]
    assert large["fro"] == pytest.approx(np.sqrt((true**2).sum()), rel=1e-9)


def test_layer_beyond_memory_is_left_out_with_remedy(tmp_path, loradiag):
    rng = torch.Generator().manual_seed(0)
    before = {
        NAME: torch.randn(3650, 3600, generator=rng).bfloat16(),
        SMALL: torch.randn(96, 80, generator=rng),
    }
    after = {name: (value.float() + 0.01).to(value.dtype) for name, value in before.items()}
    base, tuned = save_model(tmp_path / "base", before), save_model(tmp_path / "tuned", after)
    ran = loradiag(
        "spectrum",
        base,
        tuned,
        "--memory",
        MEMORY,
        "-o",
        tmp_path / "r.jsonl",
        env={"COLUMNS": "200"},
    )
    assert ran.code == 3
    assert_names(ran.err, NAME, "3650x3600", "--memory", "141 MB", "169 MB")
    needed = limits.READING_BYTES + limits.gram_bytes((3650, 3600), Allowance(0), in_place=True)
    assert 168.5e6 < needed < (141 + 29) * 10**6  # with which tests of linalg measure
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [r["layer"] for r in records if r["record"] == "spectrum"] == [SMALL]
    (left,) = [r for r in records if r["record"] == "left_out"]
    delta = as_numpy(after[NAME]) - as_numpy(before[NAME])
    assert left["reason"] == "memory"
    assert left["fro"] == pytest.approx(np.linalg.norm(delta), rel=1e-6)


@pytest.mark.parametrize(
    ("memory", "workers", "text"),
    [
        ("lots", None, "memory='lots': give a size with its unit"),
        ("-1GB", None, "memory='-1GB': give a size with its unit"),
        ("400MB", None, "memory='400MB': the program itself takes 369 MB; give 504MB or more"),
        (400 * 10**6, None, "memory='400MB': the program itself takes"),
        ("1GB", 9, "give 1578MB or more"),
    ],
)
def test_invalid_sizes_are_refused(memory, workers, text):
    with pytest.raises(UsageError, match=re.escape(text)):
        lora_diag.spectrum(
            "sample_checkpoints/base", "sample_checkpoints/full_ft", memory=memory, workers=workers
        )
