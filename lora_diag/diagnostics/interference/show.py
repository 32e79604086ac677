"""Terminal output of ``interference``: pairs, rank of the sum, losses of merges, and a summary."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import median

from lora_diag.diagnostics.interference.record import Interference, Relation, Union, pooled_cosine
from lora_diag.records import Results
from lora_diag.records.base import Shown
from lora_diag.rendering.statements import Statement, describe_resolution, make_statement, short_paths, summarize
from lora_diag.rendering.tables import Grid, grid_of, rows_of
from lora_diag.rendering.text import list_counts, number, percent, quantity, short

# Maximum number of pairs with a table each; more share one table with a row per pair.
_MAX_PAIR_TABLES = 3

# Maximum number of layers or pairs named in a sentence.
_MAX_NAMED = 3

# Below this, ‖sum − merge‖/‖sum‖ is rounding.
_EXACT = 1e-9

# Names of merges in the order of the columns; ``cat`` is exact and has no column.
MERGES = {"linear": "linear", "ties": "ties", "ties_dense": "TIES of ΔW"}


def interference_grids(results: Results[Interference | Union], per: str = "type") -> list[Grid]:
    """Return the tables: one per pair or one of all pairs; the rank of the sum; the losses of merges."""
    grids = _make_pair_grids(group_pairs(results), per)
    if unions := select_shared(results):
        rows = rows_of(unions, per)
        details = (
            grid_of(Union.shown, rows, per, "the sum of all"),
            grid_of(_make_loss_columns(unions), rows, per, "merges: ‖sum − merge‖ / ‖sum‖"),
        )
        grids += [replace(grid, detail=True) for grid in details]
    return grids


def group_pairs(results: Results[Interference | Union]) -> list[tuple[str, str, list[Interference]]]:
    """Return the short names of each pair of updates and its records, in the order of the inputs."""
    paths = [run_input.path for run_input in results.run.inputs if run_input.role != "base"]
    names = dict(zip(paths, short_paths(paths), strict=True))
    order = {path: i for i, path in enumerate(paths)}
    groups: dict[tuple[str, str], list[Interference]] = {}
    for record in results:
        if isinstance(record, Interference):
            groups.setdefault((record.first, record.second), []).append(record)
    ordered = sorted(groups.items(), key=lambda item: [order.get(path, 0) for path in item[0]])
    return [(names.get(first, first), names.get(second, second), records) for (first, second), records in ordered]


def select_shared(results: Results[Interference | Union]) -> list[Union]:
    """Return the unions of layers that at least two updates change."""
    return [record for record in results if isinstance(record, Union) and len(record.updates) > 1]


def _make_pair_grids(pairs: Sequence[tuple[str, str, list[Interference]]], per: str) -> list[Grid]:
    """Return a table for each pair; one table with a row for each if there are many."""
    if len(pairs) > _MAX_PAIR_TABLES:
        rows = [(f"{first} × {second}", records) for first, second, records in pairs]
        shown = Interference.shown_of({}, [record for _, _, records in pairs for record in records])
        return [replace(grid_of(shown, rows, "type", "pairs"), title="pair")]
    grids = []
    for first, second, records in pairs:
        layers = sorted(rows_of(records, per), key=lambda row: -abs(pooled_cosine(row[1])))
        grids.append(grid_of(Interference.shown_of({}, records), layers, per, f"1 {first}, 2 {second}"))
    return grids


def _make_loss_columns(unions: Sequence[Union]) -> Iterator[Shown]:
    """Yield a column for each merge but ``cat``, and for each rank of ``_list_truncation_ranks``."""
    for key, title in MERGES.items():
        yield Shown(f"merges.{key}", title, "‖S − M‖/‖S‖", pool=partial(merge_residual, merge=key), terminal=True)
    for rank in _list_truncation_ranks(unions):
        pool = partial(recompressed_residual, rank=rank)
        yield Shown(f"recompressed.{rank}", f"svd {rank}", "‖S − S_r‖/‖S‖", pool=pool, drop=2, main=True)


def merge_residual(records: Sequence[Union], merge: str) -> float | None:
    """Return ‖S − M‖/‖S‖ over several layers; None if a layer does not have the merge or every sum is 0."""
    sums = [record for record in records if record.fro > 0]
    gaps = [loss.residual * record.fro for record in sums if (loss := record.merges.get(merge)) is not None]
    if not gaps or len(gaps) < len(sums):
        return None
    return math.hypot(*gaps) / math.hypot(*(record.fro for record in sums))


def recompressed_residual(records: Sequence[Union], rank: int) -> float:
    """Return ‖S − S_r‖/‖S‖ over several layers; a layer without a measurement at r counts as lossless."""
    gaps = [(r.recompressed.get(str(rank)) or 0.0) * r.fro for r in records]
    return math.hypot(*gaps) / (math.hypot(*(r.fro for r in records)) or 1.0)


def _list_truncation_ranks(records: Sequence[Union]) -> list[int]:
    """Return the measured truncation ranks, up to and including the first without loss in every sum."""
    ranks = sorted({int(rank) for record in records for rank in record.recompressed})
    lossless = [rank for rank in ranks if recompressed_residual(records, rank) < _EXACT]
    return [rank for rank in ranks if rank <= min(lossless, default=rank)]


def interference_lines(results: Results[Interference | Union]) -> list[Statement]:
    """Return the statements of the summary."""
    unions = select_shared(results)
    strongest = sorted(group_pairs(results), key=lambda pair: -abs(pooled_cosine(pair[2])))[:_MAX_NAMED]
    pairs = (_describe_interference(*pair) for pair in strongest)
    findings = [make_statement("interfere", "Interference", *pairs, priority=0)]
    if unions:
        findings += [
            make_statement("rank_needed", "Rank needed", *_describe_rank_needed(unions)),
            make_statement("merge", "Merge error", *_describe_merges(unions)),
            describe_resolution(
                [record.resolution.verdict for record in unions if record.fro > 0],
                "yes: rounding plays no part in the sums",
                "overlaps there may be those of the files' rounding",
                "sum",
            ),
        ]
    else:
        why = "not measured: every layer was left out" if results.unmeasured else "no layer is changed by two updates"
        findings.append(make_statement("interfere", "Interference", why))
    text = "weights do not show interference between tasks; the held-out loss of each task does"
    return summarize(results, *findings, make_statement("interpretation", "Interpretation", text, priority=2))


_RELATIONS: dict[Relation, str] = {
    "cancel": "cancel",
    "reinforce": "reinforce",
    "share": "share directions",
    "apart": "have no more in common than chance",
    "noise": "are not resolved by the files",
}


def _describe_interference(first: str, second: str, records: list[Interference]) -> str:
    """State what two updates have in common, and in which layers they cancel most."""
    counts = ", ".join(list_counts((record.relation for record in records), _RELATIONS))
    cosine = number(round(pooled_cosine(records), 4))
    sentence = f"{first} and {second}: cosine {cosine}; of {quantity(len(records), 'layer')} {counts}"
    cancelling = sorted((r for r in records if r.relation == "cancel"), key=lambda r: r.cosine)
    worst = [f"{short(r.layer)} ({number(round(r.cosine, 3))})" for r in cancelling[:_MAX_NAMED]]
    return f"{sentence}; lowest in {', '.join(worst)}" if worst else sentence


def _describe_rank_needed(unions: Sequence[Union]) -> list[str]:
    """State the ranks that the sum and the updates need, and what a truncated sum keeps of the updates."""
    separate_rank = sum(record.parts_rank_at["0.9"] for record in unions)
    sum_rank = sum(record.spectrum.rank_at["0.9"] or 0 for record in unions)
    lead = f"Σr = {sum_rank} holds 90% of the sum's energy; the updates need {separate_rank} separately"
    ranks = [rank for record in unions if (rank := record.rank_for_all.get("0.9")) is not None]
    without_rank = len(unions) - len(ranks)
    every = ""
    if without_rank:
        every = f"in {without_rank} of {len(unions)} layers no rank of the sum keeps 90% of every update"
    elif ranks:
        every = f"Σr = {sum(ranks)} keeps 90% of every update, at most r = {max(ranks)} in a layer"
    weakest = [kept for record in unions if (kept := record.weakest_kept.get("0.9")) is not None]
    least = f"at Σr = {sum_rank} the weakest update keeps a median of {percent(median(weakest))}" if weakest else ""
    return [lead, every, least]


def _describe_merges(unions: Sequence[Union]) -> Iterator[str]:
    """Yield the errors of all merges in one line, then remarks on single merges."""
    linear, ties, dense = (merge_residual(unions, merge) for merge in MERGES)
    errors = {"PEFT's linear": linear, "PEFT's ties": ties, "TIES of ΔW": dense}
    losses = [f"{name} {percent(error)}" for name, error in errors.items() if error is not None]
    losses += [
        f"svd r={rank} {percent(recompressed_residual(unions, rank))}" for rank in _list_truncation_ranks(unions)
    ]
    if losses:
        yield f"of ‖sum‖: {', '.join(losses)}"
    if merge_residual(unions, "cat") is not None:
        ranks = max(sum(rank or 0 for rank in record.ranks) for record in unions)
        yield f"cat (concatenated factors) is exact, with r = {ranks}"
    if linear is None and any(None not in record.ranks for record in unions):
        yield "PEFT's linear and ties need adapters of equal rank and known scale in every layer"
    best = [loss.best_scale for r in unions if (loss := r.merges.get("ties_dense")) and loss.best_scale]
    if dense is not None and best:
        yield f"TIES of ΔW is nearest to the sum when scaled by about {number(median(best))}"
