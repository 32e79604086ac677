"""Terminal output of ``merge``, and the model card of its output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_diag.decisions.merge import METHODS
from lora_diag.decisions.merge.record import (
    COLLISION,
    Merged,
    MergedLoss,
    pooled_epsilon,
    pooled_kept,
    select_layers,
)
from lora_diag.feature import Hint
from lora_diag.metrics.statistics import paired_difference, paired_half
from lora_diag.records import Results
from lora_diag.records.probe import set_names
from lora_diag.rendering.html import code_span, model_card
from lora_diag.rendering.statements import (
    Statement,
    left_out,
    left_out_level,
    make_statement,
    short_paths,
    summarize,
)
from lora_diag.rendering.tables import Grid, grid_of, rows_of
from lora_diag.rendering.text import (
    count,
    list_layers,
    list_names,
    number,
    percent,
    quantity,
    safe,
    short,
    span,
    with_limits,
)

# What a table of losses does not repeat of the models that others are compared with.
_OWN: dict[str, dict[str, Any]] = {
    "base": {"change": None, "kept": None},
    "alone": {"gap": None, "kept": None},
}

# Columns that say nothing of a single update.
_COMPARING = {"kept_random", "kept_mean", "others", "directions", "sign_conflict"}

# Largest error of an output that counts as the merge itself: factors in float32 have about 1e-7.
EXACT = 1e-5


def suggest_next(results: Results[Merged], values: Mapping[str, Any]) -> Hint | None:
    """Return the next step: the check of one merged update, or the loss of several, or their merge
    into BASE.
    """
    updates = values["updates"]
    if values["full"] and len(updates) == 1 and values["scale"] in (None, 1.0):
        return Hint("verify-merge {base} {updates} {output}", "checks every entry")
    if not results.whole_of(MergedLoss):
        return Hint("probe outputs {base} {output} --eval held_out.txt", "the loss, once per task")
    if values["full"]:
        return None
    return Hint("merge {base} {output} --checkpoint -o served/", "adds it to BASE")


def group_updates(results: Results[Merged]) -> list[tuple[str, list[Merged]]]:
    """Return the short name and the records of each update, in the order of the inputs."""
    paths = [item.path for item in results.run.inputs if item.role not in {"base", "eval"}]
    by_path: dict[str, list[Merged]] = {path: [] for path in paths}
    for record in results:
        by_path.setdefault(record.update, []).append(record)
    return [(name, by_path[path]) for name, path in zip(short_paths(paths), paths, strict=True)]


def merge_grids(results: Results[Merged], per: str = "type") -> list[Grid]:
    """Return the tables: one row per update; and one of each update by module type or layer, as
    details.
    """
    updates = [(name, records) for name, records in group_updates(results) if records]
    if not updates:
        return []
    shown, caption = Merged.shown, "updates in the merge"
    if is_single(results):
        shown = tuple(column for column in shown if column.path not in _COMPARING)
        caption = "the update in the output"
    layers = [grid_of(shown, rows_of(records, per), per, name) for name, records in updates]
    whole = replace(grid_of(shown, updates, "type", caption), title="update")
    return [*_make_loss_grids(results), whole, *(layers if per == "layer" else [])]


def is_single(results: Results[Merged]) -> bool:
    """Return whether the run had one update, so that M = t·ΔW."""
    return len(group_updates(results)) == 1


def describe_merge(results: Results[Merged], quote: Callable[[str], str] = str) -> str:
    """Return what M is: the method, or of a single update its strength t and its name, which
    ``quote`` formats.
    """
    settings, updates = results.run.settings, group_updates(results)
    if not is_single(results):
        scale = f", λ = {number(settings['scale'])}" if settings["scale"] != 1 else ""
        return f"{METHODS[settings['method']].title} of {len(updates)} updates{scale}"
    strength = settings["scale"] * settings["weights"][0]
    factor = f"{number(strength)}·" if strength != 1 else ""
    return f"{factor}ΔW of {quote(updates[0][0])}"


def compute_length(results: Results[Merged]) -> tuple[float, str]:
    """Return ‖M‖ over the norm of the longest update, over all layers, and the name of
    that update.
    """
    longest = max(
        (
            (math.hypot(*(record.fro for record in records)), name)
            for name, records in group_updates(results)
        ),
        default=(0.0, ""),
    )
    whole = math.hypot(*(record.merged_fro for record in select_layers(results.layers)))
    return (whole / longest[0] if longest[0] else 0.0), longest[1]


def merge_lines(results: Results[Merged], output: Path | str | None = None) -> list[Statement]:
    """Return the statements of the summary.

    Args:
        results: The records.
        output: Folder of the merge; None to leave out its name.
    """
    skipped = replace(left_out(results), level=left_out_level(results, "rank_0"))
    if not len(results):
        return summarize(results, skipped=skipped)
    return summarize(
        results,
        _describe_written(results, output),
        *_describe_choice(results),
        _describe_error(results),
        *([] if is_single(results) else _compare_updates(results)),
        _describe_lost(results),
        skipped=skipped,
    )


def _compare_updates(results: Results[Merged]) -> list[Statement]:
    """State what several updates keep of each other."""
    return [_describe_kept(results), _describe_length(results), _describe_collisions(results)]


def _describe_written(results: Results[Merged], output: Path | str | None) -> Statement:
    """State the method, the inputs, and what was written."""
    settings, layers = results.run.settings, select_layers(results.layers)
    what = "" if output is None else f"{safe(str(output))}: "
    what += describe_merge(results)
    dtypes = "".join(
        f", {dtype}" for dtype in sorted({record.dtype for record in layers}) if dtype != "float32"
    )
    if settings["full"]:
        text = f"{what} in {quantity(len(layers), 'tensor')} of a checkpoint{dtypes}"
    else:
        written = [record for record in layers if record.rank]
        params = count(sum(record.params or 0 for record in written))
        ranks = span(record.rank or 0 for record in written)
        text = f"{what}, {quantity(len(written))}, rank {ranks}, {params} parameters{dtypes}"
    zero = [record for record in layers if record.merged_fro == 0]
    if not zero:
        return make_statement("wrote", "Written", text, level="note", priority=0)
    trimmed = settings["density"] is not None and settings["density"] < 1
    why = "no entry is kept" if trimmed else "the updates cancel"
    warning = f"{why} in {quantity(len(zero))}, where the merge is BASE: {list_layers(zero)}"
    return make_statement("wrote", "Written", text, warning, level="warning", priority=0)


def _find_losses(results: Results[Merged]) -> dict[tuple[str, float | None], list[MergedLoss]]:
    """Return the losses of each model, by method and λ, in the order of the texts."""
    by_model: dict[tuple[str, float | None], list[MergedLoss]] = {}
    for record in results.whole_of(MergedLoss):
        by_model.setdefault((record.method, record.scale), []).append(record)
    return by_model


def name_model(method: str, scale: float | None) -> str:
    """Return the label of a model by the method and λ of its records."""
    if scale is None:
        return {"base": "BASE", "alone": "update alone"}[method]
    return method if scale == 1 else f"{method} λ={scale:g}"


def _make_loss_grids(results: Results[Merged]) -> list[Grid]:
    """Return a table of losses for each text: one row per model."""
    by_model, grids = _find_losses(results), []
    for name in set_names(results.whole_of(MergedLoss)):
        rows = [
            (
                name_model(*model) + (" *" if record.chosen else ""),
                [record.model_copy(update=_OWN.get(model[0], {}))],
            )
            for model, group in by_model.items()
            for record in group
            if record.set == name
        ]
        grids.append(
            grid_of(
                MergedLoss.shown, rows, "model", f"held-out loss on {short(name)}; * was written"
            )
        )
    return grids


def _describe_choice(results: Results[Merged]) -> Iterator[Statement]:
    """State the chosen merge and its rise above the updates alone, and which merges are worse than
    it or than BASE.
    """
    by_model = _find_losses(results)
    model, group = next(
        ((model, group) for model, group in by_model.items() if group[0].chosen), (None, [])
    )
    if model is None:
        return
    text = name_model(*model)
    if gaps := [record for record in group if record.gap is not None]:
        worst = max(gaps, key=lambda record: record.gap or 0.0)
        rise = with_limits(
            worst.gap or 0.0, paired_half(worst.gap_error, len(worst.nll) - worst.skipped)
        )
        kept = "" if worst.kept is None else f", {percent(worst.kept)} of its gain"
        text += (
            f": the worst task is {short(worst.set)}, {rise} compared with its update alone{kept}"
        )
    counts = [record.predictions for record in by_model["base", None]]
    merges = {
        name_model(*each): records for each, records in by_model.items() if each[1] is not None
    }
    alike = [
        name
        for name, each in merges.items()
        if each is not group and not _is_worse(each, group, counts)
    ]
    tied = (
        f"; not significantly worse on any text: {list_names(alike, len(METHODS))}" if alike else ""
    )
    how = (
        "chosen by the first half of each text; the losses are of the second"
        if group[0].skipped
        else ""
    )
    yield make_statement("loss", "Loss", text + tied, how, priority=0)
    for key, label, is_chosen in (
        ("worse", "Worse than BASE", True),
        ("worse_others", "Others", False),
    ):
        named, changes = list[str](), list[str]()
        for name, records in merges.items():
            halves = [(r, paired_half(r.change_error, len(r.nll) - r.skipped)) for r in records]
            worse = [
                (r, r.change, half)
                for r, half in halves
                if half is not None and r.change and r.change > half
            ]
            if worse and records[0].chosen == is_chosen:
                named.append(f"{name} on {' and '.join(short(r.set) for r, *_ in worse)}")
                changes += [
                    f"{name} on {short(r.set)}: {with_limits(change, half)}"
                    for r, change, half in worse
                ]
        lead = f"{'' if is_chosen else 'worse than BASE: '}{'; '.join(named)}" if named else ""
        yield make_statement(
            key, label, lead, *changes, level="warning" if is_chosen else "note", priority=0
        )


def _is_worse(
    records: Sequence[MergedLoss], chosen: Sequence[MergedLoss], counts: Sequence[Sequence[int]]
) -> bool:
    """Return whether a merge is significantly worse than the chosen one on any text, or has no
    finite loss.
    """
    for own, best, of_set in zip(records, chosen, counts, strict=True):
        if not own.nll:
            return True
        rest = slice(own.skipped, None)
        gap, error = paired_difference(own.nll[rest], best.nll[rest], of_set[rest])
        half = paired_half(error, len(of_set[rest]))
        if half is not None and gap > half:
            return True
    return False


def _describe_error(results: Results[Merged]) -> Statement:
    """State the error of the written factors."""
    epsilon, least = pooled_epsilon(results.layers), pooled_epsilon(results.layers, "epsilon_min")
    if epsilon is None or least is None:
        return make_statement("error", "Error", "")
    if epsilon < EXACT:
        return make_statement(
            "error", "Error", f"none: the factors are the merge (ε = {number(epsilon)})", priority=2
        )
    text = (
        f"ε = {number(epsilon)} = ‖M − written‖/‖M‖: {percent(1 - epsilon**2)} of ‖M‖² is written"
    )
    least_text = f"; the best of these ranks has {number(least)}" if epsilon > 1.01 * least else ""
    return make_statement(
        "error", "Error", text + least_text, level="warning" if epsilon > 0.5 else "note"
    )


def _describe_kept(results: Results[Merged]) -> Statement:
    """State what the updates keep, with random updates and the mean as references."""
    groups = [(name, records) for name, records in group_updates(results) if records]
    pooled = [(name, pooled_kept(records, "kept")) for name, records in groups]
    kept = sorted((value, name) for name, value in pooled if value is not None)
    ends = dict.fromkeys(f"{_decimal(value)} ({name})" for value, name in (kept[0], kept[-1]))
    text = f"{' to '.join(ends)} of each update"
    for label, field in (("chance", "kept_random"), ("mean", "kept_mean")):
        values = [
            value for _, records in groups if (value := pooled_kept(records, field)) is not None
        ]
        if values and (field == "kept_random" or results.run.settings["method"] != "mean"):
            ends = dict.fromkeys((_decimal(min(values)), _decimal(max(values))))
            text += f"; {label} {' to '.join(ends)}"
    reversed_names = [name for value, name in kept if value < 0]
    warning = f"reversed by the others: {', '.join(reversed_names)}" if reversed_names else ""
    details = f"⟨M, ΔW⟩/‖ΔW‖²: {', '.join(f'{name} {number(value)}' for value, name in kept)}"
    return make_statement(
        "kept", "Kept", text, warning, details, level="warning" if warning else "note", priority=0
    )


def _describe_length(results: Results[Merged]) -> Statement:
    """State the norm of the merge; warn where it exceeds that of any update by more than √K."""
    ratio, name = compute_length(results)
    limit = math.sqrt(len(group_updates(results)))
    text = f"‖M‖ is {_decimal(ratio)} times the longest update ({name})"
    if ratio > limit:
        text += (
            f", more than √K = {number(limit)}: the updates reinforce each other; lower "
            "--scale, or use mean"
        )
    return make_statement("length", "Length", text, level="warning" if ratio > limit else "note")


def _describe_collisions(results: Results[Merged]) -> Statement:
    """State the layers in which the other updates remove part of an update."""
    low = sorted(
        (record for record in results if record.collides), key=lambda record: record.others or 0.0
    )
    if not low:
        text = (
            f"none: in no layer do the other updates remove more than {percent(COLLISION)} of one"
        )
        return make_statement("collisions", "Collisions", text)
    names = {records[0].update: name for name, records in group_updates(results) if records}
    worst = [f"{short(r.layer)} ({names[r.update]} {percent(-(r.others or 0.0))})" for r in low[:3]]
    layers = f"{len({r.layer for r in low})} of {quantity(len(select_layers(results.layers)))}"
    text = f"in {layers} the others remove up to {percent(-(low[0].others or 0.0))} of an update"
    return make_statement("collisions", "Collisions", text, f"most in {', '.join(worst)}")


def _describe_lost(results: Results[Merged]) -> Statement:
    """Warn of changed 1-D tensors that an adapter does not hold."""
    lost = [item.layer for item in results.left_out if item.reason == "vector" and item.fro]
    text = (
        f"{quantity(len(lost), 'changed 1-D tensor')}: {list_names(lost)}; --checkpoint holds them"
        if lost
        else ""
    )
    return make_statement("lost", "Not included", text, level="warning")


def _decimal(value: float) -> str:
    """Return a factor with two decimals."""
    return f"{value:.2f}"


def merge_card(results: Results[Merged], base_name: str, command: str) -> str:
    """Return the ``README.md`` of the folder.

    Args:
        results: The records.
        base_name: The base model.
        command: The command that wrote it.
    """
    settings = results.run.settings
    method = METHODS[settings["method"]]
    is_adapter = not settings["full"]
    kind = "LoRA adapter" if is_adapter else "Checkpoint"
    title = f"{kind} merged with {method.title}"
    source = (
        f"{method.title} ({method.source}) of updates of {code_span(base_name)}. Evaluate it "
        "on every task"
    )
    if is_single(results):
        title = f"{kind} of a single update"
        source = (
            f"{describe_merge(results, code_span)}, an update of {code_span(base_name)}. "
            "Evaluate it"
        )
    table = ["| update | weight | kept | norm |", "|---|---:|---:|---:|"]
    for name, records in group_updates(results):
        if records:
            kept = pooled_kept(records, "kept")
            norm = math.hypot(*(record.fro for record in records))
            cells = [
                number(records[0].weight),
                "" if kept is None else _decimal(kept),
                number(norm),
            ]
            table.append(f"| {code_span(name)} | {' | '.join(cells)} |")
    epsilon = pooled_epsilon(results.layers)
    body = [
        f"{source}: numbers of weights do not say what a merge does to the loss.",
        "\n".join(table),
        "`kept` is ⟨M, ΔW⟩/‖ΔW‖², the factor with which an update is in the merge.",
        f"The factors have a distance of ε = {number(epsilon)} from the merge, relative to its "
        "norm."
        if epsilon
        else "",
    ]
    return model_card(
        title,
        base_name,
        [part for part in body if part],
        "merge.jsonl",
        results.run.version,
        command,
        "peft" if is_adapter and settings.get("format", "peft") == "peft" else "",
        is_adapter,
    )
