"""Labels of categories are at the values of their records; ``residual`` and ``union`` have slots as
``allocation``.
"""

import itertools
import re
from collections import defaultdict

import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.patches import StepPatch

from lora_diag import plots
from lora_diag.decisions.allocate.record import Allocation
from tests.building import build
from tests.plots import making

pytestmark = pytest.mark.slow

LLAMA = making.TYPES
ENCODER = ("attention.self.query", "attention.self.value", "attention.output.dense", "output.dense")
# The layers of each input: several have some types only, in another order or of another
# architecture.
MIXES = {
    "four": [("model.layers", LLAMA[i : i + 2], 2 + i) for i in (3, 0, 5, 1)],
    "two architectures": [("model.layers", LLAMA, 4), ("bert.encoder.layer", ENCODER, 8)],
    "nothing in common": [("model.layers", LLAMA[4:], 2), ("model.layers", LLAMA[:3], 3)],
}
NUMBERS = itertools.count(1)
VALUES = {"heatmap": lambda record: record.energy["8"], "allocation": lambda record: record.rank}


def records_of(name, tower, types, blocks):
    """Return the records of an input; no two have one value."""
    layers = [f"{tower}.{block}.{kind}.weight" for block in range(blocks) for kind in types]
    if name == "heatmap":
        return [making.spectrum(layer, making.decay(next(NUMBERS))) for layer in layers]
    return [build(Allocation, layer=layer, rank=next(NUMBERS), uniform_rank=8) for layer in layers]


def categories(axis):
    """Return the names of an axis by their places."""
    ticks = {tick.get_loc(): tick.label1 for tick in axis.get_major_ticks()}
    return {place: label.get_text() for place, label in ticks.items() if label.get_visible()}


def readings(figure):
    """Return what a reader sees of categories: for each panel with such values {name:
    its values}.
    """
    figure.draw_without_rendering()
    for ax in figure.axes:
        seen = defaultdict(list)
        for mesh in ax.collections:
            if isinstance(mesh, QuadMesh) and not hasattr(ax, "_colorbar"):
                corners, beside = mesh.get_coordinates(), categories(ax.yaxis)
                for row, values in enumerate(np.ma.filled(mesh.get_array(), np.nan)):
                    seen[beside[corners[row : row + 2, 0, 1].mean()]] += list(
                        values[np.isfinite(values)]
                    )
        for data in (patch.get_data() for patch in ax.patches if isinstance(patch, StepPatch)):
            seen[categories(ax.xaxis)[round(data.edges.mean())]] += list(
                data.values[np.isfinite(data.values)]
            )
        if seen:
            yield seen


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_names_of_categories_are_at_their_values(name, mix):
    runs = [records_of(name, *each) for each in mix]
    made = [making.results(run, [making.certificate()] * (name == "allocation")) for run in runs]
    figure = plots.figure(
        name, made, labels=("full", "part", "third", "fourth")[: len(runs)], width="column"
    )
    panels = (
        runs if name == "heatmap" else [list(itertools.chain(*runs))]
    )  # ranks of all in one panel
    for seen, records in zip(readings(figure), panels, strict=True):
        expected = defaultdict(list)
        for record in records:
            expected[re.sub(r"^.*?\.\d+\.", "", record.layer.removesuffix(".weight"))].append(
                VALUES[name](record)
            )
        assert len(seen) == len(expected)
        for kind, values in expected.items():
            (shown,) = [
                each
                for each in seen
                if each == kind or (each[0] == "…" and kind.endswith(each[1:]))
            ]
            np.testing.assert_allclose(sorted(seen[shown]), sorted(values), rtol=1e-9)
