"""Statements and short texts on losses, shared by several probes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lora_diag.metrics.statistics import MIN_SEQUENCES, paired_half
from lora_diag.records import Probe, Results
from lora_diag.rendering.statements import Statement, make_statement, short_paths, summarize
from lora_diag.rendering.text import number, percent, plus_minus, quantity, short, with_limits


def probe_summary(results: Results[Any], *statements: Statement, reading: str) -> list[Statement]:
    """Return the summary of a probe: findings, training, conditions, interpretation, skipped
    tensors, inputs last.

    An unfinished run and unexpected skipped tensors come first, unmeasured layers before the
    inputs.

    Args:
        results: The results.
        statements: Statements of the probe.
        reading: Notes on interpretation; may be empty.
    """
    settings = results.run.settings
    all_statements = [describe_few(results), *statements]
    if "optimizer" in settings:
        training = (
            f"{settings['steps']} steps of {settings['batch']} sequences; {settings['optimizer']}"
        )
        if "kind" in settings:
            training = f"{settings['kind']}; {training}"
        all_statements.append(make_statement("trained", "Trained", training, priority=2))
    measured = (
        f"sequences of up to {settings['length']} tokens, {settings['dtype']} on "
        f"{settings['device']}; {settings['tokens']}"
    )
    all_statements += [
        make_statement("measured", "Measured", measured, priority=2),
        make_statement("interpretation", "Interpretation", reading, priority=2),
    ]
    summary = summarize(results, *all_statements, so_far="records so far")
    return sorted(summary, key=lambda statement: statement.key == "compared")


def describe_few(results: Results[Any]) -> Statement:
    """Warn of evaluation sets with too few sequences for reliable losses and intervals."""
    few = []
    for side in results.run.inputs:
        if side.role in {"eval", "shifted"} and 0 < side.tensors < MIN_SEQUENCES:
            few.append(f"{short_paths([side.path])[0]} has {quantity(side.tensors, 'sequence')}")
    text = f"{'; '.join(few)}: losses and intervals of fewer than {MIN_SEQUENCES} are not reliable"
    return make_statement("few", "Few sequences", text if few else "", level="warning")


def on_set(name: str, *lines: str, shifted: bool = False, answer: str = "") -> Statement:
    """Return the statement of the findings on one evaluation set.

    Args:
        name: Name of the set.
        lines: Its statements.
        shifted: Whether the set differs in distribution from the training data.
        answer: The line that answers the question of a report; the first if empty.
    """
    first, *rest = lines
    if shifted and name != "shifted":
        first = f"shifted: {first}"
    return make_statement("on", f"On {short(name)}", first, *rest, answer=answer, scoped=True)


def caption_of(results: Results[Any], *records: Any) -> str:
    """Return the caption of a table of losses: each evaluation set, the number of its sequences and
    their mean number of predictions.

    Args:
        results: The results, whose inputs are the texts.
        records: One record with ``set``, ``shifted``, ``data`` and ``tokens`` of each set, and
            ``sequences`` where two sets may be parts of one file.
    """
    counts = {side.fingerprint: side.tensors for side in results.run.inputs}
    captions = []
    for record in records:
        count = getattr(record, "sequences", None) or counts.get(record.data)
        size = f"{record.tokens} predictions"
        if count:
            size = f"{quantity(count, 'sequence')} of {record.tokens / count:.4g} predictions"
        shifted = " (shifted)" if record.shifted and record.set != "shifted" else ""
        captions.append(f"{short(record.set)}{shifted}: {size}")
    return f"On {'; '.join(captions)}"


def describe_forgetting(*models: tuple[str, Sequence[Any]]) -> Statement:
    """Return the statement of what models forgot: loss minus BASE's on shifted sets, KL(BASE‖model)
    on others.

    Args:
        models: Name of each model, and its records with the fields of ``Forgetting.compare``,
            ``set``, ``shifted`` and ``nll``; those without a comparison with BASE are ignored.
    """
    shifted, tasks = dict[str, list[str]](), dict[str, list[str]]()
    for name, records in models:
        for record in records:
            if record.kl_base is None:
                continue
            if record.shifted:
                shifted.setdefault(record.set, []).append(_describe_change(name, record))
                continue
            divergence = f"KL(BASE‖{name}) = {number(record.kl_base)}"
            divergence += plus_minus(paired_half(record.kl_base_error, len(record.nll)))
            tasks.setdefault(record.set, []).append(divergence)
    lines = [f"on {short(set_name)}, {', '.join(changes)}" for set_name, changes in shifted.items()]
    unknown = "" if shifted else "not measured, as no text is of another kind (--shifted); "
    for set_name, divergences in tasks.items():
        lines.append(f"{unknown}on {short(set_name)}, {', '.join(divergences)} nats: {_PREDICTOR}")
    return make_statement("forgotten", "Forgotten", *lines, priority=0 if shifted else 1)


# Over 14 adapters of the domain of docs/evidence.md, ρ with the loss on other text was 0.95, that
# of ‖ΔW‖ 0.73. Full fine-tuning lost less than LoRA of about the same KL: −0.05 and +0.15 nats at
# 0.50; of the format +0.09 at 4.8, LoRA +0.39 at 4.4.
_PREDICTOR = (
    "predicts forgetting within one kind of training better than norms of ΔW do (Shenfeld et al. "
    "2025)"
)


def _describe_change(name: str, record: Any) -> str:
    """State what a model lost or gained on a set compared with BASE, in nats with its interval."""
    half = paired_half(record.change_error, len(record.nll))
    if half is None or abs(record.change) <= half:
        return f"no significant loss of {name} ({with_limits(record.change, half)} nats)"
    span = with_limits(abs(record.change), half).removeprefix("+")
    verb = "lost" if record.change > 0 else "gained"
    return f"{name} {verb} {span} nats"


def describe_diverged(records: Iterable[Any]) -> list[str]:
    """State how many losses are not finite; empty if all are finite."""
    diverged = sum(record.loss is None for record in records)
    return [f"{diverged} losses are not finite: those runs diverged"] if diverged else []


def format_gap(record: Probe) -> str:
    """Return the gap to TUNED and half of its interval as text; empty if the record has no gap, as
    for TUNED itself.
    """
    if record.to_tuned is None:
        return ""
    return f"{record.to_tuned:+.4f}{plus_minus(gap_half(record))}"


def gap_half(record: Probe) -> float | None:
    """Return the absolute value beyond which the gap is significant; None without an error."""
    return paired_half(record.gap_error, record.count)


def format_kept(record: Probe) -> str:
    """Return the kept fraction of TUNED's change of the loss, as text; a dash if it is
    not known.
    """
    if record.kept is None:
        return "-"
    if abs(record.kept) > 1:
        return f"{record.kept:.0%}"
    return ("-" if record.kept < 0 else "") + percent(abs(record.kept))


def describe_losses(base: Probe, tuned: Probe) -> str:
    """Return the losses of BASE and of TUNED as text, with a warning if their difference is not
    significant.
    """
    ends = f"loss {base.nats:.3f} of BASE → {tuned.nats:.3f} of TUNED"
    half = gap_half(base)
    if base.gap is None or half is None or abs(base.gap) > half:
        return ends
    return (
        f"{ends}: the difference is not significant (±{half:.3f}), so fractions of it are not "
        "meaningful"
    )
