"""What is shown: it fits, it is what the records say, and a hostile name stays text."""

import pytest
import torch

import lora_diag
from lora_diag.diagnostics.spectrum.show import spectrum_table
from lora_diag.inspection.run import inspect, inventory_table
from lora_diag.records import LeftOut
from lora_diag.rendering.statements import final_statements
from tests import building
from tests.conftest import save_model
from tests.messages import assert_names

pytestmark = pytest.mark.slow


def test_unfinished_run_and_unmeasured_layers_are_stated(pair_of_models, tmp_path):
    base, _, _, after = pair_of_models
    after["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    path = tmp_path / "r.jsonl"
    lora_diag.spectrum(base, save_model(tmp_path / "nan", after), output=path)
    assert_names(spectrum_table(lora_diag.read_results(path)), "TUNED", "nan at [3, 4]")
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:-1]))
    assert "did not finish" in spectrum_table(lora_diag.read_results(path))


HOSTILE = "model.layers.0.\x1b[2J\n<script>[red]x[/red].weight"


def test_hostile_names_stay_text(tmp_path):
    one, two = {HOSTILE: torch.zeros(3, 3)}, {HOSTILE: torch.ones(3, 3)}
    base, tuned = save_model(tmp_path / "a", one), save_model(tmp_path / "b", two)
    for per in ("type", "layer"):
        text = spectrum_table(lora_diag.spectrum(base, tuned), 140, per=per)
        assert "\x1b" not in text
        assert r"\x1b[2J\n<script>[red]x[/red]" in text
    text = inventory_table(inspect(base), 140)
    assert "\x1b" not in text
    assert "[red]x[/red]" in text


def test_reason_of_unmeasured_layer_is_safe():
    item = LeftOut(layer=HOSTILE, shape=(), reason="unreadable", detail=HOSTILE)
    (statement,) = final_statements(building.results((), left_out=(item,)))
    assert "\x1b" not in statement.text
