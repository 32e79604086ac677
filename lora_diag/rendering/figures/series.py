"""What is compared in a figure, and what was asked of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, Generic, TypeVar

from lora_diag.records import LayerRecord, Probe, Results, Run, WholeRecord
from lora_diag.records.vocabulary import METRIC_NAMES, metric_of
from lora_diag.rendering.figures.style import name_of

R = TypeVar("R", bound=LayerRecord | WholeRecord)

# Kinds of records of a whole run that no figure is made of.
_NOT_DRAWN = {"certificate", "verdict"}

# Roles of inputs that are texts or stand for one; what a run is of are the models.
_TEXTS = {"data", "eval", "shifted", "activations"}


@dataclass(frozen=True, slots=True)
class Series(Generic[R]):
    """The records of one side of a comparison: of one results file, or of one adapter in it."""

    label: str
    records: tuple[R, ...]
    whole: tuple[WholeRecord, ...] = ()
    run: Run | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """What a user may ask of a figure; each figure reads what concerns it.

    Args:
        per: ``layer`` or ``type``: one line, bar or row a layer, or all layers of a module type together.
        field: Of a heat map, dotted; None for the one that says most.
        rank: Of ``overlap``, where several were measured; None for 8, or else the smallest.
    """

    per: str = "layer"
    field: str | None = None
    rank: int | None = None


def series_of(results: Sequence[Results[Any]], labels: Sequence[str] = ()) -> tuple[Series[Any], ...]:
    """Return one series a results file and kind of record in it, named as asked or by what was compared."""
    metrics = [metric_of(one) if any(r.record == "spectrum" for r in one) else "" for one in results]
    if len({*metrics} - {""}) > 1:
        own = {
            metric: _named([r.run for r, m in zip(results, metrics, strict=True) if m == metric]) for metric in metrics
        }
        names = [name_of(label) for label in labels] or [own[metric].pop(0) for metric in metrics]
        told = (f", {METRIC_NAMES[metric]}" if metric else "" for metric in metrics)
        names = [f"{name}{metric}" for name, metric in zip(names, told, strict=True)]
    else:
        names = [name_of(label) for label in labels] or _named([one.run for one in results])
    return tuple(
        Series(name, tuple(record for record in drawn(one) if kind_of(record) == kind), one.whole, one.run)
        for name, one in zip(names, results, strict=True)
        for kind in dict.fromkeys(map(kind_of, drawn(one))) or [None]
    )


def drawn(results: Results[Any]) -> tuple[Any, ...]:
    """Return the records that figures are made of: those of layers, and those of probes."""
    return (*results.layers, *(one for one in results.whole if one.record not in _NOT_DRAWN))


def kind_of(record: LayerRecord | WholeRecord) -> str:
    """Return the kind of a record as figures ask for it: of a probe's, which probe."""
    return record.probe if isinstance(record, Probe) else record.record


def _named(runs: Sequence[Run]) -> list[str]:
    """Name runs by what they measured, as shortly as tells those of one command apart; no figure draws two commands."""
    by_command: dict[tuple[str, object], list[int]] = {}
    for place, run in enumerate(runs):
        metric = run.settings.get("metric") if run.command == "spectrum" else None  # ``series_of`` adds it to the name
        by_command.setdefault((run.command, metric), []).append(place)
    found: dict[int, str] = {}
    for places in by_command.values():
        found.update(zip(places, _told_apart([runs[place] for place in places]), strict=True))
    return [found[place] for place in range(len(runs))]


def _told_apart(runs: Sequence[Run]) -> list[str]:
    if len(runs) == 1:
        return [_inputs(runs[0])]
    for names in ([_inputs(run, last=True) for run in runs], [_inputs(run) for run in runs], _settings(runs)):
        if len(set(names)) == len(names):
            return names
    return [f"{_inputs(run, last=True)} ({number})" for number, run in enumerate(runs, 1)]


def _settings(runs: Sequence[Run]) -> list[str]:
    """Return the settings in which runs differ, such as ``params 40000``."""
    named = dict.fromkeys(key for run in runs for key in run.settings)
    keys = [key for key in named if len({str(run.settings.get(key)) for run in runs}) > 1]
    told = [[(key, run.settings.get(key)) for key in keys] for run in runs]
    return [name_of(", ".join(f"{k} {v}" for k, v in pairs if v is not None) or "as by default") for pairs in told]


def _inputs(run: Run, last: bool = False) -> str:
    """Return the names of what was compared, such as ``base → full_ft``."""
    names = [base_name(side.path) for side in run.inputs if side.role not in _TEXTS]
    if not names:
        return name_of(run.command)
    if run.command == "interference":
        return " + ".join(base_name(side.path) for side in run.inputs if side.role != "base")
    if len(names) > 3 and not last:  # of several adapters, what they are held against
        names = [base_name(side.path) for side in run.inputs if side.role in {"base", "tuned"}] or names[-1:]
    return names[-1] if last else " → ".join(names)


def base_name(path: str) -> str:
    """Return the last part of a path, as it is drawn."""
    return name_of(PurePath(path).name or path)


def by_adapter(series: Sequence[Series[Any]]) -> tuple[Series[Any], ...]:
    """Split series of ``residual`` by the adapters that were held against the update."""
    return _split(series, lambda record: (record.adapter,))


def by_pair(series: Sequence[Series[Any]]) -> tuple[Series[Any], ...]:
    """Split series of ``interference`` by the two updates."""
    return _split(series, lambda record: (record.first, record.second))


def _split(series: Sequence[Series[Any]], paths_of: Callable[[Any], tuple[str, ...]]) -> tuple[Series[Any], ...]:
    """Split series by the inputs that their records name."""
    found = []
    for one in series:
        parts = [
            Series(
                " × ".join(map(base_name, paths)), tuple(record for record in one.records if paths_of(record) == paths)
            )
            for paths in dict.fromkeys(map(paths_of, one.records))
        ]
        found += [replace(part, label=f"{one.label}: {part.label}") for part in parts] if len(series) > 1 else parts
    counts = Counter(one.label for one in found)
    return tuple(
        replace(one, label=f"{one.label} ({number})") if counts[one.label] > 1 else one
        for number, one in enumerate(found, 1)
    )


def by_step(series: Sequence[Series[Any]], rank: int | None) -> tuple[Series[Any], ...]:
    """Split series of ``overlap`` by step, at one rank: where there are many, the first, the middle and the last."""
    found = []
    for one in series:
        ranks = sorted({record.rank for record in one.records})
        chosen = rank if rank is not None else 8 if 8 in ranks else ranks[0]
        steps = sorted({record.step for record in one.records})
        shown = steps if len(steps) <= 4 else [steps[0], steps[len(steps) // 2], steps[-1]]
        for step in shown:
            records = tuple(record for record in one.records if record.step == step and record.rank == chosen)
            whose = f"{one.label}, " if len(series) > 1 else ""
            found.append(Series(f"{whose}step {step}, r = {chosen}", records))
    return tuple(part for part in found if part.records)


def subject_of(series: Sequence[Series[Any]]) -> str:
    """Return how a subtitle begins: with the run's name, if it is one and has one."""
    return f"{series[0].label}; " if len(series) == 1 and series[0].label else ""


def owner_of(one: Series[Any], series: Sequence[Series[Any]]) -> str:
    """Return what is put before a name of one of several runs."""
    return f"{one.label}: " if len(series) > 1 else ""


def rank_absent(known: Collection[int], options: Options) -> str | None:
    """Return why records cannot be drawn at the rank of the options: it was not measured."""
    if options.rank is None or options.rank in known:
        return None
    return f"rank {options.rank} was not measured; there are {', '.join(map(str, sorted(known)))}"
