r"""Records → one HTML page that opens from disk, without a network, and is complete without
JavaScript.

Its static figures, as in ``loradiag plot``, are shown without scripts.

Jinja2 escapes all text; the records are embedded as JSON in which ``<``, ``>``, ``&`` and ``'`` are
escaped as ``\u003c`` and so on, so that no layer name can close the script element. plotly.js draws
the interactive charts; it is embedded compressed, in 2.0 MB instead of 4.8 MB. The page's content
security policy forbids all connections. Independent of how values were measured.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

from lora_diag.catalog import table
from lora_diag.diagnostics.overlap.record import Overlap
from lora_diag.diagnostics.overlap.show import tracks
from lora_diag.diagnostics.residual.record import EPSILON
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.errors import InputError, require
from lora_diag.metrics.energy import curve_at, thinned_ranks
from lora_diag.records.names import depth_of
from lora_diag.records.run import timestamp
from lora_diag.records.vocabulary import METRIC_NAMES, NORMS, metric_of
from lora_diag.rendering.text import plain, safe, safe_lines, select_evenly, short
from lora_diag.reports.evidence import Evidence, Source, format_minute
from lora_diag.reports.fields import Field, fields_of, layers_of
from lora_diag.reports.subject import (
    ReportSubject,
    RunSection,
    gate_outcome,
    labels,
    sections_of,
    subject_of,
)


def render_page(evidence: Evidence) -> str:
    """Return the page with all figures and the time."""
    return html_report(evidence, images_of(evidence), format_minute(timestamp()))


@dataclass(frozen=True, slots=True)
class Image:
    """A static figure, for readers without JavaScript.

    Args:
        name: Its name in the page: that of the figure, or ``intruders``.
        title: Its title.
        data: A ``data:`` URL.
    """

    name: str
    title: str
    data: str


def images_of(evidence: Evidence) -> list[Image]:
    """Return every figure that the records allow, as SVG."""
    from lora_diag import plots  # deferred: importing Matplotlib takes half a second

    runs = [source.results for source in evidence.sources]
    files = [source.name for source in evidence.sources]
    images = []

    def draw(kind: str, name: str, title: str, field: str | None = None) -> None:
        if plots.why_not(kind, runs, field=field) is None:
            svg = plots.encode_figure(plots.figure(kind, runs, field=field, files=files), "svg")
            data = base64.b64encode(svg).decode()
            images.append(Image(name, title, f"data:image/svg+xml;base64,{data}"))

    for kind in plots.FIGURES:
        draw(kind.name, kind.name, kind.shows)
    draw("heatmap", "intruders", "intruder dimensions by module type and depth", "intruders")
    return images


TEMPLATES = Path(__file__).parent / "templates"

# Total number of points of all spectra: 256 per layer up to 2,000 layers, and 7 at 70,000, where
# the page stays below 30 MB.
MAX_POINTS, MAX_LAYER_POINTS, MIN_LAYER_POINTS = 500_000, 256, 6
# Number of layers from which numbers have six digits.
LARGE_PAGE, DIGITS = 5_000, 6
# Maximum number of rows of the table without JavaScript.
PLAIN_ROWS = 200
# Maximum number of points of an overlap curve.
MAX_STEPS = 60
# Terminal width of the tables on the page.
TERMINAL_WIDTH = 118
# Maximum number of listed verdicts of a gate, and of inputs of a run (a fleet has thousands).
VERDICTS, INPUTS = 50, 20


def html_report(evidence: Evidence, images: Sequence[Image] = (), made: str = "") -> str:
    """Return the HTML page of the report.

    Args:
        evidence: The runs.
        images: Static figures; those that belong to no section are hidden once the interactive
            charts are ready.
        made: Creation time of the page as text.
    """
    with require("an HTML report", "report", kind=InputError):
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from plotly.offline import get_plotlyjs
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_make_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"short": short, "cell": plain}
    # Plain JSON: the filter of Jinja2 escapes it for a script element.
    templates.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    layers = layers_of(evidence)
    columns = fields_of(evidence, layers)
    if not any(column.is_number for column in columns):
        layers, columns = (), []  # no cells to colour: the runs' own summaries are sufficient
    outcome, verdicts = gate_outcome(evidence)
    sections = sections_of(evidence)
    subject = subject_of(evidence)
    data = _make_data(evidence, layers, columns)
    section_figures = {name for section in sections for name in section.figures}
    return templates.get_template("report.html").render(
        subject=subject,
        sources=evidence.sources,
        run_tables=list(map(_render_run, evidence.sources)),
        outcome=outcome,
        verdicts=verdicts,
        max_verdicts=VERDICTS,
        layers=layers,
        columns=columns,
        plain=[column for column in columns if column.main],
        plain_rows=min(PLAIN_ROWS, len(layers)),
        sections=sections,
        images=images,
        section_figures=section_figures,
        max_inputs=INPUTS,
        made=made,
        thinning=_describe_thinning(evidence, layers),
        metrics=data["metrics"],
        parts=_list_parts(subject, outcome, sections, layers),
        epsilon=EPSILON,
        data=data,
        plotly=_pack_script(get_plotlyjs) if layers else "",
    )


def _make_printable(value: Any) -> Any:
    """Return a value of the page with the unprintable characters of a text escaped, except line
    ends.
    """
    is_text = isinstance(value, str) and not hasattr(value, "__html__")
    return safe_lines(value) if is_text else value


def _list_parts(
    subject: ReportSubject, outcome: str, sections: Sequence[RunSection], layers: Sequence[str]
) -> list[tuple[str, str]]:
    """Return the ids and titles of the parts of the page; several runs of a command have whole
    titles.
    """
    kinds = Counter(section.kind for section in sections)
    parts = []
    if subject.advice:
        parts.append(("next", "Next steps"))
    if outcome:
        parts.append(("gate", "Gate"))
    for position, section in enumerate(sections, 1):
        title = section.kind if kinds[section.kind] == 1 else section.title
        parts.append((f"several{position}", title))
    if layers:
        parts.append(("explore", "Layer by layer"))
    return [*parts, ("runs", "Runs")]


@cache
def _pack_script(read: Callable[[], str]) -> str:
    """Return a compressed script; cached, since plotly.js takes half a second to compress."""
    return base64.b64encode(gzip.compress(read().encode(), 9, mtime=0)).decode()


def _render_run(source: Source) -> str:
    """Return the table and summary of a run as in a terminal; empty for a command without one."""
    try:
        return table(source.results, TERMINAL_WIDTH)
    except InputError:
        return ""


def _make_data(
    evidence: Evidence, layers: Sequence[str], columns: Sequence[Field]
) -> dict[str, Any]:
    """Return the data of the page's script (``templates/page.js``); layers are numbered."""
    from lora_diag.rendering.figures.fields import Types

    types = Types(layers)
    type_index = {name: i for i, name in enumerate(types.names)}
    layer_index = {layer: i for i, layer in enumerate(layers)}
    data = {
        "layers": list(map(safe, layers)),
        "types": list(map(safe, types.names)),
        "type": [type_index[types.of(layer)] for layer in layers],
        "depth": list(map(depth_of, layers)),
        "fields": list(map(_describe_column, columns)),
        "metrics": _list_metrics(evidence),
        "spectra": _make_spectra(evidence, layer_index),
        "overlaps": _make_overlaps(evidence, layer_index),
    }
    if len(layers) < LARGE_PAGE:
        return data
    rounded: dict[str, Any] = json.loads(json.dumps(data), parse_float=_round_value)
    return rounded


def _describe_column(column: Field) -> dict[str, Any]:
    """Return a column for the page's script."""
    return {
        "id": column.id,
        "title": column.title,
        "about": column.about,
        "group": column.group,
        "share": column.share,
        "main": column.main,
        "number": column.is_number,
        "values": column.values,
    }


def _make_spectra(evidence: Evidence, layer_index: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return σ and C(r) of every layer at the ranks of ``thinned_ranks``, which are stored once for
    each length.
    """
    points = _count_points(evidence)
    charts = []
    sources = list(evidence.of(Spectrum))
    for source, label in zip(sources, labels([source.name for source in sources]), strict=True):
        ranks_by_length: dict[int, list[int]] = {}
        curves = []
        for record in source.results:
            length = len(record.s)
            shown_ranks = ranks_by_length.setdefault(length, thinned_ranks(length, points))
            energy: list[float | None] = [None] * len(shown_ranks)
            if record.fro > 0:
                shares = curve_at(record.s, record.fro, record.complete, shown_ranks)
                energy = [*map(_round_value, shares)]
            curve = {
                "layer": layer_index[record.layer],
                "kept": length,
                "s": [record.s[rank - 1] for rank in shown_ranks],
                "c": energy,
                "edge": record.resolution.edge,
            }
            curves.append(curve)
        chart = {
            "label": label,
            "metric": metric_of(source.results),
            "ranks": ranks_by_length,
            "curves": curves,
        }
        charts.append(chart)
    return charts


def _list_metrics(evidence: Evidence) -> list[dict[str, str]]:
    """Return the metrics of the spectra, that of the weights first; curves of different metrics are
    never combined.
    """
    metrics = {metric_of(source.results) for source in evidence.of(Spectrum)}
    return [
        {"id": metric, "name": name, "of": NORMS[metric][0].strip("‖")}
        for metric, name in METRIC_NAMES.items()
        if metric in metrics
    ]


# The numbers of a point of an overlap curve.
_CURVE = ("step", "kappa", "kappa_random", "tangent", "tangent_random")


def _make_overlaps(evidence: Evidence, layer_index: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return the overlaps over the steps."""
    charts = []
    for source in evidence.of(Overlap):
        curves = []
        for track in tracks(source.results):
            rows = list(map(attrgetter(*_CURVE), select_evenly(track.records, MAX_STEPS)))
            curves.append({"layer": layer_index[track.layer], "rank": track.rank, "rows": rows})
        charts.append({"curves": curves})
    return charts


def _count_points(evidence: Evidence) -> int:
    """Return the maximum number of points of a spectrum."""
    spectra = sum(len(source.results) for source in evidence.of(Spectrum))
    return max(MIN_LAYER_POINTS, min(MAX_LAYER_POINTS, MAX_POINTS // max(1, spectra)))


def _describe_thinning(evidence: Evidence, layers: Sequence[str]) -> list[str]:
    """State the contents of the records that the page omits."""
    points = _count_points(evidence)
    longest = steps = 0
    for source in evidence.of(Spectrum):
        longest = max(longest, *(len(record.s) for record in source.results))
    for source in evidence.of(Overlap):
        steps = max(steps, len({record.step for record in source.results}))
    notes = []
    if longest > points:
        notes.append(
            f"Spectra and energy curves are drawn with up to {points} of {longest} points of the "
            "file."
        )
    if len(layers) >= LARGE_PAGE:
        notes.append(f"With {len(layers)} layers, numbers have {DIGITS} digits.")
    if steps > MAX_STEPS:
        notes.append(f"Overlap curves show {MAX_STEPS} of {steps} steps, evenly spaced.")
    return notes


def _round_value(value: float | str) -> float:
    """Return a number with ``DIGITS`` digits."""
    return float(f"{float(value):.{DIGITS}g}")
