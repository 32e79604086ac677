"""What held-out losses say of adapters, of ranks and of truncations: the evidence that leads, where there is some.

Knows probe records only. A difference of two losses counts where it is more than two of its paired standard errors.
Sets that the user named as shifted are another question and are asked apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from lora_diag.diagnostics.residual.record import Residual
from lora_diag.probes.outputs.choice import choices
from lora_diag.probes.outputs.contest import ERRORS, KEPT, Contest, contests_of, gains
from lora_diag.probes.sweep.verdict import Swept, swept_of
from lora_diag.records import Probe
from lora_diag.records.probe import main_sets
from lora_diag.reports.evidence import Evidence, Source

# An adapter whose ε² is above what its rank allows by less than this is the update, cut to that rank.
CUT = 1e-3


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


@dataclass(frozen=True, slots=True)
class Lost:
    """What losses on the page have measured as worse, which no step advises again.

    Args:
        trained: The highest rank that was trained and is shown to be worse: than a higher rank of a sweep, or than the
            full fine-tune; 0 where there is none.
        cut: The highest rank to which the update was cut, by truncation or as an adapter, and that keeps too little of
            the gain; 0 where there is none.
        more_rank: Whether an adapter of a higher rank is shown to be worse than one of a lower rank.
        tuned: Whether the full fine-tune is shown to be worse than BASE on every set that is not shifted.
        beaten: Whether an adapter is shown to be better than the full fine-tune on every such set.
    """

    trained: int = 0
    cut: int = 0
    more_rank: bool = False
    tuned: bool = False
    beaten: bool = False


def of(evidence: Evidence, probe: str) -> Iterator[tuple[Source, list[Probe]]]:
    """Yield the runs of one probe, with its records."""
    for source in evidence.sources:
        records = [record for record in source.results.whole if isinstance(record, Probe) and record.probe == probe]
        if records:
            yield source, records


def lost(evidence: Evidence) -> Lost:
    """Return what the losses of all runs have measured as worse."""
    ranks = {path: {r.rank for r in records if r.rank} for path, records in evidence.adapted.items()}
    uniform = {path: next(iter(found)) for path, found in ranks.items() if len(found) == 1}
    cut = {path for path, records in evidence.adapted.items() if _is_cut(records)}
    found = contests(evidence)
    worse = {contest.name for contest in found if contest.word == "worse"} & uniform.keys()
    trained = [uniform[path] for path in worse - cut]
    for source, _ in of(evidence, "sweep"):
        if (sweep := swept_of(source.results)) is not None:
            trained += [one.rank for one in sweep.verdict.standings if one.enough == "no"]
    pairs = [
        (choice.best, rival.name)
        for _, records in of(evidence, "outputs")
        for choice in choices([record for record in records if record.set in main_sets(records)])
        for rival in choice.rivals
        if rival.worse
    ]
    return Lost(
        trained=max(trained, default=0),
        cut=max([*(uniform[path] for path in worse & cut), *_cut_short(evidence)], default=0),
        more_rank=any(
            uniform[high] > uniform[low]
            for low, high in pairs
            if {low, high} <= uniform.keys() and not {low, high} & cut
        ),
        tuned=_tuned_is_worse(evidence),
        beaten=any(
            all(r.gap is not None and r.gap_error and r.gap < -ERRORS * r.gap_error for r in contest.records)
            for contest in found
        ),
    )


def _is_cut(records: Sequence[Residual]) -> bool:
    """Whether an adapter is the update itself, cut to its ranks: nothing of ε is due to its direction or scale."""
    excess = [record.excess for record in records if record.rank and record.excess is not None]
    return bool(excess) and max(excess) < CUT


def _cut_short(evidence: Evidence) -> list[int]:
    """Return the ranks at which truncating all layers keeps too little of a gain that is one."""
    found = []
    for _, sets, bases, cut in _truncations(evidence):
        for record in cut:
            if record.rank and record.set in sets and gains(bases.get(record.set)) is not None:
                found += [record.rank] if record.kept is not None and record.kept < KEPT else []
    return found


def _tuned_is_worse(evidence: Evidence) -> bool:
    records = [record for probe in ("outputs", "truncation") for _, each in of(evidence, probe) for record in each]
    bases = [r for r in records if r.subject == "base" and r.layer is None and r.set in main_sets(records)]
    return bool(bases) and all(
        r.gap is not None and r.gap_error is not None and r.gap < -ERRORS * r.gap_error for r in bases
    )


def without_matrices(evidence: Evidence) -> float | None:
    """Return what of the gain norms, biases, embeddings and head bring by themselves, on the set where it is most."""
    shares = [
        record.kept
        for source, sets, bases, cut in _truncations(evidence)
        for record in cut
        if source.results.run.settings.get("rest") == "tuned" and record.rank == 0 and record.kept is not None
        if record.set in sets and gains(bases.get(record.set)) is not None
    ]
    return max(shares, default=None)


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
    for source, sets, bases, every in _truncations(evidence):
        if any(gains(bases.get(name)) is None for name in sets):
            continue
        cut = [record for record in every if record.set in sets]
        zero = [record.kept for record in cut if record.rank == 0 and record.kept is not None]
        for rank in sorted({record.rank for record in cut if record.rank}):
            at = tuple(record for record in cut if record.rank == rank)
            if len(at) == len(sets) and all(record.kept is not None and record.kept >= KEPT for record in at):
                return Compressed(source, rank, at, max(zero, default=None))
    return None


def _truncations(evidence: Evidence) -> Iterator[tuple[Source, list[str], dict[str, Probe], list[Probe]]]:
    """Yield the runs that truncate all layers together: sets that decide, BASE's records by set, the truncated ones."""
    for source, records in of(evidence, "truncation"):
        settings = source.results.run.settings
        if settings.get("layers") or settings.get("exclude"):
            continue
        together = [record for record in records if record.layer is None and record.module_type is None]
        bases = {record.set: record for record in together if record.subject == "base"}
        yield source, main_sets(together), bases, [record for record in together if record.subject == "truncated"]
