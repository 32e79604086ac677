"""Evidence from held-out losses on adapters, ranks and truncations.

Uses probe records only. A difference of two losses is significant above two paired standard errors, more with few
sequences. Sets that the user declared as shifted are evaluated separately.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from lora_diag.diagnostics.residual.record import Residual
from lora_diag.probes.outputs.choice import choices
from lora_diag.probes.outputs.contest import (
    SUFFICIENT_SHARE,
    Contest,
    contests_of,
    deciding_sets,
    gains,
    is_tuned_worse,
)
from lora_diag.probes.sweep.verdict import Swept, swept_of
from lora_diag.records import Probe
from lora_diag.records.probe import main_sets
from lora_diag.rendering.losses import gap_half
from lora_diag.reports.evidence import Evidence, Source

# An adapter whose ε² exceeds the lower bound of its rank by less than this is the truncated update.
TRUNCATION_MARGIN = 1e-3


@dataclass(frozen=True, slots=True)
class SweptRun(Swept):
    """The verdict of a sweep, with its run.

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
        records: Records at that rank, one per set.
        without: Largest fraction over sets that r = 0 keeps: the contribution of norms, biases, embeddings and head.
    """

    source: Source
    rank: int
    records: tuple[Probe, ...]
    without: float | None


@dataclass(frozen=True, slots=True)
class RejectedOptions:
    """Options shown to be worse by losses, which are not recommended again.

    Args:
        trained: The highest trained rank that is significantly worse than a higher rank of a sweep or than the full
            fine-tune; 0 if there is none.
        truncated_rank: The highest rank of the truncated update, or of an adapter that equals it, that keeps too
            little of the gain; 0 if there is none.
        more_rank: Whether an adapter of a higher rank is significantly worse than one of a lower rank.
        tuned: Whether the full fine-tune is significantly worse than BASE on every set that is not shifted.
        has_better_adapter: Whether an adapter is significantly better than the full fine-tune on every such set.
    """

    trained: int = 0
    truncated_rank: int = 0
    more_rank: bool = False
    tuned: bool = False
    has_better_adapter: bool = False


def of(evidence: Evidence, probe: str) -> Iterator[tuple[Source, list[Probe]]]:
    """Yield the runs of one probe, with its records."""
    for source in evidence.sources:
        records = [record for record in source.results.whole if isinstance(record, Probe) and record.probe == probe]
        if records:
            yield source, records


def rejected_options(evidence: Evidence) -> RejectedOptions:
    """Return the options that the losses of all runs show to be worse."""
    ranks = {path: {r.rank for r in records if r.rank} for path, records in evidence.adapted.items()}
    uniform = {path: next(iter(path_ranks)) for path, path_ranks in ranks.items() if len(path_ranks) == 1}
    truncated_adapters = {path for path, records in evidence.adapted.items() if _is_truncation(records)}
    all_contests = contests(evidence)
    worse = {contest.name for contest in all_contests if contest.outcome == "worse"} & uniform.keys()
    trained = [uniform[path] for path in worse - truncated_adapters]
    for source, _ in of(evidence, "sweep"):
        if (sweep := swept_of(source.results)) is not None:
            trained += [standing.rank for standing in sweep.verdict.standings if standing.enough == "no"]
    pairs = [
        (choice.best, rival.name)
        for _, records in of(evidence, "outputs")
        for choice in choices([record for record in records if record.set in deciding_sets(records)])
        for rival in choice.rivals
        if rival.worse
    ]
    return RejectedOptions(
        trained=max(trained, default=0),
        truncated_rank=max(
            [*(uniform[path] for path in worse & truncated_adapters), *_find_insufficient_ranks(evidence)], default=0
        ),
        more_rank=any(
            uniform[high] > uniform[low]
            for low, high in pairs
            if {low, high} <= uniform.keys() and not {low, high} & truncated_adapters
        ),
        tuned=_is_tuned_worse(evidence),
        has_better_adapter=any(
            all(r.gap is not None and (half := gap_half(r)) and r.gap < -half for r in contest.records)
            for contest in all_contests
        ),
    )


def _is_truncation(records: Sequence[Residual]) -> bool:
    """Return whether an adapter is the truncated update: no part of ε is due to direction or scale."""
    excess = [record.excess for record in records if record.rank and record.excess is not None]
    return bool(excess) and max(excess) < TRUNCATION_MARGIN


def _find_insufficient_ranks(evidence: Evidence) -> list[int]:
    """Return the ranks at which truncating all layers keeps too little of a significant gain."""
    ranks = []
    for _, sets, bases, truncated in _find_truncations(evidence):
        for record in truncated:
            if record.rank and record.set in sets and gains(bases.get(record.set)) is not None:
                ranks += [record.rank] if record.kept is not None and record.kept < SUFFICIENT_SHARE else []
    return ranks


def _is_tuned_worse(evidence: Evidence) -> bool:
    records = [
        record
        for probe in ("outputs", "truncation")
        for _, run_records in of(evidence, probe)
        for record in run_records
    ]
    bases = [r for r in records if r.subject == "base" and r.layer is None and r.set in main_sets(records)]
    return bool(bases) and all(map(is_tuned_worse, bases))


def without_matrices(evidence: Evidence) -> float | None:
    """Return the largest fraction of the gain over sets due to norms, biases, embeddings and head."""
    fractions = [
        record.kept
        for source, sets, bases, truncated in _find_truncations(evidence)
        for record in truncated
        if source.results.run.settings.get("rest") == "tuned" and record.rank == 0 and record.kept is not None
        if record.set in sets and gains(bases.get(record.set)) is not None
    ]
    return max(fractions, default=None)


def contests(evidence: Evidence) -> list[Contest]:
    """Return the comparison of every adapter with a full fine-tune by losses."""
    return [contest for _, records in of(evidence, "outputs") for contest in contests_of(records)]


def swept(evidence: Evidence) -> SweptRun | None:
    """Return the verdict of the first sweep; None without a conclusive one."""
    for source, _ in of(evidence, "sweep"):
        if (sweep := swept_of(source.results)) is not None:
            return SweptRun(**{field.name: getattr(sweep, field.name) for field in fields(sweep)}, source=source)
    return None


def compressed(evidence: Evidence) -> Compressed | None:
    """Return the smallest rank at which truncating all layers keeps most of TUNED's gain on every set; None if none."""
    for source, sets, bases, joint in _find_truncations(evidence):
        if any(gains(bases.get(name)) is None for name in sets):
            continue
        truncated = [record for record in joint if record.set in sets]
        zero = [record.kept for record in truncated if record.rank == 0 and record.kept is not None]
        for rank in sorted({record.rank for record in truncated if record.rank}):
            at_rank = tuple(record for record in truncated if record.rank == rank)
            if len(at_rank) == len(sets) and all(
                record.kept is not None and record.kept >= SUFFICIENT_SHARE for record in at_rank
            ):
                return Compressed(source, rank, at_rank, max(zero, default=None))
    return None


def _find_truncations(evidence: Evidence) -> Iterator[tuple[Source, list[str], dict[str, Probe], list[Probe]]]:
    """Yield the runs that truncate all layers together: deciding sets, BASE's records by set, the truncated ones."""
    for source, records in of(evidence, "truncation"):
        settings = source.results.run.settings
        if settings.get("layers") or settings.get("exclude"):
            continue
        joint = [record for record in records if record.layer is None and record.module_type is None]
        bases = {record.set: record for record in joint if record.subject == "base"}
        yield (
            source,
            main_sets(joint),
            bases,
            [record for record in joint if record.subject == "truncated"],
        )
