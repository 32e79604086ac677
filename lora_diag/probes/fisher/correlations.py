"""Rank correlations between predictors and the cost of truncating a layer, from records of ``probe fisher``.

Uses records only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from lora_diag.metrics.correlation import spearman
from lora_diag.probes.fisher.record import Effect, Fisher
from lora_diag.records.names import module_type_of

Predictor = Callable[[Fisher, int], float]

# Predictors of the effect of truncating a single layer, in the order of the table.
PREDICTORS: tuple[tuple[str, Predictor], ...] = (
    ("weight energy", lambda record, rank: record.weight[str(rank)]),
    ("data energy", lambda record, rank: record.data[str(rank)]),
    ("K-FAC energy", lambda record, rank: record.kfac[str(rank)]),
    ("layer size", lambda record, rank: float(sum(record.shape))),
    ("Fisher", lambda record, rank: record.at(rank)),
)

# Minimum number of layers for a rank correlation.
MIN_COUNT = 4


def effect_at(record: Fisher, rank: int) -> Effect | None:
    """Return the effect of truncating a layer to a rank; None if not measured."""
    return (record.effect or {}).get(str(rank))


class Correlations:
    """Rank correlations of the predictors at one rank.

    Args:
        rank: r.
        records: The layers whose truncation to rank r was measured.

    Attributes:
        n: Number of layers.
        grouped: Number of these in a module type with more than one.
        kl: Spearman's ρ with the measured KL by predictor, over all layers and within module types.
        gap: The same with the measured change of the loss, also for its second-order estimate.
        ratio: Median of F(r)/2 over the measured KL; None if no KL is positive.
        ratios: The smallest and the largest of these; None likewise.
    """

    def __init__(self, rank: int, records: Sequence[Fisher]) -> None:
        kinds = [module_type_of(record.layer) for record in records]
        repeated = [kind for kind in kinds if kinds.count(kind) > 1]
        effects = [effect for record in records if (effect := effect_at(record, rank)) is not None]
        self.rank, self.n, self.grouped = rank, len(records), len(repeated)

        def both(values: Sequence[float], target: Sequence[float]) -> tuple[float | None, float | None]:
            return spearman(values, target), spearman(values, target, kinds) if self.grouped >= MIN_COUNT else None

        kl, gap = [effect.kl for effect in effects], [effect.gap for effect in effects]
        scores = {name: [predictor(record, rank) for record in records] for name, predictor in PREDICTORS}
        self.kl = {name: both(values, kl) for name, values in scores.items()}
        second_order = [record.linear[str(rank)] + record.at(rank) / 2 for record in records]
        self.gap = {name: both(values, gap) for name, values in scores.items()}
        self.gap["linear + ½F"] = both(second_order, gap)
        ratios = [
            record.at(rank) / 2 / effect.kl for record, effect in zip(records, effects, strict=True) if effect.kl > 0
        ]
        self.ratio = median(ratios) if ratios else None
        self.ratios = (min(ratios), max(ratios)) if ratios else None


def correlations(records: Sequence[Fisher], ranks: Sequence[int]) -> list[Correlations]:
    """Return the rank correlations of the predictors at every rank with enough measured layers."""
    results = []
    for rank in ranks:
        known = [record for record in records if effect_at(record, rank) is not None]
        if len(known) >= MIN_COUNT:
            results.append(Correlations(rank, known))
    return results
