"""Records → a commented policy, for ``gate init``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lora_diag.decisions.gate.evidence import Source, Subject, list_subjects, value_of
from lora_diag.decisions.gate.fields import Field, find
from lora_diag.decisions.gate.policy import SPIKE
from lora_diag.errors import InputError
from lora_diag.records.vocabulary import metric_of

# A limit lies a quarter of the measured value away from it. Full fine-tunes of one model that differed in their seed
# had ranks at 90% within 2 of each other, of 72 to 155; whether a quarter suits other fields is for the user to decide.
MARGIN = 0.25


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A field to derive a limit from: its relevant end, and the message of the rule."""

    name: str
    field: str
    worst: str
    message: str
    where: str = ""


_SUGGESTIONS = (
    Suggestion(
        "drift",
        "spectrum.relative",
        "max",
        "the weight change is larger than before: check the learning rate, or raise the limit",
    ),
    Suggestion(
        "rank",
        "spectrum.rank_at.0.9",
        "max",
        "the update needs more rank than before: an adapter of the usual rank misses more of it",
    ),
    Suggestion(
        "one-direction",
        "spectrum.spike",
        "max",
        "one direction has more of the update than before: check for divergence",
    ),
    Suggestion(
        "distance",
        "residual.epsilon",
        "max",
        "the adapter is further from the full fine-tune than before: check its scaling and its rank",
        'role = "adapter"',
    ),
    Suggestion(
        "direction",
        "residual.cosine",
        "min",
        "the adapter's direction differs more than before: compare its data and its learning rate",
        'role = "adapter"',
    ),
    Suggestion("reach", "overlap.tangent", "min", "the adapter reaches less of the gradient than before"),
    Suggestion("budget-gap", "certificate.gap", "max", "the allocation is further from the optimum than before"),
    Suggestion(
        "intruders",
        "intruders.share",
        "max",
        "more of the largest directions are new than before: check for forgetting on older data",
    ),
    Suggestion(
        "union-rank",
        "union.spectrum.rank_at.0.9",
        "max",
        "the sum of the updates needs more rank than before: a merge of the usual rank loses more of it",
    ),
    Suggestion("fleet-rank", "fleet.used", "min", "this adapter uses less of its rank than the fleet before"),
)


def draft(sources: Sequence[Source], name: str = "policy.toml") -> str:
    """Return the text of a policy with limits from measured values.

    Args:
        sources: Results of finished runs.
        name: Name of the policy file, for the comment.

    Raises:
        InputError: No measured value gives a limit.
    """
    paths = " ".join(source.path for source in sources)
    rules = [
        text
        for suggestions, sources_of_metric in _pair_by_metric(sources)
        for suggestion in suggestions
        if (text := _draft_rule(suggestion, sources_of_metric))
    ]
    if not rules:
        raise InputError(
            f"{paths}: no value for a limit, since no update is resolved by the files; give results of a checkpoint "
            "that changed"
        )
    unrecorded = any(item.reason == "no_activations" for source in sources for item in source.results.left_out)
    return "\n".join([_draft_head(paths, name, unrecorded), *rules, _draft_tail(sources)])


def _pair_by_metric(sources: Sequence[Source]) -> Iterator[tuple[Sequence[Suggestion], Sequence[Source]]]:
    """Pair suggestions with their values; those on spectra once per metric, which the rule names."""
    metrics = dict.fromkeys(metric_of(source.results.layers) for source in sources if source.holds("spectrum"))
    if not {*metrics} - {"weights"}:
        yield _SUGGESTIONS, sources
        return
    for metric in metrics:
        yield (
            [
                replace(suggestion, name=f"{suggestion.name}-{metric}", where=f'metric = "{metric}"')
                for suggestion in _SUGGESTIONS
                if suggestion.field.startswith("spectrum.")
            ],
            [source for source in sources if source.holds("spectrum") and metric_of(source.results.layers) == metric],
        )
    yield [suggestion for suggestion in _SUGGESTIONS if not suggestion.field.startswith("spectrum.")], sources


def _draft_rule(suggestion: Suggestion, sources: Sequence[Source]) -> str:
    (field,) = find(suggestion.field)
    matching = list(_select_subjects(suggestion, field, sources))
    values = [
        (float(value), s.layer or "") for s in matching if isinstance(value := value_of(field, s)[0], float | int)
    ]
    if not values:
        return ""
    worst = max(values, key=lambda pair: pair[0] if suggestion.worst == "max" else -pair[0])
    limit = _limit(worst[0], field, suggestion.worst)
    kept = max(len(getattr(subject.record, "s", ())) for subject in matching)
    if limit is None or (field.path[0] == "rank_at" and limit >= kept):
        return ""  # such as the rank of an adapter: its updates cannot need more than it has
    sign, end = ("<=", "highest") if suggestion.worst == "max" else (">=", "lowest")
    middle = statistics.median(value for value, _ in values)
    where = f"where = {{ {suggestion.where} }}\n" if suggestion.where else ""
    place = f" in {_escape_comment(worst[1])}" if worst[1] else ""
    return (
        f"# {field.name}: median {middle:.4g}, {end} {worst[0]:.4g}{place}; the limit is {MARGIN:.0%} beyond.\n"
        f'[[rule]]\nname = "{suggestion.name}"\nrequire = "{suggestion.field} {sign} {limit:.6g}"\n{where}'
        f'severity = "error"\nmessage = "{suggestion.message}"\n{_draft_coverage(field, matching)}'
    )


def _draft_coverage(field: Field, matching: Sequence[Subject]) -> str:
    """Return the coverage of a field that is null in some records, such as the cosine of a zero update."""
    none = [subject for subject in matching if subject.record is not None and field.of(subject.record) is None]
    if not none or any(subject.fro is None for subject in matching):
        return ""
    energy = math.fsum((subject.fro or 0.0) ** 2 for subject in matching)
    missing = math.fsum((subject.fro or 0.0) ** 2 for subject in none)
    if not missing:
        return ""
    share = math.floor(100 * (1 - missing / energy)) / 100
    return f"coverage = {share} # of ‖Δ‖²: {field.name} is null in {len(none)} of {len(matching)} layers\n"


def _select_subjects(suggestion: Suggestion, field: Field, sources: Sequence[Source]) -> Iterator[Subject]:
    for source in sources:
        if source.holds(field.kind):
            matching = list_subjects(field.kind, source)
            yield from (
                s for s in matching if not suggestion.where or getattr(s.record, "role", "adapter") == "adapter"
            )


def _limit(worst: float, field: Field, end: str) -> float | None:
    """Return a limit beyond the worst value, rounded outwards; None if it would allow everything or nothing."""
    limit = worst + MARGIN * abs(worst) * (1 if end == "max" else -1)
    if isinstance(worst, float) and worst == int(worst) and field.path[0] == "rank_at":
        limit = math.ceil(limit)
    digits = 10 ** (3 - math.ceil(math.log10(abs(limit)))) if limit else 1
    limit = (math.ceil if end == "max" else math.floor)(limit * digits) / digits
    if field.share and not 0 < limit < 1:
        return None
    return limit


def _draft_head(paths: str, name: str, unrecorded: bool) -> str:
    left_out = (
        'left_out = ["no_activations"] # embeddings and other layers without recorded activations'
        if unrecorded
        else '# left_out = ["only_in_tuned"] # accepted reasons for tensors without a record'
    )
    return f"""\
# Requirements for shipping a checkpoint. Limits are from {_escape_comment(paths)}
# with a margin of {MARGIN:.0%}; review each of them.
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

[checks] # built-in checks: "error", "warning" or "off"; NaN, Inf and unfinished runs always count
mismatch = "error"      # the adapter does not fit BASE
dead = "error"          # an adapter's update is zero; or nothing changed
missing = "error"       # a layer of the baseline is missing
unused_rank = "warning" # unused directions of an adapter's rank
spike = "warning"       # one direction has more than spike_above of ‖ΔW‖²
spike_above = {SPIKE}
unresolved = "warning"  # the update is below the files' rounding
"""


def _draft_tail(sources: Sequence[Source]) -> str:
    field = "energy.16" if any(source.holds("spectrum") for source in sources) else "epsilon"
    worse = "lower" if field == "energy.16" else "higher"
    return f"""\
# To compare each layer with main: loradiag gate ... --baseline main.jsonl
# [[baseline]]
# field = "{field}"
# worse = "{worse}"
# tolerance = 0.02 # or "5%" of the stored value

# To accept one layer until a date:
# [[waiver]]
# rule = "drift"
# layers = 'lm_head'
# reason = "new tokens were added"
# expires = 2027-01-31
"""


def _escape_comment(text: str) -> str:
    """Return text that cannot end its comment."""
    return "".join(char if char.isprintable() else "?" for char in text)
