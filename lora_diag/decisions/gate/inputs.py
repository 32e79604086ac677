"""Checks of the inputs of results: their current state, pins of the policy, and the age of the results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

from lora_diag.decisions.gate.evidence import Present, Source
from lora_diag.decisions.gate.policy import Policy
from lora_diag.decisions.gate.record import Status, Verdict

# Maximum difference between the clocks of the machines that measure and judge.
CLOCKS = timedelta(days=1)


def judge_inputs(
    policy: Policy,
    sources: Sequence[Source],
    baseline: Sequence[Source],
    unmatched: Sequence[Present],
    now: datetime,
) -> Iterator[Verdict]:
    """Yield verdicts on whether results and inputs are unchanged, and as the policy requires.

    Args:
        policy: The policy, with pinned fingerprints and the maximum age of results.
        sources: The results.
        baseline: Results to compare with.
        unmatched: Files of ``--for`` without results.
        now: The current time.
    """
    for source in (*sources, *baseline):
        if not source.sealed:
            text = f"{source.path}: its last line has no SHA-256, so that an edit would not be noticed: measure again"
            yield _make_verdict(source.path, "no hash", "as written", "inconclusive", text)
    pins, max_age = policy.inputs.pins, policy.inputs.max_age
    for source in sources:
        for present in source.present:
            yield _judge_state(source, present)
        if max_age is not None:
            yield _judge_age(source, max_age, now)
    for present in unmatched:
        text = f"no results are of it: its fingerprint is {present.now}; measure it"
        yield _make_verdict(f"--for {present.path}", "none", "results of it", "inconclusive", text)
    for role, fingerprint in pins:
        yield from _judge_pins(sources, role, fingerprint)
    if not (any(source.present for source in sources) or pins or max_age is not None or unmatched):
        yield _make_verdict("", None, "inputs as measured", "not judged", "the results name no checkpoint or adapter")


def _judge_state(source: Source, present: Present) -> Verdict:
    text = f": its fingerprint is {present.now} and was {present.recorded}" if present.now else ""
    states: dict[str, tuple[Status, str | None, str]] = {
        "same": ("passed", "unchanged", f"fingerprint {present.recorded}"),
        "changed": ("inconclusive", "changed", f"{present.why}{text}; measure it again, {source.path} is not of it"),
        "unknown": ("not judged", None, present.why),
    }
    status, measured, message = states[present.state]
    return _make_verdict(f"{present.role} {present.path}", measured, "unchanged since measured", status, message)


def _judge_age(source: Source, max_age: timedelta, now: datetime) -> Verdict:
    made, allowed = source.results.run.made, f"made within {format_duration(max_age)}"
    if not made:
        text = "does not state its time: measure again"
        return _make_verdict(source.path, None, allowed, "inconclusive", f"{source.path}: {text}")
    age = now - datetime.fromisoformat(made).astimezone(UTC)
    if age > max_age:
        text = f"is {format_duration(age)} old: measure again"
    elif age < -CLOCKS:
        text = "was made in the future by this machine's clock: correct the clock, or measure again"
    else:
        return _make_verdict(source.path, made, allowed, "passed", "")
    return _make_verdict(source.path, made, allowed, "inconclusive", f"{source.path}: {text}")


def _judge_pins(sources: Sequence[Source], role: str, fingerprint: str) -> Iterator[Verdict]:
    """Yield verdicts on whether every input of a role has the fingerprint that the policy pins."""
    of_role = [run_input for source in sources for run_input in source.results.run.inputs if run_input.role == role]
    allowed = "as [inputs] pins it"
    if not of_role:
        yield _make_verdict(role, None, allowed, "inconclusive", f"the results have no {role}")
    for run_input in of_role:
        name = f"{role} {run_input.path}"
        if run_input.fingerprint == fingerprint:
            yield _make_verdict(name, "pinned", allowed, "passed", f"fingerprint {fingerprint}")
        elif len(run_input.fingerprint) != len(fingerprint):
            text = "the results have no fingerprint of it, or that of an older loradiag: measure again"
            yield _make_verdict(name, None, allowed, "inconclusive", text)
        else:
            text = f"the results are of {run_input.fingerprint}, and the policy pins {fingerprint}"
            yield _make_verdict(name, "another", allowed, "failed", text)


def _make_verdict(group: str, measured: str | None, allowed: str, status: Status, message: str) -> Verdict:
    return Verdict(
        rule="inputs",
        layer=None,
        group=group,
        measured=measured,
        allowed=allowed,
        status=status,
        severity="error",
        message=message,
    )


def format_duration(time: timedelta) -> str:
    """Return a duration in days, or in hours below two days.

    >>> format_duration(timedelta(days=7)), format_duration(timedelta(hours=30))
    ('7 days', '30 hours')
    """
    hours = time.total_seconds() / 3600
    return f"{hours / 24:.0f} days" if hours >= 48 else f"{hours:.0f} hours"
