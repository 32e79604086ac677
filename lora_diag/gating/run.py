"""``gate``: judge results by a policy."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Any, Unpack

from lora_diag.errors import InputError, UsageError
from lora_diag.files import RESULTS, check_output
from lora_diag.gating import GateOptions
from lora_diag.gating.draft import draft
from lora_diag.gating.evidence import Source, check_source, read_source
from lora_diag.gating.inputs import compare_inputs
from lora_diag.gating.judge import Baseline, judge, tighten_baseline
from lora_diag.gating.policy import Policy, read_age, read_policy
from lora_diag.gating.record import Verdict, outcome
from lora_diag.records import End, Results, Run, RunInput
from lora_diag.records.run import timestamp
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
        policy: A policy file, or a policy.
        results: Results files, or results in memory.
        baseline: Results files of earlier runs to compare with.
        ratchet: If the gate passes, write improvements to the baseline, which never gets worse.
        shipped: Checkpoints and adapters that the results must belong to, at any path.
        max_age: Maximum age of results, such as ``12h``, ``7d`` or ``2w``; the policy may set a lower one.
        today: Date for the expiry of waivers and the age of results; default the current time.
        **options: ``GateOptions``.

    Returns:
        The verdicts, in ``whole``; ``lora_diag.gating.record.outcome`` returns the outcome.

    Raises:
        UsageError: The policy is invalid, or does not fit the results.
        InputError: A file cannot be read, or was truncated or edited.
        NothingComparedError: There is no record to judge.

    Example:
        >>> import lora_diag
        >>> from lora_diag.gating.policy import ready_policy
        >>> measured = lora_diag.spectrum("sample_checkpoints/base", "sample_checkpoints/full_ft")
        >>> verdicts = gate(ready_policy("full-ft-drift"), measured)
        >>> outcome(verdicts.whole)
        'passed'
    """
    arguments = fill_options(GateOptions, options)
    baseline, ratchet, shipped, max_age = (arguments[name] for name in ("baseline", "ratchet", "shipped", "max_age"))
    baseline = [baseline] if isinstance(baseline, str | Path) else list(baseline)
    if not results:
        raise UsageError("gate: give at least one results file")
    if ratchet and len(baseline) != 1:
        raise UsageError("--ratchet: give the file to tighten with --baseline, once")
    if ratchet:
        check_output(Path(baseline[0]), RESULTS, overwrite=True)  # its content is checked when it is read
    rules = policy if isinstance(policy, Policy) else read_policy(policy)
    if baseline and not rules.regressions:
        raise UsageError(
            f"{rules.path}: has no [[baseline]], so nothing would be compared with {baseline[0]}; add one, or remove "
            "--baseline"
        )
    if not baseline and rules.regressions:
        baseline = [Path(rules.path).parent / path for path in rules.inputs.baseline]
    if max_age is not None:
        rules = _limit_age(rules, max_age)
    baselines = [_read_baseline(path) for path in baseline]
    sources, unmatched = compare_inputs([_read_source(item, i) for i, item in enumerate(results, 1)], shipped)
    day = today or date.today()
    now = datetime.combine(today, time(), UTC) if today is not None else datetime.now(UTC)
    verdicts = judge(rules, sources, baselines, day, now, unmatched)
    if ratchet and outcome(verdicts) == "passed":
        tightened = tighten_baseline(rules.regressions, Baseline(*baselines), sources)
        if tightened is not None:
            tightened.write(baselines[0].path)
    return _make_results(rules, sources, baselines, verdicts, day)


def _limit_age(policy: Policy, max_age: str) -> Policy:
    """Return a policy that also refuses results above a maximum age.

    Raises:
        UsageError: The text is not an age.
    """
    try:
        limit = read_age(max_age)
    except ValueError as error:
        raise UsageError(f"--max-age: {error}") from error
    if policy.inputs.max_age is not None:
        limit = min(limit, policy.inputs.max_age)
    return policy.model_copy(update={"inputs": policy.inputs.model_copy(update={"max_age": limit})})


def gate_init(*results: Path | str | Results[Any], name: str = "policy.toml") -> str:
    """Return the text of a policy that compares every layer with these results as the baseline.

    Args:
        results: Results files, or results in memory, of a reference checkpoint.
        name: Name of the policy file.

    Raises:
        InputError: A file cannot be read, did not finish, or has no value to compare.
    """
    sources = [_read_source(item, i) for i, item in enumerate(results, 1)]
    for source in sources:
        if source.results.end is None:
            raise InputError(f"{source.path}: the run did not finish; continue it with --resume before deriving limits")
    return draft(sources, name)


def measure(base: Path | str, tuned: Path | str | None, adapters: Sequence[Path | str]) -> list[Results[Any]]:
    """Measure the inputs of a gate, for ``gate --base``.

    Args:
        base: Base checkpoint.
        tuned: A full fine-tune; None if only adapters are judged.
        adapters: Adapters on ``base``.

    Returns:
        The spectra of the adapters, or else of the fine-tune, and the residuals if both are given.

    Raises:
        UsageError: Neither a fine-tune nor an adapter is given.
    """
    from lora_diag.diagnostics.residual.measure import residual
    from lora_diag.diagnostics.spectrum.run import spectrum

    to_measure = list(adapters) or ([tuned] if tuned is not None else [])
    if not to_measure:
        raise UsageError("--base: nothing to judge; give --tuned or --adapter")
    results: list[Results[Any]] = [spectrum(base, path) for path in to_measure]
    return [*results, residual(base, tuned, list(adapters))] if tuned is not None and adapters else results


def _read_source(item: Path | str | Results[Any], number: int) -> Source:
    """Return the source of a results file, or of results in memory, named after their command and last input or number.

    Raises:
        InputError: A file cannot be read, or the totals of the records differ from those in the last line.
    """
    if isinstance(item, Results):
        name = item.run.inputs[-1].path if item.run.inputs else str(number)
        return check_source(Source(f"{item.run.command} of {name}", item))
    return read_source(item)


def _read_baseline(path: Path | str) -> Source:
    """Read a baseline, which must be a finished run.

    Raises:
        InputError: It cannot be read or did not finish.
    """
    source = read_source(path)
    if source.results.end is None:
        raise InputError(f"{path}: the run did not finish, so it cannot be a baseline; continue it with --resume")
    return source


def _make_results(
    policy: Policy, sources: Sequence[Source], baselines: Sequence[Source], verdicts: tuple[Verdict, ...], day: date
) -> Results[Any]:
    """Return verdicts as the results of a run of ``gate``."""
    sources_by_role = [("results", source) for source in sources] + [("baseline", source) for source in baselines]
    inputs = [
        RunInput(
            role="built-in policy" if policy.ready else "policy",
            path=policy.path,
            kind=policy.title or "a policy",
            tensors=0,
        )
    ]
    for role, source in sources_by_role:
        layers = len({record.layer for record in source.results.layers})
        end = source.results.end
        kind = f"loradiag {source.results.run.command}"
        digest, made = end.sha256 if end is not None else "", source.results.run.made
        notes = (*([f"made {made}"] if made else []), *([] if digest else ["no hash"]))
        inputs.append(RunInput(role=role, path=source.path, kind=kind, tensors=layers, notes=notes, sha256=digest))
    inputs += _list_inputs(sources)
    metrics = dict.fromkeys(metric_of(source.results.layers) for source in sources)
    metric_names = " and ".join(METRIC_NAMES[metric] for metric in metrics if metric != "weights")
    settings = {"today": day.isoformat(), **({"metric": metric_names} if metric_names else {})}
    run = Run(command="gate", version=__version__, inputs=tuple(inputs), settings=settings, made=timestamp())
    # A verdict is about a run, so the file has no layers of its own.
    return Results(run, (), (), End(layers=0, left_out=0, fro=None, base_fro=None), verdicts)


def _list_inputs(sources: Sequence[Source]) -> list[RunInput]:
    """Return the distinct inputs of the results, with their state."""
    notes_by_state = {"same": "unchanged", "changed": "CHANGED since it was measured", "unknown": "not compared"}
    inputs: dict[tuple[str, str, str], RunInput] = {}
    for source in sources:
        for present in source.present:
            measured = next(
                run_input
                for run_input in source.results.run.inputs
                if (run_input.role, run_input.path, run_input.fingerprint)
                == (present.role, present.path, present.recorded)
            )
            notes = (notes_by_state[present.state],)
            inputs.setdefault(
                (measured.role, measured.path, measured.fingerprint),
                measured.model_copy(update={"notes": notes, "lacking": ()}),
            )
    return list(inputs.values())
