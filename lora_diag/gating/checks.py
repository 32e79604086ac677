"""Built-in checks, which apply with every policy.

Intruder dimensions are not included: a rule such as ``intruders <= 2`` judges the records of ``loradiag intruders``.
Nor is σ_1(ΔW)/σ_1(W_base), which no record holds: ``spike`` judges it by its lower bound σ_1(ΔW)/‖W_base‖_F.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lora_diag.diagnostics.residual.record import Residual
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.gating.evidence import Source
from lora_diag.gating.policy import Checks, Policy
from lora_diag.gating.record import Verdict
from lora_diag.records import LeftOut, RunInput
from lora_diag.records.base import Record
from lora_diag.records.vocabulary import METRIC_NAMES

K = TypeVar("K", bound=Record)

# Below this fraction of σ_1 a direction of an adapter is unused: ten times float32's spacing, the rounding error of the
# smallest singular values of a product of float32 factors.
UNUSED = 1e-6

_NOT_OF_THIS_BASE = frozenset({"not_in_base", "shape_differs", "needs_base", "only_in_adapter"})


# Checks whose findings are inconclusive and do not prove a fault.
_INCONCLUSIVE_CHECKS = frozenset({"finished", "base"})
# Checks of records of updates.
_CHECKS_OF_UPDATES = frozenset({"dead", "unused_rank", "spike", "unresolved"})
# Those that do not apply to spectra in another metric, where one direction reflects the distribution of the inputs.
_CHECKS_OF_WEIGHTS = frozenset({"unused_rank", "spike"})


@dataclass(frozen=True, slots=True)
class Alarm:
    """One finding of a check, and the exceeded limit if the check has several.

    ``unknown`` prevents the gate from passing at every severity, because no verdict is possible.
    """

    layer: str | None
    measured: float | str | None
    message: str
    allowed: str = ""
    unknown: bool = False


Check = Callable[[Policy, Sequence[Source], Sequence[Source]], Iterator[Alarm]]


def run_checks(policy: Policy, sources: Sequence[Source], baseline: Sequence[Source]) -> Iterator[Verdict]:
    """Yield the verdicts of all enabled built-in checks: one if there is no alarm, else one per alarm.

    That of layers missing from the results needs a baseline.
    """
    for name, (allowed, check) in _CHECKS.items():
        severity = getattr(policy.checks, name)
        if severity == "off" or (name == "missing" and not baseline):
            continue
        alarms = list(check(policy, sources, baseline))
        idle = Alarm(None, None, _explain_inapplicable(name, sources))
        if alarms:
            status = "inconclusive" if name in _INCONCLUSIVE_CHECKS else "failed" if severity == "error" else "warned"
        else:
            status = "not judged" if idle.message else "passed"
        for alarm in alarms or [idle if status == "not judged" else Alarm(None, None, "")]:
            yield Verdict.model_validate(
                {
                    "rule": name,
                    "layer": alarm.layer,
                    "measured": alarm.measured,
                    "allowed": alarm.allowed or allowed,
                    "status": "inconclusive" if alarm.unknown else status,
                    "severity": "error" if alarm.unknown else severity,
                    "message": alarm.message,
                }
            )


def _explain_inapplicable(name: str, sources: Sequence[Source]) -> str:
    """Return why a check does not apply; empty if it does."""
    if name in _CHECKS_OF_UPDATES and not has_updates(sources):
        return "no spectrum or residual record to check"
    if name == "complete" and all(run_input.targets is None for run_input in _list_adapters(sources)):
        return "no results of an adapter on its BASE whose config names its modules"
    if name == "base" and not any(_list_base_names(source) for source in sources):
        return "no results of an adapter on a BASE that both have a name"
    metrics = dict.fromkeys(record.metric for record in _select_records(sources, Spectrum))
    if name in _CHECKS_OF_WEIGHTS and metrics and "weights" not in metrics:
        return f"every spectrum is in {' or '.join(METRIC_NAMES[metric] for metric in metrics)}, not in the weights'"
    return ""


def has_updates(sources: Sequence[Source]) -> bool:
    """Return whether there is a spectrum or a residual, which the checks of updates need."""
    return any(isinstance(record, Spectrum | Residual) for source in sources for record in source.results.layers)


def _check_finished(policy: Policy, sources: Sequence[Source], baseline: Sequence[Source]) -> Iterator[Alarm]:
    for source in sources:
        if source.results.end is None:
            yield Alarm(None, None, f"{source.path}: the run did not finish; continue with --resume, or measure again")


def _check_finite(policy: Policy, sources: Sequence[Source], baseline: Sequence[Source]) -> Iterator[Alarm]:
    for item in _list_left_out(sources):
        if item.reason == "non_finite":
            yield Alarm(item.layer, None, f"{item.detail}; do not ship it")


def _check_mismatch(policy: Policy, sources: Sequence[Source], baseline: Sequence[Source]) -> Iterator[Alarm]:
    for item in _list_left_out([source for source in sources if _is_of_adapter(source)]):
        if item.reason in _NOT_OF_THIS_BASE:
            yield Alarm(item.layer, None, f"the adapter does not fit BASE here: {item.detail}")


def _check_complete(policy: Policy, sources: Sequence[Source], baseline: Sequence[Source]) -> Iterator[Alarm]:
    for run_input in _list_adapters(sources):
        for layer in run_input.lacking:
            text = (
                f"the config of {run_input.path} targets it and the file holds nothing for it "
                f"({len(run_input.lacking)} of {run_input.targets} targets): save the adapter again"
            )
            yield Alarm(layer, None, text)


def _check_base(policy: Policy, sources: Sequence[Source], baseline: Sequence[Source]) -> Iterator[Alarm]:
    """Yield alarms for adapters whose config names another base, unless the policy pins the base."""
    for source in sources:
        pinned = any(("base", run_input.fingerprint) in policy.inputs.pins for run_input in source.results.run.inputs)
        for adapter, own_base, names in _list_base_names(source):
            if not pinned and not any(is_same_name(own_base, name) for name in names):
                text = (
                    f"the config of {adapter} names the base {own_base}, and it was measured on {' or '.join(names)}: "
                    "measure it on its own base, or pin this one by its fingerprint under [inputs]"
                )
                yield Alarm(None, names[0], text, f"base {own_base}")


def _list_base_names(source: Source) -> list[tuple[str, str, tuple[str, ...]]]:
    """Return the path of each adapter, the base that its config names, and the names of BASE; skip unnamed ones."""
    inputs = source.results.run.inputs
    names = next((run_input.names for run_input in inputs if run_input.role == "base" and run_input.names), ())
    return [
        (run_input.path, run_input.names[0], names)
        for run_input in inputs
        if run_input.role == "adapter" and run_input.names and names
    ]


def _list_adapters(sources: Sequence[Source]) -> list[RunInput]:
    return [run_input for source in sources for run_input in source.results.run.inputs if run_input.role == "adapter"]


def is_same_name(first: str, second: str) -> bool:
    """Return whether two names of a model may be the same: Hub ids are compared as a whole, paths by their last part.

    >>> is_same_name("meta-llama/Llama-3.2-1B", "/models/Llama-3.2-1B"), is_same_name("a/llama", "b/llama")
    (True, False)
    """
    parts = [[part for part in name.replace("\\", "/").lower().split("/") if part] for name in (first, second)]
    both_ids = all(len(name_parts) == 2 and name_parts[0] not in {".", ".."} for name_parts in parts)
    absolute = any(name.startswith(("/", "~")) or ":" in name for name in (first, second))
    return parts[0] == parts[1] if both_ids and not absolute else parts[0][-1:] == parts[1][-1:]


def _check_dead_layers(policy: Policy, sources: Sequence[Source], baseline: Sequence[Source]) -> Iterator[Alarm]:
    """Yield alarms for adapters and adapted layers without an update; for two checkpoints if nothing changed at all."""
    for source in sources:
        spectra = [record for record in source.results.layers if isinstance(record, Spectrum)]
        if _is_of_adapter(source):
            for record in spectra:
                if _is_zero(record):
                    yield Alarm(record.layer, 0.0, "the adapter changes nothing here: it was not trained, or not saved")
        elif spectra and all(map(_is_zero, spectra)):
            yield Alarm(None, 0.0, "nothing moved: ΔW is zero in every matrix; is this the checkpoint you meant?")
    has_update: dict[str, bool] = {}
    for residual in _select_records(sources, Residual):
        if residual.role == "adapter":
            has_update[residual.adapter] = has_update.get(residual.adapter, False) or residual.adapter_fro > 0
            if residual.rank and residual.adapter_fro == 0:
                yield Alarm(
                    residual.layer, 0.0, f"the adapter {residual.adapter} changes nothing here: it was not trained"
                )
    for adapter, has_changes in has_update.items():
        if not has_changes:
            yield Alarm(None, 0.0, f"the adapter {adapter} changes nothing at all")


def _check_unused_rank(policy: Policy, sources: Sequence[Source], baseline: Sequence[Source]) -> Iterator[Alarm]:
    for record in _select_in_weights(sources):
        if record.method == "factored" and record.complete and record.fro > 0:
            used = sum(value > UNUSED * record.s[0] for value in record.s)
            if used < len(record.s):
                text = f"{used} of {len(record.s)} directions are used; the rest of the rank costs and does nothing"
                yield Alarm(record.layer, float(used), text)


def _check_spikes(policy: Policy, sources: Sequence[Source], baseline: Sequence[Source]) -> Iterator[Alarm]:
    limit = policy.checks.spike_above
    for record in _select_in_weights(sources):
        if record.spike is None or len(record.s) < 2:
            continue
        if record.spike > limit:
            text = f"one direction holds {record.spike:.3g} of ‖ΔW‖², more than {limit:g}: usual early in training"
            yield Alarm(record.layer, record.spike, text, f"spike <= {limit:g}")
        elif record.spike_to_base is not None and record.spike_to_base > 1:
            text = "σ_1(ΔW) exceeds ‖W_base‖_F: this layer was overwritten, not tuned"
            yield Alarm(record.layer, record.spike_to_base, text, "spike_to_base <= 1")


def _check_resolution(policy: Policy, sources: Sequence[Source], baseline: Sequence[Source]) -> Iterator[Alarm]:
    records: list[Spectrum | Residual] = [*_select_records(sources, Spectrum), *_select_records(sources, Residual)]
    changed = [record for record in records if record.resolution is not None and record.fro > 0]
    hidden = [record for record in changed if record.resolution and record.resolution.verdict == "unresolved"]
    if hidden and len(hidden) == len(changed):
        text = "the files' rounding hides every update, so none can be judged: save the checkpoint in float32"
        yield Alarm(None, "unresolved", text, unknown=True)
    for record in hidden:
        text = "the files' rounding hides this update: judge the adapter itself, or save in float32"
        yield Alarm(record.layer, "unresolved", text)


def _check_missing(policy: Policy, sources: Sequence[Source], baseline: Sequence[Source]) -> Iterator[Alarm]:
    measured = {record.layer for source in sources for record in source.results.layers}
    for layer in dict.fromkeys(record.layer for source in baseline for record in source.results.layers):
        if layer not in measured:
            yield Alarm(layer, None, "the baseline has this layer and the results do not")


def _select_records(sources: Sequence[Source], kind: type[K]) -> Iterator[K]:
    for source in sources:
        yield from (record for record in source.results.layers if isinstance(record, kind))


def _select_in_weights(sources: Sequence[Source]) -> Iterator[Spectrum]:
    return (record for record in _select_records(sources, Spectrum) if record.metric == "weights")


def _is_zero(record: Spectrum) -> bool:
    """Return whether ΔW = 0, in any metric."""
    return (record.fro if record.weights_fro is None else record.weights_fro) == 0


def _list_left_out(sources: Sequence[Source]) -> Iterator[LeftOut]:
    for source in sources:
        yield from source.results.left_out


def _is_of_adapter(source: Source) -> bool:
    return any(run_input.role == "adapter" for run_input in source.results.run.inputs)


_CHECKS: dict[str, tuple[str, Check]] = {
    "finished": ("every run finished", _check_finished),
    "non_finite": ("no NaN or Inf", _check_finite),
    "mismatch": ("the adapter fits BASE", _check_mismatch),
    "complete": ("factors for every target", _check_complete),
    "base": ("the base that the adapter names", _check_base),
    "dead": ("the update is not zero", _check_dead_layers),
    "missing": ("every layer of the baseline", _check_missing),
    "unused_rank": ("every direction of the rank is used", _check_unused_rank),
    "spike": ("no direction dominates", _check_spikes),
    "unresolved": ("the files can show the update", _check_resolution),
}
assert ["inputs", *_CHECKS] == Checks.names()
