"""Terminal output of ``probe outputs``: losses and distances of models, and the choice among
adapters.

Adapters are compared with the best one, with the full fine-tune and with BASE by held-out losses,
paired by sequence. Differences from the latter two are significant above two paired standard
errors, more with few sequences (``paired_half``); from the best adapter see ``Rival``. A smaller
adapter is one of fewer parameters, and is offered only if it is significantly worse on no set.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lora_diag.feature import Hint
from lora_diag.metrics import statistics as stats
from lora_diag.records import Probe, Results
from lora_diag.records.probe import main_sets, set_names
from lora_diag.rendering.losses import (
    caption_of,
    describe_forgetting,
    describe_losses,
    format_gap,
    gap_half,
    on_set,
    probe_summary,
)
from lora_diag.rendering.statements import Statement, make_statement, short_paths
from lora_diag.rendering.tables import Column, Grid, grid_of
from lora_diag.rendering.text import (
    count,
    format_shown,
    list_names,
    plus_minus,
    safe,
    select_evenly,
    short,
    with_limits,
)


@dataclass(frozen=True, slots=True)
class Rival:
    """An adapter compared with the best one on the same sequences.

    Args:
        name: Path of the adapter.
        behind: Loss of the adapter minus that of the best.
        half: Half-width of the interval of ``behind``, paired by sequence: Student's t, 95% for all
            rivals together (Bonferroni); None for one sequence.
        sequences: Estimated number of sequences that would separate the two; None if it is
            significantly worse, if more than 1000 would be needed, or for one sequence.
    """

    name: str
    behind: float
    half: float | None
    sequences: int | None

    @property
    def worse(self) -> bool:
        """Whether the adapter is significantly worse than the best."""
        return self.half is not None and self.behind > self.half


@dataclass(frozen=True, slots=True)
class Choice:
    """The best of several adapters by their losses on one set.

    Args:
        set: Name of the set.
        best: Path of the adapter with the lowest loss.
        rivals: The other adapters, by their losses.
    """

    set: str
    best: str
    rivals: tuple[Rival, ...]

    @property
    def equals(self) -> tuple[Rival, ...]:
        """Adapters that are not distinguishable from the best."""
        return tuple(rival for rival in self.rivals if not rival.worse)


def choose_adapters(records: Sequence[Probe]) -> list[Choice]:
    """Return for each set the adapter with the lowest loss, and the comparison with the others.

    Sets with fewer than two adapters are skipped, and results without losses of sequences.
    """
    by_set = []
    for name in set_names(records):
        of_set = [record for record in records if record.set == name]
        counts = next((record.predictions for record in of_set if record.subject == "base"), ())
        adapters = sorted(
            (r for r in of_set if r.subject == "adapter" and r.nll), key=lambda record: record.nats
        )
        if len(adapters) > 1 and counts:
            best, *others = adapters
            rivals = [_compare_rival(other, best, counts, len(others)) for other in others]
            by_set.append(Choice(name, best.name, tuple(rivals)))
    return by_set


def _compare_rival(other: Probe, best: Probe, counts: Sequence[int], rivals: int) -> Rival:
    """Return the comparison of an adapter, one of several rivals, with the best one."""
    gap, error = stats.paired_difference(other.nll, best.nll, counts)
    half, needed = stats.paired_half(error, len(counts), rivals), None
    if error is not None and half is not None and gap <= half:
        spread = error * len(counts) ** 0.5
        needed = stats.runs_needed(gap, spread, 1, level=1 - 0.05 / 2 / rivals)
    if needed is not None:
        needed = max(needed, len(counts) + 1)
    return Rival(other.name, gap, half, needed)


# Fraction of the full fine-tune's gain from which an adapter is called as good.
SUFFICIENT_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class AdapterContest:
    """An adapter compared with the full fine-tune on held-out text.

    Args:
        name: The adapter's path.
        records: The adapter's records on ``deciding_sets``, one per set.
        outcome: ``as good`` if on every set it is significantly better than TUNED, or significantly
            keeps at least 90% of its gain; else ``worse`` if it is significantly worse on any set;
            else, or if a gap has no interval, ``not known``.
        reason: Reason of the outcome; empty for ``worse``.
    """

    name: str
    records: tuple[Probe, ...]
    outcome: Literal["as good", "worse", "not known"]
    reason: str

    @property
    def worst(self) -> Probe:
        """Record on the set with the largest gap to TUNED."""
        return max(self.records, key=lambda record: record.gap or 0.0)


def find_gain(base: Probe | None) -> float | None:
    """Return the gain of TUNED over BASE from the record of BASE on a set; None if it is not
    significant.
    """
    if base is None or base.gap is None or (half := gap_half(base)) is None or base.gap <= half:
        return None
    return base.gap


def is_tuned_worse(base: Probe | None) -> bool:
    """Return whether TUNED is significantly worse than BASE, from the record of BASE on a set;
    False without one.
    """
    return (
        base is not None
        and base.gap is not None
        and (half := gap_half(base)) is not None
        and base.gap < -half
    )


def deciding_sets(records: Sequence[Probe]) -> list[str]:
    """Return the sets on which adapters are compared with TUNED.

    They are not shifted unless there is no other, and not those where TUNED is worse than BASE.
    """
    bases = _find_bases(records)
    return [name for name in main_sets(records) if not is_tuned_worse(bases.get(name))]


def _find_bases(records: Sequence[Probe]) -> dict[str, Probe]:
    return {record.set: record for record in records if record.subject == "base"}


def contests_of(records: Sequence[Probe]) -> list[AdapterContest]:
    """Return the comparison of every adapter with TUNED on ``deciding_sets``; empty without such a
    set or TUNED.
    """
    if not any(record.subject == "tuned" for record in records):
        return []
    sets, bases = deciding_sets(records), _find_bases(records)
    names = dict.fromkeys(record.name for record in records if record.subject == "adapter")
    gains = {name: find_gain(bases.get(name)) for name in sets}
    own_records = {
        name: tuple(
            r for r in records if (r.subject, r.name) == ("adapter", name) and r.set in sets
        )
        for name in names
    }
    return [
        AdapterContest(name, group, *_judge(group, gains))
        for name, group in own_records.items()
        if group
    ]


def _judge(
    own_records: tuple[Probe, ...], gain_by_set: dict[str, float | None]
) -> tuple[Literal["as good", "worse", "not known"], str]:
    """Return the outcome for an adapter from its records and the significant gains of TUNED, and
    its reason, as in ``AdapterContest``.
    """
    gaps = [(record.gap, gap_half(record), gain_by_set[record.set]) for record in own_records]
    known = [(gap, half, gain) for gap, half, gain in gaps if gap is not None and half is not None]
    if len(known) < len(gaps):
        return "not known", "one sequence has no error"
    undecided = [(gap, half, gain) for gap, half, gain in known if gap + half >= 0]
    if not undecided:
        return "as good", "better than TUNED"
    if all(
        gain is not None and gap + half <= (1 - SUFFICIENT_SHARE) * gain
        for gap, half, gain in undecided
    ):
        return "as good", f"at least {SUFFICIENT_SHARE:.0%} of the gain"
    if any(gap > half for gap, half, _ in known):
        return "worse", ""
    if any(gain is None for _, _, gain in undecided):
        return "not known", "the gain of TUNED itself is not significant"
    return "not known", f"a loss of {1 - SUFFICIENT_SHARE:.0%} of the gain is not excluded"


# Maximum number of depths of hidden states in the table; the records have all.
DEPTHS = 7


def suggest_next(results: Results[Any], values: Mapping[str, Any]) -> Hint | None:
    """Return the next step: how programs serve the best adapter, or training if all are worse than
    TUNED; else None.
    """
    records = results.whole_of(Probe)
    contests = contests_of(records)
    if contests and all(contest.outcome == "worse" for contest in contests):
        return Hint(
            "tune {base} --data TRAIN_TEXT --params 10M -o run/",
            "trains a better one",
        )
    best = _find_best(records)
    if best is None:
        return None
    words = ["portability", str(values["base"]), best.name]
    return Hint(shlex.join(words), "the update that each serving program applies", saved=True)


def _find_best(records: Sequence[Probe]) -> Probe | None:
    """Return the record of the adapter with the lowest loss on the first deciding set; None without
    one.
    """
    sets = deciding_sets(records)
    adapters = [
        r for r in records if r.subject == "adapter" and r.set in sets[:1] and r.loss is not None
    ]
    return min(adapters, key=lambda record: record.nats, default=None)


def outputs_lines(results: Results[Any]) -> list[Statement]:
    """Return the statements: whether the best adapter is as good as TUNED; for each set, the choice
    among adapters.
    """
    records = results.whole_of(Probe)
    labels, verdict = _label_models(records), _describe_best(records)
    choices = {choice.set: choice for choice in choose_adapters(records)}
    has_tuned, on_sets = any(record.subject == "tuned" for record in records), []
    for name in set_names(records):
        of_set = [record for record in records if record.set == name]
        chosen = _describe_choice(choices[name], records, labels) if name in choices else []
        lines = _describe_set(of_set, labels, has_tuned, chosen)
        answer = verdict or lines[0] if has_tuned else f"not compared with one: {lines[0]}"
        on_sets.append(on_set(name, *lines, answer=answer))
    return probe_summary(
        results,
        make_statement("as_good", "As good as TUNED", verdict, priority=0),
        _describe_forgotten(records, labels),
        *on_sets,
        reading=_READING if has_tuned else _EQUALS,
    )


def outputs_grids(results: Results[Any], per: str = "type") -> list[Grid]:
    """Return one or two tables per set, one row per model: loss and outputs; hidden states by
    depth, if measured.
    """
    records = results.whole_of(Probe)
    labels = _label_models(records)
    grids = []
    for name in set_names(records):
        of_set = [record for record in records if record.set == name]
        rows = [(_name_model(record, labels), [record]) for record in of_set]
        grids.append(grid_of(Probe.shown, rows, "model", caption_of(results, of_set[0])))
        if others := [
            record for record in of_set if record.hidden and record.subject not in {"base", "tuned"}
        ]:
            caption = f"On {short(name)}: distance of the hidden states after block"
            grids.append(_make_depths_grid(caption, others, labels))
    return grids


_READING = (
    "compare models by their loss; distances (of logits, of hidden states) and KL measure "
    "similarity, not quality: on a language model, 12 adapters of which none was significantly "
    "worse than the best had distances of 0.36 to 0.62"
)
_EQUALS = (
    "models are compared as equals, in the order of their steps; name a full fine-tune with --tuned"
)


def _label_models(records: Sequence[Probe]) -> dict[str, str]:
    """Return the label of each adapter and reference, by path."""
    paths = list(dict.fromkeys(record.name for record in records if record.name))
    return dict(zip(paths, short_paths(paths), strict=True))


def _name_model(record: Probe, labels: dict[str, str]) -> str:
    if not record.name:
        return record.subject.upper()
    return (
        f"{labels[record.name]} (reference)"
        if record.subject == "reference"
        else labels[record.name]
    )


def _make_depths_grid(caption: str, of_set: Sequence[Probe], labels: dict[str, str]) -> Grid:
    """Return the table of ‖h_TUNED − h‖ / ‖h_TUNED − h_BASE‖ at up to ``DEPTHS`` depths, evenly
    spaced.
    """
    by_depth = [*enumerate(zip(*(record.hidden or () for record in of_set), strict=False))]
    columns = [
        Column(
            str(depth or "0 (input)"),
            tuple(format_shown(value, "{:.2f}".format) for value in values),
        )
        for depth, values in select_evenly(by_depth, DEPTHS)
    ]
    names = tuple(_name_model(record, labels) for record in of_set)
    return Grid(caption, "model", names, tuple(columns), detail=True)


def _describe_set(
    of_set: Sequence[Probe], labels: dict[str, str], has_tuned: bool, lines: list[str]
) -> list[str]:
    """State which adapter to use, as in ``lines``, and the losses of BASE and TUNED; without a gain
    of TUNED, compare with BASE.
    """
    ends = {record.subject: record for record in of_set if record.subject in {"base", "tuned"}}
    adapters = [record for record in of_set if record.subject == "adapter"]
    if len(ends) < (2 if has_tuned else 1) or not (has_tuned or adapters):
        return ["not measured yet"]
    base = ends["base"]
    if not has_tuned:
        best = min(adapters, key=lambda record: record.nats)
        return [*lines[:1], _compare_with_base(best, base, labels), *lines[1:]]
    if not adapters:
        lines = [_compare_with_base(ends["tuned"], base, labels)]
    elif is_tuned_worse(base):
        difference = f"{-(base.gap or 0.0):.4f}{plus_minus(gap_half(base))}"
        worse = (
            f"TUNED is worse than BASE by {difference}: it has no gain here, and adapters are "
            "compared with BASE"
        )
        lines = [worse, *(_compare_with_base(record, base, labels) for record in adapters), *lines]
    return [*lines, describe_losses(base, ends["tuned"])]


def _compare_with_base(record: Probe, base: Probe, labels: dict[str, str]) -> str:
    """State whether a model is better or worse than BASE, not distinguishable, or not tested."""
    value, half, word = record.nats - base.nats, None, "not tested for significance against"
    if record.nll and base.predictions:
        value, error = stats.paired_difference(record.nll, base.nll, base.predictions)
        half = stats.paired_half(error, len(base.predictions))
    if half is not None:
        word = "no significant difference from"
        if abs(value) > half:
            word = "better than" if value < 0 else "worse than"
    return f"{_name_model(record, labels)}: {word} BASE ({with_limits(value, half)})"


def _describe_best(records: Sequence[Probe]) -> str:
    """State whether the best adapter is as good as the full fine-tune, and why; empty without
    contests.
    """
    contests = contests_of(records)
    if not contests:
        return ""
    answers = {"as good": "yes", "worse": "no", "not known": "not known"}
    best = min(
        contests, key=lambda contest: ([*answers].index(contest.outcome), contest.worst.gap or 0.0)
    )
    record = best.worst
    kept_share = ""
    has_gain = find_gain(_find_bases(records).get(record.set)) is not None
    if has_gain and record.kept is not None:
        kept_share = f", {record.kept:.0%} of its gain"
    elif best.outcome == "as good":
        kept_share = "; the gain of TUNED itself is not significant"
    others = f"; the best of {len(contests)}" if len(contests) > 1 else ""
    (name,) = short_paths([best.name])
    distance = f"{format_gap(record)} nats from TUNED on {safe(record.set)}"
    answer = answers[best.outcome] + (f", {best.reason}" if best.reason else "")
    return f"{answer}: {name} is {distance}{kept_share}{others}"


def _describe_forgotten(records: Sequence[Probe], labels: dict[str, str]) -> Statement:
    """State what the best adapter and TUNED forgot."""
    best = _find_best(records)
    models = [("adapter", best.name)] if best is not None else []
    groups = [
        [r for r in records if (r.subject, r.name) == model] for model in [*models, ("tuned", "")]
    ]
    return describe_forgetting(
        *((_name_model(group[0], labels), group) for group in groups if group)
    )


def _describe_choice(choice: Choice, records: Sequence[Probe], labels: dict[str, str]) -> list[str]:
    """State which adapter to use: the best one, or a smaller one that is not distinguishable from
    it on any set; the others that are not, and the gaps.
    """
    best = labels[choice.best]
    if not choice.equals:
        nearest = choice.rivals[0]
        return [
            f"use {best}, the best of {len(choice.rivals) + 1}; {labels[nearest.name]} is worse by "
            f"{_format_gap(nearest)}"
        ]
    costs = {record.name: record.params for record in records}
    smaller, others = [], []
    for rival in choice.equals:
        worse = _list_worse(choice, rival.name, records)
        name = f"{labels[rival.name]}{_note(costs[rival.name], worse)}"
        is_smaller = (costs[rival.name] or math.inf) < (costs[choice.best] or 0)
        if is_smaller and not worse:
            smaller.append(name)
        else:
            others.append(name)
    line = f"use {best}{_note(costs[choice.best], [])}"
    if smaller:
        line += f", or with fewer parameters, not significantly worse: {list_names(smaller)}"
    if others:
        line += f"; not significantly worse, but no saving: {list_names(others)}"
    gaps = [f"{labels[rival.name]} minus {best}: {_format_gap(rival)}" for rival in choice.rivals]
    return [line, *gaps]


def _note(params: int | None, notes: Sequence[str]) -> str:
    """Return the size of an adapter and notes on it in brackets; empty without any."""
    size = [] if params is None else [f"{count(params)} parameters"]
    return f" ({'; '.join([*size, *notes])})" if size or notes else ""


def _list_worse(choice: Choice, name: str, records: Sequence[Probe]) -> list[str]:
    """State on which other sets an adapter is significantly worse than the best one of a set."""
    found = []
    for other in set_names(record for record in records if record.set != choice.set):
        of_set = {record.name: record for record in records if record.set == other}
        counts = next(r.predictions for r in records if r.set == other and r.subject == "base")
        own, best = of_set.get(name), of_set.get(choice.best)
        if own and best and own.nll and best.nll:
            rival = _compare_rival(own, best, counts, len(choice.rivals))
            if rival.worse:
                found.append(f"on {short(other)} worse by {_format_gap(rival)}")
    return found


def _format_gap(rival: Rival) -> str:
    if rival.half is None:
        return f"{rival.behind:+.4f} (one sequence has no error)"
    span = with_limits(rival.behind, rival.half)
    if rival.worse:
        return span
    needed = (
        f"more than {stats.MAX_RUNS}" if rival.sequences is None else f"about {rival.sequences}"
    )
    return f"{span}, {needed} sequences would decide"
