"""The summary of truncation names parts that cost loss, and no others."""

import pytest

from lora_diag.probes.truncation.show import truncation_lines
from tests import building
from tests.plots import making


@pytest.mark.parametrize(("gap", "is_named"), [(-0.01, False), (0.01, False), (0.5, True)])
def test_only_parts_whose_truncation_costs_loss_are_named(gap, is_named):
    records = making.alone(parts=("mlp.up_proj",), ranks=(0,), sets=("held_out",), error=0.02)
    records = [r.model_copy(update={"nll": (1.0,) * 9, "predictions": (9,) * 9}) for r in records]
    records[-1] = records[-1].model_copy(update={"gap": gap, "gap_error": 0.02})
    text = str(
        truncation_lines(
            building.results(
                (),
                command="probe truncation",
                whole=records,
                untruncated="tuned",
                length=9,
                dtype="float32",
                device="cpu",
                tokens={},
            )
        )
    )
    assert ("mlp.up_proj" in text) == is_named
