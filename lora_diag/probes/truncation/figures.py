"""`alone`: layers or module types with the largest cost of truncation.

`truncation`: loss of W_0 + ΔW_r over the rank, between the losses of BASE and TUNED, with the
energy kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from matplotlib.axes import Axes

from lora_diag.probes.truncation.show import SUFFICIENT_SHARE, name_part
from lora_diag.records import Probe
from lora_diag.rendering.figures.pages import Page, Panel, Row, key, make_rows_page, run_keys
from lora_diag.rendering.figures.panels import (
    axis_limits,
    draw_levels,
    set_loss_axis,
    set_measured_rank_axis,
    sets_of,
)
from lora_diag.rendering.figures.series import (
    Options,
    Series,
    UndrawableError,
    choose_rank,
    subject_of,
)
from lora_diag.rendering.figures.style import (
    CATEGORIES,
    DASHED,
    DOTTED,
    INK,
    QUIET,
    PageStyle,
    category,
    name_of,
)
from lora_diag.rendering.losses import gap_half

# Colours of the lines.
LOSS, ENERGY = CATEGORIES[0], CATEGORIES[1]


def make_alone_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return the cost of truncating each layer or type alone to the requested or smallest rank, one
    panel per set.

    Raises:
        UndrawableError: No layer or type was truncated alone, or the requested rank was not
            measured.
    """
    series = [
        replace(item, records=tuple(r for r in item.records if not r.match_norm)) for item in series
    ]
    records = [record for item in series for record in item.records if name_part(record)]
    ranks = sorted({record.rank for record in records if record.rank is not None})
    if not ranks:
        raise UndrawableError("no layer or module type was truncated alone (--by layer or type)")
    rank = ranks[0] if options.rank is None else choose_rank(ranks, options)

    def rows_of(item: Series[Probe], name: str, color: str) -> list[Row]:
        return [
            Row(name_of(name_part(record)), record.gap, gap_half(record), color)
            for record in item.records
            if record.set == name
            and name_part(record)
            and record.rank == rank
            and record.gap is not None
        ]

    others = ", ".join(str(other) for other in ranks if other != rank)
    return make_rows_page(
        series,
        rows_of,
        {name: f"{label}: r\xa0=\xa0{rank}" for name, label in sets_of(records).items()},
        style,
        title="Cost of truncating one part alone to rank r",
        about=f"{subject_of(series)}held-out loss minus that of TUNED, nats; right of the line: "
        "worse",
        xlabel="loss minus TUNED's (nats)",
        notes=[
            "All others are as in TUNED. Error bars: two paired standard errors, more for few "
            "sequences (t).",
            f"Also measured, not drawn: r = {others}." if others else "",
        ],
    )


def make_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return a panel per set: losses minus TUNED's of one run, or the fractions of TUNED's change
    of several, by rank.

    Raises:
        UndrawableError: No rank was measured with all layers truncated.
    """
    # All layers truncated together, BASE and TUNED.
    runs = [[r for r in item.records if not name_part(r) and not r.match_norm] for item in series]
    if not any(record.subject == "truncated" for records in runs for record in records):
        raise UndrawableError("no rank was measured with all layers truncated (--by all)")
    single, width = len(series) == 1, style.line
    xlabel, ylabel = (
        "rank r of the update",
        "loss minus TUNED's (nats)" if single else "fraction of the change",
    )
    panels = []
    for name, label in sets_of(record for records in runs for record in records).items():
        of_set = [[record for record in records if record.set == name] for records in runs]
        title = _make_title(label, of_set[0]) if single else label
        panels.append(Panel(title, partial(_draw, runs=of_set), xlabel, ylabel, name=name))
    dots: dict[str, Any] = {"lw": 1.3 * width, "ls": DOTTED}
    line: dict[str, Any] = {"lw": 1.6 * width}
    if single:
        label = "loss ± 2 standard errors, more for few sequences (t)"
        keys = [key(label, color=LOSS, marker="o", ms=3 * width, **line)]
        keys.append(key("(1 − C(r)) of the change: energy only", color=ENERGY, **dots))
    else:
        keys = [*run_keys(series, **line), key("energy fraction C(r)", color=QUIET, **dots)]
    keys.append(key("BASE, TUNED", color=INK, lw=0.8 * width, ls=DASHED))
    rest_settings = {
        item.run.settings.get("untruncated") for item in series if item.run is not None
    }
    rest = "Norms, biases, embeddings and head are as in "
    return Page(
        "Loss of the update truncated to rank r",
        panels,
        f"{subject_of(series)}mean negative log-likelihood of held-out predictions; nothing is "
        "trained",
        [
            "" if single else "Fraction of the change: 0 at BASE, 1 at TUNED.",
            "Errors are of the difference from TUNED, paired by sequence.",
            f"{rest}TUNED at every rank." if rest_settings == {"tuned"} else "",
            f"{rest}BASE, so even the full rank need not reach TUNED."
            if rest_settings == {"base"}
            else "",
            "Results are for compression of this update, not for training at a rank.",
        ],
        keys,
    )


def _draw(ax: Axes, style: PageStyle, runs: Sequence[Sequence[Probe]]) -> None:
    """Draw the loss minus TUNED's of one run, or the fraction of TUNED's change that several keep;
    dotted: energy.
    """
    single = len(runs) == 1
    named = [("BASE", 0.0, INK), ("TUNED", 1.0, INK)]
    values: list[float] = []
    ranks: list[int] = []
    for number, of_set in enumerate(runs):
        ends = {record.subject: record for record in of_set}
        base, tuned = ends.get("base"), ends.get("tuned")
        change = base.gap if base is not None else None
        if single:
            named = [("TUNED" if tuned is None else f"TUNED {tuned.nats:.3f}", 0.0, INK)]
            named += [(f"BASE {base.nats:.3f}", change, INK)] if base is not None and change else []
        scale = 1.0 if single else abs(change or 0.0)
        points = [
            (record, value, (gap_half(record) or 0.0) / scale)
            for record in _select_truncated(of_set)
            if scale and (value := record.gap if single else record.kept) is not None
        ]
        if not points:
            continue
        line: dict[str, Any] = {
            "color": category(number),
            "lw": 1.6 * style.line,
            "marker": "o",
            "ms": 3 * style.line,
        }
        x, y, errors = zip(
            *[(record.rank or 0, value, error) for record, value, error in points], strict=True
        )
        ax.errorbar(x, y, yerr=errors, zorder=2.5, label="_gap" if single else "_kept", **line)
        energy = [
            (record.rank or 0, record.energy)
            for record, *_ in points
            if record.energy is not None and change
        ]
        if energy:
            x_energy, kept = zip(*energy, strict=True)
            expected = [(1 - fraction) * (change or 0.0) for fraction in kept] if single else kept
            color = ENERGY if single else category(number)
            ax.plot(
                x_energy,
                expected,
                color=color,
                lw=1.3 * style.line,
                ls=DOTTED,
                zorder=2,
                label="_energy",
            )
        values += [value + sign * error for _, value, error in points for sign in (-1, 1)]
        ranks += x
    ax.set_ylim(axis_limits([*values, *(value for _, value, _ in named)]))
    draw_levels(ax, named, style)
    set_measured_rank_axis(ax, ranks, style)
    set_loss_axis(ax)


def _select_truncated(records: Sequence[Probe]) -> list[Probe]:
    """Return the records of truncations, by rank."""
    return sorted(
        (record for record in records if record.rank is not None),
        key=lambda record: record.rank or 0,
    )


def _make_title(label: str, of_set: Sequence[Probe]) -> str:
    """Return the label of a set with the smallest rank that keeps enough of TUNED's change, else
    the highest rank.
    """
    truncated = _select_truncated(of_set)
    sufficient = [
        record
        for record in truncated
        if record.kept is not None and record.kept >= SUFFICIENT_SHARE
    ]
    named = next(iter(sufficient), truncated[-1] if truncated else None)
    if named is None or named.kept is None:
        return label
    energy = (
        f", C({named.rank})\xa0=\xa0{named.energy:.2f}"
        if sufficient and named.energy is not None
        else ""
    )
    return f"{label}: r\xa0=\xa0{named.rank} keeps {named.kept:.0%} of the change{energy}"
