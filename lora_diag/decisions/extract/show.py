"""Terminal output of ``extract``, and the model card of the adapter."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from lora_diag.decisions.extract.record import Extraction, pooled, pooled_data, pooled_energy
from lora_diag.records import LeftOut, Results
from lora_diag.rendering.html import code_span, model_card
from lora_diag.rendering.statements import (
    EXPECTED,
    FACTORED,
    REASONS,
    Statement,
    left_out_level,
    make_statement,
    qualify_fractions,
    subject,
    summarize,
)
from lora_diag.rendering.tables import rows_of
from lora_diag.rendering.text import (
    count,
    format_shown,
    list_layers,
    list_names,
    number,
    percent,
    quantity,
    safe,
    span,
)

# Format of an adapter -> the library in the card's metadata, and how the adapter is loaded.
_USAGE = {
    "peft": (
        "peft",
        "```python\nfrom peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base_model, "
        '"THIS_FOLDER")\n```',
    ),
    "kohya": ("", "`lora.safetensors` is in the layout of kohya's sd-scripts."),
    "diffusers": ("diffusers", '```python\npipeline.load_lora_weights("THIS_FOLDER")\n```'),
    "mlx": (
        "mlx",
        "```python\nfrom mlx_lm import load\n\nmodel, tokenizer = load(base_model, "
        'adapter_path="THIS_FOLDER")\n```',
    ),
    "gguf": ("", "```console\nllama-cli -m BASE.gguf --lora THIS_FOLDER/adapter.gguf\n```"),
}


def extraction_card(
    results: Results[Extraction], base_name: str, command: str, rate: str | None = None
) -> str:
    """Return the ``README.md`` of an adapter folder.

    Args:
        results: Records of the written adapter.
        base_name: The base model.
        command: The command that wrote it.
        rate: The learning rate for further training, and its source; None to omit it.
    """
    table = [
        "| modules | layers | rank | energy kept | ε | lower bound on ε |",
        "|---|---:|---:|---:|---:|---:|",
        *(
            f"| `{name}` | {len(group)} | {span(record.rank for record in group)} | "
            f"{percent(pooled_energy(group))} | "
            f"{number(pooled(group, 'epsilon'))} | {number(pooled(group, 'least_epsilon'))} |"
            for name, group in rows_of(results, "type")
        ),
    ]
    weighted = any(record.data for record in results)
    method = (
        "truncation in the metric of activations"
        if weighted
        else "truncated singular value decomposition"
    )
    library, usage = _USAGE[str(results.run.settings.get("format", "peft"))]
    in_full, missing = _describe_full_tensors(results), _describe_missing(results)
    body = [
        f"The {method} of ΔW = W_tuned − W_base, {quantity(len(results), 'weight')} of "
        f"{code_span(base_name)}, rank {span(record.rank for record in results)}, "
        f"{count(sum(r.params for r in results))} parameters, scaling 1. It keeps "
        f"{percent(pooled_energy(results.layers))} of the energy ‖ΔW‖² of these weights, at a "
        f"distance of ε = {number(pooled(results.layers, 'epsilon'))} (‖ΔW − BA‖ / ‖ΔW‖, measured "
        "on the factors in the file); the lower bound for adapters of these ranks is "
        f"{number(pooled(results.layers, 'least_epsilon'))}.",
        f"It is {length}." if (length := _describe_length(results)) else "",
        f"**Part of it is an estimate**: {estimate}."
        if (estimate := _describe_estimate(results))
        else "",
        "\n".join(_describe_errors_on_data(results) if weighted else ()),
        "\n".join(table),
        f"Learning rate for further training: {code_span(rate)}." if rate is not None else "",
        *(
            ["In addition to the factors:", "\n".join(f"- {line}" for line in in_full)]
            if in_full
            else []
        ),
        *(["Not included:", "\n".join(f"- {line}" for line in missing)] if missing else []),
        usage,
    ]
    return model_card(
        f"LoRA adapter extracted from {code_span(subject(results.run))}",
        base_name,
        [part for part in body if part],
        "extraction.jsonl",
        results.run.version,
        command,
        library,
    )


def extraction_lines(
    results: Results[Extraction], output: Path | str | None = None
) -> list[Statement]:
    """Return the summary of an extraction as statements.

    Args:
        results: Records of the written adapter.
        output: Folder of the adapter; None to omit its name.
    """
    findings = []
    if len(results):
        findings = [
            make_statement("wrote", "Written", *_describe_written(results, output), priority=0),
            make_statement("price", "Error", *_describe_errors(results), priority=0),
            _describe_resolution(results),
            make_statement("estimated", "Estimate", _describe_estimate(results)),
        ]
    missing = _describe_missing(results) or ["nothing: every changed tensor is in the adapter"]
    level = left_out_level(results, "saved", "rank_0", "no_factors", "non_finite")
    not_in_it = make_statement("not_in_it", "Not included", *missing, level=level, priority=2)
    return summarize(results, *findings, skipped=not_in_it)


def _describe_written(results: Results[Extraction], output: Path | str | None) -> list[str]:
    return [
        f"{'' if output is None else f'{safe(str(output))}: '}{quantity(len(results), 'weight')}, "
        f"rank {span(record.rank for record in results)}, {count(sum(r.params for r in results))} "
        f"parameters in {results.layers[0].dtype}",
        *_describe_full_tensors(results),
    ]


def _describe_full_tensors(results: Results[Extraction]) -> list[str]:
    """State which tensors are stored in full, if any, and how to prepare the base model before
    loading.
    """
    rows_by_tensor: Counter[str] = Counter()  # rows of a table that both sides have, and added rows
    resized = set()
    for item in results.left_out:
        if item.reason == "saved":
            rows_by_tensor[item.layer] += item.shape[0]
            resized |= {item.layer} if "vocabulary" in item.detail else set()
    sizes = ", ".join(map(str, sorted({rows_by_tensor[name] for name in resized})))
    return [
        *([f"stored in full: {list_names(sorted(rows_by_tensor))}"] if rows_by_tensor else []),
        *([f"before loading: base_model.resize_token_embeddings({sizes})"] if resized else []),
    ]


def _describe_errors(results: Results[Extraction]) -> list[str]:
    """State the energy kept, ε, and its lower bound or the error on data."""
    epsilon, floor = (
        number(pooled(results.layers, field)) for field in ("epsilon", "least_epsilon")
    )
    kept = (
        f"{percent(pooled_energy(results.layers))} of the energy ‖ΔW‖² of these weights is kept (ε "
        f"= {epsilon}"
    )
    if any(record.data for record in results):
        return [f"{kept})", *_describe_errors_on_data(results)]
    return [f"{kept}; lower bound for these ranks {floor})", _describe_length(results)]


def _describe_length(results: Results[Extraction]) -> str:
    """State that the factors are not the nearest update of their rank, but lengthened; empty if
    they are not.
    """
    factors = [record.lengthened for record in results if record.lengthened is not None]
    if not factors:
        return ""
    text = f"lengthened to ‖ΔW‖, {min(factors):.3g} to {max(factors):.3g} times"
    return (
        f"{text}: not the nearest update of this rank, which has ε = "
        f"{number(pooled(results.layers, 'epsilon_min'))}"
    )


def _describe_errors_on_data(results: Results[Extraction]) -> list[str]:
    """State the error in the metric for which the factors are optimal, and layers without it."""
    weighted = [record for record in results if record.data]
    plain = [record for record in results if not record.data]
    objective, norm = "the outputs on the text of the activations", "√(E‖(ΔW − BA)x‖² / E‖ΔW x‖²)"
    if any(record.data and record.data.metric == "kfac" for record in weighted):
        objective, norm = "the loss on that text, by K-FAC", "‖G^½(ΔW − BA)C^½‖ / ‖G^½·ΔW·C^½‖"
    lines = [
        f"Optimal for {objective}: {norm} = {format_shown(pooled_data(weighted, 'epsilon'))} in "
        f"the {len(weighted)} weights with activations; the lower bound for these ranks is "
        f"{format_shown(pooled_data(weighted, 'least_epsilon'))}. The cost is a larger ε; "
        f"truncation has {number(pooled(results.layers, 'epsilon_min'))}."
    ]
    return lines + (
        [f"Without activations, and optimal for the weights: {list_layers(plain)}."]
        if plain
        else []
    )


def _describe_resolution(results: Results[Extraction]) -> Statement:
    """State whether the adapter holds rounding noise of the files."""
    noisy = [
        record
        for record in results
        if not record.estimated
        and (
            record.resolution.verdict == "unresolved"
            or ((limit := record.resolution.signal_rank) is not None and record.rank > limit)
        )
    ]
    text = "yes: every direction in the adapter is above the rounding of the files, or estimated"
    if all(record.method == "factored" for record in results):
        text, noisy = FACTORED, []
    elif noisy:
        text = (
            f"{len(noisy)} of {len(results)} weights have directions below the files' rounding "
            "noise; "
        )
        has_signal = any(record.resolution.signal_rank != 0 for record in results)
        text += (
            "--signal writes only those above"
            if has_signal
            else "none is above: save the fine-tune in float32"
        )
    return make_statement(
        "resolved", "Resolution", text, level="warning" if noisy else "note", priority=2
    )


def _describe_estimate(results: Results[Extraction]) -> str:
    """State the number of weights whose update is an estimate; empty without one."""
    estimated = sum(record.estimated for record in results)
    text = (
        f"the estimated update before rounding in {quantity(estimated, 'weight')}; ε is "
        "measured against it"
    )
    return text if estimated else ""


def _describe_missing(results: Results[Extraction]) -> list[str]:
    """Return one line per reason for tensors that are not in the adapter, with their fraction of
    ‖Δ‖² if known.

    Entries that are not finite are reported elsewhere.
    """
    total = (
        math.hypot(
            *(record.fro for record in results), *(item.fro or 0.0 for item in results.left_out)
        )
        or 1.0
    )
    groups: dict[tuple[str, str], list[LeftOut]] = {}
    for item in results.left_out:
        if item.reason not in {"saved", "non_finite"}:
            why = item.detail if item.reason in {"rank_0", "no_factors"} else ""
            groups.setdefault((item.reason, why), []).append(item)
    whole, lines = f"‖Δ‖²{qualify_fractions(results.left_out)}", []
    for (reason, why), items in groups.items():
        norm = math.hypot(*(item.fro or 0.0 for item in items))
        line = f"{len(items)} {REASONS[reason]}" + (
            f", {percent((norm / total) ** 2)} of {whole}" if norm else ""
        )
        if reason == "vector" and norm and results.run.settings.get("unfactored") == "list":
            line += "; --unfactored save stores them"
        elif reason not in EXPECTED:
            line += f": {list_layers(items)}"
        lines.append(f"{line} ({why})" if why else line)
    return lines
