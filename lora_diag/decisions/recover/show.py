"""Terminal output of ``recover``, and the model card of its output."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from lora_diag.decisions.recover.record import STATUS, Recovery
from lora_diag.errors import DONE, INCONCLUSIVE
from lora_diag.feature import Hint
from lora_diag.records import Results
from lora_diag.rendering.html import code_span, model_card
from lora_diag.rendering.statements import (
    Level,
    Statement,
    describe_estimate,
    describe_lineage,
    is_unrelated,
    make_statement,
    subject,
    summarize,
)
from lora_diag.rendering.text import (
    count,
    list_counts,
    list_layers,
    list_names,
    number,
    percent,
    quantity,
    safe,
    short,
    span,
)


def recovery_lines(results: Results[Recovery], output: Path | str | None = None) -> list[Statement]:
    """Return the summary of a run of ``recover`` as statements.

    Args:
        results: The records.
        output: The output of the run, named if it is the folder of an adapter or checkpoint.
    """
    records, findings = results.layers, []
    if records:
        hidden = [(record, record.fro) for record in records if record.status != "not_hidden"]
        assumption = (
            "training kept float32 master weights, started at BASE, and was rounded once when "
            "TUNED was stored; intervals hold at about 95% if so"
        )
        findings = [
            describe_lineage(records),
            _describe_hidden(records),
            make_statement("size", "Size", *describe_estimate(hidden)),
            make_statement("directions", "Directions", _describe_directions(records)),
            _describe_refused(records),
            make_statement("assumption", "Assumption", assumption, priority=2),
        ]
    if writes_folder(results) and output is not None:
        findings.append(_describe_written(results, str(output)))
    return summarize(results, *findings)


def writes_folder(results: Results[Recovery]) -> bool:
    """Return whether a run writes an adapter or a checkpoint."""
    return any(
        results.run.settings.get(name) for name in ("rank", "energy", "params", "checkpoint")
    )


def exit_code(results: Results[Recovery]) -> int:
    """Return the exit code of ``recover``: inconclusive if all layers are refused, or as
    ``is_lost`` says.

    ``DONE`` if a layer could not be measured, for which the caller has its own code.
    """
    is_measured = any(record.status != "refused" for record in results)
    return DONE if results.unmeasured or (is_measured and not is_lost(results)) else INCONCLUSIVE


def suggest_next(results: Results[Recovery], values: Mapping[str, Any]) -> Hint | None:
    """Return the next step; None without one.

    After a written folder: its loss. Else a checkpoint of the estimate, or ``extract`` if there is
    no usable one.
    """
    is_measured = any(record.status != "refused" for record in results)
    is_estimated = any(record.status in ("recovered", "size_only") for record in results)
    if writes_folder(results):
        hint = Hint(
            "probe outputs {base} {tuned} {output} --eval held_out.txt",
            "whether the estimate is better",
        )
        return hint if is_measured else None
    if is_lost(results) or (is_measured and not is_estimated):
        return Hint(
            "extract {base} {tuned} --rank 16 -o adapter/",
            "the best adapter of the files' difference",
        )
    if not is_measured:
        return None
    command = "--checkpoint -o recovered/"
    if values["output"] is not None:
        command = f"recover {{base}} {{tuned}} {command}"
    return Hint(command, "the estimate as a checkpoint; --rank R for an adapter")


def select_misfits(records: Iterable[Recovery]) -> list[Recovery]:
    """Return the layers whose changed entries do not look like one rounding of BASE + X."""
    return [
        record
        for record in records
        if record.status == "refused" and record.fit_misplaced is not None
    ]


def is_lost(records: Iterable[Recovery]) -> bool:
    """Return whether most layers that were compared with the model, or resolved by the files, do
    not fit it.
    """
    records = list(records)
    misfits = len(select_misfits(records))
    fitting = sum(record.status != "refused" for record in records)
    return misfits > fitting


def _describe_hidden(records: Sequence[Recovery]) -> Statement:
    """State whether rounding hides an update that can be recovered, with the numbers of layers by
    status.
    """
    statuses = {record.status for record in records}
    level: Level = "warning"
    if is_unrelated(records):
        lead = "not known: the difference of unrelated weights is no update"
    elif is_lost(records):
        lead = (
            f"no: {len(select_misfits(records))} of {quantity(len(records))} do not look like one "
            "rounding; training in bf16 probably lost its steps: keep float32 master weights, or "
            "use stochastic rounding"
        )
    elif "recovered" in statuses:
        lead = "yes: rounding hides part of the update, and part of it can be recovered"
        level = "note"
    elif "size_only" in statuses:
        lead = "yes: the size of the update is estimated, and no direction is significant"
    elif "not_hidden" in statuses:
        lead = "no: the files resolve the update; use loradiag extract"
        level = "ok"
    else:
        lead = (
            "inconclusive: no entry changed, or no layer fits the model of an update that was "
            "rounded once"
        )
    counts = ", ".join(list_counts((record.status for record in records), STATUS))
    unchanged = percent(median(record.unchanged for record in records))
    detail = f"{counts} of {quantity(len(records))}; {unchanged} unchanged at the median"
    return make_statement("hidden", "Hidden update", lead, detail, level=level, priority=0)


def _describe_directions(records: Sequence[Recovery]) -> str:
    """State the number of recovered directions, and the energy fraction of an adapter
    of rank 16.
    """
    recovered = [record for record in records if record.status == "recovered"]
    energies = [
        record.energy_estimate["16"] for record in recovered if record.energy_estimate is not None
    ]
    if not energies:
        return ""
    directions = span(record.directions or 0 for record in recovered)
    return (
        f"{directions} in each of {quantity(len(recovered))}; r=16 holds at least "
        f"{percent(median(energies))} of ‖X‖² at the median"
    )


def _describe_refused(records: Sequence[Recovery]) -> Statement:
    refused = [record for record in records if record.status == "refused"]
    if not refused:
        return make_statement("refused", "Refused")
    names = f"{quantity(len(refused))}: {list_layers(refused)}"
    reason = f"{short(refused[0].layer)}: {refused[0].reason}"
    return make_statement("refused", "Refused", names, reason, level="warning")


def _list_out_of_time(results: Results[Recovery]) -> list[str]:
    """Return the layers that a time limit left out."""
    return [item.layer for item in results.left_out if item.reason == "time"]


def _describe_written(results: Results[Recovery], folder: str) -> Statement:
    """State how many layers of the output are from the estimate and from the files, and which are
    not in it.
    """
    lead = f"{safe(folder)}: {quantity(_count_written(results, 'posterior'))} from the estimate"
    if from_files := _count_written(results, "file"):
        lead += f", {from_files} from the stored difference"
    if ranks := [record.rank for record in results if record.rank]:
        params = sum(record.params for record in results)
        lead += f"; rank {span(ranks)}, {count(params)} parameters"
    missing = _list_missing(results)
    not_in_it = f"not in it: {list_names(missing)}" if missing else ""
    return make_statement("written", "Written", lead, not_in_it, priority=0)


def _count_written(results: Results[Recovery], source: str) -> int:
    return sum(record.written == source for record in results)


def _list_missing(results: Results[Recovery]) -> list[str]:
    """Return the layers that an adapter does not hold; none of a checkpoint, which holds the
    numbers of TUNED there.
    """
    missing = [record.layer for record in results if record.written == "nothing"]
    if not results.run.settings.get("checkpoint"):
        missing += _list_out_of_time(results)
    return missing


def recovery_card(
    results: Results[Recovery], base_name: str, command: str, keep_length: bool = False
) -> str:
    """Return the ``README.md`` of the folder.

    Args:
        results: The records.
        base_name: The base model.
        command: The command that wrote it.
        keep_length: Whether estimates were scaled to their norms.
    """
    is_adapter = any(record.rank for record in results)
    sized = [
        (record.fro_estimate, record.fro)
        for record in results
        if record.written == "posterior" and record.fro_estimate is not None
    ]
    estimated = number(math.hypot(*(fro for fro, _ in sized)))
    observed = number(math.hypot(*(fro for _, fro in sized)))
    scaled = "; each is scaled to its ‖X‖" if keep_length else ""
    source = code_span(subject(results.run))
    items = [
        f"{quantity(_count_written(results, 'posterior'))} from the estimate: ‖X‖ = {estimated}, "
        f"and the files show ‖D‖ = {observed}{scaled}",
        f"{quantity(_count_written(results, 'file'))} as the files have them",
    ]
    if missing := _list_missing(results):
        items.append(f"not in it: {list_names(missing, 12)}")
    if out_of_time := _list_out_of_time(results):
        items.append(f"not reached within the time limit: {list_names(out_of_time, 12)}")
    body = [
        f"**This is an estimate.** {source} was stored with few mantissa bits, and rounding undid "
        f"most of a small update of {code_span(base_name)}. From the rounding cell of each stored "
        "weight loradiag estimates the update before rounding. It assumes that training kept "
        "float32 master weights, started at the base model, and was rounded once. Evaluate it "
        "before you use it.",
        "\n".join(f"- {item}" for item in items),
    ]
    kind = "LoRA adapter" if is_adapter else "Checkpoint"
    return model_card(
        f"{kind} recovered from the rounding of {source}",
        base_name,
        body,
        "recovery.jsonl",
        results.run.version,
        command,
        "peft" if is_adapter else "",
        is_adapter,
    )
