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
    bases = [side.path for side in run.inputs if side.role == "base"]
    for roles in _MEASURED:
        paths = [side.path for side in run.inputs if side.role in roles]
        if paths:
            break
    else:
        return name_of(run.command)
    if len(paths) > _NAMED:
        measured = f"{len(paths)} updates"
    else:
        measured = " + ".join(map(short, paths))
    if with_base and bases and "base" not in roles:
        return f"{short(bases[0])} → {measured}"
    return measured


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
    metrics = metrics or [""] * len(runs)
    keys = [(run.command, metric) for run, metric in zip(runs, metrics, strict=True)]
    return _relabel(list(map(run_name, runs)), keys, _disambiguate, runs, files)


def _relabel(
    labels: list[str],
    keys: Sequence[Hashable],
    distinguish: Callable[[Sequence[Run], Sequence[str]], list[str]],
    runs: Sequence[Run],
    files: Sequence[str],
) -> list[str]:
    """Return labels of runs, those of several runs of one key as ``distinguish`` returns them."""
    groups: dict[Hashable, list[int]] = {}
    for position, key in enumerate(keys):
        groups.setdefault(key, []).append(position)
    for group in groups.values():
        if len(group) > 1:
            of_group = [runs[position] for position in group]
            their_files = [files[position] for position in group] if files else []
            for position, label in zip(group, distinguish(of_group, their_files), strict=True):
                labels[position] = label
    return labels


def _disambiguate(runs: Sequence[Run], files: Sequence[str]) -> list[str]:
    """Return distinct labels of the runs of one command, in the order of ``names_of``."""
    paths = [side.path for run in runs for side in run.inputs]
    longer = short_names(paths).__getitem__
    for short in (None, longer):
        for with_base in (False, True):
            names = [run_name(run, short, with_base) for run in runs]
            if len(set(names)) == len(names):
                return names
    names = [run_name(run, longer, with_base=False) for run in runs]

    def append_suffix(same: Sequence[Run], their_files: Sequence[str]) -> list[str]:
        suffixes = _distinguish(same, their_files)
        if len(same) == len(runs):
            return suffixes
        name = run_name(same[0], longer, with_base=False)
        return [f"{name}, {suffix}" for suffix in suffixes]

    return _relabel(names, tuple(names), append_suffix, runs, files)


def _distinguish(runs: Sequence[Run], files: Sequence[str]) -> list[str]:
    """Return labels that distinguish runs of the same inputs."""
    known = dict.fromkeys(key for run in runs for key in run.settings)
    keys = [key for key in known if len({str(run.settings.get(key)) for run in runs}) > 1]
    settings = []
    for run in runs:
        given = [key for key in keys if run.settings.get(key) is not None]
        words = [_format_setting(key, run.settings[key]) for key in given]
        settings.append(", ".join(words) or "default settings")
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
        for position, metric in enumerate(metrics):
            if metric:
                names[position] += f", {METRIC_NAMES[metric]}"
    series = []
    for name, item in zip(names, results, strict=True):
        by_kind: dict[str, list[Any]] = {}
        for record in drawable_records(item):
            by_kind.setdefault(kind_of(record), []).append(record)
        for records in by_kind.values() or [[]]:
            series.append(Series(name, tuple(records), item.whole, item.run))
    return tuple(series)


def single_series(results: Results[Any] | Iterable[Any], kind: str) -> Series[Any]:
    """Return the records of a kind as a series without a label.

    Args:
        results: Results of a run, or its records.
        kind: The kind, as in ``kind_of``; empty for all.
    """
    run = None
    if isinstance(results, Results):
        run, results = results.run, drawable_records(results)
    records = tuple(results)
    of_kind = tuple(record for record in records if kind in {"", kind_of(record)})
    return Series("", of_kind, records, run)


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
    records = [record for item in series for record in item.records]
    names = [getattr(record, field) for record in records for field in fields]
    short = short_names(name for name in names if isinstance(name, str))
    parts = []
    for item in series:
        for values, group in _split_records(item, fields, options).items():
            shown = [short.get(value, value) for value in values]
            label = pattern.format(**dict(zip(fields, shown, strict=True)))
            parts.append((item, replace(item, label=label, records=tuple(group))))
    several = len(set(map(_name_run, series))) > 1
    counts = Counter(part.label for _, part in parts)
    labelled = []
    for item, part in parts:
        if several or counts[part.label] > 1:
            part = replace(part, label=f"{item.label}: {part.label}")
        labelled.append(part)
    return tuple(labelled)


def _split_records(
    item: Series[Any], fields: Sequence[str], options: Options
) -> dict[tuple[Any, ...], list[Any]]:
    """Return the records to draw, grouped by the values of fields.

    Raises:
        UndrawableError: The requested rank was not measured.
    """
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
    return groups


def _name_run(item: Series[Any]) -> str:
    """Return the label of the inputs of a series; empty without a run."""
    return run_name(item.run) if item.run is not None else ""


def choose_rank(measured: Collection[int], options: Options) -> int:
    """Return the rank to draw: the requested one, else 8 if measured, else the smallest.

    Raises:
        UndrawableError: The requested rank was not measured.
    """
    if options.rank is None:
        return 8 if 8 in measured else min(measured)
    if options.rank not in measured:
        ranks = ", ".join(map(str, sorted(measured)))
        raise UndrawableError(f"rank {options.rank} was not measured; use one of {ranks}")
    return options.rank


def subject_of(series: Sequence[Series[Any]]) -> str:
    """Return the start of a caption: the label of the run, or the inputs that all runs share; else
    empty.
    """
    names = {series[0].label} if len(series) == 1 else set(map(_name_run, series))
    name = names.pop() if len(names) == 1 else ""
    return f"{name}; " if name else ""


def owner_of(item: Series[Any], series: Sequence[Series[Any]]) -> str:
    """Return the prefix of a name in one of several runs; empty for a single run."""
    return f"{item.label}: " if len(series) > 1 else ""
