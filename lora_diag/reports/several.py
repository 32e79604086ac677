"""What a report says of losses, merges, several updates, intruder dimensions and fleets: the commands' summaries.

Both reports, HTML and Markdown, take their sections from here. Names come out ``safe``, as the terminal has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lora_diag.diagnostics.fleet.summary import fleet_grids, fleet_lines, pairs_of
from lora_diag.diagnostics.interference.summary import interference_grids, interference_lines
from lora_diag.diagnostics.intruders.summary import intruders_grids, intruders_lines
from lora_diag.diagnostics.verify_merge.summary import merge_grids, merge_lines
from lora_diag.probes.curvature.summary import curvature_grids, curvature_lines
from lora_diag.probes.fisher.summary import fisher_grids, fisher_lines
from lora_diag.probes.intrinsic.summary import intrinsic_grids, intrinsic_lines
from lora_diag.probes.outputs.summary import outputs_grids, outputs_lines
from lora_diag.probes.sensitivity.summary import sensitivity_grids, sensitivity_lines
from lora_diag.probes.sweep.summary import sweep_grids, sweep_lines
from lora_diag.probes.truncation.summary import truncation_grids, truncation_lines
from lora_diag.records import Results
from lora_diag.rendering.columns import Grid
from lora_diag.rendering.lines import called
from lora_diag.rendering.text import safe
from lora_diag.reports.evidence import Evidence, Source

# What the list of runs says anyway.
_ELSEWHERE = {"Compared", "Left out", "Adapters"}

# So many updates are named in a title.
_NAMED = 4

# Roles of inputs that are read and not compared.
_TEXTS = {"data", "eval", "shifted"}


@dataclass(frozen=True, slots=True)
class Section:
    """What one run says.

    Args:
        title: Of what it is.
        lines: Word and sentence; a sentence may have several lines.
        grids: Its tables.
        figures: Names of the figures that belong to it; of several runs of a command, to the first.
        source: The run.
    """

    title: str
    lines: tuple[tuple[str, str], ...]
    grids: tuple[Grid, ...]
    figures: tuple[str, ...]
    source: Source

    @property
    def command(self) -> str:
        """The command that measured it."""
        return self.source.results.run.command


@dataclass(frozen=True, slots=True)
class _Kind:
    """How the results of a command become a section.

    Args:
        title: What they are of, in words.
        figures: That belong to it.
        lines: Its summary.
        grids: Its tables.
    """

    title: str
    figures: tuple[str, ...]
    lines: Callable[[Results[Any]], list[tuple[str, str]]]
    grids: Callable[[Results[Any]], list[Grid]]


# The command of a run, and what its section has. One line a command; losses lead.
SEVERAL = {
    "probe outputs": _Kind("Held-out loss and outputs", ("outputs", "depth"), outputs_lines, outputs_grids),
    "probe sweep": _Kind("Rank sweep", ("sweep",), sweep_lines, sweep_grids),
    "probe truncation": _Kind("Truncated update", ("truncation", "alone"), truncation_lines, truncation_grids),
    "probe sensitivity": _Kind("Layers adapted alone", ("sensitivity",), sensitivity_lines, sensitivity_grids),
    "probe curvature": _Kind(
        "Curvature of the loss", ("curvature",), curvature_lines, lambda results: curvature_grids(results, "layer")
    ),
    "probe intrinsic": _Kind("Intrinsic dimension", ("intrinsic",), intrinsic_lines, intrinsic_grids),
    "probe fisher": _Kind(
        "Fisher of what a rank discards", ("fisher",), fisher_lines, lambda results: fisher_grids(results, "layer")
    ),
    "verify-merge": _Kind("Merge", (), merge_lines, merge_grids),
    "interference": _Kind("Several updates", ("angles", "union"), interference_lines, interference_grids),
    "intruders": _Kind("Intruder dimensions", ("intruders",), intruders_lines, intruders_grids),
    "spectrum --adapters": _Kind(
        "A fleet",
        ("fleet",),
        lambda results: fleet_lines(results, pairs_of(results)),
        lambda results: fleet_grids(results, pairs_of(results)),
    ),
}


def sections_of(evidence: Evidence) -> list[Section]:
    """Return a section for each such run, in the order of ``SEVERAL``; of one command as the user named them."""
    found = []
    drawn: set[str] = set()
    known = [source for source in evidence.sources if source.results.run.command in SEVERAL]
    for source in sorted(known, key=lambda source: list(SEVERAL).index(source.results.run.command)):
        command = source.results.run.command
        kind = SEVERAL[command]
        lines = tuple((word, text) for word, text in kind.lines(source.results) if word not in _ELSEWHERE)
        grids = tuple(grid for grid in kind.grids(source.results) if grid.names)
        figures = () if command in drawn else kind.figures
        found.append(Section(_title(source), lines, grids, figures, source))
        drawn.add(command)
    return found


def is_of_losses(source: Source) -> bool:
    """Say whether a run measured losses of a model."""
    return source.results.run.command.startswith("probe ")


def named_of(source: Source) -> str:
    """Return what such a run is of: its updates, or how many adapters."""
    run = source.results.run
    compared = [side for side in run.inputs if side.role not in _TEXTS]
    updates = [side.path for side in compared if side.role != "base"] or [side.path for side in compared]
    if run.command == "spectrum --adapters" or len(updates) > _NAMED:
        return f"{len(updates)} {'adapters' if run.command == 'spectrum --adapters' else 'updates'}"
    between = " in " if run.command == "verify-merge" else " + "
    return between.join(called(updates)) or safe(source.name)


def _title(source: Source) -> str:
    return f"{SEVERAL[source.results.run.command].title}: {named_of(source)}"
