"""What a command compares: paths → inputs for the run record, and named ΔW."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_diag.checkpoints import Checkpoint, open_checkpoint
from lora_diag.deltas import Pairing, pair
from lora_diag.results import RunInput


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was named on the command line, opened by its headers and paired.

    Args:
        inputs: For the run record.
        pairing: What is compared, and what is not.
    """

    inputs: tuple[RunInput, ...]
    pairing: Pairing


def compare(base: Path | str, tuned: Path | str, layers: str | None, exclude: str | None) -> Comparison:
    """Open both sides and pair their weights.

    Args:
        base: The checkpoint before.
        tuned: The checkpoint after.
        layers: Only weights whose name contains a match.
        exclude: No weights whose name contains a match.

    Raises:
        InputError: A side cannot be read.
        NothingComparedError: The sides have no weight in common.
    """
    before, after = open_checkpoint(base), open_checkpoint(tuned)
    inputs = (_describe("base", before), _describe("tuned", after))
    return Comparison(inputs, pair(before, after, layers, exclude))


def _describe(role: str, checkpoint: Checkpoint) -> RunInput:
    return RunInput(
        role=role, path=str(checkpoint.path), kind=checkpoint.kind, tensors=len(checkpoint), notes=checkpoint.notes
    )
