"""``allocate --layer-weights`` from results of ``probe sensitivity`` or ``probe fisher``.

Gains become factors of energies; tails replace energies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diag.catalog import read_results
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.errors import InputError, UsageError
from lora_diag.probes.fisher.record import Fisher
from lora_diag.probes.sensitivity.gains import Weights, gains_of, weights_of
from lora_diag.probes.sensitivity.record import Sensitivity
from lora_diag.records import Results, RunInput
from lora_diag.records.names import part_of
from lora_diag.running.fingerprint import legible

# Maximum number of layers named in a note.
_NAMED = 3

# Commands whose results give weights of layers.
MEASURED = ("probe sensitivity", "probe fisher")

# ‖ΔW‖_F of two measurements of one update differ by at most this fraction.
_SAME = 1e-3


@dataclass(frozen=True, slots=True)
class Measured:
    """Weights of layers from a results file.

    Args:
        described: Input for the run record; None for weights from the user.
        factors: Factors of the layers' energies.
        losses: F(0), F(1), … by layer, which replace the energies.
        scores: The gain of each layer alone, for the heuristic prior; the gain of a unit is divided among its layers by
            energy.
    """

    described: RunInput | None = None
    factors: dict[str, float] | None = None
    losses: dict[str, tuple[float, ...]] | None = None
    scores: dict[str, float] | None = None


def measured_weights(path: Path, spectra: Results[Spectrum], allow_unfinished: bool) -> Measured:
    """Return w_ℓ = max(0, ΔL_ℓ) / Σ_{i≤r}σ_{ℓ,i}² by layer, or F_ℓ(r), and the input for the run record.

    Args:
        path: Results of ``probe sensitivity``, whose first set decides; or of ``probe fisher``.
        spectra: Spectra of the update to allocate ranks for.
        allow_unfinished: Accept the results of an interrupted run.

    Raises:
        UsageError: No layer of the spectra was measured, or none has a gain.
        InputError: The file cannot be read, is of another command, or is unfinished.
    """
    results = read_results(path)
    if results.run.command not in MEASURED:
        raise InputError(
            f"--layer-weights {path}: holds results of loradiag {results.run.command}; give those of probe "
            "sensitivity or fisher, or a JSON object of layer and factor"
        )
    if results.end is None and not allow_unfinished:
        raise InputError(
            f"--layer-weights {path}: the run did not finish, and missing layers would get no rank; finish it with "
            f"loradiag {results.run.command} ... --resume, or accept it with --allow-unfinished"
        )
    if results.run.command == "probe fisher":
        return _read_tails(path, results, spectra)
    records = [record for record in results.whole if isinstance(record, Sensitivity)]
    settings = results.run.settings
    first_set = records[0].set if records else ""
    gains = gains_of(records, first_set, first_set, settings["rank"], settings["seed"])
    measured = weights_of(gains, settings["rank"], spectra.layers)
    if not any(layer in measured.factors for gain in gains for layer in gain.layers):
        raise UsageError(f"--layer-weights {path}: has no gain of a layer of these spectra; measure both on one BASE")
    if not any(measured.factors.values()):
        raise UsageError(
            f"--layer-weights {path}: no changed layer lowers the loss on {first_set} alone, so all weights are 0; use "
            "other weights"
        )
    description = (
        f"results of probe sensitivity, r={settings['rank']} per {settings['per']}, gains on {legible(first_set)}"
    )
    notes = _make_notes(measured)
    if settings["delta"]:
        ranks = f"r={settings['rank']} to {settings['rank'] + settings['delta']}"
        notes.append(
            f"gains from {ranks} are not used: ranks from them trained no better (docs, reference/probe-sensitivity)"
        )
    described = RunInput(
        role="weights", path=legible(path), kind=description, tensors=len(measured.factors), notes=tuple(notes)
    )
    return Measured(described, factors=measured.factors, scores=measured.scores)


def _read_tails(path: Path, results: Results[Any], spectra: Results[Spectrum]) -> Measured:
    """Return the tails of ``probe fisher``.

    Raises:
        UsageError: No layer of the spectra was measured.
        InputError: They are of another update.
    """
    records = {record.layer: record for record in results.whole if isinstance(record, Fisher)}
    in_both = [record for record in spectra if record.layer in records]
    if not in_both:
        raise UsageError(
            f"--layer-weights {path}: has no measurement of a layer of these spectra; measure both on one BASE and "
            "TUNED"
        )
    for record in in_both:
        fro = record.fro if record.weights_fro is None else record.weights_fro
        if abs(records[record.layer].fro - fro) > _SAME * fro:
            raise InputError(
                f"--layer-weights {path}: ‖ΔW‖ of {record.layer} is {records[record.layer].fro:.4g}, but {fro:.4g} "
                "in the spectra; measure both on the same update"
            )
    missing = [r.layer for r in spectra if r.layer not in records and part_of(r.layer) == "matrices"]
    notes = [f"{len(missing)} layers were not measured and get no rank: {_list_names(missing)}"] if missing else []
    first = records[in_both[0].layer]
    description = (
        f"results of probe fisher, {first.sequences} gradients on {legible(first.set)}, labels of the {first.labels}"
    )
    described = RunInput(role="weights", path=legible(path), kind=description, tensors=len(in_both), notes=tuple(notes))
    return Measured(described, losses={record.layer: records[record.layer].fisher for record in in_both})


def _make_notes(measured: Weights) -> list[str]:
    """State which layers get weight 0, and which gains are within noise."""
    missing = [layer for layer in measured.not_adapted if part_of(layer) == "matrices"]
    lines = [
        (measured.negative, "have no gain alone and get weight 0, so no rank"),
        (missing, "were not adapted alone and get weight 0, so no rank"),
        (measured.unclear, "have no significant gain, and are used unchanged"),
        (measured.short, "have fewer values than the trained rank: measure spectra with a larger --top"),
    ]
    return [f"{len(names)} of them {problem}: {_list_names(names)}" for names, problem in lines if names]


def _list_names(names: Sequence[str]) -> str:
    shown = ", ".join(legible(name) for name in names[:_NAMED])
    return f"{shown} and {len(names) - _NAMED} more" if len(names) > _NAMED else shown
