"""Terminal output of ``tune``: the plan before the search, the decisions, and the choice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from lora_diag.records import Probe, Results
from lora_diag.records.base import Shown
from lora_diag.rendering.losses import caption_of, describe_forgetting
from lora_diag.rendering.statements import Statement, final_statements, make_statement
from lora_diag.rendering.tables import Grid, grid_of, grids_table
from lora_diag.rendering.text import (
    byte_count,
    duration,
    percent,
    plus_minus,
    quantity,
    safe,
    short,
    span,
)
from lora_diag.running.amounts import edge
from lora_diag.tuning.record import Tune, TuneDecision, TunePlan, TuneTrial

STAGES = (
    Shown("runs", "runs ≤", "Training runs, at most", main=True),
    Shown("seconds", "time", "Estimated from a timed step", main=True, form="time"),
    Shown("decides", "decides", "Question that the stage answers", main=True),
)
DECISIONS = (
    Shown("name", "on", "Subject of the decision", main=True),
    Shown("outcome", "outcome", "What was decided", main=True),
    Shown("rank", "rank", "a shared rank", main=True),
    Shown(
        "gap",
        "gap",
        "Loss minus that of the incumbent, in nats",
        main=True,
        form="+.4f",
        error="half",
    ),
    Shown("seeds", "seeds", "Seeds of the gap", main=True),
    Shown("why", "why", "The reason", main=True),
)
LOSSES = (
    Shown("lr", "lr", "Peak learning rate", main=True, form="g"),
    Shown("params", "params", "Trainable parameters", main=True, form="count"),
    Shown(
        "loss", "seeds", "Runs with a loss", main=True, pool=lambda runs: len(_list_losses(runs))
    ),
    Shown(
        "loss",
        "loss",
        "Mean over seeds, in nats",
        main=True,
        form=".4f",
        pool=lambda runs: _average(runs),
    ),
)


def _list_losses(trials: Sequence[TuneTrial]) -> list[float]:
    return [trial.loss for trial in trials if trial.loss is not None]


def _average(trials: Sequence[TuneTrial]) -> float | str:
    losses = _list_losses(trials)
    return fmean(losses) if losses else "diverged"


def tune_table(
    results: Results[Any],
    width: int = 80,
    color: bool = False,
    per: str = "type",
    next_command: str | None = None,
) -> str:
    """Return the summary of the choice for a terminal; the plan alone where nothing was trained."""
    plan = _find_plan(results)
    if plan is not None and not results.whole_of(TuneTrial):
        return plan_text(plan, width, color)
    return grids_table([], tune_lines(results), width, color, next_command)


def _find_plan(results: Results[Any]) -> TunePlan | None:
    return next(iter(results.whole_of(TunePlan)), None)


def plan_text(plan: TunePlan, width: int = 80, color: bool = False) -> str:
    """Return the plan of a search, which is printed before it starts."""
    rules = [
        f"r ≥ {rank} ({name})" if rank else f"more than full rank ({name})"
        for name, rank in plan.rules.items()
    ]
    ranks = ", ".join(map(str, plan.ranks))
    rates = ", ".join(f"{rate:g}" for rate in plan.rates)
    source = f"a step of {plan.step_seconds:.2g} s"
    if plan.error:
        source = f"short steps: ±{percent(plan.error)}"
    time = f"about {duration(plan.seconds)} at most, from {source}"
    if plan.slots > 1:
        time += f" and {plan.slots} concurrent runs"
    memory = f"at least {byte_count(plan.memory_bytes)} for a step" if plan.memory_bytes else ""
    omitted = {name: plan.saved.get(name) for name in plan.left_out}
    lines = [
        make_statement(
            "budget", "Budget", f"{plan.budget:,} parameters allow r ≤ {plan.largest} everywhere"
        ),
        make_statement(
            "capacity",
            "Capacity",
            f"{plan.tokens:,} predicted tokens; rules of thumb: {', '.join(rules)}",
        ),
        make_statement(
            "tries", "Tries", f"r={ranks} at learning rates {rates}, {plan.steps} steps each"
        ),
        make_statement("time", "Time", time),
        make_statement("memory", "Memory", memory),
        make_statement("left_out", "Left out", _describe_omitted(plan, omitted)),
    ]
    grid = grid_of(STAGES, [(stage.name, [stage]) for stage in plan.stages], "stage")
    return grids_table([grid], [line for line in lines if line.lead], width, color)


def _describe_omitted(plan: TunePlan | None, omitted: Mapping[str, float | None]) -> str:
    """Return what is omitted, with the time that each omission saves, and the limit that allows
    all; or nothing.
    """
    names = [
        safe(name) if time is None else f"{safe(name)} ({duration(time)})"
        for name, time in omitted.items()
    ]
    saved = math.fsum(time or 0.0 for time in omitted.values())
    if saved and plan is not None:
        minutes = math.ceil((plan.seconds + saved) / 60)
        limit = f"{minutes}min" if minutes < 120 else f"{math.ceil(minutes / 60)}h"
        names.append(f"--time {limit} allows all")
    return "; ".join(names)


def tune_lines(results: Results[Any]) -> list[Statement]:
    """Return the choice and its evidence; without a choice, the last decision."""
    choice = next(iter(results.whole_of(Tune)), None)
    decisions = results.whole_of(TuneDecision)
    final = final_statements(results, "records so far")
    if choice is None:
        state = "no decision yet"
        if decisions:
            last = decisions[-1]
            state = f"last decision: {last.stage}, {safe(last.name)} {last.outcome}"
        return [make_statement("choice", "Choice", state, level="warning"), *final]
    plan = _find_plan(results)
    trials = results.whole_of(TuneTrial)
    # Statements of the trials' stages name what these did not try.
    omitted = [one for one in decisions if one.outcome == "not tried" and one.stage not in TRIALS]
    for_time = {one.name: one.seconds for one in omitted if one.seconds is not None}
    others = (f"{safe(one.name)}: {safe(one.why)}" for one in omitted if one.seconds is None)
    doubt = "" if choice.significant else f"; NOT shown to {_name_doubt(choice)}"
    statements = [
        make_statement(
            "choice",
            "Choice",
            f"{_describe_choice(choice)}{doubt}",
            _describe_doubt(choice, decisions),
            level="ok" if choice.significant else "warning",
            priority=0,
        ),
        make_statement("gain", "Gain", _describe_gain(choice), priority=0),
        make_statement("edge", "Rate", _describe_edge(choice, trials, plan), level="warning"),
        _describe_forgotten(choice, results),
        make_statement("next", "Next rank", _describe_next_rank(choice)),
        make_statement("left_out", "Not tried", _describe_omitted(plan, for_time), *others),
        *_describe_trials(decisions),
    ]
    return [*(one for one in statements if one.lead), *final]


def _describe_choice(choice: Tune) -> str:
    """Return the configuration in one line: kind, ranks, learning rate, scale, regularization,
    share of the budget.
    """
    where = f"r={choice.rank} in every layer"
    if choice.ranks:
        where = f"ranks {span(choice.ranks.values())} by layer ({choice.variant})"
    extra = ""
    if choice.dropout:
        extra += f", dropout {choice.dropout:g}"
    if choice.weight_decay:
        extra += f", weight decay {choice.weight_decay:g}"
    alpha = f"{choice.alpha_over_rank:g}r" if choice.alpha is None else f"{choice.alpha:g} (rsLoRA)"
    dora = "DoRA, " if choice.dora else ""
    share = percent(choice.params / choice.budget)
    return f"{dora}{where}, learning rate {choice.lr:g}, alpha = {alpha}{extra}; {share} of budget"


def advise_training(results: Results[Any]) -> dict[str, str] | None:
    """Return the advice to train with the choice, and its evidence; None without one that gains."""
    choice = next((one for one in results.whole_of(Tune) if one.gain > 0), None)
    if choice is None:
        return None
    gain = f"{choice.gain:.4f}{plus_minus(choice.half_of(choice.gain_error))}"
    why = f"On {choice.set}, it gains {gain} nats with {choice.steps} steps."
    if not choice.significant:
        why += f" Not shown to {_name_doubt(choice)}."
    return {"action": f"Train with this configuration: {_describe_choice(choice)}", "why": why}


def _name_doubt(choice: Tune) -> str:
    """Return what a choice that is not significant is not shown to do."""
    return "be enough" if choice.has_significant_gain else "lower the loss of BASE"


def _describe_doubt(choice: Tune, decisions: Sequence[TuneDecision]) -> str:
    """State the reason for a choice that is not significant, and what would decide it;
    else empty.
    """
    if choice.significant:
        return ""
    if not choice.has_significant_gain:
        return "the gain is not significant; more seeds or steps would decide"
    needed = max(
        (one.seeds for one in decisions if one.name == "more seeds" and one.outcome == "not tried"),
        default=0,
    )
    seeds = f"about {needed} seeds" if needed else "more seeds or steps"
    return f"the smallest by mean losses; {seeds} would decide"


def _describe_gain(choice: Tune) -> str:
    losses = f"{choice.base_loss:.4f} to {choice.loss:.4f}, {quantity(choice.seeds, 'seed')}"
    gain = f"{choice.gain:.4f}{plus_minus(choice.half_of(choice.gain_error))}"
    line = f"{gain} nats on {short(choice.set)} ({losses})"
    if choice.share_of_full is None:
        return line
    return f"{line}; {percent(min(1.0, max(0.0, choice.share_of_full)))} of full fine-tuning's"


def _describe_edge(choice: Tune, trials: Sequence[TuneTrial], plan: TunePlan | None) -> str:
    """State that the rate is at the edge of those planned, or tried at the shared rank, or the only
    one; else empty.
    """
    own = {
        trial.lr
        for trial in trials
        if trial.variant == f"uniform-r{choice.rank}" and trial.lr is not None
    }
    tried = own | set(plan.rates if plan is not None else ())
    if len(tried) < 2:
        return f"{choice.lr:g} is the only one tried; give several with --lr"
    side = edge(tried, choice.lr)
    if side == 0:
        return ""
    place = "lowest" if side < 0 else "highest"
    return f"{choice.lr:g} is the {place} tried, so a better one may lie beyond; extend --lr"


def _describe_next_rank(choice: Tune) -> str:
    if choice.next_rank is None or choice.next_gain is None:
        return "none within the budget was tried"
    verb = "gains" if choice.next_gain > 0 else "loses"
    return f"r={choice.next_rank} {verb} {abs(choice.next_gain):.4f} nats, by mean losses"


def _describe_forgotten(choice: Tune, results: Results[Any]) -> Statement:
    """State what the chosen adapter forgot; in files of earlier versions the gain on the first
    shifted set.
    """
    compared = [record for record in results.whole_of(Probe) if record.name == choice.variant]
    if compared or choice.gain_shifted is None:
        return describe_forgetting(("choice", compared))
    verb = "gains" if choice.gain_shifted >= 0 else "loses"
    error = plus_minus(choice.half_of(choice.gain_shifted_error))
    text = f"{verb} {abs(choice.gain_shifted):.4f}{error} nats on {short(choice.set_shifted)}"
    return make_statement("shifted", "Shifted", text)


# Stages that compare with the incumbent: key and label of their statements, and its priority.
TRIALS = {
    "redistribution": ("non_uniform", "Non-uniform", 1),
    "stability": ("stability", "Stability", 2),
    "escalation": ("escalation", "More", 2),
}


def _describe_trials(decisions: Sequence[TuneDecision]) -> Iterator[Statement]:
    """Yield the outcomes of each stage that compares configurations; the reason where it compared
    none.
    """
    for stage, (key, label, priority) in TRIALS.items():
        names: dict[str, list[str]] = {}
        reason = ""
        for one in decisions:
            if one.stage == stage:
                reason = f"{one.outcome}: {safe(one.why)}"
                if one.outcome != "not needed" and one.name != "non-uniform ranks":
                    names.setdefault(one.outcome, []).append(_name_trial(one))
        lead = "; ".join(f"{outcome}: {', '.join(trials)}" for outcome, trials in names.items())
        yield make_statement(key, label, lead or reason, priority=priority)


def _name_trial(decision: TuneDecision) -> str:
    """Return what a trial changes in the incumbent, with its gap, or its predicted duration if it
    was not trained.
    """
    name = safe(decision.name.rpartition("+")[2])
    if decision.gap is not None:
        return f"{name} ({decision.gap:+.4f}{plus_minus(decision.half)})"
    return name if decision.seconds is None else f"{name} (about {duration(decision.seconds)})"


def tune_grids(results: Results[Any], per: str = "type") -> list[Grid]:
    """Return the trail of decisions, and for each set the losses of each configuration at each
    learning rate.
    """
    about = "Gaps are losses minus that of the incumbent, in nats, on the same seeds and sequences."
    rows = [(decision.stage, [decision]) for decision in results.whole_of(TuneDecision)]
    groups: dict[str, dict[tuple[str, float | None], list[TuneTrial]]] = {}
    for trial in results.whole_of(TuneTrial):
        groups.setdefault(trial.set, {}).setdefault((trial.variant, trial.lr), []).append(trial)
    grids = [grid_of(DECISIONS, rows, "stage", "Decisions, in their order", about)]
    for found in groups.values():
        losses = [(name, group) for (name, _), group in found.items()]
        grids.append(grid_of(LOSSES, losses, "configuration", caption_of(results, losses[0][1][0])))
    return grids
