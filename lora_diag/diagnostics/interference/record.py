"""Records of ``interference``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.records.base import (
    Guard,
    LayerRecord,
    Norm,
    Ratio,
    Record,
    Share,
    Shown,
    count_texts,
    value_at,
)
from lora_diag.records.vocabulary import Agreement, Resolution

Relation = Literal["apart", "share", "reinforce", "cancel", "noise"]

# Overlaps are shown at the measured rank nearest to this.
_SHOWN_RANK = 8


def _pool_ranks(path: str) -> Callable[[Sequence[Any]], float | None]:
    """Return a function for the upper median of the ranks at ``path``; null counts as larger than
    any rank.
    """

    def pool(records: Sequence[Any]) -> float | None:
        """Return the upper median of the ranks; None if it is null."""
        ranks = [value_at(record, path) for record in records]
        middle = sorted(math.inf if rank is None else rank for rank in ranks)[len(ranks) // 2]
        return None if middle == math.inf else middle

    return pool


class EnergyOverlap(Record):
    """Fraction of one update's energy in the column space of the other's r largest directions.

    Args:
        second_in_first: ‖U_1ᵀΔW_2‖_F² / ‖ΔW_2‖_F², U_1 the r largest left singular vectors of ΔW_1.
        first_in_second: ‖U_2ᵀΔW_1‖_F² / ‖ΔW_1‖_F².
        random_first: Mean of ``second_in_first`` for a random U_1: its columns over ``out``.
        random_second: The same for ``first_in_second``.
    """

    second_in_first: Share
    first_in_second: Share
    random_first: Share
    random_second: Share


class Interference(LayerRecord):
    """Comparison of two updates of one layer.

    Tables are by rank r, up to the larger number of directions of the two; if all ranks are above,
    by the smallest.

    Args:
        layer: The weight's name in BASE, or in the adapters without a BASE.
        shape: ``(out, in)``.
        first: Path of the input with ΔW_1.
        second: Path of the input with ΔW_2.
        first_fro: ‖ΔW_1‖_F.
        second_fro: ‖ΔW_2‖_F.
        cosine: Cosine of the angle between the updates, ⟨ΔW_1, ΔW_2⟩ / (‖ΔW_1‖‖ΔW_2‖).
        cosine_random: 1/√(out·in), its root mean square for a randomly rotated ΔW_2.
        columns: Principal angles between the spaces of the r largest left singular vectors.
        rows: The same for right singular vectors.
        energy: Energy-weighted overlap of the column spaces.
        relation: Relation of the two updates. ``apart``: the spaces overlap no more than random
            ones, and the cosine is small; the updates can be added. ``share``: they overlap, and
            the cosine is small; compare losses of the merge. ``reinforce``: they point the same
            way, so that the sum is longer than either; scale it down. ``cancel``: they oppose each
            other, so that the sum loses part of both; do not merge this layer with equal weights.
            ``noise``: an update is not resolved. See ``metrics.subspaces.classify_relation``.
    """

    key: ClassVar[tuple[str, ...]] = ("layer", "first", "second")
    part_label: ClassVar[str] = "{first} × {second}"
    table: ClassVar[tuple[Shown | str, ...]] = (
        "cosine",
        Shown(
            "column_space.overlap",
            "col space",
            "Overlap of the column spaces",
            share=True,
            terminal=True,
            chance="column_space.random",
        ),
        Shown(
            "row_space.overlap",
            "row space",
            "Overlap of the row spaces",
            share=True,
            drop=2,
            terminal=True,
            chance="row_space.random",
        ),
        Shown(
            "energy_overlap.first_in_second",
            "1 in 2",
            "Fraction of the first update's energy in the column space of the second",
            share=True,
            drop=3,
            form="percent",
            terminal=True,
            detail=True,
        ),
        Shown(
            "energy_overlap.second_in_first",
            "2 in 1",
            "Fraction of the second update's energy in the column space of the first",
            share=True,
            drop=4,
            form="percent",
            terminal=True,
            detail=True,
        ),
    )
    record: Literal["interference"] = "interference"
    layer: str
    shape: tuple[int, int]
    first: str
    second: str
    first_fro: Norm
    second_fro: Norm
    cosine: Annotated[
        float, Shown(main=True, pool=lambda records: round(pooled_cosine(records), 4))
    ]
    cosine_random: float
    columns: dict[str, Agreement]
    rows: dict[str, Agreement]
    energy: dict[str, EnergyOverlap]
    relation: Annotated[
        Relation,
        Shown(main=True, pool=lambda records: count_texts([record.relation for record in records])),
    ]

    @classmethod
    def shown_of(cls, settings: Mapping[str, Any], records: Sequence[Any]) -> tuple[Shown, ...]:
        """Return how a run's records are shown; headings include the rank at which spaces are
        compared.
        """
        rank = _choose_shown_rank({key for record in records for key in record.columns})
        return tuple(
            replace(field, title=f"{field.title} {rank}")
            if field.path.endswith("_space.overlap")
            else field
            for field in cls.shown
        )

    @property
    def column_space(self) -> Agreement:
        """``columns`` at the measured rank that is nearest to 8."""
        return self.columns[_choose_shown_rank(self.columns)]

    @property
    def row_space(self) -> Agreement:
        """``rows`` at the measured rank that is nearest to 8."""
        return self.rows[_choose_shown_rank(self.rows)]

    @property
    def energy_overlap(self) -> EnergyOverlap:
        """``energy`` at the measured rank that is nearest to 8."""
        return self.energy[_choose_shown_rank(self.energy)]


def _choose_shown_rank(ranks: Iterable[str]) -> str:
    """Return the measured rank that is nearest to 8, the smaller of two."""
    return min(ranks, key=lambda rank: (abs(int(rank) - _SHOWN_RANK), int(rank)))


def pooled_cosine(records: Sequence[Interference]) -> float:
    """Return the cosine of two updates over several layers, as if they were one matrix."""
    first = math.hypot(*(record.first_fro for record in records))
    second = math.hypot(*(record.second_fro for record in records))
    inner_product = math.fsum(
        record.cosine * record.first_fro * record.second_fro for record in records
    )
    return inner_product / first / second


class MergeLoss(Record):
    """Distance of a merge M from the sum S of the updates.

    Args:
        residual: ‖S − M‖_F / ‖S‖_F.
        norm_ratio: ‖M‖_F / ‖S‖_F.
        cosine: ⟨S, M⟩ / (‖S‖‖M‖); null for M = 0.
        best_scale: c = ⟨S, M⟩ / ‖M‖², the factor that minimizes ‖S − cM‖; null for M = 0.
        residual_best_scale: ‖S − cM‖_F / ‖S‖_F; null for M = 0.
    """

    residual: Ratio
    norm_ratio: Ratio
    cosine: float | None
    best_scale: float | None
    residual_best_scale: Ratio | None


class Union(LayerRecord):
    """All updates of one layer together: S = Σ w_k ΔW_k, and the loss of merging them.

    Tables are by energy fraction (``0.9``), by merge (``linear``) or by rank (``16``). The norms
    and spectra of the parts include the weights w_k. Fields that need two updates are null if fewer
    change the layer or, except ``energy_ratio``, if S = 0; tables are then empty or have null
    values.

    Args:
        layer: The weight's name in BASE, or in the adapters without a BASE.
        shape: ``(out, in)``.
        updates: Paths of the inputs that change the layer.
        ranks: Columns of their factors; null for updates without factors.
        fro: ‖S‖_F.
        base_fro: Null: BASE is not measured.
        parts_fro: ‖w_kΔW_k‖_F.
        spectrum: Spectrum of S; its ``rank_at`` is the rank of an adapter that holds the sum.
        parts_rank_at: Σ_k of the ranks at which the single updates reach an energy fraction.
        additive: ``rank_at`` of S over ``parts_rank_at``: 1 if every direction is needed, 1/K for K
            equal updates.
        parts_effective_rank: Σ_k of the effective ranks.
        additive_effective: Effective rank of the sum over the sum of the updates' effective ranks.
        rank_for_all: Smallest r for which the best rank-r approximation of S keeps a fraction f of
            *every* update k: ‖U_rᵀΔW_kV_r‖² ≥ f·‖ΔW_k‖²; null if none does, because the spaces of S
            do not contain every update (the updates cancel, or the rank of S is too small).
        weakest_kept: Smallest fraction that an update keeps, ‖U_rᵀΔW_kV_r‖²/‖ΔW_k‖², at r =
            ``rank_at`` of S.
        energy_ratio: Energy of the sum over the sum of the updates' energies, ‖S‖² / Σ‖w_kΔW_k‖²: 1
            for orthogonal updates, K for K equal ones, below 1 if they cancel.
        sti: Singular task interference ‖(UᵀU − I)Σ(VᵀV − I)‖_1, entries summed, of the directions
            of each update up to the largest requested rank.
        sti_relative: Singular task interference: 0 for orthogonal updates, 1 for two equal ones. It
            is ``sti`` over the sum of the singular values in it.
        sti_random: Estimate of ``sti_relative`` for random directions with normal entries.
        alignment: Mean subspace alignment ratio of the updates with the sum. The mean of
            ``alignments``.
        alignments: Subspace alignment ratios ‖U_MU_MᵀΔW_k‖_F / ‖ΔW_k‖_F, U_M the left singular
            vectors of S that leave at most 5% of ‖S‖_F.
        alignment_rank: Number of these vectors.
        alignment_random: √(alignment_rank / out), for random directions.
        sign_conflicts: Fraction of the entries changed by several updates in which they differ in
            sign; null without such an entry and, as the three below, with a density of 0.
        sign_conflicts_random: The same for random signs: ½ for two updates.
        trimmed_conflicts: Fraction of the largest entries of several updates that differ in sign.
            As many are compared as TIES keeps; null if no two updates share such an entry.
        trimmed_conflicts_random: ``trimmed_conflicts`` for random signs.
        merges: Distance of merges from S. ``cat``: factors side by side. ``linear``, ``ties``:
            results of PEFT's add_weighted_adapter, which merges A and B separately. ``ties_dense``:
            TIES on ΔW itself. Null if a merge does not exist (no factors, an unknown scale or one
            of 0; except for ``cat``, different ranks or a negative scale), and for TIES with a
            density of 0.
        recompressed: ‖S − S_r‖_F / ‖S‖_F of the best merge of rank r, PEFT's ``svd``.
    """

    table: ClassVar[tuple[Shown | str, ...]] = (
        Shown(
            "parts_rank_at.0.9",
            "separate",
            "Sum of the ranks at which each update has 90% of its energy",
            pool=_pool_ranks("parts_rank_at.0.9"),
            terminal=True,
        ),
        Shown(
            "spectrum.rank_at.0.9",
            "sum r@90%",
            "Rank at which the sum of the updates has 90% of its energy",
            main=True,
            pool=_pool_ranks("spectrum.rank_at.0.9"),
            head="sum 90%",
        ),
        Shown(
            "additive.0.9",
            "additive",
            "Rank of the sum over the sum of the updates' ranks: 1 if every direction is needed",
            axis="rank of the sum over ranks of the updates, at 90%",
            main=True,
        ),
        Shown(
            "rank_for_all.0.9",
            "every r@90%",
            "Smallest rank at which the truncated sum keeps 90% of every update; empty if none "
            "does",
            pool=_pool_ranks("rank_for_all.0.9"),
            head="all 90%",
            terminal=True,
        ),
        Shown(
            "rank_for_all.0.99",
            "every r@99%",
            "The same for 99% of every update",
            pool=_pool_ranks("rank_for_all.0.99"),
            drop=2,
            head="all 99%",
            terminal=True,
        ),
        "additive_effective",
        "energy_ratio",
        "trimmed_conflicts",
        "alignment",
    )
    guards: ClassVar[tuple[Guard, ...]] = (
        Guard(
            "spectrum.rank_at.0.9",
            "higher",
            "the sum of the updates needs more rank than before: a merge of the usual rank loses "
            "more of it",
        ),
    )
    record: Literal["union"] = "union"
    layer: str
    shape: tuple[int, int]
    updates: tuple[str, ...]
    ranks: tuple[int | None, ...]
    fro: Norm
    base_fro: Norm | None = None
    parts_fro: tuple[Norm, ...]
    spectrum: Spectrum
    parts_rank_at: dict[str, int]
    additive: dict[str, float | None]
    parts_effective_rank: float
    additive_effective: Annotated[
        float | None,
        Shown(
            title="additive, effective", axis="effective rank of the sum over those of the updates"
        ),
    ]
    rank_for_all: dict[str, int | None] = Field(default_factory=dict)
    weakest_kept: dict[str, Share | None] = Field(default_factory=dict)
    energy_ratio: Annotated[
        float | None,
        Shown(title="‖S‖²/Σ‖ΔW‖²", axis="‖ΣΔW_k‖² / Σ‖ΔW_k‖²", drop=3, head="‖S‖²", terminal=True),
    ]
    sti: float | None = None
    sti_relative: Annotated[
        float | None, Shown(title="STI", share=True, drop=6, terminal=True, chance="sti_random")
    ] = None
    sti_random: float | None = None
    alignment: Annotated[
        Share | None, Shown(title="aligned", drop=5, terminal=True, chance="alignment_random")
    ] = None
    alignments: tuple[float, ...] = ()
    alignment_rank: int | None = None
    alignment_random: Share | None = None
    sign_conflicts: Share | None = None
    sign_conflicts_random: Share | None = None
    trimmed_conflicts: Annotated[
        Share | None,
        Shown(
            title="sign conflicts",
            drop=4,
            head="signs",
            terminal=True,
            chance="trimmed_conflicts_random",
        ),
    ] = None
    trimmed_conflicts_random: Share | None = None
    merges: dict[str, MergeLoss | None] = Field(default_factory=dict)
    recompressed: dict[str, float | None] = Field(default_factory=dict)

    @property
    def resolution(self) -> Resolution:
        """Resolution of S under the rounding of the files."""
        return self.spectrum.resolution
