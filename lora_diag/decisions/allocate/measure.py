"""Allocation of a budget to layers, with a certificate of its distance from the optimum.

Combines heads, candidates, steps and other rules into records; opens no files, and takes the
spectra as measured.

Heads: those of a fine-tuned model are trained in full (PEFT's ``modules_to_save``). A task head is
new, so BASE has no weight for a low-rank update, and it is small. PEFT itself trains ``classifier``
and ``score`` (sequence and token classification) and ``qa_outputs`` (question answering) in full.

Candidates: the layers for adapters, groups with a common rank, and the largest rank of each, from
records of ``spectrum`` and constraints; independent of budgets.

Other rules for the same budget: one rank for all, the article's prior, one energy fraction for all.
Each rule orders the steps by a key and takes them in that order, steps with equal keys together,
while the budget lasts. Constraints and caps are those of the allocation, so that only the rules
differ.

Steps: a budget is spent on steps of decreasing yield, with a bound on the distance from the
optimum. max Σ_u G_u(r_u) subject to Σ_u cost_u·r_u ≤ B, G_u(r) = Σ_{i≤r} gain_{u,i} with decreasing
gains. This uses gains, costs and a budget; independent of layers, files and units.

Derivation. For every price λ ≥ 0, Σ_u G_u(r_u) ≤ λB + Σ_u max_r (G_u(r) − λ·cost_u·r) for all ranks
within the budget (weak duality). G_u is concave on the allowed ranks, so the inner maximum takes
exactly the steps whose gain per cost exceeds λ. The right side is least where those steps just fill
the budget: with all steps sorted by gain per cost, at the first one that does not fit. This is the
greedy order, so one sort gives the greedy prefix and its bound. The rest of the budget is filled
with later steps that fit.

One rank for all layers with a rank, which every serving program scales alike: programs that read
one r and one lora_alpha refuse, or scale wrongly, an adapter whose layers differ in rank. With one
rank r the choice is which layers get it; every r of a grid is tried, and the allocation that keeps
most is taken.

References: The article, "Multi-Layer Allocation": min Σ_ℓ Σ_{i>r_ℓ} σ_{ℓ,i}²; its rule, the next
rank unit to the layer with the largest σ²_{ℓ,r+1}, is the greedy order for a budget of ranks. For a
budget of parameters the order is that of σ²/(d_in + d_out). Everett 1963, "Generalized Lagrange
multiplier method"; Dantzig 1957 (the prefix).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_diag.decisions.allocate.record import (
    Allocation,
    AllocationBaseline,
    CappedBy,
    Certificate,
)
from lora_diag.decisions.allocate.record import Unit as BudgetUnit
from lora_diag.decisions.targets import why_no_target
from lora_diag.deltas import compile_pattern
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.errors import Given, UsageError
from lora_diag.metrics.energy import energy_curve
from lora_diag.records import LeftOut, Results
from lora_diag.records.names import depth_of

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Names of heads of transformers 5 classes for classification and question answering; the
# language-modelling head is a vocabulary table (``names.part_of``) and not included.
_HEAD = re.compile(
    r"(?:.*\.)?(?:\w*classifier|score|qa_outputs|\w*pooler|classification_head|multiple_choice_head|sequence_summary"
    r"|logits_proj)(?=\.|$)"
)

# The end of a class name -> PEFT's task type. Other classes (masked language models, multiple
# choice) have none.
_TASKS = (
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
)
_SEQ_2_SEQ = re.compile(
    r"(T5(Gemma)?|Bart|PegasusX?|LED|ProphetNet|M2M100|Blenderbot(Small)?|NllbMoe|FSMT|SwitchTransformers)"
    r"ForConditionalGeneration$|MarianMTModel$"
)


def head_of(name: str) -> str | None:
    """Return the module of the head that contains a tensor; None outside of heads.

    >>> (
    ...     head_of("classifier.out_proj.weight"),
    ...     head_of("bert.pooler.dense.bias"),
    ...     head_of("lm_head.weight"),
    ... )
    ('classifier', 'bert.pooler', None)
    >>> head_of("model.layers.3.score.weight")  # a block's own
    """
    match = _HEAD.match(name)
    return match[0] if match and depth_of(match[0]) is None else None


def list_saved_tensors(
    records: Sequence[Spectrum],
    left_out: Sequence[LeftOut],
    target: re.Pattern[str] | None,
    exclude: re.Pattern[str] | None,
) -> list[LeftOut]:
    """Return a record of each of TUNED's tensors in the heads to train in full.

    These are the heads that TUNED changed or resized or that only it has, except those with a
    tensor that matches a pattern: a match of ``target`` gives it a rank, one of ``exclude`` leaves
    it unchanged.

    Args:
        records: Spectra.
        left_out: Tensors without a spectrum.
        target: The user's selection of layers; None for the default.
        exclude: The user's exclusion of layers; None without one.
    """
    tensors_by_head: dict[str, list[Spectrum | LeftOut]] = {}
    tensors: list[Spectrum | LeftOut] = [*records, *left_out]
    for tensor in tensors:
        if head := head_of(tensor.layer):
            tensors_by_head.setdefault(head, []).append(tensor)
    patterns = [pattern for pattern in (target, exclude) if pattern is not None]
    saved = []
    for head, head_tensors in tensors_by_head.items():
        names = [tensor.layer for tensor in head_tensors]
        if any(pattern.search(name) for pattern in patterns for name in names):
            continue
        if any(map(_is_new_or_changed, head_tensors)):
            saved += [_describe_saved(tensor, head) for tensor in head_tensors if _is_tuned(tensor)]
    return saved


def _is_new_or_changed(tensor: Spectrum | LeftOut) -> bool:
    return bool(tensor.fro) or (
        isinstance(tensor, LeftOut) and tensor.reason in {"only_in_tuned", "shape_differs"}
    )


def _is_tuned(tensor: Spectrum | LeftOut) -> bool:
    """Return whether TUNED has the tensor."""
    return not isinstance(tensor, LeftOut) or tensor.reason != "only_in_base"


def _describe_saved(tensor: Spectrum | LeftOut, head: str) -> LeftOut:
    """Return the record of a tensor that is trained in full."""
    shape = tensor.tuned_shape if isinstance(tensor, LeftOut) else None
    return LeftOut(
        layer=tensor.layer,
        shape=shape or tensor.shape,
        reason="saved",
        detail=f"in the head {head}, which is trained in full (modules_to_save)",
        fro=tensor.fro,
        base_fro=tensor.base_fro,
    )


def task_type_of(results: Results[Any], heads: Collection[str]) -> str | None:
    """Return PEFT's task type of a fine-tune by the class in its config; None if it cannot be
    determined.

    Args:
        results: Spectra of the fine-tune or an allocation: the class of TUNED is used, else that of
            BASE.
        heads: Heads that are trained in full. PEFT always trains the heads of a task type in full,
            so without heads only ``CAUSAL_LM`` and ``SEQ_2_SEQ_LM`` are returned.
    """
    sides = [side for role in ("tuned", "base") for side in results.run.inputs if side.role == role]
    architecture = next((side.architecture for side in sides if side.architecture), "")
    if _SEQ_2_SEQ.search(architecture):
        return "SEQ_2_SEQ_LM"
    task = next((task for end, task in _TASKS if architecture.endswith(end)), None)
    return task if heads or task == "CAUSAL_LM" else None


_STACKED = re.compile(r"(.+)\[\d+\]")


@dataclass(frozen=True)
class Constraints:
    """Constraints of every allocation.

    Args:
        min_rank: Smallest rank of a layer that has any signal.
        max_rank: Largest rank of a layer; None for no limit.
        ranks_from: Allowed ranks besides 0; None for any.
    """

    min_rank: int = 0
    max_rank: int | None = None
    ranks_from: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check that the constraints can be met.

        Raises:
            UsageError: They are invalid or contradict each other.
        """
        if self.min_rank < 0:
            raise UsageError(Given("min_rank", self.min_rank), "must be 0 or more")
        if self.max_rank is not None and self.max_rank < 1:
            raise UsageError(Given("max_rank", self.max_rank), "must be 1 or more")
        if self.max_rank is not None and self.max_rank < self.min_rank:
            raise UsageError(
                Given("min_rank", self.min_rank), f"must not be above $max_rank {self.max_rank}"
            )
        if self.ranks_from is not None:
            if not self.ranks_from or min(self.ranks_from) < 1:
                raise UsageError(
                    Given("allowed_ranks"), "ranks must be 1 or more, such as 8,16,32,64"
                )
            if not any(map(self.allow, self.ranks_from)):
                raise UsageError(
                    Given("allowed_ranks"), "none of its ranks lies between $min_rank and $max_rank"
                )

    def allow(self, rank: int) -> bool:
        """Return whether a rank lies between the smallest and the largest."""
        return self.min_rank <= rank <= (self.max_rank or rank)


@dataclass(frozen=True)
class AllocationUnit:
    """Layers with a common rank: one layer, or a stack of experts with one factor pair.

    Args:
        members: Their spectra.
        group: The stack's name; None for a layer on its own.
        weights: Factor of each member's energy.
        stops: Minimum rank and the allowed ranks above it, ascending.
        capped_by: Reason for the largest of them.
        losses: F(0), F(1), … of each member: measured cost of discarding everything beyond a rank;
            None to use energy.
    """

    members: tuple[Spectrum, ...]
    group: str | None
    weights: tuple[float, ...]
    stops: Ints
    capped_by: CappedBy
    losses: tuple[Floats, ...] | None = None

    @property
    def name(self) -> str:
        """Name of the stack or of the layer."""
        return self.group or self.members[0].layer

    @property
    def cost(self) -> int:
        """Parameters per rank: Σ (out + in)."""
        return sum(sum(member.shape) for member in self.members)

    @property
    def start(self) -> int:
        """The smallest allowed rank."""
        return int(self.stops[0])

    @property
    def cap(self) -> int:
        """The largest allowed rank."""
        return int(self.stops[-1])

    @property
    def energy(self) -> float:
        """The weighted energy Σ w‖ΔW‖_F²; with losses ΣF(0)."""
        if self.losses is not None:
            return float(sum(loss[0] for loss in self.losses))
        return sum(
            weight * member.fro**2
            for weight, member in zip(self.weights, self.members, strict=True)
        )

    @property
    def corners(self) -> Ints:
        """The ``stops`` at the corners of the concave envelope of ``curve``, up to its maximum.

        Between two corners no rank is better than a mixture of both, and beyond the last there is
        no gain.
        """
        stops, values = self.stops, self.curve[self.stops]

        def slope(first: int, last: int) -> float:
            return float((values[last] - values[first]) / (stops[last] - stops[first]))

        hull = [0]
        for index in range(1, len(stops)):
            while len(hull) > 1 and slope(hull[-2], hull[-1]) <= slope(hull[-1], index):
                hull.pop()
            hull.append(index)
        best = int(np.argmax(values[hull]))
        return stops[hull[: best + 1]]

    @cached_property
    def curves(self) -> tuple[Floats, ...]:
        """Each member's C(0), …, C(K), ``(K + 1,)``; zeros for a zero update."""
        curves = []
        for member in self.members:
            curve = np.zeros(len(member.s) + 1)
            if member.fro > 0:
                curve[1:] = energy_curve(np.asarray(member.s), member.fro, member.complete)
            curves.append(curve)
        return tuple(curves)

    @cached_property
    def curve(self) -> Floats:
        """The weighted energy kept at ranks 0, …, cap: Σ_members w‖ΔW‖_F²·C(r); constant beyond the
        measured values.

        With losses Σ_members (F(0) − F(r)), which may decrease with rank.
        """
        ranks = np.arange(self.cap + 1)
        if self.losses is not None:
            parts = [loss[0] - loss[np.minimum(ranks, len(loss) - 1)] for loss in self.losses]
        else:
            parts = [
                weight * member.fro**2 * curve[np.minimum(ranks, len(curve) - 1)]
                for weight, member, curve in zip(
                    self.weights, self.members, self.curves, strict=True
                )
            ]
        total: Floats = np.sum(parts, axis=0)
        return total


def split_candidates(
    records: Sequence[Spectrum], target: re.Pattern[str] | None, exclude: re.Pattern[str] | None
) -> tuple[list[Spectrum], list[LeftOut]]:
    """Return the candidates among the layers, and records of the skipped ones with the reason.

    Without ``target``, candidates are the matrices that adapters usually target, see
    ``targets.why_no_target``; with it, all layers whose name contains a match. Layers that match
    ``exclude`` are skipped.

    Raises:
        UsageError: There is no candidate.
    """
    candidates, left_out = [], []
    for record in records:
        if why := why_no_target(record.layer, target, exclude):
            known = {
                "layer": record.layer,
                "shape": record.shape,
                "fro": record.fro,
                "base_fro": record.base_fro,
            }
            left_out.append(LeftOut(**known, reason="not_selected", detail=why))
        else:
            candidates.append(record)
    if not candidates:
        subject = "the results" if target is None else Given("layers", target.pattern)
        raise UsageError(subject, "no layer could get an adapter", "select others with $layers")
    return candidates, left_out


def make_units(
    records: Sequence[Spectrum],
    weights: Mapping[str, float],
    constraints: Constraints,
    losses: Mapping[str, Sequence[float]] | None = None,
) -> list[AllocationUnit]:
    """Return the units of an allocation, in the order of their first layers.

    Args:
        records: Spectra of the candidates.
        weights: Factor of the energy of each of these layers.
        constraints: Constraints on the ranks.
        losses: F(0), F(1), … by layer, where missing layers get F = 0; None to use energy.
    """
    groups: dict[str, list[Spectrum]] = {}
    for record in records:
        stacked = _STACKED.fullmatch(record.layer)
        groups.setdefault(stacked[1] if stacked else record.layer, []).append(record)
    units = []
    for name, members in groups.items():
        # Ranks reach the largest cap of the members, or the minimum rank if that is higher and a
        # rank has a gain.
        caps = [_cap_rank(member, constraints.max_rank) for member in members]
        soft, reason = max(caps, key=lambda cap: cap[0])
        largest = compute_break_even(members[0].shape)
        hard = min(constraints.max_rank or largest, largest)
        least = min(constraints.min_rank, hard)
        if 0 < soft < least:
            soft = least
            if least == largest:
                reason = "break_even"
        stops = _list_allowed_ranks(soft, hard, constraints)
        if stops[-1] != soft:
            reason = "ranks_from"
        names = [member.layer for member in members]
        curves = None
        if losses is not None:
            curves = tuple(np.asarray(losses.get(layer, (0.0,)), np.float64) for layer in names)
        units.append(
            AllocationUnit(
                members=tuple(members),
                group=None if names[0] == name else name,
                weights=tuple(weights[layer] for layer in names),
                stops=stops,
                capped_by=reason,
                losses=curves,
            )
        )
    return units


def compute_break_even(shape: tuple[int, int]) -> int:
    """Return the largest rank whose factors have no more parameters than the matrix: r(out + in) ≤
    out·in.

    >>> compute_break_even((77, 384)), compute_break_even((128, 128)), compute_break_even((1, 64))
    (64, 64, 0)
    """
    return math.prod(shape) // sum(shape)


def _cap_rank(record: Spectrum, max_rank: int | None) -> tuple[int, CappedBy]:
    """Return the largest rank with a measured gain, within break-even and ``max_rank``, and the
    reason for this limit.

    Of equal limits, the reason is the first.
    """
    caps: list[tuple[int, CappedBy]] = [(compute_break_even(record.shape), "break_even")]
    if record.complete:
        caps.append((sum(value > 0 for value in record.s), "update_rank"))
    if record.resolution.signal_rank is not None:
        caps.append((record.resolution.signal_rank, "signal_rank"))
    if not record.complete:
        caps.append((len(record.s), "values_kept"))
    if max_rank is not None:
        caps.append((max_rank, "max_rank"))
    return min(caps, key=lambda cap: cap[0])


def _list_allowed_ranks(soft: int, hard: int, constraints: Constraints) -> Ints:
    """Return the minimum rank of a unit and the allowed ranks above it, ascending.

    In a list of ranks, the last is the first that reaches ``soft``, if one within ``hard`` does: a
    signal of rank 5 may get 8 of 8, 16, 32.

    Args:
        soft: The largest rank with a gain.
        hard: The largest rank that constraints and shape allow.
        constraints: Minimum rank and list of ranks.
    """
    minimum = min(constraints.min_rank, soft)
    if constraints.ranks_from is None:
        return np.arange(minimum, soft + 1)
    possible: list[int] = []
    if soft:
        for rank in sorted(set(constraints.ranks_from)):
            if rank <= hard:
                possible.append(rank)
            if rank >= soft:
                break
    start = 0
    if possible and minimum:
        start = next((rank for rank in possible if rank >= minimum), possible[-1])
    return np.asarray([start, *(rank for rank in possible if rank > start)], np.int64)


@dataclass(frozen=True)
class AllocationRule:
    """The result of a rule for a budget.

    Args:
        name: Such as ``uniform r=8``.
        ranks: Ranks by unit.
        cost: Cost of the steps above the starting ranks.
    """

    name: str
    ranks: Ints
    cost: int


def apply_rules(
    units: Sequence[AllocationUnit], steps: Steps, budget: int, scores: Floats
) -> list[AllocationRule]:
    """Return the results of uniform rank, the prior and an energy threshold for a budget.

    Args:
        units: The units of the allocation.
        steps: Their steps over all allowed ranks.
        budget: Budget for steps.
        scores: Sensitivity s_u of each unit, ``(units,)``, for the prior r ∝ s·√(d_in + d_out).

    Reference: The article, "Rank Selection Strategy", step 2 (the prior).
    """
    level, uniform = _take_steps(steps, steps.rank.astype(np.float64), budget)
    slope = scores * np.sqrt([sum(unit.members[0].shape) for unit in units])
    with np.errstate(divide="ignore"):
        _, prior = _take_steps(steps, steps.rank / slope[steps.unit], budget)
    threshold, energy = _take_steps(steps, _compute_share_before(units, steps), budget)
    return [
        AllocationRule(f"uniform r={level:.0f}", *uniform),
        AllocationRule("heuristic prior s·√(d_in+d_out)", *prior),
        AllocationRule(f"same energy share, {threshold:.2f}", *energy),
    ]


def _compute_share_before(units: Sequence[AllocationUnit], steps: Steps) -> Floats:
    """Return for each step over all allowed ranks the fraction of its unit's energy kept without
    it, ``(n,)``.

    It is 1 where a unit has no energy. 1e-9 is added, because an error of that size in the sum of
    9-digit values must not increase the rank by one: 0.9 is reached by 0.8999999995.
    """
    share = np.empty(len(steps.gain))
    for unit, of_unit in zip(units, steps.slices, strict=True):
        share[of_unit] = unit.curve[unit.stops[:-1]] / unit.energy if unit.energy > 0 else 1.0
    return share + 1e-9


def _take_steps(steps: Steps, key: Floats, budget: int) -> tuple[float, tuple[Ints, int]]:
    """Take steps by ascending key, steps with equal keys together, while the budget lasts.

    Returns:
        The last key whose steps were all taken (0 if none), and the ranks with the cost of their
            steps.
    """
    # Steps of a unit stay in order despite rounding of their keys.
    key = key.copy()
    for of_unit in steps.slices:
        key[of_unit] = np.maximum.accumulate(key[of_unit])
    order = np.argsort(key, kind="stable")
    cumulative = np.cumsum(steps.cost[order])
    fitting = int(np.searchsorted(cumulative, budget, side="right"))
    if fitting < len(order):
        fitting = int(np.searchsorted(key[order], key[order[fitting]], side="left"))
    if not fitting:
        return 0.0, (steps.start, 0)
    chosen = order[:fitting]
    return float(key[chosen[-1]]), (steps.ranks_after(chosen), int(cumulative[fitting - 1]))


@dataclass(frozen=True)
class Steps:
    """All steps of all units, unit by unit, in order of rank.

    Args:
        gain: Gain of each step, ``(n,)``; ``spend`` requires that ``gain / cost`` does not increase
            within a unit.
        cost: Cost of each step, ``(n,)``, positive.
        unit: Index of its unit, ``(n,)``, ascending.
        rank: The unit's rank after it, ``(n,)``.
        start: The unit's rank before its first step, ``(units,)``.
    """

    gain: Floats
    cost: Ints
    unit: Ints
    rank: Ints
    start: Ints

    @property
    def first(self) -> Ints:
        """Index of each unit's first step, and the number of all steps, ``(units + 1,)``."""
        return np.searchsorted(self.unit, np.arange(len(self.start) + 1))

    @property
    def slices(self) -> list[slice]:
        """The steps of each unit."""
        return [slice(first, end) for first, end in pairwise(self.first)]

    def ranks_after(self, chosen: Ints | NDArray[np.bool_]) -> Ints:
        """Return the rank of each unit after the chosen steps, given by index or mask,
        ``(units,)``.
        """
        ranks = self.start.copy()
        np.maximum.at(ranks, self.unit[chosen], self.rank[chosen])
        return ranks


@dataclass(frozen=True)
class BudgetedRanks:
    """Ranks within a budget.

    Args:
        ranks: Ranks by unit, ``(units,)``.
        gain: Total gain of the steps.
        cost: Total cost of the steps.
        bound: Upper bound on the gain within the budget.
        price: Gain of one more unit of the budget, at the bound; 0 if the budget covers all steps.
        optimal: True if this is known to be the optimum: all steps were taken, or the greedy prefix
            spends the whole budget.
    """

    ranks: Ints
    gain: float
    cost: int
    bound: float
    price: float
    optimal: bool


def make_steps(curves: Sequence[Floats], costs: Sequence[int], stops: Sequence[Ints]) -> Steps:
    """Return the steps between each unit's allowed ranks.

    Args:
        curves: By unit: G(0), …, G(cap), concave at its stops, ``(cap + 1,)``.
        costs: By unit: cost of one rank.
        stops: By unit: minimum rank and the allowed ranks above it, ascending; for one unit or
            more.
    """
    gains = [np.diff(curve[ranks]) for curve, ranks in zip(curves, stops, strict=True)]
    step_costs = [np.diff(ranks) * cost for cost, ranks in zip(costs, stops, strict=True)]
    return Steps(
        gain=np.concatenate(gains),
        cost=np.concatenate(step_costs),
        unit=np.repeat(np.arange(len(stops)), list(map(len, gains))),
        rank=np.concatenate([ranks[1:] for ranks in stops]),
        start=np.array([ranks[0] for ranks in stops], np.int64),
    )


def spend(steps: Steps, budget: int) -> BudgetedRanks:
    """Choose steps within a budget.

    Args:
        steps: Available steps.
        budget: Budget for steps, from 0 up.

    Returns:
        A choice whose gain is at least that of the greedy prefix, and a bound on every choice.

    Example:
        >>> curves = [np.array([0.0, 4.0, 5.0]), np.array([0.0, 3.0])]
        >>> steps = make_steps(curves, [2, 1], [np.arange(3), np.arange(2)])
        >>> spent = spend(steps, 3)
        >>> spent.ranks.tolist(), spent.gain, spent.bound
        ([1, 1], 7.0, 7.0)
    """
    order = _order_by_yield(steps)
    cumulative = np.cumsum(steps.cost[order])
    fitting = int(np.searchsorted(cumulative, budget, side="right"))
    spent = int(cumulative[fitting - 1]) if fitting else 0
    gain = math.fsum(steps.gain[order[:fitting]])
    if fitting == len(order):
        return BudgetedRanks(steps.ranks_after(order), gain, spent, gain, 0.0, optimal=True)
    left = budget - spent
    next_step = order[fitting]
    price = float(steps.gain[next_step] / steps.cost[next_step])
    bound = gain + left * price
    counts = np.bincount(steps.unit[order[:fitting]], minlength=len(steps.start)).astype(np.int64)
    _add_fitting_steps(steps, counts, left)
    chosen = _make_mask(steps, counts)
    gain = math.fsum(steps.gain[chosen])
    return BudgetedRanks(
        ranks=steps.ranks_after(chosen),
        gain=gain,
        cost=int(steps.cost[chosen].sum()),
        bound=max(bound, gain),  # equal if the prefix fills the budget, up to rounding of sums
        price=price,
        optimal=left == 0,
    )


def _order_by_yield(steps: Steps) -> Ints:
    """Return the steps with a positive gain by decreasing gain per cost; the steps of one unit keep
    their order.
    """
    density = steps.gain / steps.cost
    for of_unit in steps.slices:
        # Rounding of sums must not reorder the steps of a unit.
        density[of_unit] = np.minimum.accumulate(density[of_unit])
    order = np.argsort(-density, kind="stable")
    return order[density[order] > 0]


def _add_fitting_steps(steps: Steps, counts: Ints, left: int) -> None:
    """Add to ``counts``, one by one, the next step of a unit with the largest gain per cost that
    ``left`` covers.
    """
    first = steps.first
    while True:
        upcoming = first[:-1] + counts
        open_units = np.flatnonzero(upcoming < first[1:])
        steps_at = upcoming[open_units]
        fits = (steps.cost[steps_at] <= left) & (steps.gain[steps_at] > 0)
        if not fits.any():
            return
        steps_at, open_units = steps_at[fits], open_units[fits]
        best = int(np.argmax(steps.gain[steps_at] / steps.cost[steps_at]))
        counts[open_units[best]] += 1
        left -= int(steps.cost[steps_at[best]])


def _make_mask(steps: Steps, counts: Ints) -> NDArray[np.bool_]:
    """Return the mask, ``(n,)``, of the first ``counts`` steps of each unit."""
    position = np.arange(len(steps.unit)) - steps.first[steps.unit]
    return np.asarray(position < counts[steps.unit])


# Powers of two and the ranks half-way between them.
GRID = tuple(sorted({rank * 2**power for power in range(9) for rank in (2, 3)} | {1}))


def allocate_one_rank(
    choose: Callable[[Constraints], Allocated], constraints: Constraints
) -> Allocated:
    """Return the best allocation in which every layer has rank 0 or one common rank.

    Args:
        choose: Chooses ranks under constraints.
        constraints: Constraints on the rank; ``ranks_from`` replaces the grid.

    Returns:
        The allocation that keeps most; its bound is the largest of all ranks tried, and rules that
            spend nothing are
        omitted.

    Raises:
        UsageError: ``choose`` raised one for every rank tried, of which this is the first; or no
            rank is within the constraints.
    """
    allocated: list[Allocated] = []
    first_error: UsageError | None = None
    for rank in constraints.ranks_from or GRID:
        if not constraints.allow(rank):
            continue
        try:
            allocated.append(choose(replace(constraints, ranks_from=(rank,))))
        except UsageError as error:
            first_error = first_error or error
    if not allocated:
        raise first_error or UsageError(
            Given("portable"), "no rank lies between $min_rank and $max_rank"
        )
    best = max(
        allocated, key=lambda at_rank: (at_rank.certificate.kept, -at_rank.certificate.spent)
    )
    certificate = best.certificate
    bound = max(at_rank.certificate.bound for at_rank in allocated)
    update = {
        "bound": bound,
        "gap": _compute_gap(certificate.kept, bound),
        "optimal": certificate.optimal and bound <= certificate.kept,
        # The others have no such rank.
        "baselines": tuple(rule for rule in certificate.baselines if rule.spent),
    }
    return replace(best, certificate=certificate.model_copy(update=update))


def _compute_gap(kept: float, bound: float) -> float:
    """Return the distance from the bound as a fraction of it."""
    return max(0.0, (bound - kept) / bound) if bound > 0 else 0.0


@dataclass(frozen=True)
class Budget:
    """A budget.

    Args:
        unit: Unit of the budget; ``energy`` is not a budget but a fraction that every layer has to
            keep.
        amount: Amount in this unit.
        option: The option as given.
        bytes_per_param: Memory of one trainable parameter for a budget in bytes; 1 for others.
    """

    unit: BudgetUnit
    amount: float
    option: Given
    bytes_per_param: float = 1.0

    def cost_of(self, unit: AllocationUnit) -> int:
        """Return the cost of one rank of a unit as a whole number of ranks or parameters."""
        return len(unit.members) if self.unit == "total_rank" else unit.cost

    @property
    def whole(self) -> int:
        """The budget in the unit of ``cost_of``, rounded down."""
        return math.floor(self.amount / self.bytes_per_param)

    def in_unit(self, cost: int) -> float:
        """Return a cost in the unit of the budget."""
        return cost * self.bytes_per_param

    def describe(self, cost: int) -> str:
        """Return a cost as text in the unit of the budget."""
        nouns = {"params": "parameters", "total_rank": "ranks", "bytes": "bytes"}
        return f"{self.in_unit(cost):,.0f} {nouns[self.unit]}"


@dataclass(frozen=True)
class Allocated:
    """The result of an allocation for the layers of a spectrum run.

    Args:
        layers: Candidates with their ranks.
        certificate: Distance of the ranks from the optimum.
        left_out: Heads that are trained in full, layers that are not candidates, and tensors
            without a spectrum.
    """

    layers: tuple[Allocation, ...]
    certificate: Certificate
    left_out: tuple[LeftOut, ...]


def allocate(
    records: Sequence[Spectrum],
    budget: Budget,
    constraints: Constraints = Constraints(),
    weights: Mapping[str, float] | None = None,
    relative: bool = False,
    target: str | None = None,
    exclude: str | None = None,
    losses: Mapping[str, Sequence[float]] | None = None,
    left_out: Sequence[LeftOut] = (),
    save_heads: bool = True,
) -> Allocated:
    """Choose the ranks that keep the most energy within a budget.

    If the budget is an energy fraction, choose the smallest rank of each layer that keeps it.

    Args:
        records: Spectra, one per layer.
        budget: The budget.
        constraints: Constraints on the ranks.
        weights: Factor of each layer's energy, by name; None for 1.
        relative: Whether every layer's energy counts as 1, so that Σ C_ℓ(r_ℓ) is maximized instead
            of Σ‖ΔW‖²C_ℓ.
        target: Only layers whose name contains a match; None for the matrices that adapters usually
            target.
        exclude: No layers whose name contains a match; None to exclude none.
        losses: F(0), F(1), … by layer, from ``probe fisher``; ranks then minimize ΣF_ℓ(r_ℓ). F need
            not be convex, so ranks are chosen from the corners of its convex envelope, and the
            bound holds for all ranks. None to use energy.
        left_out: Tensors without a spectrum, including heads that only TUNED has.
        save_heads: Whether heads are trained in full and paid for first; else they are layers.

    Returns:
        The ranks of the candidates in the order of ``records``, their distance from the optimum,
            and the other tensors.

    Raises:
        UsageError: The budget is too small for the heads, the constraints or any rank; no layer is
            a candidate or can get a rank; a pattern is not a valid regular expression.
    """
    included = compile_pattern(target, "layers")
    excluded = compile_pattern(exclude, "exclude")
    saved = list_saved_tensors(records, left_out, included, excluded) if save_heads else []
    saved_names = {tensor.layer for tensor in saved}
    saved_params = sum(math.prod(tensor.shape) for tensor in saved)
    candidates, not_selected = split_candidates(
        [record for record in records if record.layer not in saved_names], included, excluded
    )
    factors = {}
    for record in candidates:
        factor = 1.0 if weights is None else weights[record.layer]
        factors[record.layer] = factor / record.fro**2 if relative and record.fro > 0 else factor
    units = make_units(candidates, factors, constraints, losses)
    _require_possible_rank(units)
    curves = [unit.curve for unit in units]
    costs = [budget.cost_of(unit) for unit in units]
    steps = all_steps = make_steps(curves, costs, [unit.stops for unit in units])
    if losses is not None:
        steps = make_steps(curves, costs, [unit.corners for unit in units])
    fixed = sum(cost * unit.start for cost, unit in zip(costs, units, strict=True))
    # Budgets of ranks and energy fractions do not count the heads.
    reserved = 0 if budget.unit in {"total_rank", "energy"} else saved_params
    if reserved > budget.whole:
        heads = sorted({head_of(name) or "" for name in saved_names})
        raise UsageError(
            budget.option,
            f"the heads {', '.join(heads)}, which are trained in full, take "
            f"{budget.describe(reserved)}, {budget.describe(reserved - budget.whole)} more than "
            "the budget",
            f"raise it, or leave out a head with $exclude {heads[0]}",
        )
    chosen, left = _choose_ranks(units, steps, all_steps, budget, fixed, reserved)
    if losses is not None:  # only the corners were considered
        chosen = replace(chosen, optimal=chosen.gain >= chosen.bound)
    sensitivities = np.array([_compute_sensitivity(unit, weights) for unit in units])
    rule_results = apply_rules(units, all_steps, left, sensitivities)
    if budget.unit == "energy":
        rule_results.pop()  # the allocation itself
    else:
        chosen = _take_better_rule(units, steps, chosen, rule_results)
    layers = _make_records(units, chosen.ranks, rule_results[0].ranks)
    order = {record.layer: i for i, record in enumerate(records)}
    certificate = _make_certificate(
        units, steps, budget, fixed + reserved, saved_params, chosen, rule_results
    )
    others = [item for item in left_out if item.layer not in saved_names]
    return Allocated(
        layers=tuple(sorted(layers, key=lambda record: order[record.layer])),
        certificate=certificate,
        left_out=(*saved, *not_selected, *others),
    )


def _take_better_rule(
    units: Sequence[AllocationUnit],
    steps: Steps,
    chosen: BudgetedRanks,
    rule_results: Sequence[AllocationRule],
) -> BudgetedRanks:
    """Return the chosen ranks, or those of a rule that keeps more: a few large steps may fill a
    small budget better.
    """
    best = max(rule_results, key=lambda rule: _compute_kept_energy(units, rule.ranks))
    if _compute_kept_energy(units, best.ranks) <= _compute_kept_energy(units, chosen.ranks):
        return chosen
    return _bound_ranks(units, steps, best.ranks, best.cost, chosen)


def _bound_ranks(
    units: Sequence[AllocationUnit], steps: Steps, ranks: Ints, cost: int, best: BudgetedRanks
) -> BudgetedRanks:
    """Return given ranks with the bound and price of ``best``, the best ranks for their budget."""
    gain = _compute_kept_energy(units, ranks) - _compute_kept_energy(units, steps.start)
    return BudgetedRanks(ranks, gain, cost, max(best.bound, gain), best.price, optimal=False)


def _require_possible_rank(units: Sequence[AllocationUnit]) -> None:
    """Refuse layers of which none has both energy and an allowed rank.

    Raises:
        UsageError: There is no energy to keep, or no layer with energy can get a rank.
    """
    if any(unit.cap and unit.energy for unit in units):
        return
    changed = [member for unit in units for member in unit.members if member.fro > 0]
    if not changed:
        raise UsageError("no energy to keep", "ΔW is zero in every candidate layer")
    if not any(unit.energy for unit in units):
        raise UsageError("no energy to keep", "every changed layer has weight 0")
    if all(member.resolution.signal_rank == 0 for member in changed):
        raise UsageError(
            "only noise to keep", "every update is below the rounding noise of the files"
        )
    raise UsageError("no rank", "every layer with energy is smaller than the smallest allowed rank")


def _compute_sensitivity(unit: AllocationUnit, weights: Mapping[str, float] | None) -> float:
    """Return s for the prior, the mean over the layers: of their weights, else of ‖ΔW‖/‖W‖ (‖ΔW‖
    without W).
    """
    values = []
    for member in unit.members:
        if weights is not None:
            values.append(weights[member.layer])
        else:
            values.append(member.fro if member.relative is None else member.relative)
    return math.fsum(values) / len(values)


def _choose_ranks(
    units: Sequence[AllocationUnit],
    steps: Steps,
    all_steps: Steps,
    budget: Budget,
    fixed: int,
    reserved: int,
) -> tuple[BudgetedRanks, int]:
    """Return the ranks, and the budget for steps above the starting ranks.

    For an energy fraction: the smallest allowed rank of each unit that keeps it, else its cap; and
    the cost of their steps.

    Args:
        units: The units.
        steps: Their steps to choose from.
        all_steps: Their steps over all allowed ranks.
        budget: The budget.
        fixed: Cost of the starting ranks.
        reserved: Cost of the heads.

    Raises:
        UsageError: The budget is too small for the starting ranks or for any rank, or no allowed
            rank lowers the loss.
    """
    if budget.unit == "energy":
        ranks = all_steps.ranks_after(_compute_share_before(units, all_steps) < budget.amount)
        left = int(np.dot(ranks - all_steps.start, [unit.cost for unit in units]))
        return _bound_ranks(units, steps, ranks, left, spend(steps, left)), left
    left = budget.whole - reserved - fixed
    if left < 0:
        budget_text = "the budget"
        if reserved:
            remaining = budget.describe(budget.whole - reserved)
            budget_text = f"the {remaining} that remain after the heads"
        raise UsageError(
            budget.option,
            f"the smallest ranks allowed by $min_rank take {budget.describe(fixed)}, "
            f"{budget.describe(-left)} more than {budget_text}",
            "raise it, lower $min_rank or select fewer layers with $layers",
        )
    if fixed:
        return spend(steps, left), left
    if not len(steps.gain):
        raise UsageError(
            budget.option, "no allowed rank lowers the expected loss", "raise $max_rank"
        )
    cheapest = int(np.argmin(steps.cost))
    cost = int(steps.cost[cheapest])
    if left < cost:
        raise UsageError(
            budget.option,
            f"even the cheapest rank, one of {units[steps.unit[cheapest]].name}, takes "
            f"{budget.describe(cost)}",
            f"give a budget of at least {budget.describe(budget.whole - left + cost)}",
        )
    return spend(steps, left), left


def _make_records(
    units: Sequence[AllocationUnit], ranks: Ints, uniform: Ints
) -> Iterator[Allocation]:
    """Yield the record of each layer, with its rank in the uniform allocation."""
    for unit, rank, uniform_rank in zip(units, ranks.tolist(), uniform.tolist(), strict=True):
        for position, member in enumerate(unit.members):
            kept = uniform_kept = fisher = None
            if member.fro > 0:
                curve = unit.curves[position]
                kept = _read_curve(curve, rank)
                uniform_kept = _read_curve(curve, uniform_rank)
            if unit.losses is not None:
                loss = unit.losses[position]
                fisher = float(loss[rank]) if rank < len(loss) else 0.0
            yield Allocation(
                layer=member.layer,
                shape=member.shape,
                rank=rank,
                params=rank * sum(member.shape),
                kept=kept,
                fro=member.fro,
                base_fro=member.base_fro,
                weight=unit.weights[position],
                cap=unit.cap,
                capped_by=unit.capped_by,
                verdict=member.resolution.verdict,
                uniform_rank=uniform_rank,
                uniform_kept=uniform_kept,
                group=unit.group,
                source=member.source,
                fisher=fisher,
            )


def _read_curve(curve: Floats, rank: int) -> float:
    """Return C(rank) of a layer; beyond the measured values, that of all of them."""
    return float(curve[min(rank, len(curve) - 1)])


def _make_certificate(
    units: Sequence[AllocationUnit],
    steps: Steps,
    budget: Budget,
    fixed: int,
    saved: int,
    chosen: BudgetedRanks,
    rule_results: Sequence[AllocationRule],
) -> Certificate:
    """Return the certificate; ``fixed``: cost of starting ranks and heads, ``saved``: parameters of
    the heads.
    """
    total = math.fsum(unit.energy for unit in units)
    at_start = _compute_kept_energy(units, steps.start)
    kept = _limit_share((at_start + chosen.gain) / total)
    bound = _limit_share((at_start + chosen.bound) / total)
    error = math.fsum(
        weight * member.fro**2 * member.energy_error
        for unit in units
        if unit.losses is None
        for weight, member in zip(unit.weights, unit.members, strict=True)
    )
    params = saved
    for unit, rank in zip(units, chosen.ranks.tolist(), strict=True):
        params += rank * unit.cost
    price = chosen.price / total / budget.bytes_per_param
    amount, unused = None, 0.0
    if budget.unit != "energy":
        amount = budget.amount
        unused = amount - budget.in_unit(budget.whole)
    return Certificate(
        unit=budget.unit,
        budget=amount,
        spent=budget.in_unit(fixed + chosen.cost),
        params=params,
        saved=saved,
        kept=kept,
        bound=bound,
        gap=_compute_gap(kept, bound),
        optimal=chosen.optimal,
        energy_error=min(1.0, error / total),
        epsilon_min=_compute_epsilon_min(units, chosen.ranks),
        price=price,
        slack=bound - kept + price * unused,
        baselines=tuple(
            _compare_baseline(rule, units, steps, budget, fixed, total) for rule in rule_results
        ),
    )


def _limit_share(share: float) -> float:
    """Return a fraction in [0, 1]: losses may be larger at the smallest ranks than without an
    adapter.
    """
    return min(1.0, max(0.0, share))


def _compare_baseline(
    rule: AllocationRule,
    units: Sequence[AllocationUnit],
    steps: Steps,
    budget: Budget,
    fixed: int,
    total: float,
) -> AllocationBaseline:
    """Return the record of another rule, compared with ranks chosen for energy at its cost."""
    equal = _take_better_rule(units, steps, spend(steps, rule.cost), [rule])
    gains = [
        float(unit.curve[rank] - unit.curve[rule_rank])
        for unit, rank, rule_rank in zip(units, equal.ranks, rule.ranks, strict=True)
    ]
    index = int(np.argmax(gains))
    lead = lead_gain = None
    if len(units) > 1 and 2 * gains[index] > math.fsum(gains) > 0:
        lead = units[index].name
        lead_gain = gains[index] / total
    return AllocationBaseline(
        name=rule.name,
        spent=budget.in_unit(fixed + rule.cost),
        kept=_limit_share(_compute_kept_energy(units, rule.ranks) / total),
        equal=_limit_share(_compute_kept_energy(units, equal.ranks) / total),
        epsilon_min=_compute_epsilon_min(units, rule.ranks),
        lead=lead,
        lead_gain=lead_gain,
    )


def _compute_kept_energy(units: Sequence[AllocationUnit], ranks: Ints) -> float:
    """Return the weighted energy that ranks keep."""
    return math.fsum(unit.curve[rank] for unit, rank in zip(units, ranks, strict=True))


def _compute_epsilon_min(units: Sequence[AllocationUnit], ranks: Ints) -> float:
    """Return a lower bound on √(Σ tail energy / Σ energy) over the candidates, unweighted."""
    total = math.fsum(member.fro**2 for unit in units for member in unit.members)
    lost_energy = math.fsum(
        _bound_lost_energy(member, curve, rank)
        for unit, rank in zip(units, ranks.tolist(), strict=True)
        for member, curve in zip(unit.members, unit.curves, strict=True)
    )
    return math.sqrt(lost_energy / total)


def _bound_lost_energy(member: Spectrum, curve: Floats, rank: int) -> float:
    """Return a lower bound on Σ_{i>rank}σ_i²; missing values are at most the last kept value."""
    error = member.fro**2 * member.energy_error
    energy = member.fro**2 * (1.0 - _read_curve(curve, rank)) - error
    if rank > len(member.s) and not member.complete:
        energy -= (rank - len(member.s)) * (member.s[-1] ** 2 + 2 * error)
    return max(0.0, energy)
