"""Terminal output of ``rank-rules``: ranks of several rules side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from lora_diag.decisions.allocate.record import Policies
from lora_diag.records.shown import Shown
from lora_diag.rendering.columns import rows_of
from lora_diag.rendering.statements import Statement, make_statement
from lora_diag.rendering.tables import grid_of, grids_table
from lora_diag.rendering.text import short

# Maximum number of layers named in a statement.
_NAMED = 3


def policies_table(records: Sequence[Policies], width: int = 80, color: bool = False, per: str = "type") -> str:
    """Return the ranks of several rules side by side, and their disagreements.

    Args:
        records: One per layer.
        width: Columns of the terminal.
        color: Whether to use ANSI colours.
        per: ``type`` for medians over a module type, ``layer`` for one row per layer.
    """
    shown = [
        Shown("full_rank", "of", "min(out, in)", main=True, pool="range", drop=2),
        *(
            Shown(f"ranks.{rule}", rule, "rank", main=True, form=".0f", pool=_make_median(rule))
            for rule in records[0].ranks
        ),
    ]
    return grids_table([grid_of(shown, rows_of(records, per), per)], _describe_disagreements(records), width, color)


def _make_median(rule: str) -> Callable[[Sequence[Policies]], float | None]:
    """Return the function that gives the median rank by a rule; None where it cannot be applied to all records."""

    def median_of(group: Sequence[Policies]) -> float | None:
        known = [rank for record in group if (rank := record.ranks[rule]) is not None]
        return median(known) if len(known) == len(group) else None

    return median_of


def _describe_disagreements(records: Sequence[Policies]) -> list[Statement]:
    """State in how many layers the rules differ, where most, and which cannot be applied."""
    spread = {}
    for record in records:
        known = {name: rank for name, rank in record.ranks.items() if rank and name != "signal"}
        if len(known) > 1:
            low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
            spread[record.layer] = (known[high] / known[low], f"{low} {known[low]}, {high} {known[high]}")
    lines = []
    if spread:
        differing = [layer for layer, (ratio, _) in spread.items() if ratio >= 2]
        worst = sorted(spread, key=lambda layer: -spread[layer][0])[:_NAMED]
        sentences = [f"{short(layer)}: {spread[layer][1]}" for layer in worst]
        head = f"by a factor of 2 or more in {len(differing)} of {len(records)} layers; most in"
        lines.append(make_statement("disagree", "Disagreement", head, *sentences))
    if noisy := [record for record in records if _exceeds_signal(record)]:
        excess = (
            f"90% of the energy needs more than the signal rank in {len(noisy)} layers, where it includes rounding "
            "noise"
        )
        lines.append(make_statement("noise", "Noise", excess))
    meanings = [
        "energy 90%: smallest r that keeps 90% of Σσ²; knee: point of the curve C(r) farthest above its chord",
        "effective: exp of the entropy of the energy; signal: values above the rounding noise of the files, an "
        "upper limit",
        "Gavish–Donoho: values above a threshold for spectra of mostly noise, unlike those of full updates",
    ]
    lines.append(make_statement("rules", "Rules", *meanings))
    if missing := sum(None in record.ranks.values() for record in records):
        requirement = f"- in {missing} layers: the rule needs all min(out, in) singular values, or more than --top kept"
        lines.append(make_statement("not_known", "Unknown", requirement))
    return lines


def _exceeds_signal(record: Policies) -> bool:
    energy, signal = record.ranks["energy 90%"], record.ranks["signal"]
    return energy is not None and signal is not None and energy > signal
