"""Policy and records → verdicts.

Every rule yields at least one verdict. A value that is missing, null or due to rounding never
passes: the layer is inconclusive, unless the rest reaches the coverage that the policy demands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from itertools import chain, groupby

from lora_diag.errors import NothingComparedError
from lora_diag.gating.checks import has_updates, judge_inputs, run_checks
from lora_diag.gating.conditions import LAYER_KINDS, RecordField, Value, find
from lora_diag.gating.policy import Demand, Policy, PolicyRule, Regression, Waiver
from lora_diag.gating.sources import (
    Baseline,
    RuleSubject,
    Sources,
    commands_of,
    energy_of,
    list_inputs,
    list_subjects,
    value_of,
)
from lora_diag.records.verdict import Status, Verdict


@dataclass(frozen=True, slots=True)
class Finding:
    """The judgement of one subject.

    Args:
        subject: The subject.
        value: Its value; None without one.
        allowed: The condition.
        ok: Whether the value meets the condition.
        reason: Why there is no judgement; empty if there is one.
    """

    subject: RuleSubject
    value: Value | None
    allowed: str
    ok: bool = False
    reason: str = ""


def judge(
    policy: Policy,
    sources: Sources,
    baseline: Baseline,
    today: date,
    now: datetime,
    unmatched: Mapping[str, str],
) -> tuple[Verdict, ...]:
    """Judge results by a policy.

    Args:
        policy: The policy.
        sources: Results files, at least one.
        baseline: Earlier results files to compare with.
        today: Date for the expiry of waivers.
        now: Time for the age of results.
        unmatched: Fingerprints of the files of ``--for`` without results, by path.

    Returns:
        The verdicts on the subject and the inputs, of the built-in checks, of the rules, and of the
            comparisons with
        the baseline: at least one for the inputs and for each enabled check, rule and comparison,
            except for the check
        ``missing`` without a baseline; then a warning for each waiver that has expired or was not
            applied.
    """
    _refuse_nothing(policy, sources)
    _check_selectors(policy, sources)
    waivers = Waivers(policy, today)
    verdicts = [
        *_judge_subject(policy, sources),
        *judge_inputs(policy, sources, baseline.sources, unmatched, now),
    ]
    verdicts += map(waivers.apply, run_checks(policy, sources, baseline.sources))
    for demand in policy.demands:
        verdicts += _judge_demand(policy, demand, sources, baseline, waivers)
    return (*verdicts, *waivers.reports())


def _refuse_nothing(policy: Policy, sources: Sources) -> None:
    """Refuse results without records, or that no rule or built-in check applies to; not if
    non-finite or unfinished.

    Raises:
        NothingComparedError: There is nothing to judge.
    """
    is_faulty = False
    for source in sources:
        results = source.results
        if results.non_finite or results.end is None:
            is_faulty = True
        elif not results.layers and not results.whole:
            raise NothingComparedError(f"{source.path}: has no records to judge")
    if not policy.demands and not is_faulty and not has_updates(sources):
        raise NothingComparedError(
            f"{sources[0].path}: no record gives the norm and the resolution of an update, and "
            f"{policy.path} has no rule for anything else"
        )


def _check_selectors(policy: Policy, sources: Sources) -> None:
    """Refuse rules that select no name in the results; an unfinished run may still add names.

    Raises:
        UsageError: A rule selects nothing.
    """
    if any(source.results.end is None for source in sources):
        return
    names = set[str]().union(*(source.names() for source in sources))
    for demand in policy.demands:
        of_layers = any(field.kind in LAYER_KINDS for field in find(demand.field))
        if names and of_layers and not any(map(demand.selects, names)):
            raise policy.error(demand, f"selects none of the {len(names)} tensors in the results")


def _judge_subject(policy: Policy, sources: Sources) -> Iterator[Verdict]:
    """Yield a verdict on whether any of the results is of the policy's kind of subject, if it has
    one.
    """
    if policy.about is None:
        return
    name, placeholder = {
        "adapter": ("an adapter", "ADAPTER"),
        "tuned": ("a full fine-tune", "TUNED"),
    }[policy.about]
    allowed = f"results of {name}"
    status: Status = "passed"
    text = ""
    if not list_inputs(sources, policy.about):
        status = "inconclusive"
        text = f"no {allowed} were given: loradiag spectrum BASE {placeholder} measures one"
    yield Verdict(rule="about", allowed=allowed, status=status, message=text)


def _judge_demand(
    policy: Policy, demand: Demand, sources: Sources, baseline: Baseline, waivers: Waivers
) -> list[Verdict]:
    """Return the verdicts on every record that a rule or a comparison selects, on aggregates, or
    that there is none.

    Raises:
        UsageError: It does not fit the records.
    """

    def give_up(reason: str) -> list[Verdict]:
        return [_give_up(demand, RuleSubject(), reason)]

    if isinstance(demand, Regression) and not baseline.sources:
        return give_up("no baseline was given: --baseline FILE")
    candidates = find(demand.field)
    present = [field for field in candidates if any(source.holds(field.kind) for source in sources)]
    if len(present) > 1:
        names = " or ".join(f"{field.kind}.{field.name}" for field in present)
        raise policy.error(demand, f"{demand.field} is in several records here; write {names}")
    if not present:
        kinds = [field.kind for field in candidates]
        commands = dict.fromkeys(chain.from_iterable(map(commands_of, kinds)))
        given = " or ".join(f"loradiag {name}" for name in commands)
        return give_up(f"needs {' or '.join(kinds)} records: give the results of {given}, too")
    (field,) = present
    problem = demand.problem_with(field)
    if problem:
        raise policy.error(demand, problem)
    subjects = _select_subjects(policy, demand, field, sources)
    if not subjects:
        return give_up(f"selects no layer with a {field.kind} record")
    findings = [_judge_subject_by(demand, field, subject, baseline) for subject in subjects]
    if isinstance(demand, Regression) or demand.require.per_layer:
        return _judge_each(policy, demand, findings, waivers)
    verdicts = []
    for group, members in groupby(findings, key=lambda finding: finding.subject.group):
        verdicts.append(_judge_aggregate(policy, demand, group, list(members), waivers))
    return verdicts


def _give_up(demand: Demand, subject: RuleSubject, reason: str) -> Verdict:
    """Return an inconclusive verdict of a rule or a comparison."""
    finding = Finding(subject, None, demand.allowed, reason=reason)
    return _make_verdict(demand, finding, "inconclusive")


def _judge_subject_by(
    demand: Demand, field: RecordField, subject: RuleSubject, baseline: Baseline
) -> Finding:
    """Judge one subject by a rule or a comparison; for an aggregate, take its value only."""
    value, reason = value_of(field, subject, demand.floor)
    if value is None:
        return Finding(subject, value, demand.allowed, reason=reason)
    if isinstance(demand, PolicyRule):
        ok = demand.require.per_layer and demand.require.test.holds(value)
        return Finding(subject, value, demand.allowed, ok)
    before, reason = baseline.value(field, subject, demand.floor)
    if before is None:
        return Finding(subject, value, demand.allowed, reason=reason)
    ok, allowed = demand.compare(float(value), before)
    return Finding(subject, value, allowed, ok)


def _select_subjects(
    policy: Policy, demand: Demand, field: RecordField, sources: Sources
) -> list[RuleSubject]:
    """Return the subjects of a rule.

    Raises:
        UsageError: Its ``where`` matches no record, or names a field that the records do not have.
    """
    holding = [source for source in sources if source.holds(field.kind)]
    chosen: list[RuleSubject] = []
    for source in holding:
        subjects = list_subjects(
            field.kind, source, frozenset(policy.coverage.left_out), name_file=len(holding) > 1
        )
        chosen += _filter_subjects(policy, demand, field, subjects)
    if demand.where and not chosen:
        raise policy.error(demand, f"no {field.kind} record matches 'where'")
    if field.kind not in LAYER_KINDS:
        return chosen
    return [subject for subject in chosen if subject.layer is None or demand.selects(subject.layer)]


def _filter_subjects(
    policy: Policy, demand: Demand, field: RecordField, subjects: list[RuleSubject]
) -> list[RuleSubject]:
    """Return the subjects whose records match ``where``, and missing ones, unless all records of
    their group differ.

    Raises:
        UsageError: The records have no field of a name in ``where``.
    """
    if not demand.where:
        return subjects
    tests: list[tuple[RecordField, object]] = []
    for name, value in demand.where.items():
        fields = [candidate for candidate in find(name) if candidate.kind == field.kind]
        if not fields:
            raise policy.error(demand, f"where: a {field.kind} record has no {name}")
        tests.append((fields[0], value))

    def fits(subject: RuleSubject) -> bool:
        record = subject.record
        return record is not None and all(required.of(record) == value for required, value in tests)

    fitting_groups = {subject.group for subject in subjects if fits(subject)}
    groups = {subject.group for subject in subjects if subject.record is not None}
    other_groups = groups - fitting_groups
    return [s for s in subjects if fits(s) or (s.record is None and s.group not in other_groups)]


def _judge_each(
    policy: Policy, demand: Demand, findings: list[Finding], waivers: Waivers
) -> list[Verdict]:
    """Return a verdict on every record, and an inconclusive one if none has a value or a waiver."""
    is_enough, reason = _check_coverage(policy, demand, findings)
    verdicts = []
    for finding in findings:
        status: Status = "passed" if finding.ok else "failed"
        if finding.reason:
            excused = is_enough or (policy.coverage.by == "energy" and finding.subject.fro == 0)
            status = "not judged" if excused else "inconclusive"
        verdicts.append(waivers.apply(_make_verdict(demand, finding, status)))
    is_waived = any(verdict.status == "waived" for verdict in verdicts)
    if all(finding.reason for finding in findings) and not is_waived:
        verdicts.append(_give_up(demand, RuleSubject(), reason))
    return verdicts


def _judge_aggregate(
    policy: Policy, rule: PolicyRule, group: str, findings: list[Finding], waivers: Waivers
) -> Verdict:
    """Return the verdict on the aggregate of a group; waived if the layers without a waiver pass,
    or all have one.
    """
    verdict = _judge_number(policy, rule, group, findings)
    if verdict.status == "passed":
        return verdict
    applied: list[Waiver] = []
    not_waived = []
    for finding in findings:
        waiver = waivers.of(rule.name, finding.subject.layer)
        if waiver is None:
            not_waived.append(finding)
        else:
            applied.append(waiver)
    if not applied:
        return verdict
    if not_waived and _judge_number(policy, rule, group, not_waived).status != "passed":
        return verdict
    waivers.used.update(applied)
    return applied[0].waive(verdict)


def _judge_number(policy: Policy, rule: PolicyRule, group: str, findings: list[Finding]) -> Verdict:
    """Return the verdict on one aggregate of records, without waivers."""
    is_enough, reason = _check_coverage(policy, rule, findings)
    subject = RuleSubject(group=group)
    if not is_enough:
        moved = [finding for finding in findings if finding.subject.fro != 0]
        reasons = [finding.reason for finding in moved if finding.reason]
        return _give_up(rule, subject, "; ".join([reason, *reasons[:1]]))
    values = [finding.value for finding in findings if finding.value is not None]
    measured = rule.require.measure(values)
    status: Status = "passed" if rule.require.holds(measured) else "failed"
    return _make_verdict(rule, Finding(subject, measured, rule.allowed), status)


def _check_coverage(policy: Policy, demand: Demand, findings: list[Finding]) -> tuple[bool, str]:
    """Return whether the subjects with a value suffice, and their number as text; empty if no other
    one counts.
    """
    unjudged = [finding.subject for finding in findings if finding.reason]
    judged = [finding.subject for finding in findings if not finding.reason]
    minimum = policy.coverage.minimum if demand.coverage is None else demand.coverage
    if not judged:
        return False, f"none of the {len(findings)} selected could be judged"
    if not unjudged:
        return True, ""
    count = f"{len(judged)} of {len(findings)} selected could be judged"
    if policy.coverage.by == "layers":
        return len(judged) >= minimum * len(findings), count
    unknown = [subject.layer for subject in unjudged if subject.fro is None]
    if unknown:
        return False, f"{count}, and how far {unknown[0]} moved is not known"
    unjudged_energy, judged_energy = energy_of(unjudged), energy_of(judged)
    if unjudged_energy == 0:
        return True, ""
    share = judged_energy / (judged_energy + unjudged_energy)
    # Rounding of a sum compared with 1 must not hide a small layer.
    return (
        minimum < 1 and share >= minimum,
        f"{count}, {share:.3g} of the change ‖Δ‖²; {minimum:g} is demanded",
    )


def _make_verdict(demand: Demand, finding: Finding, status: Status) -> Verdict:
    message = {"failed": demand.message, "passed": ""}.get(status, finding.reason)
    return Verdict(
        rule=demand.name,
        layer=finding.subject.layer,
        group=finding.subject.label or finding.subject.group,
        measured=str(finding.value).lower() if isinstance(finding.value, bool) else finding.value,
        allowed=finding.allowed,
        status="warned" if status == "failed" and demand.severity == "warning" else status,
        severity=demand.severity,
        message=message,
        line=demand.line,
    )


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
        """Return the first active waiver of a rule for a layer, or for the whole run; None without
        one.
        """
        for waiver in self.active:
            if waiver.covers(rule, layer or ""):
                return waiver
        return None

    def apply(self, verdict: Verdict) -> Verdict:
        """Return a verdict, as waived if it is failed, warned or inconclusive and a
        waiver applies.
        """
        waiver = self.of(verdict.rule, verdict.layer)
        if verdict.status not in {"failed", "warned", "inconclusive"} or waiver is None:
            return verdict
        self.used.add(waiver)
        return waiver.waive(verdict)

    def reports(self) -> Iterator[Verdict]:
        """Yield a warning for every waiver that has expired or was not applied."""
        for waiver in self.expired:
            yield waiver.report(f"expired on {waiver.expires}, so it no longer applies")
        for waiver in self.active:
            if waiver not in self.used:
                yield waiver.report("has no effect any more: delete it")
