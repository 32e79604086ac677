"""Records → a commented policy, for ``gate init``."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_diag.errors import InputError
from lora_diag.gating.evidence import RecordField, Source, Subject, find, list_subjects, value_of
from lora_diag.gating.policy import SPIKE
from lora_diag.records.vocabulary import metric_of

# Allowed change for the worse, of the value of the same layer in the baseline. Full fine-tunes of one model that
# differed in their seed had ranks at 90% within 2 of each other, of 72 to 155; other fields are for the user to decide.
TOLERANCE = "10%"


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A field to compare with a baseline: the direction that is worse, message, selection of records, tolerance."""

    field: str
    worse: str
    message: str
    where: str = ""
    tolerance: str = TOLERANCE


_SUGGESTIONS = (
    Suggestion(
        "spectrum.relative", "higher", "the weight change is larger than before: check scaling and learning rate"
    ),
    Suggestion(
        "spectrum.rank_at.0.9",
        "higher",
        "the update needs more rank than before: an adapter of the usual rank misses more of it",
    ),
    Suggestion("spectrum.spike", "higher", "one direction has more of the update than before: check for divergence"),
    Suggestion(
        "residual.epsilon",
        "higher",
        "the adapter is further from the full fine-tune than before: check its scaling and its rank",
        'role = "adapter"',
    ),
    Suggestion(
        "residual.cosine",
        "lower",
        "the adapter's direction differs more than before: compare its data and its learning rate",
        'role = "adapter"',
    ),
    Suggestion("overlap.tangent", "lower", "the adapter reaches less of the gradient than before"),
    Suggestion("certificate.gap", "higher", "the allocation is further from the optimum than before"),
    Suggestion(
        "intruders.share",
        "higher",
        "more of the largest directions are new than before: check for forgetting on older data",
    ),
    Suggestion(
        "union.spectrum.rank_at.0.9",
        "higher",
        "the sum of the updates needs more rank than before: a merge of the usual rank loses more of it",
    ),
    Suggestion("fleet.used", "lower", "this adapter uses less of its rank than the fleet before"),
    Suggestion("probe.loss", "higher", "the loss on held-out data is higher than before", tolerance="1%"),
)


def draft(sources: Sequence[Source], name: str = "policy.toml") -> str:
    """Return the text of a policy that compares new results with these, layer by layer.

    Args:
        sources: Results of finished runs.
        name: Name of the policy file, for the comment.

    Raises:
        InputError: No measured value can be compared.
    """
    paths = " ".join(source.path for source in sources)
    rules = [
        text
        for suggestions, sources_of_metric in _pair_by_metric(sources)
        for suggestion in suggestions
        if (text := _draft_rule(suggestion, sources_of_metric))
    ]
    if not rules:
        if merge := next((source.path for source in sources if source.holds("merge")), None):
            fix = f"judge a merge by the built-in policy: loradiag gate --policy merge {merge}"
        elif any(source.holds("spectrum") or source.holds("residual") for source in sources):
            fix = "no update is resolved by the files: give results of a checkpoint that changed"
        else:
            fix = "write a [[rule]] on a field of these records, as the page of gate describes"
        raise InputError(f"{paths}: no value to compare with later results; {fix}")
    unrecorded = any(item.reason == "no_activations" for source in sources for item in source.results.left_out)
    return "\n".join([_draft_head(paths, name, unrecorded, _name_baseline(sources, name)), *rules, _TAIL])


def _name_baseline(sources: Sequence[Source], name: str) -> str:
    """Return the files of the results as ``[inputs]`` of a policy file; a comment for results in memory."""
    paths = [os.path.relpath(source.path, Path(name).parent) for source in sources]
    known = all(Path(source.path).is_file() for source in sources) and all(map(str.isprintable, paths))
    return f"baseline = {json.dumps(paths, ensure_ascii=False)}" if known else '# baseline = ["results.jsonl"]'


def _pair_by_metric(sources: Sequence[Source]) -> Iterator[tuple[Sequence[Suggestion], Sequence[Source]]]:
    """Yield suggestions with the results to draft them from, those on spectra once per metric.

    The rules name the metric, unless all spectra are of the weights.
    """
    metrics = dict.fromkeys(metric_of(source.results.layers) for source in sources if source.holds("spectrum"))
    if not {*metrics} - {"weights"}:
        yield _SUGGESTIONS, sources
        return
    for metric in metrics:
        yield (
            [
                replace(suggestion, where=f'metric = "{metric}"')
                for suggestion in _SUGGESTIONS
                if suggestion.field.startswith("spectrum.")
            ],
            [source for source in sources if source.holds("spectrum") and metric_of(source.results.layers) == metric],
        )
    yield [suggestion for suggestion in _SUGGESTIONS if not suggestion.field.startswith("spectrum.")], sources


def _draft_rule(suggestion: Suggestion, sources: Sequence[Source]) -> str:
    (field,) = find(suggestion.field)
    subjects = list(_select_subjects(suggestion, field, sources))
    values = [value for s in subjects if isinstance(value := value_of(field, s)[0], float | int)]
    if not any(values):
        return ""  # no fraction of zero is a tolerance
    kept = max(len(getattr(subject.record, "s", ())) for subject in subjects)
    if field.path[0] == "rank_at" and math.ceil(1.1 * max(values)) >= kept:
        return ""  # such as the rank of an adapter: its updates cannot need more than it has
    where = f"where = {{ {suggestion.where} }}\n" if suggestion.where else ""
    return (
        f"# {field.name} is {min(values):.4g} to {max(values):.4g}.\n"
        f'[[baseline]]\nfield = "{suggestion.field}"\nworse = "{suggestion.worse}"\n{where}'
        f'tolerance = "{suggestion.tolerance}"\nmessage = "{suggestion.message}"\n{_draft_coverage(field, subjects)}'
    )


def _draft_coverage(field: RecordField, subjects: Sequence[Subject]) -> str:
    """Return the coverage of a field that is null in some records, such as the cosine of a zero update; else empty."""
    null_subjects = [subject for subject in subjects if subject.record is not None and field.of(subject.record) is None]
    if not null_subjects or any(subject.fro is None for subject in subjects):
        return ""
    energy = math.fsum((subject.fro or 0.0) ** 2 for subject in subjects)
    missing = math.fsum((subject.fro or 0.0) ** 2 for subject in null_subjects)
    if not missing:
        return ""
    share = math.floor(100 * (1 - missing / energy)) / 100
    return f"coverage = {share} # of ‖Δ‖²: {field.name} is null in {len(null_subjects)} of {len(subjects)} layers\n"


def _select_subjects(suggestion: Suggestion, field: RecordField, sources: Sequence[Source]) -> Iterator[Subject]:
    for source in sources:
        if source.holds(field.kind):
            subjects = list_subjects(field.kind, source)
            yield from (
                s for s in subjects if not suggestion.where or getattr(s.record, "role", "adapter") == "adapter"
            )


def _draft_head(paths: str, name: str, unrecorded: bool, baseline: str) -> str:
    left_out = (
        'left_out = ["no_activations"] # embeddings and other layers without recorded activations'
        if unrecorded
        else '# left_out = ["only_in_tuned"] # accepted reasons for tensors without a record'
    )
    return f"""\
# Requirements for shipping a checkpoint: no layer may be worse than in the baseline by more than a tolerance.
# Review each tolerance. Made from {_escape_comment(paths)}
#
#     loradiag gate {_escape_comment(name)} RESULTS...
#
# A rule is a condition on selected layers. docs/reference/gate.md has the grammar and every field.
#     require   field, operator, value: "relative <= 0.3"; max, min, mean, median, sum or p95 in front judges one
#               number; "share of layers with energy.16 >= 0.9 is >= 0.95" counts layers
#     layers, exclude, type, depth, where   which records: regex on the name, module type, [first, last] block
#     severity  "error" fails the gate, "warning" is reported
title = "Requirements for shipping a checkpoint"

[coverage]
by = "energy" # fraction of the change ‖Δ‖² that must be judged, or "layers"
minimum = 1.0 # a layer without a record leaves the gate inconclusive, which is never a pass
{left_out}

[inputs]
{baseline} # to compare with, from the folder of this file; or: --baseline FILE

[checks] # built-in checks: "error", "warning" or "off"; NaN, Inf and unfinished runs always count
mismatch = "error"      # the adapter does not fit BASE
dead = "error"          # an adapter's update is zero; or nothing changed
missing = "error"       # a layer of the baseline is missing
unused_rank = "warning" # unused directions of an adapter's rank
spike = "off"           # one direction has more than spike_above of ‖ΔW‖²: usual early in training
spike_above = {SPIKE}
unresolved = "warning"  # the update is below the files' rounding
"""


_TAIL = """\
# To limit a value on its own:
# [[rule]]
# name = "drift"
# require = "relative <= 0.5"

# To accept one layer until a date:
# [[waiver]]
# rule = "baseline.spectrum.relative"
# layers = 'lm_head'
# reason = "new tokens were added"
# expires = 2027-01-31
"""


def _escape_comment(text: str) -> str:
    """Return text that cannot end its comment."""
    return "".join(char if char.isprintable() else "?" for char in text)
