"""Losses of BASE with a part of the update, by which choices are compared: passes forward only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lora_diag.metrics.statistics import paired_ratio
from lora_diag.models.data import Texts
from lora_diag.models.losses import Losses, LossesBySet
from lora_diag.models.swapping import FULL, Swapped
from lora_diag.probes.gain.choice import (
    SUFFICIENT,
    THRESHOLDS,
    Direction,
    find_costly,
    half_of,
    order_directions,
)
from lora_diag.probes.gain.record import GainLoss, LayerGain, Subject
from lora_diag.records.names import module_type_of
from lora_diag.running.judging import Judge
from lora_diag.running.probing import ProbeRun
from lora_diag.running.progress import RunRecords

# Largest number of losses of one search: doubling up to a million directions, then halving.
SEARCH = 26


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the update.

    Args:
        subject: As in ``GainLoss``, like the next ones.
        name: The module type, layer or fraction.
        amount: The rank, or number of directions.
        params: Number of parameters of the directions.
        places: Directions by layer.
        keep: Whether they are kept, and not dropped.
        others: ``FULL`` or 0: all or none of ΔW in layers that are not in ``places``.
    """

    subject: Subject
    name: str = ""
    amount: int = 0
    params: int | None = None
    places: Mapping[str, Sequence[int]] = field(default_factory=dict)
    keep: bool = True
    others: int = FULL

    @property
    def fields(self) -> dict[str, Any]:
        """The fields that distinguish its records."""
        return {"subject": self.subject, "name": self.name, "amount": self.amount}


BASE, TUNED = Part("base", others=0), Part("tuned")


def make_choice(directions: Sequence[Direction], records: Iterable[LayerGain]) -> Part:
    """Return the part with some directions only, and no other ones of layers that are split."""
    places: dict[str, list[int]] = {record.layer: [] for record in records if record.sigma}
    for direction in directions:
        places[direction.layer].append(direction.place)
    params = sum(direction.params for direction in directions)
    return Part("directions", amount=len(directions), params=params, places=places)


def make_uniform(rank: int, records: Iterable[LayerGain]) -> Part:
    """Return the part with r leading directions of every layer that is split."""
    split = [record for record in records if record.sigma]
    places = {record.layer: range(min(rank, len(record.sigma))) for record in split}
    params = sum(len(places[record.layer]) * sum(record.shape) for record in split)
    return Part("uniform", amount=rank, params=params, places=places)


def make_dropped(directions: Iterable[Direction], threshold: float) -> Part:
    """Return the part without some directions."""
    places: dict[str, list[int]] = {}
    for direction in directions:
        places.setdefault(direction.layer, []).append(direction.place)
    amount = sum(map(len, places.values()))
    return Part("dropped", f"{threshold:g}", amount, places=places, keep=False)


def list_groups(layers: Iterable[str], by: str) -> list[Part]:
    """Return the parts without, and with only, each ``type`` or ``layer``."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(module_type_of(layer) if by == "type" else layer, []).append(layer)
    parts = []
    for name, group in groups.items():
        places: dict[str, Sequence[int]] = dict.fromkeys(group, ())
        parts.append(Part("without", name, places=places))
        parts.append(Part("alone", name, places=places, keep=False, others=0))
    return parts


def find_smallest(most: int, suffices: Callable[[int], bool]) -> int | None:
    """Return the smallest number, from 1 to ``most``, that suffices if all larger ones do: found by
    doubling, then halving, and up to 1/64 of it too large. None if no number that was tried does.

    >>> [find_smallest(90, lambda n: n >= least) for least in (1, 23, 91)]
    [1, 23, None]
    """
    low, high = 0, 1
    while not suffices(high):
        if high >= most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > max(1, high // 64):
        middle = (low + high) // 2
        if suffices(middle):
            high = middle
        else:
            low = middle
    return high


@dataclass(frozen=True)
class Parts:
    """The measurement of parts.

    Args:
        run: The run, with the open model.
        swapped: The weights of the model.
        records: The records of the run; those of all layers are there.
    """

    run: ProbeRun[Any]
    swapped: Swapped
    records: RunRecords[Any]

    def measure_groups(self, texts: Sequence[Texts], by: str) -> None:
        """Measure the loss without, and with only, each module type or layer."""
        layers = [record.layer for record in self._layers(False) if record.fro]
        self._judge(texts).judge(list_groups(layers, by))

    def measure_choices(self, texts: Sequence[Texts]) -> None:
        """Find the smallest uniform rank and number of directions that keep enough of the gain, if
        it is significant, and measure what could be dropped.

        Args:
            texts: The text that judges, and the shifted one, if any.
        """
        found, elsewhere = self._layers(False), self._layers(True)
        costly = {each: find_costly(found, elsewhere, each) for each in THRESHOLDS}
        dropped = [make_dropped(chosen, each) for each, chosen in costly.items() if chosen]
        judge = self._judge(texts)
        judge.judge(dropped, later=2 * SEARCH)
        (base,) = self.records.find(record="gain_loss", set=texts[0].name, subject="base")
        if not base.gap > half_of(base):
            return

        def suffices(part: Part) -> bool:
            judge.add([part])
            measured = next(self.records.find(set=texts[0].name, **part.fields))
            return measured.kept is not None and measured.kept >= SUFFICIENT

        ordered = order_directions(found)
        largest = max((len(record.sigma) for record in found), default=0)
        if largest:
            find_smallest(largest, lambda rank: suffices(make_uniform(rank, found)))
        if ordered:
            find_smallest(len(ordered), lambda count: suffices(make_choice(ordered[:count], found)))

    def _layers(self, shifted: bool) -> list[LayerGain]:
        return list(self.records.find(record="layer_gain", shifted=shifted))

    def _judge(self, texts: Sequence[Texts]) -> Judge[Part]:
        measure = partial(self._measure, texts)
        return Judge(self.run, texts, self.records, (BASE, TUNED), measure, _make_record)

    def _measure(self, texts: Sequence[Texts], part: Part) -> LossesBySet:
        self.swapped.toggle(part.places, part.others, part.keep)
        return self.run.measure(texts, f"{part.subject} {part.name or part.amount or ''}")


def _make_record(part: Part, texts: Texts, losses: Losses, base: Losses, tuned: Losses) -> GainLoss:
    """Return the record of a part on a text."""
    gap, gap_error = losses.minus(tuned)
    own, whole = (base.sums - losses.sums).numpy(), (base.sums - tuned.sums).numpy()
    kept, kept_error = paired_ratio(own, whole, losses.counts.tolist())
    return GainLoss(
        **part.fields,
        **losses.on(texts),
        params=part.params,
        sequences=len(losses.sums),
        loss=losses.mean,
        gap=gap,
        gap_error=gap_error,
        kept=kept,
        kept_error=kept_error,
    )
