"""Amounts in words, bytes per parameter, and the rules for a single layer's rank."""

import math

import numpy as np
import pytest

from lora_diag.decisions.allocate.run import apply_rank_rules
from lora_diag.decisions.targets import TrainingMemory, why_no_target
from lora_diag.errors import UsageError
from lora_diag.metrics.energy import gavish_donoho
from lora_diag.running.amounts import read_bytes, read_count, read_share
from tests.decisions.allocate.records import record
from tests.oracles import effective_rank


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("10M", 10**7),
        ("8388608", 8388608),
        ("1.5B", 15 * 10**8),
        ("0.1k", 100),
        ("1_000", 1000),
        (" 2 m ", 2 * 10**6),
    ],
)
def test_parse_counts(words, value):
    assert read_count(words, "--params") == value


@pytest.mark.parametrize(
    ("words", "value"), [("2GB", 2 * 10**9), ("1GiB", 2**30), ("1.5mb", 1_500_000), ("7B", 7)]
)
def test_parse_sizes(words, value):
    assert read_bytes(words, "--memory") == value


@pytest.mark.parametrize(
    ("read", "value"),
    [
        *(
            (read_count, v)
            for v in ("", "M", "-1M", "1e6", "10MB", "10X", "0", "nan", "inf", "1,000", "1_0", "٣M")
        ),
        *((read_bytes, v) for v in ("2", "2G", "GB", "-2GB", "0GB", "2 G B")),
        *((read_share, v) for v in (0.0, -0.1, 1.1, 90.0, math.nan, math.inf)),
    ],
)
def test_invalid_amount_is_refused(read, value):
    with pytest.raises(UsageError, match="--amount"):
        read(value, "--amount")


def test_bytes_of_parameter():
    assert TrainingMemory("adamw", "float32").bytes_per_param == 4 + 4 + 4 + 4
    assert TrainingMemory("adamw8bit", "bfloat16").bytes_per_param == 2 + 2 + 2 * (1 + 4 / 256)
    assert TrainingMemory("sgd_momentum", "float16").bytes_per_param == 2 + 2 + 4


@pytest.mark.parametrize("shape", [(200, 200), (100, 400), (400, 100)])
def test_hard_threshold_finds_planted_rank_in_unknown_noise(shape):
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(shape) * 0.03
    u, _, vh = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    planted = noise + (u[:, :5] * 4.0) @ vh[:5]
    assert gavish_donoho(np.linalg.svd(planted, compute_uv=False), shape) == 5
    assert gavish_donoho(np.linalg.svd(noise, compute_uv=False), shape) == 0


def test_policies_of_full_and_truncated_spectrum():
    s = np.array([8.0, 4.0, 2.0, 1.0, 0.5, 0.5, 0.5, 0.5])
    full = apply_rank_rules(record("a.weight", (8, 8), s, signal=4)).ranks
    assert full["energy 90%"] == 2
    assert full["effective"] == math.ceil(effective_rank(s))
    assert full["signal"] == 4
    # ω(1)·median = 2.858 · 0.75 = 2.14
    assert full["Gavish–Donoho"] == 2
    cut = apply_rank_rules(record("a.weight", (8, 8), s[:3], fro=10.0)).ranks
    assert (cut["knee"], cut["effective"], cut["Gavish–Donoho"], cut["signal"]) == (
        None,
        None,
        None,
        None,
    )
    still = apply_rank_rules(record("a.weight", (8, 8), np.zeros(8), signal=0)).ranks
    assert (still["energy 90%"], still["knee"], still["Gavish–Donoho"]) == (0, None, None)


def test_unusual_target_is_refused():
    """A table of positions and grouped convolutions cannot take LoRA; a linear layer of the same
    model can.
    """
    refused = ("visual.register_tokens", "visual.attn.relative_position_bias_table")
    refused += ("model.layers.0.temporal_block.conv_1d.weight", "model.layers.0.conv.conv.weight")
    assert all(why_no_target(name, None, None) for name in refused)
    assert not why_no_target("model.layers.0.conv.in_proj.weight", None, None)
