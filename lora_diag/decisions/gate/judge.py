"""Policy and records → verdicts.

Every rule yields at least one verdict. A value that is missing, null or due to rounding never passes: the layer is
inconclusive, unless the rest reaches the coverage that the policy demands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from itertools import groupby

from lora_diag.decisions.gate.baseline import Stored
from lora_diag.decisions.gate.checks import has_updates, run_checks
from lora_diag.decisions.gate.evidence import Present, Source, Subject, command_for, list_subjects, value_of
from lora_diag.decisions.gate.fields import LAYER_KINDS, Field, find
from lora_diag.decisions.gate.grammar import problem_with
from lora_diag.decisions.gate.inputs import judge_inputs
from lora_diag.decisions.gate.policy import Criterion, Policy, Regression, Rule
from lora_diag.decisions.gate.record import Verdict
from lora_diag.decisions.gate.waivers import Waivers
from lora_diag.errors import NothingComparedError


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
        One verdict for each built-in check, and for each rule and record; obsolete waivers at the end.

    Raises:
        UsageError: A rule selects nothing in the results, or its field or condition does not fit their records.
        NothingComparedError: The results have no records, or none that a rule or a built-in check applies to.
    """
    _refuse_nothing(policy, sources)
    _check_selectors(policy, sources)
    waivers = Waivers(policy, today)
    stored = Stored(*baseline) if baseline else None
    about = [*_judge_subject(policy, sources), *judge_inputs(policy, sources, baseline, unmatched, now)]
    verdicts = [*about, *map(waivers.apply, run_checks(policy, sources, stored))]
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
    """Yield whether any of the results is of the policy's kind of subject, if it has one."""
    if policy.about is None:
        return
    there = any(run_input.role == policy.about for source in sources for run_input in source.results.run.inputs)
    name, word = {"adapter": ("an adapter", "ADAPTER"), "tuned": ("a full fine-tune", "TUNED")}[policy.about]
    yield Verdict(
        rule="about",
        layer=None,
        measured=None,
        allowed=f"results of {name}",
        status="passed" if there else "inconclusive",
        severity="error",
        message="" if there else f"no results of {name} were given: loradiag spectrum BASE {word} measures one",
    )


def _judge_rule(policy: Policy, rule: Rule, sources: Sequence[Source], waivers: Waivers) -> list[Verdict]:
    field, missing = _find_field(policy, rule, sources, rule.require.text)
    if field is None:
        return missing
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
        return [_make_empty_verdict(rule, rule.require.text, f"selects no layer with a {field.kind} record")]
    if rule.require.per_layer:
        return _judge_each(policy, rule, findings, waivers)
    groups = groupby(findings, key=lambda finding: finding.subject.group)
    return [_judge_aggregate(policy, rule, field, group, list(members), waivers) for group, members in groups]


def _judge_regression(
    policy: Policy, demand: Regression, sources: Sequence[Source], stored: Stored | None, waivers: Waivers
) -> list[Verdict]:
    allowed = f"{demand.field} not {demand.worse} than in the baseline"
    if stored is None:
        return [_make_empty_verdict(demand, allowed, "no baseline was given: --baseline FILE")]
    field, missing = _find_field(policy, demand, sources, allowed)
    if field is None:
        return missing

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
        return [_make_empty_verdict(demand, allowed, f"selects no layer with a {field.kind} record")]
    return _judge_each(policy, demand, findings, waivers)


def _find_field(
    policy: Policy, demand: Criterion, sources: Sequence[Source], allowed: str
) -> tuple[Field | None, list[Verdict]]:
    """Return the field of a rule among the kinds of records present; else None and a verdict that names the missing.

    Raises:
        UsageError: Several of these kinds have it.
    """
    candidates = find(demand.field)
    there = [field for field in candidates if any(source.holds(field.kind) for source in sources)]
    if len(there) > 1:
        names = " or ".join(f"{field.kind}.{field.name}" for field in there)
        raise policy.error(demand.line, f"{demand.name}: {demand.field} is in several records here; write {names}")
    if there:
        return there[0], []
    kinds = " or ".join(field.kind for field in candidates)
    commands = " or ".join(dict.fromkeys(command_for(field.kind) for field in candidates))
    return None, [_make_empty_verdict(demand, allowed, f"needs {kinds} records: give the results of {commands}, too")]


def _select_subjects(policy: Policy, demand: Criterion, field: Field, sources: Sequence[Source]) -> list[Subject]:
    """Return the subjects of a rule.

    Raises:
        UsageError: Its ``where`` matches no record.
    """
    holding = [source for source in sources if source.holds(field.kind)]
    chosen: list[Subject] = []
    for source in holding:
        selected = list_subjects(field.kind, source, frozenset(policy.coverage.left_out), name_file=len(holding) > 1)
        chosen += _filter_subjects(policy, demand, field, selected)
    if demand.where and not chosen:
        raise policy.error(demand.line, f"{demand.name}: no {field.kind} record matches 'where'")
    of_layers = field.kind in LAYER_KINDS
    return [s for s in chosen if not of_layers or s.layer is None or demand.selects(s.layer)]


def _filter_subjects(policy: Policy, demand: Criterion, field: Field, selected: list[Subject]) -> list[Subject]:
    """Keep the records that match ``where``, and missing ones next to such records."""
    if not demand.where:
        return selected
    tests: list[tuple[Field, object]] = []
    for name, value in demand.where.items():
        fields = [candidate for candidate in find(name) if candidate.kind == field.kind]
        if not fields:
            raise policy.error(demand.line, f"{demand.name}: where: a {field.kind} record has no {name}")
        tests.append((fields[0], value))

    def fits(subject: Subject) -> bool:
        record = subject.record
        return record is not None and all(required.of(record) == value for required, value in tests)

    others = {s.group for s in selected if s.record is not None} - {s.group for s in selected if fits(s)}
    return [s for s in selected if fits(s) or (s.record is None and s.group not in others)]


def _judge_each(policy: Policy, demand: Criterion, findings: list[Finding], waivers: Waivers) -> list[Verdict]:
    """Judge every record separately."""
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
        verdicts.append(_make_empty_verdict(demand, findings[0].allowed, why))
    return verdicts


def _judge_aggregate(
    policy: Policy, rule: Rule, field: Field, group: str, findings: list[Finding], waivers: Waivers
) -> Verdict:
    """Judge one aggregate of all records; if it fails, waived layers are excluded."""
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


def _judge_number(policy: Policy, rule: Rule, field: Field, group: str, findings: list[Finding]) -> Verdict:
    """Judge one aggregate of records, without waivers."""
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
    """Return whether enough of the selected subjects have a value, and a description."""
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
    left = sum((finding.subject.fro or 0.0) ** 2 for finding in unjudged)
    kept = sum((finding.subject.fro or 0.0) ** 2 for finding in judged)
    if left == 0:
        return True, ""
    share = kept / (kept + left)
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


def _make_empty_verdict(demand: Criterion, allowed: str, reason: str) -> Verdict:
    return _make_verdict(demand, Finding(Subject(None, "", (), None), None, allowed, None, reason), "inconclusive")
