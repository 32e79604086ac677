"""``gate``: judge results by a policy."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, time
from pathlib import Path
from string import Template
from typing import Any, Unpack

from lora_diag.errors import Given, InputError, UsageError
from lora_diag.files import RESULTS, check_output
from lora_diag.gating import GateOptions
from lora_diag.gating.checks import compare_inputs
from lora_diag.gating.conditions import KINDS, RecordField, find
from lora_diag.gating.judge import judge
from lora_diag.gating.policy import (
    READY,
    SPIKE,
    Policy,
    find_policy,
    read_age,
    read_policy,
    read_text,
)
from lora_diag.gating.sources import (
    Baseline,
    InputState,
    ResultsSource,
    RuleSubject,
    Sources,
    energy_of,
    list_subjects,
    open_results,
    value_of,
)
from lora_diag.records import End, Results, Run, RunInput
from lora_diag.records.base import Guard
from lora_diag.records.run import timestamp
from lora_diag.records.verdict import Verdict, outcome
from lora_diag.records.vocabulary import METRIC_NAMES, metric_of
from lora_diag.running.options import fill_options, show_options
from lora_diag.version import __version__


@show_options
def gate(
    policy: Path | str | Policy,
    *results: Path | str | Results[Any],
    today: date | None = None,
    **options: Unpack[GateOptions],
) -> Results[Any]:
    """Judge results by a policy.

    Args:
        policy: A policy, the name of a built-in one, or a policy file; a text with neither a folder
            nor the suffix ``.toml`` is a name.
        results: Results files, or results in memory.
        baseline: Results files of earlier runs to compare with; by default those that the policy
            names.
        ratchet: If the gate passes, write improvements to the baseline, which never gets worse.
        for_: Checkpoints and adapters that the results must belong to, at any path.
        max_age: Maximum age of results, such as ``12h``, ``7d`` or ``2w``; the policy may set a
            lower one.
        today: Date for the expiry of waivers and the age of results; default the current time.
        **options: ``GateOptions``.

    Returns:
        The verdicts, in ``whole``; ``lora_diag.records.verdict.outcome`` returns the outcome.

    Raises:
        UsageError: The policy is invalid, or does not fit the results or the options; an option is
            invalid; or no results are given.
        InputError: A file cannot be read or written, or was truncated or edited, or the run of a
            baseline did not finish.
        NothingComparedError: There is no record to judge.

    Example:
        >>> import lora_diag
        >>> from lora_diag.gating.policy import ready_policy
        >>> measured = lora_diag.spectrum("sample_checkpoints/base", "sample_checkpoints/full_ft")
        >>> verdicts = gate(ready_policy("full-ft-drift"), measured)
        >>> outcome(verdicts.whole)
        'passed'
    """
    options = fill_options(GateOptions, options)
    baseline, ratchet, max_age = options["baseline"], options["ratchet"], options["max_age"]
    baseline = [baseline] if isinstance(baseline, str | Path) else list(baseline)
    if not results:
        raise UsageError("gate: give at least one results file")
    if ratchet and len(baseline) != 1:
        raise UsageError(Given("ratchet"), "give the file to tighten with $baseline, once")
    if ratchet:  # its content is checked when it is read
        check_output(Path(baseline[0]), RESULTS, overwrite=True)
    rules = policy
    if not isinstance(rules, Policy):
        rules = find_policy(rules) if isinstance(rules, str) else read_policy(rules)
    if baseline and not rules.regressions:
        raise UsageError(
            rules.path,
            f"has no [[baseline]], so nothing would be compared with {baseline[0]}",
            "add one, or remove $baseline",
        )
    if not baseline and rules.regressions:
        baseline = [Path(rules.path).parent / path for path in rules.inputs.baseline]
    if max_age is not None:
        rules = _limit_age(rules, max_age)
    stored = Baseline([open_results(path) for path in baseline])
    for source in stored.sources:
        if source.results.end is None:
            raise InputError(
                source.path,
                "the run did not finish, so it cannot be a baseline",
                "continue it with $resume",
            )
    sources, unmatched = compare_inputs(_open_sources(results), options["for_"])
    day = today or date.today()
    now = datetime.combine(today, time(), UTC) if today is not None else datetime.now(UTC)
    verdicts = judge(rules, sources, stored, day, now, unmatched)
    if ratchet and outcome(verdicts) == "passed":
        tightened = stored.tighten(rules.regressions, sources)
        if tightened is not None:
            tightened.write(stored.sources[0].path)
    return _make_results(rules, sources, stored.sources, verdicts, day)


def _open_sources(results: Sequence[Path | str | Results[Any]]) -> list[ResultsSource]:
    """Open results, numbered from 1."""
    return [open_results(item, number) for number, item in enumerate(results, 1)]


def _limit_age(policy: Policy, max_age: str) -> Policy:
    """Return a policy that also refuses results above a maximum age.

    Raises:
        UsageError: The text is not an age.
    """
    try:
        limit = read_age(max_age)
    except ValueError as error:
        raise UsageError(Given("max_age"), str(error)) from error
    if policy.inputs.max_age is not None:
        limit = min(limit, policy.inputs.max_age)
    return policy.model_copy(update={"inputs": policy.inputs.model_copy(update={"max_age": limit})})


def measure(
    base: Path | str, tuned: Path | str | None, adapters: Sequence[Path | str]
) -> list[Results[Any]]:
    """Measure the inputs of a gate, for ``gate --base``.

    Args:
        base: Base checkpoint.
        tuned: A full fine-tune; None if only adapters are judged.
        adapters: Adapters on ``base``.

    Returns:
        The spectra of the adapters, or else of the fine-tune, and the residuals if both are given.

    Raises:
        UsageError: Neither a fine-tune nor an adapter is given; or as ``spectrum`` and
            ``residual``.
    """
    from lora_diag.diagnostics.residual.measure import residual
    from lora_diag.diagnostics.spectrum.run import spectrum

    to_measure = list(adapters) or ([tuned] if tuned is not None else [])
    if not to_measure:
        raise UsageError(Given("base"), "nothing to judge", "give $tuned or $adapter")
    results: list[Results[Any]] = [spectrum(base, path) for path in to_measure]
    if tuned is not None and adapters:
        results.append(residual(base, tuned, list(adapters)))
    return results


def _make_results(
    policy: Policy,
    sources: Sources,
    baselines: Sources,
    verdicts: tuple[Verdict, ...],
    day: date,
) -> Results[Any]:
    """Return verdicts as the results of a run of ``gate``."""
    policy_input = RunInput(
        role="built-in policy" if policy.ready else "policy",
        path=policy.path,
        kind=policy.title or "a policy",
        tensors=0,
    )
    inputs = [policy_input]
    inputs += [_describe_source("results", source) for source in sources]
    inputs += [_describe_source("baseline", source) for source in baselines]
    states: dict[tuple[str, str, str], InputState] = {}
    for source in sources:
        for state in source.inputs:
            item = state.input
            states.setdefault((item.role, item.path, item.fingerprint), state)
    for state in states.values():
        changes = {"notes": (_STATE_NOTES[state.state],), "lacking": ()}
        inputs.append(state.input.model_copy(update=changes))
    settings = {"today": day.isoformat()}
    metrics = dict.fromkeys(metric_of(source.results.layers) for source in sources)
    metric_names = [METRIC_NAMES[metric] for metric in metrics if metric != "weights"]
    if metric_names:
        settings["metric"] = " and ".join(metric_names)
    run = Run(
        command="gate",
        version=__version__,
        inputs=tuple(inputs),
        settings=settings,
        made=timestamp(),
    )
    # A verdict is about a run, so the file has no layers of its own.
    return Results(run, (), (), End(layers=0, left_out=0, fro=None, base_fro=None), verdicts)


# State of an input -> note on it.
_STATE_NOTES = {
    "same": "unchanged",
    "changed": "CHANGED since it was measured",
    "unknown": "not compared",
}


def _describe_source(role: str, source: ResultsSource) -> RunInput:
    """Return results as an input of the gate."""
    run, end = source.results.run, source.results.end
    digest = end.sha256 if end is not None else ""
    notes = []
    if run.made:
        notes.append(f"made {run.made}")
    if not digest:
        notes.append("no hash")
    return RunInput(
        role=role,
        path=source.path,
        kind=f"loradiag {run.command}",
        tensors=len({record.layer for record in source.results.layers}),
        notes=tuple(notes),
        sha256=digest,
    )


def gate_init(*results: Path | str | Results[Any], name: str = "policy.toml") -> str:
    """Return the text of a policy that compares every layer with these results as the baseline.

    Args:
        results: Results files, or results in memory, of a reference checkpoint.
        name: Name of the policy file.

    Raises:
        InputError: A file cannot be read, did not finish, or has no value to compare.
    """
    sources = _open_sources(results)
    for source in sources:
        if source.results.end is None:
            raise InputError(
                source.path,
                "the run did not finish",
                "continue it with $resume before deriving limits",
            )
    files = " ".join(source.path for source in sources)
    rules = "\n".join(_draft_comparisons(sources))
    if not rules:
        fix = (
            f"use a built-in policy (--policy {', '.join(READY)}), or write a [[rule]] on a field "
            "of these records"
        )
        if any(_is_guarded(kind, source) for kind in KINDS for source in sources):
            fix = (
                "its values are zero, or not resolved by the files: give results of a checkpoint "
                "that changed"
            )
        raise InputError(f"{files}: no value to compare with later results; {fix}")
    reasons = {item.reason for source in sources for item in source.results.left_out}
    left_out = '# left_out = ["only_in_tuned"] # accepted reasons for tensors without a record'
    if "no_activations" in reasons:
        left_out = (
            'left_out = ["no_activations"] # embeddings and other layers without recorded '
            "activations"
        )
    paths = [os.path.relpath(source.path, Path(name).parent) for source in sources]
    baseline = f"baseline = {json.dumps(paths, ensure_ascii=False)}"
    are_files = all(Path(source.path).is_file() for source in sources)
    if not are_files or not all(map(str.isprintable, paths)):
        baseline = '# baseline = ["results.jsonl"]'
    return Template(read_text("init.template")).substitute(
        results=_escape_comment(files),
        name=_escape_comment(name),
        left_out=left_out,
        baseline=baseline,
        spike=SPIKE,
        rules=rules,
    )


def _is_guarded(kind: str, source: ResultsSource) -> bool:
    """Return whether results may have records of a kind with values that a baseline guards."""
    return bool(KINDS[kind].guards) and source.holds(kind)


def _draft_comparisons(sources: Sources) -> Iterator[str]:
    """Yield a comparison for each guarded value of the records, in several metrics one for each.

    The comparisons name the metric, unless all records are in that of the weights.
    """
    for kind, cls in KINDS.items():
        by_metric: dict[str, list[RuleSubject]] = {}
        for source in sources:
            if not _is_guarded(kind, source):
                continue
            metric = "weights"
            if "metric" in cls.model_fields:
                metric = metric_of(source.results.layers)
            by_metric.setdefault(metric, []).extend(list_subjects(kind, source))
        for metric, subjects in by_metric.items():
            where = {} if by_metric.keys() == {"weights"} else {"metric": metric}
            for guard in cls.guards:
                comparison = _draft_comparison(kind, guard, subjects, where)
                if comparison:
                    yield comparison


def _draft_comparison(
    kind: str, guard: Guard, subjects: Sequence[RuleSubject], where: dict[str, Any]
) -> str:
    """Return a comparison of a value with the baseline; empty if it is not known or zero, or
    limited by the rank.

    Rules that limit it, if the guard has ``limit_by``.
    """
    (field,) = find(f"{kind}.{guard.path}")
    for name, required in guard.where:
        subjects = [
            subject
            for subject in subjects
            if subject.record is None or getattr(subject.record, name, None) == required
        ]
    values = _list_values(field, subjects)
    if not any(values):
        return ""  # no fraction of zero is a tolerance
    if guard.limit_by:
        groups: dict[str, list[RuleSubject]] = {}
        for subject in subjects:
            groups.setdefault(getattr(subject.record, guard.limit_by), []).append(subject)
        rules = []
        for number, (name, group) in enumerate(groups.items(), 1):
            limited = {**where, guard.limit_by: name}
            rules.append(_draft_limit(field, guard, group, limited, number))
        return "\n".join(rules)
    kept = max(len(getattr(subject.record, "s", ())) for subject in subjects)
    if field.path[0] == "rank_at" and math.ceil(1.1 * max(values)) >= kept:
        return ""  # such as the rank of an adapter: its updates cannot need more than it has
    where = {**where, **dict(guard.where)}
    lines = [
        f"# {field.name} is {min(values):.4g} to {max(values):.4g}.",
        "[[baseline]]",
        f'field = "{kind}.{guard.path}"',
        f'worse = "{guard.worse}"',
    ]
    if where:
        lines.append(f"where = {_format_table(where)}")
    lines += [
        f'tolerance = "{guard.tolerance}"',
        f'message = "{guard.message}"',
        _draft_coverage(field, subjects),
    ]
    return "\n".join(lines)


def _list_values(field: RecordField, subjects: Sequence[RuleSubject]) -> list[float]:
    """Return the numbers of a field that are known."""
    values = [value_of(field, subject)[0] for subject in subjects]
    return [value for value in values if isinstance(value, float | int)]


def _draft_limit(
    field: RecordField,
    guard: Guard,
    subjects: Sequence[RuleSubject],
    where: Mapping[str, Any],
    number: int,
) -> str:
    """Return a rule that limits a value to the largest of these, with the tolerance, and to at
    least zero.
    """
    values = _list_values(field, subjects)
    if not all(str(value).isprintable() for value in where.values()):
        return (
            f"# No limit of {field.name}: {_escape_comment(str(where))} cannot be written here.\n"
        )
    limit = max(0.0, *values) * (1 + float(guard.tolerance.rstrip("%")) / 100)
    return (
        f"# {field.name} is {min(values):.4g} to {max(values):.4g}; the limit may be any number.\n"
        f'[[rule]]\nname = "{field.name}{number}"\nrequire = "{field.kind}.{field.name} <= '
        f'{limit:.2g}"\n'
        f'where = {_format_table(where)}\nmessage = "{guard.message}"\n'
    )


def _format_table(values: Mapping[str, str | bool]) -> str:
    """Return an inline table of TOML."""
    pairs = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    return f"{{ {', '.join(pairs)} }}"


def _draft_coverage(field: RecordField, subjects: Sequence[RuleSubject]) -> str:
    """Return the coverage for a field that is null in layers that changed; empty without any, or
    without all norms.
    """
    null_subjects = [s for s in subjects if s.record is not None and field.of(s.record) is None]
    if not null_subjects or any(subject.fro is None for subject in subjects):
        return ""
    missing, energy = energy_of(null_subjects), energy_of(subjects)
    if not missing:
        return ""
    share = math.floor(100 * (1 - missing / energy)) / 100
    return (
        f"coverage = {share} # of ‖Δ‖²: {field.name} is null in {len(null_subjects)} of "
        f"{len(subjects)} layers\n"
    )


def _escape_comment(text: str) -> str:
    """Return text with ``?`` for line breaks and other control characters, so that it cannot end a
    comment.
    """
    return "".join(char if char.isprintable() else "?" for char in text)
