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
    command = "--checkpoint -o recovered/"
    command = command if values["output"] is None else f"recover {{base}} {{tuned}} {command}"
    return (
        Hint(command, "the estimate as a checkpoint; --rank R for an adapter")
        if is_measured
        else None
    )


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
    judged = [
        record
        for record in records
        if record.status != "refused" or record.fit_misplaced is not None
    ]
    return 2 * len(select_misfits(judged)) > len(judged)


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
        lead, level = (
            "yes: rounding hides part of the update, and part of it can be recovered",
            "note",
        )
    elif "size_only" in statuses:
        lead = "yes: the size of the update is estimated, and no direction is significant"
    elif "not_hidden" in statuses:
        lead, level = "no: the files resolve the update; use loradiag extract", "ok"
    else:
        lead = (
            "inconclusive: no entry changed, or no layer fits the model of an update that was "
            "rounded once"
        )
    counts = ", ".join(list_counts((record.status for record in records), STATUS))
    detail = (
        f"{counts} of {quantity(len(records))}; "
        f"{percent(median(r.unchanged for r in records))} unchanged"
    )
    return make_statement(
        "hidden", "Hidden update", lead, f"{detail} at the median", level=level, priority=0
    )


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
    return (
        f"{span(record.directions or 0 for record in recovered)} in each of "
        f"{quantity(len(recovered))}; r=16 holds at "
        f"least {percent(median(energies))} of ‖X‖² at the median"
    )


def _describe_refused(records: Sequence[Recovery]) -> Statement:
    refused = [record for record in records if record.status == "refused"]
    names = [f"{quantity(len(refused))}: {list_layers(refused)}"] if refused else []
    reasons = [f"{short(record.layer)}: {record.reason}" for record in refused[:1]]
    return make_statement("refused", "Refused", *names, *reasons, level="warning")


def _list_out_of_time(results: Results[Recovery]) -> list[str]:
    """Return the layers that a time limit left out."""
    return [item.layer for item in results.left_out if item.reason == "time"]


def _describe_written(results: Results[Recovery], folder: str) -> Statement:
    """State how many layers of the output are from the estimate and from the files, and which are
    not in it.
    """
    from_files, missing = (
        sum(record.written == "file" for record in results),
        _list_missing(results),
    )
    lead = f"{safe(folder)}: {quantity(_count_estimated(results))} from the estimate"
    lead += f", {from_files} from the stored difference" if from_files else ""
    if ranks := [record.rank for record in results if record.rank]:
        lead += (
            f"; rank {span(ranks)}, {count(sum(record.params for record in results))} parameters"
        )
    not_in_it = f"not in it: {list_names(missing)}" if missing else ""
    return make_statement("written", "Written", lead, not_in_it, priority=0)


def _count_estimated(results: Results[Recovery]) -> int:
    return sum(record.written == "posterior" for record in results)


def _list_missing(results: Results[Recovery]) -> list[str]:
    """Return the layers that an adapter does not hold; none of a checkpoint, which holds the
    numbers of TUNED there.
    """
    out_of_time = [] if results.run.settings.get("checkpoint") else _list_out_of_time(results)
    return [record.layer for record in results if record.written == "nothing"] + out_of_time


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
    sized = [r for r in results if r.written == "posterior" and r.fro_estimate is not None]
    estimated, observed = (
        math.hypot(*(getattr(r, name) for r in sized)) for name in ("fro_estimate", "fro")
    )
    missing, out_of_time = _list_missing(results), _list_out_of_time(results)
    source = code_span(subject(results.run))
    items = [
        f"{quantity(_count_estimated(results))} from the estimate: ‖X‖ = {number(estimated)}, and "
        "the files show ‖D‖ = "
        f"{number(observed)}{'; each is scaled to its ‖X‖' if keep_length else ''}",
        f"{quantity(sum(record.written == 'file' for record in results))} as the files have them",
        *([f"not in it: {list_names(missing, 12)}"] if missing else []),
        *(
            [f"not reached within the time limit: {list_names(out_of_time, 12)}"]
            if out_of_time
            else []
        ),
    ]
    body = [
        f"**This is an estimate.** {source} was stored with few mantissa bits, and rounding undid "
        f"most of a small update of {code_span(base_name)}. From the rounding cell of each stored "
        "weight loradiag estimates the update before rounding. It assumes that training kept "
        "float32 master weights, started at the base model, and was rounded once. Evaluate it "
        "before you use it.",
        "\n".join(f"- {item}" for item in items),
    ]
    return model_card(
        f"{'LoRA adapter' if is_adapter else 'Checkpoint'} recovered from the rounding of {source}",
        base_name,
        body,
        "recovery.jsonl",
        results.run.version,
        command,
        "peft" if is_adapter else "",
        is_adapter,
    )
