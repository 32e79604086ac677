"""The records of several runs, combined as evidence for findings and advice.

Uses records only, independent of presentation; gives no rank if the files do not resolve one.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

from lora_diag.decisions.gate.record import Verdict
from lora_diag.diagnostics.overlap.record import Overlap
from lora_diag.diagnostics.residual.record import Residual
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.records import LeftOut, Results
from lora_diag.records.names import part_of
from lora_diag.records.vocabulary import METRIC_NAMES, metric_of

# Source of several rules: "LoRA's Low-Rank Assumption: When It Holds, When It Breaks".
ARTICLE = "LoRA's Low-Rank Assumption (2026)"

# Default rank without a measured adapter: the default of PEFT, and the first step of ARTICLE.
DEFAULT_RANK = 8
# Maximum number of adapters and updates that are reported one by one.
MAX_ADAPTERS = 8


def format_minute(made: str) -> str:
    """Return a time in the form of ``Run.made`` for a reader."""
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

    def path_of(self, role: str, placeholder: str = "") -> str:
        """Return the path of the first input of a role; a placeholder in capitals without one."""
        return next(iter(self.paths(role)), placeholder or role.upper())

    def paths(self, role: str) -> list[str]:
        """Return the paths of all inputs of a role."""
        return [side.path for side in self.results.run.inputs if side.role == role]


@dataclass(frozen=True, slots=True)
class Capacity:
    """The energy of one layer's update within a rank.

    Args:
        layer: The weight's name in BASE.
        shape: ``(out, in)``.
        rank: The adapter's rank there, or ``DEFAULT_RANK``.
        kept: C(rank) in [0, 1]: upper bound on the fraction of ‖ΔW‖² for updates of this rank.
        energy: ‖ΔW‖².
    """

    layer: str
    shape: tuple[int, ...]
    rank: int
    kept: float
    energy: float


@dataclass(frozen=True)
class Evidence:
    """The records of several runs, by the questions they answer.

    Args:
        sources: The runs, in the given order.
        about: The adapter in question; None for the first.
    """

    sources: tuple[Source, ...]
    about: str | None = None

    def of(self, kind: type[Any]) -> Iterator[Source]:
        """Yield the runs whose layers have records of one kind."""
        for source in self.sources:
            if any(isinstance(record, kind) for record in source.results):
                yield source

    @cached_property
    def update(self) -> Source | None:
        """The first spectrum of a full update, in the weights' metric.

        Not the spectrum of an adapter, whose rank is a setting, nor one in the data metric, which does not describe
        norms and placement.
        """
        return next((source for source in self.of(Spectrum) if _is_full_update(source.results.layers)), None)

    @cached_property
    def weighted(self) -> tuple[Source, ...]:
        """The spectra in metrics other than that of the weights."""
        return tuple(source for source in self.of(Spectrum) if metric_of(source.results.layers) != "weights")

    @cached_property
    def audit(self) -> Source | None:
        """The first run of ``residual`` among those with the adapter in question."""
        runs = self.of(Residual)
        return next((run for run in runs if self.about is None or self.about in _list_adapters(run)), None)

    @cached_property
    def adapter(self) -> str | None:
        """The path of the adapter in question, or of the first of ``audit``."""
        return self.about or next(iter(_list_adapters(self.audit) if self.audit else ()), None)

    @cached_property
    def adapted(self) -> dict[str, tuple[Residual, ...]]:
        """``residuals`` of every adapter, by its path."""
        named = dict.fromkeys(path for run in self.of(Residual) for path in _list_adapters(run))
        return {path: replace(self, about=path).residuals for path in named}

    @cached_property
    def largest(self) -> tuple[Capacity, ...]:
        """Energy within the largest rank of any adapter, by layer; ``capacities`` without an adapter."""
        by_layer: dict[str, Capacity] = {}
        for path in self.adapted:
            for item in replace(self, about=path).capacities:
                if item.layer not in by_layer or by_layer[item.layer].rank < item.rank:
                    by_layer[item.layer] = item
        whole = {r.layer for records in self.adapted.values() for r in records if (r.rank or 0) >= min(r.shape)}
        return tuple(item for item in by_layer.values() if item.layer not in whole) if by_layer else self.capacities

    def finished(self) -> Evidence:
        """Return the evidence without unfinished runs, which lack layers."""
        return replace(self, sources=tuple(source for source in self.sources if source.results.end is not None))

    def groups(self) -> list[Evidence]:
        """Return the evidence for each full fine-tune, with the runs that belong to none, such as sweeps."""
        sides: list[set[str]] = []  # path and fingerprint of each fine-tune
        for source in self.sources:
            if tuned_ids := _identify_tuned(source):
                matching = next((side for side in sides if side & tuned_ids), None)
                if matching is None:
                    sides.append(matching := set())
                matching |= tuned_ids
        if len(sides) < 2:
            return [self]
        return [
            replace(
                self,
                sources=tuple(s for s in self.sources if not (tuned_ids := _identify_tuned(s)) or tuned_ids & side),
            )
            for side in sides
        ]

    def path_of(self, role: str, placeholder: str = "") -> str:
        """Return the path of the first input of a role in any run; a placeholder in capitals without one."""
        paths = (path for source in self.sources for path in source.paths(role))
        return next(paths, placeholder or role.upper())

    def each(self) -> list[Evidence]:
        """Return the evidence for each adapter, and for each full update except the first; the first of all first."""
        named = list(dict.fromkeys(path for run in self.of(Residual) for path in _list_adapters(run)))
        updates = [run for run in self.of(Spectrum) if _is_full_update(run.results.layers)]
        adapters = [replace(self, about=path) for path in named[1:]]
        return [self, *adapters, *(Evidence((run,)) for run in updates[1:])]

    @cached_property
    def spectra(self) -> tuple[Spectrum, ...]:
        """Spectra of ``update``: the changed matrices outside embeddings and head."""
        records = self.update.results if self.update else ()
        return tuple(record for record in records if record.fro > 0 and part_of(record.layer) == "matrices")

    @cached_property
    def readable(self) -> tuple[Spectrum, ...]:
        """The resolved ones of ``spectra``; empty if fewer than half are resolved."""
        resolved = tuple(record for record in self.spectra if record.resolution.verdict == "resolved")
        return resolved if 2 * len(resolved) >= len(self.spectra) else ()

    @cached_property
    def residuals(self) -> tuple[Residual, ...]:
        """Residuals of ``adapter``: resolved matrices outside embeddings and head that the full fine-tune changed."""
        records = [
            record
            for record in (self.audit.results if self.audit else ())
            if record.adapter == self.adapter
            and record.fro > 0
            and len(record.shape) == 2
            and part_of(record.layer) == "matrices"
        ]
        resolved = [record for record in records if record.resolution and record.resolution.verdict == "resolved"]
        return tuple(resolved) if 2 * len(resolved) >= len(records) else ()

    @cached_property
    def capacities(self) -> tuple[Capacity, ...]:
        """Energy within the adapter's ranks, or within ``DEFAULT_RANK`` without a measured adapter.

        Layers that are not larger than the rank keep everything for any update and are not counted; neither are layers
        that the adapter does not change.
        """
        if self.residuals:
            return tuple(
                Capacity(record.layer, record.shape, record.rank, 1 - record.epsilon_min**2, record.fro**2)
                for record in self.residuals
                if record.rank and record.epsilon_min is not None and record.rank < min(record.shape)
            )
        energies = ((record, energy_at(record, DEFAULT_RANK)) for record in self.readable)
        return tuple(
            Capacity(record.layer, record.shape, DEFAULT_RANK, kept, record.fro**2)
            for record, kept in energies
            if kept is not None and min(record.shape) > DEFAULT_RANK
        )

    @cached_property
    def shares(self) -> dict[str, float] | None:
        """Fractions of the change ‖Δ‖² in ``matrices``, ``vocabulary`` and ``vectors`` (norms, biases).

        None without a full update, without any change, or if only a selection was measured.
        """
        if self.update is None:
            return None
        results = self.update.results
        if any(item.reason in {"not_selected", "non_finite", "memory"} for item in results.left_out):
            return None
        norms = {"matrices": 0.0, "vocabulary": 0.0, "vectors": 0.0}
        for record in results:
            norms[part_of(record.layer)] = math.hypot(norms[part_of(record.layer)], record.fro)
        norms["vectors"] = math.hypot(*(item.fro for item in self.vectors if item.fro is not None))
        total = math.hypot(*norms.values())
        return {part: (norm / total) ** 2 for part, norm in norms.items()} if total else None

    @cached_property
    def vectors(self) -> tuple[LeftOut, ...]:
        """Norms and biases of ``update``."""
        left_out = self.update.results.left_out if self.update else ()
        return tuple(item for item in left_out if item.reason == "vector")

    def missing(self) -> list[tuple[str, str]]:
        """Return missing or unresolved measurements, each with the command that makes it."""
        reasons = []
        if not any(record.record == "probe" for source in self.sources for record in source.results.whole):
            reasons.append(
                (
                    "no held-out loss",
                    f"loradiag probe outputs {self._quote_sides()} --eval HELD_OUT_TEXT -o outputs.jsonl",
                ),
            )
        if self.update is None and self.audit is None:
            metrics_text = ", ".join(
                f"{run.name} is in {METRIC_NAMES[metric_of(run.results.layers)]}" for run in self.weighted
            )
            reasons.append(
                (
                    f"no spectrum of a full fine-tune{f' in the weights: {metrics_text}' if metrics_text else ''}",
                    measure_weights(self.weighted[0])
                    if metrics_text
                    else f"loradiag spectrum {self._quote_sides(0)} -o spectrum.jsonl",
                )
            )
        elif self.update is not None and self.spectra and not self.readable:
            reasons.append(
                (
                    "the files do not resolve the update: most of its matrices are at the rounding noise floor, so "
                    "no rank is recommended; save the fine-tune in float32, or measure the adapter instead of its "
                    "merge",
                    "loradiag spectrum ADAPTER -o adapter.jsonl",
                )
            )
        if self.audit is not None and not self.residuals and self.adapter is not None:
            reasons.append(
                ("ε is measured against rounding noise in most matrices: no conclusions are drawn from it", "")
            )
        if self.audit is None:
            reasons.append(
                ("no adapter was compared", f"loradiag residual {self._quote_sides()} -o residual.jsonl"),
            )
        if not any(self.of(Overlap)):
            reasons.append(
                ("no gradients", f"loradiag overlap {self._quote_sides(0)} GRADIENTS -o overlap.jsonl"),
            )
        return reasons

    def _quote_sides(self, adapters: int = MAX_ADAPTERS) -> str:
        """Return base, full fine-tune and adapters quoted for a shell; placeholders in capitals without a run."""
        named = list(dict.fromkeys(path for source in self.sources for path in source.paths("adapter"))) or ["ADAPTER"]
        return shlex.join([self.path_of("base"), self.path_of("tuned", "FULL_FT"), *named[:adapters]])

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """Verdicts of all gates."""
        return tuple(
            record for source in self.sources for record in source.results.whole if isinstance(record, Verdict)
        )


def _list_adapters(run: Source) -> list[str]:
    """Return the adapters of a run of ``residual``, by their paths."""
    records = (record for record in run.results if isinstance(record, Residual) and record.role == "adapter")
    return list(dict.fromkeys(record.adapter for record in records))


def _identify_tuned(source: Source) -> set[str]:
    """Return path and fingerprint of the fine-tune of a run; empty without one or with several."""
    sides = [side for side in source.results.run.inputs if side.role == "tuned"]
    return {word for side in sides for word in (side.path, side.fingerprint) if word} if len(sides) == 1 else set()


def _is_full_update(records: Sequence[Any]) -> bool:
    spectra = [record for record in records if isinstance(record, Spectrum)]
    return any(
        record.method != "factored" and record.source == "update" and record.metric == "weights" for record in spectra
    )


def measure_weights(weighted: Source) -> str:
    """Return the command that repeats in the weights a measurement in another metric."""
    paths = [shlex.quote(s.path) for s in weighted.results.run.inputs if s.role in {"base", "tuned", "adapter"}]
    return f"loradiag spectrum {' '.join(paths)} -o spectrum.jsonl"


def energy_at(record: Spectrum, rank: int) -> float | None:
    """Return C(r) = Σ_{i≤r}σ_i² / ‖ΔW‖²; None for a zero update and beyond the kept values.

    Example:
        >>> from types import SimpleNamespace
        >>> energy_at(SimpleNamespace(s=(2.0, 1.0, 1.0), fro=6**0.5, complete=True, energy={}), 1)
        0.6666666666666669
    """
    measured = record.energy.get(str(rank))
    if measured is not None or record.fro == 0:
        return measured
    if rank > len(record.s) and not record.complete:
        return None
    return min(1.0, math.fsum((value / record.fro) ** 2 for value in islice(record.s, rank)))
