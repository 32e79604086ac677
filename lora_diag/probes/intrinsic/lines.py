"""The smallest size that reaches a fraction of the gain, from losses in random subspaces, in full and by LoRA.

Uses records only. Every size is taken at its own best learning rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar, Literal

from lora_diag.probes.intrinsic.record import Intrinsic
from lora_diag.records.shown import Shown, value_at
from lora_diag.running.rates import edge, find_best_rates

Subject = Literal["full", "subspace", "lora"]


def _average_share(group: Sequence[Any]) -> float | None:
    """Return the mean share of the runs of one size; None if it has none."""
    shares = value_at(group[0], "shares")
    return fmean(shares) if shares else None


@dataclass(frozen=True, slots=True)
class Line:
    """The runs of one size at its best learning rate, on one set.

    Args:
        subject: ``full``, ``subspace`` or ``lora``.
        size: d of a subspace, r of a LoRA; None for full fine-tuning.
        params: Number of trained parameters.
        lr: Peak learning rate of Adam.
        pace: Equivalent learning rate of full fine-tuning; None for LoRA.
        losses: Losses of all seeds at that rate.
        edge: Whether the rate is the lowest or the highest tried, so that a better one may be beyond.
        shares: (L_base − L) / (L_base − L_full) of every seed; empty if full fine-tuning has no gain.
    """

    shown: ClassVar[tuple[Shown, ...]] = (
        Shown("params", "params", "number of trained parameters", main=True, form="count"),
        Shown("lr", "lr", "peak learning rate of Adam", main=True, form=".2g"),
        Shown("pace", "pace", "equivalent learning rate of full fine-tuning", main=True, form=".2g", drop=2),
        Shown("seeds", "seeds", "runs at that rate", main=True, drop=1),
        Shown("loss", "loss", "mean over seeds, in nats", main=True, form=".4f"),
        Shown(
            "shares", "gain", "fraction of full fine-tuning's gain, mean", main=True, form=".0%", pool=_average_share
        ),
        Shown("shares", "min to max", "over seeds", main=True, form=".0%", pool="ends"),
    )
    subject: Subject
    size: int | None
    params: int
    lr: float
    pace: float | None
    losses: tuple[float, ...]
    edge: bool
    shares: tuple[float, ...] = ()

    @property
    def seeds(self) -> int:
        """Number of runs."""
        return len(self.losses)

    @property
    def loss(self) -> float:
        """Mean over seeds."""
        return fmean(self.losses)

    @property
    def share(self) -> float:
        """Fraction of full fine-tuning's gain, mean over seeds."""
        return fmean(self.shares)


@dataclass(frozen=True, slots=True)
class Reached:
    """The smallest size that reaches the requested fraction, by the mean over its seeds.

    Args:
        line: The runs of this size; None if no size reaches it.
        below: The next smaller size, which does not; the largest size if no size reaches it.
        certain: Whether every seed reaches it.
        missed: Larger sizes that do not; the size is then not a threshold.
    """

    line: Line | None
    below: Line | None
    certain: bool
    missed: tuple[int, ...]


def best_rates(records: Iterable[Intrinsic], choose: str, seed: int, subject: Subject) -> dict[int | None, float]:
    """Return, for every size, the learning rate with the lowest loss of the first seed on one set.

    Args:
        records: Records of a run.
        choose: The set that decides.
        seed: The first seed.
        subject: Kind of the runs.
    """
    key = (subject, choose, seed)
    return find_best_rates((size_of(r), r.loss, r.lr) for r in records if (r.subject, r.set, r.seed) == key)


def size_of(record: Intrinsic) -> int | None:
    """Return d or r."""
    return record.dim if record.subject == "subspace" else record.rank


def lines(records: Sequence[Intrinsic], name: str, choose: str, seed: int) -> list[Line]:
    """Return the runs of every size at its best rate on one set: full, subspaces, LoRAs, ascending.

    Args:
        records: Records of a run.
        name: The set.
        choose: The set by which rates were chosen.
        seed: The first seed.
    """
    base = next((r.loss for r in records if r.subject == "base" and r.set == name), None)
    all_rows = [
        line for subject in ("full", "subspace", "lora") for line in _select_lines(records, name, choose, seed, subject)
    ]
    full = next((line for line in all_rows if line.subject == "full"), None)
    gain = base - fmean(full.losses) if base is not None and full is not None else 0.0
    if base is None or gain <= 0:
        return all_rows
    return [_add_shares(line, base, gain) for line in all_rows]


def _add_shares(line: Line, base: float, gain: float) -> Line:
    shares = tuple((base - loss) / gain for loss in line.losses)
    return Line(line.subject, line.size, line.params, line.lr, line.pace, line.losses, line.edge, shares)


def _select_lines(records: Sequence[Intrinsic], name: str, choose: str, seed: int, subject: Subject) -> list[Line]:
    of_subject = [r for r in records if r.subject == subject and r.set == name]
    rows = []
    for size, lr in sorted(best_rates(records, choose, seed, subject).items(), key=lambda item: item[0] or 0):
        tried = {r.lr for r in of_subject if size_of(r) == size and r.lr is not None}
        runs = sorted((r for r in of_subject if size_of(r) == size and r.lr == lr), key=lambda r: r.seed)
        losses = tuple(r.loss for r in runs if r.loss is not None)
        if losses:
            rows.append(Line(subject, size, runs[0].params, lr, runs[0].pace, losses, edge(tried, lr) != 0))
    return rows


def reached(all_rows: Sequence[Line], subject: Subject, share: float) -> Reached:
    """Return the smallest subspace or LoRA whose mean fraction of full fine-tuning's gain is at least ``share``.

    Example:
        >>> rows = [
        ...     Line("subspace", d, d, 0.1, 0.1, (), False, shares)
        ...     for d, shares in [(10, (0.5, 0.4)), (100, (0.95, 0.88)), (1000, (0.99, 0.97))]
        ... ]
        >>> answer = reached(rows, "subspace", 0.9)
        >>> answer.line.size, answer.below.size, answer.certain
        (100, 10, False)
    """
    rows = [line for line in all_rows if line.subject == subject and line.shares]
    index = next((i for i, line in enumerate(rows) if line.share >= share), None)
    if index is None:
        return Reached(None, rows[-1] if rows else None, False, ())
    line = rows[index]
    missed = tuple(row.size for row in rows[index:] if row.share < share and row.size is not None)
    return Reached(line, rows[index - 1] if index else None, min(line.shares) >= share, missed)
