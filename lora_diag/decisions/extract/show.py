"""Terminal output of ``extract``, and the model card of the adapter."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from lora_diag.decisions.extract.record import Extraction, pooled, pooled_data, pooled_energy
from lora_diag.records import LeftOut, Results
from lora_diag.rendering.html import code_span, model_card
from lora_diag.rendering.statements import (
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
    short,
    span,
)

# Reason of a layer without factors if ΔW = 0, as recorded.
ZERO = "its update is zero"

# Format of an adapter -> the library in the card's metadata, and how the adapter is loaded.
_USAGE = {
    "peft": (
        "peft",
        '```python\nfrom peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base_model, "THIS_FOLDER")\n```',
    ),
    "kohya": ("", "`lora.safetensors` is in the layout of kohya's sd-scripts."),
    "diffusers": ("diffusers", '```python\npipeline.load_lora_weights("THIS_FOLDER")\n```'),
    "mlx": (
        "mlx",
        '```python\nfrom mlx_lm import load\n\nmodel, tokenizer = load(base_model, adapter_path="THIS_FOLDER")\n```',
    ),
    "gguf": ("", "```console\nllama-cli -m BASE.gguf --lora THIS_FOLDER/adapter.gguf\n```"),
}

# Fraction of the lower bound by which ε must exceed it to be attributed to the dtype.
_VISIBLE = 1e-3


def extraction_card(results: Results[Extraction], base_name: str, command: str, rate: str | None = None) -> str:
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
            f"| `{name}` | {len(group)} | {span(record.rank for record in group)} | {percent(pooled_energy(group))} | "
            f"{number(pooled(group, 'epsilon'))} | {number(pooled(group, 'least_epsilon'))} |"
            for name, group in rows_of(results, "type")
        ),
    ]
    weighted = any(record.data for record in results)
    method = "truncation in the metric of activations" if weighted else "truncated singular value decomposition"
    library, usage = _USAGE[str(results.run.settings.get("format", "peft"))]
    in_full, missing = _describe_full_tensors(results), _describe_missing(results, hint="")
    body = [
        f"The {method} of ΔW = W_tuned − W_base, {quantity(len(results), 'weight')} of {code_span(base_name)}, rank "
        f"{span(record.rank for record in results)}, {_count_params(results)} parameters, scaling 1. "
        f"It keeps {percent(pooled_energy(results.layers))} of the energy ‖ΔW‖² of these weights, at a distance of "
        f"ε = {number(pooled(results.layers, 'epsilon'))} (‖ΔW − BA‖ / ‖ΔW‖, measured on the factors in the file); "
        f"the lower bound for adapters of these ranks is {number(pooled(results.layers, 'least_epsilon'))}.",
        f"**Part of it is an estimate.** {_describe_estimates(results).lead}."
        if any(record.estimated for record in results)
        else "",
        "\n".join(_describe_errors_on_data(results) if weighted else ()),
        "\n".join(table),
        f"Learning rate for further training: {code_span(rate)}." if rate is not None else "",
        *(["In addition to the factors:", "\n".join(f"- {line}" for line in in_full)] if in_full else []),
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


def _count_params(results: Results[Extraction]) -> str:
    return count(sum(record.params for record in results))


def extraction_lines(results: Results[Extraction], output: Path | str | None = None) -> list[Statement]:
    """Return the summary of an extraction as statements.

    Args:
        results: Records of the written adapter.
        output: Folder of the adapter; None to omit its name.
    """
    folder = None if output is None else str(output)
    findings = []
    if len(results):
        findings = [
            make_statement("wrote", "Written", *_describe_written(results, folder), priority=0),
            make_statement("price", "Error", *_describe_errors(results), priority=0),
            _describe_resolution(results),
            _describe_estimates(results),
        ]
    missing = _describe_missing(results) or ["nothing: every changed tensor is in the adapter"]
    level = left_out_level(results, "saved", "rank_0", "no_factors", "non_finite")
    return summarize(
        results,
        *findings,
        make_statement("where", "Location", _describe_energy_split(results)),
        skipped=make_statement("not_in_it", "Not included", *missing, level=level, priority=2),
    )


def _describe_written(results: Results[Extraction], folder: str | None) -> list[str]:
    to = f"{safe(folder)}: " if folder else ""
    tables = sum(record.kind == "embedding" for record in results)
    return [
        f"{to}{quantity(len(results), 'weight')}{f' ({tables} of them embeddings)' if tables else ''}, rank "
        f"{span(record.rank for record in results)}, {_count_params(results)} parameters in {results.layers[0].dtype}",
        *_describe_full_tensors(results),
    ]


def _describe_full_tensors(results: Results[Extraction]) -> list[str]:
    """State which tensors are stored in full, if any, and how to prepare the base model before loading."""
    rows_by_tensor: Counter[str] = Counter()  # rows of a table that both sides have, and added rows
    resized = set()
    for item in results.left_out:
        if item.reason == "saved":
            rows_by_tensor[item.layer] += item.shape[0]
            resized |= {item.layer} if "vocabulary" in item.detail else set()
    names = sorted(rows_by_tensor)
    if not names:
        return []
    lines = [f"stored in full: {list_names(names)}"]
    if resized:
        sizes = ", ".join(str(size) for size in sorted({rows_by_tensor[name] for name in resized}))
        lines.append(f"before loading: base_model.resize_token_embeddings({sizes})")
    return lines


def _describe_errors(results: Results[Extraction]) -> list[str]:
    """State ε, its excess over the lower bound or the error on data, and the layer with the largest ε."""
    epsilon, floor = pooled(results.layers, "epsilon"), pooled(results.layers, "least_epsilon")
    truncated, kept = pooled(results.layers, "epsilon_min"), percent(pooled_energy(results.layers))
    lines = [f"{kept} of the energy ‖ΔW‖² of these weights is kept (ε = {number(epsilon)})"]
    if any(record.data for record in results):
        lines += _describe_errors_on_data(results)
    else:
        lines.append(
            f"within {_round_up(epsilon - floor)} of the smallest ε of any adapter of these ranks (Eckart-Young)"
        )
        if epsilon > truncated * (1 + _VISIBLE) and epsilon > 1e-6:
            lines.append(f"rounding to {results.layers[0].dtype} adds {number(epsilon - truncated)} of that")
    worst = max(results, key=lambda record: record.epsilon)
    return [*lines, f"most {number(worst.epsilon)} in {short(worst.layer)} (rank {worst.rank})"]


def _describe_errors_on_data(results: Results[Extraction]) -> list[str]:
    """State the error in the metric for which the factors are optimal, and layers without it."""
    weighted = [record for record in results if record.data]
    plain = [record for record in results if not record.data]
    objective, norm = "the outputs on the text of the activations", "√(E‖(ΔW − BA)x‖² / E‖ΔW x‖²)"
    if any(record.data and record.data.metric == "kfac" for record in weighted):
        objective, norm = "the loss on that text, by K-FAC", "‖G^½(ΔW − BA)C^½‖ / ‖G^½·ΔW·C^½‖"
    lines = [
        f"Optimal for {objective}: {norm} = {format_shown(pooled_data(weighted, 'epsilon'))} in the {len(weighted)} "
        f"weights with activations; the lower bound for these ranks is "
        f"{format_shown(pooled_data(weighted, 'least_epsilon'))}. The cost is a larger ε; truncation has "
        f"{number(pooled(results.layers, 'epsilon_min'))}."
    ]
    return lines + ([f"Without activations, and optimal for the weights: {list_layers(plain)}."] if plain else [])


def _round_up(value: float) -> str:
    """Return an upper bound with one digit, rounded up, from 1e-6 on.

    >>> _round_up(1.23e-5), _round_up(2e-3), _round_up(-1e-17)
    ('2e-05', '0.002', '1e-06')
    """
    value = max(value, 1e-6)
    digit = 10.0 ** math.floor(math.log10(value))
    return f"{math.ceil(value / digit - 1e-9) * digit:.1g}"


def _describe_resolution(results: Results[Extraction]) -> Statement:
    """State whether the files resolve the update: else the adapter holds rounding noise."""
    stored = [record for record in results if not record.estimated]
    noisy = sum(record.resolution.verdict == "unresolved" for record in stored)
    below_noise = sum((limit := record.resolution.signal_rank) is not None and record.rank > limit for record in stored)
    is_factored = all(record.method == "factored" for record in results)
    is_resolved = is_factored or not (below_noise or noisy)
    if is_factored:
        text = FACTORED
    elif is_resolved:
        text = "yes: every direction in the adapter is above the rounding of the files"
        if len(stored) < len(results):
            text = "yes: by the files, or by rounding cells where those do not resolve it"
    elif len(stored) == len(results) and all(record.resolution.signal_rank == 0 for record in results):
        text = "no: no direction is above the files' rounding noise; save the fine-tune in float32, if possible"
    elif below_noise:
        text = (
            f"partly: {below_noise} of {len(results)} weights have directions below the files' rounding noise; "
            "--signal writes only those above"
        )
    else:
        text = f"no: {noisy} are rounding noise"
    return make_statement("resolved", "Resolution", text, level="note" if is_resolved else "warning", priority=2)


def _describe_estimates(results: Results[Extraction]) -> Statement:
    """State the number of weights whose update is an estimate, and those whose estimation failed."""
    tried = [record for record in results if record.hidden is not None and record.hidden.status != "not_hidden"]
    estimated = sum(record.estimated for record in results)
    stored = [record for record in tried if not record.estimated]
    return make_statement(
        "estimated",
        "Estimate",
        f"the estimated update before rounding in {quantity(estimated, 'weight')}; ε is measured against it"
        if tried
        else "",
        f"from the files, without an estimate: {list_layers(stored)}" if stored else "",
    )


def _describe_energy_split(results: Results[Extraction]) -> str:
    """Return the fractions of ‖Δ‖² in the adapter, truncated, stored in full and not included; empty for Δ = 0."""
    fros_by_part = {
        "in the adapter": [math.sqrt(max(0.0, 1 - record.epsilon**2)) * record.fro for record in results],
        "truncated by rank": [min(1.0, record.epsilon) * record.fro for record in results],
        "stored in full": [item.fro or 0.0 for item in results.left_out if item.reason == "saved"],
        "not included": [item.fro for item in results.left_out if item.fro and item.reason != "saved"],
    }
    norm_by_part = {part: math.hypot(*values) for part, values in fros_by_part.items()}
    total = math.hypot(*norm_by_part.values())
    if total == 0:
        return ""
    shares = ", ".join(
        f"{percent(min(1.0, (norm / total) ** 2))} {part}" for part, norm in norm_by_part.items() if norm
    )
    return f"‖Δ‖²{qualify_fractions(results.left_out)}: {shares}"


def _describe_missing(results: Results[Extraction], hint: str = "; --unfactored save stores them") -> list[str]:
    """Return one line per reason for tensors that are not in the adapter, with their fraction of ‖Δ‖².

    Entries that are not finite are reported elsewhere. ``hint`` is added to changed vectors that could be stored.
    """
    is_listed = results.run.settings.get("rest") == "list"
    total = math.hypot(*(record.fro for record in results), *(item.fro or 0.0 for item in results.left_out)) or 1.0
    groups: dict[tuple[str, str], list[LeftOut]] = {}
    for item in results.left_out:
        if item.reason not in {"saved", "non_finite"}:
            why = item.detail if item.reason in {"rank_0", "no_factors"} else ""
            groups.setdefault((item.reason, why), []).append(item)
    lines = []
    for (reason, why), items in groups.items():
        norm = math.hypot(*(item.fro or 0.0 for item in items))
        share = f", {percent((norm / total) ** 2)} of ‖Δ‖²" if norm else ""
        if why == ZERO:
            lines.append(f"{len(items)} unchanged: {list_layers(items)}")
            continue
        line = f"{len(items)} {REASONS[reason]}{share}"
        if reason == "vector":
            line += (hint if is_listed else "") if norm else "  unchanged"
        elif reason != "not_selected":
            line += f": {list_layers(items)}"
        lines.append(f"{line} ({why})" if why else line)
    return lines
