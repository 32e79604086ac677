"""Records of ``residual``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from lora_diag.layers.lineage import COSINE_TO_BASE, Lineage
from lora_diag.records.base import (
    Count,
    Guard,
    LayerRecord,
    Norm,
    Ratio,
    Record,
    Shown,
    count_texts,
    least_epsilon,
)
from lora_diag.records.vocabulary import Agreement, Resolution
from lora_diag.rendering.text import number

if TYPE_CHECKING:
    from lora_diag.metrics.subspaces import Distances, Parts

Limit = Literal["rank", "scale", "direction", "not adapted", "exact", "noise"]


# The model of docs/evidence.md; with its embedding, which agrees (cosine 0.89), the cosine is 0.40.
# An encoder: ε = 1.2 to 1.3 (docs/benchmarks.md).
SEEDS = (
    "another seed of a language model's full fine-tune was at ε = 1.1, in the matrices alone "
    "1.3 with cosine 0.14"
)

# Note for every place that shows ε.
EPSILON = (
    f"ε is the distance to one full fine-tune, not a measure of quality: {SEEDS}, and adapters at "
    "ε of 2 to 6 kept at least 90% of its gain."
)


class Distance(Record):
    """Distance of an adapter's update X from the full update D, in one norm ‖·‖.

    Undefined values are null: all if D is zero; the cosine and those of the best scale if X is
    zero.

    Args:
        epsilon: ε = ‖D − X‖ / ‖D‖. Not a fraction: it exceeds 1 whenever the norm ratio exceeds
            twice the cosine.
        epsilon_min: √(1 − C(r)), the smallest ε that any update of the adapter's rank r has
            (Eckart–Young), up to ``energy_error``; null if the adapter has no rank.
        excess: ε² − ε_min²: the cost of direction and scale, as a fraction of ‖D‖². Nonnegative up
            to the rounding of the adapter's factors and ``energy_error``; null without ε_min.
        norm_ratio: ‖X‖ / ‖D‖.
        cosine: ⟨D, X⟩ / (‖D‖‖X‖).
        best_scale: c = ⟨D, X⟩ / ‖X‖², the factor that minimizes ‖D − cX‖.
        epsilon_best_scale: ‖D − cX‖ / ‖D‖.
        energy_error: Bound on the error of ε_min² and ``excess``; null without ε_min.
    """

    epsilon: Ratio | None
    epsilon_min: Ratio | None
    excess: float | None
    norm_ratio: Ratio | None
    cosine: float | None
    best_scale: float | None
    epsilon_best_scale: Ratio | None
    energy_error: float | None = None

    @property
    def least_epsilon(self) -> float | None:
        """√(max(0, ε_min² − energy_error)), a lower bound on ε at the adapter's rank; None without
        ε_min.
        """
        return (
            None if self.epsilon_min is None else least_epsilon(self.epsilon_min, self.energy_error)
        )

    @property
    def _above_floor(self) -> Distances:
        """These distances, with ``least_epsilon`` as the floor."""
        from lora_diag.metrics.subspaces import Distances  # imports NumPy

        values = {field.name: getattr(self, field.name) for field in fields(Distances)}
        return Distances(**values | {"epsilon_min": self.least_epsilon})

    @property
    def parts(self) -> Parts | None:
        """The parts of ε² (``metrics.subspaces.split_epsilon``); None where D or X is zero."""
        from lora_diag.metrics.subspaces import split_epsilon

        return split_epsilon(self._above_floor)

    @property
    def limit(self) -> Literal["exact", "rank", "direction", "scale", "not adapted"] | None:
        """``exact``, ``not adapted``, or the largest part of ε² (``metrics.subspaces``); None if D
        is zero.
        """
        from lora_diag.metrics.subspaces import find_limit

        return find_limit(self._above_floor)


def _make_pool(name: str) -> Callable[[Sequence[Residual]], float | None]:
    """Return a function that pools a field of ``metrics.subspaces.Distances`` over layers."""

    def pool(records: Sequence[Residual]) -> float | None:
        from lora_diag.metrics.subspaces import pool_distances  # imports NumPy

        value: float | None = getattr(pool_distances(records), name)
        return value

    return pool


def _pool_floor(records: Sequence[Residual]) -> float | None:
    """Return the lower bound on ε at the adapter's rank, pooled over layers; None if no layer has
    one.
    """
    return (
        _make_pool("epsilon_min")(records)
        if any(record.epsilon_min is not None for record in records)
        else None
    )


def sum_parts(records: Sequence[Residual]) -> dict[str, float]:
    """Return the parts of ε² of several layers by name, as fractions of Σ‖D‖²; empty if every D is
    zero.

    Parts of layers add up, each at its own best scale. Layers that X does not change are
    ``not adapted``; where D is zero, all of X is orthogonal to it: ``direction``.
    """
    total = math.fsum(record.fro**2 for record in records)
    sums = dict.fromkeys(("rank", "direction", "scale", "not adapted"), 0.0)
    for record in records:
        if (parts := record.parts) is not None:
            for name in ("rank", "direction", "scale"):
                sums[name] += getattr(parts, name) * record.fro**2
        else:
            sums["direction" if record.epsilon is None else "not adapted"] += record.gap**2
    return {name: part / total for name, part in sums.items()} if total else {}


def describe_parts(records: Sequence[Residual]) -> str:
    """State ε² of several layers, not all zero, as the sum of its parts; with ≈ where parts below
    0.5% are omitted.
    """
    shares = {name: part for name, part in sum_parts(records).items() if part}
    total = math.fsum(shares.values())
    shown = [f"{name} {number(part)}" for name, part in shares.items() if part >= 0.005 * total]
    return f"ε² = {number(total)} {'=' if len(shown) == len(shares) else '≈'} {' + '.join(shown)}"


def _pool_part(name: str) -> Callable[[Sequence[Residual]], float | None]:
    """Return a function that returns a part of ε² of several layers; None if every D is zero."""
    return lambda records: sum_parts(records).get(name)


class Expected(Distance):
    """The expected distance of an adapter to the update before rounding.

    Args:
        fro: Estimated ‖·‖_F of the update before rounding.
    """

    fro: Norm


def _pool_before_rounding(records: Sequence[Residual]) -> float | None:
    """Return the expected ε before rounding of the layers with an estimate together; None without a
    nonzero one.
    """
    estimates = [record.before_rounding for record in records if record.before_rounding is not None]
    total = math.hypot(*(estimate.fro for estimate in estimates))
    return (
        math.hypot(*((estimate.epsilon or 0.0) * estimate.fro for estimate in estimates)) / total
        if total
        else None
    )


class Residual(Distance, Lineage, LayerRecord):
    """One layer of a full fine-tune D = W_tuned − W_base compared with an adapter's update X, in
    the Frobenius norm.

    Args:
        layer: The weight's name in BASE.
        shape: ``(out, in)``; of a 1-D tensor ``(n,)``.
        adapter: Path of the input with X.
        role: ``adapter``; or ``reference``, another full fine-tune, for scale.
        rank: Columns of the adapter's factors; 0 if it has no update of the layer; null for a 1-D
            tensor and if X has no factors.
        fro: ‖D‖_F.
        base_fro: ‖W_base‖_F; null if it was not measured.
        adapter_fro: ‖X‖_F.
        method: Method of the singular values of D.
        blocks: Number of row blocks in which D was read repeatedly because it exceeded the memory
            limit; null if it fits.
        column_space: Agreement of the left singular vectors, of D's top ``rank`` (8 if X has no
            rank); null for 1-D tensors and if D or X is zero.
        row_space: The same for right singular vectors.
        data: The distance in the data metric ‖D·C^½‖_F with C = E[xxᵀ], the mean square of the
            change in the layer's output; null without activations for the layer.
        before_rounding: The expected distance to the update before rounding, E over its posterior
            given the rounding cells of the files; null where it was not requested, is not hidden,
            or could not be estimated.
        limited_by: The largest part of ε². ``rank``: D has energy beyond the adapter's rank; a
            larger rank can reduce it. ``direction``: the adapter's directions are not the best of
            its rank; rank does not help, compare losses with ``probe outputs``. ``scale``: another
            α would bring the adapter closer. ``not adapted``: the adapter does not change this
            layer; add it to the target modules. ``exact``: ε is at most 1e-3. ``noise``: the files
            do not resolve D, so that ε has no cause; measure float32 files. Null if D is zero, and
            where TUNED is unrelated to BASE.
        resolution: Resolution of D under the rounding of the files; null for a 1-D tensor.
    """

    key: ClassVar[tuple[str, ...]] = ("layer", "adapter")
    part_label: ClassVar[str] = "{adapter}"
    table: ClassVar[tuple[Shown | str, ...]] = (
        "rank",
        Shown(
            "epsilon",
            "ε",
            f"‖ΔW − X‖/‖ΔW‖. {EPSILON}",
            axis="ε = ‖ΔW − X‖_F / ‖ΔW‖_F",
            main=True,
            pool=_make_pool("epsilon"),
        ),
        Shown(
            "least_epsilon",
            "ε floor",
            "√(1 − C(r)) minus its error: no update of this rank has a smaller ε",
            main=True,
            pool=_pool_floor,
            head="floor",
            detail=True,
        ),
        Shown(
            "epsilon_min",
            "ε_min",
            "√(1 − C(r)), as computed",
            axis="ε_min = √(1 − C(r)), least ε at this rank",
        ),
        Shown(
            "excess",
            "excess",
            "ε² − ε_min²: cost of direction and scale",
            axis="excess ε² − ε_min²",
        ),
        Shown(
            "cosine",
            "cosine",
            "Of the angle between the adapter's update and the full one",
            axis="cosine of the two updates (Frobenius)",
            main=True,
            pool=_make_pool("cosine"),
        ),
        Shown(
            "norm_ratio",
            "‖X‖/‖ΔW‖",
            "Norm of the adapter's update over that of the full one",
            axis="‖X‖_F / ‖ΔW‖_F",
            pool=_make_pool("norm_ratio"),
            terminal=True,
        ),
        Shown(
            "column_space.overlap",
            "column space",
            "Overlap of the adapter's output directions with the largest of the update; in "
            "brackets: by chance",
            axis="overlap of the column spaces",
            share=True,
            drop=4,
            head="col space",
            terminal=True,
            chance="column_space.random",
            detail=True,
        ),
        Shown(
            "row_space.overlap",
            "row space",
            "Overlap of the adapter's input directions with the largest of the update; in "
            "brackets: by chance",
            axis="overlap of the row spaces",
            share=True,
            drop=5,
            terminal=True,
            chance="row_space.random",
            detail=True,
        ),
        Shown(
            "parts.direction",
            "direction",
            "Part of ε² due to the angle between the adapter's update and the full one",
            axis="part of ε² due to direction",
            pool=_pool_part("direction"),
            drop=6,
            terminal=True,
            detail=True,
        ),
        Shown(
            "parts.scale",
            "scale",
            "Part of ε² that another α would gain over the better of the adapter and BASE",
            axis="part of ε² due to scale",
            pool=_pool_part("scale"),
            drop=7,
            terminal=True,
            detail=True,
        ),
        Shown("best_scale", "best scale", "Factor that minimizes ε", pool=_make_pool("best_scale")),
        Shown(
            "epsilon_best_scale",
            "ε at best",
            "ε at the best scale",
            pool=_make_pool("epsilon_best_scale"),
        ),
        Shown(
            "data.epsilon",
            "ε in C^½",
            "ε of the layer's output on the text of the activations, ‖(ΔW − X)C^½‖/‖ΔW·C^½‖",
            axis="ε in the metric of the data",
            drop=2,
            terminal=True,
        ),
        Shown(
            "data.least_epsilon",
            "C^½ floor",
            "Lower bound on that ε for an update of this rank",
            drop=3,
            terminal=True,
        ),
        Shown(
            "before_rounding.epsilon",
            "ε before rounding",
            "Expected distance to the update before rounding, over its estimated norm",
            pool=_pool_before_rounding,
            head="ε hidden",
            drop=1,
            terminal=True,
        ),
        COSINE_TO_BASE,
    )
    guards: ClassVar[tuple[Guard, ...]] = (
        Guard(
            "epsilon",
            "higher",
            "the adapter is further from the full fine-tune than before: check its scaling and its "
            "rank",
            where=(("role", "adapter"),),
        ),
        Guard(
            "cosine",
            "lower",
            "the adapter's direction differs more than before: compare its data and its learning "
            "rate",
            where=(("role", "adapter"),),
        ),
    )
    record: Literal["residual"] = "residual"
    layer: str
    shape: tuple[int, ...]
    adapter: str
    role: Literal["adapter", "reference"]
    rank: Annotated[int | None, Shown(axis="rank r", pool="range", head="r", terminal=True)]
    fro: Norm
    base_fro: Norm | None
    adapter_fro: Norm
    method: str
    column_space: Agreement | None
    row_space: Agreement | None
    data: Distance | None
    limited_by: Annotated[
        Limit | None,
        Shown(
            main=True,
            pool=lambda records: count_texts(record.limited_by or "-" for record in records),
        ),
    ]
    resolution: Resolution | None
    blocks: Count | None = None
    before_rounding: Expected | None = None

    @property
    def gap(self) -> float:
        """‖D − X‖_F."""
        return self.adapter_fro if self.epsilon is None else self.epsilon * self.fro

    @property
    def inner(self) -> float:
        """⟨D, X⟩."""
        return (self.cosine or 0.0) * self.fro * self.adapter_fro

    @property
    def floor(self) -> float:
        """Lower bound on ‖D − X‖_F for X's rank; without a rank 0, or ‖D‖_F if X is zero."""
        smallest = self.least_epsilon
        return (float(self.adapter_fro == 0.0) if smallest is None else smallest) * self.fro
