"""Statements common to all summaries: inputs, skipped tensors, unmeasured layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lora_diag.records import LeftOut, Run
from lora_diag.rendering.text import list_names, safe, short

# Maximum number of unmeasured layers that are named.
NAMED = 5

# Reasons that every run or its options imply; their tensors are counted, not named.
EXPECTED = frozenset({"vector", "not_selected"})

REASONS = {
    "vector": "one-dimensional (norms, biases)",
    "only_in_base": "only in BASE",
    "only_in_tuned": "only in TUNED",
    "not_float": "not floating point",
    "shape_differs": "of another shape",
    "added_rows": "with rows only in TUNED",
    "removed_rows": "with rows only in BASE",
    "empty": "empty",
    "not_selected": "not selected",
    "non_finite": "not finite",
    "not_in_base": "not in BASE",
    "needs_base": "that need BASE",
    "only_in_adapter": "only in an adapter",
    "no_gradient": "without a gradient at some step",
    "no_reference": "without an update to take subspaces from",
    "rank_0": "of rank 0",
    "no_factors": "without a factored form",
    "saved": "saved in full",
    "unreadable": "unreadable",
    "not_in_model": "that the model does not use",
    "no_activations": "without activations",
    "memory": "larger than --memory",
    "time": "not reached within --time",
}


def inputs(run: Run) -> list[str]:
    """Return one line per input: role, path and kind."""
    longest = max((len(side.role) for side in run.inputs), default=0)
    return [f"{side.role:<{longest}} {safe(side.path)} ({side.kind})" for side in run.inputs]


def subject(run: Run) -> str:
    """Return the path of the measured input: the last one that is not a weighting."""
    paths = [side.path for side in run.inputs if side.role != "activations"]
    return paths[-1] if paths else ""


def notes(run: Run) -> list[str]:
    """Return one line per note about an input, labelled by its role, or by its name if several have that role."""
    roles = Counter(side.role for side in run.inputs)
    names = short_paths([side.path for side in run.inputs])
    return [
        f"{side.role if roles[side.role] == 1 else name}: {safe(note)}"
        for side, name in zip(run.inputs, names, strict=True)
        for note in side.notes
    ]


def short_paths(paths: Sequence[str]) -> list[str]:
    """Return the last part of each path, or the whole paths if these are equal.

    >>> short_paths(["runs/a/lora_r4", "runs/b/lora_r8"]), short_paths(["runs/a/lora", "runs/b/lora"])
    (['lora_r4', 'lora_r8'], ['runs/a/lora', 'runs/b/lora'])
    """
    last = [path.rstrip("/").rpartition("/")[2] for path in paths]
    return [safe(name if last.count(name) == 1 and name else path) for name, path in zip(last, paths, strict=True)]


def left_out_line(left_out: Sequence[LeftOut]) -> str:
    """Count skipped tensors by reason; name unexpected ones."""
    if not left_out:
        return "nothing"
    counts = Counter(item.reason for item in left_out)
    parts = []
    for reason, tensors in counts.items():
        names = [item.layer for item in left_out if item.reason == reason]
        shown = "" if reason in EXPECTED else f": {list_names(names)}"
        parts.append(f"{tensors} {REASONS[reason]}{shown}")
    return "; ".join(parts)


def qualify_fractions(left_out: Sequence[LeftOut]) -> str:
    """Return a qualification of fractions of the change if a part was not measured."""
    if any(item.reason == "not_selected" and item.fro is None for item in left_out):
        return " among the selected tensors"
    unknown = {"shape_differs", "non_finite", "memory", "time", "unreadable"}
    return " among the measured layers" if any(item.reason in unknown for item in left_out) else ""


def not_measured(failed: Sequence[LeftOut]) -> str:
    """Name the layers with entries that are not finite, or that did not fit into memory, with position or reason."""
    lines = [f"{short(item.layer)}: {item.detail}" for item in failed[:NAMED]]
    return "\n".join([*lines, *([f"and {len(failed) - NAMED} more"] if len(failed) > NAMED else [])])
