"""`energy`: energy fraction of the best adapter of each rank, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lora_diag.diagnostics.spectrum.curves import MARKED, Quantity
from lora_diag.diagnostics.spectrum.figure_multiples import small_multiples
from lora_diag.diagnostics.spectrum.figure_panel import draw_series
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.metrics import energy_curve
from lora_diag.rendering.figures.axes import panel_axes
from lora_diag.rendering.figures.fields import changes_of
from lora_diag.rendering.figures.series import Options, Series
from lora_diag.rendering.figures.style import PageStyle


def _energy_shares(record: Spectrum) -> NDArray[np.float64]:
    return energy_curve(np.array(record.s), record.fro, record.complete)


SHARE = Quantity(_energy_shares, beyond=1.0)


def energy(
    records: Iterable[Spectrum], ax: Axes | None = None, *, ranks: Sequence[int] = MARKED, per: str = "layer"
) -> Axes:
    """Draw C(r) = Σ_{i≤r}σ_i² / ‖ΔW‖_F² over r, one line per layer, all in one panel.

    Curves are coloured by depth, and grey beyond the signal rank, where they include rounding noise of the files. A
    zero update has no curve. Blocks with several such matrices (experts) have one curve, their pointwise median: pass
    the records of one module type (``results.filter("q_proj")``) for one curve per layer.

    Args:
        records: Records of ``spectrum``.
        ax: Axes to draw on; default those of a new figure (``ax.figure`` is then the figure).
        ranks: Ranks to mark.
        per: ``layer``; or ``type`` for the median and the range of all records.

    Returns:
        The Axes drawn on.

    Example:
        >>> import lora_diag
        >>> results = lora_diag.spectrum("sample_checkpoints/base", "sample_checkpoints/full_ft", layers="q_proj")
        >>> ax = energy(results)
        >>> [float(line.get_ydata()[-1]) for line in ax.lines if "q_proj" in line.get_label()]
        [1.0, 1.0, 1.0, 1.0]
    """
    records = tuple(records)
    with panel_axes(ax) as (axes, style):
        draw_series(axes, (Series("", records),), SHARE, ranks, per, style)
        _scale(axes)
        change = changes_of(records)
        axes.set(xlabel="rank r", ylabel=f"energy fraction C(r){'' if change == 'ΔW' else f' of {change}'}")
    return axes


def figure(series: Sequence[Series[Spectrum]], style: PageStyle, options: Options) -> Figure:
    """Draw C(r) by module type, one panel each."""
    change = changes_of(record for item in series for record in item.records)
    total = "Σσ²" if " and " in change else f"‖{change}‖_F²"
    return small_multiples(
        series,
        SHARE,
        style,
        options.per,
        title=f"Energy fraction C(r) of {change} that the best adapter of rank r keeps",
        xlabel="rank r",
        ylabel="C(r)",
        formula=f"C(r)\xa0=\xa0(σ₁²\xa0+\xa0…\xa0+\xa0σᵣ²)\xa0/\xa0{total}",
        scale=_scale,
    )


def _scale(ax: Axes) -> None:
    ax.set_ylim(0, 1.03)
    ax.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    ax.set_yticks([0.25, 0.75], minor=True)
