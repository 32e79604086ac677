"""What the records of a run's layers show of it: its checkpoints, and the run as a whole.

A run is compared with what shows without any training: a random walk, and the shrinking steps of a
schedule. Its trajectory ΔW_1, …, ΔW_T that starts at ΔW_0 = 0 enters by its Gram matrix K_st =
⟨ΔW_s, ΔW_t⟩ alone.

The first direction over time is the first eigenvector of K, without centring: Σ_t ‖ΔW_t‖² is its
energy. A random walk whose increments are independent, of mean zero and of the measured norms d_i,
has E K_st = Σ_{i ≤ min(s,t)} d_i²; in high dimension K itself is near that. Even so its first
direction has most of the energy, and its coefficient grows almost linearly with the step: with
equal norms and T → ∞, 8/π² of the energy and R² = 0.96 (tests simulate both). Reference: Antognini
and Sohl-Dickstein 2018, "PCA of high dimensional random walks with comparison to neural network
training" (arXiv 1806.08805).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import median, mode
from typing import Any

import numpy as np

from lora_diag.diagnostics.checkpoints.factors import Array
from lora_diag.diagnostics.checkpoints.held_out import describe_losses
from lora_diag.diagnostics.checkpoints.record import (
    CheckpointLayer,
    RunCheckpoint,
    State,
    Trajectory,
    group_by,
)
from lora_diag.diagnostics.checkpoints.series import CheckpointSeries, Step
from lora_diag.records import Probe
from lora_diag.rendering.text import middle
from lora_diag.running.fingerprint import legible

# Distance from the last checkpoint, as a fraction of ‖ΔW_T‖, within which a run counts as settled.
NEAR = 0.1

# Checkpoints on either side whose increments an increment is compared with.
NEIGHBOURS = 2

# Limits, chosen so that none of 13 healthy runs crosses any of them: 8 LoRA runs and 3 full
# fine-tunes of the sample model of 10 to 20 checkpoints, with cosine and constant rates, and one of
# each of a model of 135M parameters. Of 76 simulated runs of many schedules (Adam, LoRA of 10
# layers, 20 to 100 checkpoints) none does either. A lost direction loses its energy; a growing
# direction leaves the energy of the others unchanged. In simulated runs whose effective rank minus
# 1 more than halved, the energy outside of σ₁ fell to 0.46 at the lowest, and to 0.0012 at the
# highest where all directions but one were removed.
SUDDEN, SUDDEN_ENERGY = 0.4, 0.25
SLOW, SLOW_ENERGY = 0.5, 0.5
# The largest increment over the median of its neighbours was 1.4, of a layer 1.7; no exchange
# shortened a path.
SPIKED, SPIKED_LAYER, SWAPPED = 3.0, 6.0, 0.9
# Over the same ratio of the median layer, where that is above 1, that of a layer was 1.7 at the
# highest, too; with steps 60 times as large in one layer, for 5 of the 20 steps between two
# checkpoints, it was 2.3 to 5.0.
SPIKED_ALONE, ENOUGH_LAYERS = 2.0, 4
# The smallest mean cosine of the 13 was 0.35. Between two runs in turn cosines are near −1, between
# states with independent noise −0.5.
WALK_COSINE, WALK_SHARE, WALK_DRIFT, ALTERNATING = 0.1, 0.05, 0.1, -0.7
# Of a walk with momentum 0.9 the cosine of far increments is 0.02 with checkpoints every 5 or 10
# steps; of the sample run it is 0.08, while its drift of 0.09 and the mean cosine of 0.53 are those
# that momentum alone could give.
WALK_FAR = 0.05
# Simulated walks have the cosine of momentum to 0.02; healthy runs that have converged exceed it by
# 0.12 and more.
WALK_MOMENTUM = 0.05
# Increments so many steps apart are not correlated by momentum up to 0.9: at most 0.12.
MOMENTUM, APART = 0.9, 20
# Cosine of the factors A of two checkpoints; of two random starts, about 1/√(r·in).
UNRELATED = 0.1
# A layer without any changed entry is frozen if another has changed more of its entries: rounding
# hides no such step.
CHANGED = 0.5
# A constant pace along a line comes within a tenth of its end at 0.9 of the steps, a random walk at
# 0.99.
LATEST_SETTLED = 0.75
# Constant steps add 10% of the norm in the last tenth, a random walk 5%, a cosine schedule 0.3%.
GROWING = 0.02


def pool_checkpoints(
    steps: Sequence[Step],
    series: CheckpointSeries,
    layers: Sequence[CheckpointLayer],
    probes: Sequence[Probe] = (),
) -> list[RunCheckpoint]:
    """Return the record of every checkpoint.

    Args:
        steps: The checkpoints, in order.
        series: The run, with the trainer's log.
        layers: The records of their layers.
        probes: Their held-out losses.
    """
    by_step = group_by(layers, "step")
    checkpoints = []
    before = 0
    earlier: list[CheckpointLayer] = []
    for step in steps:
        group, path = by_step[step.step], legible(step.path)
        fields = series.logged_between(before, step.step) | pool_layers(group, earlier)
        losses = describe_losses(probes, path)
        fields |= {"foreign": step.step in series.foreign}
        checkpoints.append(
            RunCheckpoint(step=step.step, path=path, final=step.final, losses=losses, **fields)
        )
        before = step.step
        earlier = group
    return checkpoints


def pool_layers(
    group: Sequence[CheckpointLayer], earlier: Sequence[CheckpointLayer]
) -> dict[str, Any]:
    """Return the fields of a checkpoint that pool its layers.

    Args:
        group: The records of its layers.
        earlier: Those of the checkpoint before; empty for the first.
    """
    fro = relative = increment = cosine = None
    finite = [record for record in group if record.fro is not None]
    if finite:
        fro = math.hypot(*(record.fro or 0.0 for record in finite))
        base_fro = math.hypot(*(record.base_fro or 0.0 for record in finite))
        relative = fro / base_fro if base_fro else None
    moved = {record.layer: record.increment for record in group if record.increment is not None}
    if moved:
        increment = math.hypot(*moved.values())
    # Of layers that are finite at three checkpoints; the cosine is None if an increment is zero.
    before = {record.layer: record.increment for record in earlier}
    cosines = {record.layer: record.cosine or 0.0 for record in group}
    sizes, sizes_before, products = [], [], []
    for name, size in moved.items():
        size_before = before.get(name)
        if size_before is not None:
            sizes.append(size)
            sizes_before.append(size_before)
            products.append(size * size_before * cosines[name])
    length = math.hypot(*sizes) * math.hypot(*sizes_before)
    if length:
        cosine = max(-1.0, min(1.0, math.fsum(products) / length))
    medians = ("spectral_share", "effective_rank", "overlap_next", "overlap_last", "overlap_random")
    return {
        "fro": fro,
        "relative": relative,
        "increment": increment,
        "cosine": cosine,
        **{name: middle([getattr(record, name) for record in group]) for name in medians},
        "layers": len(group),
        "dead": sum(record.dead for record in group),
        "non_finite": sum(record.non_finite is not None for record in group),
    }


def judge_trajectory(
    layers: Sequence[CheckpointLayer], checkpoints: Sequence[RunCheckpoint]
) -> Trajectory:
    """Return the record of the run as a whole.

    Args:
        layers: The records of the layers, each at all checkpoints.
        checkpoints: The records of the checkpoints, in order.
    """
    steps = [checkpoint.step for checkpoint in checkpoints]
    by_layer = group_by(layers, "layer")
    dead = [layer for layer, group in by_layer.items() if group[-1].dead]
    finite = {layer: group for layer, group in by_layer.items() if _is_finite(group)}
    unfit = [layer for layer in by_layer if layer not in finite]
    alive = {layer: group for layer, group in finite.items() if not group[-1].dead}
    frozen = find_frozen(alive)
    collapsed = find_collapses(alive)
    scales = _list_scales(steps, checkpoints)
    spikes = find_spikes(checkpoints, scales)
    spiked = find_spiked_layers(
        {layer: find_spikes(group, scales) for layer, group in finite.items()}, steps
    )
    spike = max(spikes)
    spike_step = next(
        step for step, ratio in zip(steps, spikes, strict=True) if ratio >= min(SPIKED, spike)
    )
    spiked_step = mode(spiked.values()) if spiked else None
    if spike > SPIKED:
        spiked_step = spike_step
    gram = sum_grams(list(finite.values())) if len(steps) > 2 else None
    path = _judge_path(gram, checkpoints) if gram is not None and gram[-1, -1] > 0 else {}
    other_run = find_other_run(by_layer, checkpoints)
    frozen_step = min(frozen.values(), default=None)
    affected = {
        "dead": dead,
        "collapsed": [*collapsed],
        "spiked": [*spiked],
        "frozen": [*frozen],
        "non_finite": unfit,
    }
    bad = [checkpoint.step for checkpoint in checkpoints if checkpoint.non_finite]
    states: list[tuple[State, object, int | None]] = [
        ("non-finite", bad, min(bad, default=None)),
        ("two runs", other_run, other_run),
        ("out of order", path.get("swapped"), (path.get("swapped") or (None,))[0]),
        ("dead", dead, None),
        ("collapsed", collapsed, mode(collapsed.values()) if collapsed else None),
        ("spiked", spiked or spike > SPIKED, spiked_step),
        ("frozen", frozen, frozen_step),
        ("random walk", path and is_walk(path), None),
        ("settled", path.get("settled"), path.get("settled")),
        ("growing", path.get("growth", 0.0) > GROWING, None),
        ("moving", path, None),
    ]
    state, step = next(((name, step) for name, holds, step in states if holds), (None, None))
    return Trajectory(
        state=state,
        step=step,
        affected={name: tuple(layers) for name, layers in affected.items()},
        **{name: len(layers) for name, layers in affected.items()},
        repeated=tuple(each.step for each in checkpoints if each.increment == 0.0 and each.fro),
        spike=spike or None,
        spike_step=spike_step if spike else None,
        frozen_step=frozen_step,
        other_run=other_run,
        **path,
    )


def _is_finite(group: Sequence[CheckpointLayer]) -> bool:
    """Return whether a layer is finite at all checkpoints."""
    return all(record.non_finite is None for record in group)


def _list_scales(steps: Sequence[int], checkpoints: Sequence[RunCheckpoint]) -> list[Array]:
    """Return what increments are in proportion to: steps, and learning rates where they are known.

    A spike is far above its neighbours by all of them.
    """
    scales: list[Array] = [np.asarray(np.diff(steps, prepend=0), np.float64)]
    rates = np.array([checkpoint.rate_sum or 0.0 for checkpoint in checkpoints], np.float64)
    if (rates > 0).all():
        scales.append(rates)
    return scales


def find_collapses(groups: Mapping[str, Sequence[CheckpointLayer]]) -> dict[str, int]:
    """Return the layers that lost most of their rank, each with the checkpoint that shows it first.

    Suddenly, from one checkpoint to the next; or over the run, if more than half of all layers do.
    Two earlier checkpoints must show the rank: the first update of a run, and one with a spike,
    have more of it. Energy outside of σ₁ must be lost, too: near the start, where Adam's step is
    lr·sign(g) of high rank, it grows as the rank falls.
    """
    sudden: dict[str, int] = {}
    slow: dict[str, int] = {}
    for layer, group in groups.items():
        ranks = [record.effective_rank or 1.0 for record in group]
        rest = [(record.fro or 0.0) ** 2 * (1 - (record.spectral_share or 0.0)) for record in group]
        for t in range(2, len(group)):
            rank, energy = max(ranks[t:]), max(rest[t:])
            # An effective rank is at least 1.
            falls = rank - 1 < SUDDEN * (min(ranks[t - 2 : t]) - 1)
            if falls and energy < SUDDEN_ENERGY * min(rest[t - 2 : t]):
                sudden.setdefault(layer, group[t].step)
            # The second largest of all before: two checkpoints had it.
            if rank < SLOW * sorted(ranks[:t])[-2] and energy < SLOW_ENERGY * sorted(rest[:t])[-2]:
                slow.setdefault(layer, group[t].step)
    return {**slow, **sudden} if 2 * len(slow) > len(groups) else sudden


def find_frozen(groups: Mapping[str, Sequence[CheckpointLayer]]) -> dict[str, int]:
    """Return the layers that moved and then stopped for the rest of the run, each with its last
    step that moved it.

    No stored entry of the layer changes, while another layer changes most of its entries.
    """
    frozen: dict[str, int] = {}
    least = []  # of all layers, by checkpoint
    for column in zip(*groups.values(), strict=True):
        known = [record.unchanged for record in column if record.unchanged is not None]
        least.append(min(known, default=1.0))
    for layer, group in groups.items():
        last = 0
        for t, record in enumerate(group):
            # A sample of rows does not show that the others stood still, too.
            if record.unchanged != 1.0 or record.method == "rows":
                last = t
        if (group[last].increment or 0.0) > 0 and min(least[last + 1 :], default=1.0) < CHANGED:
            frozen[layer] = group[last].step
    return frozen


def find_spikes(
    group: Sequence[CheckpointLayer | RunCheckpoint], scales: Sequence[Array]
) -> list[float]:
    """Return the ratio of each increment to its neighbours: the smallest over what increments are
    in proportion to.
    """
    lengths = np.array([each.increment or 0.0 for each in group])
    ratios = [spike_ratios(lengths / scale) for scale in scales]
    return [min(pair) for pair in zip(*ratios, strict=True)]


def find_spiked_layers(
    ratios: Mapping[str, Sequence[float]], steps: Sequence[int]
) -> dict[str, int]:
    """Return the layers with a spike, each with its checkpoint.

    Args:
        ratios: By layer, the ratio of each increment to its neighbours. Of several layers, what all
            have in common, such as a schedule, is divided out.
        steps: The steps of the checkpoints.
    """
    spiked = dict[str, int]()
    if not ratios:
        return spiked
    common = np.maximum(np.median(list(ratios.values()), axis=0), 1.0)
    for layer, values in ratios.items():
        largest = int(np.argmax(values))
        alone = np.array(values) / common if len(ratios) >= ENOUGH_LAYERS else np.zeros(len(values))
        if values[largest] > SPIKED_LAYER:
            spiked[layer] = steps[largest]
        elif alone.max() > SPIKED_ALONE:
            spiked[layer] = steps[int(alone.argmax())]
    return spiked


def find_other_run(
    groups: Mapping[str, Sequence[CheckpointLayer]], checkpoints: Sequence[RunCheckpoint]
) -> int | None:
    """Return the first checkpoint that is not of the same run as the one before it; None without
    such.

    Its log contradicts the other's; or its factors A are unrelated in most layers; or most
    increments take back the one before, as between two runs in turn.
    """
    for checkpoint, records in zip(checkpoints, zip(*groups.values(), strict=True), strict=True):
        kinship = middle([record.kinship for record in records])
        if checkpoint.foreign or (kinship is not None and kinship < UNRELATED):
            return checkpoint.step
    turns = [checkpoint.cosine for checkpoint in checkpoints if checkpoint.cosine is not None]
    if len(turns) > 2 and median(turns) < ALTERNATING:
        return checkpoints[1].step
    return None


def is_walk(path: Mapping[str, Any]) -> bool:
    """Return whether a path is that of independent steps, with momentum or without."""
    turn = path["cosine"]
    drift = path["drift"]
    far = path["cosine_far"]
    if turn is None or drift is None or far is None:
        return False
    is_turning = -WALK_COSINE < turn < max(WALK_COSINE, path["cosine_momentum"] + WALK_MOMENTUM)
    is_spread = abs(path["first_share"] - path["first_share_random"]) < WALK_SHARE
    return bool(is_turning and is_spread and drift < WALK_DRIFT and far < WALK_FAR)


def sum_grams(groups: Sequence[Sequence[CheckpointLayer]]) -> Array | None:
    """Return ⟨ΔW_s, ΔW_t⟩ over all layers, ``(T, T)``; None without layers, or where updates are
    not all compared.
    """
    size = len(groups[0]) if groups else 0
    total = np.zeros((size, size))
    for group in groups:
        for t, record in enumerate(group):
            if len(record.gram) != t + 1:
                return None
            total[t, : t + 1] += np.array(record.gram, np.float64)
    return np.asarray(total + np.tril(total, -1).T) if groups else None


def _judge_path(gram: Array, checkpoints: Sequence[RunCheckpoint]) -> dict[str, Any]:
    """Return the fields of the run that follow from the Gram matrix of three or more updates."""
    steps = [checkpoint.step for checkpoint in checkpoints]
    fro = math.sqrt(gram[-1, -1])
    products = increments_of(gram)
    lengths = np.sqrt(np.maximum(products.diagonal(), 0.0))
    weight = float((lengths[1:] * lengths[:-1]).sum())
    share, linear = first_direction(gram, steps)
    share_random, linear_random = first_direction(random_walk(gram), steps)
    drift, far_cosine = measure_drift(gram, steps)
    ratio, *swapped = best_swap(gram)
    settled = steps[settled_from(distances(gram)[1:, -1] / fro)]
    settled_schedule = growth_schedule = None
    rates = np.cumsum([checkpoint.rate_sum or 0.0 for checkpoint in checkpoints])
    if rates[0] > 0 and (np.diff(rates) > 0).all():
        settled_schedule = steps[settled_from(1 - rates / rates[-1])]
        growth_schedule = 1 - _at_nine_tenths(steps, rates) / float(rates[-1])
    return {
        "first_share": share,
        "first_share_random": share_random,
        "linear": linear,
        "linear_random": linear_random,
        "cosine": float(products.diagonal(1).sum() / weight) if weight > 0 else None,
        "cosine_momentum": correlate_momentum(median(np.diff(steps, prepend=0).tolist())),
        "cosine_far": far_cosine,
        "drift": drift,
        "swapped": tuple(steps[i] for i in swapped) if ratio < SWAPPED else None,
        "settled": settled if settled <= LATEST_SETTLED * steps[-1] else None,
        "settled_schedule": settled_schedule,
        "growth": 1 - _at_nine_tenths(steps, np.sqrt(gram.diagonal())) / fro,
        "growth_schedule": growth_schedule,
    }


def _at_nine_tenths(steps: Sequence[int], values: Array) -> float:
    """Return a value at nine tenths of the run, linear between checkpoints, 0 at step 0."""
    return float(np.interp(0.9 * steps[-1], [0, *steps], [0.0, *values]))


def increments_of(gram: Array) -> Array:
    """Return ⟨D_s, D_t⟩ of the increments D_t = ΔW_t − ΔW_{t−1}, D_1 = ΔW_1, from the Gram matrix
    of ΔW_1, …, ΔW_T.
    """
    return np.diff(np.diff(gram, axis=0, prepend=0.0), axis=1, prepend=0.0)


def measure_drift(gram: Array, steps: Sequence[int]) -> tuple[float | None, float | None]:
    """Return what increments at least ``APART`` steps apart have in common: a fraction of ‖ΔW_T‖²,
    and a mean cosine.

    ‖ΔW_T‖² = Σ_i‖D_i‖² + Σ_{i≠j}⟨D_i, D_j⟩; of a random walk all ⟨D_i, D_j⟩ have expectation 0. The
    fraction finds a slow drift in many steps, the cosine that of a schedule whose first steps have
    most of the energy. Both are None without such increments, the cosine also where they are zero.
    """
    products, starts = increments_of(gram), np.array([0, *steps[:-1]])
    lengths = np.sqrt(np.maximum(products.diagonal(), 0.0))
    is_far = starts[None, :] - np.array(steps)[:, None] >= APART
    if not is_far.any():
        return None, None
    common, most = float(products[is_far].sum()), float(np.outer(lengths, lengths)[is_far].sum())
    return 2 * common / float(gram[-1, -1]), common / most if most > 0 else None


def correlate_momentum(interval: float, momentum: float = MOMENTUM) -> float:
    """Return the cosine of consecutive increments of n steps each, of a random walk with momentum.

    Velocities of steps k apart have the correlation βᵏ. Their sum over n steps has the variance n(1
    + β)/(1 − β) − 2β(1 − βⁿ)/(1 − β)², and the covariance β(1 − βⁿ)²/(1 − β)² with the next sum.

    >>> [round(correlate_momentum(n), 2) for n in (1, 10, 20, 100)]
    [0.9, 0.52, 0.31, 0.05]
    """
    left = 1.0 - float(momentum**interval)
    variance = interval * (1 + momentum) * (1 - momentum) - 2 * momentum * left
    return momentum * left**2 / variance


def random_walk(gram: Array) -> Array:
    """Return the expected Gram matrix of a random walk with the same norms of increments."""
    energy = np.cumsum(increments_of(gram).diagonal())
    steps = np.arange(len(gram))
    return np.asarray(energy[np.minimum(steps[:, None], steps)], np.float64)


def first_direction(gram: Array, steps: Sequence[int]) -> tuple[float, float]:
    """Return the energy fraction of the first direction over time, and R² of its coefficient as a
    line in the step.

    Args:
        gram: Gram matrix of three or more updates that are not all zero, ``(T, T)``.
        steps: Their steps.

    Example:
        >>> share, linear = first_direction(
        ...     np.minimum.outer(np.arange(1.0, 501), np.arange(1.0, 501)), range(1, 501)
        ... )
        >>> round(share, 2), round(linear, 2)
        (0.81, 0.96)
    """
    values, vectors = np.linalg.eigh(gram / np.abs(gram).max())
    return float(values[-1] / values.sum()), float(np.corrcoef(steps, vectors[:, -1])[0, 1] ** 2)


def distances(gram: Array) -> Array:
    """Return the distances of ΔW_0 = 0, ΔW_1, …, ΔW_T from each other, ``(T + 1, T + 1)``."""
    padded = np.pad(gram, (1, 0))
    squares = padded.diagonal()
    return np.asarray(np.sqrt(np.maximum(squares[:, None] + squares - 2 * padded, 0.0)), np.float64)


def settled_from(remaining: Array) -> int:
    """Return the first checkpoint from which on the distance to the last one, over ‖ΔW_T‖, is at
    most ``NEAR``.
    """
    return max((t + 1 for t, value in enumerate(remaining) if value > NEAR), default=0)


def spike_ratios(lengths: Array) -> list[float]:
    """Return each increment over the median of its neighbours; 0 for a run of fewer than four
    increments.

    Args:
        lengths: ‖D_t‖, in proportion to the steps between checkpoints.
    """
    ratios = []
    for t, length in enumerate(lengths.tolist()):
        near = [*lengths[max(0, t - NEIGHBOURS) : t], *lengths[t + 1 : t + 1 + NEIGHBOURS]]
        moving = [each for each in near if each > 0]  # before and after, a layer may be frozen
        ratios.append(length / median(moving) if moving and len(lengths) > 3 else 0.0)
    return ratios


def best_swap(gram: Array) -> tuple[float, int, int]:
    """Return the exchange of two checkpoints that shortens the path most, and how much.

    Of the edges that it changes, both the sum and the longest must become shorter: to put an
    outlier at the end of the path would shorten only the sum.

    Returns:
        The larger of the two ratios, new over old, and both positions; 1 without a shorter path.
    """
    apart, best = distances(gram), (1.0, 0, 0)
    for first, second in combinations(range(1, len(apart)), 2):
        order = np.arange(len(apart))
        order[[first, second]] = second, first
        edges = sorted({first - 1, first, second - 1, second} - {len(gram)})  # from i to i + 1
        old, new = apart.diagonal(1)[edges], apart[order[:-1], order[1:]][edges]
        if old.min() > 0:
            best = min(
                best,
                (float(max(new.sum() / old.sum(), new.max() / old.max())), first - 1, second - 1),
            )
    return best
