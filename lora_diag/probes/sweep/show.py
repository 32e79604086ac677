"""Terminal output of ``probe sweep``: loss at every rank and learning rate, and the sufficient rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_diag.feature import Hint
from lora_diag.probes.sweep.verdict import (
    AtRank,
    ReferenceComparison,
    SweepVerdict,
    best_rates,
    by_rank,
    compare_with_reference,
    describe_needed,
    find_diverged,
    format_confidence,
    list_reasons,
    swept_of,
)
from lora_diag.probes.sweep.verdict import verdicts as verdicts_of
from lora_diag.records import Probe, Results
from lora_diag.records.probe import Subject, set_names
from lora_diag.rendering.losses import caption_of, describe_added_rates, describe_diverged, on_set, probe_summary
from lora_diag.rendering.statements import Statement, make_statement
from lora_diag.rendering.tables import Column, Grid, Rows, grid_of
from lora_diag.rendering.text import number, short, with_limits


def sweep_grids(results: Results[Any], per: str = "type") -> list[Grid]:
    """Return a table per set, one row for BASE, each rank and each reference line."""
    records, seed = results.whole_of(Probe), results.run.settings["seed"]
    sets = set_names(records)
    rates = best_rates(records, sets[0], seed) if sets else {}
    references = _list_references(records, sets, seed)
    grids = []
    for name in sets:
        lines = [(subject, row) for subject, set_name, row in references if set_name == name]
        own_records = [record for record in records if record.set == name]
        grids.append(_make_table(caption_of(name, own_records), own_records, by_rank(records, name, rates), lines))
    return grids


def sweep_lines(results: Results[Any]) -> list[Statement]:
    """Return the statements: the sufficient rank by set; reference lines; learning rates; training."""
    records, settings = results.whole_of(Probe), results.run.settings
    sets, share = set_names(records), settings["tolerance"]
    rates = best_rates(records, sets[0], settings["seed"]) if sets else {}
    references = _list_references(records, sets, settings["seed"])
    verdicts = verdicts_of(records, settings["seed"], share)
    bases = {name: base for name, (_, base) in verdicts.items()}
    rows = by_rank(records, sets[0], rates) if sets else []
    on_first_set = [(subject, row) for subject, set_name, row in references if set_name == sets[0]]
    return probe_summary(
        results,
        *(on_set(name, *_state_verdict(verdict, base, share)) for name, (verdict, base) in verdicts.items()),
        *_compare_references(records, bases, rates, references, share),
        make_statement("rates", "Rates", *_describe_rates(rows, on_first_set, records, settings)),
        make_statement("trained", "Trained", _describe_training(settings), priority=2),
        reading=_interpret(settings),
    )


# Names of the reference lines.
_LINES: dict[Subject, str] = {"full": "full", "bitfit": "BitFit"}

_READING = (
    "the rate of each rank was chosen on the first set, so losses there are slightly too low; all runs have the "
    "same batch order, so seeds differ less than independent runs; with fewer steps than you will train, small "
    "ranks may look better than they are"
)


def _interpret(settings: dict[str, Any]) -> str:
    """Return notes on the interpretation of the results, as one text."""
    extra = []
    if settings.get("full_rates"):
        extra.append(
            "full trains every parameter, including embeddings and head, and only its dropout depends on the seed: "
            "without dropout all its seeds are one run, whose error is assumed to be that of a LoRA run"
        )
    if settings.get("quantized"):
        extra.append(
            f"BASE's linear layers are rounded to {settings['quantized']} and not packed, so values are those of a "
            "quantized base, memory and speed are not; reference lines are trained on the unrounded BASE"
        )
    return "; ".join([_READING, *extra])


def _list_references(records: Sequence[Probe], sets: Sequence[str], seed: int) -> list[tuple[Subject, str, AtRank]]:
    """Return the runs of each reference line at its best rate, on every set."""
    rows = []
    for subject in _LINES:
        rates = best_rates(records, sets[0], seed, subject) if sets else {}
        rows += [(subject, name, row) for name in sets for row in by_rank(records, name, rates, subject)]
    return rows


def _compare_references(
    records: Sequence[Probe],
    bases: dict[str, Probe],
    rates: dict[int | None, float],
    references: Sequence[tuple[Subject, str, AtRank]],
    share: float,
) -> list[Statement]:
    """Compare the best rank with each reference line, on every set with a measured BASE."""
    sentences: dict[Subject, list[str]] = {}
    for subject, name, row in references:
        if name not in bases:
            continue
        ranks = by_rank(records, name, rates)
        if (comparison := compare_with_reference(ranks, row, bases[name].nats, share)) is not None:
            where = f"on {short(name)}: " if len(bases) > 1 else ""
            sentences.setdefault(subject, []).append(f"{where}{_describe_comparison(comparison, _LINES[subject])}")
    return [make_statement(f"to_{subject}", f"To {_LINES[subject]}", *lines) for subject, lines in sentences.items()]


def _describe_comparison(comparison: ReferenceComparison, line: str) -> str:
    """State how the best rank compares with a reference line, with the interval of the difference."""
    means = f"r={comparison.best.rank} {comparison.best.mean:.4f}, {line} {comparison.other.mean:.4f}"
    if comparison.half is None:
        return f"no verdict: {means} ({comparison.gap:+.4f}); one seed has no spread"
    answers = {
        "as good": f"LoRA is as good: each keeps {1 - comparison.tolerance:.0%} of the other's gain",
        "better": "LoRA is better",
        "worse": "LoRA is worse",
        "not known": "not known: "
        + ("no number of seeds would decide" if comparison.seeds is None else describe_needed(comparison.seeds)),
    }
    span = with_limits(comparison.gap, comparison.half)
    one_run = f"; {line} is one run" if comparison.fixed else ""
    return f"{answers[comparison.outcome]}; {means} ({span}){one_run}"


def _make_table(
    caption: str, of_set: Sequence[Probe], ranks: Sequence[AtRank], lines: Sequence[tuple[Subject, AtRank]]
) -> Grid:
    """Return the loss by rank: over seeds at the rank's own rate, and of the first seed at every rate."""
    tried = sorted({record.lr for record in of_set if record.lr is not None})
    first = min((record.seed for record in of_set if record.lr is not None), default=0)
    by_setting = {(r.subject, r.rank, r.lr): r for r in of_set if r.lr is not None and r.seed == first}
    bases = [(f"BASE {record.name}".rstrip(), [{"mean": record.loss}]) for record in of_set if record.subject == "base"]
    runs: list[tuple[Subject, AtRank]] = [*(("lora", row) for row in ranks), *lines]
    rows: Rows = [*bases, *((_LINES.get(subject, f"r={row.rank}"), [row]) for subject, row in runs)]
    columns = []
    for drop, lr in zip(range(len(tried), 0, -1), tried, strict=True):
        losses = [_format_loss(by_setting.get((subject, row.rank, lr))) for subject, row in runs]
        columns.append(Column(f"lr {lr:g}", (*["-"] * len(bases), *losses), drop=drop))
    return grid_of(AtRank.shown, rows, "rank", caption, extra=columns)


def _format_loss(record: Probe | None) -> str:
    """Return the loss of a record as a table shows it; a dash without a record."""
    if record is None:
        return "-"
    return "diverged" if record.loss is None else f"{record.loss:.4f}"


def _describe_training(settings: dict[str, Any]) -> str:
    targets = settings["targets"] if isinstance(settings["targets"], str) else ", ".join(settings["targets"])
    grid = settings.get("quantized")
    kind, on = settings.get("kind", "LoRA, alpha = 2r"), f"{targets}{f' rounded to {grid}' if grid else ''}"
    steps = f"{settings['steps']} steps of {settings['batch']} sequences"
    return f"{kind}, on {on}; {steps}; {settings['optimizer']}"


def _state_verdict(verdict: SweepVerdict, base: Probe, share: float) -> list[str]:
    """State the rank to train at, its confidence, and the findings on smaller ranks; or why there is no verdict."""
    if verdict.best is None:
        return ["no verdict: no run is finished with a finite loss"]
    if verdict.outcome == "no gain":
        by = number(-verdict.gain)
        return [f"no gain: every rank is worse than BASE ({number(base.nats)}), r={verdict.best} by the least, {by}"]
    chosen = verdict.chosen
    if verdict.outcome == "no verdict" or chosen is None or chosen.confidence is None:
        why = "one rank" if chosen is None else "one seed has no spread" if verdict.seeds < 2 else "seeds do not differ"
        suffix = "" if chosen is None else "; use more --repeats with --resume"
        return [f"no verdict: {why}; lowest loss at r={verdict.best}{suffix}"]
    found = chosen.confidence if verdict.rank is not None else verdict.confidence
    confidence = "" if found is None else f", {format_confidence(found)} confidence"
    smallest = "" if verdict.rank is not None else " and no smaller rank does"
    target = f"it keeps {100 * (1 - share):.4g}% of the gain of every rank tried{smallest}{confidence}"
    lead = f"r={chosen.rank} at learning rate {chosen.lr:g} ({verdict.outcome}): {target}"
    return [lead, *list_reasons(verdict, share)]


def _describe_rates(
    rows: Sequence[AtRank], lines: Sequence[tuple[Subject, AtRank]], records: Sequence[Probe], settings: dict[str, Any]
) -> list[str]:
    notes = describe_diverged(records)
    with_loss = {(r.subject, r.rank, r.lr, r.seed) for r in records if r.loss is not None}
    for subject, rank, lr, seed in sorted(find_diverged(records) & with_loss, key=str):
        named = _LINES.get(subject, f"r={rank}")
        notes.append(f"{named} at {lr:g} diverged with seed {seed} (far above BASE): left out of mean and spread")
    if not rows:
        return notes or ["no run is finished yet"]
    rates = [f"r={row.rank} {row.lr:g}" for row in rows] + [f"{_LINES[subject]} {row.lr:g}" for subject, row in lines]
    text = [f"lowest loss of the first seed: {', '.join(rates)}"]
    for option, grid, of_full in (("--lr", "rates", False), ("--full-lr", "full_rates", True)):
        tried = {record.lr for record in records if (record.subject == "full") == of_full}
        text += describe_added_rates(tried, settings.get(grid), option)
    if at_edge := [str(row.rank) for row in rows if row.edge]:
        text.append(f"at the edge of the rates tried for r={', '.join(at_edge)}; extend --lr")
    for subject, row in lines:
        if row.edge:
            option = "--full-lr" if subject == "full" else "--lr"
            text.append(f"at the edge of the rates tried for {_LINES[subject]}; extend {option}")
    if len({record.lr for record in records if record.subject == "lora"}) == 1:
        text.append("one rate for all ranks: the effects of rank and rate cannot be separated")
    return [*text, *notes]


def suggest_next(results: Results[Any], values: Mapping[str, Any]) -> Hint:
    """Return the next step: more seeds if they would decide, else the cost of the rank, or of all without one."""
    swept = swept_of(results)
    verdict = None if swept is None else swept.verdict
    if verdict is not None and verdict.more_seeds is not None:
        return Hint(f"--repeats {verdict.more_seeds} --resume", "adds seeds to these", saved=True)
    if verdict is None or verdict.chosen is None:
        return Hint("plan {base}", "what each rank costs in parameters and memory")
    chosen = verdict.chosen
    purpose = f"what it costs; train it at learning rate {chosen.lr:g}"
    return Hint(f"plan {{base}} --ranks {chosen.rank}", purpose)
