"""Labels of categories are at the values of their records; ``residual`` and ``union`` have slots as ``allocation``."""

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
# The layers of each input: several have some types only, in another order or of another architecture.
MIXES = {
    "one block": [("model.layers", LLAMA, 1)],
    "four": [("model.layers", LLAMA[i : i + 2], 2 + i) for i in (3, 0, 5, 1)],
    "two architectures": [("model.layers", LLAMA, 4), ("bert.encoder.layer", ENCODER, 8)],
    "nothing in common": [("model.layers", LLAMA[4:], 2), ("model.layers", LLAMA[:3], 3)],
}
NAMES = ("full", "part", "third", "fourth")


def type_of(layer):
    return re.sub(r"^.*?\.\d+\.", "", layer.removesuffix(".weight"))


def layers_of(mix):
    """Return the names of the layers of each input."""
    return [[f"{tower}.{b}.{name}.weight" for b in range(blocks) for name in types] for tower, types, blocks in mix]


def categories(axis):
    """Return the names of an axis by their places; nothing if its labels are numbers."""
    ticks = {tick.get_loc(): tick.label1 for tick in axis.get_major_ticks()}
    shown = {place: label.get_text() for place, label in ticks.items() if label.get_visible() and label.get_text()}
    return {} if all(re.fullmatch(r"[\d.,k–−\n⁻⁰¹²³]+", text) for text in shown.values()) else shown


def readings(figure):
    """Return what a reader sees of categories: for each panel with such values {name: its values}."""
    figure.draw_without_rendering()
    panels = [ax for ax in figure.axes if not hasattr(ax, "_colorbar")]
    result = []
    for number, ax in enumerate(panels):
        # Names below stand under the last of panels that lie above each other with one scale.
        below = next((names for other in panels[number:] if (names := categories(other.xaxis))), {})
        beside = categories(ax.yaxis)
        seen = defaultdict(list)
        for artist in [*ax.collections, *ax.patches]:
            if isinstance(artist, QuadMesh):
                corners, values = artist.get_coordinates(), np.ma.filled(artist.get_array(), np.nan)
                for (row, _), value in np.ndenumerate(values):
                    if np.isfinite(value):
                        seen[beside[corners[row : row + 2, 0, 1].mean()]].append(value)
            elif isinstance(artist, StepPatch) and below:
                data = artist.get_data()
                assert ax.get_xlim() == panels[-1].get_xlim() or categories(ax.xaxis)
                seen[below[round(data.edges.mean())]] += [v for v in data.values if np.isfinite(v)]
        if seen:
            result.append((ax.get_title(loc="left"), seen))
    return result


NUMBERS = itertools.count(1)


def by_type(records, *values):
    """Return {module type: values of its records}."""
    result = defaultdict(list)
    for record in records:
        result[type_of(record.layer)] += [value(record) for value in values]
    return result


def spectra(*values):
    """Return a maker of spectra that no other layer has, and what is drawn of each."""

    def make(layers, name):
        records = [making.spectrum(layer, making.decay(next(NUMBERS))) for layer in layers]
        return making.results(records, name=name), [by_type(records, *values)]

    return make


def allocation(layers, name):
    records = [build(Allocation, layer=layer, rank=next(NUMBERS), uniform_rank=next(NUMBERS)) for layer in layers]
    ranks = by_type(records, lambda r: r.rank, lambda r: r.uniform_rank)
    return making.results(records, [making.certificate()], name=name), [ranks]


MAKERS = {
    "heatmap": spectra(lambda r: r.energy["8"]),
    "allocation": allocation,
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("mix", MIXES)
def test_names_of_categories_are_at_their_values(name, mix):
    made = [MAKERS[name](layers, label) for layers, label in zip(layers_of(MIXES[mix]), NAMES, strict=False)]
    labels = NAMES[: len(made)] if len(made) > 1 else ()
    width = "column" if mix == "two architectures" else "slide"
    result = readings(plots.figure(name, [run for run, _ in made], labels=labels, width=width))
    expected = [panel for _, panels in made for panel in panels]
    if name == "allocation" and len(made) > 1:  # in one panel, without the uniform rule
        expected = [merge(expected)]
    assert len(result) == len(expected)
    for number, ((title, panel), values) in enumerate(zip(result, expected, strict=True)):
        drawn = {full(kind, values): sorted(numbers) for kind, numbers in panel.items()}
        assert drawn.keys() == values.keys()
        for kind in values:
            np.testing.assert_allclose(drawn[kind], sorted(values[kind]), rtol=1e-9, err_msg=f"{kind} in {title}")
        if len(expected) == len(made) > 1:
            assert title.startswith(labels[number])


def full(shown, names):
    """Return the full name of a shortened one."""
    result = [shown] if shown in names else [name for name in names if name.endswith(shown.lstrip("…"))]
    assert len(result) == 1, f"{shown!r} may be any of {result}"
    return result[0]


def merge(panels):
    """Return the first of two values of each record, of all panels."""
    result = defaultdict(list)
    for panel in panels:
        for kind, values in panel.items():
            result[kind] += values[::2]
    return result
