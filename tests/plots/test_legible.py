"""Figures rendered and measured: no text touches another or leaves the page, whatever the model and
its names.
"""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Bbox

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
FIGURES = [kind.name for kind in plots.FIGURES]
NINE = tuple(f"runs/{name}_{'x' * 40}" for name in "abcdefghi")
MANY = tuple(f"model.layers.{i}.{'x' * 40 * (i % 2)}.up_proj.weight" for i in range(60))
FORTY = tuple(f"module_{number}.with_a_long_name" for number in range(40))
SETS, RANKS = ("a", "b", "c", "d", "e"), tuple(range(1, 17))


def layers():
    """Yield (name of the case, name of the figure, records of layers)."""
    yield "126 blocks", "heatmap", making.model(126)
    yield (
        "126 blocks",
        "residual",
        making.residuals(126) + making.residuals(126, adapter="runs/another_r64"),
    )
    yield "126 blocks", "allocation", making.allocations(126)
    yield "126 blocks", "portability", making.served(126)
    yield "36 pairs", "angles", making.interferences(2, updates=NINE)
    yield "all dead", "fleet", [making.adapter(f"runs/{i}", 0, 0, dead=10) for i in range(9)]
    yield "40 types", "energy", making.model(1, FORTY)
    yield "40 types", "residual", making.residuals(2, FORTY)
    yield "one value", "spectrum", [making.spectrum("w", [1.0])]
    yield "one step", "overlap", making.overlaps(2, steps=(7,))
    for name in ("energy", "heatmap"):
        yield (
            "hostile",
            name,
            [making.spectrum(layer, making.decay(i)) for i, layer in enumerate(HOSTILE)],
        )
    yield "hostile", "residual", [making.residual(n, 1, 2, 0.3, 0.4) for n in HOSTILE]
    yield "hostile", "angles", making.interferences(1, ("q",), updates=HOSTILE[:3])
    yield (
        "hostile",
        "fleet",
        [making.adapter(n, 1 + 99 * (i == 1), 0.2) for i, n in enumerate(HOSTILE)],
    )


def probes():
    """Yield (name of the case, name of the figure, records of a probe)."""
    yield "many ranks", "sweep", making.swept(ranks=RANKS, sets=SETS)
    yield (
        "far base",
        "sweep",
        [*making.swept(base=90.0), making.probe("sweep", "lora", None, rank=4, lr=1.0)],
    )
    yield "hostile", "sweep", making.swept(sets=HOSTILE[:3])
    yield "hostile", "truncation", making.truncated(sets=HOSTILE[:3])
    yield "hostile", "alone", making.alone(HOSTILE[:7], sets=HOSTILE[:2])
    yield "many layers", "sensitivity", making.adapted(MANY, sets=SETS[:3])
    yield "hostile", "curvature", making.curved(HOSTILE[:7], sets=HOSTILE[:3], gap=1e-9)
    yield "hostile", "intrinsic", making.reached((5,), (), HOSTILE[:3], full=1.9)
    yield "hostile", "fisher", making.fishers(HOSTILE[:9])
    yield "hostile", "outputs", making.said(HOSTILE[:5], sets=HOSTILE[:2], base=0.1)
    yield "many adapters", "depth", making.said(MANY, sets=SETS[:3], depths=127)


def cases():
    """Yield (name of the case, name of the figure, results, options)."""
    for name in FIGURES:
        one = making.example(name)
        yield "plain", name, one, {}
        if name != "tune":
            yield "two runs", name, [one, one], {"labels": ["A", "$_x$ " * 20]}
    for case, name, records in layers():
        whole = [making.certificate()] if name == "allocation" else ()
        tuned = "$ev^il\x00<b>" if case == "hostile" else "tuned"
        yield case, name, making.results(records, whole, name=tuned), {}
    for case, name, records in probes():
        yield (
            case,
            name,
            making.probed(records, untruncated="tuned"),
            {"by": "type"} if case == "hostile" else {},
        )
    runs = [making.results(making.model(3), name=f"run_with_a_long_name_{i}") for i in range(5)]
    yield "five runs", "energy", runs, {"labels": ["A", "B " * 40, "C", "D", "$E_$"]}


CASES = list(cases())


def shown_texts(figure):
    """Return (text, its box) of all that a reader sees."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    result = list(figure.texts)
    for legend in figure.legends:
        result += [legend.get_title(), *legend.get_texts()]
    for ax in figure.axes:
        result += [
            ax.title,
            ax._left_title,
            ax._right_title,
            ax.xaxis.label,
            ax.yaxis.label,
            *ax.texts,
        ]
        for axis in (ax.xaxis, ax.yaxis):
            result += [
                label for tick in axis._update_ticks() for label in (tick.label1, tick.label2)
            ]
    shown = [text for text in result if text.get_visible() and text.get_text().strip()]
    # Names turned by 45 degrees have no box of their own.
    return [(text, thin_box(text, renderer)) for text in shown if text.get_rotation() % 90 == 0]


def thin_box(text, renderer):
    """Return the box of a text, a tenth of its height taken off at both long sides: room for absent
    descenders.
    """
    box = text.get_window_extent(renderer)
    thin = 0.1 * min(box.width, box.height)
    return Bbox([[box.x0 + thin, box.y0 + thin], [box.x1 - thin, box.y1 - thin]])


def touching(boxes):
    """Return the first two boxes that have a common area, by their numbers; None if
    there are none.
    """
    x0, y0, x1, y1 = np.array([box.extents for box in boxes]).T
    apart = (np.minimum.outer(x1, x1) <= np.maximum.outer(x0, x0)) | (
        np.minimum.outer(y1, y1) <= np.maximum.outer(y0, y0)
    )
    return next(zip(*np.nonzero(np.triu(~apart, 1)), strict=True), None)


# A column is the harder; on a slide, hostile names.
WIDTHS = [(case, "column") for case in CASES] + [
    (case, "slide") for case in CASES if case[0] == "hostile"
]


def title(case):
    """Return a case's name in the list of tests."""
    return case if isinstance(case, str) else f"{case[1]}-{case[0]}"


@pytest.mark.parametrize(("case", "width"), WIDTHS, ids=title)
def test_figure_texts_are_legible(case, width):
    """And the SVG of hostile names is well-formed."""
    _, name, results, options = case
    figure = plots.figure(name, results, width=width, **options)
    texts = shown_texts(figure)
    assert len(texts) > 3
    assert figure.get_figwidth() == {"column": 3.3, "slide": 10}[width]
    # A journal prints no smaller; on a slide 10 inches wide the last row reads 11 points.
    assert min(text.get_fontsize() for text, _ in texts) >= {"column": 5.5, "slide": 9.9}[width]
    for text, box in texts:
        inside = (
            min(box.x0, box.y0) > -2
            and box.x1 < figure.bbox.width + 2
            and box.y1 < figure.bbox.height + 2
        )
        assert inside, f"{text.get_text()!r} leaves the page"
    pair = touching([box for _, box in texts])
    assert pair is None, f"{' touches '.join(repr(texts[number][0].get_text()) for number in pair)}"
    if case[0] == "hostile" and width == "slide":
        root = ElementTree.fromstring(plots.encode_figure(figure, "svg"))
        assert "".join(root.itertext()).strip()
        assert "alert(1)" not in "".join(element.tag for element in root.iter())
