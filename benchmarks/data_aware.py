"""Does knowing the data help? Held-out losses of truncations and allocations, plain and data-aware,
at the same cost.

    python -m benchmarks.data_aware BASE TUNED WORK DATA EVAL [DATA EVAL ...]

For every pair of a text to record on and a held-out text: all matrices outside embeddings and head
are truncated together, everything else is as in TUNED. ``plain`` is Eckart and Young's truncation,
``data`` the best for E‖ΔW x‖² and ``kfac`` the best for ‖G^½·ΔW·C^½‖; the allocations spend the
parameters of uniform r = 8. Prints the loss minus that of TUNED, and the paired difference to the
plain row of the same rank with its standard error.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import lora_diag
from benchmarks.measure import print_table
from benchmarks.recovery import whole
from lora_diag.models.data import read_texts
from lora_diag.models.losses import measure
from lora_diag.models.opening import Weights, open_model

RANKS, BUDGET = (4, 8, 16), 8
PREFIX = "output_gradients."
EXCLUDE = "pooler|classifier|embed|lm_head"
LENGTH = 128


def root(c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """C^½ and its pseudo-inverse; eigenvalues below 1e-6 of the largest count as zero."""
    values, vectors = np.linalg.eigh(c)
    values = np.where(values > 1e-6 * values[-1], values, 0)
    inverse = np.where(values > 0, 1 / np.sqrt(np.where(values > 0, values, 1)), 0)
    return (vectors * np.sqrt(values)) @ vectors.T, (vectors * inverse) @ vectors.T


class Truncations:
    """The decompositions of one layer in three metrics."""

    def __init__(self, delta: np.ndarray, c: np.ndarray, g: np.ndarray) -> None:
        self.delta = delta
        self.plain = np.linalg.svd(delta, full_matrices=False)
        (right, right_inverse), (left, left_inverse) = root(c), root(g)
        self.u = np.linalg.svd(delta @ right, full_matrices=False)[0]
        self.both = np.linalg.svd(left @ delta @ right, full_matrices=False)
        self.inverses = left_inverse, right_inverse

    def of(self, kind: str, rank: int) -> np.ndarray:
        if kind == "data":
            return self.u[:, :rank] @ (self.u[:, :rank].T @ self.delta)
        u, s, vh = self.plain if kind == "plain" else self.both
        product = (u[:, :rank] * s[:rank]) @ vh[:rank]
        return product if kind == "plain" else self.inverses[0] @ product @ self.inverses[1]


def split(
    base: Path, tuned: Path, work: Path, data: Path, held_out: Path
) -> dict[str, tuple[float, float, float]]:
    """Return loss minus TUNED's, and the difference to the plain row with its error, by variant."""
    name = f"{data.stem}"
    file, spectra = work / f"{name}.safetensors", work / f"{name}.spectra.jsonl"
    tails = {
        f"Fisher of {labels} labels": work / f"{name}.{labels}.jsonl"
        for labels in ("data", "model")
    }
    common = {"length": LENGTH, "exclude": EXCLUDE}
    if not file.exists():
        lora_diag.probe_activations(tuned, data, file, output_gradients=True, **common)
    for (_, path), labels in zip(tails.items(), ("data", "model"), strict=True):
        options = {
            "data": data,
            "ranks": RANKS,
            "labels": labels,
            "output": path,
            "resume": path.exists(),
        }
        lora_diag.probe_fisher(base, tuned, **options, **common)
    plain = lora_diag.spectrum(base, tuned, exclude=EXCLUDE, output=spectra)
    moments = {key: value.double().numpy() for key, value in load_file(file).items()}
    metrics = {
        kind: lora_diag.spectrum(
            base, tuned, exclude=EXCLUDE, activations=file, kfac=kind == "kfac"
        )
        for kind in ("data", "kfac")
    }
    layers = [record.layer for record in metrics["data"]]
    before, after = (
        {key: value.double().numpy() for key, value in whole(path).items()}
        for path in (base, tuned)
    )
    cut = {
        layer: Truncations(after[layer] - before[layer], moments[layer], moments[PREFIX + layer])
        for layer in layers
    }
    budget = BUDGET * sum(sum(before[layer].shape) for layer in layers)
    allocated = {
        kind: lora_diag.allocate(one, params=budget)
        for kind, one in ({"plain": plain} | metrics).items()
    }
    allocated |= {
        kind: lora_diag.allocate(plain, layer_weights=path, params=budget)
        for kind, path in tails.items()
    }
    ranks = {
        kind: {record.layer: record.rank for record in result} for kind, result in allocated.items()
    }
    variants = {
        f"r={rank} {kind}": (kind, dict.fromkeys(layers, rank)) for rank in RANKS for kind in KINDS
    }
    variants |= {f"allocated by {kind}": ("plain", ranks[kind]) for kind in ranks}
    variants["allocated by data, cut by data"] = ("data", ranks["data"])
    model = open_model(tuned, torch.device("cpu"), length=LENGTH)
    texts, named = read_texts(held_out, model), Weights(model.module)
    reference, losses = measure(model, texts, 8), {}
    for variant, (kind, given) in variants.items():
        for layer in layers:
            named.find(layer).copy_(torch.tensor(before[layer] + cut[layer].of(kind, given[layer])))
        losses[variant] = measure(model, texts, 8)
        print(name, variant, *losses[variant].minus(reference), file=sys.stderr, flush=True)
    result = {}
    for variant, loss in losses.items():
        against = f"{variant.split()[0]} plain" if variant.startswith("r=") else f"r={BUDGET} plain"
        result[variant] = (
            loss.minus(reference)[0],
            *(value or 0.0 for value in loss.minus(losses[against])),
        )
    return result


KINDS = ("plain", "data", "kfac")


def main(base: Path, tuned: Path, work: Path, *files: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    result = [split(base, tuned, work, *pair) for pair in zip(files[::2], files[1::2], strict=True)]
    rows = (
        (
            variant,
            ", ".join(f"{each[variant][0]:.4f}" for each in result),
            ", ".join(f"{each[variant][1]:+.4f} ± {each[variant][2]:.4f}" for each in result),
        )
        for variant in result[0]
    )
    print_table(
        "truncated | loss − TUNED's, by split | minus the plain one of its rank, ± its error, by "
        "split",
        rows,
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
