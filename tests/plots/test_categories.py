"""Every figure puts the label of a category at the values of its records, for any comparison."""

import itertools
import re
from collections import defaultdict

import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.patches import StepPatch

from lora_diag import plots
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
                for row, value in enumerate(np.ravel(values)):
                    if np.isfinite(value):
                        seen[beside[corners[row : row + 2, 0, 1].mean()]].append(value)
            elif isinstance(artist, StepPatch) and below:
                data = artist.get_data()
                assert ax.get_xlim() == panels[-1].get_xlim() or categories(ax.xaxis)
                seen[below[round(data.edges.mean())]] += [v for v in data.values if np.isfinite(v)]
        if seen:
            result.append((ax.get_title(loc="left"), seen))
    return result


def unique(records, field):
    """Return records whose field has a value that no other has, and {module type: its values} of them."""
    marked, expected = [], defaultdict(list)
    for record in records:
        value = next(NUMBERS)
        marked.append(record.model_copy(update={field: value}))
        expected[type_of(record.layer)].append(value)
    return marked, expected


NUMBERS = itertools.count(1)


def spectra(layers, name):
    records = [making.spectrum(layer, making.decay(next(NUMBERS))) for layer in layers]
    return making.results(records, name=name), records


def by_type(records, value):
    result = defaultdict(list)
    for record in records:
        result[type_of(record.layer)].append(value(record))
    return result


def heatmap(inputs):
    made = [spectra(layers, name) for layers, name in zip(inputs, NAMES, strict=False)]
    return [run for run, _ in made], [by_type(records, lambda r: r.energy["8"]) for _, records in made]


def parts_of_epsilon(record):
    """Return where rank, direction and scale end in ε²; X's overshoot along D beyond no update is of scale."""
    along = record.norm_ratio * record.cosine
    worse = min(record.epsilon**2, max(1.0, (along - 1) ** 2 if along > 1 else 0.0))
    return [record.epsilon_min**2, record.epsilon**2 - (worse - (1 - record.cosine**2)), record.epsilon**2]


def residual(inputs):
    runs, expected = [], []
    for layers, name in zip(inputs, NAMES, strict=False):
        records = [making.residual(n, 1.0, 0.01 * next(NUMBERS), 0.5, 0.1, adapter=f"runs/{name}") for n in layers]
        runs.append(making.results(records, name=name))
        # Three parts a bar: rank, direction, and what another α gains over the better of X and no update.
        bands = by_type(records, parts_of_epsilon)
        expected.append({name: np.ravel(values) for name, values in bands.items()})
    return runs, expected


def allocation(inputs):
    runs, together = [], defaultdict(list)
    for layers, name in zip(inputs, NAMES, strict=False):
        records = [
            r.model_copy(update={"layer": n})
            for r, n in zip(making.allocations(len(layers), ("q",)), layers, strict=True)
        ]
        marked, expected = unique(records, "rank")
        runs.append(making.results(marked, [making.certificate()], name=name))
        for kind, values in expected.items():
            together[kind] += [*values, *([8] * len(values) if len(inputs) == 1 else [])]
    return runs, [together]


def union(inputs):
    runs, expected = [], []
    for layers, name in zip(inputs, NAMES, strict=False):
        records = [making.union(n, next(NUMBERS), next(NUMBERS), next(NUMBERS)) for n in layers]
        runs.append(making.results(records, name=name))
        ranks = by_type(records, lambda r: [r.spectrum.rank_at["0.9"], r.parts_rank_at["0.9"], r.rank_for_all["0.9"]])
        expected.append({kind: np.ravel(values) for kind, values in ranks.items()})
        expected.append(by_type(records, lambda r: r.additive["0.9"]))
    return runs, expected


def titled(value_of, drawn):
    """Return a maker of figures that have a panel a module type, and what the line of each layer begins with."""

    def make(inputs):
        made = [spectra(layers, name) for layers, name in zip(inputs, NAMES, strict=False)]
        expected = defaultdict(list)
        for _, records in made:
            for kind, values in by_type(records, value_of).items():
                expected[kind] += values if len(made) == 1 else [np.median(values)]
        return [run for run, _ in made], [expected]

    make.drawn = drawn
    return make


def first_points(figure):
    """Return {title: the first value of every line with a name} of panels that are called by module types."""
    return {
        ax.get_title(loc="left"): [
            line.get_ydata()[0]
            for line in ax.lines
            if not line.get_label().startswith("_") and np.size(line.get_xdata()) > 2
        ]
        for ax in figure.axes
        if ax.get_title(loc="left")
    }


def overlap(inputs):
    runs, expected = [], defaultdict(list)
    for layers, name in zip(inputs, NAMES, strict=False):
        records = [making.overlap(n, step, 8, 1e-4 * next(NUMBERS), 0.5) for n in layers for step in (0, 9)]
        runs.append(making.results(records, name=name))
        for kind, values in by_type([r for r in records if r.step == 0], lambda r: r.kappa).items():
            expected[kind].append(np.median(values))
    return runs, [expected]


overlap.drawn = lambda figure: {
    ax.get_title(loc="left"): [line.get_ydata()[0] for line in ax.lines if line.get_label() == "_κ"]
    for ax in figure.axes
    if ax.get_title(loc="left")
}

MAKERS = {
    "energy": titled(lambda r: r.s[0] ** 2 / r.fro**2, first_points),
    "spectrum": titled(lambda r: r.s[0], first_points),
    "heatmap": heatmap,
    "residual": residual,
    "overlap": overlap,
    "allocation": allocation,
    "union": union,
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("mix", MIXES)
def test_figure_names_are_at_their_values(name, mix):
    make = MAKERS[name]
    runs, expected = make(layers_of(MIXES[mix]))
    labels = NAMES[: len(runs)] if len(runs) > 1 else ()
    figure = plots.figure(name, runs, labels=labels, width="column" if mix == "two architectures" else "slide")
    result = [("", make.drawn(figure))] if hasattr(make, "drawn") else readings(figure)
    assert len(result) == len(expected)
    for number, ((title, panel), values) in enumerate(zip(result, expected, strict=True)):
        drawn = {full(kind, values): sorted(numbers) for kind, numbers in panel.items()}
        assert set(drawn) == set(values)
        for kind in values:
            np.testing.assert_allclose(drawn[kind], sorted(values[kind]), rtol=1e-9, err_msg=f"{kind} in {title}")
        if len(expected) == len(runs) > 1:
            assert title.startswith(labels[number])


def full(shown, names):
    """Return the full name of a shortened one."""
    result = [shown] if shown in names else [name for name in names if name.endswith(shown.lstrip("…"))]
    assert len(result) == 1, f"{shown!r} may be any of {result}"
    return result[0]
