"""Loss of W_0 + ΔW_r for each rank: the measured cost of truncating an update.

Nothing is trained. A sufficient rank is sufficient to compress this update; the result of training at that rank is
measured by ``probe sweep``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_diag.models.data import Texts
from lora_diag.models.losses import Losses, measure
from lora_diag.models.opening import Model
from lora_diag.models.swapping import FULL, Swapped
from lora_diag.records import Probe
from lora_diag.records.names import module_type_of
from lora_diag.records.probe import Subject


@dataclass(frozen=True, slots=True)
class Cell:
    """One configuration of the weights.

    Args:
        subject: ``base``, ``tuned`` or ``truncated``.
        rank: Rank of the truncated layers.
        layers: The truncated layers.
        layer: The layer that is truncated alone.
        module_type: The module type that is truncated alone.
    """

    subject: Subject
    rank: int | None = None
    layers: tuple[str, ...] = ()
    layer: str | None = None
    module_type: str | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """Fields that identify its records."""
        return {name: getattr(self, name) for name in ("subject", "rank", "layer", "module_type")}

    @property
    def label(self) -> str:
        """Label of the progress bar."""
        part = self.layer or self.module_type or ""
        return f"{part} r={self.rank}".strip() if self.rank is not None else self.subject


BASE, TUNED = Cell("base"), Cell("tuned")


def cells_of(chosen: Mapping[str, tuple[int, int]], ranks: Sequence[int], per: str) -> list[Cell]:
    """Return the configurations to measure, in order.

    Args:
        chosen: Shapes of the layers that are truncated.
        ranks: Ranks, ascending; those that truncate nothing are skipped.
        per: ``all``, ``layer`` or ``type``.
    """
    cells: list[Cell] = []
    groups: dict[str, list[str]] = {}
    for layer in chosen:
        groups.setdefault({"all": "", "layer": layer, "type": module_type_of(layer)}[per], []).append(layer)
    for name, layers in groups.items():
        largest = max(min(chosen[layer]) for layer in layers)
        alone = {"layer": name if per == "layer" else None, "module_type": name if per == "type" else None}
        cells += [Cell("truncated", rank, tuple(layers), **alone) for rank in ranks if rank < largest]
    return cells


def truncation(
    model: Model,
    swapped: Swapped,
    texts: Sequence[Texts],
    cells: Sequence[Cell],
    matrices: Sequence[str],
    rest: str,
    size: int,
    after_batch: Callable[[str], None],
) -> Iterator[Probe]:
    """Yield the records of every configuration, set by set.

    Args:
        model: BASE.
        swapped: Its weights, which are changed.
        texts: The evaluation sets.
        cells: Configurations; BASE and TUNED are measured first.
        matrices: All layers that are truncated in any of them.
        rest: ``tuned`` or ``base``: source of all other tensors.
        size: Sequences in a batch.
        after_batch: Called after every batch with a label.

    Raises:
        InputError: A layer is not finite.
    """
    every = swapped.layers
    untruncated = dict.fromkeys(every if rest == "tuned" else matrices, FULL)

    def losses_of(cell: Cell, ranks: Mapping[str, int]) -> dict[str, Losses]:
        swapped.arrange(ranks)
        return {text_set.name: measure(model, text_set, size, lambda: after_batch(cell.label)) for text_set in texts}

    ends: dict[str, dict[str, Losses]] = {}
    for cell, rank in ((BASE, 0), (TUNED, FULL)):
        ends[cell.subject] = losses_of(cell, dict.fromkeys(every, rank))
    for cell in (BASE, TUNED):
        yield from (record_of(cell, text_set, ends[cell.subject], ends) for text_set in texts)
    for cell in cells:
        assert cell.rank is not None
        losses = losses_of(cell, {**untruncated, **dict.fromkeys(cell.layers, cell.rank)})
        energy = swapped.energy(cell.layers, cell.rank)
        yield from (record_of(cell, text_set, losses, ends, energy) for text_set in texts)


def record_of(
    cell: Cell,
    texts: Texts,
    losses_by_text: Mapping[str, Losses],
    ends: Mapping[str, Mapping[str, Losses]],
    energy: float | None = None,
) -> Probe:
    """Return the record of one loss relative to the losses of BASE and TUNED."""
    losses, base, tuned = losses_by_text[texts.name], ends["base"][texts.name], ends["tuned"][texts.name]
    gap, error = losses.minus(tuned)
    change = base.mean - tuned.mean
    return Probe(
        probe="truncation",
        **losses.on(texts),
        sequences=len(losses.sums),
        subject=cell.subject,
        layer=cell.layer,
        module_type=cell.module_type,
        rank=cell.rank,
        loss=losses.mean,
        gap=gap,
        gap_error=error,
        kept=(base.mean - losses.mean) / change + 0.0 if change else None,
        energy=energy,
    )
