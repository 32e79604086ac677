"""What held-out losses show of a run: the checkpoint to keep, those not distinguished from it, and combinations.

The checkpoints that cannot be the best are those whose loss is significantly above the lowest: differences are paired
by sequence, with one-sided limits of Student's t at 1 − 0.05/(T − 1) (Bonferroni). The lowest loss on a text is the
lowest partly by chance, and this covers it: if the truly best checkpoint is left out, one of its T − 1 differences from
the others exceeds its limit, which has probability 0.05 at most, whichever of them is lowest. So the others contain the
best with confidence 95% (multiple comparisons with the best: Hsu 1984, "Constrained simultaneous confidence intervals
for multiple comparisons with the best").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_diag.diagnostics.checkpoints.record import Checkpoint, Choice, Combination, HeldOutLoss
from lora_diag.metrics.statistics import Estimate, degrees_of_freedom, paired_difference, paired_half
from lora_diag.records import Probe, Results
from lora_diag.records.probe import main_sets, set_names
from lora_diag.rendering.statements import Statement, make_statement
from lora_diag.rendering.tables import Column, Grid
from lora_diag.rendering.text import format_shown, list_names, plus_minus, quantity, short, with_limits

# Confidence that the best checkpoint is one of those that are not distinguished from the lowest.
CONFIDENCE = 0.95


def _select(probes: Sequence[Probe], name: str, subject: str = "checkpoint") -> list[Probe]:
    """Return the finite records of a kind of model on a set, the lowest loss first."""
    found = [p for p in probes if p.set == name and p.subject == subject and p.loss is not None]
    return sorted(found, key=lambda probe: probe.nats)


def _count(probes: Sequence[Probe], name: str) -> tuple[int, ...]:
    """Return the number of predictions of each sequence of a set."""
    return next(p.predictions for p in probes if p.set == name and p.subject == "base")


def choose_checkpoints(probes: Sequence[Probe], steps: Mapping[str, int]) -> Iterator[Choice]:
    """Yield the choice by each evaluation set that decides; none without a finite loss.

    Args:
        probes: The losses.
        steps: Steps by path.
    """
    for name in main_sets(probes):
        ranked, counts = _select(probes, name), _count(probes, name)
        if ranked:
            level = 1 - (1 - CONFIDENCE) / max(1, len(ranked) - 1)
            tied = sorted(steps[p.name] for p in ranked if not _is_worse(p, ranked[0], counts, level))
            yield Choice(step=steps[ranked[0].name], by=name, tied=tuple(tied), earliest=tied[0])


def _is_worse(probe: Probe, best: Probe, counts: Sequence[int], level: float) -> bool:
    """Return whether a loss is significantly above the lowest."""
    gap, error = paired_difference(probe.nll, best.nll, counts)
    return error is not None and gap > Estimate(gap, error, degrees_of_freedom(len(counts))).half(level)


def describe_losses(probes: Sequence[Probe], path: str) -> dict[str, HeldOutLoss]:
    """Return the losses of a checkpoint or a combination by evaluation set, each compared with the best checkpoint."""
    losses = {}
    for name in set_names(probes):
        ranked, counts = _select(probes, name), _count(probes, name)
        own = next((probe for probe in probes if probe.set == name and probe.name == path), None)
        if own is not None and own.loss is not None:
            excess, excess_error = paired_difference(own.nll, ranked[0].nll, counts) if ranked else (None, None)
            _, error = paired_difference(own.nll, [0.0] * len(counts), counts)
            losses[name] = HeldOutLoss(loss=own.loss, error=error, excess=excess, excess_error=excess_error)
    return losses


def compare_combinations(
    probes: Sequence[Probe], paths: Mapping[str, int], steps: tuple[int, ...], weights: Mapping[str, tuple[float, ...]]
) -> Iterator[Combination]:
    """Yield the record of every combination.

    Args:
        probes: The losses.
        paths: Steps of all checkpoints by path.
        steps: Steps of the combined checkpoints.
        weights: Their weights by combination; empty where they differ by layer.
    """
    name = main_sets(probes)[0]
    counts, singles, combined = _count(probes, name), _select(probes, name), _select(probes, name, "combination")
    half = len(counts) // 2

    def first_half(probe: Probe) -> float:
        return sum(probe.nll[:half])

    single = min(singles, key=first_half, default=None) if len(counts) > 3 else None
    chosen = min(combined, key=first_half).name if combined and single is not None else None
    by_name = {probe.name: probe for probe in combined}
    for rule, by_step in weights.items():
        gain, error = None, None
        if single is not None and rule in by_name:
            gain, error = paired_difference(single.nll[half:], by_name[rule].nll[half:], counts[half:])
        yield Combination(
            name=rule,
            steps=steps,
            weights=by_step,
            losses=describe_losses(probes, rule),
            by=name,
            single=None if single is None else paths[single.name],
            chosen=rule == chosen,
            gain=gain,
            gain_error=error,
            sequences=len(counts) - half,
        )


def is_better(record: Combination) -> bool:
    """Return whether a combination is significantly better than the best checkpoint on the second half."""
    half = paired_half(record.gain_error, record.sequences)
    return record.gain is not None and half is not None and record.gain > half


def held_out_lines(results: Results[Any]) -> list[Statement]:
    """Return the statements: what to keep, its losses and those not finite, and whether a combination is better."""
    probes, choices = results.whole_of(Probe), results.whole_of(Choice)
    if not probes:
        return []
    steps = {record.path: record.step for record in results.whole_of(Checkpoint)}
    lost = sorted({steps[p.name] for p in probes if p.subject == "checkpoint" and p.loss is None and p.name in steps})
    problem = f"of {list_names(list(map(str, lost)))}: no finite loss, so that it cannot be kept" if lost else ""
    combined = results.whole_of(Combination)
    decisions = (_describe_choice(choice, probes, steps, combined) for choice in choices)
    return [
        make_statement("keep", "Keep", *decisions, priority=0),
        make_statement("not_finite", "Not finite", problem, level="failure"),
        make_statement("held_out", "Held-out loss", *_describe_evidence(choices, probes, steps)),
        make_statement("combined", "Average", *_describe_combinations(combined)),
    ]


def _describe_choice(
    choice: Choice, probes: Sequence[Probe], steps: Mapping[str, int], combined: Sequence[Combination]
) -> str:
    """State the checkpoint to keep, those not distinguished from it, and what later ones lose on shifted text."""
    ranked = _select(probes, choice.by)
    order = sorted(steps[probe.name] for probe in ranked)
    name, parts = str(choice.step), list[str]()
    better = next((each.name for each in combined if each.chosen and each.by == choice.by and is_better(each)), None)
    if better is not None:
        name = f"{better}, better than every checkpoint; of these {name}"
    if choice.step == order[-1] and len(order) > 1:
        name += ", the last"
        parts.append("still falling" if order[-2] not in choice.tied else "it may still be falling")
    others = [str(step) for step in choice.tied if step != choice.step]
    first, last = order.index(choice.tied[0]), order.index(choice.tied[-1])
    if not others:
        parts.append("the only finite one" if len(order) == 1 else "significantly below all others")
    elif last - first == len(others) > 1:
        parts.append(f"{choice.tied[0]} to {choice.tied[-1]} do not differ significantly")
    else:
        parts.append(f"not significantly below {list_names(others, 4)}")
    return "; ".join([name, *parts, *_describe_shift(choice.step, order[-1], probes, steps)])


def _describe_shift(keep: int, last: int, probes: Sequence[Probe], steps: Mapping[str, int]) -> Iterator[str]:
    """State significant changes of the loss on shifted text: from the kept checkpoint on, or from BASE to it."""
    for name in set_names(probe for probe in probes if probe.shifted):
        by_step = {steps[probe.name]: probe for probe in _select(probes, name)}
        base = next(p for p in probes if p.set == name and p.subject == "base")
        for first, second, where in (
            (by_step.get(keep), by_step.get(last), f"from {keep} on"),
            (base, by_step.get(keep), f"from BASE to {keep}"),
        ):
            if first is None or second is None:
                continue
            gap, error = paired_difference(second.nll, first.nll, base.predictions)
            if (half := paired_half(error, len(base.predictions))) is not None and abs(gap) > half:
                yield f"{short(name)} loss {first.nats:.3f} → {second.nats:.3f} {where}"
                break


def _describe_evidence(choices: Sequence[Choice], probes: Sequence[Probe], steps: Mapping[str, int]) -> Iterator[str]:
    """State the loss of each choice, its gain over BASE, and the next best checkpoint."""
    for choice in choices:
        best, *others = _select(probes, choice.by)
        counts = _count(probes, choice.by)
        half = paired_half(best.change_error, len(counts))
        yield (
            f"on {short(choice.by)} {best.nats:.4f}, {with_limits(best.change or 0.0, half)} from BASE; "
            f"{quantity(len(counts), 'sequence')}"
        )
        if choice.earliest != choice.step:
            early = next(probe for probe in others if steps[probe.name] == choice.earliest)
            yield f"earliest of those that do not differ: {choice.earliest}, {_format_excess(early, best, counts)}"
    if choices:
        yield (
            f"the truly best is among those that do not differ with {CONFIDENCE:.0%} confidence (paired by sequence, "
            "corrected for their number and for the choice on this text)"
        )


def _format_excess(probe: Probe, best: Probe, counts: Sequence[int]) -> str:
    """Return a loss minus the lowest, with its standard error."""
    gap, error = paired_difference(probe.nll, best.nll, counts)
    return f"{gap:+.4f}" + ("" if error is None else plus_minus(error))


def _describe_combinations(combined: Sequence[Combination]) -> Iterator[str]:
    """State whether the best combination is better than the best checkpoint."""
    chosen = next((record for record in combined if record.chosen), None)
    if chosen is None or chosen.gain is None:
        if combined and combined[0].by:
            yield f"not compared: {short(combined[0].by)} has fewer than four sequences, to choose on half of them"
        return
    half = paired_half(chosen.gain_error, chosen.sequences)
    verdict = "better" if is_better(chosen) else "not better"
    yield (
        f"{verdict}: {chosen.name} minus checkpoint {chosen.single} is {with_limits(-chosen.gain, half)} on the second "
        f"half of {short(chosen.by)}; the first half chose both, {chosen.name} of {quantity(len(combined), 'rule')}"
    )
    if is_better(chosen) and chosen.path is None:
        yield "write it with --write FOLDER"


def held_out_grids(results: Results[Any]) -> list[Grid]:
    """Return the table of all losses: rows for BASE, checkpoints and combinations, two columns per set."""
    probes = results.whole_of(Probe)
    if not probes:
        return []
    steps = {record.path: str(record.step) for record in results.whole_of(Checkpoint)}
    names = list(dict.fromkeys(probe.name for probe in probes))
    columns = []
    for name in set_names(probes):
        of_set = {probe.name: probe for probe in probes if probe.set == name}
        ranked, counts = _select(probes, name), _count(probes, name)
        losses = tuple(format_shown(of_set[each].loss, "{:.4f}".format) if each in of_set else "" for each in names)
        excess = tuple(
            _format_excess(of_set[each], ranked[0], counts) if ranked and each in of_set and of_set[each].nll else ""
            for each in names
        )
        columns += [Column(short(name), losses), Column("minus best", excess, drop=1)]
    rows = tuple(steps.get(name, name) or "BASE" for name in names)
    return [Grid("Held-out loss (nats), and paired difference from the best checkpoint", "step", rows, tuple(columns))]
