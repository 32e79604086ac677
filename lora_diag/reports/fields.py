"""Records → columns: one value per layer from any run. Used by the page's heat map and table.

Values are those of the records, unrounded; derived ones are marked in ``about``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lora_diag.catalog import record_kinds
from lora_diag.diagnostics.fleet.record import Fleet
from lora_diag.diagnostics.overlap.record import Overlap
from lora_diag.diagnostics.overlap.show import tracks
from lora_diag.diagnostics.residual.record import Residual
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.gating.record import WORST_FIRST, Status
from lora_diag.records import LayerRecord
from lora_diag.records.base import Shown, Value, pooled_value
from lora_diag.records.vocabulary import metric_of
from lora_diag.reports.evidence import Evidence, Source
from lora_diag.reports.subject import labels

# Suffix of columns in metrics other than that of the weights.
_METRIC_SUFFIXES = {"data": "data", "kfac": "K-FAC"}


@dataclass(frozen=True, slots=True)
class Field:
    """One column.

    Args:
        id: Short and unique in a page, part of its address.
        title: Its heading.
        about: One-sentence description.
        group: Its run or adapter; empty if there is only one.
        values: One per layer; None if undefined.
        share: Whether it lies in [0, 1].
        main: Whether it is shown by default.
        together: Returns the pooled value of several layers by index, as in the command's own table.
        pooled: Whether the pooled value differs from the median or the most frequent word.
    """

    id: str
    title: str
    about: str
    group: str
    values: tuple[Value, ...]
    together: Callable[[Sequence[int]], Value]
    share: bool = False
    main: bool = False
    pooled: bool = False

    @property
    def is_number(self) -> bool:
        """Whether a heat map can show it."""
        return not any(isinstance(value, str) for value in self.values)


def layers_of(evidence: Evidence) -> tuple[str, ...]:
    """Return the distinct names of the layers of all runs, in the order of the files; adapters are not included."""
    return tuple(
        dict.fromkeys(
            record.layer for source in evidence.sources for record in source.results if not isinstance(record, Fleet)
        )
    )


def fields_of(evidence: Evidence, layers: Sequence[str]) -> list[Field]:
    """Return all nonempty columns of the runs."""
    fields = [
        *_list_spectrum_fields(evidence, layers),
        *_list_residual_fields(evidence, layers),
        *_list_overlap_fields(evidence, layers),
        *_list_other_fields(evidence, layers),
        *_list_gate_fields(evidence, layers),
    ]
    return [field for field in fields if any(value is not None for value in field.values)]


def _list_spectrum_fields(evidence: Evidence, layers: Sequence[str]) -> Iterable[Field]:
    sources = list(evidence.of(Spectrum))
    for position, source in enumerate(sources):
        records = {record.layer: record for record in source.results if isinstance(record, Spectrum)}
        shown = Spectrum.shown_of(source.results.run.settings, source.results.layers)
        if evidence.update is not None and source is not evidence.update:
            shown = tuple(replace(field, main=False) for field in shown)
        group = filter(None, (_name_group(sources, source), _METRIC_SUFFIXES.get(metric_of(source.results))))
        yield from _make_columns(f"s{position}", ", ".join(group), shown, records, layers)


def _list_residual_fields(evidence: Evidence, layers: Sequence[str]) -> Iterable[Field]:
    adapters: dict[str, dict[str, Residual]] = {}
    for source in evidence.of(Residual):
        for record in source.results:
            adapters.setdefault(record.adapter, {}).setdefault(record.layer, record)
    for position, (label, records) in enumerate(zip(labels(list(adapters)), adapters.values(), strict=True)):
        yield from _make_columns(f"a{position}", label, Residual.shown, records, layers)


def _list_overlap_fields(evidence: Evidence, layers: Sequence[str]) -> Iterable[Field]:
    """Yield the columns of overlap at the last step; the page's curves show all steps."""
    sources = list(evidence.of(Overlap))
    for position, source in enumerate(sources):
        shown = tracks(source.results)
        ranks = sorted({track.rank for track in shown})
        place = f"at the last step, r={ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
        columns = tuple(replace(field, about=f"{field.about}; {place}") for field in Overlap.shown)
        records = {track.layer: track.last for track in shown}
        yield from _make_columns(f"o{position}", _name_group(sources, source), columns, records, layers)


def _list_other_fields(evidence: Evidence, layers: Sequence[str]) -> Iterable[Field]:
    """Yield the declared columns of every kind of record with one record per layer."""
    special = (Spectrum, Residual, Overlap)
    kinds = [
        kind
        for kind in record_kinds().values()
        if issubclass(kind, LayerRecord) and kind.key == ("layer",) and kind not in special
    ]
    for kind in kinds:
        sources = list(evidence.of(kind))
        for position, source in enumerate(sources):
            records = {record.layer: record for record in source.results if isinstance(record, kind)}
            shown = kind.shown_of(source.results.run.settings, source.results.layers)
            prefix = f"{kind.model_fields['record'].default}{position}"
            yield from _make_columns(prefix, _name_group(sources, source), shown, records, layers)


def _list_gate_fields(evidence: Evidence, layers: Sequence[str]) -> Iterable[Field]:
    worst: dict[str, Status] = {}
    for verdict in evidence.verdicts:
        if verdict.layer is not None:
            earlier = worst.get(verdict.layer, verdict.status)
            worst[verdict.layer] = min(earlier, verdict.status, key=WORST_FIRST.index)

    def together(positions: Sequence[int]) -> Status | None:
        statuses = [status for position in positions if (status := worst.get(layers[position])) is not None]
        return min(statuses, key=WORST_FIRST.index, default=None)

    about = "worst verdict of the gate on this layer"
    yield Field("g", "gate", about, "", tuple(map(worst.get, layers)), together, main=True, pooled=True)


def _make_columns(
    prefix: str, group: str, shown: Iterable[Shown], records: Mapping[str, Any], layers: Sequence[str]
) -> Iterable[Field]:
    for field in shown:
        values = tuple(field.value(records[layer]) if layer in records else None for layer in layers)
        together = partial(_pool_together, field, records, layers)
        identity, pooled = f"{prefix}.{field.path}", field.pool is not None
        yield Field(identity, field.title, field.about, group, values, together, field.share, field.main, pooled)


def _pool_together(shown: Shown, records: Mapping[str, Any], layers: Sequence[str], positions: Sequence[int]) -> Value:
    group = [records[layers[position]] for position in positions if layers[position] in records]
    return pooled_value(shown, group) if group else None


def _name_group(sources: Sequence[Source], source: Source) -> str:
    """Return the name of the run if there are several; else empty."""
    return labels([item.name for item in sources])[list(sources).index(source)] if len(sources) > 1 else ""
