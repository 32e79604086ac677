"""What held-out losses say of adapters, of ranks and of truncations: the evidence that leads, where there is some.

Knows probe records only. A difference of two losses counts where it is more than two of its paired standard errors.
Sets that the user named as shifted are another question and are asked apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from lora_diag.probes.outputs.contest import KEPT, Contest, contests_of, gains
from lora_diag.probes.sweep.verdict import Swept, swept_of
from lora_diag.records import Probe
from lora_diag.records.probe import main_sets
from lora_diag.reports.evidence import Evidence, Source


@dataclass(frozen=True, slots=True)
class SweptRun(Swept):
    """What a sweep comes to, and which run it is.

    Args:
        source: The run.
    """

    source: Source


@dataclass(frozen=True, slots=True)
class Compressed:
    """The smallest rank of the update itself that keeps most of its gain.

    Args:
        source: The run.
        rank: r.
        records: At that rank, one a set.
        without: What r = 0 keeps on the set where it keeps most: the share of norms, biases, embeddings and head.
    """

    source: Source
    rank: int
    records: tuple[Probe, ...]
    without: float | None


def of(evidence: Evidence, probe: str) -> Iterator[tuple[Source, list[Probe]]]:
    """Yield the runs of one probe, with its records."""
    for source in evidence.sources:
        records = [record for record in source.results.whole if isinstance(record, Probe) and record.probe == probe]
        if records:
            yield source, records


def contests(evidence: Evidence) -> list[Contest]:
    """Return every adapter that was compared with a full fine-tune by its losses."""
    return [contest for _, records in of(evidence, "outputs") for contest in contests_of(records)]


def swept(evidence: Evidence) -> SweptRun | None:
    """Return what the first sweep comes to; None without one, or where none of its runs says anything."""
    for source, _ in of(evidence, "sweep"):
        if (found := swept_of(source.results)) is not None:
            return SweptRun(**{each.name: getattr(found, each.name) for each in fields(found)}, source=source)
    return None


def compressed(evidence: Evidence) -> Compressed | None:
    """Return the smallest rank at which truncating all layers keeps most of TUNED's gain on every set; None if none."""
    for source, records in of(evidence, "truncation"):
        settings = source.results.run.settings
        if settings.get("layers") or settings.get("exclude"):
            continue
        together = [record for record in records if record.layer is None and record.module_type is None]
        sets = main_sets(together)
        bases = {record.set: record for record in together if record.subject == "base"}
        if any(gains(bases.get(name)) is None for name in sets):
            continue
        cut = [record for record in together if record.subject == "truncated" and record.set in sets]
        zero = [record.kept for record in cut if record.rank == 0 and record.kept is not None]
        for rank in sorted({record.rank for record in cut if record.rank}):
            at = tuple(record for record in cut if record.rank == rank)
            if len(at) == len(sets) and all(record.kept is not None and record.kept >= KEPT for record in at):
                return Compressed(source, rank, at, max(zero, default=None))
    return None
