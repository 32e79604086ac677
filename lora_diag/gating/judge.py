"""Policy and records → verdicts.

Every rule yields at least one verdict. A value that is missing, null or due to rounding never passes: the layer is
inconclusive, unless the rest reaches the coverage that the policy demands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from itertools import groupby
from typing import Any

from lora_diag.errors import NothingComparedError
from lora_diag.gating.checks import has_updates, run_checks
from lora_diag.gating.evidence import (
    KINDS,
    LAYER_KINDS,
    Present,
    RecordField,
    Source,
    Subject,
    command_for,
    find,
    list_subjects,
    value_of,
)
from lora_diag.gating.grammar import problem_with
from lora_diag.gating.inputs import judge_inputs
from lora_diag.gating.policy import Criterion, Policy, Regression, Rule, Waiver
from lora_diag.gating.record import Verdict
from lora_diag.records import Results, totals
from lora_diag.records.vocabulary import METRIC_NAMES, Metric, metric_of


@dataclass(frozen=True, slots=True)
class Finding:
    """The judgement of one subject: whether it meets the rule, or None with the reason."""

    subject: Subject
    value: float | str | None
    allowed: str
    ok: bool | None
    reason: str = ""


def judge(
    policy: Policy,
    sources: Sequence[Source],
    baseline: Sequence[Source],
    today: date,
    now: datetime,
    unmatched: Sequence[Present] = (),
) -> tuple[Verdict, ...]:
    """Judge results by a policy.

    Args:
        policy: The policy.
        sources: Results files, at least one.
        baseline: Earlier results files to compare with.
        today: Date for the expiry of waivers.
        now: Time for the age of results.
        unmatched: Files of ``--for`` without results.

    Returns:
        The verdicts on the subject and the inputs, of the built-in checks, of the rules, and of the comparisons with
        the baseline, at least one of each; then a warning for each obsolete waiver.

    Raises:
        UsageError: A rule selects nothing in the results, or its field or condition does not fit their records.
        NothingComparedError: The results have no records, or none that a rule or a built-in check applies to.
    """
    _refuse_nothing(policy, sources)
    _check_selectors(policy, sources)
    waivers = Waivers(policy, today)
    stored = Baseline(*baseline) if baseline else None
    input_verdicts = [*_judge_subject(policy, sources), *judge_inputs(policy, sources, baseline, unmatched, now)]
    verdicts = [*input_verdicts, *map(waivers.apply, run_checks(policy, sources, baseline))]
    for rule in policy.rules:
        verdicts += _judge_rule(policy, rule, sources, waivers)
    for regression in policy.regressions:
        verdicts += _judge_regression(policy, regression, sources, stored, waivers)
    return (*verdicts, *waivers.reports())


def _refuse_nothing(policy: Policy, sources: Sequence[Source]) -> None:
    """Refuse results without anything to judge.

    Raises:
        NothingComparedError: There is nothing to judge.
    """
    empty = [
        source.path
        for source in sources
        if not source.results.layers
        and not source.results.whole
        and source.results.end is not None
        and not any(item.reason == "non_finite" for item in source.results.left_out)
    ]
    if empty:
        raise NothingComparedError(f"{empty[0]}: has no records to judge")
    if not policy.rules and not policy.regressions and not empty and not _checks_apply(sources):
        raise NothingComparedError(
            f"{sources[0].path}: has no spectrum or residual record, and {policy.path} has no rule for anything else"
        )


def _checks_apply(sources: Sequence[Source]) -> bool:
    """Return whether built-in checks alone apply to the results."""
    non_finite = any(item.reason == "non_finite" for source in sources for item in source.results.left_out)
    return non_finite or has_updates(sources) or any(source.results.end is None for source in sources)


def _check_selectors(policy: Policy, sources: Sequence[Source]) -> None:
    """Refuse rules that select no name in the results; an unfinished run may still add names.

    Raises:
        UsageError: A rule selects nothing.
    """
    if any(source.results.end is None for source in sources):
        return
    names = set[str]().union(*(source.names() for source in sources))
    for demand in (*policy.rules, *policy.regressions):
        of_layers = any(field.kind in LAYER_KINDS for field in find(demand.field))
        if names and of_layers and not any(map(demand.selects, names)):
            raise policy.error(demand.line, f"{demand.name}: selects none of the {len(names)} tensors in the results")


def _judge_subject(policy: Policy, sources: Sequence[Source]) -> Iterator[Verdict]:
    """Yield a verdict on whether any of the results is of the policy's kind of subject, if it has one."""
    if policy.about is None:
        return
    is_given = any(run_input.role == policy.about for source in sources for run_input in source.results.run.inputs)
    name, placeholder = {"adapter": ("an adapter", "ADAPTER"), "tuned": ("a full fine-tune", "TUNED")}[policy.about]
    yield Verdict(
        rule="about",
        layer=None,
        measured=None,
        allowed=f"results of {name}",
        status="passed" if is_given else "inconclusive",
        severity="error",
        message=""
        if is_given
        else f"no results of {name} were given: loradiag spectrum BASE {placeholder} measures one",
    )


def _judge_rule(policy: Policy, rule: Rule, sources: Sequence[Source], waivers: Waivers) -> list[Verdict]:
    field, missing_verdicts = _find_field(policy, rule, sources, rule.require.text)
    if field is None:
        return missing_verdicts
    if problem := problem_with(rule.require, field):
        raise policy.error(rule.line, problem)

    def compare(subject: Subject) -> Finding:
        value, reason = value_of(field, subject, rule.floor)
        if value is None or not rule.require.per_layer:
            return Finding(subject, value, rule.require.text, None, reason)
        compared = value == "true" if field.leaf == "flag" else value
        return Finding(subject, value, rule.require.text, rule.require.test.holds(compared))

    findings = [compare(subject) for subject in _select_subjects(policy, rule, field, sources)]
    if not findings:
        return [_make_inconclusive_verdict(rule, rule.require.text, f"selects no layer with a {field.kind} record")]
    if rule.require.per_layer:
        return _judge_each(policy, rule, findings, waivers)
    groups = groupby(findings, key=lambda finding: finding.subject.group)
    return [_judge_aggregate(policy, rule, field, group, list(members), waivers) for group, members in groups]


def _judge_regression(
    policy: Policy, demand: Regression, sources: Sequence[Source], stored: Baseline | None, waivers: Waivers
) -> list[Verdict]:
    allowed = f"{demand.field} not {demand.worse} than in the baseline"
    if stored is None:
        return [_make_inconclusive_verdict(demand, allowed, "no baseline was given: --baseline FILE")]
    field, missing_verdicts = _find_field(policy, demand, sources, allowed)
    if field is None:
        return missing_verdicts

    def compare(subject: Subject) -> Finding:
        value, reason = value_of(field, subject, demand.floor)
        if not isinstance(value, float | int):
            return Finding(subject, value, allowed, None, reason)
        before, reason = stored.value(field, subject, demand.floor)
        if before is None:
            return Finding(subject, value, allowed, None, reason)
        limit, text = stored.limit(demand, before)
        return Finding(subject, value, text, value <= limit if demand.worse == "higher" else value >= limit)

    findings = [compare(subject) for subject in _select_subjects(policy, demand, field, sources)]
    if not findings:
        return [_make_inconclusive_verdict(demand, allowed, f"selects no layer with a {field.kind} record")]
    return _judge_each(policy, demand, findings, waivers)


def _find_field(
    policy: Policy, demand: Criterion, sources: Sequence[Source], allowed: str
) -> tuple[RecordField | None, list[Verdict]]:
    """Return the field of a rule among the kinds of records present; else None and a verdict that names the missing.

    Raises:
        UsageError: Several of these kinds have it.
    """
    candidates = find(demand.field)
    present = [field for field in candidates if any(source.holds(field.kind) for source in sources)]
    if len(present) > 1:
        names = " or ".join(f"{field.kind}.{field.name}" for field in present)
        raise policy.error(demand.line, f"{demand.name}: {demand.field} is in several records here; write {names}")
    if present:
        return present[0], []
    kinds = " or ".join(field.kind for field in candidates)
    commands = " or ".join(dict.fromkeys(command_for(field.kind) for field in candidates))
    return None, [
        _make_inconclusive_verdict(demand, allowed, f"needs {kinds} records: give the results of {commands}, too")
    ]


def _select_subjects(policy: Policy, demand: Criterion, field: RecordField, sources: Sequence[Source]) -> list[Subject]:
    """Return the subjects of a rule.

    Raises:
        UsageError: Its ``where`` matches no record, or names a field that the records do not have.
    """
    holding = [source for source in sources if source.holds(field.kind)]
    chosen: list[Subject] = []
    for source in holding:
        subjects = list_subjects(field.kind, source, frozenset(policy.coverage.left_out), name_file=len(holding) > 1)
        chosen += _filter_subjects(policy, demand, field, subjects)
    if demand.where and not chosen:
        raise policy.error(demand.line, f"{demand.name}: no {field.kind} record matches 'where'")
    of_layers = field.kind in LAYER_KINDS
    return [s for s in chosen if not of_layers or s.layer is None or demand.selects(s.layer)]


def _filter_subjects(policy: Policy, demand: Criterion, field: RecordField, subjects: list[Subject]) -> list[Subject]:
    """Return the subjects whose records match ``where``, and missing ones, unless all records of their group differ.

    Raises:
        UsageError: The records have no field of a name in ``where``.
    """
    if not demand.where:
        return subjects
    tests: list[tuple[RecordField, object]] = []
    for name, value in demand.where.items():
        fields = [candidate for candidate in find(name) if candidate.kind == field.kind]
        if not fields:
            raise policy.error(demand.line, f"{demand.name}: where: a {field.kind} record has no {name}")
        tests.append((fields[0], value))

    def fits(subject: Subject) -> bool:
        record = subject.record
        return record is not None and all(required.of(record) == value for required, value in tests)

    other_groups = {s.group for s in subjects if s.record is not None} - {s.group for s in subjects if fits(s)}
    return [s for s in subjects if fits(s) or (s.record is None and s.group not in other_groups)]


def _judge_each(policy: Policy, demand: Criterion, findings: list[Finding], waivers: Waivers) -> list[Verdict]:
    """Return a verdict on every record, and an inconclusive one if none has a value or a waiver."""
    is_enough, why = _check_coverage(policy, demand, findings)
    verdicts = []
    for finding in findings:
        if finding.ok is None and (is_enough or (policy.coverage.by == "energy" and finding.subject.fro == 0)):
            status = "not judged"
        elif finding.ok is None:
            status = "inconclusive"
        else:
            status = "passed" if finding.ok else "failed"
        verdicts.append(waivers.apply(_make_verdict(demand, finding, status)))
    if not any(finding.ok is not None for finding in findings) and not any(v.status == "waived" for v in verdicts):
        verdicts.append(_make_inconclusive_verdict(demand, findings[0].allowed, why))
    return verdicts


def _judge_aggregate(
    policy: Policy, rule: Rule, field: RecordField, group: str, findings: list[Finding], waivers: Waivers
) -> Verdict:
    """Return the verdict on one aggregate of all records; if it does not pass, waived layers are excluded."""
    verdict = _judge_number(policy, rule, field, group, findings)
    if verdict.status in {"passed", "not judged"}:
        return verdict
    waived = {f.subject.layer: w for f in findings if (w := waivers.of(rule.name, f.subject.layer))}
    not_waived = [finding for finding in findings if finding.subject.layer not in waived]
    if waived and (not not_waived or _judge_number(policy, rule, field, group, not_waived).status == "passed"):
        waiver = next(iter(waived.values()))
        waivers.used |= set(waived.values())
        return verdict.model_copy(update={"status": "waived", "message": waivers.reason(waiver)})
    return verdict


def _judge_number(policy: Policy, rule: Rule, field: RecordField, group: str, findings: list[Finding]) -> Verdict:
    """Return the verdict on one aggregate of records, without waivers."""
    judged = [finding for finding in findings if not finding.reason]
    is_enough, why = _check_coverage(policy, rule, findings)
    subject = Subject(None, group, (), None)
    if not judged or not is_enough:
        reasons = [finding.reason for finding in findings if finding.reason and finding.subject.fro != 0]
        why = f"{why}; {reasons[0]}" if reasons else why
        return _make_verdict(rule, Finding(subject, None, rule.require.text, None, why), "inconclusive")
    values = [f.value == "true" if field.leaf == "flag" else f.value for f in judged if f.value is not None]
    measured = rule.require.measure(values)
    ok = rule.require.holds(measured)
    return _make_verdict(rule, Finding(subject, measured, rule.require.text, ok), "passed" if ok else "failed")


def _check_coverage(policy: Policy, demand: Criterion, findings: list[Finding]) -> tuple[bool, str]:
    """Return whether enough of the selected subjects have a value, and a description; empty if nothing is missing."""
    judged = [finding for finding in findings if not finding.reason]
    unjudged = [finding for finding in findings if finding.reason]
    minimum = policy.coverage.minimum if demand.coverage is None else demand.coverage
    if not judged:
        return False, f"none of the {len(findings)} selected could be judged"
    if not unjudged:
        return True, ""
    count = f"{len(judged)} of {len(findings)} selected could be judged"
    if policy.coverage.by == "layers":
        return len(judged) >= minimum * len(findings), count
    unknown = [finding.subject.layer for finding in unjudged if finding.subject.fro is None]
    if unknown:
        return False, f"{count}, and how far {unknown[0]} moved is not known"
    unjudged_energy = sum((finding.subject.fro or 0.0) ** 2 for finding in unjudged)
    judged_energy = sum((finding.subject.fro or 0.0) ** 2 for finding in judged)
    if unjudged_energy == 0:
        return True, ""
    share = judged_energy / (judged_energy + unjudged_energy)
    # Rounding of a sum compared with 1 must not hide a small layer.
    return minimum < 1 and share >= minimum, f"{count}, {share:.3g} of the change ‖Δ‖²; {minimum:g} is demanded"


def _make_verdict(demand: Criterion, finding: Finding, status: str) -> Verdict:
    message = {"failed": demand.message, "passed": ""}.get(status, finding.reason)
    if status == "failed" and demand.severity == "warning":
        status = "warned"
    return Verdict.model_validate(
        {
            "rule": demand.name,
            "layer": finding.subject.layer,
            "group": finding.subject.group,
            "measured": finding.value,
            "allowed": finding.allowed,
            "status": status,
            "severity": demand.severity,
            "message": message,
            "line": demand.line,
        }
    )


def _make_inconclusive_verdict(demand: Criterion, allowed: str, reason: str) -> Verdict:
    return _make_verdict(demand, Finding(Subject(None, "", (), None), None, allowed, None, reason), "inconclusive")


class Waivers:
    """The waivers of a policy on a date.

    Args:
        policy: The policy.
        today: The date; a waiver is valid to the end of its last day.

    Attributes:
        active: Waivers that have not expired.
        expired: The others.
        used: Waivers that were applied.
    """

    def __init__(self, policy: Policy, today: date) -> None:
        self.active = tuple(waiver for waiver in policy.waivers if today <= waiver.expires)
        self.expired = tuple(waiver for waiver in policy.waivers if today > waiver.expires)
        self.used: set[Waiver] = set()

    def of(self, rule: str, layer: str | None) -> Waiver | None:
        """Return the waiver of a rule for a layer; for the whole run only a waiver of all layers."""
        return next((waiver for waiver in self.active if waiver.covers(rule, layer or "")), None)

    def apply(self, verdict: Verdict) -> Verdict:
        """Return a verdict as waived if it does not pass and a waiver applies."""
        if verdict.status not in {"failed", "warned", "inconclusive"}:
            return verdict
        waiver = self.of(verdict.rule, verdict.layer)
        if waiver is None:
            return verdict
        self.used.add(waiver)
        return verdict.model_copy(update={"status": "waived", "message": self.reason(waiver)})

    def reason(self, waiver: Waiver) -> str:
        """Return the message of a waived verdict."""
        return f"waived to {waiver.expires}: {waiver.reason}"

    def reports(self) -> list[Verdict]:
        """Return a warning for every waiver that has expired or was not applied."""
        return [
            *(self._report(waiver, f"expired on {waiver.expires}, so it no longer applies") for waiver in self.expired),
            *(
                self._report(waiver, "has no effect any more: delete it")
                for waiver in self.active
                if waiver not in self.used
            ),
        ]

    def _report(self, waiver: Waiver, text: str) -> Verdict:
        return Verdict(
            rule="waiver",
            layer=None,
            measured=None,
            allowed=f"{waiver.rule} on {waiver.layers.pattern}",
            status="warned",
            severity="warning",
            message=f"the waiver of {waiver.rule} {text}",
            line=waiver.line,
        )


class Baseline:
    """Earlier records, by metric, layer and the position of their adapter, step or rank in the file."""

    def __init__(self, *sources: Source) -> None:
        self.sources = sources
        self.subjects: dict[str, dict[tuple[Any, ...], Subject]] = {}

    def of_kind(self, kind: str) -> dict[tuple[Any, ...], Subject]:
        """Return all subjects of a kind by metric, layer and key; without record where several have one key."""
        if kind not in self.subjects:
            stored = self.subjects[kind] = {}
            for source in self.sources:
                metric = metric_of(source.results.layers)
                for subject in list_subjects(kind, source) if source.holds(kind) else ():
                    key = (_get_metric(subject, metric), subject.layer, *subject.key)
                    # With two records in one place it is undefined which one a new record is compared with.
                    twice = key in stored and subject.record is not None
                    ambiguous = replace(subject, record=None, why="several records of it, which nothing distinguishes")
                    stored[key] = ambiguous if twice else subject
        return self.subjects[kind]

    def find(self, kind: str, subject: Subject) -> Subject | None:
        """Return the earlier subject at the place of a measured one; None without one."""
        return self.of_kind(kind).get((_get_metric(subject), subject.layer, *subject.key))

    def value(self, field: RecordField, subject: Subject, floor: str) -> tuple[float | None, str]:
        """Return the baseline's value of a field for a subject, or None with the reason."""
        stored = self.find(field.kind, subject)
        if stored is None:
            metric, metrics = _get_metric(subject), list(dict.fromkeys(key[0] for key in self.of_kind(field.kind)))
            if metrics and metric not in metrics:
                before, now = METRIC_NAMES[metrics[0]], METRIC_NAMES[metric]
                return None, f"the baseline is in {before} and this in {now}: no comparison"
            return None, "not in the baseline: measure the baseline anew to compare it from now on"
        value, reason = value_of(field, stored, floor)
        if not isinstance(value, float | int):
            return None, f"in the baseline: {reason}"
        return float(value), ""

    def limit(self, demand: Regression, before: float) -> tuple[float, str]:
        """Return the limit of a value, given that of the baseline, and its description."""
        margin = demand.allowed_change(before)
        limit, sign = (before + margin, "<=") if demand.worse == "higher" else (before - margin, ">=")
        return limit, f"{demand.field} {sign} {limit:.6g} ({before:.6g} in the baseline)"


def tighten_baseline(
    regressions: Sequence[Regression], stored: Baseline, sources: Sequence[Source]
) -> Results[Any] | None:
    """Return a baseline, of one file, with improved records in place of the stored ones; None without improvements.

    A record is an improvement if no compared field is worse than stored, regardless of tolerance, and one is better.
    Whole records are replaced, never single values, so that each was measured.
    """
    replacements: dict[int, Any] = {}
    for kind in sorted(LAYER_KINDS):
        fields = [(demand, field) for demand in regressions for field in find(demand.field) if field.kind == kind]
        holding = [source for source in sources if source.holds(kind)]
        if not fields or len(holding) != 1:
            continue
        for subject in list_subjects(kind, holding[0]):
            old = stored.find(kind, subject)
            if old and old.record and subject.record and _is_better(subject, old, fields):
                replacements[id(old.record)] = subject.record
    if not replacements:
        return None
    (source,) = stored.sources
    results = source.results
    layers = tuple(
        _rename_record(replacements[id(record)], record) if id(record) in replacements else record
        for record in results.layers
    )
    return replace(results, layers=layers, end=totals(layers, results.left_out))


def _get_metric(subject: Subject, default: Metric = "weights") -> Metric:
    metric: Metric = getattr(subject.record, "metric", "weights" if subject.record else default)
    return metric


def _is_better(new: Subject, old: Subject, fields: Sequence[tuple[Regression, RecordField]]) -> bool:
    gains = []
    for demand, field in fields:
        if new.layer is None or not demand.selects(new.layer):
            continue
        now, before = value_of(field, new, demand.floor)[0], value_of(field, old, demand.floor)[0]
        if not isinstance(now, float | int) or not isinstance(before, float | int):
            return False
        gains.append(before - now if demand.worse == "higher" else now - before)
    return bool(gains) and min(gains) >= 0 and max(gains) > 0


def _rename_record(record: Any, old: Any) -> Any:
    """Return a record under the key of the one it replaces, such as the path of its adapter."""
    return record.model_copy(update={name: getattr(old, name) for name in KINDS[record.record].key})
