"""Report sections for losses, merges, several updates, intruder dimensions and fleets, from the commands' summaries.

Used by both the HTML and the Markdown report. Names are ``safe``, as in the terminal.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_diag.catalog import feature_of, features
from lora_diag.feature import Feature
from lora_diag.feature import Section as SectionKind
from lora_diag.rendering.columns import Grid
from lora_diag.rendering.lines import short_paths
from lora_diag.rendering.statements import Statement
from lora_diag.rendering.text import safe
from lora_diag.reports.evidence import Evidence, Source

# Statements that the list of runs already contains.
_OTHER_SECTIONS = {"compared", "left_out", "adapters"}

# Maximum number of updates named in a title.
_NAMED = 4

# Roles of inputs that are not compared.
_TEXTS = {"data", "eval", "shifted"}


@dataclass(frozen=True, slots=True)
class Section:
    """The section of one run.

    Args:
        title: Its title.
        kind: Its title without the run's inputs.
        feature: The feature of its records.
        statements: Its statements.
        grids: Its tables.
        figures: Names of its figures; several runs of a command have them in the first section.
        source: The run.
    """

    title: str
    kind: str
    feature: Feature
    statements: tuple[Statement, ...]
    grids: tuple[Grid, ...]
    figures: tuple[str, ...]
    source: Source

    @property
    def command(self) -> str:
        """The command that measured it."""
        return self.source.results.run.command


def section_kind(source: Source) -> SectionKind | None:
    """Return the section declared by a run's feature; None without one."""
    feature = feature_of(source.results.run.command)
    return feature.section if feature else None


def sections_of(evidence: Evidence) -> list[Section]:
    """Return a section for each run whose feature has one, losses first; runs of one command in the given order."""
    sections = []
    drawn: set[str] = set()
    known = [(kind, source) for source in evidence.sources if (kind := section_kind(source)) is not None]
    order = [feature.name for feature in features()]
    for kind, source in sorted(known, key=lambda item: (item[0].order, order.index(item[1].results.run.command))):
        feature = feature_of(source.results.run.command)
        assert feature is not None
        statements: list[Statement] = feature.load(feature.statements)(source.results)
        grids = feature.tables(source.results, kind.per)
        figures = kind.figures or tuple(figure.name for figure in feature.figures)
        sections.append(
            Section(
                f"{kind.title}: {named_of(source)}",
                kind.title,
                feature,
                tuple(statement for statement in statements if statement.key not in _OTHER_SECTIONS),
                tuple(grid for grid in grids if grid.names),
                () if feature.name in drawn else figures,
                source,
            )
        )
        drawn.add(feature.name)
    return sections


def is_of_losses(source: Source) -> bool:
    """Return whether a run measured losses of a model."""
    kind = section_kind(source)
    return kind is not None and kind.losses


def named_of(source: Source) -> str:
    """Return the subject of a run: its updates, or their number."""
    run = source.results.run
    compared = [side for side in run.inputs if side.role not in _TEXTS]
    updates = [side.path for side in compared if side.role != "base"] or [side.path for side in compared]
    if run.command == "spectrum --adapters" or len(updates) > _NAMED:
        return f"{len(updates)} {'adapters' if run.command == 'spectrum --adapters' else 'updates'}"
    between = " in " if run.command == "verify-merge" else " + "
    return between.join(short_paths(updates)) or safe(source.name)
