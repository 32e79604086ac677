"""Tables and statements of ``portability``: the rules of all programs, and the errors of an
adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from rich.console import Group

from lora_diag.adapters.contents import LOW_RANK_PARTS
from lora_diag.diagnostics.portability.consumers import CONSUMERS
from lora_diag.diagnostics.portability.record import (
    AS_INTENDED,
    NONLINEAR_PARTS,
    ORDER,
    Portability,
)
from lora_diag.errors import DONE, GATE_FAILED
from lora_diag.feature import Hint
from lora_diag.records import Results
from lora_diag.records.base import Shown
from lora_diag.rendering.statements import Level, Statement, make_statement, summarize
from lora_diag.rendering.tables import Grid, grid_of, rows_of
from lora_diag.rendering.tables import title_of as title_of_rows
from lora_diag.rendering.text import list_layers, list_names, number, percent, safe, short, to_text


def rules_table(grids: Sequence[Grid], width: int = 80, color: bool = False) -> str:
    """Return the tables of ``rules_grids`` as text: for each file layout, the newest and the older
    rules.
    """
    return to_text(Group(*(part for grid in grids for part in grid.render(width))), width, color)


# A consumer and its version.
Name = tuple[str, str]


def portability_grids(results: Results[Portability], per: str = "type") -> list[Grid]:
    """Return the table of treatments, a row per module type or layer, a column per consumer and
    version; or none.
    """
    names = list(group_by_consumer(results))
    columns = [
        Shown("n", "n", "Number of weights", pool=_count_weights, main=per == "type", drop=1),
        Shown("rank", "rank", "Ranks of the factors", pool="range", main=True, drop=2),
    ]
    for name in names:
        treatment = partial(_describe_of, name=name)
        columns.append(
            Shown("status", title_of(name, names), "Worst treatment", pool=treatment, main=True)
        )
    return [grid_of(columns, rows_of(results, per), title_of_rows(per))] if names else []


def _count_weights(records: Sequence[Portability]) -> int:
    """Return the number of weights with records."""
    return len({record.layer for record in records})


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


def _describe_of(records: Sequence[Portability], name: Name) -> str | None:
    """Return the worst treatment by one consumer and version; None without records of it."""
    return describe_treatment(
        record for record in records if (record.consumer, record.version) == name
    )


def describe_treatment(records: Iterable[Portability]) -> str | None:
    """Return the worst treatment as text; None without records.

    If it is ``wrong``: the factors s'/s, or, where more than the scale is wrong or s is not known,
    the largest ε, or ``B·A alone`` if that is not known either.
    """
    records = list(records)
    if not records:
        return None
    worst = min((record.status for record in records), key=ORDER.index)
    if worst != "wrong":
        return worst
    wrong = [record for record in records if record.status == "wrong"]
    factors = [
        record.scale / record.intended for record in wrong if record.scale and record.intended
    ]
    if factors and not any(record.part in NONLINEAR_PARTS for record in wrong):
        ends = (f"×{number(min(factors))}", f"×{number(max(factors))}")
        return " to ".join(dict.fromkeys(ends))
    epsilons = [record.epsilon for record in wrong if record.epsilon is not None]
    return f"ε {number(max(epsilons))}" if epsilons else "B·A alone"


def exit_code(results: Results[Portability]) -> int:
    """Return the exit code of ``portability``: that of a failed gate if a required
    program fails.
    """
    return GATE_FAILED if find_failed(results) else DONE


def suggest_next(results: Results[Portability], values: Mapping[str, Any]) -> Hint | None:
    """Return the next step: BASE if it is needed, a remedy, a results file, or a gate; None for
    rules and ``--fix``.
    """
    if values["rules"] or values["fix"]:
        return None
    is_alone = values["adapter"] is None
    base, adapter = ("BASE", "{base}") if is_alone else ("{base}", "{adapter}")
    inputs = f"{base} {adapter}"
    without_base = {record.part for record in results if record.status == "unknown"} - {"experts"}
    if is_alone and without_base:
        return Hint(f"portability {inputs}", "with the base checkpoint")
    if any(record.status not in AS_INTENDED for record in results):
        return _suggest_remedy({record.part for record in results}, inputs)
    if values["output"] is None:
        return Hint("-o portability.jsonl", "saves these results, for gate")
    return Hint(
        f"gate --policy adapter-basic --base {base} --adapter {adapter}",
        "judges the adapter itself",
    )


def _suggest_remedy(parts: set[str], inputs: str) -> Hint:
    """Return the command that helps an adapter with these parts, which some program does not apply
    as intended.
    """
    if parts <= LOW_RANK_PARTS:
        return Hint("--fix -o portable/", "writes an adapter that all programs scale alike")
    if parts <= {*LOW_RANK_PARTS, "dora"}:
        return Hint("--fix --dora-to-lora -o portable/", "writes the nearest LoRA of the same rank")
    if parts == {"other"}:
        return Hint(f"extract {inputs} --energy 0.99 --portable -o lora/", "writes it as a LoRA")
    return Hint(
        f"plan-merge {inputs} --to bf16",
        "programs apply it after a merge: what a merge keeps",
    )


def find_failed(results: Results[Portability]) -> list[Name]:
    """Return the required consumers that do not, or not certainly, apply the intended ΔW in every
    judged weight.
    """
    required = set(results.run.settings.get("require") or ())
    return [
        name
        for name, records in group_by_consumer(results).items()
        if "==".join(name) in required
        and any(record.status not in AS_INTENDED for record in records)
    ]


def portability_lines(results: Results[Portability]) -> list[Statement]:
    """Return the statements: the written adapter, the answer for all consumers, each one, and
    failed requirements.
    """
    groups = group_by_consumer(results)
    fixed = results.run.settings.get("fixed") or {}
    is_whole = not (fixed.get("truncated") or fixed.get("left_out"))
    consumers = [_describe_consumer(name, records, results) for name, records in groups.items()]
    failed = ", ".join(f"{title_of(name, [name])} {name[1]}" for name in find_failed(results))
    required = f"not as intended, or not known: {failed}" if failed else ""
    return summarize(
        results,
        _describe_fix(fixed),
        _describe_answer(groups, is_whole),
        *consumers,
        make_statement("require", "Required", required, level="failure"),
    )


def _describe_fix(fixed: Mapping[str, Any]) -> Statement:
    """State the rank, α and dtype of the written adapter, its errors, and what it leaves out;
    without one, nothing.
    """
    if not fixed:
        return make_statement("fixed", "Written")
    rank = fixed["rank"]
    lines = [
        f"rank {rank} and alpha {rank} for all, {fixed['dtype']}; folding: largest ε = "
        f"{number(fixed['rounding'] or 0)}"
    ]
    if fixed["truncated"]:
        epsilon = fixed["epsilon"]
        lines.append(
            f"nearest LoRA for {len(fixed['truncated'])} full-rank updates: "
            f"{percent(max(0.0, 1 - epsilon**2))} of the energy of their ΔW (ε = "
            f"{number(epsilon)}); merge the adapter into BASE to serve all of it"
        )
    if fixed["left_out"]:
        lines.append(f"left out: {list_names([*fixed['left_out']])}")
    return make_statement("fixed", "Written", *lines, level="warning" if lines[1:] else "note")


def _describe_answer(groups: Mapping[Name, list[Portability]], is_whole: bool) -> Statement:
    """State which consumers apply the intended ΔW, or a written one that is not whole; without
    records, nothing.
    """
    if not groups:
        return make_statement("portable", "Portable")
    exact = "as intended" if is_whole else "as written, which is not the whole update,"
    titles: dict[str, list[str]] = {"no: another ΔW": [], "not known": [], exact: []}
    for name, records in groups.items():
        statuses = {record.status for record in records} - {*AS_INTENDED}
        if not statuses:
            kind = exact
        elif statuses == {"unknown"}:
            kind = "not known"
        else:
            kind = "no: another ΔW"
        titles[kind].append(title_of(name, [*groups]))
    clauses = [f"{kind} in {', '.join(of_kind)}" for kind, of_kind in titles.items() if of_kind]
    lead = f"{'; '.join(clauses)}, by the source of each (none was run)"
    if is_whole and len(titles[exact]) == len(groups):
        return make_statement("portable", "Portable", f"yes: {lead}", level="ok", priority=0)
    return make_statement("portable", "Portable", lead, level="warning", priority=0)


def _describe_consumer(
    name: Name, records: list[Portability], results: Results[Portability]
) -> Statement:
    """State what a consumer does otherwise than intended, why, the option it needs, and whether its
    rule is older.
    """
    consumer, version = name
    by_status: dict[str, list[Portability]] = {}
    for record in records:
        by_status.setdefault(record.status, []).append(record)
    total = f"of {len(records)} weights"
    level: Level = "note"
    clauses = []
    if "refused" in by_status:
        clauses.append("refuses the adapter")
    if dropped := by_status.get("dropped"):
        clauses.append(f"drops {len(dropped)} {total}: {list_layers(dropped)}")
    if wrong := by_status.get("wrong"):
        clause = f"a different ΔW in {len(wrong)} {total}"
        worst = max(wrong, key=lambda record: record.epsilon or 0.0)
        if worst.epsilon is not None:
            clause += f", largest ε = {number(worst.epsilon)} ({short(worst.layer)})"
        clauses.append(clause)
    if unknown := by_status.get("unknown"):
        clauses.append(f"not known in {len(unknown)} {total}")
    if clauses:
        level = "failure" if "refused" in by_status else "warning"
    reasons = list(dict.fromkeys(safe(record.why) for record in records if record.why))[:3]
    lines = [": ".join(filter(None, ("; ".join(clauses), "; ".join(reasons))))]
    settings = results.run.settings
    option = (settings.get("ranks_to_set") or {}).get(consumer)
    if option and "refused" not in by_status:
        lines.append(f"start it with {option}")
    if f"{consumer}=={version}" in (settings.get("newer") or {}):
        lines.append(f"the rule was read in {CONSUMERS[consumer].newest}; {version} may differ")
    label = f"{title_of(name, [name])} {version}"
    return make_statement(f"consumer {consumer}=={version}", label, *lines, level=level)
