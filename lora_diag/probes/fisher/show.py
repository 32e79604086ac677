"""Terminal output of ``probe fisher``: costly tails, and rank correlations of predictors with the
measured cost.

Uses records only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from statistics import median
from typing import Any

from lora_diag.metrics.statistics import spearman, spearman_interval
from lora_diag.probes.fisher.record import Effect, Fisher
from lora_diag.records import Results
from lora_diag.records.base import Shown
from lora_diag.records.names import module_type_of
from lora_diag.rendering.losses import probe_summary
from lora_diag.rendering.statements import Statement, make_statement
from lora_diag.rendering.tables import Column, Grid, grid_of, rows_of
from lora_diag.rendering.text import format_shown, number, percent, short, span

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
        grouped: Number of layers in a module type with more than one.
        kl: Spearman's ρ with the measured KL by predictor, over all layers and within module types;
            None if not defined, the latter also if ``grouped`` is below ``MIN_COUNT``.
        ratio: Median of F(r)/2 over the measured KL; None if no KL is positive.
        ratios: The smallest and the largest of these ratios; None if no KL is positive.
    """

    def __init__(self, rank: int, records: Sequence[Fisher]) -> None:
        kinds = [module_type_of(record.layer) for record in records]
        self.rank = rank
        self.n = len(records)
        self.grouped = sum(kinds.count(kind) > 1 for kind in kinds)
        kl = []
        ratios = []
        for record in records:
            effect = effect_at(record, rank)
            assert effect is not None
            kl.append(effect.kl)
            if effect.kl > 0:
                ratios.append(record.at(rank) / 2 / effect.kl)
        self.kl: dict[str, tuple[float | None, float | None]] = {}
        for name, predictor in PREDICTORS:
            values = [predictor(record, rank) for record in records]
            within = spearman(values, kl, kinds) if self.grouped >= MIN_COUNT else None
            self.kl[name] = spearman(values, kl), within
        self.ratio: float | None = None
        self.ratios: tuple[float, float] | None = None
        if ratios:
            self.ratio = median(ratios)
            self.ratios = min(ratios), max(ratios)


def correlate_predictors(records: Sequence[Fisher], ranks: Sequence[int]) -> list[Correlations]:
    """Return the rank correlations of the predictors at every rank with enough measured layers."""
    by_rank = []
    for rank in ranks:
        measured = [record for record in records if effect_at(record, rank) is not None]
        if len(measured) >= MIN_COUNT:
            by_rank.append(Correlations(rank, measured))
    return by_rank


# Ratio of ½F to the KL above which it is too high; with the text's labels 2.0 on the sample model
# and 1.7 on one of 135 M, with drawn ones 1.0 on the former.
HIGH_RATIO = 1.5

# The rank of the table's fractions, if it is among the ranks of the run; else the first.
USUAL_RANK = 8


def fisher_lines(results: Results[Any]) -> list[Statement]:
    """Return the statements: costliest layers, predictors of the measured KL, and calibration."""
    records = results.whole_of(Fisher)
    if not records:
        return probe_summary(results, reading=_READING)
    rank = _choose_rank(results)
    costliest = _describe_costliest(records, rank)
    by_rank = correlate_predictors(records, results.run.settings["ranks"])
    return probe_summary(
        results,
        make_statement("at_rank", f"At r={rank}", costliest, scoped=True),
        *_describe_predictors(by_rank, records),
        reading=_READING,
    )


def fisher_grids(results: Results[Any], per: str = "type") -> list[Grid]:
    """Return the table of tails, one row per module ``type`` or ``layer``, and of rank
    correlations, if measured.
    """
    records = results.whole_of(Fisher)
    grids = []
    if records:
        grids.append(_make_layers_grid(records, _choose_rank(results), per))
    if by_rank := correlate_predictors(records, results.run.settings["ranks"]):
        grids.append(_make_predictors_grid(by_rank))
    return grids


def _choose_rank(results: Results[Any]) -> int:
    ranks: list[int] = results.run.settings["ranks"]
    return USUAL_RANK if USUAL_RANK in ranks else ranks[0]


def _make_layers_grid(records: Sequence[Fisher], rank: int, per: str) -> Grid:
    """Return the fraction of each module type or layer in all tails, its ½F, and the measured
    effect.
    """
    predictors = dict(PREDICTORS)
    columns = (
        ("σ² tail", "weight energy", 4),
        ("C tail", "data energy", 2),
        ("K-FAC", "K-FAC energy", 3),
        (f"F({rank})", "Fisher", 0),
    )
    fractions = [
        _make_share_column(records, title, predictors[name], rank, drop)
        for title, name, drop in columns
    ]
    expected = Shown(
        "fro",
        "½F",
        "Mean KL per prediction",
        main=True,
        pool=lambda row: sum(r.at(rank) for r in row) / 2,
    )
    effects = (
        Shown(f"effect.{rank}.kl", "KL", "Measured", terminal=True, pool="sum"),
        Shown(f"effect.{rank}.gap", "loss gap", "Measured", terminal=True, form="+.4f", pool="sum"),
    )
    is_measured = any(effect_at(record, rank) for record in records)
    about = (
        f"Columns in % are fractions of all layers' tails beyond r={rank}. Where that of F({rank}) "
        "is far above that of σ², the energy underestimates the cost of truncation. ½F is the mean "
        "KL per prediction, in nats, expected from truncating each layer "
        f"alone{'; KL and loss gap are measured' if is_measured else ''}."
    )
    return grid_of([*fractions, expected, *effects], rows_of(records, per), per, about=about)


def _make_share_column(
    records: Sequence[Fisher], title: str, predictor: Predictor, rank: int, drop: int
) -> Shown:
    """Return the column of the fraction that a row's layers have of the predicted cost of all
    layers.
    """
    total = sum(predictor(record, rank) for record in records)

    def share(row: Sequence[Fisher]) -> float | None:
        return sum(predictor(record, rank) for record in row) / total if total else None

    about = "Fraction of all layers' tails"
    return Shown("fro", title, about, main=True, form="percent", pool=share, drop=drop)


def _make_predictors_grid(by_rank: Sequence[Correlations]) -> Grid:
    names = tuple(name for name, _ in PREDICTORS)
    columns = []
    for at_rank in by_rank:
        cells = tuple(_format_pair(at_rank.kl[name]) for name in names)
        columns.append(Column(f"r={at_rank.rank}", cells))
    about = (
        "1 is the order of the measured cost and 0 is chance. A value that is high over all layers "
        "and low within module types distinguishes types, not layers."
    )
    n = span((at_rank.n for at_rank in by_rank), " to ")
    caption = f"Spearman's ρ with the measured KL, n = {n}: all layers | within module types"
    return Grid(caption, "predictor", names, tuple(columns), about=about)


def _format_pair(pair: tuple[float | None, float | None]) -> str:
    return " | ".join(format_shown(rho, "{:.2f}".format) for rho in pair)


def _describe_costliest(records: Sequence[Fisher], rank: int) -> str:
    top = sorted(records, key=lambda record: -record.at(rank))
    sums = [*accumulate(record.at(rank) for record in top)]
    total, energy = sums[-1], sum(record.weight[str(rank)] for record in records)
    if not total or not energy:
        return "none: no truncation changes the loss"
    n_half = next(n for n, running in enumerate(sums, 1) if running >= total / 2)
    share = sum(record.weight[str(rank)] for record in top[:n_half]) / energy
    return (
        f"half of ΣF is in {n_half} of {len(records)} layers, which have {percent(share)} of Σσ² "
        f"beyond r; most in {short(top[0].layer)}, {percent(top[0].at(rank) / total)}"
    )


def _describe_predictors(
    by_rank: Sequence[Correlations], records: Sequence[Fisher]
) -> list[Statement]:
    """Return the rank correlations of the predictors with the measured KL, and the calibration of
    ½F.
    """
    if not by_rank:
        missing = "not measured; use --measure, or --eval with held-out text"
        return [make_statement("predicts", "Prediction", missing)]
    chosen = next((at_rank for at_rank in by_rank if at_rank.rank == USUAL_RANK), by_rank[0])
    lines = []
    for index, scope, n in ((0, "over all", chosen.n), (1, "within module types", chosen.grouped)):
        rhos = {name: rho for name, pair in chosen.kl.items() if (rho := pair[index]) is not None}
        if not rhos:
            continue
        best = max(rhos, key=rhos.__getitem__)
        line = f"{scope} (n={n}): {best}, ρ = {rhos[best]:.2f}"
        if index == 0 and (ends := spearman_interval(rhos[best], n)):
            line += f" [{ends[0]:.2f}, {ends[1]:.2f}]"
        lines.append(line)
    calibration = ""
    if chosen.ratio is not None and chosen.ratios is not None:
        low, high = map(number, chosen.ratios)
        calibration = (
            f"½F ÷ measured KL at r={chosen.rank}: median {number(chosen.ratio)}, from {low} "
            f"to {high}"
        )
        first = records[0]
        # The gradients of a sequence's predictions are correlated with the text's own labels.
        correlated = first.labels == "data" and first.predictions > first.sequences
        if correlated and chosen.ratio > HIGH_RATIO:
            calibration += "; 1 is exact, and --labels model is nearer to it"
    return [
        make_statement("best", f"Best at r={chosen.rank}", *lines),
        make_statement("calibrated", "Calibration", calibration),
    ]


_READING = (
    "each layer is truncated alone, all others as in TUNED; the joint effect can differ from the "
    "sum; layers of one model are not independent, so intervals of ρ are too narrow"
)
