"""The current state of the inputs of results."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora_diag.decisions.gate.evidence import Present, Source
from lora_diag.errors import InputError
from lora_diag.records import RunInput
from lora_diag.running.fingerprint import DIGITS, content_hash, files_of, fingerprint, fingerprint_of_adapter, legible

# Inputs that are weights, by which they can be known again.
WEIGHTS = ("base", "tuned", "adapter", "reference")


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
    given = {str(path): _known(path) for path in shipped}
    compared = [replace(source, present=tuple(_present(source, given))) for source in sources]
    recorded = {each.fingerprint for source in sources for each in source.results.run.inputs}
    missing = [
        Present("--for", legible(path), "", now, "changed", "")
        for path, (now, _) in given.items()
        if now not in recorded
    ]
    return compared, missing


def _known(path: Path | str) -> tuple[str, bool]:
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


def _present(source: Source, shipped: dict[str, tuple[str, bool]]) -> list[Present]:
    inputs = [given for given in source.results.run.inputs if given.role in WEIGHTS]
    found = {now: path for path, (now, _) in shipped.items()}
    # The results must have an input of each kind that is shipped; an old and a new adapter are of one kind.
    kinds = {is_adapter for _, is_adapter in shipped.values()}
    absent = {kind for kind in kinds if not any(_is(given, kind) and given.fingerprint in found for given in inputs)}
    states = []
    for given in inputs:
        others = [path for path, (_, kind) in shipped.items() if kind in absent and _is(given, kind)]
        if given.fingerprint in found:
            states.append(_state(given, given.fingerprint, "same", legible(found[given.fingerprint])))
        elif others and given.role != "base":
            why = f"{legible(others[0])} is not what was measured as {given.path}"
            states.append(_state(given, shipped[others[0]][0], "changed", why))
        else:
            states.append(_state_at_path(given))
    return states


def _is(given: RunInput, adapter: bool) -> bool:
    return given.role == "reference" or (given.role == "adapter") == adapter


def _state_at_path(given: RunInput) -> Present:
    """Compare an input with the file at its path; addresses and Hub ids are not accessed."""
    if not os.path.exists(given.path):  # noqa: PTH110  (unlike Path.exists(), takes any name)
        return _state(given, "", "unknown", "is not at the path it had, so nothing was compared; --for PATH names it")
    if len(given.fingerprint) != DIGITS:
        return _state(given, "", "unknown", "has no fingerprint that can be compared: measure it again")
    try:
        now, _ = _known(given.path)
        if now != given.fingerprint:
            return _state(given, now, "changed", f"{given.path} changed since it was measured")
        if given.sha256 and _content(given.path) != given.sha256:
            return _state(given, now, "changed", f"{given.path} has another SHA-256 than it had")
    except InputError as error:
        return _state(given, "", "changed", f"cannot be compared: {error}")
    return _state(given, now, "same", "")


def _content(path: str) -> str:
    from lora_diag.adapters import is_adapter
    from lora_diag.adapters.source import open_source
    from lora_diag.checkpoints import locate, open_checkpoint

    local = locate(path)
    return content_hash(files_of(open_source(local).checkpoint if is_adapter(local) else open_checkpoint(path)))


def _state(given: RunInput, now: str, state: str, why: str) -> Present:
    return Present(given.role, given.path, given.fingerprint, now, state, why)
