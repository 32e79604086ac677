"""``probe truncation``: measure the loss of W_0 + ΔW_r for each rank r, the cost of truncating an
update.

Nothing is trained. A sufficient rank is sufficient to compress this update; the result of training
at that rank is measured by ``probe sweep``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from lora_diag.models.data import Texts
from lora_diag.models.losses import Losses, LossesBySet
from lora_diag.models.swapping import FULL, Swapped, truncated_layers
from lora_diag.probes.truncation import TruncationOptions
from lora_diag.records import LeftOut, Probe, Results
from lora_diag.records.names import module_type_of
from lora_diag.records.probe import Subject
from lora_diag.rendering.text import quantity
from lora_diag.running.judging import Judge
from lora_diag.running.layers import check_ranks
from lora_diag.running.options import show_options
from lora_diag.running.probing import ProbeRun, describe_texts, left_out
from lora_diag.running.progress import RunRecords


@dataclass(frozen=True, slots=True)
class Cell:
    """One configuration of the weights.

    Args:
        subject: ``base``, ``tuned`` or ``truncated``.
        rank: Rank of the truncated layers; None for BASE and TUNED.
        layers: The truncated layers.
        layer: The layer that is truncated alone; None otherwise.
        module_type: The module type that is truncated alone; None otherwise.
        match_norm: Whether ΔW_r is lengthened to the norm of ΔW in every truncated layer.
    """

    subject: Subject
    rank: int | None = None
    layers: tuple[str, ...] = ()
    layer: str | None = None
    module_type: str | None = None
    match_norm: bool = False

    @property
    def fields(self) -> dict[str, Any]:
        """Fields that identify the records of the configuration."""
        return {
            name: getattr(self, name)
            for name in ("subject", "rank", "layer", "module_type", "match_norm")
        }

    @property
    def label(self) -> str:
        """Label for the progress bar: the part and rank, or the subject."""
        part = self.layer or self.module_type or ""
        return f"{part} r={self.rank}".strip() if self.rank is not None else self.subject


BASE, TUNED = Cell("base"), Cell("tuned")


def cells_of(
    chosen: Mapping[str, tuple[int, int]], ranks: Sequence[int], per: str, match_norm: bool = False
) -> list[Cell]:
    """Return the truncations to measure, by layer or type, then by rank, without BASE and TUNED.

    Args:
        chosen: Shapes of the layers that are truncated.
        ranks: Ranks, ascending; those that truncate nothing are skipped.
        per: ``all``, ``layer`` or ``type``.
        match_norm: Whether each truncation above rank 0 is followed by that with the norm of ΔW.
    """
    groups: dict[str, list[str]] = {}
    for layer in chosen:
        name = {"all": "", "layer": layer, "type": module_type_of(layer)}[per]
        groups.setdefault(name, []).append(layer)
    cells = []
    for name, layers in groups.items():
        largest = max(min(chosen[layer]) for layer in layers)
        alone: Any = {"all": {}, "layer": {"layer": name}, "type": {"module_type": name}}[per]
        for rank in ranks:
            if rank < largest:
                cell = Cell("truncated", rank, tuple(layers), **alone)
                cells.append(cell)
                if match_norm and rank:
                    cells.append(replace(cell, match_norm=True))
    return cells


@show_options
def probe_truncation(
    base: Path | str, tuned: Path | str, **options: Unpack[TruncationOptions]
) -> Results[Any]:
    r"""Measure the loss of W_0 + ΔW_r for each rank r, ΔW_r the best rank-r approximation of ΔW
    (Eckart–Young).

    Weights are swapped in place; nothing is trained. Norms, biases, embeddings and head are not
    truncated.

    Args:
        base: Base model: a folder that transformers can open, or a Hub id.
        tuned: Fine-tuned checkpoint or adapter.
        eval: Held-out text or JSONL files from TUNED's training distribution.
        shifted: Files of another distribution.
        ranks: Ranks r; 0 restores the truncated layers of ``base``.
        match_norm: Also measure (‖ΔW‖/‖ΔW_r‖)·ΔW_r in every layer: its distance from ΔW_r is the
            loss of length, the rest of the gap to TUNED the loss of direction.
        by: ``all`` layers truncated together; or each ``layer`` or module ``type`` alone,
            the others as in TUNED.
        untruncated: Source of the other tensors: ``tuned``, or ``base``, as with an adapter on the
            matrices only.
        **options: ``TruncationOptions``.

    Returns:
        The records are in ``whole``: the losses of BASE, TUNED and every truncation, on each set.

    Raises:
        UsageError: An option is invalid, BASE is an adapter, the output can be neither replaced nor
            resumed, or the extra ``train``, or ``datasets`` for a data set, is not installed.
        InputError: An input cannot be read or the output written, transformers cannot open BASE, or
            ΔW of a layer or a loss is not finite.
        NothingComparedError: The checkpoints have no weight in common, or no matrix is selected.

    Reference:
        Eckart and Young 1936, "The approximation of one matrix by another of lower rank".

    Example:
        >>> found = probe_truncation(
        ...     "sample_checkpoints/base",  # doctest: +SKIP
        ...     "sample_checkpoints/full_ft",
        ...     ranks=[4, 16],
        ...     eval=["sample_checkpoints/eval/in_domain.txt"],
        ... )
        >>> [(record.subject, record.rank, record.loss) for record in found.whole]  # doctest: +SKIP
    """
    run = ProbeRun("probe truncation", options, TruncationOptions)
    per, rest, match_norm = (
        run.options["by"],
        run.options["untruncated"],
        run.options["match_norm"],
    )
    ranks = list(check_ranks(run.options["ranks"], 0))
    run.check_files(base, tuned)
    compared = run.compare(base, tuned)
    deltas = compared.pairing.deltas
    chosen = truncated_layers(deltas, **run.selection)
    cells = cells_of(chosen, ranks, per, match_norm)
    model = run.open(base)
    sets = run.read_sets()
    texts = run.fit(sets, lambda: (len(cells) + 2) * run.count_tokens(sets))
    swapped = Swapped(model, deltas, ranks[-1])
    has_matched = any(cell.match_norm for cell in cells)

    def measure_cell(cell: Cell) -> LossesBySet:
        if cell.rank is None:
            swapped.arrange({}, FULL if cell == TUNED else 0)
        else:
            own_ranks = dict.fromkeys(chosen, FULL) | dict.fromkeys(cell.layers, cell.rank)
            swapped.arrange(own_ranks, FULL if rest == "tuned" else 0, cell.match_norm)
        return run.measure(texts, cell.label)

    def make_record(
        cell: Cell, text_set: Texts, losses: Losses, base: Losses, tuned: Losses
    ) -> Probe:
        fields = losses.on(text_set) | losses.between(base, tuned)
        if has_matched:
            fields |= losses.by_sequence(is_base=cell == BASE)
        if cell.rank is not None:
            fields["energy"] = swapped.energy(cell.layers, cell.rank)
        return Probe(probe="truncation", sequences=len(losses.sums), **cell.fields, **fields)

    def measure_missing(records: RunRecords[Any]) -> list[LeftOut]:
        judge = Judge(run, texts, records, (BASE, TUNED), measure_cell, make_record)
        judge.judge(cells, note=f", and the SVD of {quantity(len(chosen))}")
        return left_out(compared.pairing, swapped.absent)

    settings: dict[str, Any] = {
        "ranks": ranks,
        "by": per,
        "untruncated": rest,
        **run.selection,
    }
    if match_norm:
        settings["match_norm"] = True
    return run.over([*compared.inputs, *map(describe_texts, texts)], settings, measure_missing)
