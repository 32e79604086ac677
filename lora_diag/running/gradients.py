"""Description of gradient files in the run record."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from lora_diag.gradients import Step
from lora_diag.records import RunInput
from lora_diag.running.fingerprint import DIGITS, content_hash, files_of, fingerprint, legible


def describe_steps(paths: Sequence[Path | str], steps: Sequence[Step], verify: bool) -> RunInput:
    """Return the inputs of gradients for the run record."""
    suffix = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    span = f"{len(steps)} steps, {steps[0].step} to {steps[-1].step}" if len(steps) > 1 else f"step {steps[0].step}"
    digest = hashlib.sha256("".join(fingerprint(step.checkpoint) for step in steps).encode())
    return RunInput(
        role="gradients",
        path=f"{legible(paths[0])}{suffix}",
        kind=f"{span}, each a {legible(steps[0].checkpoint.kind)}",
        tensors=sum(len(step.checkpoint) for step in steps),
        notes=tuple(dict.fromkeys(legible(note) for step in steps for note in _make_notes(step))),
        fingerprint=digest.hexdigest()[:DIGITS],
        sha256=content_hash([file for step in steps for file in files_of(step.checkpoint)]) if verify else "",
    )


def _make_notes(step: Step) -> tuple[str, ...]:
    if not step.checkpoint.config:
        return step.checkpoint.notes
    return (
        *step.checkpoint.notes,
        f"step {step.step} is next to a config.json; check that these are gradients, not a checkpoint",
    )
