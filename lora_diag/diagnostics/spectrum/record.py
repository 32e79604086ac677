"""Records of ``spectrum``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from lora_diag.layers.lineage import COSINE_TO_BASE, Lineage
from lora_diag.records.base import (
    SHAPE,
    Count,
    Guard,
    LayerRecord,
    Norm,
    Record,
    Share,
    Shown,
    value_at,
)
from lora_diag.records.vocabulary import (
    METRIC_NAMES,
    NORMS,
    Hidden,
    Metric,
    Resolution,
    Tail,
    metric_of,
    noise_mark,
)
from lora_diag.rendering.text import median_rank, shade


def usual_ranks(ranks: Sequence[int]) -> list[int]:
    """Return the ranks whose C(r) is shown first: any of 8, 16 and 64; without these, the first,
    middle and last.
    """
    return [rank for rank in ranks if rank in {8, 16, 64}] or sorted(
        {ranks[0], ranks[len(ranks) // 2], ranks[-1]}
    )


def _pool_ranks(path: str) -> Callable[[Sequence[Spectrum]], str | None]:
    """Return a function that returns the upper median of layers' ranks as text; null counts as
    larger than any.

    Unrelated layers do not count; None without others.
    """

    def pool(records: Sequence[Spectrum]) -> str | None:
        related = [record for record in records if record.lineage != "unrelated"]
        if not related:
            return None
        return median_rank(
            [value_at(record, path) for record in related], max(len(record.s) for record in related)
        )

    return pool


class GradientStack(Record):
    """The gradients of one or more steps whose stack has this spectrum.

    Args:
        steps: The steps t.
        side: ``right`` if ``s`` are the roots of the eigenvalues of ΣG_tᵀG_t (in × in), ``left`` if
            of ΣG_tG_tᵀ (out × out): the smaller of the two.
        other_energy: Energy fractions of the other side; null if not computed. With one step both
            sides are equal.
        other_rank_at: Ranks at the thresholds of the other side; null likewise.
    """

    steps: tuple[int, ...]
    side: Literal["left", "right"]
    other_energy: dict[str, Share | None] | None
    other_rank_at: dict[str, int | None] | None


class Spectrum(Lineage, LayerRecord):
    """The singular values of one ΔW and derived quantities; of ΔW·C^½ or G^½·ΔW·C^½ in another
    ``metric``.

    Where TUNED is unrelated to BASE (``lineage``), ΔW is no update: ``energy``, ``rank_at``,
    ``tail``, ``stable_rank`` and ``effective_rank`` are null.

    Args:
        layer: The weight's name in BASE; one matrix of a stack is ``name[3]``.
        shape: ``(out, in)``.
        dtypes: Dtypes in which base and tuned are read; of an adapter: that of the base (null
            without one) and the stored one of its factors; of gradients: null and theirs; of a sum
            of updates: null and that of the sum.
        fro: Frobenius norm of the update, ‖ΔW‖_F. Norms are accumulated in float64.
        base_fro: Frobenius norm of the base weight, ‖W_base‖_F; null if the base was not given, and
            for gradients and sums of updates.
        s: Singular values of ΔW, descending, to 9 significant digits.
        complete: True if ``s`` holds all min(out, in) of them, or all that can be nonzero (an
            adapter's r).
        method: Method of the computation, such as ``gram`` or ``exact``.
        energy_error: Bound on the absolute error of every energy fraction in this record, including
            the digits of ``s``, for ΔW as subtracted: in float32, unless a file is float64, which
            adds at most 2.4e-7.
        energy: C(r) = Σ_{i≤r}σ_i² / ‖ΔW‖_F² by r; null for a zero update and, unless ``complete``,
            for r beyond the kept values.
        rank_at: Smallest r with C(r) ≥ the threshold; null if it is beyond the kept values, 0 for a
            zero update.
        tail: Errors of the best rank-r approximation, by r; null if too few values are kept.
        stable_rank: ‖ΔW‖_F² / σ_1²; null for a zero update.
        effective_rank: Exponential of the entropy of σ_i²/Σσ²; null for a zero update or an
            incomplete spectrum.
        resolution: Resolution under the rounding of the files.
        blocks: Number of row blocks in which ΔW was read repeatedly because it exceeded the memory
            limit; null if it fits.
        source: ``update``; or ``gradients`` if ΔW is the stacked gradients of all steps.
        stack: The stacked gradients; null for an update.
        metric: Definition of energy. ``weights``: ‖ΔW‖_F². ``data``: E‖ΔW x‖² = ‖ΔW·C^½‖_F² with C
            = E[xxᵀ] of the layer's input, the mean square of what the update changes in the layer's
            output. ``kfac``: ‖G^½·ΔW·C^½‖_F² with G = E[ggᵀ] of the loss's gradient by that output.
            All fields are in this metric: s, fro, base_fro (‖W_base·C^½‖_F), tail and the norms of
            ``resolution``.
        hidden: The update before rounding, estimated from rounding cells; null where it was not
            requested, where the files resolve ΔW, for a zero update, and for an adapter.
        weights_fro: ‖ΔW‖_F if ``metric`` is not ``weights``; else null.
        base_sigma: Certified lower bound of σ_1(W_base), which is not decomposed: the largest of
            ‖W_base‖_F/√min(m, n) and of power steps over one pass. Null without a base, if it is
            zero, and in another metric.
    """

    table: ClassVar[tuple[Shown | str, ...]] = (
        SHAPE,
        Shown(
            "relative",
            "‖ΔW‖/‖W‖",
            "Frobenius norm of the update over that of the base weight (computed)",
            axis="‖ΔW‖_F / ‖W_base‖_F",
            main=True,
        ),
        "fro",
        Shown(
            "sigma_to_base",
            "σ₁/σ₁(W) ≤",
            "Certified upper bound of σ_1(ΔW) over σ_1 of the base weight",
            axis="upper bound of σ₁(ΔW) / σ₁(W_base)",
            drop=6,
            terminal=True,
            detail=True,
        ),
        Shown(
            "rank_at.0.9",
            "r@90%",
            "Smallest rank that keeps 90% of the energy; empty beyond the values kept",
            axis="rank at 90% of the energy",
            main=True,
            pool=_pool_ranks("rank_at.0.9"),
        ),
        Shown(
            "resolution.signal_rank",
            "signal",
            "Singular values above the rounding noise of the files",
            axis="signal rank: σᵢ above the rounding noise",
            main=True,
            pool=_pool_ranks("resolution.signal_rank"),
            drop=3,
            mark=lambda records: noise_mark(
                record.resolution.verdict for record in records if record.fro > 0
            ),
        ),
        Shown(
            "relative_estimate",
            "‖X‖/‖W‖",
            "Norm of the update before rounding, estimated, over that of the base",
            drop=2,
            terminal=True,
        ),
        Shown(
            "hidden.rank_at_estimate.0.9",
            "r@90% before",
            "Smallest rank whose estimated directions carry 90% of the energy before rounding; "
            "empty if they do not",
            axis="estimated rank at 90% of the energy before rounding",
        ),
        Shown(
            "hidden.directions",
            "directions",
            "Directions before rounding that the rounding cells resolve: a second estimate of the "
            "signal rank",
            drop=5,
            head="dirs.",
            terminal=True,
        ),
        Shown(
            "rank_at.0.95",
            "r@95%",
            "Smallest rank that keeps 95% of the energy",
            axis="rank at 95% of the energy",
            pool=_pool_ranks("rank_at.0.95"),
            drop=8,
            terminal=True,
            detail=True,
        ),
        Shown(
            "rank_at.0.99",
            "r@99%",
            "Smallest rank that keeps 99% of the energy; the first to count rounding noise",
            axis="rank at 99% of the energy",
            pool=_pool_ranks("rank_at.0.99"),
            drop=7,
            terminal=True,
            detail=True,
        ),
        "stable_rank",
        "effective_rank",
        Shown(
            "resolution.unchanged",
            "unchanged",
            "Fraction of the entries that are bit-identical in both files",
            axis="fraction of unchanged entries",
            share=True,
        ),
        Shown(
            "resolution.verdict",
            "files",
            "Whether the files resolve this update",
            main=True,
            terminal=False,
        ),
        "base_fro",
        Shown(
            "resolution.edge",
            "noise edge",
            "Largest singular value expected of the rounding noise",
            axis="edge of the rounding noise (singular value)",
        ),
        COSINE_TO_BASE,
    )
    guards: ClassVar[tuple[Guard, ...]] = (
        Guard(
            "relative",
            "higher",
            "the weight change is larger than before: check scaling and learning rate",
        ),
        Guard(
            "rank_at.0.9",
            "higher",
            "the update needs more rank than before: an adapter of the usual rank misses more "
            "of it",
        ),
        Guard(
            "spike",
            "higher",
            "one direction has more of the update than before: check for divergence",
        ),
    )
    record: Literal["spectrum"] = "spectrum"
    layer: str
    shape: tuple[int, int]
    dtypes: tuple[str | None, str]
    fro: Annotated[Norm, Shown(title="‖ΔW‖", axis="‖ΔW‖_F")]
    base_fro: Annotated[Norm | None, Shown(title="‖W‖", axis="‖W_base‖_F")]
    s: tuple[Norm, ...]
    complete: bool
    method: str
    energy_error: float
    energy: dict[str, Share | None]
    rank_at: dict[str, int | None]
    tail: dict[str, Tail | None]
    stable_rank: Annotated[
        float | None,
        Shown(axis="stable rank ‖ΔW‖_F² / σ₁²", drop=9, head="stable", terminal=True, detail=True),
    ]
    effective_rank: Annotated[
        float | None,
        Shown(
            axis="effective rank exp H(σᵢ²/Σσ²)", drop=10, head="eff.", terminal=True, detail=True
        ),
    ]
    resolution: Resolution
    blocks: Count | None = None
    source: Literal["update", "gradients"] = "update"
    stack: GradientStack | None = None
    metric: Metric = "weights"
    weights_fro: Norm | None = None
    hidden: Hidden | None = None
    base_sigma: Norm | None = None

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> str | None:
        """Return why the settings of a run of ``spectrum`` are invalid; None if they are valid."""
        ranks = settings.get("ranks")
        if (
            not isinstance(ranks, list)
            or not ranks
            or not all(type(r) is int and r > 0 for r in ranks)
        ):
            return "settings.ranks must be a list of ranks"
        return None

    def check(self, settings: Mapping[str, Any]) -> str | None:
        """Return the path of the first missing value at a rank or threshold; None if
        there is none.
        """
        requested = [str(rank) for rank in settings.get("ranks", [])]
        missing = [f"energy.{r}" for r in requested if r not in self.energy]
        missing += [f"tail.{r}" for r in requested if r not in self.tail]
        missing += [
            f"rank_at.{share}" for share in ("0.9", "0.95", "0.99") if share not in self.rank_at
        ]
        return missing[0] if missing else None

    @classmethod
    def shown_of(cls, settings: Mapping[str, Any], records: Sequence[Any]) -> tuple[Shown, ...]:
        """Return how a run's records are shown, with C(r) at the run's ranks and the norms of its
        metric.
        """
        metric = metric_of(records)
        update, weights = NORMS[metric]
        of = "" if metric == "weights" else f", in {METRIC_NAMES[metric]}: {update}"
        ranks = settings.get("ranks", ())
        shown_ranks = usual_ranks(ranks) if ranks else []
        energies = [
            Shown(
                f"energy.{rank}",
                f"C({rank})",
                f"Fraction of the energy Σσ² in the {rank} largest singular values: the maximum of "
                f"a rank-{rank} update{of}",
                axis=f"energy fraction C({rank})",
                share=True,
                main=rank in shown_ranks,
                drop=int(rank > ranks[0]) + int(rank not in shown_ranks),
                terminal=rank in shown_ranks or rank in ranks[:8],
                detail=rank not in shown_ranks,
                style=shade,
            )
            for rank in ranks
        ]
        columns = [
            replace(
                field,
                title=field.title.replace("‖ΔW‖", update).replace("‖W‖", weights),
                about=f"{field.about}{of}",
                head="moved" if field.path == "relative" else field.head,
            )
            if of and field is not SHAPE and not field.path.startswith("resolution.")
            else field
            for field in cls.shown
            if field.path != "relative" or not any(record.stack for record in records)
        ]
        index = next(
            position for position, field in enumerate(columns) if field.path == "rank_at.0.9"
        )
        return (*columns[:index], *energies, *columns[index:])

    @property
    def relative(self) -> float | None:
        """‖ΔW‖ / ‖W_base‖ in the metric; None without a base or if it is zero."""
        return self.fro / self.base_fro if self.base_fro else None

    @property
    def relative_estimate(self) -> float | None:
        """‖X‖ / ‖W_base‖ of the update before rounding; None where that was not estimated, or the
        base is zero.
        """
        if self.hidden is None or self.hidden.fro_estimate is None or not self.base_fro:
            return None
        return self.hidden.fro_estimate / self.base_fro

    def without_ranks(self) -> Spectrum:
        """Return the spectrum of an unrelated weight: without energy fractions and ranks."""
        tables = {
            name: dict.fromkeys(getattr(self, name)) for name in ("energy", "rank_at", "tail")
        }
        return self.model_copy(update={**tables, "stable_rank": None, "effective_rank": None})

    def before_rounding(self) -> Spectrum:
        """Return the spectrum of the estimated update before rounding; without an estimate, this
        spectrum.

        Its values are those of the directions that the cells resolve, so it is not complete.
        """
        hidden = self.hidden
        if (
            hidden is None
            or hidden.status != "recovered"
            or not hidden.values_estimate
            or not hidden.fro_estimate
        ):
            return self
        values = hidden.values_estimate
        resolution = self.resolution.model_copy(update={"signal_rank": len(values)})
        estimate = {"fro": hidden.fro_estimate, "s": values, "complete": False, "energy_error": 0.0}
        return self.model_copy(update=estimate | {"resolution": resolution})

    @property
    def spike(self) -> Share | None:
        """σ_1² / ‖ΔW‖_F², the energy fraction of the largest direction; None for a zero update."""
        return 1 / self.stable_rank if self.stable_rank else None

    @property
    def sigma_to_base(self) -> float | None:
        """Certified upper bound of σ_1(ΔW) / σ_1(W_base), with ``base_sigma``; None without it or a
        value of ΔW.
        """
        if not self.base_sigma or not self.s:
            return None
        return (
            min(self.fro, math.sqrt(self.s[0] ** 2 + self.energy_error * self.fro**2))
            / self.base_sigma
        )

    @property
    def spike_to_base(self) -> float | None:
        """σ_1(ΔW) / ‖W_base‖_F, a lower bound of σ_1(ΔW) / σ_1(W_base); None without a base or if
        it is zero.
        """
        return self.s[0] / self.base_fro if self.base_fro and self.s else None
