"""What the records of a run's layers show of it: its checkpoints, and the run as a whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mode
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_diag.diagnostics.checkpoints import nulls
from lora_diag.diagnostics.checkpoints.held_out import describe_losses
from lora_diag.diagnostics.checkpoints.record import Checkpoint, CheckpointLayer, State, Trajectory
from lora_diag.diagnostics.checkpoints.series import Series, Step
from lora_diag.records import Probe
from lora_diag.rendering.text import middle
from lora_diag.running.fingerprint import legible

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

# Limits, chosen so that none of 13 healthy runs crosses any of them: 8 LoRA runs and 3 full fine-tunes of the sample
# model of 10 to 20 checkpoints, with cosine and constant rates, and one of each of a model of 135M parameters.
# Of 728 series of layers, the effective rank fell from one checkpoint to the next to 0.67 at the lowest, with a rise
# of σ₁²/‖ΔW‖² by 0.20; that over a run, to 0.44, is not used alone. In the median layer it was to 0.85.
SUDDEN, SHARE_RISE, SLOW = 0.4, 0.25, 0.5
# The largest increment over the median of its neighbours was 1.4, of a layer 1.7; no exchange shortened a path.
SPIKED, SPIKED_LAYER, SWAPPED = 3.0, 6.0, 0.9
# The smallest mean cosine was 0.35.
WALK_COSINE, WALK_SHARE = 0.1, 0.05
# A constant pace along a line comes within a tenth of its end at 0.9 of the steps, a random walk at 0.99.
LATEST_SETTLED = 0.75
# Constant steps add 10% of the norm in the last tenth, a random walk 5%, a cosine schedule 0.3%.
GROWING = 0.02


def pool_checkpoints(
    steps: Sequence[Step], series: Series, layers: Sequence[CheckpointLayer], probes: Sequence[Probe] = ()
) -> list[Checkpoint]:
    """Return the record of every checkpoint.

    Args:
        steps: The checkpoints, in order.
        series: The run, with the trainer's log.
        layers: The records of their layers.
        probes: Their held-out losses.
    """
    by_step: dict[int, list[CheckpointLayer]] = {step.step: [] for step in steps}
    for record in layers:
        by_step[record.step].append(record)
    checkpoints = []
    before, earlier = 0, list[CheckpointLayer]()
    for step in steps:
        group = by_step[step.step]
        fields: dict[str, Any] = {**series.logged_between(before, step.step), **pool_layers(group, earlier)}
        fields |= {"path": legible(step.path), "losses": describe_losses(probes, legible(step.path))}
        checkpoints.append(Checkpoint(step=step.step, final=step.final, **fields))
        before, earlier = step.step, group
    return checkpoints


def pool_layers(group: Sequence[CheckpointLayer], earlier: Sequence[CheckpointLayer]) -> dict[str, Any]:
    """Return the fields of a checkpoint that pool its layers.

    Args:
        group: The records of its layers.
        earlier: Those of the checkpoint before; empty for the first.
    """
    finite = [record for record in group if record.fro is not None]
    fro = math.hypot(*(record.fro or 0.0 for record in finite))
    base_fro = math.hypot(*(record.base_fro or 0.0 for record in finite))
    increments = [record.increment for record in group if record.increment is not None]
    lengths_before = {record.layer: record.increment for record in earlier}
    pairs = [  # of layers that are finite at three checkpoints: both increments, and their cosine, 0 if one is zero
        (now, before, record.cosine or 0.0)
        for record in group
        if (now := record.increment) is not None and (before := lengths_before.get(record.layer)) is not None
    ]
    length = math.hypot(*(now for now, *_ in pairs)) * math.hypot(*(before for _, before, _ in pairs))
    product = math.fsum(now * before * cosine for now, before, cosine in pairs)
    medians = ("spectral_share", "effective_rank", "overlap_next", "overlap_last", "overlap_random")
    return {
        "fro": fro if finite else None,
        "relative": fro / base_fro if finite and base_fro else None,
        "increment": math.hypot(*increments) if increments else None,
        "cosine": max(-1.0, min(1.0, product / length)) if length else None,
        **{name: middle([getattr(record, name) for record in group]) for name in medians},
        "layers": len(group),
        "dead": sum(record.dead for record in group),
        "non_finite": sum(record.non_finite is not None for record in group),
    }


def judge(layers: Sequence[CheckpointLayer], checkpoints: Sequence[Checkpoint]) -> Trajectory:
    """Return the record of the run as a whole.

    Args:
        layers: The records of the layers, each at all checkpoints.
        checkpoints: The records of the checkpoints, in order.
    """
    steps = [checkpoint.step for checkpoint in checkpoints]
    by_layer: dict[str, list[CheckpointLayer]] = {}
    for record in layers:
        by_layer.setdefault(record.layer, []).append(record)
    finite = {layer: group for layer, group in by_layer.items() if all(record.non_finite is None for record in group)}
    dead = [layer for layer, group in by_layer.items() if group[-1].dead]
    collapsed = find_collapses({layer: group for layer, group in finite.items() if layer not in dead})
    # A spike is far above its neighbours both per step and per learning rate, where the rates are known.
    intervals, rates = np.diff(steps, prepend=0), np.array([checkpoint.rate_sum or 0.0 for checkpoint in checkpoints])
    scales = (intervals, rates if (rates > 0).all() else intervals)

    def find_spikes(group: Sequence[CheckpointLayer | Checkpoint]) -> list[float]:
        lengths = np.array([each.increment or 0.0 for each in group])
        return [min(pair) for pair in zip(*(nulls.spike_ratios(lengths / scale) for scale in scales), strict=True)]

    spikes = find_spikes(checkpoints)
    spiked = [layer for layer, group in finite.items() if max(find_spikes(group)) > SPIKED_LAYER]
    spike_step = next((step for step, ratio in zip(steps, spikes, strict=True) if ratio >= min(SPIKED, max(spikes))))
    gram = sum_grams(list(finite.values())) if len(steps) > 2 else None
    path = _judge_path(gram, checkpoints) if gram is not None and gram[-1, -1] > 0 else {}
    is_walk = path.get("cosine") is not None and abs(path["cosine"]) < WALK_COSINE
    is_walk = is_walk and abs(path["first_share"] - path["first_share_random"]) < WALK_SHARE
    affected: dict[str, list[str]] = {"dead": dead, "collapsed": [*collapsed], "spiked": spiked}
    affected["non_finite"] = [layer for layer in by_layer if layer not in finite]
    bad = [checkpoint.step for checkpoint in checkpoints if checkpoint.non_finite]
    states: list[tuple[State, object, int | None]] = [
        ("non-finite", bad, min(bad, default=None)),
        ("out of order", path.get("swapped"), (path.get("swapped") or (None,))[0]),
        ("dead", dead, None),
        ("collapsed", collapsed, mode(collapsed.values()) if collapsed else None),
        ("spiked", spiked or max(spikes) > SPIKED, spike_step),
        ("random walk", is_walk, None),
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
        spike=max(spikes) or None,
        spike_step=spike_step if max(spikes) else None,
        **path,
    )


def find_collapses(groups: Mapping[str, Sequence[CheckpointLayer]]) -> dict[str, int]:
    """Return the layers that lost most of their rank, each with the checkpoint that shows it first.

    Suddenly, from one checkpoint to the next; or over the run, if more than half of all layers do.
    """
    sudden, slow = dict[str, int](), dict[str, int]()
    for layer, group in groups.items():
        ranks = [record.effective_rank or 0.0 for record in group]
        for t in range(1, len(group)):
            before = slice(max(0, t - 2), t)  # a single spiked checkpoint has more rank than the run
            rise = (group[t].spectral_share or 0.0) - max(record.spectral_share or 1.0 for record in group[before])
            if rise > SHARE_RISE and max(ranks[t:]) < SUDDEN * min(ranks[before]):
                sudden.setdefault(layer, group[t].step)
            if max(ranks[t:]) < SLOW * sorted(ranks[:t])[-2:][0]:  # the second largest
                slow.setdefault(layer, group[t].step)
    return {**slow, **sudden} if 2 * len(slow) > len(groups) else sudden


def sum_grams(groups: Sequence[Sequence[CheckpointLayer]]) -> Array | None:
    """Return ⟨ΔW_s, ΔW_t⟩ over all layers, ``(T, T)``; None without layers, or where updates are not all compared."""
    size = len(groups[0]) if groups else 0
    total = np.zeros((size, size))
    for group in groups:
        for t, record in enumerate(group):
            if len(record.gram) != t + 1:
                return None
            total[t, : t + 1] += np.array(record.gram, np.float64)
    return np.asarray(total + np.tril(total, -1).T) if groups else None


def _judge_path(gram: Array, checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    """Return the fields of the run that follow from the Gram matrix of three or more updates."""
    steps, fro = [checkpoint.step for checkpoint in checkpoints], math.sqrt(gram[-1, -1])
    products = nulls.increments_of(gram)
    lengths = np.sqrt(np.maximum(products.diagonal(), 0.0))
    weight = float((lengths[1:] * lengths[:-1]).sum())
    (share, linear), (share_random, linear_random) = (
        nulls.first_direction(each, steps) for each in (gram, nulls.random_walk(gram))
    )
    ratio, *swapped = nulls.best_swap(gram)
    settled = steps[nulls.settled_from(nulls.distances(gram)[1:, -1] / fro)]
    rates = np.cumsum([checkpoint.rate_sum or 0.0 for checkpoint in checkpoints])
    by_rates = rates[0] > 0 and bool((np.diff(rates) > 0).all())
    return {
        "first_share": share,
        "first_share_random": share_random,
        "linear": linear,
        "linear_random": linear_random,
        "cosine": float(products.diagonal(1).sum() / weight) if weight > 0 else None,
        "swapped": tuple(steps[i] for i in swapped) if ratio < SWAPPED else None,
        "settled": settled if settled <= LATEST_SETTLED * steps[-1] else None,
        "settled_schedule": steps[nulls.settled_from(1 - rates / rates[-1])] if by_rates else None,
        "growth": 1 - _at_nine_tenths(steps, np.sqrt(gram.diagonal())) / fro,
        "growth_schedule": 1 - _at_nine_tenths(steps, rates) / float(rates[-1]) if by_rates else None,
    }


def _at_nine_tenths(steps: Sequence[int], values: Array) -> float:
    """Return a value at nine tenths of the run, linear between checkpoints, 0 at step 0."""
    return float(np.interp(0.9 * steps[-1], [0, *steps], [0.0, *values]))
