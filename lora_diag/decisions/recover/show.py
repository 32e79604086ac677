"""Terminal output of ``recover``, and the model card of its output."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median

from lora_diag.decisions.recover.record import STATUS, Recovery
from lora_diag.records import Results
from lora_diag.rendering.statements import (
    Level,
    Statement,
    compared,
    final_statements,
    left_out,
    make_statement,
    subject,
)
from lora_diag.rendering.tables import grids_table, record_grids
from lora_diag.rendering.text import count, list_names, number, percent, safe, short, span


def recovery_table(
    results: Results[Recovery],
    width: int = 80,
    color: bool = False,
    per: str = "type",
    next_command: str | None = None,
    folder: str | None = None,
) -> str:
    """Return the table and the summary of a run of ``recover``.

    Args:
        results: The records.
        width: Columns of the terminal; 80 are enough, 140 are used.
        color: Whether to use ANSI colours.
        per: ``type`` for one row a module type, ``layer`` for one row a layer.
        next_command: The command that a user would run next.
        folder: Where the adapter or the checkpoint is; None if none was written.
    """
    grids = record_grids(results, per)
    return grids_table(
        grids, [*recovery_lines(results), *_describe_written(results, folder)], width, color, next_command
    )


def recovery_lines(results: Results[Recovery]) -> list[Statement]:
    """Return the summary of a run of ``recover`` as statements."""
    lines = [compared(results)]
    records = list(results)
    if records:
        lines += [
            _describe_hidden(records),
            *_describe_size(records),
            *_describe_directions(records),
            *_describe_start(records),
            *_describe_refused(records),
        ]
        lines.append(
            make_statement(
                "assumption",
                "Assumption",
                "training kept float32 master weights, started at BASE, and was rounded once when TUNED was stored; "
                "intervals are of about 95% under the model (X = low rank + noise) and do not hold under others",
            )
        )
    return [*lines, *_describe_reached(results), left_out(results), *final_statements(results)]


def _select_status(records: Sequence[Recovery], *statuses: str) -> list[Recovery]:
    return [record for record in records if record.status in statuses]


def select_misfits(records: Iterable[Recovery]) -> list[Recovery]:
    """Return the layers whose changed entries do not look like one rounding of BASE + X."""
    return [record for record in records if record.status == "refused" and record.fit_misplaced is not None]


def is_lost(records: Iterable[Recovery]) -> bool:
    """Return whether most layers that were compared with the model, or resolved by the files, do not fit it."""
    judged = [record for record in records if record.status != "refused" or record.fit_misplaced is not None]
    return 2 * len(select_misfits(judged)) > len(judged)


def _describe_hidden(records: Sequence[Recovery]) -> Statement:
    counts: Counter[str] = Counter(record.status for record in records)
    parts = ", ".join(f"{counts[status]} {words}" for status, words in STATUS.items() if counts[status])
    unchanged = percent(median(record.unchanged for record in records))
    level: Level = "note"
    if is_lost(records):
        misfits = f"{len(select_misfits(records))} of {_count_matrices(len(records))}"
        lead = f"no: {misfits} do not look like one rounding; training in bf16 probably lost its steps"
        level = "warning"
    elif counts["recovered"]:
        lead = "yes: rounding hides part of the update, and part of it can be recovered"
    elif counts["size_only"]:
        lead, level = "yes: the size of the update is estimated, and no direction is significant", "warning"
    elif counts["not_hidden"]:
        lead, level = "no: the files resolve the update; use loradiag extract", "ok"
    elif all(record.unchanged == 1.0 for record in records):
        lead, level = "inconclusive: no entry changed, so nothing can be estimated", "warning"
    else:
        lead, level = "inconclusive: no layer fits the model of an update that was rounded once", "warning"
    details = [f"of {len(records)} matrices {parts}; {unchanged} unchanged at the median"]
    if is_lost(records):
        details.append("keep float32 master weights in training, or use stochastic rounding")
    return make_statement("hidden", "Hidden update", lead, *details, level=level)


def _describe_size(records: Sequence[Recovery]) -> list[Statement]:
    sized = [record for record in records if record.fro_estimate is not None and record.status != "not_hidden"]
    if not sized:
        return []
    estimated = math.hypot(*(record.fro_estimate or 0.0 for record in sized))
    observed = math.hypot(*(record.fro for record in sized))
    errors = [
        (record.fro_interval[1] - record.fro_interval[0]) / 2 / record.fro_estimate
        for record in sized
        if record.fro_interval is not None and record.fro_estimate
    ]
    line = (
        f"‖X‖ = {number(estimated)} estimated over {_count_matrices(len(sized))}, ± {percent(median(errors))} in the "
        f"median layer; the files show ‖D‖ = {number(observed)}, {number(observed / estimated)} times that"
    )
    return [make_statement("size", "Size", line)]


def _count_matrices(total: int) -> str:
    return f"{total} {'matrix' if total == 1 else 'matrices'}"


def _describe_directions(records: Sequence[Recovery]) -> list[Statement]:
    recovered = _select_status(records, "recovered")
    if not recovered:
        return []
    energies = [record.energy_estimate[str(16)] for record in recovered if record.energy_estimate is not None]
    file_energies = [energy for record in recovered if (energy := record.energy[str(16)]) is not None]
    directions = [record.directions or 0 for record in recovered]
    line = (
        f"{span(directions)} directions per matrix in {len(recovered)}; r=16 carries at least "
        f"{percent(median(energies))} of ‖X‖² at the median ({percent(median(file_energies))} of ‖D‖²)"
    )
    ranks = [record.rank_at_estimate["0.9"] for record in recovered if record.rank_at_estimate is not None]
    known = [rank for rank in ranks if rank is not None]
    shown_file = [record.rank_at["0.9"] or 0 for record in recovered]
    if known:
        ranks_line = (
            f"rank at 90%: {span(known)} in {len(known)} of {len(ranks)}, where the files read {span(shown_file)}"
        )
    else:
        ranks_line = f"rank at 90%: beyond the directions that can be seen; the files read {span(shown_file)}"
    return [make_statement("directions", "Directions", line, ranks_line)]


def _describe_start(records: Sequence[Recovery]) -> list[Statement]:
    known = [record for record in records if record.start is not None and record.status != "refused"]
    rounded = [record for record in known if record.start == "rounded"]
    if not known:
        return []
    if not rounded:
        return [
            make_statement(
                "start", "Start", "the stored BASE: more likely than a start that was rounded to it, in every layer"
            )
        ]
    line = (
        f"in {len(rounded)} of {len(known)} matrices BASE is more likely a rounded copy of the start of training, and "
        "the start is taken to lie anywhere in its cells"
    )
    return [make_statement("start", "Start", line)]


def _describe_refused(records: Sequence[Recovery]) -> list[Statement]:
    refused = _select_status(records, "refused")
    if not refused:
        return []
    first = refused[0]
    names = f"{_count_matrices(len(refused))}: {list_names([record.layer for record in refused])}"
    return [make_statement("refused", "Refused", names, f"{short(first.layer)}: {first.reason}", level="warning")]


def _list_out_of_time(results: Results[Recovery]) -> list[str]:
    """Return the layers that a time limit left out."""
    return [item.layer for item in results.left_out if item.reason == "time"]


def _describe_reached(results: Results[Recovery]) -> list[Statement]:
    out_of_time = _list_out_of_time(results)
    if not out_of_time:
        return []
    matrices = _count_matrices(len(out_of_time) + len(results))
    text = f"{len(out_of_time)} of {matrices} within --time; --resume measures them"
    return [make_statement("not_reached", "Not reached", text, level="warning")]


def _describe_written(results: Results[Recovery], folder: str | None) -> list[Statement]:
    if folder is None:
        return []
    from_estimate = [record for record in results if record.written == "posterior"]
    from_files = [record for record in results if record.written == "file"]
    missing = _list_missing(results)
    lines = [f"{safe(folder)}: {_count_matrices(len(from_estimate))} from the estimate"]
    if from_files:
        kinds = Counter(STATUS[record.status] for record in from_files)
        lines[0] += (
            f", {len(from_files)} from the stored difference ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})"
        )
    if any(record.rank for record in results):
        lines[0] += (
            f"; rank {span(r.rank for r in results if r.rank)}, {count(sum(r.params for r in results))} parameters"
        )
    if missing:
        lines.append(f"not in it: {list_names(missing)}")
    return [make_statement("written", "Written", *lines)]


def _list_missing(results: Results[Recovery]) -> list[str]:
    """Return the layers that an adapter does not hold; a checkpoint holds the numbers of TUNED instead."""
    out_of_time = [] if results.run.settings.get("full") else _list_out_of_time(results)
    return [record.layer for record in results if record.written == "nothing"] + out_of_time


def model_card(results: Results[Recovery], base_name: str, command: str, keep_length: bool = False) -> str:
    """Return the ``README.md`` of the folder.

    Args:
        results: The records.
        base_name: The base model.
        command: The command that wrote it.
        keep_length: Whether estimates were scaled to their norms.
    """
    is_adapter = any(record.rank for record in results)
    description = "LoRA adapter" if is_adapter else "Checkpoint"
    recovered = [record for record in results if record.written == "posterior"]
    from_files = [record for record in results if record.written == "file"]
    missing, out_of_time = _list_missing(results), _list_out_of_time(results)
    sized = [record for record in recovered if record.fro_estimate is not None]
    estimated = math.hypot(*(record.fro_estimate or 0.0 for record in sized))
    observed = math.hypot(*(record.fro for record in sized))
    lines = [
        "---",
        "base_model: '" + safe(base_name).replace("'", "''") + "'",
        *(["library_name: peft"] if is_adapter else []),
        "tags:",
        *(["- lora"] if is_adapter else []),
        "- loradiag",
        "---",
        "",
        f"# {description} recovered from the rounding of {_make_code_span(subject(results.run))}",
        "",
        f"**This is an estimate.** {_make_code_span(subject(results.run))} was stored with few mantissa bits, and "
        f"rounding undid most of a small update of {_make_code_span(base_name)}. From the rounding cell of each "
        "stored weight loradiag estimates the update before rounding. It assumes that training kept float32 "
        "master weights, started at the base model, and was rounded once. Evaluate it before you use it.",
        "",
        f"- {_count_matrices(len(recovered))} from the estimate: ‖X‖ = {number(estimated)}, and the files show ‖D‖ = "
        f"{number(observed)}{'; each is scaled to its ‖X‖' if keep_length else ''}",
        f"- {_count_matrices(len(from_files))} as the files have them",
        *([f"- not in it: {list_names(missing, 12)}"] if missing else []),
        *([f"- not reached within the time limit: {list_names(out_of_time, 12)}"] if out_of_time else []),
        "",
        f"Made by loradiag {results.run.version}; `recovery.jsonl` has the numbers of every weight:",
        "",
        f"    {safe(command)}",
        "",
    ]
    return "\n".join(lines)


def _make_code_span(text: str) -> str:
    return f"`{safe(text).replace('`', chr(39))}`"
