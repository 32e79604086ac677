"""The compared series of a figure, their short, distinct labels for legends and titles, and the
figure's options.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from string import Formatter
from typing import Any, Generic, Literal, TypeVar

from lora_diag.errors import UsageError
from lora_diag.records import LayerRecord, Probe, Results, Run, WholeRecord
from lora_diag.records.names import short_names as plain_names
from lora_diag.records.vocabulary import METRIC_NAMES, metrics_of
from lora_diag.rendering.figures.style import name_of

# Groups of roles of the inputs that label a run: the first group that is present. Texts,
# activations and gradients are only means of measurement.
_MEASURED = (("tuned", "adapter", "reference"), ("weights",), ("base",))
# Larger numbers of updates are counted instead of named.
_NAMED = 3
# Maximum length of settings that label a run.
_SETTINGS = 32


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Return labels by path: as in tables, with characters missing in the font escaped."""
    return plain_names(paths, name_of)


def run_name(run: Run, short: Callable[[str], str] | None = None, with_base: bool = True) -> str:
    """Return the label of a run's inputs, such as ``base → full_ft`` or ``sql + chat``; without
    inputs, its command.

    Args:
        run: The run.
        short: Returns the label of a path; default its last part.
        with_base: Whether to name a BASE besides other measured inputs.
    """
    short = short or (lambda path: short_names([path])[path])
    roles = next(
        (roles for roles in _MEASURED if any(side.role in roles for side in run.inputs)), ()
    )
    paths = [side.path for side in run.inputs if side.role in roles]
    measured = " + ".join(map(short, paths)) if len(paths) <= _NAMED else f"{len(paths)} updates"
    base = [
        short(side.path) for side in run.inputs if side.role == "base" and side.role not in roles
    ]
    names = [*base[:1], measured] if with_base or not measured else [measured]
    return " → ".join(filter(None, names)) or name_of(run.command)


def names_of(
    runs: Sequence[Run], metrics: Sequence[Hashable] = (), files: Sequence[str] = ()
) -> list[str]:
    """Return labels of runs, distinct among those of one command and metric.

    The first of these that distinguishes them: measured inputs; with BASE; longer paths; differing
    settings; files; a number. Parts common to several runs come first.

    Args:
        runs: The runs to compare.
        metrics: Metric of each run, which is shown elsewhere.
        files: Path of each run.
    """
    names = list(map(run_name, runs))
    groups: dict[Hashable, list[int]] = {}
    for position, run in enumerate(runs):
        groups.setdefault((run.command, metrics[position] if metrics else ""), []).append(position)
    for group in groups.values():
        if len(group) > 1:
            distinct = _disambiguate(
                [runs[i] for i in group], [files[i] for i in group] if files else []
            )
            for position, name in zip(group, distinct, strict=True):
                names[position] = name
    return names


def _disambiguate(runs: Sequence[Run], files: Sequence[str]) -> list[str]:
    """Return distinct labels of the runs of one command, in the order of ``names_of``."""
    longer = short_names(side.path for run in runs for side in run.inputs).__getitem__
    for short in (None, longer):
        for with_base in (False, True):
            names = [run_name(run, short, with_base) for run in runs]
            if len(set(names)) == len(names):
                return names
    names = [run_name(run, longer, with_base=False) for run in runs]
    labels = list(names)
    for name, count in Counter(names).items():
        if count > 1:
            same = [position for position, other in enumerate(names) if other == name]
            suffixes = _distinguish(
                [runs[i] for i in same], [files[i] for i in same] if files else []
            )
            for position, suffix in zip(same, suffixes, strict=True):
                labels[position] = f"{name}, {suffix}" if count < len(runs) else suffix
    return labels


def _distinguish(runs: Sequence[Run], files: Sequence[str]) -> list[str]:
    """Return labels that distinguish runs of the same inputs."""
    known = dict.fromkeys(key for run in runs for key in run.settings)
    keys = [key for key in known if len({str(run.settings.get(key)) for run in runs}) > 1]
    given = [
        [(key, run.settings[key]) for key in keys if run.settings.get(key) is not None]
        for run in runs
    ]
    settings = [
        ", ".join(_format_setting(*item) for item in items) or "default settings" for items in given
    ]
    if len(set(settings)) == len(runs) and max(map(len, settings)) <= _SETTINGS:
        return [name_of(text) for text in settings]
    stems = short_names(PurePath(file).with_suffix("").as_posix() for file in files)
    if len(stems) == len(runs):
        return list(stems.values())
    return [f"{run_name(run)} ({number})" for number, run in enumerate(runs, 1)]


def _format_setting(key: str, value: Any) -> str:
    """Return a setting as text; an option of the command line as given.

    >>> (
    ...     _format_setting("budget", "--params 40k"),
    ...     _format_setting("top", 8),
    ...     _format_setting("ranks", [4, 8]),
    ... )
    ('--params 40k', 'top 8', 'ranks 4, 8')
    """
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return value if str(value).startswith("--") else f"{key} {value}"


R = TypeVar("R", bound=LayerRecord | WholeRecord)


class UndrawableError(UsageError):
    """Records from which a figure cannot be drawn.

    Args:
        reason: The reason.
        missing: What other records of the figure's command would add: ``records`` of the figure's
            kind, or ``values`` that these do not have; empty if they would not help.
    """

    def __init__(self, reason: str, missing: Literal["", "records", "values"] = "values") -> None:
        super().__init__(reason)
        self.missing: Literal["", "records", "values"] = missing


@dataclass(frozen=True, slots=True)
class Series(Generic[R]):
    """The records of one kind of one side of a comparison: of a results file, or of a part such as
    an adapter.

    Args:
        label: Its label in legends; may be empty.
        records: Its records of this kind.
        whole: Records about its run as a whole; of ``single_series`` all its records.
        run: Its run; None if only records were given.
    """

    label: str
    records: tuple[R, ...]
    whole: tuple[WholeRecord, ...] = ()
    run: Run | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """Options of figures; each figure uses the relevant ones.

    Args:
        per: ``layer`` or ``type``: one line, bar or row per layer, or the layers of a module type
            pooled.
        field: Dotted field of a heat map; None for the default.
        rank: Rank where several were measured; None for 8, else the smallest.
    """

    per: str = "layer"
    field: str | None = None
    rank: int | None = None


def series_of(
    results: Sequence[Results[Any]], labels: Sequence[str] = (), files: Sequence[str] = ()
) -> tuple[Series[Any], ...]:
    """Return one series per results file and kind of record; one without records for a file that
    has none.

    Args:
        results: The results to compare.
        labels: Label of each; by default as ``names_of``.
        files: Path of each, the label of runs that are otherwise identical.
    """
    runs = [item.run for item in results]
    metrics = [next(iter(metrics_of(item)), "") for item in results]
    names = [name_of(label) for label in labels] or names_of(runs, metrics, files)
    if len({*metrics} - {""}) > 1:
        metric = (f", {METRIC_NAMES[metric]}" if metric else "" for metric in metrics)
        names = [f"{name}{suffix}" for name, suffix in zip(names, metric, strict=True)]
    series = []
    for name, item in zip(names, results, strict=True):
        by_kind: dict[str, list[Any]] = {}
        for record in drawable_records(item):
            by_kind.setdefault(kind_of(record), []).append(record)
        series += [
            Series(name, tuple(records), item.whole, item.run)
            for records in by_kind.values() or [()]
        ]
    return tuple(series)


def single_series(results: Results[Any] | Iterable[Any], kind: str) -> Series[Any]:
    """Return the records of a kind as a series without a label.

    Args:
        results: Results of a run, or its records.
        kind: The kind, as in ``kind_of``; empty for all.
    """
    records = drawable_records(results) if isinstance(results, Results) else tuple(results)
    of_kind = tuple(record for record in records if kind in {"", kind_of(record)})
    return Series("", of_kind, records, results.run if isinstance(results, Results) else None)


def drawable_records(results: Results[Any]) -> tuple[Any, ...]:
    """Return the records that figures may draw: of layers and of the whole run."""
    return (*results.layers, *results.whole)


def kind_of(record: LayerRecord | WholeRecord) -> str:
    """Return the kind of a record for figures; for a probe's record, the probe."""
    return record.probe if isinstance(record, Probe) else record.record


def split_series(series: Sequence[Series[Any]], options: Options) -> tuple[Series[Any], ...]:
    """Split series whose kind of records has several per layer, labelled as the kind declares
    (``part_label``).

    Of several ranks, one is drawn; of more than four other numbers, such as steps, the first, the
    middle and the last. A label starts with that of the run if the runs differ in their inputs or
    labels would be the same.
    """
    pattern = series[0].records[0].part_label if series else ""
    if not pattern:
        return tuple(series)
    fields = [field for _, field, _, _ in Formatter().parse(pattern) if field]
    short = short_names(
        value
        for item in series
        for record in item.records
        for field in fields
        if isinstance(value := getattr(record, field), str)
    )
    parts = []
    for item in series:
        records = item.records
        if "rank" in fields:
            rank = choose_rank({record.rank for record in records}, options)
            records = tuple(record for record in records if record.rank == rank)
        groups: dict[tuple[Any, ...], list[Any]] = {}
        for record in records:
            groups.setdefault(tuple(getattr(record, field) for field in fields), []).append(record)
        if len(groups) > 4 and any(isinstance(value, int) for value in next(iter(groups))):
            steps = sorted(groups)
            groups = {step: groups[step] for step in (steps[0], steps[len(steps) // 2], steps[-1])}
        for values, group in groups.items():
            label = pattern.format(
                **{field: short.get(v, v) for field, v in zip(fields, values, strict=True)}
            )
            parts.append((item, replace(item, label=label, records=tuple(group))))
    several = len({run_name(item.run) if item.run else "" for item in series}) > 1
    counts = Counter(part.label for _, part in parts)
    return tuple(
        replace(part, label=f"{item.label}: {part.label}")
        if several or counts[part.label] > 1
        else part
        for item, part in parts
    )


def choose_rank(measured: Collection[int], options: Options) -> int:
    """Return the rank to draw: the requested one, else 8 if measured, else the smallest.

    Raises:
        UndrawableError: The requested rank was not measured.
    """
    if options.rank is not None and options.rank not in measured:
        ranks = ", ".join(map(str, sorted(measured)))
        raise UndrawableError(f"rank {options.rank} was not measured; use one of {ranks}")
    return options.rank if options.rank is not None else 8 if 8 in measured else min(measured)


def subject_of(series: Sequence[Series[Any]]) -> str:
    """Return the start of a caption: the label of the run, or the inputs that all runs share; else
    empty.
    """
    if len(series) == 1:
        return f"{series[0].label}; " if series[0].label else ""
    measured = {run_name(item.run) if item.run is not None else "" for item in series}
    return f"{measured.pop()}; " if len(measured) == 1 and measured != {""} else ""


def owner_of(item: Series[Any], series: Sequence[Series[Any]]) -> str:
    """Return the prefix of a name in one of several runs; empty for a single run."""
    return f"{item.label}: " if len(series) > 1 else ""
