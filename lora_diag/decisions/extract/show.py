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
    results: Results[Extraction],
    base_name: str,
    command: str,
    rate: str | None = None,
    measured: str = "",
) -> str:
    """Return the ``README.md`` of an adapter folder.

    Args:
        results: Records of the written adapter.
        base_name: The base model.
        command: The command that wrote it.
        rate: The learning rate for further training, and its source; None to omit it.
        measured: How directions were chosen by their gain, and the measured losses; else empty.
    """
    layers = results.layers
    weighted = any(record.data for record in results)
    method = "truncated singular value decomposition"
    if measured:
        method = "choice of singular directions"
    if weighted:
        method = "truncation in the metric of activations"
    body = [
        f"The {method} of ΔW = W_tuned − W_base, {quantity(len(results), 'weight')} of "
        f"{code_span(base_name)}, {_describe_size(results)} parameters, scaling 1. It keeps "
        f"{percent(pooled_energy(layers))} of the energy ‖ΔW‖² of these weights, at a "
        f"distance of ε = {number(pooled(layers, 'epsilon'))} (‖ΔW − BA‖ / ‖ΔW‖, measured "
        "on the factors in the file); the lower bound for adapters of these ranks is "
        f"{number(pooled(layers, 'least_epsilon'))}."
    ]
    if measured:
        body.append(measured)
    if length := _describe_length(results):
        body.append(f"It is {length}.")
    if estimate := _describe_estimate(results):
        body.append(f"**Part of it is an estimate**: {estimate}.")
    if weighted:
        body.append("\n".join(_describe_errors_on_data(results)))
    body.append(_card_table(results))
    if rate is not None:
        body.append(f"Learning rate for further training: {code_span(rate)}.")
    if in_full := _describe_full_tensors(results):
        body += ["In addition to the factors:", "\n".join(f"- {line}" for line in in_full)]
    if missing := _describe_missing(results):
        body += ["Not included:", "\n".join(f"- {line}" for line in missing)]
    library, usage = _USAGE[str(results.run.settings.get("format", "peft"))]
    return model_card(
        f"LoRA adapter extracted from {code_span(subject(results.run))}",
        base_name,
        [*body, usage],
        "extraction.jsonl",
        results.run.version,
        command,
        library,
    )


def _card_table(results: Results[Extraction]) -> str:
    lines = [
        "| modules | layers | rank | energy kept | ε | lower bound on ε |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, group in rows_of(results, "type"):
        lines.append(
            f"| `{name}` | {len(group)} | {span(record.rank for record in group)} | "
            f"{percent(pooled_energy(group))} | {number(pooled(group, 'epsilon'))} | "
            f"{number(pooled(group, 'least_epsilon'))} |"
        )
    return "\n".join(lines)


def _describe_size(results: Results[Extraction]) -> str:
    """Return the range of ranks, and the number of parameters, both as written."""
    ranks = [record.rank for record in results]
    if not results.run.settings.get("portable") or min(ranks) == max(ranks):
        return f"rank {span(ranks)}, {count(sum(record.params for record in results))}"
    params = max(ranks) * sum(sum(record.shape) for record in results)
    return f"rank {max(ranks)} (padded from {span(ranks)}), {count(params)}"


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
    place = "" if output is None else f"{safe(str(output))}: "
    size = f"{quantity(len(results), 'weight')}, {_describe_size(results)} parameters"
    return [f"{place}{size} in {results.layers[0].dtype}", *_describe_full_tensors(results)]


def _describe_full_tensors(results: Results[Extraction]) -> list[str]:
    """State which tensors are stored in full, if any, and how to prepare the base model before
    loading.
    """
    rows_by_tensor: Counter[str] = Counter()  # rows of a table that both sides have, and added rows
    resized = set()
    for item in results.left_out:
        if item.reason == "saved":
            rows_by_tensor[item.layer] += item.shape[0]
            if "vocabulary" in item.detail:
                resized.add(item.layer)
    lines = []
    if rows_by_tensor:
        lines.append(f"stored in full: {list_names(sorted(rows_by_tensor))}")
    if resized:
        sizes = ", ".join(map(str, sorted({rows_by_tensor[name] for name in resized})))
        lines.append(f"before loading: base_model.resize_token_embeddings({sizes})")
    return lines


def _describe_errors(results: Results[Extraction]) -> list[str]:
    """State the energy kept, ε, and its lower bound or the error on data."""
    layers = results.layers
    kept = f"{percent(pooled_energy(layers))} of the energy ‖ΔW‖² of these weights is kept"
    epsilon = f"ε = {number(pooled(layers, 'epsilon'))}"
    if any(record.data for record in results):
        return [f"{kept} ({epsilon})", *_describe_errors_on_data(results)]
    floor = number(pooled(layers, "least_epsilon"))
    return [f"{kept} ({epsilon}; lower bound for these ranks {floor})", _describe_length(results)]


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
    if plain:
        lines.append(f"Without activations, and optimal for the weights: {list_layers(plain)}.")
    return lines


def _describe_resolution(results: Results[Extraction]) -> Statement:
    """State whether the adapter holds rounding noise of the files."""
    noisy = sum(_has_noise(record) for record in results)
    if all(record.method == "factored" for record in results):
        return make_statement("resolved", "Resolution", FACTORED, priority=2)
    if not noisy:
        text = (
            "yes: every direction in the adapter is above the rounding of the files, or estimated"
        )
        return make_statement("resolved", "Resolution", text, priority=2)
    text = f"{noisy} of {len(results)} weights have directions below the files' rounding noise; "
    if any(record.resolution.signal_rank != 0 for record in results):
        text += "--signal writes only those above"
    else:
        text += "none is above: save the fine-tune in float32"
    return make_statement("resolved", "Resolution", text, level="warning", priority=2)


def _has_noise(record: Extraction) -> bool:
    """Return whether some of a layer's directions are below the files' rounding noise."""
    if record.estimated:
        return False
    limit = record.resolution.signal_rank
    is_above = limit is not None and record.rank > limit
    return is_above or record.resolution.verdict == "unresolved"


def _describe_estimate(results: Results[Extraction]) -> str:
    """State the number of weights whose update is an estimate; empty without one."""
    estimated = sum(record.estimated for record in results)
    if not estimated:
        return ""
    weights = quantity(estimated, "weight")
    return f"the estimated update before rounding in {weights}; ε is measured against it"


def _describe_missing(results: Results[Extraction]) -> list[str]:
    """Return one line per reason for tensors that are not in the adapter, with their fraction of
    ‖Δ‖² if known.

    Entries that are not finite are reported elsewhere.
    """
    skipped = (item.fro or 0.0 for item in results.left_out)
    total = math.hypot(*(record.fro for record in results), *skipped)
    groups: dict[tuple[str, str], list[LeftOut]] = {}
    for item in results.left_out:
        if item.reason not in {"saved", "non_finite"}:
            why = item.detail if item.reason in {"rank_0", "no_factors"} else ""
            groups.setdefault((item.reason, why), []).append(item)
    whole = f"‖Δ‖²{qualify_fractions(results.left_out)}"
    lines = []
    for (reason, why), items in groups.items():
        norm = math.hypot(*(item.fro or 0.0 for item in items))
        line = f"{len(items)} {REASONS[reason]}"
        if norm:
            line += f", {percent((norm / total) ** 2)} of {whole}"
        if reason == "vector" and norm and results.run.settings.get("unfactored") == "list":
            line += "; --unfactored save stores them"
        elif reason not in EXPECTED:
            line += f": {list_layers(items)}"
        lines.append(f"{line} ({why})" if why else line)
    return lines
