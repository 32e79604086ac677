"""Records of ``overlap``."""

from __future__ import annotations

from typing import ClassVar, Literal

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
        rank: r.
        kappa: κ = ‖UᵀGV‖_F / ‖G‖_F.
        kappa_random: r/√(mn), its root mean square for random subspaces.
        tangent: ‖UUᵀG + GVVᵀ − UUᵀGVVᵀ‖_F / ‖G‖_F, the part that an adapter with these subspaces
            can reach to first order.
        tangent_random: √(r/m + r/n − r²/(mn)).
        left: ‖UᵀG‖_F / ‖G‖_F, the part that factor A can reach while B spans U.
        left_random: √(r/m).
        right: ‖GV‖_F / ‖G‖_F, the part that factor B can reach while A spans V: all that a new
            adapter (B = 0) reaches.
        right_random: √(r/n).
        gradient_fro: ‖G‖_F.
        method: Method of U and V.
        blocks: Number of row blocks in which ΔW was read repeatedly because it exceeded the memory
            limit; null if it fits.
        verdict: Whether the files resolve the update of U and V.
    """

    key: ClassVar[tuple[str, ...]] = ("layer", "step", "rank")
    part_label: ClassVar[str] = "step {step}, r = {rank}"
    shown: ClassVar[tuple[Shown, ...]] = (
        SHAPE,
        Shown("rank", "rank", "directions of each subspace", pool="range", head="r", terminal=True),
        Shown(
            "kappa_random",
            "κ random",
            "value of a random subspace",
            share=True,
            head="random",
            form="small",
            terminal=True,
        ),
        Shown(
            "kappa",
            "κ",
            "‖UᵀGV‖/‖G‖; direction, not quality",
            axis="κ = ‖UᵀGV‖_F / ‖G‖_F",
            share=True,
            main=True,
        ),
        Shown(
            "tangent",
            "tangent",
            "fraction of ‖G‖ that an adapter there reaches to first order",
            axis="tangent overlap ‖P_T G‖_F / ‖G‖_F",
            share=True,
            main=True,
            drop=1,
            head="tangent (random)",
            form="small",
            chance="tangent_random",
        ),
        Shown(
            "tangent_random",
            "tangent random",
            "value of a random subspace",
            share=True,
            main=True,
            terminal=False,
        ),
        Shown(
            "left",
            "left",
            "fraction of ‖G‖ in the update's output directions; in brackets: by chance",
            share=True,
            drop=4,
            head="left (random)",
            form="small",
            terminal=True,
            detail=True,
            chance="left_random",
        ),
        Shown(
            "right",
            "right",
            "fraction of ‖G‖ in the update's input directions; in brackets: by chance",
            share=True,
            drop=5,
            head="right (random)",
            form="small",
            terminal=True,
            detail=True,
            chance="right_random",
        ),
        Shown(
            "gradient_fro", "‖G‖", "Frobenius norm of the gradient", axis="‖G‖_F of the gradient"
        ),
    )
    guards: ClassVar[tuple[Guard, ...]] = (
        Guard("tangent", "lower", "the adapter reaches less of the gradient than before"),
    )
    record: Literal["overlap"] = "overlap"
    layer: str
    shape: tuple[int, int]
    step: int
    rank: int
    kappa: Share | None
    kappa_random: Share
    tangent: Share | None
    tangent_random: Share
    left: Share | None
    left_random: Share
    right: Share | None
    right_random: Share
    gradient_fro: Norm
    method: str
    verdict: Literal["resolved", "floor-limited", "unresolved"]
    blocks: Count | None = None
