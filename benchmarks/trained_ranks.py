"""Do ranks by energy, by measured gains or by curves of gains train better than one rank for all?

    python -m benchmarks.trained_ranks            ten seeds of factors and data order, 30k and 90k parameters
    python -m benchmarks.trained_ranks 2          two of them

LoRA on the sample model at the ranks of each rule, every rate for every seed (320 runs); a rule
counts at its best one. The losses are of held-out sequences other than those that measured the
gains (docs/reference/probe-sensitivity.md).
"""

import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch

import lora_diag
from lora_diag.catalog import read_results, read_results_of
from lora_diag.decisions.allocate.measure import Budget, Constraints
from lora_diag.decisions.allocate.measure import allocate as by_losses
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.models.data import read_texts
from lora_diag.models.opening import open_model
from lora_diag.models.training import Cell, Lora, TrainingSettings, losses_after
from lora_diag.probes.sensitivity.gains import gains_of
from lora_diag.probes.sensitivity.record import Sensitivity

EXAMPLES, SAMPLES = Path("docs/examples"), Path("sample_checkpoints")
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
STEPS, BATCH, LENGTH = 40, 8, 64
RULES = ("one for all", "energy", "gains", "curves")


def curves(spectra, gains, rank, delta):
    """What each layer still lacks of its gain at rank 0, 1, …: energies scaled to the gains at both
    ranks.
    """
    first = {each.unit: each.gain for each in gains[0]}
    more = {each.unit: each.gain for each in gains[1]}
    result = {}
    for record in spectra:
        if record.layer in first:
            energy = np.concatenate([[0.0], np.cumsum(np.square(record.s))])
            low = max(0.0, first[record.layer])
            slope = max(0.0, more[record.layer] - first[record.layer]) / (
                energy[rank + delta] - energy[rank]
            )
            curve = np.where(
                np.arange(len(energy)) <= rank,
                low * energy / energy[rank],
                low + slope * (energy - energy[rank]),
            )
            result[record.layer] = tuple(map(float, curve[-1] - curve))
    return result


def ranks_by(rule, params, spectra):
    """The rank of each layer."""
    matrices = {r.layer: sum(r.shape) for r in spectra if "layers" in r.layer}
    if rule == "one for all":
        return dict.fromkeys(matrices, params // sum(matrices.values()))
    if rule == "curves":
        results = read_results(EXAMPLES / "sensitivity.jsonl")
        records = [record for record in results.whole if isinstance(record, Sensitivity)]
        rank, delta, seed = (results.run.settings[name] for name in ("rank", "delta", "seed"))
        gains = [
            gains_of(records, records[0].set, records[0].set, r, seed) for r in (rank, rank + delta)
        ]
        budget, lacking = Budget("params", params, ""), curves(spectra, gains, rank, delta)
        plan = by_losses(
            spectra.layers, budget, Constraints(), None, False, None, None, lacking
        ).layers
    else:
        plan = lora_diag.allocate(
            spectra,
            params=params,
            layer_weights=EXAMPLES / "sensitivity.jsonl" if rule == "gains" else None,
        )
    return {record.layer: record.rank for record in plan if record.rank}


def trained(model, texts, held, ranks, lr, seed):
    """The held-out loss of LoRA at these ranks, alpha = 2r."""
    names = {layer.removesuffix(".weight"): rank for layer, rank in ranks.items()}
    alphas = {name: 2 * rank for name, rank in names.items()}
    config = {
        "r": 1,
        "lora_alpha": 2,
        "target_modules": list(names),
        "rank_pattern": names,
        "alpha_pattern": alphas,
    }
    training = TrainingSettings(texts, STEPS, BATCH, seed, kind=Lora(config=config))
    (loss,), _ = losses_after(model, Cell(1, lr, seed), training, [held], lambda: None)
    return loss.mean


def main(seeds: int) -> None:
    """Print each rule's mean loss, and how far it is from one rank for all and from gains, paired
    over seeds.
    """
    text = (SAMPLES / "eval/in_domain.txt").read_bytes()
    work = Path(".bench/trained_ranks")
    work.mkdir(parents=True, exist_ok=True)
    (work / "train.txt").write_bytes(text[:30_000])
    (work / "held_out.txt").write_bytes(text[-22_000:])
    model = open_model(SAMPLES / "base", torch.device("cpu"), "float32", LENGTH)
    texts, held = (read_texts(work / f"{name}.txt", model) for name in ("train", "held_out"))
    held = replace(held, sequences=held.sequences[40:160])
    spectra = read_results_of(Spectrum, EXAMPLES / "spectrum.jsonl")
    for params in (30_000, 90_000):
        losses = {}
        for rule in RULES:
            ranks = ranks_by(rule, params, spectra)
            rows = {
                lr: [trained(model, texts, held, ranks, lr, seed) for seed in range(seeds)]
                for lr in RATES
            }
            lr = min(rows, key=lambda rate: fmean(rows[rate]))
            losses[rule] = rows[lr]
            message = [f"{params:6d} {rule:12s} lr {lr:g} {fmean(losses[rule]):.4f}"]
            for other in ("one for all", "gains"):
                if other in losses and other != rule:
                    gaps = [one - two for one, two in zip(losses[rule], losses[other], strict=True)]
                    error = stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
                    message.append(f"to {other} {fmean(gaps):+.4f} ±{error:.4f}")
            print(", ".join(message), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
