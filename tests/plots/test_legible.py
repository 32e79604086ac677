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


def models():
    """Yield (name of the case, name of the figure, results, options)."""
    for blocks in (1, 28, 126):
        spectra = making.model(blocks, edge=0.05, signal=20) + VOCABULARY
        # The panels of a spectrum are those of an energy curve: once is enough.
        for name in ("energy", "spectrum", "heatmap") if blocks == 1 else ("energy", "heatmap"):
            some = spectra[::3] if blocks > 100 and name == "energy" else spectra
            yield f"{blocks} blocks", name, making.results(some), {}
        adapters = making.residuals(blocks) + making.residuals(blocks, adapter="runs/another_adapter_r64")
        yield f"{blocks} blocks", "residual", making.results(adapters), {}
        if blocks < 100:
            yield f"{blocks} blocks", "overlap", making.results(making.overlaps(blocks)), {}
        if blocks == 28:  # between the two others nothing new happens in these
            continue
        allocated = making.results(making.allocations(blocks), [making.certificate()])
        yield f"{blocks} blocks", "allocation", allocated, {}
        yield f"{blocks} blocks", "angles", making.results(making.interferences(blocks)), {}
        yield f"{blocks} blocks", "recovery", making.results(making.recoveries(blocks)), {}
        yield f"{blocks} blocks", "union", making.results(making.unions(blocks)), {}
        yield f"{blocks} blocks", "portability", making.results(making.served(blocks)), {}
    nine = tuple(f"runs/{name}_{'x' * 40}" for name in "abcdefghi")
    yield "36 pairs", "angles", making.results(making.interferences(2, updates=nine)), {}
    yield "3 adapters", "fleet", making.results(making.adapters(0)), {}
    crowd = making.adapters(40) + [making.adapter(f"runs/over-ranked-{i}{'y' * 60}", 1, 0.2) for i in range(30)]
    many = tuple((name, version) for name in ("peft", "vllm", "sglang", "diffusers") for version in ("0.31", "0.42.1"))
    yield "8 programs", "portability", making.results(making.served(2, programs=many)), {}
    yield "a crowd", "fleet", making.results(crowd), {}
    yield "one adapter", "fleet", making.results([making.adapter("x")]), {}
    yield "all dead", "fleet", making.results([making.adapter(f"runs/{i}", 0, 0, dead=10) for i in range(9)]), {}
    types = tuple(f"module_{number}.with_a_long_name" for number in range(40))
    yield "40 types", "energy", making.results(making.model(1, types)), {"per": "type"}
    yield "40 types", "residual", making.results(making.residuals(2, types)), {"per": "type"}
    yield "40 types", "recovery", making.results(making.recoveries(2, types)), {}
    yield "experts", "heatmap", making.results(making.model(4, EXPERTS)), {"field": "fro"}
    evil = [making.spectrum(layer, making.decay(i)) for i, layer in enumerate(HOSTILE)]
    for name in ("energy", "heatmap"):
        yield "hostile", name, making.results(evil, name="$ev^il\x00<b>"), {}
    yield "hostile", "residual", making.results([making.residual(n, 1, 2, 0.3, 0.4) for n in HOSTILE]), {}
    yield "hostile", "angles", making.results(making.interferences(1, ("q",), updates=HOSTILE[:3])), {}
    yield "hostile", "union", making.results([making.union(n, 3, 5, 6) for n in HOSTILE]), {}
    yield (
        "hostile",
        "fleet",
        making.results([making.adapter(n, 1 + 99 * (i == 1), 0.2) for i, n in enumerate(HOSTILE)]),
        {},
    )
    one = making.results([making.spectrum("w", [1.0])])
    for name in ("energy", "spectrum", "heatmap"):
        yield "one value", name, one, {}
    yield "one step", "overlap", making.results(making.overlaps(2, steps=(7,))), {}
    runs = [making.results(making.model(3), name=f"run_with_a_long_name_{i}") for i in range(5)]
    fleets = [making.results(making.adapters(9), name=name) for name in "ab"]
    yield "two fleets", "fleet", fleets, {}
    sums = [making.results(making.unions(3), name=name) for name in "ab"]
    yield "two sums", "union", sums, {}
    yield "five runs", "energy", runs, {"labels": ["A", "B " * 40, "C", "D", "$E_$"]}
    budgets = [making.results(making.allocations(3), [making.certificate(1000 * i, 0.2 * i, 0.2 * i)]) for i in (1, 2)]
    yield "two budgets", "allocation", budgets, {}
    yield from probes()


def probes():
    """Yield the same of probe records."""
    many = tuple(range(1, 17))
    for case, records in (
        ("two sets", making.swept()),
        ("one rank", making.swept(ranks=(8,), seeds=1, rates=(1e-3,), sets=("shifted",))),
        ("many ranks", making.swept(ranks=many, sets=("a", "b", "c", "d", "e"))),
        ("far base", [*making.swept(base=90.0), making.probe("sweep", "lora", None, rank=4, lr=1.0)]),
        ("hostile", making.swept(sets=HOSTILE[:3])),
    ):
        yield case, "sweep", making.probed(records), {}
    yield "a search", "tune", making.searched(), {}
    yield "long names", "tune", making.searched(sets=("a" * 70, "$b^c_" * 9)), {}
    yield "two runs", "sweep", [making.probed(making.swept(), name=n, steps=i) for i, n in enumerate("ab")], {}
    for case, records in (
        ("two sets", making.truncated()),
        ("one rank", making.truncated(ranks=(8,), sets=("shifted",))),
        ("many ranks", making.truncated(ranks=many, sets=("a", "b", "c", "d", "e"))),
        ("nothing gained", making.truncated(tuned=2.0)),
        ("hostile", making.truncated(sets=HOSTILE[:3])),
    ):
        yield case, "truncation", making.probed(records, rest="tuned"), {}
    many = tuple(f"model.layers.{i}.{'x' * 40 * (i % 2)}.up_proj.weight" for i in range(60))
    for case, records in (
        ("two types", making.alone()),
        ("many layers", making.alone(many, ranks=(8,), kind="layer", sets=("a", "b", "c"))),
        ("hostile", making.alone(HOSTILE[:7], sets=HOSTILE[:2])),
    ):
        yield case, "alone", making.probed(records), {}
    yield "two types", "sensitivity", making.probed(making.adapted()), {}
    yield "many layers", "sensitivity", making.probed(making.adapted(many, sets=("a", "b", "c"))), {}
    yield "hostile", "sensitivity", making.probed(making.adapted(HOSTILE[:7], sets=HOSTILE[:2])), {}
    yield "per layer", "curvature", making.probed(making.curved()), {}
    yield "many layers", "curvature", making.probed(making.curved(many, ranks=(), eigen=False)), {}
    yield "hostile", "curvature", making.probed(making.curved(HOSTILE[:7], sets=HOSTILE[:3], gap=1e-9)), {}
    yield "two runs", "curvature", [making.probed(making.curved(), name=n, top=i) for i, n in enumerate("ab")], {}
    yield "two sets", "intrinsic", making.probed(making.reached()), {}
    yield "one size", "intrinsic", making.probed(making.reached((5,), (), HOSTILE[:3], full=1.9)), {}
    yield "two runs", "intrinsic", [making.probed(making.reached(), name=n, steps=i) for i, n in enumerate("ab")], {}
    yield "measured", "fisher", making.probed(making.fishers()), {}
    yield "not measured", "fisher", making.probed(making.fishers(measured=False)), {}
    yield "hostile", "fisher", making.probed(making.fishers(HOSTILE[:9])), {"per": "type"}
    for case, records in (
        ("two adapters", making.said()),
        ("many adapters", making.said(many, sets=("a", "b", "c"), depths=127)),
        ("hostile", making.said(HOSTILE[:5], sets=HOSTILE[:2], base=0.1)),
    ):
        yield case, "outputs", making.probed(records), {}
        yield case, "depth", making.probed(records), {}
    for name, records in (("alone", making.alone()), ("outputs", making.said()), ("depth", making.said())):
        yield "two runs", name, [making.probed(records, name=n) for n in "ab"], {"labels": ["A", "$_x$ " * 20]}
    runs = [making.probed(making.truncated(), name=n, rest=n) for n in ("tuned", "base")]
    yield "two runs", "truncation", runs, {"labels": ["whole", "$\\frac$" * 20]}


CASES = list(models())


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


ESCAPED = [case for case in CASES if case[0] == "hostile" or case[:2] == ("1 blocks", "overlap")]


@pytest.mark.parametrize("case", ESCAPED, ids=title)
def test_svg_is_well_formed_with_text(case):
    _, name, results, options = case
    content = plots.encoded(plots.figure(name, results, **options), "svg")
    root = ElementTree.fromstring(content)
    assert "".join(root.itertext()).strip()
    assert "alert(1)" not in "".join(element.tag for element in root.iter())


def test_contract_covers_every_figure():
    assert {name for _, name, *_ in CASES} == {kind.name for kind in plots.FIGURES}
