"""Terminal output of ``overlap``: κ over the steps by module type or layer, and a summary.

The records of a layer are joined into one track over the steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import mean, median
from typing import Any

from rich.text import Text

from lora_diag.diagnostics.overlap.record import Overlap
from lora_diag.feature import Hint
from lora_diag.metrics.subspaces import NEAR_RANDOM, TREND_RATIO, is_near
from lora_diag.records import Results
from lora_diag.records.names import part_of
from lora_diag.rendering.statements import Statement, describe_resolution, make_statement, summarize
from lora_diag.rendering.tables import WIDE, Column, Grid, Rows, columns_of, grid_of, grids_table, rows_of
from lora_diag.rendering.text import middle, number, quantity, select_evenly, shade, short, small_fraction, span, strip

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
        """The record of the last step with a gradient that is not zero; of the last step if all are zero."""
        return self.known[-1] if self.known else self.records[-1]

    @property
    def near_since(self) -> int | None:
        """First step from which κ stayed near its baseline; None if it ended above, or if all gradients are zero."""
        near_at_end = list(takewhile(is_near_random, reversed(self.known)))
        return near_at_end[-1].step if near_at_end else None

    @property
    def ends(self) -> tuple[float, float] | None:
        """Mean κ of the first and of the last quarter of the nonzero gradients; None with fewer than two."""
        kappas = [record.kappa for record in self.known if record.kappa is not None]
        quarter = max(1, len(kappas) // 4)
        return (mean(kappas[:quarter]), mean(kappas[-quarter:])) if len(kappas) > 1 else None


def is_near_random(record: Overlap) -> bool:
    """Return whether κ is near its value for a random subspace; False for a zero gradient."""
    return record.kappa is not None and is_near(record.kappa, record.kappa_random)


def describe_trend(ends: tuple[float, float] | None) -> str:
    """Return the trend of κ as a word; empty if it is not known.

    Args:
        ends: κ at the first steps and at the last, as ``Track.ends``; None with fewer than two nonzero gradients.

    >>> describe_trend((0.4, 0.2)), describe_trend((0.4, 0.39)), describe_trend((0.2, 0.4)), describe_trend(None)
    ('falls', 'steady', 'rises', '')
    """
    if ends is None:
        return ""
    first, last = ends
    return "falls" if last < TREND_RATIO * first else "rises" if first < TREND_RATIO * last else "steady"


def tracks(results: Results[Overlap], rank: int | None = None) -> list[Track]:
    """Return the track of every layer at the shown rank, in the order of the file.

    Args:
        results: The results.
        rank: The rank to show; default 16 if measured, else the middle one; for a reference adapter, its own. A
            layer without this rank is shown at the next smaller one, or at its smallest.
    """
    if rank is None and not reference_is_adapter(results):
        measured = sorted({record.rank for record in results})
        rank = USUAL_RANK if USUAL_RANK in measured or not measured else measured[len(measured) // 2]
    by_layer: dict[str, dict[int, list[Overlap]]] = {}
    for record in results:
        by_layer.setdefault(record.layer, {}).setdefault(record.rank, []).append(record)
    layer_tracks = []
    for layer, by_rank in by_layer.items():
        layer_rank = max((each for each in by_rank if rank is None or each <= rank), default=min(by_rank))
        records = sorted(by_rank[layer_rank], key=lambda record: record.step)
        layer_tracks.append(Track(layer, layer_rank, tuple(records)))
    return layer_tracks


def reference_is_adapter(results: Results[Overlap]) -> bool:
    """Return whether the subspaces are those of an adapter."""
    return any(run_input.role == "adapter" for run_input in results.run.inputs)


# Maximum number of steps with a column each, in the narrow and in the wide table. With more steps, this many have
# columns, and a strip of this many characters shows all.
_MAX_STEPS, _WIDE_MAX_STEPS = 5, 10
_SAMPLED_STEPS, _WIDE_SAMPLED_STEPS = 3, 6
_STRIP_WIDTH, _WIDE_STRIP_WIDTH = 8, 24

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
        width: Width of the terminal in columns; the layout adapts from 80 to 140.
        color: Whether to shade κ with ANSI colours.
        per: ``type`` for one row per module type (medians over its layers), ``layer`` for one row per layer.
        next_command: The suggested next command, printed last; None without one.
        show_rank: The rank to show; default as in ``tracks``.

    Returns:
        Lines of text, without a trailing newline.
    """
    tracked = tracks(results, show_rank)
    statements = lines(results, tracked)
    if tracked and show_rank is not None and all(track.rank != show_rank for track in tracked):
        problem = f"{show_rank} is larger than all layers and adapters; another rank is shown"
        statements.append(make_statement("show_rank", "Rank shown", problem, level="warning"))
    grids = [_make_grid(rows_of(tracked, per), width, per)] if tracked else []
    return grids_table(grids, statements, width, color, next_command)


def _make_grid(rows: Rows, width: int, per: str) -> Grid:
    """Return the table of κ over the steps, one row per group of tracks."""
    steps = sorted({record.step for _, group in rows for track in group for record in track.records})
    wide = width >= WIDE
    max_steps, sample_count = (_WIDE_MAX_STEPS, _WIDE_SAMPLED_STEPS) if wide else (_MAX_STEPS, _SAMPLED_STEPS)
    column_steps = select_evenly(steps, sample_count if len(steps) > max_steps else max_steps)
    ranks = {track.rank for _, group in rows for track in group}
    last = [(name, [track.last for track in group]) for name, group in rows]
    columns: list[Column] = []
    for field in Overlap.shown:
        if field.path == "kappa":
            columns += [_make_step_column(rows, step, "step " * (step == column_steps[0])) for step in column_steps]
            if len(steps) > len(column_steps):
                columns.append(_make_strip_column(rows, steps, _WIDE_STRIP_WIDTH if wide else _STRIP_WIDTH))
            if steps[1:]:
                trends = tuple(describe_trend(_compute_median_ends(group)) for _, group in rows)
                columns.append(Column("trend", trends, "left"))
        elif field.path != "rank" or len(ranks) > 1:
            columns += columns_of([field], last)
    caption = f"κ = ‖UᵀGV‖/‖G‖ at r={span(ranks)}, by training step"
    return grid_of((), rows, per, f"{caption} ({NEAR_MARK} near random)", extra=columns)


def _make_step_column(rows: Rows, step: int, prefix: str) -> Column:
    """Return a column of the median κ at a step, shaded by its distance from random to 1, marked if near random."""
    cells: list[str | Text] = []
    for _, group in rows:
        nonzero = [record for record in _select_step(group, step) if record.kappa is not None]
        if not nonzero:
            cells.append("-")
            continue
        kappa = median(record.kappa or 0.0 for record in nonzero)
        random = median(record.kappa_random for record in nonzero)
        mark = NEAR_MARK if sum(map(is_near_random, nonzero)) > len(nonzero) / 2 else " "
        style = shade(max(0.0, kappa - random) / max(1e-9, 1 - random))
        cells.append(Text(f"{small_fraction(kappa)}{mark}", style=style))
    return Column(f"{prefix}{step}", tuple(cells))


def _select_step(group: Sequence[Track], step: int) -> list[Overlap]:
    """Return the records of several tracks at one step."""
    return [record for track in group for record in track.records if record.step == step]


def _compute_median_ends(group: Sequence[Track]) -> tuple[float, float] | None:
    """Return the medians of ``Track.ends`` over several layers; None if no layer has two nonzero gradients."""
    ends = [track.ends for track in group]
    first, last = (middle([end[i] if end else None for end in ends]) for i in (0, 1))
    return None if first is None or last is None else (first, last)


def _make_strip_column(rows: Rows, steps: Sequence[int], width: int) -> Column:
    """Return a column that draws the median κ over all steps, in bins; full height is the largest κ of the rows."""
    highest = max((r.kappa or 0.0 for _, group in rows for track in group for r in track.records), default=0.0)
    strips = []
    for _, group in rows:
        kappas = [middle([record.kappa for record in _select_step(group, step)]) for step in steps]
        strips.append(strip([None if kappa is None or not highest else kappa / highest for kappa in kappas], width))
    return Column("over steps", tuple(strips), "left", drop=3)


# Maximum number of layers named in a sentence.
_MAX_NAMED = 3

_NEAR_CRITERION = f"below {NEAR_RANDOM:g}× random or halfway to 1"

# An adapter still reaches the gradient if tangent² exceeds its baseline by this fraction of ‖G‖². A convention: both
# numbers are printed.
MIN_REACH = 0.1


def suggest_next(results: Results[Overlap], values: Mapping[str, Any]) -> Hint:
    """Return the next step: a sweep of ranks if most layers end near random, else the effect of the adapter, or one."""
    relevant = [track for track in _select_relevant(tracks(results)) if track.known]
    if 2 * sum(track.near_since is not None for track in relevant) > len(relevant):
        return Hint("probe sweep {base} --data train.txt --eval held_out.txt", "which rank training needs")
    if reference_is_adapter(results):
        return Hint("probe outputs {base} {tuned} --eval held_out.txt", "what the adapter does to the loss")
    return Hint(f"extract {{base}} {{tuned}} --rank {USUAL_RANK} -o adapter/", "an adapter in these subspaces")


def lines(results: Results[Overlap], shown: Sequence[Track] | None = None) -> list[Statement]:
    """Return the statements of the summary.

    Args:
        results: The results.
        shown: Its layers at the rank of the table; default: at the default rank.
    """
    shown = tracks(results) if shown is None else shown
    relevant = [track for track in _select_relevant(shown) if track.known]
    findings = []
    if relevant:
        interpretation = "overlap increases with rank for any subspace: compare with random, not with 1"
        if reference_is_adapter(results):
            interpretation += "; near a minimum over the adapter's own weights tangent goes to 0"
        findings = [
            _describe_containment(relevant, {part_of(t.layer) for t in shown} > {part_of(t.layer) for t in relevant}),
            make_statement("suggests", "Suggestion", *_suggest_fix(results, relevant)),
            make_statement("reach", "Reach", *_describe_reach(relevant)),
            describe_resolution(
                [track.last.verdict for track in relevant],
                "",
                "there the subspaces are those of rounding noise, and a κ near random has no meaning",
            ),
            make_statement("interpretation", "Interpretation", interpretation, priority=2),
        ]
    elif shown:
        findings = [make_statement("inside", "Containment", "not known: every gradient is zero", level="warning")]
    findings.append(make_statement("ranks", "Ranks", _describe_skipped_ranks(results), priority=2))
    return summarize(results, *findings, extra=_describe_measured(results), so_far="records so far")


def _describe_measured(results: Results[Overlap]) -> list[str]:
    """State the number of layers, steps and ranks; empty without records."""
    layers, steps, ranks = (len({getattr(r, name) for r in results}) for name in ("layer", "step", "rank"))
    return [f"{quantity(layers)}, {quantity(steps, 'step')}, {quantity(ranks, 'rank')}"] if layers else []


def _select_relevant(shown: Sequence[Track]) -> list[Track]:
    """Return the layers that adapters usually target, or all if there are none."""
    return [track for track in shown if part_of(track.layer) == "matrices"] or list(shown)


def _describe_containment(relevant: Sequence[Track], is_partial: bool) -> Statement:
    """State how many layers end near the baseline, which, and since when.

    Args:
        relevant: The layers to judge.
        is_partial: Whether embeddings and head were measured, too, and are not among them.
    """
    near_random = sorted(
        (t for t in relevant if t.near_since is not None), key=lambda t: (t.last.kappa or 0) / t.last.kappa_random
    )
    verdict = "no" if len(near_random) > len(relevant) / 2 else "partly" if near_random else "yes"
    kappa = median(track.last.kappa or 0 for track in relevant)
    random = median(track.last.kappa_random for track in relevant)
    scope = " outside embeddings and head" if is_partial else ""
    first_step = min(track.records[0].step for track in relevant)
    examples = (
        f"{short(t.layer)} ({number(t.last.kappa or 0)}, "
        f"{'at every step' if t.near_since == first_step else f'since step {t.near_since}'})"
        for t in near_random[:_MAX_NAMED]
    )
    more = f" and {len(near_random) - _MAX_NAMED} more" if len(near_random) > _MAX_NAMED else ""
    return make_statement(
        "inside",
        "Containment",
        f"{verdict}: κ {number(kappa)} at the last step, the median of {quantity(len(relevant))}{scope}; random "
        f"subspaces {number(random)}",
        f"{len(near_random)} of them near random: {', '.join(examples)}{more}" if near_random else "",
        f"near random: {_NEAR_CRITERION}",
        level="warning" if near_random else "note",
        priority=0,
    )


def _name_layers(near_random: Sequence[Track]) -> str:
    """Return a phrase that names the layers near random by their number, or a single one by its name."""
    return f"in {len(near_random)} layers near random" if len(near_random) > 1 else f"in {short(near_random[0].layer)}"


def _describe_reach(relevant: Sequence[Track]) -> Iterator[str]:
    """Yield the first-order reach of an adapter with these subspaces, and of a fresh one, at the last step."""
    for subject, name in (
        ("an adapter in these subspaces reaches", "tangent"),
        ("a new one, with B = 0 and A spanning V,", "right"),
    ):
        value, random = (middle([getattr(t.last, field) for t in relevant]) for field in (name, f"{name}_random"))
        yield f"{subject} {number(value or 0.0)} of ‖G‖ to first order (random {number(random or 0.0)})"


def _suggest_fix(results: Results[Overlap], relevant: Sequence[Track]) -> list[str]:
    """Return what to do about the layers near their baseline, one sentence for each case."""
    near_random = [track for track in relevant if track.near_since is not None]
    if not near_random:
        return ["no change: in every layer these subspaces contain more of the gradient than random ones"]
    at_largest_rank = {
        track.layer: max((r for r in results if r.layer == track.layer), key=lambda r: (r.rank, r.step))
        for track in near_random
    }
    # There an adapter reaches clearly more of ‖G‖² than its baseline, though κ is near random.
    tangent_only = [
        track for track in near_random if (track.last.tangent or 0) ** 2 - track.last.tangent_random**2 >= MIN_REACH
    ]
    others = [track for track in near_random if track not in tangent_only]
    # At full rank the subspaces are the whole space, which contains every gradient: κ and its baseline are both 1.
    at_higher_rank = [t for t in others if (r := at_largest_rank[t.layer]).kappa_random < 1 and not is_near_random(r)]
    outside = [track for track in others if track not in at_higher_rank]
    sentences = []
    if tangent_only:
        tangent, random = (
            middle([getattr(t.last, name) for t in tangent_only]) or 0.0 for name in ("tangent", "tangent_random")
        )
        sentences.append(
            f"{_name_layers(tangent_only)} keep the adapter: one side is aligned, and it reaches {number(tangent)} of "
            f"‖G‖ (random {number(random)})"
        )
    if at_higher_rank:
        largest_rank = max(at_largest_rank[track.layer].rank for track in at_higher_rank)
        sentences.append(
            f"{_name_layers(at_higher_rank)} use a higher rank: κ exceeds the baseline at r={largest_rank}"
        )
    if outside:
        below_full_rank = any(at_largest_rank[track.layer].kappa_random >= 1 for track in outside)
        sentences.append(
            f"{_name_layers(outside)} initialize the adapter from recent gradients, or move its parameters to other "
            f"layers: the gradients are outside at every rank measured{' below full rank' if below_full_rank else ''}"
        )
    return sentences


def _describe_skipped_ranks(results: Results[Overlap]) -> str:
    """State which requested ranks were not measured in some layers; empty if all were measured."""
    ranks_by_layer: dict[str, set[int]] = {}
    for record in results:
        ranks_by_layer.setdefault(record.layer, set()).add(record.rank)
    requested = [rank for rank in results.run.settings.get("ranks", []) if isinstance(rank, int)]
    skip_counts = {rank: sum(rank not in ranks for ranks in ranks_by_layer.values()) for rank in requested}
    phrases = [f"{rank} in {number_of}" for rank, number_of in skip_counts.items() if number_of]
    limit = "the adapter's rank" if reference_is_adapter(results) else "min(out, in)"
    text = f"not measured where they exceed {limit}: r={', '.join(phrases)} of {quantity(len(ranks_by_layer))}"
    return text if phrases else ""
