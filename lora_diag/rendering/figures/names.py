"""Short, distinct labels of runs and their inputs for legends and titles."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import PurePath
from typing import Any

from lora_diag.records import Run
from lora_diag.records.names import short_names as plain_names
from lora_diag.rendering.figures.style import name_of

# Roles of the inputs that label a run; the first present role is used. Texts, activations and gradients are only means
# of measurement.
_MEASURED = (("tuned", "adapter", "reference"), ("weights",), ("base",))
# Commands that measure adapters against TUNED: the run is labelled by TUNED, since adapters have their own records.
_BY_TUNED = {"residual", "probe outputs"}
# Larger numbers of updates are counted instead of named.
_NAMED = 3
# Maximum length of settings that label a run.
_SETTINGS = 32


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Return labels of paths: as in tables, with characters missing in the font escaped."""
    return plain_names(paths, name_of)


def run_name(run: Run, short: Callable[[str], str] | None = None) -> str:
    """Return the label of a run's inputs, such as ``base → full_ft``, ``sql + chat`` or ``base``.

    Args:
        run: The run.
        short: Returns the label of a path; default its last part.
    """
    base, subject = _label_sides(run, short or (lambda path: short_names([path])[path]))
    return " → ".join(filter(None, (base, subject))) or name_of(run.command)


def _label_sides(run: Run, short: Callable[[str], str]) -> tuple[str, str]:
    """Return the labels of BASE, empty if it was the measured input, and of the measured inputs."""
    roles = next((roles for roles in _MEASURED if any(side.role in roles for side in run.inputs)), ())
    paths = [side.path for side in run.inputs if side.role in roles]
    if run.command in _BY_TUNED:
        paths = paths[:1]
    subject = " + ".join(map(short, paths)) if len(paths) <= _NAMED else f"{len(paths)} updates"
    base = [short(side.path) for side in run.inputs if side.role == "base"]
    return (base[0] if base and "base" not in roles else ""), subject


def names_of(runs: Sequence[Run], metrics: Sequence[Hashable] = (), files: Sequence[str] = ()) -> list[str]:
    """Return distinct labels of runs; runs of different commands share no figure and need not differ.

    The first of these that distinguishes the runs of a command: measured inputs; with BASE; longer paths; differing
    settings; files; a number. Parts common to several runs come first.

    Args:
        runs: The runs to compare.
        metrics: Metric of each run, which is shown elsewhere.
        files: Path of each run.
    """
    groups: dict[Hashable, list[int]] = {}
    for position, run in enumerate(runs):
        groups.setdefault((run.command, metrics[position] if metrics else ""), []).append(position)
    names: dict[int, str] = {}
    for positions in groups.values():
        similar_runs = [runs[position] for position in positions]
        read = [files[position] for position in positions] if files else []
        names.update(
            zip(
                positions,
                [run_name(similar_runs[0])] if len(similar_runs) == 1 else _disambiguate(similar_runs, read),
                strict=True,
            )
        )
    return [names[position] for position in range(len(runs))]


def _disambiguate(runs: Sequence[Run], files: Sequence[str]) -> list[str]:
    short = short_names(side.path for run in runs for side in run.inputs)
    ways: list[list[str]] = [
        [_label_sides(run, lambda path: short_names([path])[path])[1] or run_name(run) for run in runs],
        [run_name(run) for run in runs],
        [_label_sides(run, short.__getitem__)[1] or run_name(run) for run in runs],
        [run_name(run, short.__getitem__) for run in runs],
    ]
    for names in ways:
        if len(set(names)) == len(names):
            return names
    names = ways[2]
    result = list(names)
    for name in dict.fromkeys(names):
        same_name = [position for position, other in enumerate(names) if other == name]
        if len(same_name) > 1:
            read = [files[position] for position in same_name] if files else []
            for position, suffix in zip(
                same_name, _distinguish([runs[position] for position in same_name], read), strict=True
            ):
                result[position] = f"{name}, {suffix}" if len(same_name) < len(runs) else suffix
    return result


def _distinguish(runs: Sequence[Run], files: Sequence[str]) -> list[str]:
    """Return labels that distinguish runs of the same inputs."""
    keys = [
        key
        for key in dict.fromkeys(key for run in runs for key in run.settings)
        if len({str(run.settings.get(key)) for run in runs}) > 1
    ]
    settings = [
        ", ".join(_format_setting(key, run.settings[key]) for key in keys if run.settings.get(key) is not None)
        for run in runs
    ]
    settings = [text or "default settings" for text in settings]
    if len(set(settings)) == len(runs) and max(map(len, settings)) <= _SETTINGS:
        return [name_of(text) for text in settings]
    stems = short_names(PurePath(file).with_suffix("").as_posix() for file in files)
    if len(stems) == len(runs):
        return list(stems.values())
    return [f"{run_name(run)} ({number})" for number, run in enumerate(runs, 1)]


def _format_setting(key: str, value: Any) -> str:
    """Return a setting as text; an option of the command line as given.

    >>> _format_setting("budget", "--params 40k"), _format_setting("top", 8), _format_setting("ranks", [4, 8])
    ('--params 40k', 'top 8', 'ranks 4, 8')
    """
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return value if str(value).startswith("--") else f"{key} {value}"
