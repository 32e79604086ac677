"""Do directions chosen by their gain lose less than others of equal parameters, and does the gain
order layers by their effect? ``python -m benchmarks.gain_choice BASE TUNED --choose TEXT… --judge
TEXT``.

Every choice and these controls are measured on one text that did not choose: energy, σ, the tails
of Fisher information and K-FAC, the gradient at TUNED alone, chance, one rank for all layers, and
training the scales of the directions on the choosing text for as many passes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

import lora_diag
from benchmarks.measure import machine
from lora_diag.metrics.statistics import paired_half, paired_ratio, spearman
from lora_diag.models.losses import Draw, Losses, backward, measure
from lora_diag.models.swapping import FULL, Swapped
from lora_diag.probes.gain import GainOptions
from lora_diag.probes.gain.choice import Direction, directions_of
from lora_diag.probes.gain.integral import layers_of
from lora_diag.probes.gain.measure import _Probe
from lora_diag.probes.gain.parts import make_choice, make_uniform
from lora_diag.probes.gain.quadrature import Quadrature
from lora_diag.probes.gain.record import GainLoss, LayerGain
from lora_diag.records.names import module_type_of
from lora_diag.running.probing import ProbeRun

NODES = 5
# Rate of AdamW for the scales of directions, which start at 1; passes over the choosing text.
RATE, PASSES = 0.05, NODES


class Study:
    """One pair of models, the judging text, and the losses of both models on it."""

    def __init__(self, args: argparse.Namespace) -> None:
        options = {"max_sequences": args.sequences, "length": args.length, "nodes": NODES}
        self.run = ProbeRun("probe gain", {"data": args.judge, **options}, GainOptions)
        self.pair = (args.base, args.tuned)
        self.options = options
        compared = self.run.compare(*self.pair)
        self.model = self.run.open(args.base)
        self.swapped = Swapped(self.model, compared.pairing.deltas, None)
        self.deltas = {delta.layer: delta for delta in compared.pairing.deltas}
        self.texts = self.run.read(args.judge)
        self.swapped.toggle({}, 0, keep=True)
        self.base = self.losses()
        self.swapped.toggle({}, FULL, keep=True)
        self.tuned = self.losses()

    def losses(self) -> Losses:
        """Losses of the model as it is."""
        return measure(self.model, self.texts, 8)

    def kept(self, losses: Losses) -> tuple[float, float]:
        """Fraction of the gain that is kept, and half of its interval."""
        own, whole = (self.base.sums - each.sums for each in (losses, self.tuned))
        kept, error = paired_ratio(own.numpy(), whole.numpy(), losses.counts.tolist())
        return kept or 0.0, paired_half(error, len(own)) or 0.0

    def measure(self, chosen: Sequence[Direction], records: Sequence[LayerGain]) -> Losses:
        """Losses with some directions only."""
        part = make_choice(chosen, records)
        self.swapped.toggle(part.places, part.others, keep=True)
        return self.losses()

    def gradients(self, path: str, records: Sequence[LayerGain]) -> dict[tuple[str, int], float]:
        """−σ uᵀ∇L(TUNED)v of every direction, on the choosing text."""
        texts = self.run.read(path)
        names = {record.layer for record in records}
        layers, _ = layers_of(
            self.model.module, {n: d for n, d in self.deltas.items() if n in names}
        )
        one = np.array([1.0])
        probe = _Probe(self.run, self.swapped, layers, Quadrature(one, one, one), False)
        found = {}
        for group in probe.groups(layers, texts):
            sums, _ = probe._integrate({name: layers[name] for name in group}, texts)
            for name, integral in sums.items():
                for place in range(len(integral.sigma)):
                    found[name, place] = float(-integral.terms[:, place].sum())
        return found

    @contextmanager
    def scaled(
        self, chosen: Sequence[Direction], records: Sequence[LayerGain]
    ) -> Iterator[list[torch.Tensor]]:
        """The model with a trainable factor of each chosen direction."""
        part = make_choice([], records)
        self.swapped.toggle(part.places, part.others, keep=True)
        places: dict[str, list[int]] = {}
        for direction in chosen:
            places.setdefault(direction.layer, []).append(direction.place)
        layers, _ = layers_of(self.model.module, {n: self.deltas[n] for n in places})
        scales, hooks = [], []
        for name, own in places.items():
            module = layers[name].users[0][0]
            factors = self.swapped.factors(name)
            u, vh = (each.float() for each in factors.vectors)
            inner, outer = vh[own], u[:, own] * factors.s[own].float()
            if tuple(module.weight.shape) != (len(u), vh.shape[1]):
                raise SystemExit(f"{name}: not an nn.Linear")
            scale = torch.ones(len(own), requires_grad=True)
            scales.append(scale)

            def add(_, args, output, inner=inner, outer=outer, scale=scale):
                return output + ((args[0] @ inner.T) * scale) @ outer.T

            hooks.append(module.register_forward_hook(add))
        try:
            yield scales
        finally:
            for hook in hooks:
                hook.remove()

    def train_scales(
        self, path: str, chosen: Sequence[Direction], records: Sequence[LayerGain]
    ) -> Losses:
        """Losses after a few passes of AdamW over the choosing text, on factors of directions."""
        texts = self.run.read(path)
        with self.scaled(chosen, records) as scales:
            optimizer = torch.optim.AdamW(scales, lr=RATE, weight_decay=0.0)
            for _ in range(PASSES):
                for batch in texts.batches(8):
                    counts = sum(len(sequence.ids) - 1 for sequence in batch)
                    optimizer.zero_grad()
                    backward(self.model, batch, Draw())
                    for scale in scales:
                        scale.grad /= counts
                    optimizer.step()
            return self.losses()


def within(ordered: Sequence[Direction], budget: int) -> list[Direction]:
    """The first directions that a budget of parameters allows."""
    chosen, spent = [], 0
    for direction in ordered:
        spent += direction.params
        if spent > budget:
            break
        chosen.append(direction)
    return chosen


def fisher_tails(study: Study, path: str, largest: int) -> dict[str, dict[tuple[str, int], float]]:
    """What each direction adds to the tails of Fisher information and of K-FAC."""
    found = lora_diag.probe_fisher(
        *study.pair,
        data=path,
        ranks=list(range(largest + 1)),
        max_sequences=study.options["max_sequences"],
        length=study.options["length"],
    )
    tails: dict[str, dict[tuple[str, int], float]] = {"Fisher": {}, "K-FAC": {}}
    for record in found.whole:
        for place in range(largest):
            first, second = record.at(place), record.at(place + 1)
            tails["Fisher"][record.layer, place] = first - second
            by_rank = record.kfac
            first, second = (by_rank.get(str(rank), 0.0) for rank in (place, place + 1))
            tails["K-FAC"][record.layer, place] = first - second
    return tails


def compare_choices(study: Study, path: str, budgets: Sequence[int]) -> list[tuple[str, ...]]:
    """Rows of kept fractions by criterion, one column for each budget."""
    found = lora_diag.probe_gain(*study.pair, data=path, **study.options)
    records = [record for record in found.whole_of(LayerGain) if record.sigma]
    directions = directions_of(records)
    largest = max(len(record.sigma) for record in records)
    at_end = study.gradients(path, records)
    scores = {
        "gain per parameter": {(d.layer, d.place): d.gain for d in directions},
        "gradient at TUNED per parameter": at_end,
        "energy per parameter": {(d.layer, d.place): d.sigma**2 for d in directions},
        "σ": {(d.layer, d.place): d.sigma * d.params for d in directions},
    }
    if largest <= 64:
        tails = fisher_tails(study, path, largest)
        scores["Fisher tail per parameter"] = tails["Fisher"]
        scores["K-FAC tail per parameter"] = tails["K-FAC"]
    ordered = {
        name: sorted(directions, key=lambda d: -by.get((d.layer, d.place), 0.0) / d.params)
        for name, by in scores.items()
    }
    rows = []
    for name, order in ordered.items():
        cells = [
            format_kept(*study.kept(study.measure(within(order, n), records))) for n in budgets
        ]
        rows.append((name, *cells))
        print(*rows[-1], sep=" | ", flush=True)
    rng = np.random.default_rng(0)
    drawn = [[directions[i] for i in rng.permutation(len(directions))] for _ in range(3)]
    cells = []
    for budget in budgets:
        each = [study.kept(study.measure(within(order, budget), records))[0] for order in drawn]
        cells.append(f"{statistics.mean(each):.3f} ({min(each):.3f} to {max(each):.3f})")
    rows.append(("random, 3 draws", *cells))
    cells, trained = [], []
    for budget in budgets:
        ranks = [r for r in range(1, largest + 1) if make_uniform(r, records).params <= budget]
        if not ranks:
            cells.append("–")
            trained.append("–")
            continue
        leading = [d for d in directions if d.place < ranks[-1]]
        cells.append(f"{format_kept(*study.kept(study.measure(leading, records)))} (r={ranks[-1]})")
        losses = study.train_scales(path, leading, records)
        trained.append(format_kept(*study.kept(losses)))
    rows.append(("uniform rank", *cells))
    rows.append(("uniform rank, scales trained on the choosing text", *trained))
    best = ordered["gain per parameter"]
    cells = [
        format_kept(*study.kept(study.train_scales(path, within(best, n), records)))
        for n in budgets
    ]
    rows.append(("gain per parameter, scales trained likewise", *cells))
    for row in rows[-4:]:
        print(*row, sep=" | ", flush=True)
    return rows


def order_layers(study: Study, path: str, judge: str, pattern: str) -> list[tuple[str, ...]]:
    """Rank correlations with the measured loss of leaving a layer out, over layers and within
    types.
    """
    options = {**study.options, "layers": pattern}
    chosen = lora_diag.probe_gain(*study.pair, data=path, **options)
    effects = lora_diag.probe_gain(*study.pair, data=judge, measure=True, by="layer", **options)
    gaps = {r.name: r.gap for r in effects.whole_of(GainLoss) if r.subject == "without"}
    records = [record for record in chosen.whole_of(LayerGain) if record.layer in gaps]
    records = [record for record in records if record.sigma]
    tails = lora_diag.probe_fisher(
        *study.pair,
        data=path,
        ranks=[0],
        layers=pattern,
        max_sequences=study.options["max_sequences"],
        length=study.options["length"],
    )
    fisher = {record.layer: record for record in tails.whole}
    measures = {
        "gain": [record.gain for record in records],
        "energy": [record.energy for record in records],
        "Fisher": [fisher[record.layer].at(0) for record in records],
        "K-FAC": [fisher[record.layer].kfac["0"] for record in records],
    }
    measured = [gaps[record.layer] for record in records]
    types = [module_type_of(record.layer) for record in records]
    rows = []
    for name, values in measures.items():
        whole, inside = spearman(values, measured), spearman(values, measured, types)
        cells = ("–" if rho is None else f"{rho:.2f}" for rho in (whole, inside))
        rows.append((name, *cells))
    return rows


def format_kept(kept: float, half: float) -> str:
    """A fraction of the gain and half of its interval."""
    return f"{kept:.3f} ±{half:.3f}"


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table in Markdown."""
    print("|", " | ".join(head), "|")
    print("|---" + "|---:" * (len(head) - 1) + "|")
    for row in rows:
        print("|", " | ".join(row), "|")


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("tuned")
    parser.add_argument("--choose", nargs="+", required=True, help="texts that choose")
    parser.add_argument("--judge", required=True, help="text that judges")
    parser.add_argument("--params", nargs="+", type=int, required=True, help="budgets")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--layers", help="pattern of layers to order by their effect, too")
    args = parser.parse_args()
    torch.manual_seed(0)
    study = Study(args)
    gain, error = study.base.minus(study.tuned)
    print(f"{machine()}; gain on {args.judge} {gain:.4f} ± {error:.4f} (one standard error)")
    for path in args.choose:
        rows = compare_choices(study, path, args.params)
        print(f"\nChosen on {path}, judged on {args.judge}: fraction of the gain kept\n")
        print_table(["choice", *(f"{n:,} parameters" for n in args.params)], rows)
    if args.layers:
        print("\nSpearman's ρ with the loss of leaving a layer out\n")
        rows = order_layers(study, args.choose[0], args.judge, args.layers)
        print_table(["measure", "all layers", "within types"], rows)


if __name__ == "__main__":
    main()
