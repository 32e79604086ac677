"""Figures rendered and measured: no text touches another or leaves the page, whatever the model and its names."""

import itertools
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lora_diag import plots
from tests.plots import making

pytestmark = pytest.mark.slow

HOSTILE = (
    "a$b$c.0.$\\frac{1}{0}$.weight",
    "x\x1b[2J\n.1.q_proj.weight",
    "日本.2.<script>alert(1)</script>.weight",
    f"{'t' * 300}.0.{'u' * 300}",
    "_private.3._x.weight",
    "a.0.\\alpha_{}^{^}.weight",
    "..weight",
    "",
)
VOCABULARY = [making.spectrum(name, making.decay(3)) for name in ("lm_head.weight", "model.embed_tokens.weight")]
EXPERTS = tuple(f"block_sparse_moe.experts.{expert}.w{part}" for expert in range(4) for part in (1, 2, 3))


FIGURES = [kind.name for kind in plots.FIGURES]
NINE = tuple(f"runs/{name}_{'x' * 40}" for name in "abcdefghi")
MANY = tuple(f"model.layers.{i}.{'x' * 40 * (i % 2)}.up_proj.weight" for i in range(60))
SETS, RANKS = ("a", "b", "c", "d", "e"), tuple(range(1, 17))
FORTY = tuple(f"module_{number}.with_a_long_name" for number in range(40))
PROGRAMS = tuple((name, version) for name in ("peft", "vllm", "sglang", "diffusers") for version in ("0.31", "0.42.1"))


def layers():
    """Yield (name of the case, name of the figure, records of layers, options)."""
    for blocks in (28, 126):
        spectra = making.model(blocks, edge=0.05, signal=20) + VOCABULARY
        yield f"{blocks} blocks", "energy", spectra[::3] if blocks > 100 else spectra, {}
        yield f"{blocks} blocks", "heatmap", spectra, {}
        adapters = making.residuals(blocks) + making.residuals(blocks, adapter="runs/another_adapter_r64")
        yield f"{blocks} blocks", "residual", adapters, {}
    yield "28 blocks", "overlap", making.overlaps(28), {}
    for name, records in (
        ("allocation", making.allocations(126)),
        ("angles", making.interferences(126)),
        ("recovery", making.recoveries(126)),
        ("union", making.unions(126)),
        ("portability", making.served(126)),
    ):
        yield "126 blocks", name, records, {}
    yield "36 pairs", "angles", making.interferences(2, updates=NINE), {}
    yield "8 programs", "portability", making.served(2, programs=PROGRAMS), {}
    crowd = [making.adapter(f"runs/over-ranked-{i}{'y' * 60}", 1, 0.2) for i in range(30)]
    yield "a crowd", "fleet", making.adapters(40) + crowd, {}
    yield "one adapter", "fleet", [making.adapter("x")], {}
    yield "all dead", "fleet", [making.adapter(f"runs/{i}", 0, 0, dead=10) for i in range(9)], {}
    yield "40 types", "energy", making.model(1, FORTY), {"per": "type"}
    yield "40 types", "residual", making.residuals(2, FORTY), {"per": "type"}
    yield "40 types", "recovery", making.recoveries(2, FORTY), {}
    yield "experts", "heatmap", making.model(4, EXPERTS), {"field": "fro"}
    for name in ("energy", "heatmap"):
        yield "hostile", name, [making.spectrum(layer, making.decay(i)) for i, layer in enumerate(HOSTILE)], {}
    yield "hostile", "residual", [making.residual(n, 1, 2, 0.3, 0.4) for n in HOSTILE], {}
    yield "hostile", "angles", making.interferences(1, ("q",), updates=HOSTILE[:3]), {}
    yield "hostile", "union", [making.union(n, 3, 5, 6) for n in HOSTILE], {}
    yield "hostile", "fleet", [making.adapter(n, 1 + 99 * (i == 1), 0.2) for i, n in enumerate(HOSTILE)], {}
    for name in ("energy", "spectrum", "heatmap"):
        yield "one value", name, [making.spectrum("w", [1.0])], {}
    yield "one step", "overlap", making.overlaps(2, steps=(7,)), {}


def probes():
    """Yield (name of the case, name of the figure, records of a probe)."""
    yield "one rank", "sweep", making.swept(ranks=(8,), seeds=1, rates=(1e-3,), sets=("shifted",))
    yield "many ranks", "sweep", making.swept(ranks=RANKS, sets=SETS)
    yield "far base", "sweep", [*making.swept(base=90.0), making.probe("sweep", "lora", None, rank=4, lr=1.0)]
    yield "hostile", "sweep", making.swept(sets=HOSTILE[:3])
    yield "one rank", "truncation", making.truncated(ranks=(8,), sets=("shifted",))
    yield "many ranks", "truncation", making.truncated(ranks=RANKS, sets=SETS)
    yield "nothing gained", "truncation", making.truncated(tuned=2.0)
    yield "hostile", "truncation", making.truncated(sets=HOSTILE[:3])
    yield "many layers", "alone", making.alone(MANY, ranks=(8,), kind="layer", sets=SETS[:3])
    yield "hostile", "alone", making.alone(HOSTILE[:7], sets=HOSTILE[:2])
    yield "many layers", "sensitivity", making.adapted(MANY, sets=SETS[:3])
    yield "hostile", "sensitivity", making.adapted(HOSTILE[:7], sets=HOSTILE[:2])
    yield "many layers", "curvature", making.curved(MANY, ranks=(), eigen=False)
    yield "hostile", "curvature", making.curved(HOSTILE[:7], sets=HOSTILE[:3], gap=1e-9)
    yield "one size", "intrinsic", making.reached((5,), (), HOSTILE[:3], full=1.9)
    yield "not measured", "fisher", making.fishers(measured=False)
    yield "hostile", "fisher", making.fishers(HOSTILE[:9])
    for name in ("outputs", "depth"):
        yield "many adapters", name, making.said(MANY, sets=SETS[:3], depths=127)
        yield "hostile", name, making.said(HOSTILE[:5], sets=HOSTILE[:2], base=0.1)


def cases():
    """Yield (name of the case, name of the figure, results, options)."""
    labels = {"labels": ["A", "$_x$ " * 20]}
    for name in FIGURES:
        one = making.example(name)
        yield "plain", name, one, {}
        if name != "tune":
            yield "two runs", name, [one, one], labels
    for case, name, records, options in layers():
        whole = [making.certificate()] if name == "allocation" else ()
        yield (
            case,
            name,
            making.results(records, whole, name="$ev^il\x00<b>" if case == "hostile" else "tuned"),
            options,
        )
    for case, name, records in probes():
        yield case, name, making.probed(records, rest="tuned"), {"per": "type"} if case == "hostile" else {}
    runs = [making.results(making.model(3), name=f"run_with_a_long_name_{i}") for i in range(5)]
    yield "five runs", "energy", runs, {"labels": ["A", "B " * 40, "C", "D", "$E_$"]}
    budgets = [making.results(making.allocations(3), [making.certificate(1000 * i, 0.2 * i, 0.2 * i)]) for i in (1, 2)]
    yield "two budgets", "allocation", budgets, {}
    yield "long names", "tune", making.searched(sets=("a" * 70, "$b^c_" * 9)), {}


CASES = list(cases())


def shown_texts(figure):
    """Return (text, the corners of its box) of all that a reader sees."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    result = list(figure.texts)
    for legend in figure.legends:
        result += legend.get_texts()
    for ax in figure.axes:
        result += [ax.title, ax._left_title, ax._right_title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
        for axis in (ax.xaxis, ax.yaxis):
            result += [tick.label1 for tick in axis._update_ticks()] + [tick.label2 for tick in axis._update_ticks()]
    shown = [text for text in result if text.get_visible() and text.get_text().strip()]
    return [(text, corners(text, renderer)) for text in shown]


def corners(text, renderer):
    """Return the box of a text, turned as the text is, a tenth of its height taken off at both long sides.

    Boxes have room for descenders that a line may not have.
    """
    angle = text.get_rotation()
    box = text.get_window_extent(renderer)
    if angle % 90 == 0:
        thin = 0.1 * min(box.width, box.height)
        (x, y) = (thin, 1) if angle % 180 else (1, thin)
        return np.array(
            [[box.x0 + x, box.y0 + y], [box.x1 - x, box.y0 + y], [box.x1 - x, box.y1 - y], [box.x0 + x, box.y1 - y]]
        )
    assert (text.get_ha(), text.get_va(), text.get_rotation_mode()) == ("right", "top", "anchor")
    text.set_rotation(0)
    flat = text.get_window_extent(renderer)
    text.set_rotation(angle)
    turn = np.array(
        [
            [np.cos(np.radians(angle)), -np.sin(np.radians(angle))],
            [np.sin(np.radians(angle)), np.cos(np.radians(angle))],
        ]
    )
    thin = 0.1 * flat.height
    frame = np.array([[-flat.width, -thin], [0, -thin], [0, thin - flat.height], [-flat.width, thin - flat.height]])
    return text.get_transform().transform(text.get_position()) + frame @ turn.T


def touch(one, other):
    """Say whether two convex shapes overlap: unless some side of one separates them."""
    for shape in (one, other):
        for side in np.roll(shape, -1, axis=0) - shape:
            normal = np.array([-side[1], side[0]])
            a, b = one @ normal, other @ normal
            if a.max() <= b.min() or b.max() <= a.min():
                return False
    return True


# A column is the harder; on a slide, hostile names, and one case of each figure that has none.
SLIDES = {name: (case, name, *more) for case, name, *more in CASES}
SLIDES |= {name: (case, name, *more) for case, name, *more in CASES if case == "hostile"}
WIDTHS = [(case, "column") for case in CASES] + [(case, "slide") for case in SLIDES.values()]


def title(case):
    """Return a case's name in the list of tests."""
    return case if isinstance(case, str) else f"{case[1]}-{case[0]}"


@pytest.mark.parametrize(("case", "width"), WIDTHS, ids=title)
def test_figure_texts_are_legible(case, width):
    _, name, results, options = case
    figure = plots.figure(name, results, width=width, **options)
    texts = shown_texts(figure)
    assert len(texts) > 3
    assert figure.get_figwidth() == {"column": 3.3, "slide": 10}[width]
    # A journal prints no smaller; on a slide 10 inches wide the last row reads 11 points.
    assert min(text.get_fontsize() for text, _ in texts) >= {"column": 5.5, "slide": 9.9}[width]
    for text, box in texts:
        inside = box.min() > -2 and (box.max(axis=0) < np.array(figure.bbox.size) + 2).all()
        assert inside, f"{text.get_text()!r} leaves the page"
    for (one, box), (other, its) in itertools.combinations(texts, 2):
        assert not touch(box, its), f"{one.get_text()!r} touches {other.get_text()!r}"


def test_legibility_check_detects_touching_texts():
    figure = plots.figure("energy", making.results(making.model(2)), width="column")
    ax = figure.axes[0]
    ax.text(0.02, 0.99, "over the title", transform=ax.transAxes)
    boxes = [box for _, box in shown_texts(figure)]
    assert any(touch(one, other) for one, other in itertools.combinations(boxes, 2))


ESCAPED = [case for case in CASES if case[0] == "hostile" or case[:2] == ("plain", "overlap")]


@pytest.mark.parametrize("case", ESCAPED, ids=title)
def test_svg_is_well_formed_with_text(case):
    _, name, results, options = case
    content = plots.encoded(plots.figure(name, results, **options), "svg")
    root = ElementTree.fromstring(content)
    assert "".join(root.itertext()).strip()
    assert "alert(1)" not in "".join(element.tag for element in root.iter())
