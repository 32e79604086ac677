"""Whether TUNED descends from BASE: the cosine against float64 NumPy, its verdict, and what the
commands make of it.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_diag
from lora_diag.errors import InputError
from lora_diag.layers.lineage import cosine_of_norms, judge_cosine
from tests.adapters import making
from tests.conftest import save_model
from tests.messages import assert_names

NAMES = [
    f"model.layers.{n}.self_attn.{leaf}.weight" for n in (0, 1) for leaf in ("q_proj", "v_proj")
]
SHAPE = (48, 40)


def draw(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(SHAPE).astype(np.float32) for name in NAMES}


def save(folder, weights, dtype=torch.float32):
    return save_model(
        folder, {name: torch.tensor(value).to(dtype) for name, value in weights.items()}, {}
    )


def tune(weights, size=0.1, rank=None):
    """Move weights by an update of a norm relative to theirs, of full or of a given rank."""
    rng, tuned = np.random.default_rng(9), {}
    for name, weight in weights.items():
        update = rng.standard_normal(SHAPE)
        if rank is not None:
            update = rng.standard_normal((SHAPE[0], rank)) @ rng.standard_normal((rank, SHAPE[1]))
        tuned[name] = weight + size * np.linalg.norm(weight) / np.linalg.norm(update) * update
    return {name: value.astype(np.float32) for name, value in tuned.items()}


def cosine(x, y):
    x, y = x.astype(np.float64).ravel(), y.astype(np.float64).ravel()
    return x @ y / (np.linalg.norm(x) * np.linalg.norm(y))


@pytest.fixture
def pair(tmp_path):
    """BASE, and a model of another seed."""
    base, other = draw(0), draw(1)
    return save(tmp_path / "base", base), save(tmp_path / "other", other), base, other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_cosine_equals_float64_of_files(tmp_path, dtype):
    before, after = draw(0), {**tune(draw(0), 2.0), NAMES[1]: draw(5)[NAMES[1]]}
    stored = [
        {name: torch.tensor(value).to(dtype).double().numpy() for name, value in weights.items()}
        for weights in (before, after)
    ]
    results = lora_diag.spectrum(
        save(tmp_path / "a", before, dtype), save(tmp_path / "b", after, dtype)
    )
    for record in results:
        expected = cosine(stored[0][record.layer], stored[1][record.layer])
        # ΔW is rounded to float32, its square by 2⁻²³ of itself; the cosine by as much of
        # ‖ΔW‖²/(‖W‖‖W + ΔW‖)
        assert record.cosine_to_base == pytest.approx(
            expected, abs=1e-14 if dtype == torch.float64 else 2**-21
        )
        assert record.chance_cosine == pytest.approx(1 / math.sqrt(math.prod(SHAPE)))
        assert record.lineage == ("unrelated" if record.layer == NAMES[1] else "descends")


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(-1, 1), st.floats(1e-30, 1e30))
def test_cosine_follows_from_norms_at_any_scale(ratio, wanted, scale):
    """By the law of cosines; of norms in other units it is the same."""
    change = math.sqrt(max(0.0, 1 + ratio**2 - 2 * ratio * wanted))
    found = cosine_of_norms(scale, ratio * scale, change * scale)
    assert found == pytest.approx(wanted, abs=1e-9 * max(ratio, 1 / ratio))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_verdict_is_same_for_permuted_or_turned_pairs(seed, turn):
    """The same permutation of both weights, or both transposed, changes no norm."""
    rng = np.random.default_rng(seed)
    first, second = rng.standard_normal((2, 30, 30))
    second += rng.choice([0.0, 0.3, 3.0]) * first
    order = rng.permutation(30)
    moved = (first.T, second.T) if turn else (first[order], second[order])
    norms = [[np.linalg.norm(x) for x in (a, b, b - a)] for a, b in ((first, second), moved)]
    assert cosine_of_norms(*norms[0]) == pytest.approx(cosine_of_norms(*norms[1]), abs=1e-12)


@pytest.mark.parametrize(
    ("size", "verdict"),
    [(0.01, "descends"), (1.0, "descends"), (3.0, "descends"), (20.0, "unrelated")],
)
def test_heavily_trained_weights_descend(size, verdict):
    """cos = 1/√(1 + ρ²) of an independent ΔW = ρ‖W‖; only far beyond any fine-tune it is chance."""
    weights = draw(0)
    tuned = tune(weights, size)
    found = {judge_cosine(cosine(weights[name], tuned[name]), math.prod(SHAPE)) for name in NAMES}
    assert found == {verdict}


def test_small_weights_are_not_judged():
    assert judge_cosine(0.01, 100) is None
    assert judge_cosine(0.9, 100) == "descends"
    assert judge_cosine(0.15, 10**6) is None


def test_unrelated_models_get_no_rank_story(pair, tmp_path, run):
    results = lora_diag.spectrum(*pair[:2])
    assert {record.lineage for record in results} == {"unrelated"}
    for record in results:
        assert {*record.energy.values(), *record.rank_at.values(), *record.tail.values()} == {None}
        assert (record.stable_rank, record.effective_rank) == (None, None)
        assert record.relative == pytest.approx(
            np.linalg.norm(pair[3][record.layer] - pair[2][record.layer])
            / np.linalg.norm(pair[2][record.layer]),
            rel=1e-6,
        )
    ran = run("spectrum", "base", "other", "-o", "s.jsonl")
    assert ran.code == 0
    lines = [
        line for line in ran.out.split("\n") if line.startswith(("Lineage", "Low rank", "Change"))
    ]
    assert_names(lines[0], "unrelated", "4 of 4", "BASE")
    assert_names(lines[1], "not known")
    assert "Rank at 90%" not in ran.out
    assert run("inspect", "s.jsonl").code == 0
    ran = run("allocate", "s.jsonl", "--params", "500")
    assert ran.code == 3
    assert_names(ran.err, "s.jsonl", "unrelated", "BASE")


def test_replaced_layers_are_named(pair, tmp_path, run):
    """Two layers exchanged; the others keep their ranks, and the summary says which."""
    after = tune(pair[2])
    after[NAMES[0]], after[NAMES[2]] = after[NAMES[2]], after[NAMES[0]]
    save(tmp_path / "tuned", after)
    results = lora_diag.spectrum(pair[0], tmp_path / "tuned")
    assert [record.lineage for record in results] == [
        "unrelated",
        "descends",
        "unrelated",
        "descends",
    ]
    assert results[1].rank_at["0.9"]
    ran = run("spectrum", "base", "tuned")
    assert_names(
        ran.out, "unrelated", "2 of 4", "layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"
    )


def test_gate_fails_checkpoint_of_another_base(pair, tmp_path, run):
    assert run("spectrum", "base", "other", "-o", "s.jsonl").code == 0
    ran = run("gate", "--policy", "full-ft-drift", "s.jsonl")
    assert ran.code == 1
    assert_names(ran.out, "unrelated", "4 of 4", "BASE")
    save(tmp_path / "tuned", tune(pair[2]))
    assert run("spectrum", "base", "tuned", "-o", "t.jsonl").code == 0
    assert "do not descend" not in run("gate", "--policy", "full-ft-drift", "t.jsonl").out
    rule = (
        'title = "Base"\n[[rule]]\nname = "descent"\nrequire = "spectrum.cosine_to_base >= 0.5"\n'
    )
    (tmp_path / "p.toml").write_text(rule)
    assert run("gate", "./p.toml", "s.jsonl").code == 1
    assert run("gate", "./p.toml", "t.jsonl").code == 0


def test_extract_and_recover_write_nothing_for_unrelated(pair, tmp_path):
    with pytest.raises(InputError, match="unrelated"):
        lora_diag.extract(*pair[:2], tmp_path / "adapter", rank=2)
    assert not (tmp_path / "adapter").exists()
    assert not (tmp_path / "adapter.part").exists()
    short = (
        save(tmp_path / "short", pair[3], torch.bfloat16),
        save(tmp_path / "short2", draw(7), torch.bfloat16),
    )
    results = lora_diag.recover(*short)
    assert {(record.status, record.lineage) for record in results} == {("refused", "unrelated")}
    with pytest.raises(InputError, match="unrelated"):
        lora_diag.recover(*short, output=tmp_path / "recovered", checkpoint=True)
    assert not (tmp_path / "recovered").exists()


def test_residual_and_verify_merge_name_wrong_base(pair, tmp_path, run):
    rng = np.random.default_rng(3)
    factors = {
        f"{name.removesuffix('.weight')}.lora_{side}.weight": rng.standard_normal(shape) * 0.1
        for name in NAMES
        for side, shape in (("A", (2, SHAPE[1])), ("B", (SHAPE[0], 2)))
    }
    making.adapter(tmp_path, factors, target_modules=["q_proj", "v_proj"])
    ran = run("residual", "base", "other", "adapter")
    assert ran.code == 0
    assert_names(ran.out, "unrelated", "4 of 4", "BASE")
    ran = run("verify-merge", "base", "adapter", "other")
    assert ran.code == 1
    assert_names(ran.out, "unrelated", "BASE")
    records = lora_diag.verify_merge("base", "adapter", "other")
    assert {record.status for record in records} == {"other base"}
