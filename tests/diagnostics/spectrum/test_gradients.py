"""Spectra of stacked gradients, against NumPy on the stack itself."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lora_diag
from lora_diag.errors import InputError, NothingComparedError, UsageError
from lora_diag.linalg.exact import decompose_gram, decompose_stack
from tests.conftest import DATA, ROOT, as_numpy, save_model, weights
from tests.messages import mentions, raises_naming
from tests.test_gradients import save_step

pytestmark = pytest.mark.slow

SAMPLES = ROOT / "sample_checkpoints"


def both_sides(gradients: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Singular values of the gradients concatenated along columns, and along rows."""
    return {
        "left": np.linalg.svd(np.concatenate(gradients, 1), compute_uv=False),
        "right": np.linalg.svd(np.concatenate(gradients, 0), compute_uv=False),
    }


def curve(s):
    return np.cumsum(s**2) / (s**2).sum()


@pytest.mark.parametrize("where", ["samples", "cases"])
def test_expert_values_equal_stack(where):
    base, folder = SAMPLES / "base", SAMPLES / "gradients"
    if where == "cases":
        base, folder = (DATA / "cases" / "gradients" / name for name in ("base", "grads"))
    taken = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    result = lora_diag.spectrum(base, gradients=[folder], ranks=[2, 8])
    assert {record.layer for record in result} == {
        name for name, value in taken[0].items() if value.ndim == 2
    }
    for record in result:
        sides = both_sides([as_numpy(step[record.layer]) for step in taken])
        m, n = record.shape
        own, other = ("left", "right") if m < n else ("right", "left")
        s = sides[own][: min(m, n)]
        assert (record.source, record.stack.side, record.complete, record.base_fro) == (
            "gradients",
            own,
            True,
            None,
        )
        assert np.allclose(record.s, s, rtol=1e-6, atol=1e-7 * s[0])
        assert record.fro == pytest.approx(np.sqrt((s**2).sum()), rel=1e-9)
        for rank in (2, 8):
            assert record.energy[str(rank)] == pytest.approx(curve(sides[own])[rank - 1], abs=1e-7)
            assert record.stack.other_energy[str(rank)] == pytest.approx(
                curve(sides[other])[rank - 1], abs=1e-7
            )
        assert record.rank_at["0.9"] == int((curve(sides[own]) < 0.9).sum()) + 1
        assert record.stack.other_rank_at["0.9"] == int((curve(sides[other]) < 0.9).sum()) + 1
        assert record.resolution.verdict == "resolved"


def test_single_gradient_has_its_own_spectrum(tmp_path):
    path = save_step(tmp_path / "g5.safetensors", {"a.weight": torch.randn(9, 4)})
    (record,) = lora_diag.spectrum(gradients=[path], ranks=[2])
    s = np.linalg.svd(as_numpy(load_file(path)["a.weight"]), compute_uv=False)
    assert np.allclose(record.s, s, rtol=1e-6)
    assert record.stack.steps == (5,)
    assert record.stack.other_energy == record.energy


def test_gradients_of_low_rank_on_one_side_differ_between_sides(tmp_path):
    """One column space for all steps, a new row space at each: rank 2 on the left, 6 on
    the right.
    """
    rng = np.random.default_rng(0)
    u = np.linalg.qr(rng.standard_normal((20, 2)))[0]
    for step in range(3):
        g = u @ rng.standard_normal((2, 24))
        save_step(tmp_path / "g" / f"{step}.safetensors", {"a.weight": torch.from_numpy(g)})
    (record,) = lora_diag.spectrum(gradients=[tmp_path / "g"], ranks=[2, 6])
    assert record.stack.side == "left"
    assert record.energy["2"] == pytest.approx(1, abs=1e-9)
    assert record.stack.other_energy["2"] < 0.7
    assert record.stack.other_energy["6"] == pytest.approx(1, abs=1e-9)


def test_rounding_follows_stored_gradients(tmp_path):
    g = {"a.weight": torch.randn(16, 16)}
    save_step(
        tmp_path / "half" / "0.safetensors",
        {name: value.to(torch.bfloat16) for name, value in g.items()},
    )
    save_step(
        tmp_path / "half" / "1.safetensors",
        {name: value.to(torch.bfloat16) for name, value in g.items()},
    )
    (record,) = lora_diag.spectrum(gradients=[tmp_path / "half"])
    stored = as_numpy(load_file(tmp_path / "half" / "0.safetensors")["a.weight"])
    ulp = 2.0 ** (np.floor(np.log2(np.abs(stored))) - 7)
    assert record.resolution.rounding_fro == pytest.approx(np.sqrt(2 * (ulp**2).sum()) / 2)
    assert record.dtypes == (None, "bfloat16")


def test_zero_and_non_finite_gradients(tmp_path):
    bad = torch.ones(4, 4)
    bad[2, 1] = torch.nan
    save_step(
        tmp_path / "g" / "3.safetensors", {"zero.weight": torch.zeros(4, 4), "bad.weight": bad}
    )
    result = lora_diag.spectrum(gradients=[tmp_path / "g"], ranks=[1])
    (zero,) = result
    assert (zero.layer, zero.fro, zero.energy["1"], zero.stack.other_energy["1"]) == (
        "zero.weight",
        0.0,
        None,
        None,
    )
    (item,) = result.left_out
    assert (item.layer, item.reason, item.detail) == (
        "bad.weight",
        "non_finite",
        "step 3: the gradient holds nan at [2, 1]",
    )


def test_invalid_requests_are_refused(tmp_path):
    base = save_model(tmp_path / "base", weights(1))
    path = save_step(tmp_path / "g" / "3.safetensors", weights(2))
    with raises_naming(UsageError, "give", "BASE"):
        lora_diag.spectrum(base, base, gradients=[path])
    with raises_naming(UsageError, "give", "BASE", "TUNED"):
        lora_diag.spectrum()
    with pytest.raises(UsageError, match="svd='exact'"):
        lora_diag.spectrum(gradients=[path], svd="exact")
    with pytest.raises(NothingComparedError):
        lora_diag.spectrum(base, gradients=[path], layers="nowhere")
    with pytest.raises(InputError, match="no training step is known"):
        lora_diag.spectrum(gradients=[base])


def test_left_out_tensors_are_listed(tmp_path):
    base = save_model(tmp_path / "base", weights(1))
    path = save_step(
        tmp_path / "g" / "3.safetensors", weights(2) | {"new.weight": torch.ones(3, 3)}
    )
    result = lora_diag.spectrum(base, gradients=[path], exclude="lm_head")
    reasons = {item.layer: item.reason for item in result.left_out}
    assert reasons["lm_head.weight"] == "not_selected"
    assert reasons["new.weight"] == "not_in_base"
    assert reasons["model.layers.0.input_layernorm.weight"] == "vector"
    assert len(result) == 9


@pytest.mark.parametrize(
    ("first", "second", "dtype"), [(1e-38, 1e2, np.float32), (1e-200, 1e150, np.float64)]
)
def test_stack_with_tiny_first_gradient(first, second, dtype):
    rng = np.random.default_rng(0)
    parts = [
        (rng.standard_normal((9, 7)) * scale).astype(dtype) for scale in (first, second, first)
    ]
    result = decompose_stack([torch.from_numpy(part) for part in parts])
    expected = np.linalg.svd(np.concatenate(parts).astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(result.s.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 2.0**40])
def test_stack_bound_equals_matrix_bound(scale):
    parts = [torch.randn(9, 7).double() * scale for _ in range(5)]
    matrix = torch.cat(parts)
    result, whole = (
        decompose_stack(parts),
        decompose_gram(matrix, float(torch.linalg.matrix_norm(matrix))),
    )
    assert result.energy_error == pytest.approx(whole.energy_error, rel=1e-9)
    assert result.energy_error > 7**0.5 * 45 * 2.0**-52


def test_gradients_with_coarse_spacing_are_left_out(tmp_path):
    for step in range(2):
        save_step(
            tmp_path / "g" / f"{step}.safetensors", {"a.weight": torch.randn(4, 4).double() * 1e200}
        )
    result = lora_diag.spectrum(gradients=[tmp_path / "g"])
    assert [
        (item.reason, mentions(item.detail, "spacing", "numbers")) for item in result.left_out
    ] == [("non_finite", True)]
