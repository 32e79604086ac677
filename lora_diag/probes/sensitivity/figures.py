"""`sensitivity`: held-out loss gain of each layer, block or module type adapted alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_diag.probes.sensitivity.gains import gains_of
from lora_diag.probes.sensitivity.record import Sensitivity
from lora_diag.rendering.figures.pages import Page, Row, make_rows_page
from lora_diag.rendering.figures.panels import sets_of
from lora_diag.rendering.figures.series import Options, Series, UndrawableError, subject_of
from lora_diag.rendering.figures.style import PageStyle, name_of


def make_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return the gains, one panel per set, the highest first.

    Raises:
        UndrawableError: No unit is finished with a gain.
    """
    ranks = sorted({_find_smallest_rank(item.records) for item in series})
    page = make_rows_page(
        series,
        _make_rows,
        sets_of(record for item in series for record in item.records),
        style,
        title=f"Gain of each part adapted alone, r\xa0=\xa0{', '.join(map(str, ranks))}",
        about=f"{subject_of(series)}loss of BASE minus loss on held-out text, nats; right of the "
        "line: better",
        xlabel="loss of BASE minus loss (nats)",
        notes=[
            "Error bars: two paired standard errors, more for few sequences (t). Gains of parts "
            "adapted alone do not add up to that of all."
        ],
    )
    if not page.panels:
        raise UndrawableError("no unit is finished with a gain")
    return page


def _find_smallest_rank(records: Sequence[Sensitivity]) -> int:
    return min((record.rank for record in records if record.rank is not None), default=0)


def _make_rows(item: Series[Sensitivity], name: str, color: str) -> list[Row]:
    """Return the gains of one run on a set, in a colour."""
    records = item.records
    seed = min((record.seed for record in records if record.unit), default=0)
    gains = gains_of(records, name, records[0].set, _find_smallest_rank(records), seed)
    return [Row(name_of(gain.unit), gain.gain, gain.half, color) for gain in gains]
