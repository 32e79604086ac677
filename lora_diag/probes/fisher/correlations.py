"""Records of ``probe fisher`` → how each number that may predict what a truncation costs orders the layers.

Knows records only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from lora_diag.metrics.correlation import spearman
from lora_diag.probes.fisher.record import Effect, Fisher
from lora_diag.records.names import module_type_of

Predictor = Callable[[Fisher, int], float]

# What may predict the effect of truncating a layer alone, in the order of the table.
PREDICTORS: tuple[tuple[str, Predictor], ...] = (
    ("weight energy", lambda record, rank: record.weight[str(rank)]),
    ("data energy", lambda record, rank: record.data[str(rank)]),
    ("K-FAC energy", lambda record, rank: record.kfac[str(rank)]),
    ("layer size", lambda record, rank: float(sum(record.shape))),
    ("Fisher", lambda record, rank: record.at(rank)),
)

# Layers of fewer than so many say nothing about an order.
FEWEST = 4


def effect_at(record: Fisher, rank: int) -> Effect | None:
    """Return what truncating a layer to a rank did; None if that was not measured."""
    return (record.effect or {}).get(str(rank))


class Correlations:
    """How each predictor orders the layers, at one rank.

    Args:
        rank: r.
        n: Layers that rank r truncates.
        grouped: How many of them are of a module type with more than one.
        kl: By predictor: Spearman's ρ with the measured KL, over all layers and within module types.
        gap: Likewise with the measured change of the loss.
    """

    def __init__(self, rank: int, records: Sequence[Fisher]) -> None:
        kinds = [module_type_of(record.layer) for record in records]
        repeated = [kind for kind in kinds if kinds.count(kind) > 1]
        effects = [effect for record in records if (effect := effect_at(record, rank)) is not None]
        self.rank, self.n, self.grouped = rank, len(records), len(repeated)
        self.kinds = len(set(repeated))

        def both(values: Sequence[float], target: Sequence[float]) -> tuple[float | None, float | None]:
            return spearman(values, target), spearman(values, target, kinds) if self.grouped >= FEWEST else None

        kl, gap = [effect.kl for effect in effects], [effect.gap for effect in effects]
        scores = {name: [predictor(record, rank) for record in records] for name, predictor in PREDICTORS}
        self.kl = {name: both(values, kl) for name, values in scores.items()}
        second = [record.linear[str(rank)] + record.at(rank) / 2 for record in records]
        self.gap = {name: both(values, gap) for name, values in scores.items()}
        self.gap["linear + ½F"] = both(second, gap)
        ratios = [
            record.at(rank) / 2 / effect.kl for record, effect in zip(records, effects, strict=True) if effect.kl > 0
        ]
        self.ratio = median(ratios) if ratios else None
        self.ratios = (min(ratios), max(ratios)) if ratios else None


def correlations(records: Sequence[Fisher], ranks: Sequence[int]) -> list[Correlations]:
    """Return how the predictors order the layers at every rank with enough measured ones."""
    found = []
    for rank in ranks:
        known = [record for record in records if effect_at(record, rank) is not None]
        if len(known) >= FEWEST:
            found.append(Correlations(rank, known))
    return found
