"""The terminal's answer to ``extract``, and the model card of the adapter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from rich.console import Group
from rich.table import Table

from lora_diag.decisions.extract.record import Extraction, OnData
from lora_diag.records import LeftOut, Results
from lora_diag.rendering.columns import Column, rows_of, table_of, title_of
from lora_diag.rendering.lines import REASONS, subject, within
from lora_diag.rendering.statements import Level, Statement, compared, ending, say, summary_of
from lora_diag.rendering.text import count, middle, named, number, percent, safe, short, shown, span, to_text

# Which columns go first where there is too little room.
_SPARED = ("solver", "signal", "kind", "‖ΔW‖/‖W‖", "params", "floor data")

# Why a layer has no factors if ΔW = 0, as the diagnostic says it.
ZERO = "its update is zero"

# ε above the floor by more than this share of it is said to be the price of the dtype.
_VISIBLE = 1e-3


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of the table: a layer, or all layers of a module type."""

    name: str
    records: tuple[Extraction, ...]


def extraction_table(
    results: Results[Extraction],
    width: int = 80,
    color: bool = False,
    per: str = "type",
    then: str | None = None,
    folder: str | None = None,
) -> str:
    """Return the table and the summary of an extraction.

    Args:
        results: What was written.
        width: Columns of the terminal; 80 are enough, 140 are used.
        color: Whether to use ANSI colours.
        per: ``type`` for one row a module type, ``layer`` for one row a layer.
        then: The command that a user would run next.
        folder: Where the adapter is.

    Returns:
        Lines of text, without a newline at the end.
    """
    told = summary_of(_lines(results, folder), then)
    return to_text(Group(_table(_rows(results, per), per, width), told) if len(results) else told, width, color)


def model_card(results: Results[Extraction], base_name: str, command: str, rate: str | None = None) -> str:
    """Return the ``README.md`` of an adapter folder.

    Args:
        results: What was written.
        base_name: The base model.
        command: The command that wrote it.
        rate: The learning rate to train it on with, and where it was measured.
    """
    ranks = sorted(record.rank for record in results)
    table = [
        "| modules | layers | rank | energy kept | ε | lower bound on ε |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    table += [
        f"| `{row.name}` | {len(row.records)} | {_ranks(row)} | {percent(_kept(row.records))} | "
        f"{number(_epsilon(row.records))} | {number(_floor(row.records))} |"
        for row in _rows(results, "type")
    ]
    missing = [f"- {line}" for line in _missing(results, tip="")]
    in_full = [f"- {line}" for line in _in_full(results)]
    return "\n".join(
        [
            "---",
            f"base_model: {_quoted(base_name)}",
            "library_name: peft",
            "tags:",
            "- lora",
            "- loradiag",
            "---",
            "",
            f"# LoRA adapter extracted from {_code(subject(results.run))}",
            "",
            f"The {_what(results)} of ΔW = W_tuned − W_base, {len(results)} weights of "
            f"{_code(base_name)}, rank {span(ranks)}, {count(_params(results))} parameters, scaling 1. It keeps "
            f"{percent(_kept(results.layers))} of the energy ‖ΔW‖² of these weights and is ε = "
            f"{number(_epsilon(results.layers))} away from them (‖ΔW − BA‖ / ‖ΔW‖, measured on the factors in the "
            f"file); no adapter of these ranks comes nearer than {number(_floor(results.layers))}.",
            "",
            *([*_data_price(results), ""] if any(record.data for record in results) else []),
            *table,
            "",
            *([f"Learning rate to train it on with: {_code(rate)}.", ""] if rate is not None else []),
            *(["Beside the factors:", "", *in_full, ""] if in_full else []),
            *(["Not in it:", "", *missing, ""] if missing else []),
            "```python",
            "from peft import PeftModel",
            "",
            'model = PeftModel.from_pretrained(base_model, "THIS_FOLDER")',
            "```",
            "",
            f"Made by loradiag {results.run.version}; `extraction.jsonl` has the numbers of every weight:",
            "",
            f"    {safe(command)}",
            "",
        ]
    )


def _what(results: Results[Extraction]) -> str:
    weighed = any(record.data for record in results)
    return "truncation in the metric of activations" if weighed else "truncated singular value decomposition"


def _quoted(text: str) -> str:
    """Return text as YAML takes it."""
    return "'" + safe(text).replace("'", "''") + "'"


def _code(text: str) -> str:
    return f"`{safe(text).replace('`', chr(39))}`"


def _rows(results: Results[Extraction], per: str) -> list[_Row]:
    return [_Row(*row) for row in rows_of(results, per)]


def _table(rows: Sequence[_Row], per: str, width: int) -> Table:
    def column(title: str, cell: Callable[[_Row], str]) -> Column:
        return Column(title, tuple(map(cell, rows)))

    columns = [
        column("n", lambda row: str(len(row.records))),
        column("rank", _ranks),
        column("params", lambda row: count(sum(record.params for record in row.records))),
        column("‖ΔW‖/‖W‖", _moved),
        column("kept", lambda row: percent(_kept(row.records))),
        column("ε", lambda row: number(_epsilon(row.records))),
        column("floor", lambda row: number(_floor(row.records))),
        column("ε data", lambda row: _of_data(row.records, lambda data: data.epsilon)),
        column("floor data", lambda row: _of_data(row.records, lambda data: data.least_epsilon)),
        column("signal", _signal),
        column("kind", lambda row: ", ".join(sorted({record.kind for record in row.records}))),
        column("solver", lambda row: ", ".join(sorted({record.method.partition(":")[0] for record in row.records}))),
    ]
    dropped = {"n"} if per == "layer" else set()
    dropped |= {column.title for column in columns if set(column.cells) == {"-"}}
    left = [column for column in columns if column.title not in dropped]
    return table_of(title_of(per), [row.name for row in rows], left, width, _SPARED, {"kind", "solver"})


def _ranks(row: _Row) -> str:
    return span(record.rank for record in row.records)


def _moved(row: _Row) -> str:
    return shown(middle([record.fro / record.base_fro for record in row.records if record.base_fro]))


def _signal(row: _Row) -> str:
    """Show the median number of singular values above the rounding noise, and a mark by the worst verdict."""
    if all(record.method == "factored" for record in row.records):
        return "-"  # no rounding of merged weights comes between
    found = [record.resolution.signal_rank for record in row.records]
    beyond = [rank for rank in found if rank is not None]
    verdicts = {record.resolution.verdict for record in row.records}
    mark = "!" if "unresolved" in verdicts else "~" if "floor-limited" in verdicts else ""
    return (f"≥ {_ranks(row)}" if len(beyond) < len(found) else str(int(median(beyond)))) + mark


def _norm(records: Sequence[Extraction]) -> float:
    return math.hypot(*(record.fro for record in records))


def _epsilon(records: Sequence[Extraction]) -> float:
    """Return ε of several layers together: √(Σ‖ΔW − B·A‖² / Σ‖ΔW‖²)."""
    return math.hypot(*(record.epsilon * record.fro for record in records)) / _norm(records)


def _floor(records: Sequence[Extraction]) -> float:
    """Return a lower bound on the ε of any adapter of these ranks."""
    return math.hypot(*(record.least_epsilon * record.fro for record in records)) / _norm(records)


def _kept(records: Sequence[Extraction]) -> float:
    """Return the energy share that is kept of several layers together."""
    norm = _norm(records)
    shares = [record.kept if record.data is None else 1 - record.epsilon**2 for record in records]
    return min(1.0, sum(share * (record.fro / norm) ** 2 for share, record in zip(shares, records, strict=True)))


def _params(results: Results[Extraction]) -> int:
    return sum(record.params for record in results)


def _lines(results: Results[Extraction], folder: str | None) -> list[Statement]:
    """Return the summary."""
    lines = [compared(results)]
    if len(results):
        lines.append(say("wrote", "Written", *_wrote(results, folder)))
        lines += [say("price", "Error", *_price(results)), _resolved(results)]
    if where := _where(results):
        lines.append(say("where", "Distribution", where))
    missing = _missing(results) or ["nothing: every tensor that moved is in the adapter"]
    return [*lines, say("not_in_it", "Not included", *missing), *ending(results)]


def _wrote(results: Results[Extraction], folder: str | None) -> list[str]:
    ranks = sorted(record.rank for record in results)
    dtype = results.layers[0].dtype
    to = f"{safe(folder)}: " if folder else ""
    tables = sum(record.kind == "embedding" for record in results)
    more = f" ({tables} of them embeddings)" if tables else ""
    return [
        f"{to}{len(results)} weights{more}, rank {span(ranks)}, {count(_params(results))} parameters in {dtype}",
        *_in_full(results),
    ]


def _in_full(results: Results[Extraction]) -> list[str]:
    """Say what is stored in full, and what has to be done to the base model before that can be loaded."""
    rows: Counter[str] = Counter()  # of a table, those that both sides have and those that were added
    resized = set()
    for item in results.left_out:
        if item.reason == "saved":
            rows[item.layer] += item.shape[0]
            resized |= {item.layer} if "vocabulary" in item.detail else set()
    names = sorted(rows)
    if not names:
        return []
    lines = [f"stored in full: {named(names)}"]
    if resized:
        sizes = ", ".join(str(size) for size in sorted({rows[name] for name in resized}))
        lines.append(f"before it is loaded: base_model.resize_token_embeddings({sizes})")
    return lines


def _price(results: Results[Extraction]) -> list[str]:
    """Say what truncation costs, and what the dtype adds to it."""
    epsilon, floor = _epsilon(results.layers), _floor(results.layers)
    truncated = _truncated(results.layers)
    lines = [
        f"ε = {number(epsilon)} over these weights: {percent(_kept(results.layers))} of their energy ‖ΔW‖² is kept"
    ]
    if any(record.data for record in results):
        lines += _data_price(results)
    else:
        lines.append(f"within {_up(epsilon - floor)} of the smallest ε of any adapter of these ranks (Eckart-Young)")
        if epsilon > truncated * (1 + _VISIBLE) and epsilon > 1e-6:
            lines.append(f"rounding to {results.layers[0].dtype} adds {number(epsilon - truncated)} of that")
    if len(results) > 1:
        worst = max(results, key=lambda record: record.epsilon)
        best = min(results, key=lambda record: record.epsilon)
        lines.append(f"most {number(worst.epsilon)} in {short(worst.layer)} (rank {worst.rank})")
        lines.append(f"least {number(best.epsilon)} in {short(best.layer)} (rank {best.rank})")
    return lines


def _truncated(records: Sequence[Extraction]) -> float:
    """Return ε of truncated singular value decompositions of these ranks, before any rounding to a dtype."""
    return math.hypot(*(record.epsilon_min * record.fro for record in records)) / _norm(records)


def _data_price(results: Results[Extraction]) -> list[str]:
    """Say what the factors cost in the metric for which they are the best, and which are not."""
    weighed = [record for record in results if record.data]
    plain = [record.layer for record in results if not record.data]
    epsilon = _of_data(weighed, lambda data: data.epsilon)
    floor = _of_data(weighed, lambda data: data.least_epsilon)
    chosen, norm = "the outputs on the text of the activations", "√(E‖(ΔW − BA)x‖² / E‖ΔW x‖²)"
    if any(record.data and record.data.metric == "kfac" for record in weighed):
        chosen, norm = "the loss on that text, by K-FAC", "‖G^½(ΔW − BA)C^½‖ / ‖G^½·ΔW·C^½‖"
    lines = [
        f"Chosen for {chosen}: {norm} = {epsilon} in the {len(weighed)} weights with activations; no adapter of these "
        f"ranks is below {floor}. The price is a larger ε; truncation would have {number(_truncated(results.layers))}."
    ]
    if plain:
        lines.append(f"Without activations, and the best for the weights: {named(plain)}.")
    return lines


def _of_data(records: Sequence[Extraction], share: Callable[[OnData], float]) -> str:
    """Return an ε in the metric of the data of several layers together; a dash where none has one."""
    found = [record.data for record in records if record.data is not None]
    total = math.hypot(*(data.fro for data in found))
    return number(math.hypot(*(share(data) * data.fro for data in found)) / total) if total else "-"


def _up(value: float) -> str:
    """Return an upper bound in one digit, rounded up, from 1e-6 on.

    >>> _up(1.23e-5), _up(2e-3), _up(-1e-17)
    ('2e-05', '0.002', '1e-06')
    """
    value = max(value, 1e-6)
    digit = 10.0 ** math.floor(math.log10(value))
    return f"{math.ceil(value / digit - 1e-9) * digit:.1g}"


def _resolved(results: Results[Extraction]) -> Statement:
    """Say whether the files can show the update at all: else the adapter carries rounding noise."""
    noisy = [record for record in results if record.resolution.verdict == "unresolved"]
    beyond = [
        record
        for record in results
        if record.resolution.signal_rank is not None and record.rank > record.resolution.signal_rank
    ]
    level: Level = "note"
    if all(record.method == "factored" for record in results):
        word = "yes: the factors are the update; no rounding of merged weights comes between"
    elif not beyond and not noisy:
        word = "yes: every direction in the adapter stands above the rounding of the files"
    else:
        level = "warning"
        more = (
            f"{len(beyond)} of {len(results)} weights have more directions than stand above the files' rounding noise"
        )
        word = f"partly: {more}; --signal writes only those that do"
        if all(record.resolution.signal_rank == 0 for record in results):
            word = "no: no direction stands above the files' rounding noise; save the fine-tune in float32, if you can"
        elif not beyond:
            word = f"no: {len(noisy)} are rounding noise"
    return say("resolved", "Resolution", word, level=level)


def _where(results: Results[Extraction]) -> str:
    """Split the whole change ‖Δ‖² into what the adapter carries, what its ranks cut off, and what is not in it."""
    parts = {
        "in the adapter": [math.sqrt(max(0.0, 1 - record.epsilon**2)) * record.fro for record in results],
        "cut off by rank": [min(1.0, record.epsilon) * record.fro for record in results],
        "stored in full": [item.fro or 0.0 for item in results.left_out if item.reason == "saved"],
        "not in it": [item.fro for item in results.left_out if item.fro and item.reason != "saved"],
    }
    norms = {words: math.hypot(*values) for words, values in parts.items()}
    total = math.hypot(*norms.values())
    if total == 0:
        return ""
    shares = ", ".join(f"{percent(min(1.0, (norm / total) ** 2))} {words}" for words, norm in norms.items() if norm)
    return f"of the whole change ‖Δ‖²{within(results.left_out)}, {shares}"


def _missing(results: Results[Extraction], tip: str = "; --rest save stores them") -> list[str]:
    """Return one line for every reason for which tensors are not in the adapter, with their share of ‖Δ‖²."""
    listed = results.run.settings.get("rest") == "list"
    total = math.hypot(*(record.fro for record in results), *(item.fro or 0.0 for item in results.left_out)) or 1.0
    groups: dict[tuple[str, str], list[LeftOut]] = {}
    for item in results.left_out:
        if item.reason not in {"saved", "non_finite"}:
            why = item.detail if item.reason in {"rank_0", "no_factors"} else ""
            groups.setdefault((item.reason, why), []).append(item)
    lines = []
    for (reason, why), items in groups.items():
        moved = math.hypot(*(item.fro or 0.0 for item in items))
        share = f", {percent((moved / total) ** 2)} of ‖Δ‖²" if moved else ""
        if why == ZERO:
            lines.append(f"{len(items)} that did not move: {_names(items)}")
            continue
        line = f"{len(items)} {REASONS[reason]}{share}"
        if reason == "vector":
            line += (tip if listed else "") if moved else " that did not move"
        elif reason != "not_selected":
            line += f": {_names(items)}"
        lines.append(f"{line} ({why})" if why else line)
    return lines


def _names(items: Sequence[LeftOut]) -> str:
    return named([item.layer for item in items])
