"""The terminal's answer to ``probe activations``."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from lora_diag.records.names import module_type_of, place_of
from lora_diag.records.probe import Activations, LayerInput
from lora_diag.rendering.columns import Column, Grid, title_of
from lora_diag.rendering.statements import Statement, say
from lora_diag.rendering.tables import grids_table
from lora_diag.rendering.text import count, number, safe, short


def activations_table(
    recorded: Activations, width: int = 80, color: bool = False, per: str = "type", then: str | None = None
) -> str:
    """Return what was recorded, one row a module ``type`` (medians) or one a ``layer``, and a summary."""
    groups: dict[str, list[LayerInput]] = {}
    for item in sorted(recorded.layers, key=lambda item: place_of(item.layer)) if per == "type" else recorded.layers:
        groups.setdefault(module_type_of(item.layer) if per == "type" else item.layer, []).append(item)
    rows = list(groups.values())
    columns = [
        Column("n", tuple(str(len(row)) for row in rows)),
        Column("in", tuple("/".join(sorted({str(item.size) for item in row}, key=int)) for row in rows)),
        Column("E‖x‖²", tuple(number(median(item.square for item in row)) for row in rows)),
        Column("directions", tuple(number(median(item.directions for item in row)) for row in rows)),
    ]
    names, shown = tuple(short(name) for name in groups), tuple(columns if per == "type" else columns[1:])
    return grids_table([Grid("", title_of(per), names, shown)], activations_lines(recorded), width, color, then)


def activations_lines(recorded: Activations) -> list[Statement]:
    """Return the summary: of what model and text, what was recorded, and what was left out."""
    sums = sum(item.shares is None for item in recorded.layers)
    few = [item for item in recorded.layers if item.rows < item.size]
    found = [
        say("model", "Model", safe(recorded.model)),
        say("text", "Text", *map(safe, (f"{recorded.text} ({recorded.about})", *recorded.notes))),
        say(
            "recorded",
            "Recorded",
            f"{safe(recorded.path)}: C = E[xxᵀ] of {len(recorded.layers)} layers over {count(recorded.tokens)} tokens; "
            f"{sums} of them are given an input of their own, the others share one",
        ),
    ]
    if recorded.gradients:
        whose = {"data": "the text's own labels", "model": "labels drawn from the model"}[recorded.gradients]
        gradients = f"G = E[ggᵀ] of the loss's gradient by each output is in it, too; {whose}"
        found.append(say("gradients", "Gradients", gradients))
    if few:
        found.append(say("few_inputs", "Warning", _too_few(few), level="warning"))
    reading = "directions = tr(C)²/‖C‖_F²: few where a mean or an outlier makes up most of ‖x‖²"
    found.append(say("interpretation", "Interpretation", reading))
    by_reason: dict[str, list[str]] = {}
    for layer, why in recorded.left_out.items():
        by_reason.setdefault(why, []).append(layer)
    parts = [f"{len(layers)} {why}: {_named(layers)}" for why, layers in by_reason.items()]
    return [*found, say("left_out", "Left out", "; ".join(parts) or "nothing")]


def _too_few(few: Sequence[LayerInput]) -> str:
    worst = min(few, key=lambda item: item.rows / item.size)
    return (
        f"{len(few)} layers saw fewer inputs than an input has numbers, such as {short(worst.layer)} with {worst.rows} "
        f"of {worst.size}: C is singular there, and directions it never saw count for nothing; give more text"
    )


def _named(layers: Sequence[str]) -> str:
    return ", ".join(short(layer) for layer in layers[:3]) + (f" and {len(layers) - 3} more" if layers[3:] else "")
