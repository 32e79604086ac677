"""Records → columns: one value per layer from any run. Used by the page's heat map and table.

Values are those of the records, unrounded; derived ones are marked in ``about``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lora_diag.catalog import record_kinds
from lora_diag.diagnostics.fleet.record import Fleet
from lora_diag.diagnostics.overlap.record import Overlap
from lora_diag.diagnostics.overlap.show import tracks
from lora_diag.diagnostics.residual.record import Residual
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.records import LayerRecord
from lora_diag.records.base import Shown, Value, pooled_value
from lora_diag.records.verdict import WORST_FIRST, Status
from lora_diag.records.vocabulary import metric_of
from lora_diag.rendering.text import span
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
        group: Its run, adapter or metric; empty where there is one run of its kind.
        values: One per layer; None if undefined.
        share: Whether it lies in [0, 1].
        main: Whether it is shown by default.
        together: Returns the pooled value of several layers by index, as in the command's own
            table.
    """

    id: str
    title: str
    about: str
    group: str
    values: tuple[Value, ...]
    together: Callable[[Sequence[int]], Value]
    share: bool = False
    main: bool = False

    @property
    def is_number(self) -> bool:
        """Whether a heat map can show it."""
        return not any(isinstance(value, str) for value in self.values)


def layers_of(evidence: Evidence) -> tuple[str, ...]:
    """Return the distinct names of the layers with records of layers, in the order of the files.

    Adapters of fleets are not included, nor layers of probes.
    """
    layers: dict[str, None] = {}
    for source in evidence.sources:
        layers |= {record.layer: None for record in source.results if type(record) is not Fleet}
    return tuple(layers)


def fields_of(evidence: Evidence, layers: Sequence[str]) -> list[Field]:
    """Return all nonempty columns of the runs."""
    fields = []
    for prefix, group, shown, records in _list_columns(evidence):
        for column in shown:
            value_by_layer = {layer: column.value(record) for layer, record in records.items()}
            field = Field(
                f"{prefix}.{column.path}",
                column.title,
                column.about,
                group,
                tuple(map(value_by_layer.get, layers)),
                partial(_pool_together, column, records, layers),
                column.share,
                column.main,
            )
            fields.append(field)
    fields.append(_make_gate_field(evidence, layers))
    return [field for field in fields if any(value is not None for value in field.values)]


# Id of a run or adapter, its name if there are several, its columns, and its records by layer.
_Columns = tuple[str, str, Sequence[Shown], Mapping[str, Any]]


def _list_columns(evidence: Evidence) -> Iterator[_Columns]:
    """Yield the columns of all runs that have at most one record per layer to show."""
    for position, (source, name) in enumerate(_name_sources(evidence, Spectrum)):
        shown = Spectrum.shown_of(source.results.run.settings, source.results.layers)
        if evidence.update is not None and source is not evidence.update:
            shown = tuple(replace(column, main=False) for column in shown)
        group = ", ".join(filter(None, (name, _METRIC_SUFFIXES.get(metric_of(source.results)))))
        yield f"s{position}", group, shown, source.by_layer(Spectrum)
    adapters: dict[str, dict[str, Residual]] = {}
    for source in evidence.of(Residual):
        for record in source.results:
            adapters.setdefault(record.adapter, {}).setdefault(record.layer, record)
    for position, (label, records) in enumerate(
        zip(labels(list(adapters)), adapters.values(), strict=True)
    ):
        yield f"a{position}", label, Residual.shown, records
    for position, (source, name) in enumerate(_name_sources(evidence, Overlap)):
        # The last step; the page's curves show all steps.
        shown_tracks = tracks(source.results)
        place = f"at the last step, r={span((track.rank for track in shown_tracks), ' to ')}"
        shown = tuple(replace(column, about=f"{column.about}; {place}") for column in Overlap.shown)
        yield f"o{position}", name, shown, {track.layer: track.last for track in shown_tracks}
    for record_name, kind in record_kinds().items():
        if issubclass(kind, LayerRecord) and kind.key == ("layer",) and kind is not Spectrum:
            for position, (source, name) in enumerate(_name_sources(evidence, kind)):
                shown = kind.shown_of(source.results.run.settings, source.results.layers)
                yield f"{record_name}{position}", name, shown, source.by_layer(kind)


def _name_sources(evidence: Evidence, kind: type[LayerRecord]) -> Iterator[tuple[Source, str]]:
    """Yield the runs with records of a kind, and their names if there are several."""
    sources = list(evidence.of(kind))
    names = [""]
    if len(sources) > 1:
        names = labels([source.name for source in sources])
    yield from zip(sources, names, strict=False)


def _make_gate_field(evidence: Evidence, layers: Sequence[str]) -> Field:
    worst: dict[str, Status] = {}
    for verdict in evidence.verdicts:
        if verdict.layer is not None:
            earlier = worst.get(verdict.layer, verdict.status)
            worst[verdict.layer] = min(earlier, verdict.status, key=WORST_FIRST.index)

    def together(positions: Sequence[int]) -> Status | None:
        names = [layers[position] for position in positions]
        statuses = [worst[layer] for layer in names if layer in worst]
        return min(statuses, key=WORST_FIRST.index, default=None)

    about = "worst verdict of the gate on this layer"
    return Field("g", "gate", about, "", tuple(map(worst.get, layers)), together, main=True)


def _pool_together(
    shown: Shown, records: Mapping[str, Any], layers: Sequence[str], positions: Sequence[int]
) -> Value:
    """Return the pooled value of a column over the layers at these positions; None
    without records.
    """
    names = [layers[position] for position in positions]
    group = [records[layer] for layer in names if layer in records]
    return pooled_value(shown, group) if group else None
