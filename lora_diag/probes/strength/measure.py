"""``probe strength``: measure the loss of W_0 + t·ΔW for each strength t, of the whole update or of
one part at a time.

Nothing is trained. The losses of sequences are in the records, so that the best strength and its
errors are computed from these alone, also after an interruption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from lora_diag.deltas import FactoredDelta
from lora_diag.metrics.statistics import paired_difference
from lora_diag.models.data import Texts
from lora_diag.models.losses import Losses, LossesBySet
from lora_diag.models.swapping import Swapped
from lora_diag.probes.strength import StrengthOptions
from lora_diag.probes.strength.curve import LEAST, Curve, choose
from lora_diag.probes.strength.record import Strength, StrengthChoice
from lora_diag.records import LeftOut, Results
from lora_diag.records.names import name_unit
from lora_diag.running.judging import Judge
from lora_diag.running.options import show_options
from lora_diag.running.probing import ProbeRun, describe_texts, left_out
from lora_diag.running.progress import RunRecords

# Strengths of the whole update, besides 0 and 1.
GRID = (0.25, 0.5, 0.75, 1.25, 1.5)


@dataclass(frozen=True, slots=True)
class Cell:
    """One configuration of the weights: the whole update at t, or parts of it at t and the others
    at 1.

    Args:
        scale: t.
        part: The names of the parts; None for the whole update.
        layers: Their layers; empty for the whole update.
    """

    scale: float
    part: str | None = None
    layers: tuple[str, ...] = ()

    @property
    def fields(self) -> dict[str, Any]:
        """Fields that identify the records of the configuration."""
        return {"scale": self.scale, "part": self.part}

    @property
    def label(self) -> str:
        """Label for the progress bar."""
        return f"{self.part or ''} t={self.scale:g}".strip()


BASE, TUNED = Cell(0.0), Cell(1.0)


def list_cells(scales: Sequence[float] | None, groups: Mapping[str, Sequence[str]]) -> list[Cell]:
    """Return the configurations to measure besides BASE and TUNED.

    Args:
        scales: Strengths t; None for the default ones.
        groups: The layers of each part; empty for the whole update.
    """
    if scales is None:
        scales = (0.0,) if groups else GRID
    units = [Cell(1.0, name, tuple(layers)) for name, layers in groups.items()] or [TUNED]
    cells = [replace(unit, scale=float(scale)) for unit in units for scale in sorted(scales)]
    return [cell for cell in dict.fromkeys(cells) if cell not in (BASE, TUNED)]


def make_record(
    cell: Cell, text_set: Texts, losses: Losses, base: Losses, tuned: Losses
) -> Strength:
    """Return the record of a configuration on a set, from its losses and those of BASE
    and TUNED.
    """
    change, change_error = losses.minus(base)
    zeros = [0.0] * len(losses.sums)
    return Strength(
        **cell.fields,
        **losses.on(text_set),
        **losses.by_sequence(is_base=cell == BASE),
        **losses.between(base, tuned),
        loss_error=paired_difference(losses.rounded, zeros, losses.counts.tolist())[1],
        change=change,
        change_error=change_error,
    )


def read_curve(records: RunRecords[Any], name: str) -> Curve:
    """Return the losses of the whole update on a set."""
    found = sorted(
        records.find(record="strength", set=name, part=None), key=lambda record: record.scale
    )
    (counts,) = (record.predictions for record in found if record.predictions)
    return Curve(
        tuple(record.scale for record in found), np.array([record.nll for record in found]), counts
    )


@show_options
def probe_strength(
    base: Path | str, tuned: Path | str, **options: Unpack[StrengthOptions]
) -> Results[Any]:
    r"""Measure the loss of W_0 + t·ΔW for each strength t, and find the best and the smallest
    sufficient one.

    Weights are swapped in place; nothing is trained. The best t between measured ones, of a
    parabola, is checked by a measurement there, and so is the smallest t that keeps 90% of the
    gain.

    Args:
        base: Base model: a folder that transformers can open, or a Hub id.
        tuned: Fine-tuned checkpoint or adapter.
        eval: Held-out text or JSONL files from TUNED's training distribution.
        shifted: Files of another distribution, to measure what each strength costs there.
        scales: Strengths t, besides 0 (BASE) and 1 (TUNED); None for 0.25, 0.5, …, 1.5, or for 0 of
            each part.
        by: ``all`` for one t of the whole update; or each ``block`` or module ``type`` at t, the
            others at 1.
        **options: ``StrengthOptions``.

    Returns:
        The records are in ``whole``: a loss for each strength and set; for ``by="all"`` also a
            choice for each
        set that is not shifted.

    Raises:
        UsageError: An option is invalid, BASE is an adapter, the output can be neither replaced nor
            resumed, or the extra ``train``, or ``datasets`` for a data set, is not installed.
        InputError: An input cannot be read or the output written, transformers cannot open BASE, or
            ΔW of a layer or a loss is not finite.
        NothingComparedError: The checkpoints have no weight in common.

    Reference:
        Ilharco et al. 2023, "Editing models with task arithmetic"; Wortsman et al. 2022, "Robust
        fine-tuning of zero-shot models" (WiSE-FT).

    Example:
        >>> found = probe_strength(
        ...     "sample_checkpoints/base",  # doctest: +SKIP
        ...     "sample_checkpoints/lora_r16",
        ...     eval=["sample_checkpoints/eval/in_domain.txt"],
        ... )
        >>> [(record.scale, record.loss) for record in found.whole_of(Strength)]  # doctest: +SKIP
    """
    run = ProbeRun("probe strength", options, StrengthOptions)
    by = run.options["by"]
    run.check_files(base, tuned)
    compared = run.compare(base, tuned)
    groups: dict[str, list[str]] = {}
    for delta in compared.pairing.deltas if by != "all" else ():
        groups.setdefault(name_unit(delta.layer, by), []).append(delta.layer)
    cells = list_cells(run.options["scales"], groups)
    model = run.open(base)
    sets = run.read_sets()
    texts = run.fit(sets, lambda: (len(cells) + 2) * run.count_tokens(sets))
    swapped = Swapped(model, compared.pairing.deltas, 0)
    grid = sorted({0.0, 1.0, *(cell.scale for cell in cells if cell.part is None)})
    tasks = [text_set.name for text_set in texts if not text_set.shifted]

    def measure_cell(cell: Cell) -> LossesBySet:
        others = cell.scale if cell.part is None else 1.0
        swapped.scale(dict.fromkeys(cell.layers, cell.scale), others)
        return run.measure(texts, cell.label)

    def measure_missing(records: RunRecords[Any]) -> list[LeftOut]:
        judge = Judge(run, texts, records, (BASE, TUNED), measure_cell, make_record)
        checks = 2 * len(tasks) if by == "all" and len(grid) >= LEAST else 0
        note = f", up to {checks} of the losses to check the fit" if checks else ""
        judge.judge(cells, checks, note)
        if checks:
            for choice in [choose(read_curve(records, name), grid) for name in tasks]:
                scales = choice.get("optimum"), choice.get("sufficient")
                judge.add(Cell(round(scale, 2)) for scale in scales if scale is not None)
        if by == "all":
            for name in tasks:
                choice = choose(read_curve(records, name), grid)
                records.put(StrengthChoice(set=name, **choice))
        return left_out(compared.pairing, swapped.absent)

    settings = run.settings("by")
    settings["scales"] = grid if by == "all" else sorted({cell.scale for cell in cells})
    # Whether an adapter can hold the whole update.
    settings["factored"] = all(
        isinstance(delta, FactoredDelta) for delta in compared.pairing.deltas
    )
    return run.over([*compared.inputs, *map(describe_texts, texts)], settings, measure_missing)
