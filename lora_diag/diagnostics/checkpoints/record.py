"""Records of ``checkpoints``: each layer of each checkpoint of a run, each checkpoint, the run, and
the choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from lora_diag.records.base import (
    Count,
    Guard,
    LayerRecord,
    Nats,
    Norm,
    Ratio,
    Record,
    Share,
    Shown,
    WholeRecord,
)

# Overlaps of the spaces of the largest singular vectors, with those of random spaces.
_OVERLAP = Shown(drop=7, chance="overlap_random", terminal=True)


class CheckpointLayer(LayerRecord):
    """One layer of one checkpoint: its update ΔW_t, and how it changed since the checkpoint before,
    ΔW_{t−1}.

    Args:
        layer: The weight's name in BASE, or in the adapter without BASE.
        step: Training step of the checkpoint.
        shape: ``(out, in)``.
        fro: Frobenius norm of the update, ‖ΔW_t‖_F; null where ``non_finite``, and so are all
            numbers that follow from it.
        base_fro: ‖W_base‖_F; null without BASE.
        relative: ‖ΔW_t‖_F / ‖W_base‖_F; null without BASE.
        sigma_1: σ_1(ΔW_t).
        spectral_share: Fraction of the energy in σ_1, σ_1² / ‖ΔW_t‖_F²; null for a zero update.
        stable_rank: ‖ΔW_t‖_F² / σ_1²; null for a zero update.
        effective_rank: Exponential of the entropy of σ_i²/Σσ²; null for a zero update, or if not
            all σ_i were computed.
        energy: C(r) = Σ_{i≤r}σ_i² / ‖ΔW_t‖_F² by r; null for a zero update, or beyond the computed
            values.
        directions: k, the dimension of the space of the largest left singular vectors of ΔW_t that
            overlaps compare; less than requested if the rank is.
        overlap_next: Overlap of this space with that of the next checkpoint, ‖U_tᵀU_{t+1}‖_F²/k: 1
            for equal spaces; null for the last checkpoint.
        overlap_last: Overlap of this space with that of the last checkpoint; null for the last.
        overlap_random: k/out, the expected overlap of random spaces.
        increment: ‖ΔW_t − ΔW_{t−1}‖_F; of the first checkpoint, ‖ΔW_t‖_F.
        cosine: Cosine of this increment and the one before; null for the first checkpoint and zero
            increments.
        unchanged: Fraction of stored entries (of an adapter: of its factors) that are equal in the
            checkpoint before; of the first checkpoint in BASE, null for an adapter.
        kinship: Cosine of the stored factor A and that of the checkpoint before, near 0 for factors
            of two runs; null for weights, and where the rank has changed.
        dead: Whether ΔW_t = 0.
        non_finite: Why ΔW_t is not finite; null if it is.
        method: Method of the singular values; of factors ``factored``, without singular values
            ``rows``: norms and cosine are estimates from randomly sampled rows, as ``LoraMonitor``
            measures weights that are trained.
        fro_error: Standard error of ``fro`` from the sampling of rows; null if it is not sampled.
        increment_error: Standard error of ``increment``, likewise.
        gram: ⟨ΔW_t, ΔW_s⟩ for every checkpoint s up to this one; empty if only neighbours were
            compared.
        overlaps: ‖U_tᵀU_s‖_F²/k for every checkpoint s before this one; empty likewise.
    """

    key: ClassVar[tuple[str, ...]] = ("layer", "step")
    part_label: ClassVar[str] = "step {step}"
    table: ClassVar[tuple[Shown | str, ...]] = (
        "fro",
        "increment",
        "cosine",
    )
    guards: ClassVar[tuple[Guard, ...]] = (
        Guard(
            "effective_rank",
            "lower",
            "the update has fewer effective directions at this step than before: a collapse",
        ),
    )
    record: Literal["checkpoint_layer"] = "checkpoint_layer"
    layer: str
    step: int
    shape: tuple[int, int]
    fro: Annotated[Norm | None, Shown(title="‖ΔW‖", axis="‖ΔW‖_F", main=True)]
    base_fro: Norm | None = None
    relative: Ratio | None = None
    sigma_1: Norm | None = None
    spectral_share: Annotated[
        Share | None, Shown(title="σ₁² share", axis="σ₁² / ‖ΔW‖_F²", main=True)
    ] = None
    stable_rank: float | None = None
    effective_rank: Annotated[
        float | None, Shown(title="eff. rank", axis="effective rank", main=True)
    ] = None
    energy: dict[str, Share | None] = Field(default_factory=dict)
    directions: Count = 0
    overlap_next: Annotated[Share | None, _OVERLAP] = None
    overlap_last: Annotated[Share | None, _OVERLAP] = None
    overlap_random: Share | None = None
    increment: Annotated[Norm | None, Shown(main=True)] = None
    cosine: Annotated[float | None, Shown(main=True, form=".2f")] = None
    unchanged: Share | None = None
    kinship: float | None = None
    dead: bool = False
    non_finite: str | None = None
    method: str = "factored"
    fro_error: Norm | None = None
    increment_error: Norm | None = None
    gram: tuple[float | None, ...] = ()
    overlaps: tuple[float | None, ...] = ()

    @classmethod
    def check_together(cls, records: Sequence[Any]) -> str | None:
        """Return which layer lacks a step, or overlaps with earlier steps; None if every layer has
        all.
        """
        steps = list(group_by(records, "step"))
        for layer, group in group_by(records, "layer").items():
            if sorted(record.step for record in group) != sorted(steps):
                return (
                    f"layer {layer!r} is recorded at {len(group)} of the run's {len(steps)} steps"
                )
            for index, record in enumerate(group):
                if record.overlaps and len(record.overlaps) != index:
                    place = f"layer {layer!r}, step {record.step}"
                    return (
                        f"{place}: overlaps has {len(record.overlaps)} entries, where {index} "
                        "steps came before"
                    )
        return None


def group_by(records: Iterable[CheckpointLayer], field: str) -> dict[Any, list[CheckpointLayer]]:
    """Return records by the value of a field, in the order of first occurrence."""
    groups: dict[Any, list[CheckpointLayer]] = {}
    for record in records:
        groups.setdefault(getattr(record, field), []).append(record)
    return groups


class HeldOutLoss(Record):
    """The loss of one checkpoint on one evaluation set.

    Args:
        loss: Mean loss per token.
        error: Standard error of ``loss``; null if it is not known.
        excess: ``loss`` minus that of the best checkpoint on this set, paired by sequence; null
            likewise.
        excess_error: Standard error of ``excess``; null likewise.
    """

    loss: Nats
    error: Nats | None = None
    excess: Nats | None = None
    excess_error: Nats | None = None


class RunCheckpoint(WholeRecord):
    """One checkpoint of a run: its measurements pooled over layers, and what the trainer logged.

    Args:
        step: Training step, or epoch where the run counts only those.
        path: Its path.
        final: Whether it is the final model in the run's own folder.
        foreign: Whether its log contradicts that of the checkpoint before: they are of two runs.
        losses: Held-out loss by evaluation set; empty if none was measured.
        train_loss: Mean of the training losses that the trainer logged since the checkpoint before;
            null without a log.
        eval_loss: Evaluation loss that the trainer logged at this step; null likewise.
        rate: Learning rate logged last up to this step; null likewise.
        rate_sum: Σ of the learning rates of the steps since the checkpoint before, between logged
            rates linear; null likewise.
        fro: Frobenius norm of the update over the layers that are finite, √Σ‖ΔW_t‖_F².
        relative: Norm of the update over that of the base weights, of the same layers; null without
            BASE.
        increment: Norm of the change since the checkpoint before, √Σ of the layers' squared
            increments; null if no layer has one.
        cosine: Cosine of this increment and the one before, of all layers together; null likewise.
        spectral_share: Fraction of the energy in σ_1, median of the layers that are not zero; null
            without any.
        effective_rank: Effective rank of the update, median likewise.
        overlap_next: Overlap of the largest directions with the next checkpoint, median of the
            layers.
        overlap_last: Overlap of the largest directions with the last checkpoint, median of the
            layers.
        overlap_random: The expected overlap of random spaces, likewise.
        layers: Number of measured layers.
        dead: Number of layers with ΔW_t = 0.
        non_finite: Number of layers that are not finite.
    """

    key: ClassVar[tuple[str, ...]] = ("step",)
    table: ClassVar[tuple[Shown | str, ...]] = (
        "fro",
        "relative",
        "increment",
        "cosine",
        "spectral_share",
        "effective_rank",
        "overlap_next",
        "overlap_last",
        "rate",
    )
    record: Literal["checkpoint"] = "checkpoint"
    step: int
    path: str
    final: bool = False
    foreign: bool = False
    losses: dict[str, HeldOutLoss] = Field(default_factory=dict)
    train_loss: Annotated[Nats | None, Shown(terminal=True)] = None
    eval_loss: Annotated[Nats | None, Shown(drop=2, terminal=True)] = None
    rate: Annotated[Ratio | None, Shown(drop=8, terminal=True)] = None
    rate_sum: Ratio | None = None
    fro: Annotated[Norm | None, Shown(title="‖ΔW‖", axis="‖ΔW‖_F", main=True)] = None
    relative: Annotated[Ratio | None, Shown(title="‖ΔW‖/‖W‖", drop=1, terminal=True)] = None
    increment: Annotated[Norm | None, Shown(drop=1, terminal=True)] = None
    cosine: Annotated[float | None, Shown(drop=3, form=".2f", terminal=True)] = None
    spectral_share: Annotated[Share | None, Shown(title="σ₁² share", drop=4, terminal=True)] = None
    effective_rank: Annotated[float | None, Shown(title="eff. rank", drop=5, terminal=True)] = None
    overlap_next: Annotated[Share | None, _OVERLAP] = None
    overlap_last: Annotated[Share | None, _OVERLAP] = None
    overlap_random: Share | None = None
    layers: Count = 0
    dead: Count = 0
    non_finite: Count = 0


State = Literal[
    "non-finite",
    "two runs",
    "out of order",
    "dead",
    "collapsed",
    "spiked",
    "frozen",
    "random walk",
    "settled",
    "growing",
    "moving",
]


class Trajectory(WholeRecord):
    """The run as a whole, as far as weights show it.

    Args:
        state: What the weights show. The first of these that holds: ``non-finite``: a layer has NaN
            or Inf. ``two runs``: the checkpoints are not of one run. ``out of order``: with two
            checkpoints exchanged the path is much shorter. ``dead``: a layer ends with ΔW = 0, or
            all do. ``collapsed``: a layer lost most of its rank. ``spiked``: an increment far above
            its neighbours. ``frozen``: a layer stopped, while others move. ``random walk``:
            increments without a common direction. ``settled``: it stays near its end from
            ``settled`` on. ``growing``: ‖ΔW‖ still grows; ``moving``: it changes at about the same
            norm. Null for fewer than three checkpoints.
        step: The checkpoint that shows it first; null for states of the whole run.
        dead: Number of layers with ΔW = 0 at the last checkpoint.
        non_finite: Number of layers that are not finite at any.
        collapsed: Number of layers that lost most of their rank, suddenly or over the run.
        spiked: Number of layers with an increment far above its neighbours.
        frozen: Number of layers that moved, and are unchanged from ``frozen_step`` to the end while
            others move.
        frozen_step: The last checkpoint at which the first of these layers moved; null without any.
        affected: The names of these layers, by field.
        repeated: Checkpoints that are equal to the one before.
        other_run: The first checkpoint that is not of the same run as the one before it; null
            without such.
        swapped: Two checkpoints whose exchange shortens the path; null without such.
        spike: The largest ratio of an increment of all layers together to the median of its
            neighbours: the smaller of that per step and that per sum of learning rates, where these
            are known; null for fewer than four.
        spike_step: The checkpoint of that increment.
        first_share: Energy fraction of the first direction over time; null where updates are not
            all compared.
        first_share_random: The same of a random walk with the same norms of increments.
        linear: R² of the coefficient of that direction as a line in the step; null likewise.
        linear_random: The same of the random walk.
        cosine: Mean cosine of consecutive increments of all layers together, weighted by their
            lengths.
        cosine_momentum: The same of a random walk with momentum 0.9 and checkpoints at the median
            distance of these.
        cosine_far: The same of increments that are 20 or more steps apart: 0 of a random walk, with
            momentum up to 0.9 too; null without such increments.
        drift: Fraction of the final ‖ΔW‖² from inner products of these increments; null likewise.
        growth: Fraction of the final ‖ΔW‖ that was added in the last tenth of the steps.
        growth_schedule: The same of steps along a line, in proportion to the learning rates; null
            if not known.
        settled: The first checkpoint from which on the distance to the last one is at most a tenth
            of the final ‖ΔW‖; null if it is in the last quarter of the run.
        settled_schedule: The same of steps along a line, in proportion to the learning rates; null
            if not known.
    """

    key: ClassVar[tuple[str, ...]] = ("record",)
    record: Literal["trajectory"] = "trajectory"
    state: Annotated[State | None, Shown(main=True)]
    step: int | None = None
    dead: Count = 0
    non_finite: Count = 0
    collapsed: Count = 0
    spiked: Count = 0
    frozen: Count = 0
    frozen_step: int | None = None
    affected: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    repeated: tuple[int, ...] = ()
    other_run: int | None = None
    swapped: tuple[int, int] | None = None
    spike: Ratio | None = None
    spike_step: int | None = None
    first_share: Share | None = None
    first_share_random: Share | None = None
    linear: Share | None = None
    linear_random: Share | None = None
    cosine: float | None = None
    cosine_momentum: float | None = None
    cosine_far: float | None = None
    drift: float | None = None
    growth: float | None = None
    growth_schedule: float | None = None
    settled: int | None = None
    settled_schedule: int | None = None


class CheckpointChoice(WholeRecord):
    """The checkpoint to keep, judged by one quantity.

    Args:
        step: The best checkpoint.
        by: Name of the evaluation set that judged it.
        tied: Steps, in order, that this quantity does not distinguish from the best, which is one
            of them.
        earliest: The earliest checkpoint that is not distinguished from the best.
    """

    key: ClassVar[tuple[str, ...]] = ("by",)
    record: Literal["choice"] = "choice"
    step: Annotated[int, Shown(main=True)]
    by: Annotated[str, Shown(main=True)]
    tied: tuple[int, ...]
    earliest: Annotated[int, Shown(main=True)]


class Combination(WholeRecord):
    """An average or an extrapolation Σ_t c_tΔW_t of the checkpoints, compared with the best single
    one.

    The best checkpoint and the best combination are chosen on the first half of the sequences of a
    set and compared on the second half, since the lowest of several losses on a text is below its
    expectation there.

    Args:
        name: The rule, such as ``last:3``.
        steps: Steps of the combined checkpoints.
        weights: c_t.
        losses: Held-out loss by evaluation set, on all its sequences.
        by: The evaluation set that judged it.
        single: Step of the checkpoint with the lowest loss on the first half; null for fewer than
            eight sequences.
        chosen: Whether no other combination has a lower loss on the first half.
        gain: Loss of the best checkpoint, ``single``, minus that of the combination, on the second
            half; null likewise.
        gain_error: Standard error of ``gain``, from paired differences of blocks of sequences.
        sequences: Number of sequences of the second half.
    """

    key: ClassVar[tuple[str, ...]] = ("name",)
    record: Literal["combination"] = "combination"
    name: str
    steps: tuple[int, ...]
    weights: tuple[float, ...]
    losses: dict[str, HeldOutLoss] = Field(default_factory=dict)
    by: str
    single: int | None = None
    chosen: bool = False
    gain: Annotated[Nats | None, Shown(form="+.4f", main=True, error="gain_error")] = None
    gain_error: Nats | None = None
    sequences: Count = 0


class AxolotlArguments(BaseModel):
    """Settings of ``AxolotlPlugin`` in a configuration of axolotl.

    Args:
        lora_monitor: Arguments of ``LoraMonitor``.
    """

    lora_monitor: dict[str, Any] | None = None
