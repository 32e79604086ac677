"""Terminal output of ``probe intrinsic``: gain of each size, and the smallest sufficient one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_diag.probes.intrinsic.lines import Line, Reached, lines, reached
from lora_diag.probes.intrinsic.record import Intrinsic
from lora_diag.records import Results
from lora_diag.records.probe import set_names
from lora_diag.rendering.columns import Grid
from lora_diag.rendering.losses import beyond_grid, on_set, probe_summary
from lora_diag.rendering.statements import Statement, make_statement
from lora_diag.rendering.tables import Rows, grid_of
from lora_diag.rendering.text import count, number, percent, short


def intrinsic_lines(results: Results[Any]) -> list[Statement]:
    """Return the statements: for each set, the smallest subspace and LoRA with nearly the full gain."""
    records, settings = results.whole_of(Intrinsic), results.run.settings
    sets = set_names(records)
    statements = [make_statement("trained", "Trained", _describe_training(settings))]
    for name in sets:
        rows = lines(records, name, sets[0], settings["seed"])
        statements.append(_describe_set(name, _find_base(records, name), rows, settings))
    if sets:
        rows = lines(records, sets[0], sets[0], settings["seed"])
        statements.append(make_statement("rates", "Rates", _describe_rates(rows, records, settings)))
    return probe_summary(results, *statements, reading=_READING)


def intrinsic_grids(results: Results[Any], per: str = "type") -> list[Grid]:
    """Return a table per set, one row per size."""
    records, settings = results.whole_of(Intrinsic), results.run.settings
    sets = set_names(records)
    grids = []
    for name in sets:
        shifted = " (shifted)" if any(r.shifted for r in records if r.set == name) else ""
        rows = lines(records, name, sets[0], settings["seed"])
        grids.append(_make_grid(f"On {short(name)}{shifted}", _find_base(records, name), rows, settings["share"]))
    return grids


def _find_base(records: Sequence[Intrinsic], name: str) -> Intrinsic | None:
    return next((r for r in records if r.subject == "base" and r.set == name), None)


_READING = (
    "the dimension is for this task, number of steps and fraction; more steps can give another; rates were chosen "
    "on the first set, so losses there are slightly too low; LoRA trains no embeddings, norms, biases or head, "
    "full fine-tuning and subspaces train all"
)


def _name(line: Line) -> str:
    return {"full": "full", "subspace": f"d={line.size}", "lora": f"LoRA r={line.size}"}[line.subject]


def _make_grid(caption: str, base: Intrinsic | None, all_rows: Sequence[Line], share: float) -> Grid:
    about = (
        "Gain is the decrease of the loss as a fraction of full fine-tuning's, mean over seeds. The intrinsic "
        f"dimension is the smallest d with a gain of at least {percent(share)}, and LoRA needs the smallest such r. "
        "If min to max includes that fraction, the result depends on the seed."
    )
    rows: Rows = [("BASE", [{"loss": base and base.loss}]), *((_name(line), [line]) for line in all_rows)]
    return grid_of(Line.shown, rows, "trained", caption, about)


def _describe_training(settings: dict[str, Any]) -> str:
    scales = f", one scale per layer, {settings['scale_step']:.0%} per step" if settings["method"] == "said" else ""
    return (
        f"all {count(settings['params'])} parameters, or z in random subspaces of them (Fastfood, {settings['method']}"
        f"{scales}), or LoRA on all linear layers but the head, alpha = 2r; {settings['steps']} steps of "
        f"{settings['batch']} sequences; {settings['optimizer']}"
    )


def _describe_set(name: str, base: Intrinsic | None, all_rows: Sequence[Line], settings: dict[str, Any]) -> Statement:
    full = next((line for line in all_rows if line.subject == "full"), None)
    if base is None or base.loss is None:
        return on_set(name, "not measured yet")
    if full is None:
        return on_set(name, "no run of full fine-tuning is finished with a finite loss")
    gain = base.loss - full.loss
    if gain <= 0:
        worse = f"no gain: full fine-tuning is worse than BASE by {number(-gain)} nats, so there is no gain to reach"
        return on_set(name, worse)
    share = settings["share"]
    lines = [f"full fine-tuning gains {number(gain)} nats; the target is {percent(share)} of that"]
    if full.edge:
        lines.append("its rate is at the edge of --full-lr, so it may gain more, and every fraction would be smaller")
    if any(line.shares and line.share > 1 for line in all_rows if line.subject != "full"):
        lines.append("some runs gain more, so it is not an upper limit with these steps and rates")
    lines.append(answer := _describe_answer(reached(all_rows, "subspace", share), "d", settings))
    if settings["ranks"]:
        lines.append(_describe_answer(reached(all_rows, "lora", share), "LoRA r", settings))
    return on_set(name, *lines, answer=answer)


def _describe_answer(answer: Reached, symbol: str, settings: dict[str, Any]) -> str:
    line, below = answer.line, answer.below
    if line is None:
        if below is None:
            return f"{symbol}: no run is finished with a finite loss"
        requested = settings["dims"] if symbol == "d" else settings["ranks"]
        return (
            f"{symbol}: not reached up to {symbol.split()[-1]}={max(requested)}, whose gain is {_format_shares(below)}"
        )
    text = f"{symbol}={line.size} is the smallest that reaches it, with {_format_shares(line)}"
    if symbol != "d":
        text += f" and {count(line.params)} parameters"
    if below is not None:
        text += f"; {symbol}={below.size} gains {_format_shares(below)}"
    if len(line.shares) > 1 and not answer.certain:
        text += "; not with every seed, so the next larger size is safer"
    if answer.missed:
        missed = ", ".join(map(str, answer.missed))
        text += f"; not reached at {missed}, so seeds or rates matter here, not only size"
    return text


def _format_shares(line: Line) -> str:
    spread = f" ({min(line.shares):.0%} to {max(line.shares):.0%} over seeds)" if len(line.shares) > 1 else ""
    return f"{line.share:.0%}{spread}"


# Setting and option of the learning rates of each subject.
_GRIDS = (("full", "full_rates", "--full-lr"), ("subspace", "paces", "--lr"), ("lora", "lora_rates", "--lora-lr"))


def _describe_rates(all_rows: Sequence[Line], records: Sequence[Intrinsic], settings: dict[str, Any]) -> str:
    lines = ["each size at the rate with the lowest loss of the first seed; pace is z's rate times √(d/D)"]
    for subject, grid, option in _GRIDS:
        tried = {r.lr if subject == "lora" else r.pace for r in records if r.subject == subject}
        lines += beyond_grid(tried, settings.get(grid), option)
    if edge := [_name(line) for line in all_rows if line.edge]:
        lines.append(f"at the edge of the rates tried for {', '.join(edge)}; extend --lr, --full-lr or --lora-lr")
    if any(len({r.lr for r in records if r.subject == s}) == 1 for s in ("full", "lora")):
        lines.append("only one rate was tried for full fine-tuning or LoRA; it may be far from the best")
    diverged = sum(record.loss is None for record in records)
    return "\n".join([*lines, *([f"{diverged} losses are not finite: those runs diverged"] if diverged else [])])
