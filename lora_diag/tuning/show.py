"""Terminal output of ``tune``: the plan before the search, the decisions, and the choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from rich.console import Group

from lora_diag.records import Results
from lora_diag.rendering.statements import Statement, final_statements, make_statement, summary_of
from lora_diag.rendering.tables import Column, Grid, grids_table
from lora_diag.rendering.text import count, duration, percent, plus_minus, quantity, safe, short, span, to_text
from lora_diag.running.amounts import edge
from lora_diag.tuning.record import Tune, TuneDecision, TunePlan, TuneStage, TuneTrial

T = TypeVar("T")


def tune_table(
    results: Results[Any], width: int = 80, color: bool = False, per: str = "type", next_command: str | None = None
) -> str:
    """Return the summary of the choice for a terminal; the plan alone where nothing was trained."""
    plan = next(iter(results.whole_of(TunePlan)), None)
    if plan is not None and not results.whole_of(Tune) and not results.whole_of(TuneTrial):
        return plan_text(plan, width, color)
    return to_text(Group(summary_of(tune_lines(results), next_command)), width, color)


def plan_text(plan: TunePlan, width: int = 80, color: bool = False) -> str:
    """Return the plan of a search, which is printed before it starts."""
    columns: dict[str, Callable[[TuneStage], str]] = {
        "stage": lambda stage: stage.name,
        "runs": lambda stage: f"≤ {stage.runs}" if stage.runs else "-",
        "time": lambda stage: duration(stage.seconds) if stage.seconds >= 1 else "<1 s",
        "decides": lambda stage: stage.decides,
    }
    grid = _make_grid("", plan.stages, columns)
    rules = [f"r ≥ {rank} ({name})" if rank else f"more than full rank ({name})" for name, rank in plan.rules.items()]
    lines = [
        make_statement("budget", "Budget", f"{plan.budget:,} parameters allow r ≤ {plan.largest} everywhere"),
        make_statement("capacity", "Capacity", f"{plan.tokens:,} predicted tokens; rules of thumb: {', '.join(rules)}"),
        make_statement(
            "tries",
            "Tries",
            f"r={_list_values(plan.ranks)} at learning rates {_list_values(plan.rates)}, {plan.steps} steps each",
        ),
        *_describe_kind(plan),
        make_statement(
            "time",
            "Time",
            f"about {duration(plan.seconds)} at most, from a step of {plan.step_seconds:.2g} s"
            f"{'' if plan.slots == 1 else f' and {plan.slots} concurrent runs'}"
            f"{'' if plan.limit is None else f'; limit {duration(plan.limit)}'}",
        ),
        *_describe_omitted(plan),
    ]
    return grids_table([grid], lines, width, color)


# Columns of text, which are aligned on the left.
TEXT_COLUMNS = {"decides", "on", "outcome", "why"}


def _make_grid(caption: str, rows: Sequence[T], columns: Mapping[str, Callable[[T], str]], about: str = "") -> Grid:
    """Return a table of rows, from a function for the cells of each column; the first column has their names."""
    title, *others = columns
    cells = {name: tuple(map(columns[name], rows)) for name in columns}
    justified = (Column(name, cells[name], "left" if name in TEXT_COLUMNS else "right") for name in others)
    return Grid(caption, title, cells[title], tuple(justified), about)


def _describe_kind(plan: TunePlan) -> list[Statement]:
    """Return the kind of adapter, with what differs in comparisons; empty for plain LoRA."""
    notes = []
    if "DoRA" in plan.kind:
        notes.append(
            f"{plan.magnitudes:,} parameters at every rank are magnitudes; the spectrum of an update includes their "
            "change and is not low-rank"
        )
    if "rsLoRA" in plan.kind:
        notes.append(
            "the scale of B·A is alpha/√r, above that of alpha = 2r for r < 64, so learning rates cannot be carried "
            "over; a tenth of them for full fine-tuning is a rule for alpha = 2r"
        )
    return [make_statement("kind", "Adapter", plan.kind, *notes)] if notes else []


def _list_values(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _describe_omitted(plan: TunePlan) -> list[Statement]:
    """Return what the plan omits, with the time that each omission saves; empty if nothing."""
    if not plan.left_out:
        return []
    omitted = "; ".join(_name_omission(name, plan.saved.get(name)) for name in plan.left_out)
    enough = "" if not plan.saved else f"; --time {_whole_time(plan, plan.saved)} would be enough for all"
    return [make_statement("left_out", "Left out", f"{omitted}{enough}")]


def _name_omission(name: str, seconds: float | None) -> str:
    return safe(name) if seconds is None else f"{safe(name)} ({duration(seconds)})"


def _whole_time(plan: TunePlan, saved: Mapping[str, float]) -> str:
    """Return a time limit that allows the plan and what was omitted, rounded up, as the option takes it."""
    minutes = math.ceil((plan.seconds + math.fsum(saved.values())) / 60)
    return f"{minutes}min" if minutes < 120 else f"{math.ceil(minutes / 60)}h"


def tune_lines(results: Results[Any]) -> list[Statement]:
    """Return the choice and its evidence; without a choice, the last decision."""
    choice, decisions = next(iter(results.whole_of(Tune)), None), results.whole_of(TuneDecision)
    if choice is None:
        last = decisions[-1] if decisions else None
        state = "no decision yet" if last is None else f"last decision: {last.stage}, {safe(last.name)} {last.outcome}"
        return [
            make_statement("choice", "Choice", state, level="warning"),
            *final_statements(results, "records so far"),
        ]
    plan, trials = next(iter(results.whole_of(TunePlan)), None), results.whole_of(TuneTrial)
    statements = [
        make_statement(
            "choice",
            "Choice",
            f"{describe_choice(choice)}{'' if choice.significant else '; NOT shown to be enough'}",
            _describe_doubt(choice, decisions),
            level="ok" if choice.significant else "warning",
            priority=0,
        ),
        make_statement("gain", "Gain", _describe_gain(choice, trials), priority=0),
        make_statement("edge", "Rate", _describe_edge(choice, trials, plan), level="warning"),
        make_statement("shifted", "Shifted", _describe_shifted(choice)),
        make_statement("next", "Next rank", _describe_next_rank(choice)),
        make_statement("left_out", "Not tried", *_describe_left_out(decisions, plan)),
        make_statement("non_uniform", "Non-uniform", _describe_non_uniform(choice, decisions)),
        *_describe_trials(decisions),
    ]
    return [*filter(lambda one: one.lead, statements), *final_statements(results, "records so far")]


def describe_choice(choice: Tune) -> str:
    """Return the configuration in one line: kind, ranks, learning rate, scale, regularization, share of the budget."""
    ranks = span(choice.ranks.values()) if choice.ranks else ""
    where = f"ranks {ranks} by layer ({choice.variant})" if ranks else f"r={choice.rank} in every layer"
    extra = f", dropout {choice.dropout:g}" if choice.dropout else ""
    extra += f", weight decay {choice.weight_decay:g}" if choice.weight_decay else ""
    alpha = f"{choice.alpha_over_rank:g}r" if choice.alpha is None else f"{choice.alpha:g} (rsLoRA)"
    dora = "DoRA, " if choice.dora else ""
    share = percent(choice.params / choice.budget)
    return f"{dora}{where}, learning rate {choice.lr:g}, alpha = {alpha}{extra}; {share} of budget"


def _describe_doubt(choice: Tune, decisions: Sequence[TuneDecision]) -> str:
    """State why a rank that is not shown to be enough is chosen, and what would show it; else empty."""
    if choice.significant:
        return ""
    needed = max((one.seeds for one in decisions if one.name == "more seeds" and one.outcome == "not tried"), default=0)
    seeds = f"about {needed} seeds" if needed else "more seeds or steps"
    return f"the smallest by mean losses; {seeds} would decide"


def _describe_gain(choice: Tune, trials: Sequence[TuneTrial]) -> str:
    losses = f"{choice.base_loss:.4f} to {choice.loss:.4f}, {quantity(choice.seeds, 'seed')}"
    line = f"{choice.gain:.4f}{_format_error(choice.gain_error)} nats on {short(choice.set)} ({losses})"
    if choice.share_of_full is not None:
        return f"{line}; {percent(min(1.0, max(0.0, choice.share_of_full)))} of full fine-tuning's"
    full = [trial.loss for trial in trials if (trial.variant, trial.set) == ("full", choice.set)]
    reason = "gains nothing" if any(loss is not None for loss in full) else "diverged" if full else "was not trained"
    return f"{line}; full fine-tuning {reason}"


def _format_error(error: float | None) -> str:
    return "" if error is None else plus_minus(error)


def _describe_edge(choice: Tune, trials: Sequence[TuneTrial], plan: TunePlan | None) -> str:
    """State that the learning rate is at the edge of those tried at the shared rank, or the only one; else empty."""
    own = {trial.lr for trial in trials if trial.variant == f"uniform-r{choice.rank}" and trial.lr is not None}
    tried = own | set(plan.rates if plan is not None else ())
    if len(tried) < 2:
        return f"{choice.lr:g} is the only one tried; give several with --lr"
    place = {-1: "lowest", 0: "", 1: "highest"}[edge(tried, choice.lr)]
    return f"{choice.lr:g} is the {place} tried, so a better one may lie beyond; extend --lr" if place else ""


def _describe_next_rank(choice: Tune) -> str:
    if choice.next_rank is None or choice.next_gain is None:
        return "none within the budget was tried"
    verb = "gains" if choice.next_gain > 0 else "loses"
    return f"r={choice.next_rank} {verb} {abs(choice.next_gain):.4f} nats, by mean losses"


def _describe_non_uniform(choice: Tune, decisions: Sequence[TuneDecision]) -> str:
    """State whether non-uniform ranks are better than uniform ones, by the candidate that was trained most."""
    of_stage = [decision for decision in decisions if decision.stage == "redistribution"]
    if not (
        compared := [(-decision.seeds, decision.gap, decision) for decision in of_stage if decision.gap is not None]
    ):
        why = (decision.why for decision in of_stage if decision.name == "non-uniform ranks")
        return f"{choice.non_uniform}: {safe(next(why, 'not in the plan'))}"
    _, gap, best = min(compared, key=lambda item: item[:2])
    against = f"uniform ranks, {quantity(best.seeds, 'seed')}"
    return f"{choice.non_uniform}: {best.name} is {gap:+.4f}{_format_error(best.error)} nats from {against}"


def _describe_shifted(choice: Tune) -> str:
    if choice.gain_shifted is None:
        return ""
    verb, error = "gains" if choice.gain_shifted >= 0 else "loses", _format_error(choice.gain_shifted_error)
    return f"{verb} {abs(choice.gain_shifted):.4f}{error} nats on {short(choice.set_shifted)}"


def _describe_trials(decisions: Sequence[TuneDecision]) -> list[Statement]:
    """Return the trials for stability, and the gain of more parameters."""
    statements = []
    for stage, label in (("stability", "Stability"), ("escalation", "More")):
        of_stage = [decision for decision in decisions if decision.stage == stage]
        trials: dict[str, list[str]] = {}
        for decision in of_stage:
            if decision.outcome != "not needed":
                trials.setdefault(decision.outcome, []).append(_name_trial(decision))
        lead = "; ".join(f"{outcome}: {', '.join(names)}" for outcome, names in trials.items())
        if of_stage:
            statements.append(make_statement(stage, label, lead or f"not needed: {safe(of_stage[0].why)}", priority=2))
    return statements


def _name_trial(decision: TuneDecision) -> str:
    """Return what a trial changes in the incumbent, with its gap, or its predicted duration if it was not trained."""
    name = safe(decision.name.rpartition("+")[2])
    if decision.gap is not None:
        return f"{name} ({decision.gap:+.4f}{_format_error(decision.error)})"
    return name if decision.seconds is None else f"{name} (about {duration(decision.seconds)})"


def _describe_left_out(decisions: Sequence[TuneDecision], plan: TunePlan | None) -> list[str]:
    """State what was omitted to keep the time limit, with its cost, and what was not tried for other reasons."""
    of_stage = {"stability", "escalation"}  # their statements name them
    omitted = [decision for decision in decisions if decision.outcome == "not tried" and decision.stage not in of_stage]
    for_time = {one.name: one.seconds for one in omitted if one.stage == "budget" and one.seconds is not None}
    lines = [f"{safe(one.name)}: {safe(one.why)}" for one in omitted if one.name not in for_time]
    if not for_time or plan is None:
        return lines
    names = "; ".join(_name_omission(name, seconds) for name, seconds in for_time.items())
    cost = f"{quantity(len(for_time), 'part')} of the search, {duration(math.fsum(for_time.values()))}, to keep --time"
    return [f"{cost}; --time {_whole_time(plan, for_time)} allows all", names, *lines]


def tune_grids(results: Results[Any], per: str = "type") -> list[Grid]:
    """Return the trail of decisions, and the losses of all configurations."""
    decisions = results.whole_of(TuneDecision)
    columns: dict[str, Callable[[TuneDecision], str]] = {
        "stage": lambda decision: decision.stage,
        "on": lambda decision: safe(decision.name),
        "outcome": lambda decision: decision.outcome,
        "rank": lambda decision: "" if decision.rank is None else str(decision.rank),
        "gap": lambda decision: "" if decision.gap is None else f"{decision.gap:+.4f}",
        "± gap": lambda decision: "" if decision.error is None else f"{decision.error:.4f}",
        "seeds": lambda decision: str(decision.seeds or ""),
        "why": lambda decision: safe(decision.why),
    }
    about = "Gaps are losses minus that of the incumbent, in nats, on the same seeds and sequences."
    history = _make_grid("Decisions, in their order", decisions, columns, about)
    return [history, *_make_losses_grids(results.whole_of(TuneTrial))]


def _make_losses_grids(trials: Sequence[TuneTrial]) -> list[Grid]:
    """Return a table for each set, with a row for each configuration at each learning rate."""
    columns: dict[str, Callable[[list[TuneTrial]], str]] = {
        "configuration": lambda group: group[0].variant,
        "lr": lambda group: "" if group[0].lr is None else f"{group[0].lr:g}",
        "params": lambda group: count(group[0].params),
        "seeds": lambda group: str(sum(trial.loss is not None for trial in group)),
        "loss": _format_mean_loss,
    }
    groups: dict[str, dict[tuple[str, float | None], list[TuneTrial]]] = {}
    for trial in trials:
        groups.setdefault(trial.set, {}).setdefault((trial.variant, trial.lr), []).append(trial)
    return [_make_grid(f"Losses on {short(name)}", [*rows.values()], columns) for name, rows in groups.items()]


def _format_mean_loss(trials: Sequence[TuneTrial]) -> str:
    losses = [trial.loss for trial in trials if trial.loss is not None]
    return f"{sum(losses) / len(losses):.4f}" if losses else "diverged"
