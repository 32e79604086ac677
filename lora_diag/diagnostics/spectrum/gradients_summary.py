"""Statements of a summary for the spectrum of gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.rendering.statements import Statement, make_statement
from lora_diag.rendering.text import number


def gradient_lines(records: Sequence[Spectrum]) -> list[Statement]:
    """State which gradients were stacked, and how far their spectrum predicts that of an update.

    Args:
        records: The records of the judged layers, each with its stack.
    """
    steps = sorted({step for record in records if record.stack for step in record.stack.steps})
    span = f"steps {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"
    total = math.hypot(*(record.fro for record in records))
    text = f"{len(steps)} of {span}, stacked; √Σ‖G‖² = {number(total)} over {len(records)} matrices"
    known = _pair_ranks(records)
    shown_rank, other_rank = (median(rank) for rank in zip(*known, strict=True)) if known else (0, 0)
    if shown_rank:
        suffix = "" if len(known) == len(records) else f", in the {len(known)} layers small enough for both"
        text += (
            f"; r@90% on each layer's smaller side, which is shown, {shown_rank:g} at the median, "
            f"on the other {other_rank:g}{suffix}"
        )
    return [
        make_statement("gradients", "Gradients", text),
        make_statement(
            "interpretation",
            "Interpretation",
            "gradients rank the layers approximately as the update does, but have a lower rank than the update: "
            "compare layers by these numbers, do not derive a rank from them",
        ),
    ]


def _pair_ranks(records: Sequence[Spectrum]) -> list[tuple[int, int]]:
    """Return the ranks at 90% on both sides, for layers with both."""
    pairs = [
        (record.rank_at["0.9"], record.stack.other_rank_at["0.9"])
        for record in records
        if record.stack and record.stack.other_rank_at
    ]
    return [(rank, other_rank) for rank, other_rank in pairs if rank is not None and other_rank is not None]
