"""Terminal output of ``merge``, and the model card of its output."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
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
from lora_diag.rendering.losses import caption_of, describe_few
from lora_diag.rendering.statements import (
    Level,
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


def suggest_next(results: Results[Merged], values: Mapping[str, Any]) -> Hint | str | None:
    """Return the next step: the check of one merged update, or the loss of several, or their merge
    into BASE.
    """
    updates = values["updates"]
    if values["checkpoint"] and len(updates) == 1 and values["scale"] in (None, 1.0):
        return Hint("verify-merge {base} {updates} {output}", "checks every entry")
    if not results.whole_of(MergedLoss):
        return Hint("probe outputs {base} {output} --eval held_out.txt", "the loss, once per task")
    if values["checkpoint"]:
        return None
    # What chose this merge, such as --method and --eval, is not of the next one.
    words = ["loradiag", "merge", values["base"], values["output"], "--checkpoint", "-o", "served/"]
    return f"{shlex.join(map(str, words))}   (adds it to BASE)"


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
    grids = _make_loss_grids(results)
    grids.append(replace(grid_of(shown, updates, "type", caption), title="update"))
    if per == "layer":
        grids += [grid_of(shown, rows_of(records, per), per, name) for name, records in updates]
    return grids


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
    findings = [
        describe_few(results),
        _describe_written(results, output),
        *_describe_losses(results),
        _describe_error(results),
    ]
    if not is_single(results):
        findings += [
            _describe_kept(results),
            _describe_length(results),
            _describe_collisions(results),
        ]
    return summarize(results, *findings, _describe_lost(results), skipped=skipped)


def _describe_written(results: Results[Merged], output: Path | str | None) -> Statement:
    """State the method, the inputs, and what was written."""
    settings, layers = results.run.settings, select_layers(results.layers)
    what = "" if output is None else f"{safe(str(output))}: "
    what += describe_merge(results)
    other_dtypes = sorted({record.dtype for record in layers} - {"float32"})
    dtypes = "".join(f", {dtype}" for dtype in other_dtypes)
    if settings["checkpoint"]:
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
    losses = [record for group in _find_losses(results).values() for record in group]
    grids = []
    for name in set_names(results.whole_of(MergedLoss)):
        rows = []
        for record in losses:
            if record.set == name:
                model = name_model(record.method, record.scale)
                own = record.model_copy(update=_OWN.get(record.method, {}))
                rows.append((f"{model} *" if record.chosen else model, [own]))
        first = next(record for record in losses if record.set == name)
        caption = f"{caption_of(results, first)}; * was written"
        grids.append(grid_of(MergedLoss.shown, rows, "model", caption))
    return grids


def _describe_losses(results: Results[Merged]) -> list[Statement]:
    """State the chosen merge and its rise above the updates alone, and which merges are worse than
    it or than BASE; nothing without losses.
    """
    by_model = _find_losses(results)
    merges = {
        name_model(*model): group for model, group in by_model.items() if model[1] is not None
    }
    chosen = {name: group for name, group in merges.items() if group[0].chosen}
    if not chosen:
        return []
    others = {name: group for name, group in merges.items() if name not in chosen}
    counts = [record.predictions for record in by_model["base", None]]
    [(name, best)] = chosen.items()
    alike = [
        other for other, group in others.items() if not _is_worse(group, best, counts, len(others))
    ]
    text = f"{name}{_describe_rise(best)}"
    if alike:
        text += f"; not significantly worse on any text: {list_names(alike, len(METHODS))}"
    how = ""
    if best[0].skipped:
        how = "chosen by the first half of each text; the losses are of the second"
    worse, changes = _find_worse_than_base(chosen)
    worse_others, changes_of_others = _find_worse_than_base(others)
    rest = f"worse than BASE: {'; '.join(worse_others)}" if worse_others else ""
    return [
        make_statement("loss", "Loss", text, how, priority=0),
        make_statement(
            "worse", "Worse than BASE", "; ".join(worse), *changes, level="warning", priority=0
        ),
        make_statement("worse_others", "Others", rest, *changes_of_others, priority=0),
    ]


def _describe_rise(group: Sequence[MergedLoss]) -> str:
    """Return the rise of a merge's loss above the update alone on its worst task; empty without
    tasks.
    """
    gaps = [record for record in group if record.gap is not None]
    if not gaps:
        return ""
    worst = max(gaps, key=lambda record: record.gap or 0.0)
    half = paired_half(worst.gap_error, worst.count)
    rise = with_limits(worst.gap or 0.0, half)
    text = f": the worst task is {short(worst.set)}, {rise} compared with its update alone"
    return text if worst.kept is None else f"{text}, {percent(worst.kept)} of its gain"


def _find_worse_than_base(
    merges: Mapping[str, Sequence[MergedLoss]],
) -> tuple[list[str], list[str]]:
    """Return the merges that are significantly worse than BASE on a text, each with these texts,
    and the changes of the loss there.
    """
    named, changes = [], []
    for name, records in merges.items():
        texts = []
        for record in records:
            half = paired_half(record.change_error, record.count)
            if half is not None and record.change and record.change > half:
                texts.append(short(record.set))
                changes.append(f"{name} on {texts[-1]}: {with_limits(record.change, half)}")
        if texts:
            named.append(f"{name} on {' and '.join(texts)}")
    return named, changes


def _is_worse(
    records: Sequence[MergedLoss],
    chosen: Sequence[MergedLoss],
    counts: Sequence[Sequence[int]],
    others: int,
) -> bool:
    """Return whether a merge, one of several others, is significantly worse than the chosen one on
    any text, or has no finite loss.
    """
    for own, best, of_set in zip(records, chosen, counts, strict=True):
        if not own.nll:
            return True
        rest = slice(own.skipped, None)
        gap, error = paired_difference(own.nll[rest], best.nll[rest], of_set[rest])
        half = paired_half(error, len(of_set[rest]), others)
        if half is not None and gap > half:
            return True
    return False


def _describe_error(results: Results[Merged]) -> Statement:
    """State the error of the written factors, or of the rounding of a checkpoint, as ``plan-merge``
    predicts it.
    """
    epsilon, least = pooled_epsilon(results.layers), pooled_epsilon(results.layers, "epsilon_min")
    if epsilon is None:
        return make_statement("error", "Error", "")
    error = f"ε = {number(epsilon)}"
    if epsilon < EXACT:
        text = f"none: what is written is the merge ({error})"
        return make_statement("error", "Error", text, priority=2)
    level: Level = "warning" if epsilon > 0.5 else "note"
    text = f"{error} = ‖M − written‖/‖M‖"
    if least is None:
        text += f", by rounding to {results.layers[0].dtype}; plan-merge states it before a merge"
        return make_statement("error", "Error", text, level=level, priority=0)
    text += f": {percent(1 - epsilon**2)} of ‖M‖² is written"
    if epsilon > 1.01 * least:
        text += f"; the best of these ranks has {number(least)}"
    return make_statement("error", "Error", text, level=level)


def _describe_kept(results: Results[Merged]) -> Statement:
    """State what the updates keep, with random updates and the mean as references."""
    groups = [(name, records) for name, records in group_updates(results) if records]
    pooled = [(name, pooled_kept(records, "kept")) for name, records in groups]
    kept = sorted((value, name) for name, value in pooled if value is not None)
    ends = dict.fromkeys(f"{_decimal(value)} ({name})" for value, name in (kept[0], kept[-1]))
    text = f"{' to '.join(ends)} of each update"
    references = {"chance": "kept_random", "mean": "kept_mean"}
    if results.run.settings["method"] == "mean":
        del references["mean"]
    for label, field in references.items():
        pooled_references = [pooled_kept(records, field) for _, records in groups]
        values = [value for value in pooled_references if value is not None]
        if values:
            ends = dict.fromkeys((_decimal(min(values)), _decimal(max(values))))
            text += f"; {label} {' to '.join(ends)}"
    by_update = ", ".join(f"{name} {number(value)}" for value, name in kept)
    details = f"⟨M, ΔW⟩/‖ΔW‖²: {by_update}"
    reversed_names = [name for value, name in kept if value < 0]
    if not reversed_names:
        return make_statement("kept", "Kept", text, details, priority=0)
    warning = f"reversed by the others: {', '.join(reversed_names)}"
    return make_statement("kept", "Kept", text, warning, details, level="warning", priority=0)


def _describe_length(results: Results[Merged]) -> Statement:
    """State the norm of the merge; warn where it exceeds that of any update by more than √K."""
    ratio, name = compute_length(results)
    limit = math.sqrt(len(group_updates(results)))
    text = f"‖M‖ is {_decimal(ratio)} times the longest update ({name})"
    if ratio <= limit:
        return make_statement("length", "Length", text)
    text += (
        f", more than √K = {number(limit)}: the updates reinforce each other; lower --scale, or "
        "use mean"
    )
    return make_statement("length", "Length", text, level="warning")


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
    if not lost:
        return make_statement("lost", "Not included")
    tensors = quantity(len(lost), "changed 1-D tensor")
    text = f"{tensors}: {list_names(lost)}; --checkpoint holds them"
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
    is_adapter = not settings["checkpoint"]
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
            weight = number(records[0].weight)
            kept = pooled_kept(records, "kept")
            in_merge = "" if kept is None else _decimal(kept)
            norm = number(math.hypot(*(record.fro for record in records)))
            table.append(f"| {code_span(name)} | {weight} | {in_merge} | {norm} |")
    body = [
        f"{source}: numbers of weights do not say what a merge does to the loss.",
        "\n".join(table),
        "`kept` is ⟨M, ΔW⟩/‖ΔW‖², the factor with which an update is in the merge.",
    ]
    if epsilon := pooled_epsilon(results.layers):
        distance = f"a distance of ε = {number(epsilon)} from the merge, relative to its norm"
        body.append(f"What is written has {distance}.")
    return model_card(
        title,
        base_name,
        body,
        "merge.jsonl",
        results.run.version,
        command,
        "peft" if is_adapter and settings.get("format", "peft") == "peft" else "",
        is_adapter,
    )
