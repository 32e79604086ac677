"""The records of several runs, combined: what they say about one full fine-tune and its adapters.

Uses records only, independent of presentation; gives no rank if the files do not resolve one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple, TypeVar

from lora_diag.diagnostics.residual.record import Residual
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.metrics.energy import curve_at
from lora_diag.probes.outputs.show import (
    AdapterContest,
    choose_adapters,
    contests_of,
    deciding_sets,
)
from lora_diag.probes.sweep.verdict import Swept, swept_of
from lora_diag.records import Probe, Results
from lora_diag.records.names import part_of
from lora_diag.records.verdict import Verdict

# Default rank without a measured adapter: the default of PEFT.
DEFAULT_RANK = 8

Matrix = TypeVar("Matrix", Spectrum, Residual)


def format_minute(made: str) -> str:
    """Return a time in the form of ``Run.made`` for a reader, without seconds; empty if it is."""
    return f"{made[:16].replace('T', ' ')} UTC" if made else ""


@dataclass(frozen=True, slots=True)
class Source:
    """A run and the origin of its records.

    Args:
        name: The results file, as in a command.
        results: Its records.
    """

    name: str
    results: Results[Any]

    @property
    def made(self) -> str:
        """Start of the run as text; empty if the file does not give it."""
        return format_minute(self.results.run.made)

    def by_layer(self, kind: type[Any]) -> dict[str, Any]:
        """Return the records of one kind by layer."""
        return {record.layer: record for record in self.results if isinstance(record, kind)}

    def paths(self, role: str = "") -> list[str]:
        """Return the paths of all inputs of a role; without one, of all inputs."""
        inputs = self.results.run.inputs
        return [item.path for item in inputs if role in {"", item.role}]

    @property
    def count(self) -> int:
        """Number of its records of layers; without any, of those about the run as a whole."""
        return len(self.results) or len(self.results.whole)


class RankCapacity(NamedTuple):
    """The energy of one layer's update within a rank.

    Args:
        layer: The weight's name in BASE.
        rank: The adapter's rank there, or ``DEFAULT_RANK``.
        kept: C(rank) in [0, 1]: upper bound on the fraction of ‖ΔW‖² for updates of this rank.
    """

    layer: str
    rank: int
    kept: float


@dataclass(frozen=True)
class Evidence:
    """The records of several runs.

    Args:
        sources: The runs, in the given order.
    """

    sources: tuple[Source, ...]

    def of(self, kind: type[Any]) -> Iterator[Source]:
        """Yield the runs whose layers have records of one kind."""
        for source in self.sources:
            if any(isinstance(record, kind) for record in source.results):
                yield source

    def of_command(self, command: str) -> list[Source]:
        """Return the runs of a command."""
        return [source for source in self.sources if source.results.run.command == command]

    def losses(self, *probes: str) -> Iterator[tuple[Source, list[Probe]]]:
        """Yield the runs with records of some probes, with these records."""
        for source in self.sources:
            of_probes = source.results.whole_of(Probe)
            records = [record for record in of_probes if record.probe in probes]
            if records:
                yield source, records

    def path_of(self, role: str, placeholder: str = "") -> str:
        """Return the path of the first input of a role in any run, else the placeholder, else the
        role in capitals.
        """
        for source in self.sources:
            for path in source.paths(role):
                return path
        return placeholder or role.upper()

    def finished(self) -> Evidence:
        """Return the evidence without unfinished runs, which lack layers."""
        return Evidence(tuple(source for source in self.sources if source.results.end is not None))

    def groups(self) -> list[Evidence]:
        """Return the evidence for each full fine-tune, with the runs that belong to none, such as
        sweeps.
        """
        ids_of = [(source, _identify_tuned(source)) for source in self.sources]
        fine_tunes: list[set[str]] = []  # paths and fingerprints of each
        for _, ids in ids_of:
            matching = next((known for known in fine_tunes if known & ids), None)
            if matching is not None:
                matching |= ids
            elif ids:
                fine_tunes.append(set(ids))
        if len(fine_tunes) < 2:
            return [self]
        groups = []
        for known in fine_tunes:
            sources = tuple(source for source, ids in ids_of if not ids or ids & known)
            groups.append(Evidence(sources))
        return groups

    @cached_property
    def update(self) -> Source | None:
        """The first spectrum of a full update, in the weights' metric; None without one.

        Not the spectrum of an adapter, whose rank is a setting, nor one in another metric, which
        does not describe norms and placement.
        """
        for source in self.of(Spectrum):
            for record in source.results:
                is_full = record.method != "factored" and record.source == "update"
                if is_full and record.metric == "weights":
                    return source
        return None

    @cached_property
    def changed(self) -> tuple[Spectrum, ...]:
        """Spectra of ``update``: the changed matrices outside embeddings and head."""
        if self.update is None:
            return ()
        return _select_matrices([record for record in self.update.results if record.fro > 0])

    @cached_property
    def resolved(self) -> tuple[Spectrum, ...]:
        """The resolved ones of ``changed``; empty if fewer than half are resolved."""
        return _select_resolved(self.changed)

    @cached_property
    def adapters(self) -> dict[str, tuple[Residual, ...]]:
        """Records of every adapter, by its path: all tensors that the full fine-tune changed."""
        by_path: dict[str, dict[str, Residual]] = {}
        for source in self.of(Residual):
            for record in source.results:
                if isinstance(record, Residual) and record.role == "adapter" and record.fro > 0:
                    by_path.setdefault(record.adapter, {}).setdefault(record.layer, record)
        return {path: tuple(records.values()) for path, records in by_path.items()}

    @cached_property
    def compared(self) -> dict[str, tuple[Residual, ...]]:
        """Resolved matrices of every adapter outside embeddings and head; empty if fewer than half
        are resolved.
        """
        return {
            path: _select_resolved(_select_matrices(records))
            for path, records in self.adapters.items()
        }

    @cached_property
    def ranks(self) -> dict[str, int]:
        """The rank of every compared adapter that has one rank."""
        rank_by_path = {}
        for path, records in self.compared.items():
            ranks = {record.rank for record in records if record.rank}
            if len(ranks) == 1:
                rank_by_path[path] = ranks.pop()
        return rank_by_path

    @cached_property
    def capacities(self) -> tuple[RankCapacity, ...]:
        """Energy within the largest rank of any adapter, by layer; within ``DEFAULT_RANK`` without
        an adapter.

        Layers that no adapter changes are not counted.
        """
        by_layer: dict[str, RankCapacity] = {}
        # Of one layer, the largest rank is last.
        for record in sorted(self.adapted, key=lambda record: record.rank or 0):
            if record.epsilon_min is not None:
                kept = 1 - record.epsilon_min**2
                by_layer[record.layer] = RankCapacity(record.layer, record.rank or 0, kept)
        if by_layer:
            return tuple(by_layer.values())
        capacities = []
        for spectrum in self.resolved:
            energy = energy_at(spectrum, DEFAULT_RANK)
            if energy is not None:
                capacities.append(RankCapacity(spectrum.layer, DEFAULT_RANK, energy))
        return tuple(capacities)

    @cached_property
    def adapted(self) -> tuple[Residual, ...]:
        """Those of ``compared`` that an adapter changes."""
        records = chain.from_iterable(self.compared.values())
        return tuple(record for record in records if record.rank)

    @cached_property
    def contests(self) -> list[AdapterContest]:
        """The comparison of every adapter with a full fine-tune by losses."""
        contests: list[AdapterContest] = []
        for _, records in self.losses("outputs"):
            contests += contests_of(records)
        return contests

    @cached_property
    def sweep(self) -> tuple[Source, Swept] | None:
        """The first sweep with a verdict; None without one."""
        for source, _ in self.losses("sweep"):
            swept = swept_of(source.results)
            if swept is not None and swept.verdict.outcome != "no verdict":
                return source, swept
        return None

    @cached_property
    def insufficient_rank(self) -> int:
        """The highest rank of an adapter that is significantly worse than the full fine-tune; 0
        without one.
        """
        worse = [contest.name for contest in self.contests if contest.outcome == "worse"]
        return max((self.ranks.get(name, 0) for name in worse), default=0)

    @cached_property
    def higher_rank_is_worse(self) -> bool:
        """Whether an adapter of a higher rank is significantly worse than one of a lower rank."""
        for _, records in self.losses("outputs"):
            sets = deciding_sets(records)
            for choice in choose_adapters([record for record in records if record.set in sets]):
                best_rank = self.ranks.get(choice.best, math.inf)
                for rival in choice.rivals:
                    if rival.worse and self.ranks.get(rival.name, 0) > best_rank:
                        return True
        return False

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """Verdicts of all gates."""
        by_source = [source.results.whole_of(Verdict) for source in self.sources]
        return tuple(chain.from_iterable(by_source))


def _select_matrices(records: Sequence[Matrix]) -> tuple[Matrix, ...]:
    """Return the records of matrices outside embeddings and head."""
    matrices = [record for record in records if len(record.shape) == 2]
    return tuple(record for record in matrices if part_of(record.layer) == "matrices")


def _select_resolved(records: Sequence[Matrix]) -> tuple[Matrix, ...]:
    """Return the resolved records; empty if fewer than half are resolved."""
    resolved = tuple(
        record
        for record in records
        if record.resolution and record.resolution.verdict == "resolved"
    )
    return resolved if 2 * len(resolved) >= len(records) else ()


def _identify_tuned(source: Source) -> set[str]:
    """Return path and fingerprint of the fine-tune of a run; empty without one or with several."""
    tuned = [item for item in source.results.run.inputs if item.role == "tuned"]
    if len(tuned) != 1:
        return set()
    return {tuned[0].path, tuned[0].fingerprint} - {""}


def energy_at(record: Spectrum, rank: int) -> float | None:
    """Return C(r) = Σ_{i≤r}σ_i² / ‖ΔW‖²; None for a zero update and beyond incomplete values.

    Example:
        >>> from types import SimpleNamespace
        >>> round(
        ...     energy_at(
        ...         SimpleNamespace(s=(2.0, 1.0, 1.0), fro=6**0.5, complete=True, energy={}), 1
        ...     ),
        ...     6,
        ... )
        0.666667
    """
    measured = record.energy.get(str(rank))
    if measured is not None or record.fro == 0:
        return measured
    if rank > len(record.s):
        return 1.0 if record.complete else None
    return curve_at(record.s, record.fro, record.complete, [rank])[0]
