"""The figure of ``portability``: a cell for each weight and program, its colour by status and ε."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from lora_diag import plots
from lora_diag.diagnostics.portability.figures import COLORS, EPSILON
from tests.messages import assert_names
from tests.plots import making

TYPES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")


def test_portability_cell_has_colour_of_its_status_and_epsilon():
    """By hand: PEFT exact, vLLM wrong by 0.5 and 1 in q, dropping k, full in up; llama.cpp refuses."""
    ax = plots.figure("portability", making.results(making.served(2, TYPES))).axes[0]
    peft, vllm, llamacpp = (np.asarray(image.get_array()) for image in ax.images)
    exact, dropped, refused = (to_rgb(COLORS[name]) for name in ("exact", "dropped", "refused"))
    assert np.allclose(peft, exact)
    assert np.allclose(llamacpp, refused)
    rows = [label.get_text() for label in ax.get_yticklabels()]
    row = {kind: rows.index(kind) for kind in TYPES}
    assert np.allclose(vllm[row["self_attn.k_proj"]], dropped)
    assert np.allclose(vllm[row["mlp.up_proj"]], exact)
    for block, share in ((0, 0.5), (1, 1.0)):  # ε = 0.5 and 1 on a scale from 0 to the largest, 1
        assert np.allclose(vllm[row["self_attn.q_proj"], block], EPSILON(share)[:3])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["PEFT", "vLLM", "llama.cpp"]


def test_portability_cell_of_experts_is_the_worst():
    records = making.served(
        1, ("mlp.experts.0.up_proj", "mlp.experts.1.up_proj"), programs=(("vllm", "1"), ("vllm", "2"))
    )
    ax = plots.figure("portability", making.results(records)).axes[0]
    (one, two) = (np.asarray(image.get_array()).reshape(-1, 3) for image in ax.images)
    assert np.allclose(one, to_rgb(COLORS["exact"]))
    assert len(two) == 1
    assert np.allclose(two, to_rgb(COLORS["dropped"]))
    words = " ".join(text.get_text() for text in plots.figure("portability", making.results(records)).texts)
    assert_names(words, "cell", "worst")


@pytest.mark.parametrize("number", [1, 2])
def test_portability_compares_runs_side_by_side(number):
    runs = [making.results(making.served(1, TYPES), name=name) for name in ("a", "b")[:number]]
    ax = plots.figure("portability", runs, labels=["first", "second"][:number]).axes[0]
    assert len(ax.images) == 3 * number
    assert ax.get_xticklabels()[0].get_text() == ("first: PEFT" if number > 1 else "PEFT")


def test_heat_map_of_portability_has_a_panel_for_each_program():
    page = plots.figure("heatmap", making.results(making.served(2, TYPES)), field="epsilon")
    titles = [ax.get_title(loc="left") for ax in page.axes if ax.get_title(loc="left")]
    assert titles == ["peft 0.21.2", "vllm 0.33.0", "llamacpp 0b03adaa632b"]
