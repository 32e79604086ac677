"""``allocate --weights`` of a results file: what ``probe sensitivity`` measured becomes factors of energies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_diag.api.fingerprint import legible
from lora_diag.errors import InputError, UsageError
from lora_diag.planning.sensitivity import Weights, gains_of, weights_of
from lora_diag.results import Results, RunInput, Sensitivity, Spectrum, read_results
from lora_diag.results.names import part_of

# So many layers are named in a note.
_NAMED = 3


def measured_weights(
    path: Path, spectra: Results[Spectrum], allow_unfinished: bool
) -> tuple[dict[str, float], RunInput]:
    """Return w_ℓ = max(0, ΔL_ℓ) / Σ_{i≤r}σ_{ℓ,i}² by layer, and what the run record says of them.

    Args:
        path: Results of ``probe sensitivity``; its first set decides.
        spectra: Of the update that is to be allocated.
        allow_unfinished: Take an interrupted run for what it holds.

    Raises:
        UsageError: No layer of the spectra was adapted, or none gains.
        InputError: It cannot be read, is of another command, or is unfinished.
    """
    results = read_results(path)
    if results.run.command != "probe sensitivity":
        raise InputError(
            f"--weights {path}: holds results of loradiag {results.run.command}; it takes those of probe sensitivity, "
            "or a JSON object of layer and factor"
        )
    if results.end is None and not allow_unfinished:
        raise InputError(
            f"--weights {path}: the run did not finish, and layers it lacks would get no rank; finish it with "
            "loradiag probe sensitivity ... --resume, or go on with --allow-unfinished"
        )
    records = [record for record in results.whole if isinstance(record, Sensitivity)]
    settings = results.run.settings
    first = records[0].set if records else ""
    gains = gains_of(records, first, first, settings["rank"], settings["seed"])
    found = weights_of(gains, settings["rank"], spectra.layers)
    if not any(layer in found.factors for gain in gains for layer in gain.layers):
        raise UsageError(f"--weights {path}: adapted no layer of these spectra; both must be of one BASE")
    if not any(found.factors.values()):
        raise UsageError(f"--weights {path}: no layer that moved lowers the loss on {first} alone: all weights are 0")
    what = f"results of probe sensitivity, r={settings['rank']} per {settings['per']}, gains on {legible(first)}"
    return found.factors, RunInput(
        role="weights", path=legible(path), kind=what, tensors=len(found.factors), notes=tuple(_notes(found))
    )


def _notes(found: Weights) -> list[str]:
    """Say which layers get weight 0, and which gains are no more than noise."""
    lacking = [layer for layer in found.lacking if part_of(layer) == "matrices"]
    said = [
        (found.negative, "gain nothing alone and get weight 0, so no rank"),
        (lacking, "were not adapted alone and get weight 0, so no rank"),
        (found.unclear, "gain less than two standard errors, and count with what they gain"),
        (found.short, "have fewer values than the rank that was trained: measure spectra with a larger --top"),
    ]
    return [f"{len(names)} of them {what}: {_listed(names)}" for names, what in said if names]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(legible(name) for name in names[:_NAMED])
    return f"{shown} and {len(names) - _NAMED} more" if len(names) > _NAMED else shown
