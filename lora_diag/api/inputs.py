"""What a command compares: paths → inputs for the run record, and named ΔW."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_diag.adapters import is_adapter, open_adapter
from lora_diag.checkpoints import Checkpoint, open_checkpoint
from lora_diag.deltas import Pairing, pair
from lora_diag.errors import UsageError
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


def compare(
    base: Path | str,
    tuned: Path | str | None,
    layers: str | None = None,
    exclude: str | None = None,
    allow_unmatched: bool = False,
) -> Comparison:
    """Open both sides and pair their weights.

    Args:
        base: The checkpoint before; or an adapter, if there is no ``tuned``.
        tuned: The checkpoint after, or an adapter; None to measure an adapter alone.
        layers: Only weights whose name contains a match.
        exclude: No weights whose name contains a match.
        allow_unmatched: Whether to leave out what the adapter changes and BASE does not have, instead of stopping.

    Raises:
        InputError: A side cannot be read, or the adapter does not fit BASE.
        NothingComparedError: The sides have no weight in common.
        UsageError: There is one side, and it is no adapter.
    """
    if tuned is None:
        if not is_adapter(base) and Path(base).exists():
            raise UsageError(f"{base}: is not an adapter; name the checkpoint to compare it with, BASE before TUNED")
        return _with_adapter(None, base, layers, exclude, allow_unmatched)
    before = open_checkpoint(base)
    if is_adapter(tuned):
        return _with_adapter(before, tuned, layers, exclude, allow_unmatched)
    after = open_checkpoint(tuned)
    inputs = (_describe("base", before), _describe("tuned", after))
    return Comparison(inputs, pair(before, after, layers, exclude))


def _with_adapter(
    base: Checkpoint | None, path: Path | str, layers: str | None, exclude: str | None, allow_unmatched: bool
) -> Comparison:
    adapter = open_adapter(path)
    pairing, notes = adapter.pair(base, layers, exclude, allow_unmatched)
    described = RunInput(
        role="adapter", path=str(path), kind=adapter.kind, tensors=len(adapter.checkpoint), notes=notes
    )
    return Comparison((described,) if base is None else (_describe("base", base), described), pairing)


def _describe(role: str, checkpoint: Checkpoint) -> RunInput:
    return RunInput(
        role=role, path=str(checkpoint.path), kind=checkpoint.kind, tensors=len(checkpoint), notes=checkpoint.notes
    )
