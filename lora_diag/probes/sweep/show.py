"""Terminal output of ``probe sweep``: loss at every rank and learning rate, and the sufficient
rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_diag.feature import Hint
from lora_diag.metrics.statistics import LEVEL, errors_needed, fit_line
from lora_diag.probes.sweep import verdict as judging
from lora_diag.records import Probe, Results
from lora_diag.records.probe import Subject
from lora_diag.rendering.losses import caption_of, describe_diverged, on_set, probe_summary
from lora_diag.rendering.statements import Statement, make_statement
from lora_diag.rendering.tables import Column, Grid, grid_of
from lora_diag.rendering.text import number, short, with_limits


def sweep_grids(results: Results[Any], per: str = "type") -> list[Grid]:
    """Return a table per set, one row for BASE, each rank and each reference line."""
    judged = judging.list_swept(results.whole_of(Probe), results.run.settings)
    return [_make_grid(results, swept) for swept in judged]


def sweep_lines(results: Results[Any]) -> list[Statement]:
    """Return the statements: the sufficient rank by set; reference lines; learning rates."""
    settings = results.run.settings
    swept_sets = judging.list_swept(results.whole_of(Probe), settings)
    judged = [swept for swept in swept_sets if swept.base is not None]
    statements = [on_set(swept.set, *state_verdict(swept)) for swept in judged]
    for one, line in judging.LINES.items():
        statements.append(make_statement(f"to_{one}", f"To {line}", *_compare_with(one, judged)))
    fits = [fit for swept in judged for fit in _describe_fit(swept, len(judged) > 1)]
    statements.append(make_statement("fit", "Fit", *fits))
    if swept_sets:
        statements.append(make_statement("rates", "Rates", *_describe_rates(swept_sets[0])))
    reading = _READING
    if quantized := settings.get("quantized"):
        reading += _ROUNDED.format(quantized)
    return probe_summary(results, *statements, reading=reading)


_READING = (
    "the rate of each rank was chosen on the first set, so losses there are slightly too low; all "
    "runs have the same batch order, so seeds differ less than independent runs; with fewer steps "
    "than you will train, small ranks may look better than they are"
)
_ROUNDED = (
    "; BASE's linear layers are rounded to {} and not packed, so values are those of a quantized "
    "base, memory and speed are not; reference lines are trained on the unrounded BASE"
)


def _compare_with(subject: Subject, judged: Sequence[judging.Swept]) -> Iterator[str]:
    """Yield the comparison of the best rank with a reference line, on every set with a measured
    BASE.
    """
    line = judging.LINES[subject]
    for swept in judged:
        found = swept.compare(subject)
        if found is None:
            continue
        needed = "no number of seeds would decide"
        if found.seeds is not None:
            needed = judging.describe_needed(found.seeds)
        answers = {
            "no verdict": "no verdict: one seed has no spread",
            "as good": f"LoRA is as good: each keeps {1 - swept.tolerance:.0%} of the other's gain",
            "better": "LoRA is better",
            "worse": "LoRA is worse",
            "not known": f"not known: {needed}",
        }
        means = f"r={found.best.rank} {found.best.mean:.4f}, {line} {found.other.mean:.4f}"
        text = f"{answers[found.outcome]}; {means} ({with_limits(found.gap, found.half)})"
        if found.fixed:
            text += f"; {line} is one run"
        if len(judged) > 1:
            text = f"on {short(swept.set)}: {text}"
        yield text


def _describe_fit(swept: judging.Swept, name_set: bool) -> Iterator[str]:
    """Yield the slope of the losses over log₂ r with its interval, or that it explains nothing;
    from three ranks.
    """
    rows = [row for row in swept.rows if row.rank]
    line = fit_line([math.log2(row.rank or 1) for row in rows], [row.runs for row in rows])
    if line is None:
        return
    half = errors_needed(line.slope.freedom) * line.slope.error
    slope = f"{with_limits(line.slope.value, half)} nats per doubling of r"
    if abs(line.slope.value) <= half:
        answer = f"explains nothing: {slope} is not significant"
    elif line.lack is not None and line.lack < 1 - LEVEL:
        answer = (
            f"no straight line in log₂ r: residuals of {number(line.spread)} exceed the "
            f"spread of seeds ({slope})"
        )
    else:
        answer = slope
    where = f"on {short(swept.set)}: " if name_set else ""
    yield f"{where}{answer}; within r={rows[0].rank} to {rows[-1].rank} and these steps only"


def _make_grid(results: Results[Any], swept: judging.Swept) -> Grid:
    """Return the losses on one set: over seeds at the rank's own rate, and of the first seed at
    every rate.
    """
    of_set = [record for record in swept.records if record.set == swept.set]
    trained = [record for record in of_set if record.lr is not None]
    tried = sorted({record.lr for record in trained if record.lr is not None})
    first = min((record.seed for record in trained), default=0)
    by_setting = {(r.subject, r.rank, r.lr): r for r in trained if r.seed == first}
    runs: list[tuple[Subject, judging.AtRank]] = [("lora", row) for row in swept.rows]
    runs += swept.lines.items()
    bases = [record for record in of_set if record.subject == "base"]
    rows: list[tuple[str, Sequence[Any]]] = [
        (f"BASE {record.name}".rstrip(), [{"mean": record.loss}]) for record in bases
    ]
    rows += [(judging.LINES.get(subject, f"r={row.rank}"), [row]) for subject, row in runs]
    columns = []
    for drop, lr in zip(range(len(tried), 0, -1), tried, strict=True):
        losses = [_format_loss(by_setting.get((subject, row.rank, lr))) for subject, row in runs]
        columns.append(Column(f"lr {lr:g}", (*["-"] * len(bases), *losses), drop=drop))
    caption = caption_of(results, of_set[0])
    return grid_of(judging.AtRank.shown, rows, "rank", caption, extra=columns)


def _format_loss(record: Probe | None) -> str:
    """Return the loss of a record as a table shows it; a dash without a record."""
    if record is None:
        return "-"
    return "diverged" if record.loss is None else f"{record.loss:.4f}"


def state_verdict(swept: judging.Swept) -> list[str]:
    """State the rank to train at, its confidence, and the findings on smaller ranks; or why there
    is no verdict.
    """
    verdict, share = swept.verdict, swept.tolerance
    if verdict.best is None:
        return ["no verdict: no run is finished with a finite loss"]
    if verdict.outcome == "no gain":
        by = number(-verdict.gain)
        return [f"no gain: every rank is worse than BASE, r={verdict.best} by the least, {by}"]
    chosen = verdict.chosen
    if chosen is None:
        return [f"no verdict: one rank; lowest loss at r={verdict.best}"]
    if verdict.outcome == "no verdict" or chosen.confidence is None:
        why = "one seed has no spread" if verdict.seeds < 2 else "seeds do not differ"
        lowest = f"lowest loss at r={verdict.best}"
        return [f"no verdict: {why}; {lowest}; use more --repeats with --resume"]
    found: float | None = chosen.confidence
    target = f"it keeps {100 * (1 - share):.4g}% of the gain of every rank tried"
    if verdict.rank is None:
        found = verdict.confidence
        target += " and no smaller rank does"
    if found is not None:
        target += f", {judging.format_confidence(found)} confidence"
    lead = f"r={chosen.rank} at learning rate {chosen.lr:g} ({verdict.outcome}): {target}"
    return [lead, *judging.list_reasons(verdict, share)]


def _describe_rates(swept: judging.Swept) -> list[str]:
    """State the learning rates at an edge of those tried, whether there was only one, and the runs
    that diverged.
    """
    records, lines = swept.records, []
    rows = {f"r={row.rank}": row for row in swept.rows}
    rows |= {judging.LINES[name]: row for name, row in swept.lines.items()}
    if at_edge := [name for name, row in rows.items() if row.edge]:
        options = ["--full-lr"] * ("full" in at_edge) + ["--lr"] * (at_edge != ["full"])
        lines.append(
            f"at the edge of the rates tried for {', '.join(at_edge)}; extend "
            f"{' and '.join(options)}"
        )
    if len({record.lr for record in records if record.subject == "lora"}) == 1:
        lines.append("one rate for all ranks: the effects of rank and rate cannot be separated")
    with_loss = {(r.subject, r.rank, r.lr, r.seed) for r in records if r.loss is not None}
    for subject, rank, lr, seed in sorted(judging.find_diverged(records) & with_loss, key=str):
        named = judging.LINES.get(subject, f"r={rank}")
        lines.append(
            f"{named} at {lr:g} diverged with seed {seed} (far above BASE): left out of mean and "
            "spread"
        )
    return [*lines, *describe_diverged(records)]


def suggest_next(results: Results[Any], values: Mapping[str, Any]) -> Hint:
    """Return the next step: more seeds if they would decide, else the cost of the rank, or of all
    without one.
    """
    swept = judging.swept_of(results)
    verdict = None if swept is None else swept.verdict
    if verdict is not None and verdict.needed_seeds is not None:
        return Hint(f"--repeats {verdict.needed_seeds} --resume", "adds seeds to these", saved=True)
    if verdict is None or verdict.chosen is None:
        return Hint("plan {base}", "what each rank costs in parameters and memory")
    chosen = verdict.chosen
    purpose = f"what it costs; train it at learning rate {chosen.lr:g}"
    return Hint(f"plan {{base}} --ranks {chosen.rank}", purpose)
