"""Records of ``geometry``."""

from __future__ import annotations

from statistics import fmean
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_diag.diagnostics.intruders.record import Intruders
from lora_diag.records.base import (
    SHAPE,
    Count,
    Guard,
    LayerRecord,
    Norm,
    Ratio,
    Record,
    Share,
    Shown,
    Unit,
)

Degrees = Annotated[float, Unit("degrees"), Field(ge=0, le=90.001)]

# α: fractions of the entries in a mask.
ALPHAS = (0.3, 0.1)
DECILES = 10


class Movement(Record):
    """Where a ΔW lies in W; k is the dimension of the leading singular spaces.

    Args:
        unchanged: Fraction of entries with |ΔW| ≤ η·max(|W|, |W + ΔW|) ("update sparsity").
        changed_by_decile: Fraction of changed entries in each decile of |W|, the smallest
            magnitudes first.
        row_spread: Standard deviation over rows of the fraction of changed entries.
        column_spread: The same over columns.
        low_30: Fraction of the changed entries that are among the 30% smallest of |W|; null if none
            changed.
        low_10: The same for 10%.
        principal_30: Fraction of the changed entries that are among the 30% largest of the
            reconstruction of W from its k leading singular directions.
        principal_10: The same for 10%.
        left_angles: The k principal angles between the leading left singular spaces of W and W +
            ΔW, ascending.
        right_angles: The same for the right spaces.
        shift: Normalised spectral shift ‖σ(W + ΔW) − σ(W)‖ / ‖σ(W)‖.
        scaling: Fraction of ‖ΔW‖² that scales the k leading singular directions of W, Σ(u_iᵀΔW
            v_i)².
        mixing: Fraction that mixes them, Σ_{i≠j}(u_iᵀΔW v_j)².
        outside: The rest; the three sum to 1.
        energy_left: ‖UᵀΔW‖² / ‖ΔW‖², U the k leading left singular vectors of W.
        energy_right: ‖ΔW V‖² / ‖ΔW‖².
        spectral_ratio: σ_1(ΔW) / σ_1(W); null if W = 0.
        stable_rank: ‖ΔW‖² / σ_1(ΔW)².
    """

    unchanged: Share
    changed_by_decile: tuple[Share, ...]
    row_spread: Share
    column_spread: Share
    low_30: Share | None
    low_10: Share | None
    principal_30: Share | None
    principal_10: Share | None
    left_angles: tuple[Degrees, ...]
    right_angles: tuple[Degrees, ...]
    shift: Ratio
    scaling: Share
    mixing: Share
    outside: Share
    energy_left: Share
    energy_right: Share
    spectral_ratio: Ratio | None
    stable_rank: Ratio

    @property
    def angle(self) -> float:
        """Mean of the principal angles, left and right."""
        return fmean((*self.left_angles, *self.right_angles))


class GeometryBaseline(Movement):
    """The mean of the statistics over draws of an update that is independent of W.

    Args:
        draws: Number of draws.
        errors: Standard error of the means, by name; empty for one draw.
    """

    draws: Count
    errors: dict[str, float]


class Head(Record):
    """One attention head's part of a projection: rows of a query, key or value, columns of an
    output.

    In GPT-2, whose matrices are stored transposed, the reverse.

    Args:
        kind: ``query``, ``key``, ``value`` or ``output``.
        index: Its number, from 0 on; of keys and values that of the group of heads that share them.
        fro: ‖ΔW_h‖_F of its part.
        base_fro: ‖W_h‖_F.
        share: ‖ΔW_h‖² / ‖ΔW‖²; the shares of a layer sum to 1.
        energy: C(r) of its part at some ranks; empty if the head did not change.
        rank_90: Smallest r with C(r) ≥ 0.9.
    """

    kind: str
    index: int
    fro: Norm
    base_fro: Norm
    share: Share
    energy: dict[str, Share]
    rank_90: Count

    @property
    def relative(self) -> float | None:
        """‖ΔW_h‖ / ‖W_h‖; None if W_h = 0."""
        return self.fro / self.base_fro if self.base_fro else None


class TokenDirection(Record):
    """The tokens of one leading direction of ΔW.

    Args:
        side: ``writes``: the left direction, through the unembedding. ``reads``: the right one,
            through the embedding.
        number: Its number, from 1 for the largest singular value on.
        tokens: Numbers of the tokens with the largest cosines by size.
        words: These tokens as text, ``#`` and the number without a tokenizer.
        cosines: Their cosines with the direction, the mean over the vocabulary subtracted; the sign
            of a direction is arbitrary, so only signs that differ mean something.
        cosine_random: Median over as many random directions of the largest cosine.
        p: p-value of the first token for a random direction, times the tokens and directions looked
            at in the layer.
    """

    side: Literal["writes", "reads"]
    number: Count
    tokens: tuple[int, ...]
    words: tuple[str, ...]
    cosines: tuple[float, ...]
    cosine_random: Share
    p: Share


def _column(name: str, title: str, about: str, form: str, **look: Any) -> Shown:
    """Return the column of a statistic, with the value of the stricter baseline in brackets."""
    look |= {"form": form, "main": True, "share": form in {"percent", "small"}}
    return Shown(f"moved.{name}", title, about, chance=f"null.{name}", **look)


class Geometry(LayerRecord):
    """Where the update of one layer lies in W, and where independent updates would lie.

    Args:
        layer: The weight's name in BASE.
        shape: ``(out, in)``.
        k: Dimension of the leading singular spaces.
        eta: η of ``Movement.unchanged``.
        fro: ‖ΔW‖_F.
        base_fro: ‖W‖_F.
        stored: Format of the rounding null: that of the values of TUNED; null without one, as for
            adapters and for quantized files.
        angle_error: Bound on the error of every angle of ``moved``, from the residuals of the
            singular vectors and the gaps behind the k-th singular values; 90 where there is no gap,
            so that the spaces are arbitrary.
        signal_rank: Rank of ΔW above rounding, as in ``spectrum``; null if all kept values are
            above it, or ΔW = 0.
        signal_left: Mean principal angle of the leading left spaces of that dimension; null without
            it, or if it is more than half of min(out, in).
        signal_right: The same of the right spaces.
        rank: Numerical rank of ΔW: the number of singular values above 1e-7·σ_1, for an adapter
            1e-10·σ_1.
        rank_90: Smallest r with C(r) ≥ 0.9.
        rank_random: Numerical rank of a matrix with the magnitudes of ΔW at their places and random
            signs; null for an adapter, whose factors define its rank.
        rank_90_random: The same for 90% of the energy.
        moved: The statistics of ΔW; null if ΔW = 0.
        chance: Those of a Gaussian update of the same norm, added without rounding; null if ΔW = 0.
        rounding: Those of the rounding null: the entries of ΔW, as they were before rounding, at
            random places, stored in ``stored``; null without it.
        magnitude: Fraction of ‖ΔW‖² that changes the lengths of rows (DoRA's magnitude). The rest
            changes their directions; null if ΔW = 0.
        heads: The heads of a projection of attention, as the config of BASE lays them out; empty
            for other matrices, and where the config does not fit.
        lens: The tokens of the leading directions; empty without ``--lens``, and for a matrix that
            neither writes to nor reads from the residual stream.
        intruders: The record of ``loradiag intruders`` with its defaults; null if ΔW = 0.
        method: Method of the singular vectors.
    """

    table: ClassVar[tuple[Shown | str, ...]] = (
        SHAPE,
        _column(
            "unchanged",
            "unchanged",
            "Fraction of entries with a relative change of at most η",
            "percent",
            drop=3,
        ),
        _column(
            "low_30",
            "in low 30%",
            "Changed entries among the 30% smallest of |W|",
            "percent",
            head="low",
        ),
        _column(
            "principal_30",
            "in principal 30%",
            "Changed entries among the 30% largest of rank-k W",
            "percent",
            head="principal",
            drop=4,
        ),
        _column(
            "angle",
            "angle",
            "Mean principal angle of the leading spaces, in degrees",
            ".2g",
            head="angle°",
        ),
        _column(
            "shift",
            "spectral shift",
            "Normalised spectral shift ‖σ(W+ΔW) − σ(W)‖/‖σ(W)‖",
            ".0e",
            head="NSS",
        ),
        _column(
            "scaling",
            "scaling",
            "Fraction of ‖ΔW‖² that scales directions of W",
            "small",
            drop=5,
            detail=True,
        ),
        _column(
            "mixing",
            "mixing",
            "Fraction of ‖ΔW‖² that mixes leading directions of W",
            "small",
            drop=5,
            detail=True,
        ),
        _column(
            "energy_left",
            "left energy",
            "Fraction of ‖ΔW‖² in the leading left space of W",
            "small",
            head="left",
            drop=5,
        ),
        _column(
            "energy_right",
            "right energy",
            "Fraction of ‖ΔW‖² in the leading right space",
            "small",
            head="right",
            drop=5,
        ),
        _column("stable_rank", "stable rank", "‖ΔW‖²/σ_1(ΔW)²", ".3g", drop=6, detail=True),
        _column(
            "spectral_ratio",
            "σ_1(ΔW)/σ_1(W)",
            "Largest singular value relative to that of W",
            ".2g",
            head="σ ratio",
            drop=6,
            detail=True,
        ),
    )
    guards: ClassVar[tuple[Guard, ...]] = (
        Guard(
            "moved.shift",
            "higher",
            "the singular values of the weights moved more than before: check the loss",
        ),
    )
    record: Literal["geometry"] = "geometry"
    layer: str
    shape: tuple[int, int]
    k: Count
    eta: float
    fro: Norm
    base_fro: Norm
    stored: str | None = None
    angle_error: Degrees = 0.0
    signal_rank: Count | None = None
    signal_left: Degrees | None = None
    signal_right: Degrees | None = None
    rank: Count = 0
    rank_90: Count = 0
    rank_random: Count | None = None
    rank_90_random: Count | None = None
    moved: Movement | None = None
    chance: GeometryBaseline | None = None
    rounding: GeometryBaseline | None = None
    magnitude: Annotated[
        Share | None, Shown(title="row lengths", form="small", drop=7, terminal=True, detail=True)
    ] = None
    heads: tuple[Head, ...] = ()
    lens: tuple[TokenDirection, ...] = ()
    intruders: Intruders | None = None
    method: str = "none: ΔW is zero"

    @property
    def low_excess(self) -> float | None:
        """``moved.low_30`` minus that of the stricter baseline; None if one is not known."""
        values = [side.low_30 for side in (self.moved, self.null) if side]
        return (
            values[0] - values[1]
            if len(values) == 2 and values[0] is not None and values[1] is not None
            else None
        )

    @property
    def null(self) -> GeometryBaseline | None:
        """The stricter baseline: the rounding null, or chance without one."""
        return self.rounding or self.chance
