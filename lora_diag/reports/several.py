"""What a report says of several updates, of intruder dimensions and of fleets: the command's own lines and tables.

Both reports, HTML and Markdown, take their sections from here. Names come out ``safe``, as the terminal has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lora_diag.planning.evidence import Evidence, Source
from lora_diag.reports.columns import Grid
from lora_diag.reports.fleet import fleet_grids, fleet_lines, pairs_of
from lora_diag.reports.interference import interference_grids, interference_lines
from lora_diag.reports.intruders import intruders_grids, intruders_lines
from lora_diag.reports.lines import called
from lora_diag.reports.text import safe
from lora_diag.results import Results

# What the list of runs says anyway.
_ELSEWHERE = {"Compared", "Left out", "Adapters"}

# So many updates are named in a title.
_NAMED = 4


@dataclass(frozen=True, slots=True)
class Section:
    """What one run says.

    Args:
        title: Of what it is.
        lines: Word and sentence; a sentence may have several lines.
        grids: Its tables.
        figures: Names of the figures that belong to it; of several runs of a command, to the first.
    """

    title: str
    lines: tuple[tuple[str, str], ...]
    grids: tuple[Grid, ...]
    figures: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Kind:
    """How the results of a command become a section."""

    lines: Callable[[Results[Any]], list[tuple[str, str]]]
    grids: Callable[[Results[Any]], list[Grid]]
    figures: tuple[str, ...]


# The command of a run, and what its section has. One entry a command.
SEVERAL = {
    "interference": _Kind(interference_lines, interference_grids, ("angles", "union")),
    "intruders": _Kind(intruders_lines, intruders_grids, ("intruders",)),
    "spectrum --adapters": _Kind(
        lambda results: fleet_lines(results, pairs_of(results)),
        lambda results: fleet_grids(results, pairs_of(results)),
        ("fleet",),
    ),
}


def sections_of(evidence: Evidence) -> list[Section]:
    """Return a section for each such run, in the order in which the user named them."""
    found = []
    drawn: set[str] = set()
    for source in evidence.sources:
        command = source.results.run.command
        kind = SEVERAL.get(command)
        if kind is None:
            continue
        lines = tuple((word, text) for word, text in kind.lines(source.results) if word not in _ELSEWHERE)
        grids = tuple(grid for grid in kind.grids(source.results) if grid.names)
        found.append(Section(_title(source), lines, grids, () if command in drawn else kind.figures))
        drawn.add(command)
    return found


def named_of(source: Source) -> str:
    """Return what such a run is of: its updates, or how many adapters."""
    run = source.results.run
    updates = [side.path for side in run.inputs if side.role != "base"]
    if run.command == "spectrum --adapters" or len(updates) > _NAMED:
        return f"{len(updates)} {'adapters' if run.command == 'spectrum --adapters' else 'updates'}"
    return " + ".join(called(updates)) or safe(source.name)


def _title(source: Source) -> str:
    words = {"interference": "Several updates", "intruders": "Intruder dimensions", "spectrum --adapters": "A fleet"}
    return f"{words[source.results.run.command]}: {named_of(source)}"
