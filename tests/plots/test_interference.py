"""Figures of several updates: a panel a pair, the sum by itself, and no figure of a fleet."""

import pytest

import lora_diag
from lora_diag.errors import UsageError
from lora_diag.plots import figure
from tests.conftest import ROOT

UPDATES = [ROOT / "sample_checkpoints" / name for name in ("lora_r4", "lora_r16", "full_ft")]


@pytest.fixture(scope="module")
def results():
    return lora_diag.interference(UPDATES, base=ROOT / "sample_checkpoints" / "base", layers=r"[01]\..*(up|down)_proj")


def numbers(drawn):
    return [text.get_text() for text in drawn.texts if text.get_text()]


def test_cosine_has_panel_pair(results):
    drawn = figure("heatmap", results, field="cosine")
    panels = [axes for axes in drawn.axes if axes.get_title("left")]
    assert [axes.get_title("left") for axes in panels] == [
        "lora_r4 × lora_r16",
        "lora_r4 × full_ft",
        "lora_r16 × full_ft",
    ]
    for axes, name in zip(panels, ("lora_r4", "lora_r4", "lora_r16"), strict=True):
        other = axes.get_title("left").split(" × ")[1]
        mine = [
            f"{record.cosine:.2f}"
            for record in results
            if record.record == "interference"
            and (record.first[-len(name) :], record.second[-len(other) :]) == (name, other)
        ]
        assert sorted(numbers(axes)) == sorted(mine)


def test_additive_share_equals_definition(results):
    drawn = figure("heatmap", results, field="additive.0.9")
    mine = [f"{record.additive['0.9']:.2f}" for record in results if record.record == "union"]
    assert sorted(numbers(drawn.axes[0])) == sorted(mine)
    message = " ".join(text.get_text() for text in drawn.texts)
    assert "lora_r4 + lora_r16 + full_ft" in message


def test_fleet_has_no_depth_to_draw():
    with pytest.raises(UsageError, match="no records"):
        figure("heatmap", lora_diag.fleet(UPDATES[:2]))
