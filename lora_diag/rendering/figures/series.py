"""The compared series of a figure, and its options."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from lora_diag.records import LayerRecord, Probe, Results, Run, WholeRecord
from lora_diag.records.vocabulary import METRIC_NAMES, metric_of
from lora_diag.rendering.figures.names import names_of, run_name, short_names
from lora_diag.rendering.figures.style import name_of

R = TypeVar("R", bound=LayerRecord | WholeRecord)

# Kinds of records of a whole run that have no figure.
_NOT_DRAWN = {"certificate", "verdict"}


@dataclass(frozen=True, slots=True)
class Series(Generic[R]):
    """The records of one side of a comparison: of one results file, or of one adapter in it."""

    label: str
    records: tuple[R, ...]
    whole: tuple[WholeRecord, ...] = ()
    run: Run | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """Options of figures; each figure uses the relevant ones.

    Args:
        per: ``layer`` or ``type``: one line, bar or row per layer, or the layers of a module type pooled.
        field: Dotted field of a heat map; None for the default.
        rank: Rank of ``overlap`` with several measured ranks; None for 8, else the smallest.
    """

    per: str = "layer"
    field: str | None = None
    rank: int | None = None


def series_of(
    results: Sequence[Results[Any]], labels: Sequence[str] = (), files: Sequence[str] = ()
) -> tuple[Series[Any], ...]:
    """Return one series per results file and kind of record.

    Args:
        results: The results to compare.
        labels: Label of each; default by its inputs.
        files: Path of each, the label of runs that are otherwise identical.
    """
    runs = [item.run for item in results]
    metrics = [metric_of(item) if any(r.record == "spectrum" for r in item) else "" for item in results]
    names = [name_of(label) for label in labels] or names_of(runs, metrics, files)
    if len({*metrics} - {""}) > 1:
        metric = (f", {METRIC_NAMES[metric]}" if metric else "" for metric in metrics)
        names = [f"{name}{suffix}" for name, suffix in zip(names, metric, strict=True)]
    return tuple(
        Series(name, tuple(record for record in drawn(item) if kind_of(record) == kind), item.whole, item.run)
        for name, item in zip(names, results, strict=True)
        for kind in dict.fromkeys(map(kind_of, drawn(item))) or [None]
    )


def drawn(results: Results[Any]) -> tuple[Any, ...]:
    """Return the records that have figures: records of layers and of probes."""
    return (*results.layers, *(item for item in results.whole if item.record not in _NOT_DRAWN))


def kind_of(record: LayerRecord | WholeRecord) -> str:
    """Return the kind of a record for figures; for a probe's record, the probe."""
    return record.probe if isinstance(record, Probe) else record.record


def by_adapter(series: Sequence[Series[Any]]) -> tuple[Series[Any], ...]:
    """Split series of ``residual`` by adapter, labelled with the full update if there are several."""
    several = len({run_name(item.run) for item in series if item.run is not None}) > 1
    return _split(series, lambda record: (record.adapter,), several)


def by_pair(series: Sequence[Series[Any]]) -> tuple[Series[Any], ...]:
    """Split series of ``interference`` by the two updates."""
    return _split(series, lambda record: (record.first, record.second), False)


def by_program(series: Sequence[Series[Any]]) -> tuple[Series[Any], ...]:
    """Split series of ``portability`` by the programs and their versions."""
    split_series = []
    for item in series:
        parts: dict[str, list[Any]] = {}
        for record in item.records:
            parts.setdefault(f"{owner_of(item, series)}{record.consumer} {record.version}", []).append(record)
        split_series += [replace(item, label=label, records=tuple(records)) for label, records in parts.items()]
    return tuple(split_series)


def _split(
    series: Sequence[Series[Any]], paths_of: Callable[[Any], tuple[str, ...]], named: bool
) -> tuple[Series[Any], ...]:
    """Split series by the inputs named in their records, which label the parts; ``named``: also by the run."""
    short = short_names(path for item in series for record in item.records for path in paths_of(record))
    split_series = []
    for item in series:
        parts: dict[tuple[str, ...], list[Any]] = {}
        for record in item.records:
            parts.setdefault(paths_of(record), []).append(record)
        split_series += [
            (item, replace(item, label=" × ".join(short[path] for path in paths), records=tuple(records)))
            for paths, records in parts.items()
        ]
    counts = Counter(part.label for _, part in split_series)
    return tuple(
        replace(part, label=f"{item.label}: {part.label}") if named or counts[part.label] > 1 else part
        for item, part in split_series
    )


def by_step(series: Sequence[Series[Any]], rank: int | None) -> tuple[Series[Any], ...]:
    """Split series of ``overlap`` by step, at one rank; with many steps, only the first, middle and last."""
    split_series = []
    for item in series:
        ranks = sorted({record.rank for record in item.records})
        chosen = rank if rank is not None else 8 if 8 in ranks else ranks[0]
        steps = sorted({record.step for record in item.records})
        shown = steps if len(steps) <= 4 else [steps[0], steps[len(steps) // 2], steps[-1]]
        for step in shown:
            records = tuple(record for record in item.records if record.step == step and record.rank == chosen)
            prefix = f"{item.label}, " if len(series) > 1 else ""
            split_series.append(Series(f"{prefix}step {step}, r = {chosen}", records))
    return tuple(part for part in split_series if part.records)


def subject_of(series: Sequence[Series[Any]]) -> str:
    """Return the start of a subtitle: the label of the run, or the inputs of all runs."""
    if len(series) == 1:
        return f"{series[0].label}; " if series[0].label else ""
    measured = {run_name(item.run) if item.run is not None else "" for item in series}
    return f"{measured.pop()}; " if len(measured) == 1 and measured != {""} else ""


def owner_of(item: Series[Any], series: Sequence[Series[Any]]) -> str:
    """Return the prefix of a name in one of several runs."""
    return f"{item.label}: " if len(series) > 1 else ""


def rank_absent(known: Collection[int], options: Options) -> str | None:
    """Return why records cannot be drawn at the requested rank: it was not measured."""
    if options.rank is None or options.rank in known:
        return None
    return f"rank {options.rank} was not measured; use one of {', '.join(map(str, sorted(known)))}"
