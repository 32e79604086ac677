"""Terminal output of ``probe intrinsic``: gain of each size, and the smallest that reaches a
fraction of the full gain.

Uses records only. Every size is taken at its own best learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, ClassVar, Literal, get_args

from lora_diag.probes.intrinsic.record import Intrinsic
from lora_diag.records import Results
from lora_diag.records.base import Shown, value_at
from lora_diag.records.probe import set_names
from lora_diag.rendering.losses import caption_of, describe_diverged, on_set, probe_summary
from lora_diag.rendering.statements import Statement, make_statement
from lora_diag.rendering.tables import Grid, Rows, grid_of
from lora_diag.rendering.text import count, number, percent
from lora_diag.running.amounts import edge, find_best_rates

Subject = Literal["full", "subspace", "lora"]


def _average_share(group: Sequence[Any]) -> float | None:
    """Return the mean of a line's ``shares``; None without any."""
    shares = value_at(group[0], "shares")
    return fmean(shares) if shares else None


@dataclass(frozen=True, slots=True)
class SizeLine:
    """The runs of one size at its best learning rate, on one set.

    Args:
        subject: ``full``, ``subspace`` or ``lora``.
        size: d of a subspace, r of a LoRA; None for full fine-tuning.
        params: Number of trained parameters.
        lr: Peak learning rate of Adam.
        pace: Equivalent learning rate of full fine-tuning; None for LoRA.
        losses: Losses of the seeds at that rate, without those that are not finite.
        edge: Whether the rate is the lowest or the highest of several tried, so that a better one
            may be beyond.
        shares: (L_base − L) / (L_base − L_full) of every seed; empty without a gain of full
            fine-tuning.
    """

    shown: ClassVar[tuple[Shown, ...]] = (
        Shown("params", "params", "Number of trained parameters", main=True, form="count"),
        Shown("lr", "lr", "Peak learning rate of Adam", main=True, form=".2g"),
        Shown(
            "pace",
            "pace",
            "Equivalent learning rate of full fine-tuning",
            main=True,
            form=".2g",
            drop=2,
        ),
        Shown("seeds", "seeds", "Runs at that rate", main=True, drop=1),
        Shown("loss", "loss", "Mean over seeds, in nats", main=True, form=".4f"),
        Shown(
            "shares",
            "gain",
            "Fraction of full fine-tuning's gain, mean",
            main=True,
            form=".0%",
            pool=_average_share,
        ),
        Shown("shares", "min to max", "Over seeds", main=True, form=".0%", pool="ends"),
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
        """Number of seeds with a finite loss."""
        return len(self.losses)

    @property
    def loss(self) -> float:
        """Mean loss over seeds."""
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
        below: The next smaller size, which does not reach it; the largest size if none does; None
            without such a size.
        certain: Whether every seed reaches it.
        missed: Larger sizes that do not reach it; ``line`` is then not a threshold.
    """

    line: SizeLine | None
    below: SizeLine | None
    certain: bool
    missed: tuple[int, ...]


def size_of(record: Intrinsic) -> int | None:
    """Return d of a subspace or r of a LoRA; None for other runs."""
    return record.dim if record.subject == "subspace" else record.rank


def select_lines(
    records: Sequence[Intrinsic], name: str, deciding_set: str, seed: int
) -> list[SizeLine]:
    """Return the runs of every size at its best rate on one set: full, subspaces, LoRAs, ascending.

    Args:
        records: Records of a probe.
        name: The set.
        deciding_set: The set by which rates were chosen.
        seed: The first seed.
    """
    lines = []
    for subject in get_args(Subject):
        of_subject = [record for record in records if record.subject == subject]
        first = [r for r in of_subject if (r.set, r.seed) == (deciding_set, seed)]
        rates = find_best_rates((size_of(r), r.loss, r.lr) for r in first)
        for size, lr in sorted(rates.items(), key=lambda item: item[0] or 0):
            of_size = [r for r in of_subject if (r.set, size_of(r)) == (name, size)]
            runs = sorted((r for r in of_size if r.lr == lr), key=lambda r: r.seed)
            losses = tuple(r.loss for r in runs if r.loss is not None)
            if losses:
                tried = {r.lr for r in of_size if r.lr is not None}
                params, pace = runs[0].params, runs[0].pace
                at_edge = edge(tried, lr) != 0
                lines.append(SizeLine(subject, size, params, lr, pace, losses, at_edge))
    base, full = _find_base(records, name), _find_full(lines)
    if base is None or base.loss is None or full is None or full.loss >= base.loss:
        return lines
    gain = base.loss - full.loss
    return [
        replace(line, shares=tuple((base.loss - loss) / gain for loss in line.losses))
        for line in lines
    ]


def find_reached(all_rows: Sequence[SizeLine], subject: Subject, share: float) -> Reached:
    """Return the smallest subspace or LoRA with a mean fraction of full fine-tuning's gain ≥
    ``share``, if any.

    Args:
        all_rows: Lines of one set, those of a subject ascending.
        subject: ``subspace`` or ``lora``.
        share: The fraction to reach.

    Example:
        >>> rows = [
        ...     SizeLine("subspace", d, d, 0.1, 0.1, (), False, shares)
        ...     for d, shares in [(10, (0.5, 0.4)), (100, (0.95, 0.88)), (1000, (0.99, 0.97))]
        ... ]
        >>> answer = find_reached(rows, "subspace", 0.9)
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


def intrinsic_lines(results: Results[Any]) -> list[Statement]:
    """Return the statements: for each set, the smallest sufficient subspace and LoRA; learning
    rates.
    """
    records, settings = results.whole_of(Intrinsic), results.run.settings
    rows_by_set = _compute_lines(results)
    statements = [
        _describe_set(name, _find_base(records, name), rows, settings)
        for name, rows in rows_by_set.items()
    ]
    first = next(iter(rows_by_set.values()), [])
    rates = make_statement("rates", "Rates", *_describe_rates(first, records))
    return probe_summary(results, *statements, rates, reading=_READING)


def _compute_lines(results: Results[Any]) -> dict[str, list[SizeLine]]:
    """Return, for each set, the runs of every size at the learning rate that is best on the first
    set.
    """
    records = results.whole_of(Intrinsic)
    sets = set_names(records)
    return {
        name: select_lines(records, name, sets[0], results.run.settings["seed"]) for name in sets
    }


def intrinsic_grids(results: Results[Any], per: str = "type") -> list[Grid]:
    """Return a table per set, one row for BASE and for each size with a finite loss."""
    records, share = results.whole_of(Intrinsic), results.run.settings["share"]
    return [
        _make_grid(caption_of(name, records), _find_base(records, name), rows, share)
        for name, rows in _compute_lines(results).items()
    ]


def _find_base(records: Sequence[Intrinsic], name: str) -> Intrinsic | None:
    return next((r for r in records if r.subject == "base" and r.set == name), None)


def _find_full(lines: Sequence[SizeLine]) -> SizeLine | None:
    return next((line for line in lines if line.subject == "full"), None)


_READING = (
    "the dimension is for this task, number of steps and fraction; more steps can give another; "
    "rates were chosen on the first set, so losses there are slightly too low; LoRA trains no "
    "embeddings, norms, biases or head, full fine-tuning and subspaces train all"
)


def _name_line(line: SizeLine) -> str:
    names = {"full": "full", "subspace": f"d={line.size}", "lora": f"LoRA r={line.size}"}
    return names[line.subject]


def _make_grid(
    caption: str, base: Intrinsic | None, all_rows: Sequence[SizeLine], share: float
) -> Grid:
    about = (
        "Gain is the decrease of the loss as a fraction of full fine-tuning's, mean over seeds. "
        f"The intrinsic dimension is the smallest d with a gain of at least {percent(share)}, and "
        "LoRA needs the smallest such r. If min to max includes that fraction, the result depends "
        "on the seed."
    )
    rows: Rows = [
        ("BASE", [{"loss": base and base.loss}]),
        *((_name_line(line), [line]) for line in all_rows),
    ]
    return grid_of(SizeLine.shown, rows, "trained", caption, about)


def _describe_set(
    name: str, base: Intrinsic | None, all_rows: Sequence[SizeLine], settings: dict[str, Any]
) -> Statement:
    full = _find_full(all_rows)
    if base is None or base.loss is None:
        return on_set(name, "not measured yet")
    if full is None:
        return on_set(name, "no run of full fine-tuning is finished with a finite loss")
    gain, share = base.loss - full.loss, settings["share"]
    if gain <= 0:
        loss = number(-gain)
        return on_set(name, f"no gain to reach: full fine-tuning is worse than BASE by {loss} nats")
    answers = [_describe_answer(find_reached(all_rows, "subspace", share), "d", settings["dims"])]
    if settings["ranks"]:
        reached = find_reached(all_rows, "lora", share)
        answers.append(_describe_answer(reached, "LoRA r", settings["ranks"]))
    target = f"full fine-tuning gains {number(gain)} nats; the target is {percent(share)} of that"
    return on_set(name, *answers, target)


def _describe_answer(answer: Reached, symbol: str, sizes: Sequence[int]) -> str:
    line, below = answer.line, answer.below
    if line is None:
        if below is None:
            return f"{symbol}: no run is finished with a finite loss"
        return (
            f"{symbol}: not reached up to {symbol.split()[-1]}={max(sizes)}, whose gain is "
            f"{_format_shares(below)}"
        )
    text = f"{symbol}={line.size} is the smallest with the target gain, {_format_shares(line)}"
    if symbol != "d":
        text += f" and {count(line.params)} parameters"
    if below is not None:
        text += f"; {symbol}={below.size} gains {_format_shares(below)}"
    if not answer.certain:
        text += "; not with every seed, so the next larger size is safer"
    if answer.missed:
        text += (
            f"; not reached at {', '.join(map(str, answer.missed))}, so seeds or rates matter "
            "here, not only size"
        )
    return text


def _format_shares(line: SizeLine) -> str:
    text = f"{line.share:.0%}"
    if len(line.shares) > 1:
        text += f" ({min(line.shares):.0%} to {max(line.shares):.0%} over seeds)"
    return text


def _describe_rates(all_rows: Sequence[SizeLine], records: Sequence[Intrinsic]) -> list[str]:
    lines = describe_diverged(records)
    at_edge = ", ".join(_name_line(line) for line in all_rows if line.edge)
    if at_edge:
        extend = "extend --lr, --full-lr or --lora-lr"
        lines.insert(0, f"at the edge of the rates tried for {at_edge}; {extend}")
    return lines
