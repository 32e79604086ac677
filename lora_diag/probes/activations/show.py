"""Terminal output of ``probe activations``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from lora_diag.records.probe import Activations, LayerInput
from lora_diag.rendering.statements import Statement, make_statement
from lora_diag.rendering.tables import grid_of, grids_table, rows_of
from lora_diag.rendering.text import count, list_names, safe, short


def activations_table(
    recorded: Activations,
    width: int = 80,
    color: bool = False,
    per: str = "type",
    next_command: str | None = None,
) -> str:
    """Return the table of recorded layers, one row per module ``type`` (medians) or ``layer``, and
    the statements.
    """
    rows = rows_of(recorded.layers, per)
    return grids_table(
        [grid_of(LayerInput.shown, rows, per)],
        activations_lines(recorded),
        width,
        color,
        next_command,
    )


def suggest_next(recorded: Activations, values: Mapping[str, Any]) -> str:
    """Return the next step: singular values in the recorded metric."""
    kfac = " --kfac" if values["output_gradients"] else ""
    return f"loradiag spectrum BASE TUNED --activations {shlex.quote(str(values['output']))}{kfac}"


def activations_lines(recorded: Activations) -> list[Statement]:
    """Return the statements: text, recorded layers, layers with too few inputs, skipped layers."""
    distinct = sum(layer_input.shares is None for layer_input in recorded.layers)
    contents = (
        f"{safe(recorded.path)}: C = E[xxᵀ] of {len(recorded.layers)} layers over "
        f"{count(recorded.tokens)} tokens; {distinct} of them have inputs of their own, the others "
        "share inputs"
    )
    if recorded.gradients:
        contents += "; also G = E[ggᵀ] of output gradients"
    by_reason: dict[str, list[str]] = {}
    for layer, why in recorded.left_out.items():
        by_reason.setdefault(why, []).append(layer)
    skipped = [f"{len(layers)} {why}: {list_names(layers)}" for why, layers in by_reason.items()]
    text = safe(f"{recorded.text} ({recorded.about})")
    few = _describe_too_few_inputs(recorded.layers)
    statements = [
        make_statement("text", "Text", text, *map(safe, recorded.notes)),
        make_statement("recorded", "Recorded", contents),
        make_statement("few_inputs", "Warning", few, level="warning"),
        make_statement("left_out", "Left out", "; ".join(skipped)),
    ]
    return [statement for statement in statements if statement.lead]


def _describe_too_few_inputs(recorded: Sequence[LayerInput]) -> str:
    layers = [layer_input for layer_input in recorded if layer_input.rows < layer_input.size]
    if not layers:
        return ""
    worst = min(layers, key=lambda layer_input: layer_input.rows / layer_input.size)
    return (
        f"{len(layers)} layers have fewer inputs than input dimensions, for example "
        f"{short(worst.layer)} with {worst.rows} of {worst.size}: C is singular there, and "
        "directions without inputs have weight 0; use more text"
    )
