"""Inputs of results: their current state, pins of the policy, and the age of the results."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from lora_diag.errors import InputError
from lora_diag.gating.evidence import Present, Source
from lora_diag.gating.policy import Policy
from lora_diag.gating.record import Status, Verdict
from lora_diag.records import RunInput
from lora_diag.running.fingerprint import DIGITS, content_hash, files_of, fingerprint, fingerprint_of_adapter, legible

# Maximum difference between the clocks of the machines that measure and judge.
MAX_CLOCK_DIFFERENCE = timedelta(days=1)

# Inputs that are weights, by which they can be known again.
WEIGHT_ROLES = ("base", "tuned", "adapter", "reference")


def compare_inputs(sources: Sequence[Source], shipped: Sequence[Path | str]) -> tuple[list[Source], list[Present]]:
    """Compare the inputs of results with the current files at their paths, or at ``shipped``.

    Args:
        sources: The results.
        shipped: Checkpoints and adapters that the results must belong to.

    Returns:
        The results with the state of their inputs, and the files of ``shipped`` without results.

    Raises:
        InputError: A file of ``shipped`` cannot be read.
    """
    fingerprints = {str(path): _get_fingerprint(path) for path in shipped}
    compared = [replace(source, present=tuple(_compare_source(source, fingerprints))) for source in sources]
    recorded = {entry.fingerprint for source in sources for entry in source.results.run.inputs}
    unmatched = [
        Present("--for", legible(path), "", now, "changed", "")
        for path, (now, _) in fingerprints.items()
        if now not in recorded
    ]
    return compared, unmatched


def _get_fingerprint(path: Path | str) -> tuple[str, bool]:
    """Return the fingerprint of weights, and whether they are an adapter.

    Raises:
        InputError: They cannot be read.
    """
    from lora_diag.adapters import is_adapter
    from lora_diag.adapters.source import open_source
    from lora_diag.checkpoints import locate, open_checkpoint

    local = locate(path)
    if is_adapter(local):
        return fingerprint_of_adapter(open_source(local)), True
    return fingerprint(open_checkpoint(path)), False


def _compare_source(source: Source, shipped: dict[str, tuple[str, bool]]) -> list[Present]:
    """Return the state of the weights of results.

    Args:
        source: The results.
        shipped: Fingerprints of the current weights by path, and whether they are an adapter.
    """
    inputs = [run_input for run_input in source.results.run.inputs if run_input.role in WEIGHT_ROLES]
    path_of = {now: path for path, (now, _) in shipped.items()}
    # The results must have an input of each kind that is shipped; an old and a new adapter are of one kind.
    kinds = {is_adapter for _, is_adapter in shipped.values()}
    absent = {
        kind
        for kind in kinds
        if not any(_is_of_kind(run_input, kind) and run_input.fingerprint in path_of for run_input in inputs)
    }
    states = []
    for run_input in inputs:
        replacements = [path for path, (_, kind) in shipped.items() if kind in absent and _is_of_kind(run_input, kind)]
        if run_input.fingerprint in path_of:
            states.append(
                _make_present(run_input, run_input.fingerprint, "same", legible(path_of[run_input.fingerprint]))
            )
        elif replacements and run_input.role != "base":
            why = f"{legible(replacements[0])} is not what was measured as {run_input.path}"
            states.append(_make_present(run_input, shipped[replacements[0]][0], "changed", why))
        else:
            states.append(_compare_with_path(run_input))
    return states


def _is_of_kind(run_input: RunInput, adapter: bool) -> bool:
    return run_input.role == "reference" or (run_input.role == "adapter") == adapter


def _compare_with_path(run_input: RunInput) -> Present:
    """Return the state of an input from the file at its path; addresses and Hub ids are not accessed."""
    if not os.path.exists(run_input.path):  # noqa: PTH110  (unlike Path.exists(), takes any name)
        return _make_present(
            run_input, "", "unknown", "is not at the path it had, so nothing was compared; --for PATH names it"
        )
    if len(run_input.fingerprint) != DIGITS:
        return _make_present(run_input, "", "unknown", "has no fingerprint that can be compared: measure it again")
    try:
        now, _ = _get_fingerprint(run_input.path)
        if now != run_input.fingerprint:
            return _make_present(run_input, now, "changed", f"{run_input.path} changed since it was measured")
        if run_input.sha256 and _hash_content(run_input.path) != run_input.sha256:
            return _make_present(run_input, now, "changed", f"{run_input.path} has another SHA-256 than it had")
    except InputError as error:
        return _make_present(run_input, "", "changed", f"cannot be compared: {error}")
    return _make_present(run_input, now, "same", "")


def _hash_content(path: str) -> str:
    from lora_diag.adapters import is_adapter
    from lora_diag.adapters.source import open_source
    from lora_diag.checkpoints import locate, open_checkpoint

    local = locate(path)
    return content_hash(files_of(open_source(local).checkpoint if is_adapter(local) else open_checkpoint(path)))


def _make_present(run_input: RunInput, now: str, state: str, reason: str) -> Present:
    return Present(run_input.role, run_input.path, run_input.fingerprint, now, state, reason)


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
    for role, pinned in pins:
        yield from _judge_pins(sources, role, pinned)
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
    elif age < -MAX_CLOCK_DIFFERENCE:
        text = "was made in the future by this machine's clock: correct the clock, or measure again"
    else:
        return _make_verdict(source.path, made, allowed, "passed", "")
    return _make_verdict(source.path, made, allowed, "inconclusive", f"{source.path}: {text}")


def _judge_pins(sources: Sequence[Source], role: str, pinned: str) -> Iterator[Verdict]:
    """Yield verdicts on whether every input of a role has the fingerprint that the policy pins."""
    of_role = [run_input for source in sources for run_input in source.results.run.inputs if run_input.role == role]
    allowed = "as [inputs] pins it"
    if not of_role:
        yield _make_verdict(role, None, allowed, "inconclusive", f"the results have no {role}")
    for run_input in of_role:
        name = f"{role} {run_input.path}"
        if run_input.fingerprint == pinned:
            yield _make_verdict(name, "pinned", allowed, "passed", f"fingerprint {pinned}")
        elif len(run_input.fingerprint) != len(pinned):
            text = "the results have no fingerprint of it, or that of an older loradiag: measure again"
            yield _make_verdict(name, None, allowed, "inconclusive", text)
        else:
            text = f"the results are of {run_input.fingerprint}, and the policy pins {pinned}"
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


def format_duration(duration: timedelta) -> str:
    """Return a duration in days, or in hours below two days.

    >>> format_duration(timedelta(days=7)), format_duration(timedelta(hours=30))
    ('7 days', '30 hours')
    """
    hours = duration.total_seconds() / 3600
    return f"{hours / 24:.0f} days" if hours >= 48 else f"{hours:.0f} hours"
