"""What held-out losses show of a run: the checkpoint to keep, those not distinguished from it, and
combinations.

A checkpoint is left out if its loss is significantly above the lowest: differences are paired by
sequence, with one-sided limits of Student's t at 1 − 0.05/(T − 1) (Bonferroni). The lowest loss on
a text is the lowest partly by chance, and this covers it: if the truly best checkpoint is left out,
one of its T − 1 differences from the others exceeds its limit, which has probability 0.05 at most,
whichever of them is lowest. So those that remain contain the best with confidence 95% (Hsu 1984,
"Constrained simultaneous confidence intervals for multiple comparisons with the best", Annals of
Statistics 12).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_diag.diagnostics.checkpoints.record import (
    CheckpointChoice,
    Combination,
    HeldOutLoss,
    RunCheckpoint,
)
from lora_diag.metrics import statistics as stats
from lora_diag.records import Probe, Results
from lora_diag.records.probe import main_sets, set_names
from lora_diag.rendering.statements import Statement, make_statement
from lora_diag.rendering.tables import Column, Grid
from lora_diag.rendering.text import list_names, plus_minus, short, with_limits

# Confidence that the best checkpoint is one of those that are not distinguished from the lowest.
CONFIDENCE = 0.95


def _rank(probes: Sequence[Probe], name: str, subject: str = "checkpoint") -> list[Probe]:
    """Return the finite losses of a kind of model on a set, the lowest first."""
    found = [p for p in probes if p.set == name and p.subject == subject and p.loss is not None]
    return sorted(found, key=lambda probe: probe.nats)


def _find_base(probes: Sequence[Probe], name: str) -> Probe:
    return next(probe for probe in probes if probe.set == name and probe.subject == "base")


def _find_level(count: int) -> float:
    """Return the confidence of each of the comparisons of so many checkpoints with the best."""
    return 1 - (1 - CONFIDENCE) / max(1, count - 1)


def choose_checkpoints(
    probes: Sequence[Probe], steps: Mapping[str, int]
) -> Iterator[CheckpointChoice]:
    """Yield the choice by each evaluation set that decides; none without a finite loss.

    Args:
        probes: The losses.
        steps: Steps by path.
    """
    for name in main_sets(probes):
        ranked, counts = _rank(probes, name), _find_base(probes, name).predictions
        freedom, tied = stats.degrees_of_freedom(len(counts)), []
        for probe in ranked:
            excess, error = stats.paired_difference(probe.nll, ranked[0].nll, counts)
            if error is None or excess <= stats.Estimate(excess, error, freedom).half(
                _find_level(len(ranked))
            ):
                tied.append(steps[probe.name])
        if ranked:
            yield CheckpointChoice(
                step=steps[ranked[0].name], by=name, tied=tuple(sorted(tied)), earliest=min(tied)
            )


def describe_losses(probes: Sequence[Probe], path: str) -> dict[str, HeldOutLoss]:
    """Return the losses of a checkpoint or a combination by evaluation set, each compared with the
    best checkpoint.
    """
    losses = {}
    for own in (probe for probe in probes if probe.name == path and probe.loss is not None):
        ranked, counts = _rank(probes, own.set), _find_base(probes, own.set).predictions
        excess, excess_error = (
            stats.paired_difference(own.nll, ranked[0].nll, counts) if ranked else (None, None)
        )
        _, error = stats.paired_difference(own.nll, [0.0] * len(counts), counts)
        losses[own.set] = HeldOutLoss(
            loss=own.nats, error=error, excess=excess, excess_error=excess_error
        )
    return losses


def compare_combinations(
    probes: Sequence[Probe], paths: Mapping[str, int], combinations: Sequence[Combination]
) -> Iterator[Combination]:
    """Yield the record of every combination, with its losses and its comparison with the best
    checkpoint.

    Args:
        probes: The losses.
        paths: Steps of all checkpoints by path.
        combinations: The combinations, without losses.
    """
    name = main_sets(probes)[0]
    counts, combined = _find_base(probes, name).predictions, _rank(probes, name, "combination")
    half = len(counts) // 2
    is_split = len(counts) >= stats.MIN_SEQUENCES
    groups = (_rank(probes, name), combined) if is_split else ((), ())
    single, best = (
        min(group, key=lambda probe: sum(probe.nll[:half]), default=None) for group in groups
    )
    for combination in combinations:
        fields = {
            "losses": describe_losses(probes, combination.name),
            "by": name,
            "sequences": len(counts) - half,
        }
        own = next((probe for probe in combined if probe.name == combination.name), None)
        fields |= {
            "single": single and paths[single.name],
            "chosen": own is not None and own is best,
        }
        if own is not None and single is not None:
            gain, error = stats.paired_difference(single.nll[half:], own.nll[half:], counts[half:])
            fields |= {"gain": gain, "gain_error": error}
        yield combination.model_copy(update=fields)


def held_out_lines(results: Results[Any]) -> list[Statement]:
    """Return the statements: what to keep, its losses, those not finite, and whether a combination
    is better.
    """
    probes, checkpoints = results.whole_of(Probe), results.whole_of(RunCheckpoint)
    choices, combined = results.whole_of(CheckpointChoice), results.whole_of(Combination)
    steps = {record.path: record.step for record in checkpoints}
    lost = [str(record.step) for record in checkpoints if not record.losses] if probes else []
    return [
        make_statement(
            "keep", "Keep", *(_describe_choice(each, probes, steps) for each in choices), priority=0
        ),
        make_statement(
            "no_loss", "No loss", f"{list_names(lost)}: not finite" if lost else "", level="failure"
        ),
        make_statement("combined", "Averages", *_describe_combinations(combined), priority=0),
        make_statement(
            "held_out", "Held-out loss", *_describe_evidence(choices, probes, checkpoints)
        ),
    ]


def _describe_choice(
    choice: CheckpointChoice, probes: Sequence[Probe], steps: Mapping[str, int]
) -> str:
    """State the checkpoint to keep, those not distinguished from it, and what it or later ones lose
    on shifted text.
    """
    order = sorted(steps[probe.name] for probe in _rank(probes, choice.by))
    parts = [str(choice.step)]
    if choice.step == order[-1] and len(order) > 1:
        parts = [
            f"{choice.step}, the last",
            f"{'may be ' if order[-2] in choice.tied else ''}still falling",
        ]
    others = [str(step) for step in choice.tied if step != choice.step]
    if len(_find_base(probes, choice.by).predictions) < 2:
        parts.append("not compared with the others: one sequence has no error")
    elif order.index(choice.tied[-1]) - order.index(choice.tied[0]) == len(others) > 1:
        parts.append(f"{choice.tied[0]} to {choice.tied[-1]} do not differ significantly")
    else:
        parts.append(
            f"not significantly below {list_names(others, 4)}"
            if others
            else "significantly below all others"
        )
    return "; ".join([*parts, *_describe_shift(choice.step, order[-1], probes, steps)])


def _describe_shift(
    keep: int, last: int, probes: Sequence[Probe], steps: Mapping[str, int]
) -> Iterator[str]:
    """State significant changes of the loss on shifted text: from the kept checkpoint on, or from
    BASE to it.
    """
    for name in set_names(probe for probe in probes if probe.shifted):
        base, by_step = (
            _find_base(probes, name),
            {steps[probe.name]: probe for probe in _rank(probes, name)},
        )
        kept, final = by_step.get(keep), by_step.get(last)
        for first, second, where in (
            (kept, final, f"from {keep} on"),
            (base, kept, f"from BASE to {keep}"),
        ):
            if first is not None and second is not None:
                change, error = stats.paired_difference(second.nll, first.nll, base.predictions)
                half = stats.paired_half(error, len(base.predictions))
                if half is not None and abs(change) > half:
                    yield f"{short(name)} loss {first.nats:.3f} → {second.nats:.3f} {where}"
                    break


def _describe_evidence(
    choices: Sequence[CheckpointChoice],
    probes: Sequence[Probe],
    checkpoints: Sequence[RunCheckpoint],
) -> Iterator[str]:
    """State the loss of each choice, its gain over BASE, and the earliest that is not distinguished
    from it.
    """
    for choice in choices:
        (best, *others), count = (
            _rank(probes, choice.by),
            len(_find_base(probes, choice.by).predictions),
        )
        change = with_limits(best.change or 0.0, stats.paired_half(best.change_error, count))
        early = next(
            record.losses[choice.by] for record in checkpoints if record.step == choice.earliest
        )
        since = (
            f"; the earliest, {choice.earliest}, has {_format_excess(early)}"
            if early.excess
            else ""
        )
        if early.excess and early.excess_error:
            spread, level = early.excess_error * count**0.5, _find_level(len(others) + 1)
            needed = stats.runs_needed(early.excess, spread, 1, level=level)
            since += f" (about {max(needed, count + 1)} would decide)" if needed else ""
        yield (
            f"{best.nats:.4f} on {count} sequences of {short(choice.by)}, {change} from BASE{since}"
        )
    if choices:
        yield (
            f"{CONFIDENCE:.0%} confidence that none of the others is the best: paired, corrected "
            "for their number"
        )


def _format_excess(loss: HeldOutLoss) -> str:
    """Return a loss minus the lowest of a checkpoint, with its standard error."""
    error = "" if loss.excess_error is None else plus_minus(loss.excess_error)
    return f"{loss.excess:+.4f}{error}" if loss.excess else ""


def is_better(combination: Combination) -> bool:
    """Return whether a combination is significantly better than the best checkpoint, on the second
    half.
    """
    half = stats.paired_half(combination.gain_error, combination.sequences)
    return combination.gain is not None and half is not None and combination.gain > half


def _describe_combinations(combined: Sequence[Combination]) -> Iterator[str]:
    """State whether the best combination is significantly better than the best checkpoint on the
    second half.
    """
    chosen = next((record for record in combined if record.chosen), None)
    if chosen is not None and chosen.gain is not None:
        half = stats.paired_half(chosen.gain_error, chosen.sequences)
        verdict = "better" if is_better(chosen) else "not better"
        difference = f"{chosen.name} minus {chosen.single} is {with_limits(-chosen.gain, half)}"
        yield (
            f"{verdict}: {difference}, both the best on one half of {short(chosen.by)} and "
            "compared on the other"
        )
    elif combined:
        yield (
            f"not compared: fewer than eight sequences of {short(combined[0].by)}, half of them "
            "to choose by"
        )


def held_out_grids(results: Results[Any]) -> list[Grid]:
    """Return the table of all losses: rows for BASE, checkpoints and combinations, two columns per
    set.
    """
    probes = results.whole_of(Probe)
    steps = {each.path: str(each.step) for each in results.whole_of(RunCheckpoint)}
    losses = {probe.name: describe_losses(probes, probe.name) for probe in probes}
    columns = []
    for name in set_names(probes):
        cells = [by_set.get(name) for by_set in losses.values()]
        loss = tuple("-" if cell is None else f"{cell.loss:.4f}" for cell in cells)
        columns.append(Column(short(name), loss))
        excess = tuple("" if cell is None else _format_excess(cell) for cell in cells)
        columns.append(Column("minus best", excess, drop=1))
    rows = tuple(steps.get(name, name) or "BASE" for name in losses)
    title = "Held-out loss, and paired difference from the best checkpoint"
    return [Grid(title, "step", rows, tuple(columns))] if rows else []
