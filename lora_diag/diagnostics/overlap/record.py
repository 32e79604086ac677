"""Records of ``overlap``."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from lora_diag.records.base import SHAPE, Count, Guard, LayerRecord, Norm, Share, Shown


class Overlap(LayerRecord):
    """Fraction of one layer's gradient G in the top-r singular subspaces (U, V) of an update.

    All fractions are of ‖G‖_F and lie in [0, 1]; the measured ones are null for a zero gradient. 0
    ≤ κ ≤ one-sided ≤ tangent ≤ 1. U and V refer to the stored matrix: if it is ``(in, out)``
    (GPT-2's Conv1D), A and B below swap roles.

    Args:
        layer: The weight's name in BASE.
        shape: ``(out, in)``, m × n.
        step: Training step of the gradient.
        rank: Directions of each subspace, r.
        kappa: κ = ‖UᵀGV‖_F / ‖G‖_F, a measure of direction, not of quality.
        kappa_random: Root mean square of κ for random subspaces, r/√(mn).
        tangent: Part of G that an adapter with these subspaces can reach to first order, ‖UUᵀG +
            GVVᵀ − UUᵀGVVᵀ‖_F / ‖G‖_F.
        tangent_random: Value of ``tangent`` of random subspaces, √(r/m + r/n − r²/(mn)).
        left: Part of G that factor A can reach while B spans U, ‖UᵀG‖_F / ‖G‖_F.
        left_random: ``left`` of random subspaces, √(r/m).
        right: Part of G that factor B can reach while A spans V, ‖GV‖_F / ‖G‖_F. It is all that a
            new adapter (B = 0) reaches.
        right_random: ``right`` of random subspaces, √(r/n).
        gradient_fro: Frobenius norm of the gradient, ‖G‖_F.
        method: Method of U and V.
        blocks: Number of row blocks in which ΔW was read repeatedly because it exceeded the memory
            limit; null if it fits.
        verdict: Whether the files resolve the update of U and V.
    """

    key: ClassVar[tuple[str, ...]] = ("layer", "step", "rank")
    part_label: ClassVar[str] = "step {step}, r = {rank}"
    table: ClassVar[tuple[Shown | str, ...]] = (
        SHAPE,
        "rank",
        "kappa_random",
    )
    guards: ClassVar[tuple[Guard, ...]] = (
        Guard("tangent", "lower", "the adapter reaches less of the gradient than before"),
    )
    record: Literal["overlap"] = "overlap"
    layer: str
    shape: tuple[int, int]
    step: int
    rank: Annotated[int, Shown(pool="range", head="r", terminal=True)]
    kappa: Annotated[Share | None, Shown(title="κ", axis="κ = ‖UᵀGV‖_F / ‖G‖_F", main=True)]
    kappa_random: Annotated[
        Share, Shown(title="κ random", head="random", form="small", terminal=True)
    ]
    tangent: Annotated[
        Share | None,
        Shown(
            axis="tangent overlap ‖P_T G‖_F / ‖G‖_F",
            main=True,
            drop=1,
            head="tangent (random)",
            form="small",
            chance="tangent_random",
        ),
    ]
    tangent_random: Annotated[Share, Shown(main=True, terminal=False)]
    left: Annotated[
        Share | None,
        Shown(
            drop=4,
            head="left (random)",
            form="small",
            terminal=True,
            detail=True,
            chance="left_random",
        ),
    ]
    left_random: Share
    right: Annotated[
        Share | None,
        Shown(
            drop=5,
            head="right (random)",
            form="small",
            terminal=True,
            detail=True,
            chance="right_random",
        ),
    ]
    right_random: Share
    gradient_fro: Annotated[Norm, Shown(title="‖G‖", axis="‖G‖_F of the gradient")]
    method: str
    verdict: Literal["resolved", "floor-limited", "unresolved"]
    blocks: Count | None = None
