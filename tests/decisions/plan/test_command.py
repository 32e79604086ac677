"""``loradiag plan`` as a user runs it."""

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow

BASE = ROOT / "sample_checkpoints/base"


def test_name_in_file_is_escaped(run, tmp_path):
    from tests.conftest import save_model, weights

    name = "model.layers.0.bad\x1b[2J_proj.weight"
    save_model(tmp_path / "evil", {name: weights(0)["lm_head.weight"]})
    ran = run("plan", "evil")
    assert ran.code == 0
    assert "\x1b" not in ran.out


def test_record_of_cost_adds_up(run):
    from lora_diag.decisions.plan.cost import estimate_core_seconds
    from lora_diag.decisions.plan.record import Plan

    result = Plan.model_validate_json(run("plan", BASE, "--cost", "--json").out)
    assert result.rates is not None
    assert min(result.rates.entry, result.rates.product, *result.rates.eigen.values()) > 0
    total = sum(
        row.matrices * estimate_core_seconds(result.rates, row.shape, None) for row in result.types
    )
    assert [each.core_seconds for each in result.costs] == [pytest.approx(total)]
    assert result.costs[0].bytes == 2 * result.base_bytes
