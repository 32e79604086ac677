"""Records → columns: one value a layer, whatever run it comes from. The page's heat map and table show these.

A field's values are those of the records, unrounded; the few that are computed say so in ``about``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lora_diag.metrics import pooled
from lora_diag.planning.evidence import Evidence, Source
from lora_diag.reports.merge import ORDER
from lora_diag.reports.residual import limits_of
from lora_diag.reports.subject import EPSILON, labels
from lora_diag.reports.tracks import tracks
from lora_diag.reports.verdict import WORST_FIRST
from lora_diag.results import Allocation, Fleet, Intruders, Merge, Overlap, Residual, Spectrum, Union
from lora_diag.results.spectrum import METRIC_NAMES, NORMS, metric_of
from lora_diag.results.verdict import Status

Value = float | int | str | None

# What tells columns in another metric than the weights' from those in it.
_METRIC = {"data": "data", "kfac": "K-FAC"}


@dataclass(frozen=True, slots=True)
class Field:
    """One column.

    Args:
        id: Short and unique in a page, part of its address.
        title: Its heading.
        about: What it is, in one sentence.
        group: Which run or adapter it belongs to; empty where only one could be meant.
        values: One a layer; None where it does not exist.
        share: Whether it lies in [0, 1].
        main: Whether it is shown before anybody asks for all columns.
        together: Gives the value of several layers taken as one, by their places, as the command's own table does; None
            where a median does.
    """

    id: str
    title: str
    about: str
    group: str
    values: tuple[Value, ...]
    share: bool = False
    main: bool = False
    together: Callable[[Sequence[int]], Value] | None = None

    @property
    def is_number(self) -> bool:
        """Whether a heat map can show it."""
        return not any(isinstance(value, str) for value in self.values)


@dataclass(frozen=True, slots=True)
class _Kind:
    """A column that every run of one command has: id, title, what it is, and how a record gives it."""

    id: str
    title: str
    about: str
    value: Callable[[Any], Value]
    share: bool = False
    main: bool = False
    together: Callable[[Sequence[Any]], Value] | None = None


def layers_of(evidence: Evidence) -> tuple[str, ...]:
    """Return the names of all layers of all runs, each once, in the order of the files; an adapter is none."""
    return tuple(
        dict.fromkeys(
            record.layer for source in evidence.sources for record in source.results if not isinstance(record, Fleet)
        )
    )


def fields_of(evidence: Evidence, layers: Sequence[str]) -> list[Field]:
    """Return every column that the runs give, without those that are empty."""
    found = [
        *_spectrum_fields(evidence, layers),
        *_residual_fields(evidence, layers),
        *_overlap_fields(evidence, layers),
        *_plain_fields(evidence, layers),
        *_gate_fields(evidence, layers),
    ]
    return [field for field in found if any(value is not None for value in field.values)]


def _spectrum_fields(evidence: Evidence, layers: Sequence[str]) -> Iterable[Field]:
    sources = list(evidence.of(Spectrum))
    for place, source in enumerate(sources):
        records = {record.layer: record for record in source.results if isinstance(record, Spectrum)}
        kinds = _spectrum_kinds(source)
        if evidence.update is not None and source is not evidence.update:
            kinds = [replace(kind, main=False) for kind in kinds]
        metric = metric_of(source.results)
        group = filter(None, (_group(sources, source), _METRIC.get(metric)))
        yield from _columns(f"s{place}", ", ".join(group), kinds, records, layers)


def _spectrum_kinds(source: Source) -> list[_Kind]:
    metric = metric_of(source.results)
    update, weights = NORMS[metric]
    of = "" if metric == "weights" else f" in {METRIC_NAMES[metric]}, {update}"
    ranks = source.results.run.settings["ranks"]
    return [
        _Kind("relative", f"{update}/{weights}",
              f"Frobenius norm of the update over that of the base weight (computed){of}",
              lambda r: r.relative, main=True),
        _Kind("fro", update, f"Frobenius norm of the update{of}", lambda r: r.fro),
        *(_energy(rank, of, main=rank in {8, 16, 64} or len(ranks) < 4) for rank in ranks),
        _Kind("r90", "r@90%", f"smallest rank that keeps 90% of the energy{of}; empty beyond the values kept",
              lambda r: r.rank_at["0.9"], main=True),
        _Kind("r95", "r@95%", f"smallest rank that keeps 95% of the energy{of}", lambda r: r.rank_at["0.95"]),
        _Kind("r99", "r@99%", f"smallest rank that keeps 99% of the energy{of}; the first to count rounding noise",
              lambda r: r.rank_at["0.99"]),
        _Kind("stable", "stable rank", f"{update}_F²/σ_1²", lambda r: r.stable_rank),
        _Kind("effective", "effective rank", f"exp of the entropy of σ_i²/Σσ²{of}", lambda r: r.effective_rank),
        _Kind("signal", "signal", "singular values above the rounding noise of the files",
              lambda r: r.resolution.signal_rank, main=True),
        _Kind("unchanged", "unchanged", "share of the entries that are bit-identical in both files",
              lambda r: r.resolution.unchanged, share=True),
        _Kind("verdict", "files", "whether the files can show this update", lambda r: r.resolution.verdict, main=True),
    ]  # fmt: skip


def _energy(rank: int, of: str, main: bool) -> _Kind:
    about = (
        f"share of the energy Σσ²{of} in the {rank} largest singular values: the most a rank-{rank} update could carry"
    )
    return _Kind(f"c{rank}", f"C({rank})", about, lambda r: r.energy[str(rank)], share=True, main=main)


_RESIDUAL = (
    _Kind("rank", "rank", "columns of the adapter's factors; 0 where it leaves the layer alone", lambda r: r.rank),
    _Kind("epsilon", "ε", f"‖ΔW − X‖/‖ΔW‖. {EPSILON}", lambda r: r.epsilon, main=True,
          together=lambda rs: pooled(rs).epsilon),
    _Kind("floor", "ε floor", "√(1 − C(r)), less its error: no update of this rank has a smaller ε",
          lambda r: r.least_epsilon, main=True, together=lambda rs: pooled(rs).epsilon_min if _ranked(rs) else None),
    _Kind("excess", "excess", "ε² − floor²: what direction and scale cost", lambda r: r.excess),
    _Kind("cosine", "cosine", "of the angle between the adapter's update and the full one", lambda r: r.cosine,
          main=True, together=lambda rs: pooled(rs).cosine),
    _Kind("ratio", "‖X‖/‖ΔW‖", "norm of the adapter's update over that of the full one", lambda r: r.norm_ratio),
    _Kind("scale", "best scale", "factor by which the adapter would come nearest", lambda r: r.best_scale),
    _Kind("limit", "limited by", "what ε is mostly made of", lambda r: r.limited_by, main=True, together=limits_of),
)  # fmt: skip


def _ranked(records: Sequence[Residual]) -> bool:
    """Whether any rank is known: else there is no floor."""
    return any(record.epsilon_min is not None for record in records)


def _residual_fields(evidence: Evidence, layers: Sequence[str]) -> Iterable[Field]:
    adapters: dict[str, dict[str, Residual]] = {}
    for source in evidence.of(Residual):
        for record in source.results:
            adapters.setdefault(record.adapter, {}).setdefault(record.layer, record)
    for place, (label, records) in enumerate(zip(labels(list(adapters)), adapters.values(), strict=True)):
        yield from _columns(f"a{place}", label, _RESIDUAL, records, layers)


def _overlap_fields(evidence: Evidence, layers: Sequence[str]) -> Iterable[Field]:
    """Give the last step; the page's curves show all of them."""
    sources = list(evidence.of(Overlap))
    for place, source in enumerate(sources):
        shown = tracks(source.results)
        ranks = sorted({track.rank for track in shown})
        at = f"at the last step, r={ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
        kinds = (
            _Kind("kappa", "κ", f"‖UᵀGV‖/‖G‖ {at}; direction, not quality", lambda r: r.kappa, share=True, main=True),
            _Kind("kappa_random", "κ random", "what a random subspace gives", lambda r: r.kappa_random, share=True),
            _Kind("tangent", "tangent", f"share of ‖G‖ that an adapter there reaches to first order, {at}",
                  lambda r: r.tangent, share=True, main=True),
            _Kind("tangent_random", "tangent random", "what a random subspace gives", lambda r: r.tangent_random,
                  share=True, main=True),
        )  # fmt: skip
        records = {track.layer: track.last for track in shown}
        yield from _columns(f"o{place}", _group(sources, source), kinds, records, layers)


_ALLOCATION = (
    _Kind("rank", "rank given", "by the allocation", lambda r: r.rank, main=True),
    _Kind("kept", "kept", "share of the layer's energy that this rank can carry", lambda r: r.kept, share=True),
    _Kind("params", "parameters", "r·(out + in)", lambda r: r.params),
)

_UNION = (
    _Kind("sum", "sum r@90%", "rank at which the sum of the updates has 90% of its energy",
          lambda r: r.spectrum.rank_at["0.9"], main=True),
    _Kind("additive", "additive", "that over the sum of the updates' own ranks: 1 if every direction is needed",
          lambda r: r.additive["0.9"], main=True),
    _Kind("every", "every r@90%", "rank at which the sum, cut to it, keeps 90% of every update; empty if none does",
          lambda r: r.rank_for_all.get("0.9")),
    _Kind("ratio", "‖S‖²/Σ‖ΔW‖²", "1 for orthogonal updates, above if they reinforce, below if they cancel",
          lambda r: r.energy_ratio),
)  # fmt: skip

_INTRUDERS = (
    _Kind("count", "intruders", "of the largest directions, those that the base does not have",
          lambda r: r.intruders, main=True),
    _Kind("lowest", "similarity", "of the direction that is least like any of the base", lambda r: r.similarity_lowest,
          share=True),
)  # fmt: skip

_MERGE = (
    _Kind("status", "merge", "whether MERGED holds W + ΔW there; of several layers the worst", lambda r: r.status,
          main=True, together=lambda records: min((r.status for r in records), key=ORDER.index)),
    _Kind("differing", "differing", "share of the entries that no rounding of W + ΔW explains",
          lambda r: r.differing_share, share=True, main=True),
    _Kind("scale", "arrived c", "how much of ΔW arrived: ⟨M − W, ΔW⟩/‖ΔW‖²", lambda r: r.scale, main=True),
    _Kind("unchanged", "unchanged", "share of the entries with M = W", lambda r: r.unchanged, share=True),
)  # fmt: skip


# Records whose columns are always the same: the first letter of the columns' ids, and the columns.
_PLAIN: dict[type[Any], tuple[str, tuple[_Kind, ...]]] = {
    Allocation: ("r", _ALLOCATION),
    Union: ("u", _UNION),
    Intruders: ("i", _INTRUDERS),
    Merge: ("m", _MERGE),
}


def _plain_fields(evidence: Evidence, layers: Sequence[str]) -> Iterable[Field]:
    for record, (letter, kinds) in _PLAIN.items():
        sources = list(evidence.of(record))
        for place, source in enumerate(sources):
            records = {each.layer: each for each in source.results if isinstance(each, record)}
            yield from _columns(f"{letter}{place}", _group(sources, source), kinds, records, layers)


def _gate_fields(evidence: Evidence, layers: Sequence[str]) -> Iterable[Field]:
    worst: dict[str, Status] = {}
    for verdict in evidence.verdicts:
        if verdict.layer is not None:
            known = worst.get(verdict.layer, verdict.status)
            worst[verdict.layer] = min(known, verdict.status, key=WORST_FIRST.index)
    yield Field("g", "gate", "worst verdict of the gate on this layer", "", tuple(map(worst.get, layers)), main=True)


def _columns(
    prefix: str, group: str, kinds: Iterable[_Kind], records: Mapping[str, Any], layers: Sequence[str]
) -> Iterable[Field]:
    for kind in kinds:
        values = tuple(kind.value(records[layer]) if layer in records else None for layer in layers)
        together = partial(_together, kind.together, records, layers) if kind.together else None
        yield Field(f"{prefix}.{kind.id}", kind.title, kind.about, group, values, kind.share, kind.main, together)


def _together(
    pool: Callable[[Sequence[Any]], Value], records: Mapping[str, Any], layers: Sequence[str], places: Sequence[int]
) -> Value:
    found = [records[layers[place]] for place in places if layers[place] in records]
    return pool(found) if found else None


def _group(sources: Sequence[Source], source: Source) -> str:
    """Name the run only where several could be meant."""
    return labels([each.name for each in sources])[list(sources).index(source)] if len(sources) > 1 else ""
