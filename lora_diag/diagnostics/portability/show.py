"""Tables and statements of ``portability``: the rules of all programs, the errors of an adapter, and remedies."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group

from lora_diag.adapters.contents import LOW_RANK_PARTS
from lora_diag.diagnostics.portability.consumers import CONSUMERS
from lora_diag.diagnostics.portability.record import AS_INTENDED, NONLINEAR_PARTS, ORDER, Portability
from lora_diag.errors import DONE, GATE_FAILED
from lora_diag.feature import Hint
from lora_diag.records import Results
from lora_diag.rendering.statements import Level, Statement, make_statement, summarize
from lora_diag.rendering.tables import Column, Grid, rows_of
from lora_diag.rendering.tables import title_of as row_title
from lora_diag.rendering.text import format_shown, list_layers, list_names, number, percent, safe, short, span, to_text


def rules_table(grids: Sequence[Grid], width: int = 80, color: bool = False) -> str:
    """Return the tables of ``rules_grids`` as text: for each file layout, the newest and the older rules."""
    return to_text(Group(*(part for grid in grids for part in grid.render(width))), width, color)


# A consumer and its version.
Name = tuple[str, str]


def portability_grids(results: Results[Portability], per: str = "type") -> list[Grid]:
    """Return the table of treatments: one row per module type or layer, one column per consumer; none without rows."""
    if not len(results):
        return []
    rows = rows_of(results, per)
    names = list(group_by_consumer(results))
    columns = [Column("rank", tuple(_describe_ranks(group) for _, group in rows), drop=2)]
    if per == "type":
        counts = tuple(str(len({record.layer for record in group})) for _, group in rows)
        columns.insert(0, Column("n", counts, drop=1))
    for name in names:
        cells = tuple(_make_cell(group_by_consumer(group).get(name, [])) for _, group in rows)
        columns.append(Column(title_of(name, names), cells))
    return [Grid("", row_title(per), tuple(row for row, _ in rows), tuple(columns))]


def group_by_consumer(records: Iterable[Portability]) -> dict[Name, list[Portability]]:
    """Return the records of each consumer and version, in the order of the records."""
    groups: dict[Name, list[Portability]] = {}
    for record in records:
        groups.setdefault((record.consumer, record.version), []).append(record)
    return groups


def title_of(name: Name, names: Sequence[Name]) -> str:
    """Return the name of a consumer, with the version if ``names`` has several versions of it."""
    title = CONSUMERS[name[0]].title if name[0] in CONSUMERS else name[0]
    alone = sum(other == name[0] for other, _ in names) == 1
    return title if alone else f"{title} {name[1]}"


def _describe_ranks(group: Sequence[Portability]) -> str:
    """Return the range of the ranks of some weights; ``-`` without any."""
    ranks = {record.rank for record in group if record.rank is not None}
    return span(ranks) if ranks else "-"


def _make_cell(group: Sequence[Portability]) -> str:
    """Return the worst treatment of some weights by a consumer; if it is wrong, the factors or the largest ε."""
    if not group:
        return "-"
    status = min((record.status for record in group), key=ORDER.index)
    if status != "wrong":
        return status
    largest = max((record.epsilon for record in group if record.epsilon is not None), default=None)
    return _describe_factors(group) or f"ε {format_shown(largest)}"


def _describe_factors(records: Sequence[Portability]) -> str:
    """Return the range of the factors s'/s of some weights; empty if they have none or some errors are not of scale."""
    factors = sorted({record.scale / record.intended for record in records if record.scale and record.intended})
    if not factors or any(record.part in NONLINEAR_PARTS for record in records):
        return ""
    low, high = number(factors[0]), number(factors[-1])
    return f"×{low}" if low == high else f"×{low} to ×{high}"


def pooled_epsilon(records: Sequence[Portability]) -> float | None:
    """Return √(Σ‖ΔW' − ΔW‖² / Σ‖ΔW‖²) over some weights; None if one is not known, or all ΔW are zero."""
    pairs = [(r.epsilon or 0.0, r.fro) for r in records if r.fro is not None and (r.epsilon is not None or r.fro == 0)]
    total = math.hypot(*(fro for _, fro in pairs))
    if len(pairs) < len(records) or total == 0:
        return None
    return math.hypot(*(epsilon * fro for epsilon, fro in pairs)) / total


def exit_code(results: Results[Portability]) -> int:
    """Return the exit code of ``portability``."""
    return GATE_FAILED if find_failed(results) else DONE


def suggest_next(results: Results[Portability], values: Mapping[str, Any]) -> Hint | None:
    """Return the next step: BASE if it is needed, a remedy, or a gate; None for rules and after ``--fix``."""
    if values["rules"] or values["fix"]:
        return None
    statuses = {record.status for record in results} - {*AS_INTENDED}
    if values["base"] is None and "unknown" in statuses:
        return Hint("portability {adapter} BASE", "with the base checkpoint")
    if statuses:
        return _suggest_remedy({record.part for record in results}, "BASE" if values["base"] is None else "{base}")
    if values["output"] is None:
        return Hint("-o portability.jsonl", "saves these results, for gate")
    return Hint("gate init {output} -o policy.toml", "limits for the next adapter")


def _suggest_remedy(parts: set[str], base: str) -> Hint:
    """Return the command that helps an adapter with these parts, which some program does not apply as intended."""
    if parts <= LOW_RANK_PARTS:
        return Hint("--fix -o portable/", "writes an adapter that all programs scale alike")
    if parts <= {*LOW_RANK_PARTS, "dora"}:
        return Hint("--fix --dora-to-lora -o portable/", "writes the nearest LoRA of the same rank")
    if parts == {"other"}:
        return Hint(f"extract {base} {{adapter}} --energy 0.99 --portable -o lora/", "writes it as a LoRA")
    return Hint(f"plan-merge {base} {{adapter}} --to bf16", "programs apply it after a merge: what a merge keeps")


def find_failed(results: Results[Portability]) -> list[Name]:
    """Return the required consumers that do not, or not certainly, apply the intended ΔW in every weight."""
    required = set(results.run.settings.get("require") or ())
    return [
        name
        for name, records in group_by_consumer(results).items()
        if "==".join(name) in required and any(record.status not in AS_INTENDED for record in records)
    ]


def portability_lines(results: Results[Portability]) -> list[Statement]:
    """Return the statements: the treatment by each consumer, and remedies."""
    groups = group_by_consumer(results)
    titles = ", ".join(f"{title_of(name, [*groups])} {name[1]}" for name in find_failed(results))
    required = f"not as intended, or not known: {titles}" if titles else ""
    return summarize(
        results,
        *_describe_fix(results.run.settings.get("fixed")),
        *([_describe_answer(groups, results.run.settings.get("fixed") or {})] if groups else []),
        *(_describe_consumer(name, records, results) for name, records in groups.items()),
        make_statement("require", "Required", required, level="failure"),
    )


def _describe_fix(fixed: Mapping[str, Any] | None) -> list[Statement]:
    """State the rank, α and dtype of the written adapter, if any, its errors, and the weights left out."""
    if fixed is None:
        return []
    rank, rounding = fixed["rank"], number(fixed["rounding"] or 0)
    truncated, skipped = fixed["truncated"], fixed["left_out"]
    layer, worst = max(truncated.items(), key=lambda pair: pair[1], default=("", 0.0))
    nearest = f"nearest LoRA for {len(truncated)} weights with DoRA: largest ε = {number(worst)} ({short(layer)})"
    return [
        make_statement(
            "fixed",
            "Written",
            f"rank {rank} and alpha {rank} for all, {fixed['dtype']}; folding: largest ε = {rounding}",
            nearest if truncated else "",
            f"left out: {list_names([*skipped])}" if skipped else "",
            level="warning" if skipped or truncated else "note",
        )
    ]


def _describe_answer(groups: Mapping[Name, list[Portability]], fixed: Mapping[str, Any]) -> Statement:
    """State which consumers apply the intended ΔW, or as much of DoRA's as the written factors keep."""

    def list_titles(chosen: Sequence[Name]) -> str:
        """Return the titles of some consumers as text."""
        return ", ".join(title_of(name, [*groups]) for name in chosen)

    statuses = {name: {record.status for record in records} for name, records in groups.items()}
    exact = [name for name in groups if statuses[name] <= {*AS_INTENDED}]
    unknown = [name for name in groups if name not in exact and statuses[name] <= {*AS_INTENDED, "unknown"}]
    changed = [name for name in groups if name not in exact and name not in unknown]
    truncated = f"only {_describe_truncation(fixed)}" if fixed.get("truncated") else ""
    if not changed and not unknown:
        skipped = fixed.get("left_out")
        note = f", without {len(skipped)} weights of the adapter" if skipped and not truncated else ""
        is_whole = not truncated and not note
        lead = f"{'yes: ' if is_whole else ''}the same ΔW in {list_titles(exact)} by their source (none was run){note}"
        level: Level = "ok" if is_whole else "warning"
        return make_statement("portable", "Portable", truncated, lead, level=level, priority=0)
    clauses = [f"no: another ΔW in {list_titles(changed)}"] if changed else []
    clauses += [f"not known without BASE in {list_titles(unknown)}: give BASE"] if unknown else []
    clauses += [f"as {'written' if truncated else 'intended'} in {list_titles(exact)}"] if exact else []
    return make_statement("portable", "Portable", truncated, "; ".join(clauses), level="warning", priority=0)


def _describe_truncation(fixed: Mapping[str, Any]) -> str:
    """State how much of DoRA's update the written factors keep."""
    epsilon = fixed["epsilon"]
    kept = percent(max(0.0, 1 - epsilon**2))
    return f"{kept} of the energy of DoRA's ΔW (ε = {number(epsilon)}); merge the adapter into BASE to serve all of it"


def _describe_consumer(name: Name, records: list[Portability], results: Results[Portability]) -> Statement:
    """State the treatment by one consumer."""
    counts = Counter(record.status for record in records)
    details = []
    level: Level = "warning"
    if counts["refused"]:
        lead, level = f"refuses the adapter: {safe(records[0].why)}", "failure"
    elif set(counts) <= set(AS_INTENDED):
        lead, level = f"exact in all {len(records)} weights", "ok"
    elif set(counts) <= {*AS_INTENDED, "unknown"}:
        why = next(record.why for record in records if record.status == "unknown")
        lead = f"not known without BASE: {safe(why)}"
    else:
        clauses = [_describe_wrong(records)] if counts["wrong"] else []
        if counts["dropped"]:
            dropped = [record for record in records if record.status == "dropped"]
            clauses.append(f"drops {len(dropped)} of {len(records)} weights: {list_layers(dropped)}")
        lead = "; ".join(clauses)
        if (epsilon := pooled_epsilon(records)) is not None:
            details.append(f"over all weights ε = {number(epsilon)}")
        details += list(dict.fromkeys(safe(record.why) for record in records if record.why))[:3]
    if name[0] in (needed := results.run.settings.get("ranks_to_set") or {}) and not counts["refused"]:
        details.append(f"start it with {needed[name[0]]}")
    if "==".join(name) in (results.run.settings.get("newer") or ()):
        details.append(f"the rule was read in {CONSUMERS[name[0]].newest}; {name[1]} may differ")
    label = f"{title_of(name, [name])} {name[1]}"
    return make_statement(f"consumer {'=='.join(name)}", label, lead, *details, level=level, priority=2)


def _describe_wrong(records: Sequence[Portability]) -> str:
    """State how many weights get another ΔW, the largest ε, and the range of the factors."""
    altered = [record for record in records if record.status == "wrong"]
    text = f"in {len(altered)} of {len(records)} weights"
    measured = [record for record in altered if record.epsilon is not None]
    if measured:
        worst = max(measured, key=lambda record: record.epsilon or 0.0)
        text += f", largest ε = {number(worst.epsilon or 0.0)} ({short(worst.layer)})"
    factors = _describe_factors(altered)
    return f"scaled {factors} {text}" if factors else f"a different ΔW {text}"
