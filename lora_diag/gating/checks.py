"""Built-in checks, which apply with every policy that does not disable them, and the identity of
the inputs of results.

A check of records applies to records of any kind that have the fields which it reads.

Intruder dimensions are not included: a rule such as ``intruders <= 2`` judges the records of
``loradiag intruders``. ``spike`` judges σ_1(ΔW)/σ_1(W_base) by its lower bound σ_1(ΔW)/‖W_base‖_F;
``sigma_to_base`` is its upper bound.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from lora_diag.errors import InputError
from lora_diag.gating.policy import Checks, Policy
from lora_diag.gating.sources import (
    InputState,
    ResultsSource,
    Sources,
    list_inputs,
    list_layers,
)
from lora_diag.records import RunInput
from lora_diag.records.verdict import Status, Verdict
from lora_diag.records.vocabulary import METRIC_NAMES, metrics_of
from lora_diag.rendering.statements import is_unrelated
from lora_diag.running.fingerprint import (
    DIGITS,
    content_hash,
    files_of,
    fingerprint,
    fingerprint_of_adapter,
    legible,
)
from lora_diag.storage import Checkpoint

# Below this fraction of σ_1 a direction of an adapter is unused: ten times float32's spacing, the
# rounding error of the smallest singular values of a product of float32 factors.
UNUSED = 1e-6

# Largest ‖BA‖_F with which no entry of BA is a normal number of the dtype that computes it:
# float32, or float16 if the factors are stored in it, of which entries below half its smallest
# number are rounded to zero.
UNDERFLOW = {"float32": 2.0**-126, "float16": 2.0**-25}

# Maximum difference between the clocks of the machines that measure and judge.
MAX_CLOCK_DIFFERENCE = timedelta(days=1)

# Roles of inputs that are checkpoints or adapters, which have a fingerprint.
WEIGHT_ROLES = ("base", "tuned", "adapter", "reference")

# Checks whose findings are inconclusive and do not prove a fault.
_INCONCLUSIVE_CHECKS = frozenset({"finished", "base"})
# Fields of the records that checks of updates are about, and of those with singular values.
_UPDATE_FIELDS = ("fro", "resolution")
_SPECTRUM_FIELDS = (
    *_UPDATE_FIELDS,
    "s",
    "complete",
    "method",
    "metric",
    "weights_fro",
    "spike",
    "spike_to_base",
)
_LINEAGE_FIELDS = ("cosine_to_base", "lineage")
# Checks of records of updates.
_CHECKS_OF_UPDATES = frozenset({"dead", "unused_rank", "spike", "unresolved"})
# Those that do not apply to spectra in another metric, where one direction reflects the
# distribution of the inputs.
_CHECKS_OF_WEIGHTS = frozenset({"unused_rank", "spike"})
_NOT_OF_THIS_BASE = frozenset({"not_in_base", "shape_differs", "needs_base", "only_in_adapter"})


@dataclass(frozen=True, slots=True)
class Alarm:
    """One finding of a check; ``allowed`` is the requirement if that depends on the finding, else
    empty.

    ``unknown`` prevents the gate from passing at every severity, because no verdict is possible.
    """

    message: str
    layer: str | None = None
    measured: float | str | None = None
    allowed: str = ""
    unknown: bool = False


Check = Callable[[Policy, Sources, Sources], Iterator[Alarm]]


def run_checks(policy: Policy, sources: Sources, baseline: Sources) -> Iterator[Verdict]:
    """Yield the verdicts of all enabled built-in checks but ``inputs``: one if there is no alarm,
    else one per alarm.

    The check ``missing`` yields none without a baseline, ``negative`` none without the scaling of
    an adapter, and ``unrelated`` none without the cosine of a weight with that of BASE.
    """
    for name, (allowed, check) in _CHECKS.items():
        severity = getattr(policy.checks, name)
        if severity == "off" or (name == "missing" and not baseline):
            continue
        if name == "negative" and not any(map(_list_scalings, sources)):
            continue
        if name == "unrelated" and not any(map(_select_compared, sources)):
            continue
        alarms = list(check(policy, sources, baseline))
        found: Status = "failed" if severity == "error" else "warned"
        for alarm in alarms:
            yield Verdict(
                rule=name,
                layer=alarm.layer,
                measured=alarm.measured,
                allowed=alarm.allowed or allowed,
                status="inconclusive" if alarm.unknown or name in _INCONCLUSIVE_CHECKS else found,
                severity="error" if alarm.unknown else severity,
                message=alarm.message,
            )
        if not alarms:
            obstacle = _explain_inapplicable(name, sources)
            status: Status = "not judged" if obstacle else "passed"
            yield Verdict(
                rule=name, allowed=allowed, status=status, severity=severity, message=obstacle
            )


def _explain_inapplicable(name: str, sources: Sources) -> str:
    """Return why a check does not apply; empty if it does."""
    if name in _CHECKS_OF_UPDATES and not has_updates(sources):
        return "no record gives the norm and the resolution of an update"
    adapters = list_inputs(sources, "adapter")
    if name in {"complete", "base"} and not adapters:
        return "no adapter was measured"
    if name == "complete" and all(item.targets is None for item in adapters):
        return "no adapter whose config names its modules was measured on its BASE"
    if name == "base" and not any(map(_pair_names, sources)):
        return "no adapter and BASE that both have a name were measured together"
    metrics = metrics_of(list_layers(sources))
    if name in _CHECKS_OF_WEIGHTS and metrics and "weights" not in metrics:
        names = [METRIC_NAMES[metric] for metric in metrics]
        return f"every spectrum is in {' or '.join(names)}, not in the weights'"
    return ""


def has_updates(sources: Sources) -> bool:
    """Return whether a record gives the norm and the resolution of an update, which the checks of
    updates need.
    """
    return bool(_select_records(sources, *_UPDATE_FIELDS))


def _check_finished(policy: Policy, sources: Sources, baseline: Sources) -> Iterator[Alarm]:
    for source in sources:
        if source.results.end is None:
            yield Alarm(
                f"{source.path}: the run did not finish; continue with --resume, or measure again"
            )


def _check_finite(policy: Policy, sources: Sources, baseline: Sources) -> Iterator[Alarm]:
    for source in sources:
        for item in source.results.non_finite:
            yield Alarm(f"{item.detail}; do not ship it", item.layer)


def _check_mismatch(policy: Policy, sources: Sources, baseline: Sources) -> Iterator[Alarm]:
    """Yield an alarm for each tensor of an adapter that does not fit BASE."""
    for source in sources:
        for item in source.results.left_out:
            if _is_of_adapter(source) and item.reason in _NOT_OF_THIS_BASE:
                yield Alarm(f"the adapter does not fit BASE here: {item.detail}", item.layer)


def _check_complete(policy: Policy, sources: Sources, baseline: Sources) -> Iterator[Alarm]:
    """Yield an alarm for each module that the config of an adapter targets and its file does not
    contain.
    """
    for item in list_inputs(sources, "adapter"):
        text = (
            f"the config of {item.path} targets it and the file holds nothing for it "
            f"({len(item.lacking)} of {item.targets} targets): save the adapter again"
        )
        for layer in item.lacking:
            yield Alarm(text, layer)


def _check_base(policy: Policy, sources: Sources, baseline: Sources) -> Iterator[Alarm]:
    """Yield alarms for adapters whose config names another base, unless the policy pins
    the base.
    """
    for source in sources:
        pins = {("base", item.fingerprint) for item in source.results.run.inputs}
        if not pins.isdisjoint(policy.inputs.pins):
            continue
        for adapter, names in _pair_names(source):
            own_base = adapter.names[0]
            if not any(is_same_name(own_base, name) for name in names):
                text = (
                    f"the config of {adapter.path} names the base {own_base}, and it was measured "
                    f"on {' or '.join(names)}: measure it on its own base, or pin this one by its "
                    "fingerprint under [inputs]"
                )
                yield Alarm(text, None, names[0], f"base {own_base}")


def _pair_names(source: ResultsSource) -> list[tuple[RunInput, tuple[str, ...]]]:
    """Return each adapter that names its base, with the names of BASE; empty if BASE has none."""
    for base in list_inputs([source], "base"):
        if base.names:
            adapters = list_inputs([source], "adapter")
            return [(adapter, base.names) for adapter in adapters if adapter.names]
    return []


def is_same_name(first: str, second: str) -> bool:
    """Return whether two names of a model may be the same, ignoring case.

    Two Hub ids are compared as a whole; a path is compared by its last part.

    >>> (
    ...     is_same_name("meta-llama/Llama-3.2-1B", "/models/Llama-3.2-1B"),
    ...     is_same_name("a/llama", "b/llama"),
    ... )
    (True, False)
    """
    first_parts, second_parts = _split_name(first), _split_name(second)
    if _is_hub_id(first) and _is_hub_id(second):
        return first_parts == second_parts
    return first_parts[-1:] == second_parts[-1:]


def _split_name(name: str) -> list[str]:
    """Return the parts of a path or a Hub id in lower case."""
    return [part for part in name.replace("\\", "/").lower().split("/") if part]


def _is_hub_id(name: str) -> bool:
    """Return whether a name has the form of a Hub id, ``owner/name``."""
    parts = _split_name(name)
    is_absolute = name.startswith(("/", "~")) or ":" in name
    return not is_absolute and len(parts) == 2 and parts[0] not in {".", ".."}


def _check_dead_layers(policy: Policy, sources: Sources, baseline: Sources) -> Iterator[Alarm]:
    """Yield alarms for adapters and adapted layers without an update; for two checkpoints if
    nothing changed at all.
    """
    for source in sources:
        spectra = _select_records([source], *_SPECTRUM_FIELDS)
        if _is_of_adapter(source):
            for record in spectra:
                norm = _weights_norm(record)
                text = _explain_dead(norm, record.dtypes[1], _find_least_scale(source))
                if text:
                    yield Alarm(text, record.layer, norm)
        elif spectra and not any(map(_weights_norm, spectra)):
            text = "nothing moved: ΔW is zero in every matrix; is this the checkpoint you meant?"
            yield Alarm(text, None, 0.0)
    has_update: dict[str, bool] = {}
    for residual in _select_records(sources, "role", "adapter", "adapter_fro", "rank"):
        if residual.role == "adapter":
            text = _explain_dead(residual.adapter_fro)
            has_update[residual.adapter] = has_update.get(residual.adapter, False) or not text
            if residual.rank and text:
                yield Alarm(f"{residual.adapter}: {text}", residual.layer, residual.adapter_fro)
    for adapter, has_changes in has_update.items():
        if not has_changes:
            yield Alarm(f"the adapter {adapter} changes nothing at all", None, 0.0)


def _weights_norm(record: Any) -> float:
    """Return ‖ΔW‖_F of a spectrum in any metric."""
    norm: float = record.fro if record.weights_fro is None else record.weights_fro
    return norm


def _explain_dead(norm: float, dtype: str = "float32", scale: float = 1.0) -> str:
    """Return why an update has no effect where it is served; empty if it has one.

    Args:
        norm: ‖ΔW‖_F = ‖s·BA‖_F.
        dtype: Dtype of the factors.
        scale: The least |s| that it may have, 1 or more.
    """
    if norm == 0:
        return "the adapter changes nothing here: it was not trained, or not saved"
    computed = dtype if dtype in UNDERFLOW else "float32"
    if norm / scale >= UNDERFLOW[computed]:
        return ""
    return (
        "the adapter changes nothing here: the product of its factors underflows to zero in "
        f"{computed}"
    )


def _list_scalings(source: ResultsSource) -> list[tuple[str, tuple[float, float]]]:
    """Return the path and the smallest and largest scaling of each adapter of results whose scaling
    is known.
    """
    inputs = list_inputs([source], "adapter")
    return [(item.path, item.scaling) for item in inputs if item.scaling is not None]


def _find_least_scale(source: ResultsSource) -> float:
    """Return the least |s| of the adapters of results, or 1 if that is larger or not known."""
    scales = [
        0.0 if least < 0 < most else min(abs(least), abs(most))
        for _, (least, most) in _list_scalings(source)
    ]
    return max(1.0, min(scales, default=1.0))


def _check_negative(policy: Policy, sources: Sources, baseline: Sources) -> Iterator[Alarm]:
    """Yield an alarm for each adapter with a negative scaling."""
    for source in sources:
        for path, (least, _) in _list_scalings(source):
            if least < 0:
                text = (
                    f"{path}: a negative scaling subtracts the adapter from BASE: correct "
                    "lora_alpha (alpha_pattern)"
                )
                yield Alarm(text, None, least)


def _select_compared(source: ResultsSource) -> dict[str, Any]:
    """Return the records of results with the cosine of a weight with that of BASE, by layer."""
    records = _select_records([source], *_LINEAGE_FIELDS)
    return {record.layer: record for record in records if record.cosine_to_base is not None}


def _check_lineage(policy: Policy, sources: Sources, baseline: Sources) -> Iterator[Alarm]:
    """Yield an alarm for each weight that is unrelated to BASE; a single one if most are."""
    for source in sources:
        layers = _select_compared(source)
        unrelated = [record for record in layers.values() if record.lineage == "unrelated"]
        if is_unrelated(layers.values()):
            share = f"{len(unrelated)} of {len(layers)} weights"
            yield Alarm(
                f"{share} do not descend from BASE: give the BASE of this checkpoint",
                None,
                "unrelated",
            )
            continue
        for record in unrelated:
            text = "not from this weight of BASE: it was replaced or reordered"
            yield Alarm(text, record.layer, record.cosine_to_base)


def _check_unused_rank(policy: Policy, sources: Sources, baseline: Sources) -> Iterator[Alarm]:
    """Yield an alarm for each layer of factors, measured with all values, with directions below
    ``UNUSED`` · σ_1.
    """
    for record in _select_records(sources, *_SPECTRUM_FIELDS):
        is_factored = record.metric == "weights" and record.method == "factored"
        if not is_factored or not record.complete or record.fro == 0:
            continue
        used = sum(value > UNUSED * record.s[0] for value in record.s)
        if used < len(record.s):
            text = (
                f"{used} of {len(record.s)} directions are used; the rest of the rank costs and "
                "does nothing"
            )
            yield Alarm(text, record.layer, float(used))


def _check_spikes(policy: Policy, sources: Sources, baseline: Sources) -> Iterator[Alarm]:
    """Yield an alarm for each update that one direction dominates, or whose σ_1 exceeds
    ‖W_base‖_F.
    """
    limit = policy.checks.spike_above
    for record in _select_records(sources, *_SPECTRUM_FIELDS):
        if record.metric != "weights" or record.spike is None or len(record.s) < 2:
            continue
        if record.spike > limit:
            text = (
                f"one direction holds {record.spike:.3g} of ‖ΔW‖², more than {limit:g}: usual "
                "early in training"
            )
            yield Alarm(text, record.layer, record.spike, f"spike <= {limit:g}")
        elif record.spike_to_base is not None and record.spike_to_base > 1:
            text = "σ_1(ΔW) exceeds ‖W_base‖_F: this layer was overwritten, not tuned"
            yield Alarm(text, record.layer, record.spike_to_base, "spike_to_base <= 1")


def _check_resolution(policy: Policy, sources: Sources, baseline: Sources) -> Iterator[Alarm]:
    """Yield an alarm for each update that rounding hides, and one more, without a verdict, if it
    hides all.
    """
    records = _select_records(sources, *_UPDATE_FIELDS)
    changed = [record for record in records if record.resolution is not None and record.fro > 0]
    hidden = [record for record in changed if record.resolution.verdict == "unresolved"]
    if hidden and len(hidden) == len(changed):
        text = (
            "the files' rounding hides every update, so none can be judged: save the checkpoint in "
            "float32"
        )
        yield Alarm(text, None, "unresolved", unknown=True)
    for record in hidden:
        text = "the files' rounding hides this update: judge the adapter itself, or save in float32"
        yield Alarm(text, record.layer, "unresolved")


def _check_missing(policy: Policy, sources: Sources, baseline: Sources) -> Iterator[Alarm]:
    """Yield an alarm for each layer of the baseline that the results do not have."""
    measured = {record.layer for record in list_layers(sources)}
    for layer in dict.fromkeys(record.layer for record in list_layers(baseline)):
        if layer not in measured:
            yield Alarm("the baseline has this layer and the results do not", layer)


def _select_records(sources: Sources, *names: str) -> list[Any]:
    """Return the records of layers that have all of these fields or properties, of any kind."""
    records = list_layers(sources)
    return [record for record in records if all(hasattr(record, name) for name in names)]


def _is_of_adapter(source: ResultsSource) -> bool:
    """Return whether an adapter was measured."""
    return bool(list_inputs([source], "adapter"))


_CHECKS: dict[str, tuple[str, Check]] = {
    "finished": ("every run finished", _check_finished),
    "non_finite": ("no NaN or Inf", _check_finite),
    "mismatch": ("the adapter fits BASE", _check_mismatch),
    "complete": ("factors for every target", _check_complete),
    "base": ("the base that the adapter names", _check_base),
    "dead": ("the update is not zero", _check_dead_layers),
    "negative": ("no negative scaling", _check_negative),
    "unrelated": ("TUNED descends from BASE", _check_lineage),
    "missing": ("every layer of the baseline", _check_missing),
    "unused_rank": ("every direction of the rank is used", _check_unused_rank),
    "spike": ("no direction dominates", _check_spikes),
    "unresolved": ("the files can show the update", _check_resolution),
}
assert ["inputs", *_CHECKS] == Checks.names()


def compare_inputs(
    sources: Sources, shipped: Sequence[Path | str]
) -> tuple[list[ResultsSource], dict[str, str]]:
    """Compare the inputs of results with the current files at their paths, or at ``shipped``.

    Args:
        sources: The results.
        shipped: Checkpoints and adapters that the results must belong to.

    Returns:
        The results with the state of their inputs, and by path the fingerprints of ``shipped``
            without results.
    """
    weights = {str(path): _open_weights(path) for path in shipped}
    paths = {opened.fingerprint: path for path, opened in weights.items()}
    compared = []
    unmatched = dict(paths)
    for source in sources:
        states = tuple(_compare_source(source, weights, paths))
        compared.append(replace(source, inputs=states))
        for item in source.results.run.inputs:
            unmatched.pop(item.fingerprint, None)
    return compared, {legible(path): now for now, path in unmatched.items()}


@dataclass(frozen=True, slots=True)
class CurrentWeights:
    """A checkpoint or an adapter as it is now."""

    checkpoint: Checkpoint
    is_adapter: bool
    fingerprint: str


def _open_weights(path: Path | str) -> CurrentWeights:
    """Open a checkpoint or an adapter, and take its fingerprint."""
    from lora_diag.adapters import Adapter, locate, open_input

    opened = open_input(locate(path), "rank")
    if isinstance(opened, Adapter):
        return CurrentWeights(opened.checkpoint, True, fingerprint_of_adapter(opened.source))
    return CurrentWeights(opened, False, fingerprint(opened))


def _compare_source(
    source: ResultsSource, weights: Mapping[str, CurrentWeights], paths: Mapping[str, str]
) -> Iterator[InputState]:
    """Yield the state of each checkpoint and adapter of results.

    Args:
        source: The results.
        weights: The shipped weights by path.
        paths: Their paths by fingerprint.
    """
    inputs = [item for item in source.results.run.inputs if item.role in WEIGHT_ROLES]
    # The results must have an input of each kind that is shipped; an old and a new adapter are of
    # one kind.
    matched = [item for item in inputs if item.fingerprint in paths]
    absent = [
        (path, opened)
        for path, opened in weights.items()
        if not any(_is_of_kind(item, opened) for item in matched)
    ]
    for item in inputs:
        others = [(path, opened) for path, opened in absent if _is_of_kind(item, opened)]
        if item.fingerprint in paths:
            yield InputState(item, "same", legible(paths[item.fingerprint]), item.fingerprint)
        elif item.role != "base" and others:
            path, opened = others[0]
            reason = f"{legible(path)} is not what was measured as {item.path}"
            yield InputState(item, "changed", reason, opened.fingerprint)
        else:
            yield _compare_with_path(item)


def _is_of_kind(item: RunInput, weights: CurrentWeights) -> bool:
    """Return whether an input of results may be these weights; a reference is an adapter or a
    checkpoint.
    """
    return item.role == "reference" or (item.role == "adapter") == weights.is_adapter


def _compare_with_path(item: RunInput) -> InputState:
    """Return the state of an input from the file at its path; addresses and Hub ids are not
    accessed.
    """
    if not os.path.exists(item.path):  # noqa: PTH110  (unlike Path.exists(), takes any name)
        reason = "is not at the path it had, so nothing was compared; --for PATH names it"
        return InputState(item, "unknown", reason)
    if len(item.fingerprint) != DIGITS:
        reason = "has no fingerprint that can be compared: measure it again"
        return InputState(item, "unknown", reason)
    try:
        weights = _open_weights(item.path)
        now = weights.fingerprint
        if now != item.fingerprint:
            return InputState(item, "changed", f"{item.path} changed since it was measured", now)
        if item.sha256 and content_hash(files_of(weights.checkpoint)) != item.sha256:
            return InputState(item, "changed", f"{item.path} has another SHA-256 than it had", now)
    except InputError as error:
        return InputState(item, "changed", f"cannot be compared: {error}")
    return InputState(item, "same", now=now)


def judge_inputs(
    policy: Policy,
    sources: Sources,
    baseline: Sources,
    unmatched: Mapping[str, str],
    now: datetime,
) -> Iterator[Verdict]:
    """Yield verdicts on whether the results and their inputs are unchanged and what the policy
    requires.

    Args:
        policy: The policy, with pinned fingerprints and the maximum age of results.
        sources: The results.
        baseline: Results to compare with.
        unmatched: Fingerprints of the files of ``--for`` without results, by path.
        now: The current time.
    """
    for source in (*sources, *baseline):
        if not source.sealed:
            text = (
                f"{source.path}: its last line has no SHA-256, so that an edit would not be "
                "noticed: measure again"
            )
            yield _make_verdict(source.path, "no hash", "as written", "inconclusive", text)
    pins, max_age = policy.inputs.pins, policy.inputs.max_age
    for source in sources:
        for state in source.inputs:
            yield _judge_state(source, state)
        if max_age is not None:
            yield _judge_age(source, max_age, now)
    for path, current in unmatched.items():
        text = f"no results are of it: its fingerprint is {current}; measure it"
        yield _make_verdict(f"--for {path}", "none", "results of it", "inconclusive", text)
    for role, pinned in pins:
        yield from _judge_pins(sources, role, pinned)
    if not (any(source.inputs for source in sources) or pins or max_age is not None or unmatched):
        text = "the results name no checkpoint or adapter"
        yield _make_verdict("", None, "inputs as measured", "not judged", text)


def _judge_state(source: ResultsSource, state: InputState) -> Verdict:
    item, allowed = state.input, "unchanged since measured"
    group = f"{item.role} {item.path}"
    if state.state == "same":
        text = f"fingerprint {item.fingerprint}"
        return _make_verdict(group, "unchanged", allowed, "passed", text)
    if state.state == "unknown":
        return _make_verdict(group, None, allowed, "not judged", state.reason)
    both = f": its fingerprint is {state.now} and was {item.fingerprint}" if state.now else ""
    text = f"{state.reason}{both}; measure it again, {source.path} is not of it"
    return _make_verdict(group, "changed", allowed, "inconclusive", text)


def _judge_age(source: ResultsSource, max_age: timedelta, now: datetime) -> Verdict:
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


def _judge_pins(sources: Sources, role: str, pinned: str) -> Iterator[Verdict]:
    """Yield verdicts on whether every input of a role has the fingerprint that the policy pins."""
    of_role = list_inputs(sources, role)
    allowed = "as [inputs] pins it"
    if not of_role:
        yield _make_verdict(role, None, allowed, "inconclusive", f"the results have no {role}")
    for run_input in of_role:
        name = f"{role} {run_input.path}"
        if run_input.fingerprint == pinned:
            yield _make_verdict(name, "pinned", allowed, "passed", f"fingerprint {pinned}")
        elif len(run_input.fingerprint) != len(pinned):
            text = (
                "the results have no fingerprint of it, or that of an older loradiag: measure again"
            )
            yield _make_verdict(name, None, allowed, "inconclusive", text)
        else:
            text = f"the results are of {run_input.fingerprint}, and the policy pins {pinned}"
            yield _make_verdict(name, "another", allowed, "failed", text)


def _make_verdict(
    group: str, measured: str | None, allowed: str, status: Status, message: str
) -> Verdict:
    return Verdict(
        rule="inputs",
        group=group,
        measured=measured,
        allowed=allowed,
        status=status,
        message=message,
    )


def format_duration(duration: timedelta) -> str:
    """Return a duration in days, or in hours below two days.

    >>> format_duration(timedelta(days=7)), format_duration(timedelta(hours=30))
    ('7 days', '30 hours')
    """
    hours = duration.total_seconds() / 3600
    return f"{hours / 24:.0f} days" if hours >= 48 else f"{hours:.0f} hours"
