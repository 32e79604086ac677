"""`alone`: layers or module types with the largest cost of truncation.

`truncation`: loss of W_0 + ΔW_r over the rank, between the losses of BASE and TUNED, with the energy kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lora_diag.records import Probe, Results
from lora_diag.rendering.figures.axes import panel_axes
from lora_diag.rendering.figures.pages import Draw, Row, draw_rows, figure_of, highest, page_of, run_keys
from lora_diag.rendering.figures.panels import (
    levels,
    limits,
    loss_axis,
    measured_axis,
    one_set,
    probes,
    sets_of,
)
from lora_diag.rendering.figures.series import Options, Series, subject_of
from lora_diag.rendering.figures.sheet import FigureText, Key
from lora_diag.rendering.figures.style import CATEGORIES, INK, QUIET, PageStyle, category, name_of
from lora_diag.rendering.losses import gap_half

# Colours of the lines.
LOSS, ENERGY = CATEGORIES[0], CATEGORIES[1]
# Fraction of TUNED's change of the loss that is enough, as in the summary of ``probe truncation``.
SUFFICIENT_SHARE = 0.9
# Maximum number of rows of a panel.
ROWS = 24


def find_alone_obstacle(records: Sequence[Probe], options: Options) -> str | None:
    """Return why nothing can be drawn; None if it can."""
    ranks = _list_ranks(records)
    if not ranks:
        return "no layer or module type was truncated alone (--granularity layer or type)"
    if options.rank in {None, *ranks}:
        return None
    return f"rank {options.rank} was not measured; use one of {', '.join(map(str, ranks))}"


def alone(results: Results[Any] | Iterable[Probe], ax: Axes | None = None, *, name: str | None = None) -> Axes:
    """Draw the loss minus TUNED's with one layer or module type truncated, with the interval of Student's t.

    Args:
        results: Results of ``probe truncation --granularity layer`` or ``type``, or their records.
        ax: Axes to draw on; default those of a new figure.
        name: Name of the evaluation set; default the first.

    Returns:
        The Axes drawn on: at the smallest rank measured, the costliest first.
    """
    records = probes(results, "truncation")
    sets = sets_of(records)
    chosen = name if name is not None else next(iter(sets))
    rank = _smallest_rank(records)
    rows = highest(_make_rows([record for record in records if record.set == chosen], rank, 0), ROWS)
    with panel_axes(ax) as (axes, style):
        draw_rows(axes, rows, style)
        axes.set_xlabel("loss minus TUNED's (nats)")
        axes.set_title(f"{sets[chosen]}: each part alone to r\xa0=\xa0{rank}", parse_math=False, loc="left")
    return axes


def alone_figure(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Figure:
    """Draw the layers or types with the largest cost at the requested or the smallest rank, one panel per set."""
    records = [record for item in series for record in item.records]
    rank = options.rank if options.rank is not None else _smallest_rank(records)
    panels = []
    for name, label in sets_of(records).items():
        rows = []
        for number, item in enumerate(series):
            rows += _make_rows([record for record in item.records if record.set == name], rank, number)
        if rows:
            panels.append((label, highest(rows, ROWS)))
    max_rows = len({_find_part(record) for record in records if record.rank == rank and _find_part(record)})
    notes = ["All others are as in TUNED. Error bars: two paired standard errors, more for few sequences (t)."]
    if max_rows > ROWS:
        notes.append(f"The {ROWS} with the highest cost, of {max_rows}.")
    if other_ranks := [other_rank for other_rank in _list_ranks(records) if other_rank != rank]:
        notes.append(f"Also measured, not drawn: r = {', '.join(map(str, other_ranks))}.")
    about = subject_of(series)
    text = FigureText(
        f"Cost of truncating one part alone to r\xa0=\xa0{rank}",
        f"{about}held-out loss minus that of TUNED, nats; right of the line: worse",
        (" ".join(notes),),
        run_keys(series, style),
    )
    return figure_of(panels, "loss minus TUNED's (nats)", text, style)


def _find_part(record: Probe) -> str:
    return record.layer or record.module_type or ""


def _list_ranks(records: Iterable[Probe]) -> list[int]:
    return sorted({record.rank for record in records if _find_part(record) and record.rank is not None})


def _smallest_rank(records: Iterable[Probe]) -> int:
    return _list_ranks(records)[0]


def _make_rows(of_set: Sequence[Probe], rank: int, number: int) -> list[Row]:
    return [
        Row(
            name_of(_find_part(record)),
            record.gap,
            gap_half(record),
            category(number),
        )
        for record in of_set
        if _find_part(record) and record.rank == rank and record.gap is not None
    ]


def select_joint(records: Iterable[Probe]) -> tuple[Probe, ...]:
    """Return the records of all layers truncated together, including BASE and TUNED."""
    return tuple(record for record in records if record.layer is None and record.module_type is None)


def find_obstacle(records: Sequence[Probe], options: Options) -> str | None:
    """Return why nothing can be drawn; None if it can."""
    if any(record.subject == "truncated" for record in select_joint(records)):
        return None
    return "no rank was measured with all layers truncated (--granularity all)"


def truncation(results: Results[Any] | Iterable[Probe], ax: Axes | None = None, *, name: str | None = None) -> Axes:
    """Draw the loss of W_0 + ΔW_r minus TUNED's over r, with the intervals of paired differences; lines: BASE, TUNED.

    Dotted: the loss if it were proportional to energy, (1 − C(r)) of the change from BASE to TUNED. A loss nearer to
    TUNED means that energy underestimates the rank.

    Args:
        results: Results of ``probe truncation``, or their records.
        ax: Axes to draw on; default those of a new figure.
        name: Name of the evaluation set; default the first.

    Returns:
        The Axes drawn on.
    """
    records, label = one_set(results, "truncation", name)
    of_set = select_joint(records)
    with panel_axes(ax) as (axes, style):
        inches = float(axes.get_window_extent().width) / axes.figure.dpi
        _draw_gaps(axes, of_set, inches, style)
        axes.set(xlabel="rank r of the update", ylabel="loss minus TUNED's (nats)")
        axes.set_title(_make_title(label, of_set), parse_math=False, loc="left")
    return axes


def figure(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Figure:
    """Draw a panel per set: the losses of one run, or the fraction of TUNED's change at each rank for several."""
    runs = [select_joint(item.records) for item in series]
    single = len(runs) == 1
    panels: list[tuple[str, Draw]] = []
    for name, label in sets_of(record for records in runs for record in records).items():
        of_set = [[record for record in records if record.set == name] for records in runs]
        if single:
            panels.append((_make_title(label, of_set[0]), partial(_draw_gaps, of_set=of_set[0], style=style)))
        else:
            panels.append((label, partial(_draw_shares, runs=of_set, style=style)))
    ylabel = "loss minus TUNED's (nats)" if single else "fraction of the change"
    return page_of(panels, _make_text(series, style), style, xlabel="rank r of the update", ylabel=ylabel)


def _draw_gaps(ax: Axes, of_set: Sequence[Probe], inches: float, style: PageStyle | None) -> None:
    """Draw the loss minus TUNED's with error bars, its value if proportional to energy, and BASE and TUNED."""
    width = style.line if style else 1.2
    truncated = [record for record in _select_truncated(of_set) if record.gap is not None]
    base, tuned = _find_end(of_set, "base"), _find_end(of_set, "tuned")
    ranks, gaps = [record.rank or 0 for record in truncated], [record.gap or 0.0 for record in truncated]
    errors = [(gap_half(record) or 0.0) for record in truncated]
    if truncated:
        ax.errorbar(
            ranks,
            gaps,
            yerr=errors,
            color=LOSS,
            lw=1.6 * width,
            elinewidth=width,
            marker="o",
            ms=3 * width,
            zorder=2.5,
            label="_gap",
        )
    named = [("TUNED" if tuned is None else f"TUNED {tuned.nats:.3f}", 0.0, INK)]
    if base is not None and base.gap:
        named.append((f"BASE {base.nats:.3f}", base.gap, INK))
        energy = [
            (record.rank or 0, (1 - record.energy) * base.gap) for record in truncated if record.energy is not None
        ]
        if energy:
            line_style: dict[str, Any] = {"color": ENERGY, "lw": 1.3 * width, "ls": (0, (1, 1.5))}
            ax.plot(*zip(*energy, strict=True), **line_style, zorder=2, label="_energy")
    bar_ends = [gap + sign * error for gap, error in zip(gaps, errors, strict=True) for sign in (-1, 1)]
    ax.set_ylim(limits([*bar_ends, *(value for _, value, _ in named)], below=0.14, above=0.14))
    levels(ax, named, style, lowest_below=True)
    measured_axis(ax, ranks or [1], inches, style)
    loss_axis(ax)


def _draw_shares(ax: Axes, runs: Sequence[Sequence[Probe]], inches: float, style: PageStyle | None) -> None:
    """Draw the fraction of TUNED's change that each run keeps, and its energy, dotted."""
    width = style.line if style else 1.2
    shares, ranks = [0.0, 1.0], []
    for number, of_set in enumerate(runs):
        truncated = [record for record in _select_truncated(of_set) if record.kept is not None]
        base = _find_end(of_set, "base")
        if not truncated or base is None or not base.gap:
            continue
        color, shown_ranks = category(number), [record.rank or 0 for record in truncated]
        kept = [record.kept for record in truncated if record.kept is not None]
        errors = [(gap_half(record) or 0.0) / abs(base.gap) for record in truncated]
        ax.errorbar(
            shown_ranks, kept, yerr=errors, color=color, lw=1.6 * width, marker="o", ms=3 * width, label="_kept"
        )
        energy = [(record.rank or 0, record.energy) for record in truncated if record.energy is not None]
        if energy:
            ax.plot(*zip(*energy, strict=True), color=color, lw=1.2 * width, ls=(0, (1, 1.5)), label="_energy")
        shares += kept
        ranks += shown_ranks
    ax.set_ylim(limits(shares, below=0.16, above=0.16))
    levels(ax, [("BASE", 0.0, INK), ("TUNED", 1.0, INK)], style, lowest_below=True)
    measured_axis(ax, ranks or [1], inches, style)
    loss_axis(ax)


def _select_truncated(records: Sequence[Probe]) -> list[Probe]:
    return sorted((record for record in records if record.rank is not None), key=lambda record: record.rank or 0)


def _find_end(records: Sequence[Probe], subject: str) -> Probe | None:
    return next((record for record in records if record.subject == subject), None)


def _make_title(label: str, of_set: Sequence[Probe]) -> str:
    """Return the label of a set with the smallest rank that keeps enough of TUNED's change, else the highest rank."""
    truncated = _select_truncated(of_set)
    sufficient = next(
        (record for record in truncated if record.kept is not None and record.kept >= SUFFICIENT_SHARE), None
    )
    if sufficient is not None and sufficient.kept is not None:
        energy = "" if sufficient.energy is None else f", C({sufficient.rank})\xa0=\xa0{sufficient.energy:.2f}"
        return f"{label}: r\xa0=\xa0{sufficient.rank} keeps {sufficient.kept:.0%} of the change{energy}"
    if truncated and truncated[-1].kept is not None:
        return f"{label}: r\xa0=\xa0{truncated[-1].rank} keeps {truncated[-1].kept:.0%} of the change"
    return label


def _make_text(series: Sequence[Series[Any]], style: PageStyle) -> FigureText:
    width = style.line
    single = len(series) == 1
    dots: dict[str, Any] = {"lw": 1.3 * width, "ls": (0, (1, 1.5))}
    if single:
        keys = [
            Key(
                Line2D([], [], color=LOSS, lw=1.6 * width, marker="o", ms=3 * width),
                "loss ± 2 standard errors, more for few sequences (t)",
            ),
            Key(Line2D([], [], color=ENERGY, **dots), "(1 − C(r)) of the change: energy only"),
        ]
    else:
        keys = [
            Key(Line2D([], [], color=category(number), lw=1.6 * width), item.label)
            for number, item in enumerate(series)
        ]
        keys.append(Key(Line2D([], [], color=QUIET, **dots), "energy fraction C(r)"))
    keys.append(Key(Line2D([], [], color=INK, lw=0.8 * width, ls=(0, (4, 2))), "BASE, TUNED"))
    about = subject_of(series)
    about += "mean negative log-likelihood of held-out predictions; nothing is trained"
    rest_settings = {item.run.settings.get("rest") for item in series if item.run is not None}
    notes = ["Errors are of the difference from TUNED, paired by sequence."]
    if not single:
        notes.insert(0, "Fraction of the change: 0 at BASE, 1 at TUNED.")
    if rest_settings == {"tuned"}:
        notes.append("Norms, biases, embeddings and head are as in TUNED at every rank.")
    if rest_settings == {"base"}:
        notes.append("Norms, biases, embeddings and head are as in BASE, so even the full rank need not reach TUNED.")
    notes.append("Results are for compression of this update, not for training at a rank.")
    return FigureText("Loss of the update truncated to rank r", about, (" ".join(notes),), tuple(keys))
