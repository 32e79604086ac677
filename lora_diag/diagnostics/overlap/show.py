"""Terminal output of ``overlap``: κ over the steps by module type or layer, and a summary.

The records of a layer are joined into one track over the steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from rich.text import Text

from lora_diag.diagnostics.overlap.record import Overlap
from lora_diag.feature import Hint
from lora_diag.metrics.subspaces import TREND_RATIO, is_near
from lora_diag.records import Results
from lora_diag.records.names import part_of
from lora_diag.rendering.statements import (
    Level,
    Statement,
    describe_resolution,
    make_statement,
    summarize,
)
from lora_diag.rendering.tables import (
    WIDE,
    Column,
    Grid,
    Rows,
    columns_of,
    grid_of,
    grids_table,
    rows_of,
)
from lora_diag.rendering.text import (
    list_layers,
    number,
    quantity,
    select_evenly,
    shade,
    small_fraction,
    span,
)

# Default rank to show; for an adapter, its own rank.
USUAL_RANK = 16


@dataclass(frozen=True, slots=True)
class Track:
    """One layer at one rank, over the steps.

    Args:
        layer: The weight's name in BASE.
        rank: r.
        records: In the order of the steps.
    """

    layer: str
    rank: int
    records: tuple[Overlap, ...]

    @property
    def known(self) -> tuple[Overlap, ...]:
        """The records of gradients that are not zero."""
        return tuple(record for record in self.records if record.kappa is not None)

    @property
    def last(self) -> Overlap:
        """The record of the last step with a gradient that is not zero; of the last step if all are
        zero.
        """
        return self.known[-1] if self.known else self.records[-1]

    @property
    def ends(self) -> tuple[float, float] | None:
        """Mean κ of the first and of the last quarter of the nonzero gradients; None with fewer
        than two.
        """
        kappas = [record.kappa for record in self.known if record.kappa is not None]
        quarter = max(1, len(kappas) // 4)
        return (mean(kappas[:quarter]), mean(kappas[-quarter:])) if len(kappas) > 1 else None


def is_near_random(record: Overlap) -> bool:
    """Return whether κ is near its value for a random subspace; False for a zero gradient."""
    return record.kappa is not None and is_near(record.kappa, record.kappa_random)


def tracks(results: Results[Overlap], rank: int | None = None) -> list[Track]:
    """Return the track of every layer at the shown rank, in the order of the file.

    Args:
        results: The results.
        rank: The rank to show; default 16 if measured, else the middle one; for a reference
            adapter, its own. A layer without this rank is shown at the next smaller one, or at its
            smallest.
    """
    if rank is None and not reference_is_adapter(results):
        measured = sorted({record.rank for record in results})
        rank = USUAL_RANK
        if measured and USUAL_RANK not in measured:
            rank = measured[len(measured) // 2]
    by_layer: dict[str, dict[int, list[Overlap]]] = {}
    for record in results:
        by_layer.setdefault(record.layer, {}).setdefault(record.rank, []).append(record)
    layer_tracks = []
    for layer, by_rank in by_layer.items():
        possible = [each for each in by_rank if rank is None or each <= rank]
        layer_rank = max(possible, default=min(by_rank))
        records = sorted(by_rank[layer_rank], key=lambda record: record.step)
        layer_tracks.append(Track(layer, layer_rank, tuple(records)))
    return layer_tracks


def reference_is_adapter(results: Results[Overlap]) -> bool:
    """Return whether the subspaces are those of an adapter."""
    return any(run_input.role == "adapter" for run_input in results.run.inputs)


# Maximum number of steps with a column each, in the narrow and in the wide table.
_MAX_STEPS, _WIDE_MAX_STEPS = 5, 10

# Marks a κ near its baseline.
NEAR_MARK = "*"


def overlap_table(
    results: Results[Overlap],
    width: int = 80,
    color: bool = False,
    per: str = "type",
    next_command: str | None = None,
    show_rank: int | None = None,
) -> str:
    """Return the table and the summary of an overlap run.

    Args:
        results: The results.
        width: Width of the terminal in columns.
        color: Whether to use ANSI colours, which shade κ.
        per: ``type`` for one row per module type (medians over its layers), ``layer`` for one row
            per layer.
        next_command: The suggested next command, printed last; None without one.
        show_rank: The rank to show; default as in ``tracks``.

    Returns:
        Lines of text, without a trailing newline.
    """
    tracked = tracks(results, show_rank)
    grids = [_make_grid(rows_of(tracked, per), width, per)] if tracked else []
    return grids_table(grids, lines(results, tracked), width, color, next_command)


def _make_grid(rows: Rows, width: int, per: str) -> Grid:
    """Return the table of κ over the steps, one row per group of tracks."""
    shown = [track for _, group in rows for track in group]
    steps = sorted({record.step for track in shown for record in track.records})
    ranks = {track.rank for track in shown}
    last = [(name, [track.last for track in group]) for name, group in rows]
    columns: list[Column] = []
    for field in Overlap.shown:
        if field.path == "kappa":
            for step in select_evenly(steps, _WIDE_MAX_STEPS if width >= WIDE else _MAX_STEPS):
                title = f"step {step}" if step == steps[0] else str(step)
                columns.append(_make_step_column(rows, step, title))
            if len(steps) > 1:
                trends = tuple(_describe_trend(group) for _, group in rows)
                columns.append(Column("trend", trends, "left"))
        elif field.path != "rank" or len(ranks) > 1:
            columns += columns_of([field], last)
    caption = f"κ = ‖UᵀGV‖/‖G‖ at r={span(ranks)}, by training step"
    return grid_of((), rows, per, f"{caption} ({NEAR_MARK} near random)", extra=columns)


def _make_step_column(rows: Rows, step: int, title: str) -> Column:
    """Return a column of the median κ at a step, shaded by its place from random to 1, marked if
    most are near it.
    """
    cells: list[str | Text] = []
    for _, group in rows:
        nonzero = [record for track in group for record in track.known if record.step == step]
        if not nonzero:
            cells.append("-")
            continue
        kappa = median(record.kappa or 0.0 for record in nonzero)
        random = median(record.kappa_random for record in nonzero)
        mark = NEAR_MARK if sum(map(is_near_random, nonzero)) > len(nonzero) / 2 else " "
        style = shade(max(0.0, kappa - random) / max(1e-9, 1 - random))
        cells.append(Text(f"{small_fraction(kappa)}{mark}", style=style))
    return Column(title, tuple(cells))


def _describe_trend(group: Sequence[Track]) -> str:
    """Return the trend of the median κ as a word; empty if no layer has two nonzero gradients."""
    known = [track.ends for track in group if track.ends is not None]
    if not known:
        return ""
    first = median(start for start, _ in known)
    last = median(end for _, end in known)
    if last < TREND_RATIO * first:
        return "falls"
    return "rises" if first < TREND_RATIO * last else "steady"


# An adapter still reaches the gradient if tangent² exceeds its baseline by this fraction of ‖G‖². A
# convention: both numbers are printed.
MIN_REACH = 0.1


def suggest_next(results: Results[Overlap], values: Mapping[str, Any]) -> Hint:
    """Return the next step: the adapter's loss; else a sweep of ranks if most layers end near
    random, or extraction.
    """
    if reference_is_adapter(results):
        return Hint(
            "probe outputs {base} {tuned} --eval held_out.txt", "what the adapter does to the loss"
        )
    relevant = _select_relevant(tracks(results))
    if 2 * len(_select_near(relevant)) > len(relevant):
        return Hint(
            "probe sweep {base} --data train.txt --eval held_out.txt", "which rank training needs"
        )
    return Hint(
        f"extract {{base}} {{tuned}} --rank {USUAL_RANK} -o adapter/",
        "an adapter in these subspaces",
    )


def lines(results: Results[Overlap], shown: Sequence[Track] | None = None) -> list[Statement]:
    """Return the statements of the summary.

    Args:
        results: The results.
        shown: Its layers at the rank of the table; default: at the default rank.
    """
    shown = tracks(results) if shown is None else shown
    relevant = _select_relevant(shown)
    findings = []
    if relevant:
        findings = _describe_relevant(results, relevant, len(shown))
    elif shown:
        text = "not known: every gradient is zero"
        findings = [make_statement("inside", "Containment", text, level="warning")]
    return summarize(results, *findings, so_far="records so far")


def _describe_relevant(
    results: Results[Overlap], relevant: Sequence[Track], layer_count: int
) -> list[Statement]:
    """Return the findings on the relevant ones of ``layer_count`` measured layers."""
    tangent = _compare_with_random(relevant, "tangent")
    right = _compare_with_random(relevant, "right")
    interpretation = (
        "overlap increases with rank for any subspace: compare with random, not with 1; on a "
        "language model κ of an adapter as good as full fine-tuning ended near random in 11 of 21 "
        "matrices"
    )
    if reference_is_adapter(results):
        interpretation += "; near a minimum over the adapter's own weights tangent goes to 0"
    return [
        _describe_containment(relevant, layer_count),
        make_statement("suggests", "Suggestion", *_suggest_fix(results, relevant)),
        make_statement(
            "reach",
            "Reach",
            f"an adapter in these subspaces reaches {tangent} to first order",
            f"a new one, with B = 0 and A spanning V, {right}",
        ),
        describe_resolution(
            [track.last.verdict for track in relevant],
            "",
            "there the subspaces are those of rounding noise, and a κ near random has no meaning",
        ),
        make_statement("interpretation", "Interpretation", interpretation, priority=2),
    ]


def _select_relevant(shown: Sequence[Track]) -> list[Track]:
    """Return the layers that adapters usually target, or all if there are none; without those of
    zero gradients.
    """
    selected = [track for track in shown if part_of(track.layer) == "matrices"] or shown
    return [track for track in selected if track.known]


def _select_near(relevant: Sequence[Track]) -> list[Track]:
    """Return the layers that end near the random baseline."""
    return [track for track in relevant if is_near_random(track.last)]


def _describe_containment(relevant: Sequence[Track], layer_count: int) -> Statement:
    """State whether the relevant ones of ``layer_count`` measured layers end above the baseline,
    and the medians.
    """
    near = _select_near(relevant)
    verdict = "partly" if near else "yes"
    if len(near) > len(relevant) / 2:
        verdict = "no"
    kappa = number(median(track.last.kappa or 0 for track in relevant))
    random = number(median(track.last.kappa_random for track in relevant))
    layers = quantity(layer_count)
    if len(relevant) < layer_count:
        layers = f"{len(relevant)} of {layers}"
    text = (
        f"{verdict}: κ {kappa} at the last step, the median of {layers}; random subspaces {random}"
    )
    level: Level = "warning" if near else "note"
    return make_statement("inside", "Containment", text, level=level, priority=0)


def _compare_with_random(relevant: Sequence[Track], field: str) -> str:
    """Return the median of a measure at the last step as a phrase, with its baseline."""
    value = median(getattr(track.last, field) or 0.0 for track in relevant)
    random = median(getattr(track.last, f"{field}_random") for track in relevant)
    return f"{number(value)} of ‖G‖ (random {number(random)})"


def _suggest_fix(results: Results[Overlap], relevant: Sequence[Track]) -> list[str]:
    """Return what to do about the layers near their baseline, one sentence for each case."""
    near = _select_near(relevant)
    if not near:
        return [
            "no change: in every layer these subspaces contain more of the gradient than random "
            "ones"
        ]
    known = [record for record in results if record.kappa is not None]
    known.sort(key=lambda record: (record.rank, record.step))
    largest = {record.layer: record for record in known}
    keep: list[Track] = []
    raise_rank: list[Track] = []
    others: list[Track] = []
    for track in near:
        at_largest = largest[track.layer]
        if (track.last.tangent or 0) ** 2 - track.last.tangent_random**2 >= MIN_REACH:
            keep.append(track)
        # At full rank the subspaces are the whole space, which contains every gradient: κ and its
        # baseline are both 1.
        elif at_largest.kappa_random < 1 and not is_near_random(at_largest):
            raise_rank.append(track)
        else:
            others.append(track)
    sentences = []
    if keep:
        reach = _compare_with_random(keep, "tangent")
        sentences.append(
            f"in {list_layers(keep)} keep the adapter: one side is aligned, and it reaches {reach}"
        )
    if raise_rank:
        rank = max(largest[track.layer].rank for track in raise_rank)
        sentences.append(
            f"in {list_layers(raise_rank)} use a higher rank: κ exceeds the baseline at r={rank}"
        )
    if others:
        sentences.append(
            f"in {list_layers(others)}, if the held-out loss is too high, initialize the adapter "
            "from recent gradients, or move its parameters to other layers: the gradients are "
            "outside at every rank measured below full rank"
        )
    return sentences
