"""The figure of ``portability``: a cell for each weight and program, its colour by status and ε."""

import numpy as np
from matplotlib.colors import to_rgb

from lora_diag import plots
from lora_diag.diagnostics.portability.figures import COLORS, EPSILON
from tests.plots import making

TYPES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")


def test_portability_cell_has_colour_of_its_status_and_epsilon():
    """By hand: PEFT exact, vLLM wrong by 0.5 and 1 in q, dropping k, full in up;
    llama.cpp refuses.
    """
    panels = plots.figure("portability", making.results(making.served(2, TYPES))).axes[:3]
    peft, vllm, llamacpp = (np.asarray(ax.images[0].get_array()) for ax in panels)
    exact, dropped, refused = (to_rgb(COLORS[name]) for name in ("exact", "dropped", "refused"))
    assert np.allclose(peft, exact)
    assert np.allclose(llamacpp, refused)
    rows = [label.get_text() for label in panels[0].get_yticklabels()]
    row = {kind: rows.index(kind) for kind in TYPES}
    assert np.allclose(vllm[row["self_attn.k_proj"]], dropped)
    assert np.allclose(vllm[row["mlp.up_proj"]], exact)
    for block, share in ((0, 0.5), (1, 1.0)):  # ε = 0.5 and 1 on a scale from 0 to the largest, 1
        assert np.allclose(vllm[row["self_attn.q_proj"], block], EPSILON(share)[:3])
    assert [ax.get_title(loc="left") for ax in panels] == ["PEFT", "vLLM", "llama.cpp"]


def test_portability_cell_of_experts_is_the_worst():
    records = making.served(
        1,
        ("mlp.experts.0.up_proj", "mlp.experts.1.up_proj"),
        programs=(("vllm", "1"), ("vllm", "2")),
    )
    panels = plots.figure("portability", making.results(records)).axes[:2]
    (one, two) = (np.asarray(ax.images[0].get_array()).reshape(-1, 3) for ax in panels)
    assert np.allclose(one, to_rgb(COLORS["exact"]))
    assert len(two) == 1
    assert np.allclose(two, to_rgb(COLORS["dropped"]))
