"""``spectrum --recover``: the estimate of the update before rounding, and when it is reported."""

import pytest
import torch

import lora_diag
from lora_diag.diagnostics.spectrum.show import summary_lines
from lora_diag.records.vocabulary import Hidden
from lora_diag.rendering.statements import describe_estimate
from tests.conftest import save_model
from tests.linalg.test_hidden import planted
from tests.messages import assert_names

Q, K, UP = (
    f"model.layers.0.{name}.weight"
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return BASE and TUNED in bfloat16: q of rank 3 below the rounding, up is resolved, k is
    sparse.
    """
    folder = tmp_path_factory.mktemp("pair")
    w, x, t = planted(96, 80, 3, 2e-5, 1)
    v, _, big = planted(64, 80, 2, 2e-2, 2)
    sparse = v.clone()
    sparse[::4] += torch.randn(16, 80, generator=torch.Generator().manual_seed(3)) * 3e-3
    save_model(folder / "base", {Q: w.bfloat16(), UP: v.bfloat16(), K: v.bfloat16()})
    save_model(folder / "tuned", {Q: t.bfloat16(), UP: big.bfloat16(), K: sparse.bfloat16()})
    return folder / "base", folder / "tuned", x


def line(results, key):
    return next(
        (" ".join((one.lead, *one.details)) for one in summary_lines(results) if one.key == key),
        None,
    )


def test_unresolved_layers_are_estimated(pair, tmp_path):
    base, tuned, x = pair
    result = lora_diag.spectrum(base, tuned, recover=True, output=tmp_path / "s.jsonl")
    plain = lora_diag.recover(base, tuned)[Q]
    hidden = result[Q].hidden
    assert hidden.fro_estimate == plain.fro_estimate == pytest.approx(float(x.norm()), rel=0.1)
    assert hidden.values_estimate == plain.values_estimate
    assert set(hidden.energy_estimate) == set(result[Q].energy)
    assert result[UP].hidden is None
    assert result[UP].resolution.verdict == "resolved"
    assert lora_diag.read_results(tmp_path / "s.jsonl").layers == result.layers
    assert result.run.settings["recover"] is True
    text = line(result, "before_rounding")
    assert f"‖X‖ = {hidden.fro_estimate:.3g}"[:8] in text
    assert "loradiag recover" not in line(result, "resolved")


def test_allocate_uses_update_before_rounding(pair):
    base, tuned, _ = pair
    result = lora_diag.spectrum(base, tuned, recover=True, layers="q_proj")
    chosen = lora_diag.allocate(result, energy=0.99)
    values = result[Q].hidden.values_estimate
    assert chosen[Q].rank == len(values) <= 3
    assert chosen[Q].kept == pytest.approx(
        sum(x**2 for x in values) / result[Q].hidden.fro_estimate ** 2
    )
    assert_names(chosen.run.inputs[0].notes[0], "1 of 1 layers", "before rounding")


def test_activations_with_recover_are_refused(loradiag, pair):
    ran = loradiag("spectrum", *pair[:2], "--recover", "--activations", "none.safetensors")
    assert ran.code == 2
    assert "remove --activations" in ran.err


def test_estimate_without_interval_states_no_size():
    resolved = Hidden(status="not_hidden", reason="resolved", unchanged=0.0, fro_estimate=1.0)
    assert describe_estimate([(resolved, 1.0)]) == []
