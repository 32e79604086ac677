"""Records of ``intruders``."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from lora_diag.records.base import Count, Guard, LayerRecord, Norm, Record, Share, Shown


class Direction(Record):
    """One of the k largest left singular vectors u_j of W_tuned, compared with those of W_base.

    Args:
        sigma: σ_j of W_tuned.
        similarity: max_i |⟨u_i(W_base), u_j⟩|.
        nearest: The i of the maximum, from 1 on.
        window: Number of singular values of W_base within the window, |σ_i − σ_j| ≤ window·σ_j.
        projection: Norm of the projection of u_j on the span of their singular vectors.
        projection_random: √(window / out), the root mean square of that norm for a random
            direction.
        kind: ``kept``: ``similarity`` ≥ ε: a direction of BASE. ``rotated``: no single direction of
            BASE, and u_j lies in the window's span clearly more than a random one does.
            ``intruder``: neither: a large direction that BASE does not have, which papers relate to
            forgetting; compare the loss on other text. See
            ``metrics.subspaces.classify_direction``.
    """

    sigma: Norm
    similarity: Share
    nearest: int
    window: Count
    projection: Share
    projection_random: Share
    kind: Literal["kept", "rotated", "intruder"]


class Intruders(LayerRecord):
    """The k largest directions of W_tuned, and those without a counterpart in W_base.

    Args:
        layer: The weight's name in BASE.
        shape: ``(out, in)``.
        k: Number of compared directions, the largest. At most min(out, in).
        epsilon: ε, the similarity below which a direction is an intruder or rotated.
        window: Half-width of the window around σ_j, as a fraction of σ_j.
        fro: ‖ΔW‖_F.
        base_fro: ‖W_base‖_F.
        count: Number of directions with a similarity below ε, the definition in the literature.
        rotated: Number of directions that are a rotation of several of BASE. Each is in the span of
            directions of W_base with nearly the same singular value, which rotate freely.
        intruders: Number of directions that BASE does not have, ``count`` − ``rotated``.
        share: ``intruders`` / k.
        similarity_lowest: The smallest similarity of a direction to BASE; null where ΔW = 0.
        similarity_random: Estimate of the median similarity of a random direction.
        count_random: Estimate of how many of k random directions have a similarity below ε.
        directions: Each direction, the largest first; empty if ΔW = 0.
        method: Methods of the singular vectors of W_base and of W_tuned; ``none: …`` if ΔW = 0.
    """

    table: ClassVar[tuple[Shown | str, ...]] = (
        "k",
        "intruders",
        "rotated",
        "similarity_lowest",
        "similarity_random",
        Shown(
            "first_intruder",
            "first intruder",
            "Position of the first intruder, by descending singular value",
            pool="min",
            drop=4,
            head="first at",
            terminal=True,
        ),
        Shown(
            "intruder_size",
            "intruder σ/σ_1",
            "Singular value of the first intruder over the largest of its weight",
            share=True,
            pool="max",
            drop=5,
            head="σ/σ_1",
            form=".3g",
            terminal=True,
        ),
    )
    guards: ClassVar[tuple[Guard, ...]] = (
        Guard(
            "share",
            "higher",
            "more of the largest directions are new than before: check for forgetting on older "
            "data",
        ),
    )
    record: Literal["intruders"] = "intruders"
    layer: str
    shape: tuple[int, int]
    k: Annotated[Count, Shown(title="directions", pool="sum", drop=2, head="of", terminal=True)]
    epsilon: float
    window: float
    fro: Norm
    base_fro: Norm
    count: Count
    rotated: Annotated[Count, Shown(pool="sum", terminal=True, detail=True)]
    intruders: Annotated[Count, Shown(axis="intruder dimensions", main=True, pool="sum")]
    share: Share
    similarity_lowest: Annotated[
        Share | None, Shown(title="similarity", pool="min", head="lowest", terminal=True)
    ]
    similarity_random: Annotated[
        Share,
        Shown(title="similarity by chance", drop=3, head="by chance", terminal=True, detail=True),
    ]
    count_random: float
    directions: tuple[Direction, ...]
    method: str

    @property
    def first_intruder(self) -> int | None:
        """Index of the first intruder, from 1 on; None without intruders."""
        return next(
            (index for index, each in enumerate(self.directions, 1) if each.kind == "intruder"),
            None,
        )

    @property
    def intruder_size(self) -> Share | None:
        """σ of the first intruder over σ_1; None without intruders."""
        index = self.first_intruder
        return (
            None if index is None else self.directions[index - 1].sigma / self.directions[0].sigma
        )
