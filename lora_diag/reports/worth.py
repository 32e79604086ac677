"""What held-out losses say of adapters, of ranks and of truncations: the evidence that leads, where there is some.

Knows probe records only. A difference of two losses counts where it is more than two of its paired standard errors.
Sets that the user named as shifted are another question and are asked apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from lora_diag.metrics.equivalence import Estimate, runs_needed
from lora_diag.probes.sensitivity.gains import paired
from lora_diag.probes.sweep.verdict import TOLERANCE, SweepVerdict, verdicts
from lora_diag.records import Probe
from lora_diag.reports.evidence import Evidence, Source

# What keeps so much of the full fine-tune's gain does as well, for what an adapter is meant for.
KEPT = 0.9
# A difference of so many standard errors is one.
ERRORS = 2.0


@dataclass(frozen=True, slots=True)
class Contest:
    """An adapter beside the full fine-tune, on held-out text.

    Args:
        name: The adapter's path.
        records: Its own, one a set; shifted sets are left out unless there is no other.
        word: ``as good`` where, with two standard errors against it, it keeps at least 90% of TUNED's gain on every
            set; ``worse`` where it is not, and worse by more than two standard errors on some set; else ``not known``.
    """

    name: str
    records: tuple[Probe, ...]
    word: Literal["as good", "worse", "not known"]

    @property
    def worst(self) -> Probe:
        """Its record on the set where it falls most behind TUNED."""
        return max(self.records, key=lambda record: record.gap or 0.0)


@dataclass(frozen=True, slots=True)
class Rival:
    """An adapter compared with the best one, on the same sequences.

    Args:
        name: Its path.
        behind: Its loss minus that of the best.
        half: Half the interval of ``behind``: paired by sequence, t with N − 1 degrees of freedom, 95% for all
            rivals together (Bonferroni); None for one sequence.
        sequences: About how many sequences would tell them apart; None where that is known, or takes more than 1000.
    """

    name: str
    behind: float
    half: float | None
    sequences: int | None

    @property
    def worse(self) -> bool:
        """Whether it is shown to be worse than the best."""
        return self.half is not None and self.behind > self.half


@dataclass(frozen=True, slots=True)
class Choice:
    """Which of several adapters to use, by their losses on one set.

    Args:
        set: Its name.
        best: The path of the adapter with the lowest loss.
        rivals: The others, by their losses.
    """

    set: str
    best: str
    rivals: tuple[Rival, ...]

    @property
    def equals(self) -> tuple[Rival, ...]:
        """Those that cannot be told from the best."""
        return tuple(rival for rival in self.rivals if not rival.worse)


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep comes to.

    Args:
        source: The run.
        set: The first set that is not shifted.
        verdict: On it.
        base: BASE's record there.
        shifted: The verdicts on shifted sets, by name.
        ranks: Ranks tried, ascending.
        tolerance: Share of the gain that a smaller rank may lose.
    """

    source: Source
    set: str
    verdict: SweepVerdict
    base: Probe
    shifted: dict[str, SweepVerdict]
    ranks: tuple[int, ...]
    tolerance: float


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


class OnSet(Protocol):
    """What was measured on one text."""

    @property
    def set(self) -> str:
        """Its name."""
        ...

    @property
    def shifted(self) -> bool:
        """Whether it is of another kind than what was trained on."""
        ...


def main_sets(records: Sequence[OnSet]) -> list[str]:
    """Return the sets that decide: those that are not shifted, or all where there is no other."""
    names = list(dict.fromkeys(record.set for record in records if not record.shifted))
    return names or list(dict.fromkeys(record.set for record in records))


def gains(base: Probe | None) -> float | None:
    """Return by how much TUNED is better than BASE; None where that is within two standard errors of nothing."""
    if base is None or base.gap is None or base.gap_error is None or base.gap <= ERRORS * base.gap_error:
        return None
    return base.gap


def contests(evidence: Evidence) -> list[Contest]:
    """Return every adapter that was held against a full fine-tune by its losses."""
    found = []
    for _, records in of(evidence, "outputs"):
        sets = main_sets(records)
        bases = {record.set: record for record in records if record.subject == "base"}
        names = dict.fromkeys(record.name for record in records if record.subject == "adapter")
        for name in names:
            own = tuple(r for r in records if (r.subject, r.name) == ("adapter", name) and r.set in sets)
            if own:
                found.append(Contest(name, own, _judged(own, {each: gains(bases.get(each)) for each in sets})))
    return found


def choices(records: Sequence[Probe]) -> list[Choice]:
    """Return for each set which of the adapters has the lowest loss, and from which it can be told.

    None for sets with fewer than two adapters, and for results that have no losses of sequences.
    """
    found = []
    for name in dict.fromkeys(record.set for record in records):
        mine = [record for record in records if record.set == name]
        counts = next((record.predictions for record in mine if record.subject == "base"), ())
        adapters = sorted((r for r in mine if r.subject == "adapter" and r.nll), key=lambda record: record.nats)
        if len(adapters) > 1 and counts:
            best, *others = adapters
            level = 1 - 0.05 / 2 / len(others)
            found.append(Choice(name, best.name, tuple(_rival(other, best, counts, level) for other in others)))
    return found


def _rival(other: Probe, best: Probe, counts: Sequence[int], level: float) -> Rival:
    gap, error = paired(other.nll, best.nll, counts)
    if error is None:
        return Rival(other.name, gap, None, None)
    half = Estimate(gap, error, len(counts) - 1).half(level)
    needed = None if gap > half else runs_needed(gap, error * len(counts) ** 0.5, 1, level=level)
    return Rival(other.name, gap, half, needed if needed is None else max(needed, len(counts) + 1))


def _judged(own: tuple[Probe, ...], gained: dict[str, float | None]) -> Literal["as good", "worse", "not known"]:
    if any(record.gap is None or record.gap_error is None for record in own):
        return "not known"
    if all(
        (gain := gained[record.set]) is not None
        and (record.gap or 0.0) + ERRORS * (record.gap_error or 0.0) <= (1 - KEPT) * gain
        for record in own
    ):
        return "as good"
    worse = any((record.gap or 0.0) > ERRORS * (record.gap_error or 0.0) for record in own)
    return "worse" if worse else "not known"


def swept(evidence: Evidence) -> Swept | None:
    """Return what the first sweep comes to; None without one, or where none of its runs says anything."""
    for source, records in of(evidence, "sweep"):
        settings = source.results.run.settings
        share = settings.get("tolerance", TOLERANCE)
        found = verdicts(records, settings.get("seed", 0), share)
        own = next((name for name in main_sets(records) if name in found), None)
        if own is not None:
            verdict, base = found[own]
            shifted = {name: other for name, (other, its) in found.items() if its.shifted and name != own}
            ranks = sorted({record.rank for record in records if record.subject == "lora" and record.rank is not None})
            return Swept(source, own, verdict, base, shifted, tuple(ranks), share)
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
