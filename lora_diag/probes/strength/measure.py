"""``probe strength``: measure the loss of W_0 + t·ΔW for each strength t, of the whole update or of one part at a time.

Nothing is trained. The losses of sequences are in the records, so that the best strength and its errors are computed
from these alone, also after an interruption.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from lora_diag.adapters import Adapter
from lora_diag.adapters.portable import check_new_folder, stage_folder
from lora_diag.adapters.strength import write_strength
from lora_diag.deltas import Delta
from lora_diag.errors import UsageError, damaged
from lora_diag.models.data import Texts
from lora_diag.models.losses import Losses, measure
from lora_diag.models.opening import Model
from lora_diag.models.swapping import FULL, Swapped
from lora_diag.probes.strength import StrengthOptions
from lora_diag.probes.strength.curve import WINDOW, Curve, choose, propose, select
from lora_diag.probes.strength.record import Strength, StrengthChoice
from lora_diag.records import LeftOut, Results
from lora_diag.records.names import depth_of, module_type_of, tower_of
from lora_diag.rendering.text import quantity
from lora_diag.running.fingerprint import legible
from lora_diag.running.options import show_options
from lora_diag.running.probing import Options, ProbeRun, describe_texts, left_out
from lora_diag.running.progress import RunRecords

# Strengths of the whole update, without 0 and 1, which every run measures.
GRID = (0.25, 0.5, 0.75, 1.25, 1.5)
# Largest difference of the loss of a written adapter, read again, from that of the strength, in nats.
MAX_WRITTEN_GAP = 1e-3


@dataclass(frozen=True, slots=True)
class Cell:
    """One configuration of the weights: the whole update at t, or parts of it at t and the others at 1.

    Args:
        scale: t.
        part: The names of the parts; None for the whole update.
        layers: Their layers; empty for the whole update.
    """

    scale: float
    part: str | None = None
    layers: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Label for the progress bar."""
        return f"{self.part or ''} t={self.scale:g}".strip()


def group_parts(deltas: Sequence[Delta], by: str) -> dict[str, tuple[str, ...]]:
    """Return the layers of each ``block`` or module ``type``, by its name; none for ``all``."""
    groups: dict[str, list[str]] = {}
    for layer in (delta.layer for delta in deltas if by != "all"):
        name = module_type_of(layer)
        if by == "block":
            depth = depth_of(layer)
            name = "outside blocks" if depth is None else ".".join([*tower_of(layer), str(depth)])
        groups.setdefault(name.removeprefix("model."), []).append(layer)
    return {name: tuple(layers) for name, layers in groups.items()}


class _Evaluation:
    """Losses of configurations, and their records.

    Args:
        swapped: The weights of the model, which are changed.
        texts: The evaluation sets.
        losses_on: Returns the losses of the model on a set, given a label.
        records: The records of the run.
    """

    def __init__(
        self,
        swapped: Swapped,
        texts: Sequence[Texts],
        losses_on: Callable[[Texts, str], Losses],
        records: RunRecords[Any],
    ) -> None:
        self._swapped, self._texts, self._losses_on, self._records = swapped, texts, losses_on, records
        # BASE and TUNED are measured again by a resumed run: all differences are from them.
        ends = [(Cell(scale), self._measure(Cell(scale))) for scale in (0.0, 1.0)]
        self._base, self._tuned = ends[0][1], ends[1][1]
        for cell, by_set in ends:
            self._records.put(*self._make_records(cell, by_set))

    def has(self, cell: Cell) -> bool:
        """Return whether all losses of a configuration are in the records."""
        return self._records.has([text_set.name for text_set in self._texts], scale=cell.scale, part=cell.part)

    def add(self, cell: Cell) -> None:
        """Measure a configuration, unless it is in the records."""
        if not self.has(cell):
            self._records.put(*self._make_records(cell, self._measure(cell)))

    def curve(self, name: str) -> Curve:
        """Return the losses of the whole update on a set."""
        found = sorted(self._records.find(record="strength", set=name, part=None), key=lambda record: record.scale)
        nll = np.array([record.nll for record in found])
        return Curve(tuple(record.scale for record in found), nll, tuple(map(int, self._base[name].counts)))

    def _measure(self, cell: Cell) -> dict[str, Losses]:
        if cell.part is None:
            self._swapped.scale({}, cell.scale)
        else:
            self._swapped.scale(dict.fromkeys(cell.layers, cell.scale), 1.0)
        return {text_set.name: self._losses_on(text_set, cell.label) for text_set in self._texts}

    def _make_records(self, cell: Cell, by_set: Mapping[str, Losses]) -> Iterator[Strength]:
        for text_set in self._texts:
            losses, base, tuned = (by[text_set.name] for by in (by_set, self._base, self._tuned))
            zero = Losses.of([0.0] * len(losses.sums), losses.counts.tolist())
            _, loss_error = losses.minus(zero)
            gap, gap_error = losses.minus(tuned)
            change, change_error = losses.minus(base)
            drop = base.mean - tuned.mean
            yield Strength(
                **losses.on(text_set),
                **losses.by_sequence(is_base=cell == Cell(0.0)),
                scale=cell.scale,
                part=cell.part,
                loss=losses.mean,
                loss_error=loss_error,
                gap=gap,
                gap_error=gap_error,
                change=change,
                change_error=change_error,
                kept=-change / drop + 0.0 if drop else None,
            )


@show_options
def probe_strength(base: Path | str, tuned: Path | str, **options: Unpack[StrengthOptions]) -> Results[Any]:
    r"""Measure the loss of W_0 + t·ΔW for each strength t, and find the best and the smallest sufficient one.

    Weights are swapped in place; nothing is trained. The best t between measured ones, of a parabola, is checked by a
    measurement there, and so is the smallest t that keeps 90% of the gain.

    Args:
        base: Base model: a folder that transformers can open, or a Hub id.
        tuned: Fine-tuned checkpoint or adapter.
        evaluate: Held-out text or JSONL files from TUNED's training distribution.
        shifted: Files of another distribution, to measure what each strength costs there.
        scales: Strengths t, besides 0 (BASE) and 1 (TUNED); None for 0.25, 0.5, …, 1.5, or for 0 of each part.
        by: ``all`` for one t of the whole update; or each ``block`` or module ``type`` at t, the others at 1.
        write: New folder for the adapter at strength ``scale``, in its own format; None to write none. The loss of
            what was written is measured before the folder gets its name.
        scale: Strength of the adapter to write.
        part: With ``write`` and ``by``: the parts that get ``scale``; the others keep 1.
        **options: ``StrengthOptions``.

    Returns:
        The records are in ``whole``: a loss for each strength and set, and a choice for each set that is not shifted.

    Raises:
        UsageError: An option is invalid, BASE is an adapter, ``write`` exists or TUNED is no adapter to write, the
            output can be neither replaced nor resumed, or the extra ``train``, or ``datasets`` for a data set, is not
            installed.
        InputError: An input cannot be read or an output written, transformers cannot open BASE, or ΔW of a layer or a
            loss is not finite.
        NothingComparedError: The checkpoints have no weight in common.

    Reference:
        Ilharco et al. 2023, "Editing models with task arithmetic"; Wortsman et al. 2022, "Robust fine-tuning of
        zero-shot models" (WiSE-FT).

    Example:
        >>> found = probe_strength("sample_checkpoints/base",  # doctest: +SKIP
        ...     "sample_checkpoints/lora_r16", evaluate=["sample_checkpoints/eval/in_domain.txt"])
        >>> [(record.scale, record.loss) for record in found.whole_of(Strength)]  # doctest: +SKIP
    """
    run = ProbeRun("probe strength", options, StrengthOptions)
    by, write = run.options.by, run.options.write
    _check_writing(run.options)
    run.check_files(base, tuned)
    compared = run.compare(base, tuned)
    groups = group_parts(compared.pairing.deltas, by)
    if unknown := next((name for name in run.options.part if name not in groups), None):
        raise UsageError(f"--part {unknown}: unknown; use one of {', '.join(groups)}")
    update = compared.update
    if write is not None and not isinstance(update, Adapter):
        fix = "extract an adapter with loradiag extract, or interpolate both checkpoints with a merging program"
        raise UsageError(f"--write {write}: {tuned} is a checkpoint, and only adapters are written; {fix}")
    cells = _list_cells(run.options, groups)
    model = run.open(base)
    texts = run.read_sets()
    swapped = Swapped(model, compared.pairing.deltas, 0)
    grid = sorted({0.0, 1.0, *(cell.scale for cell in cells if cell.part is None)})
    fits = by == "all" and len(grid) >= WINDOW

    def losses_on(text_set: Texts, label: str) -> Losses:
        return measure(model, text_set, run.batch, lambda: run.watch.batch(label))

    def measure_missing(run_records: RunRecords[Any]) -> list[LeftOut]:
        names = [text_set.name for text_set in texts]
        sets = [text_set.name for text_set in texts if not text_set.shifted]
        todo = [cell for cell in cells if not run_records.has(names, scale=cell.scale, part=cell.part)]
        checks = 2 * len(sets) if fits else 0
        run.watch.total = (2 + len(todo) + checks) * run.batches(texts)
        work = f"{2 + len(todo) + checks} losses on {quantity(len(texts), 'set')}"
        of_parts = f", of {quantity(len(groups), 'part')} of the update" if groups else ""
        run.estimate(texts[0], work, f"{of_parts}{f', up to {checks} losses are checks of the fit' if fits else ''}")
        evaluation = _Evaluation(swapped, texts, losses_on, run_records)
        with ExitStack() as stack:
            if isinstance(update, Adapter) and write is not None:
                folder = stack.enter_context(stage_folder(Path(write)))
                assert compared.base is not None
                chosen = cells[-1].layers if groups else None
                write_strength(update, folder / "files", folder, compared.base, cells[-1].scale, chosen)
            for cell in todo:
                evaluation.add(cell)
            swapped.scale({}, 0.0)
            if write is not None:
                (promised,) = run_records.find(set=names[0], scale=cells[-1].scale, part=cells[-1].part)
                copy = run.compare(base, folder / "files").pairing.deltas
                _check_written(model, copy, promised.loss, partial(losses_on, texts[0], "written adapter"), write)
        if by == "all":
            for scale in (scale for name in sets for scale in propose(select(evaluation.curve(name), grid)) if fits):
                evaluation.add(Cell(scale))
            for name in sets:
                run_records.put(StrengthChoice(set=name, **choose(evaluation.curve(name), grid)))
        swapped.scale({}, 0.0)
        return left_out(compared.pairing, swapped.absent)

    settings = {"scales": grid if by == "all" else sorted({cell.scale for cell in cells}), "by": by}
    if write is not None:
        settings |= {"write": legible(write), "scale": run.options.scale, "part": list(run.options.part)}
    return run.over([*compared.inputs, *map(describe_texts, texts)], settings, measure_missing)


def _check_written(
    model: Model, copy: Iterable[Delta], promised: float, losses: Callable[[], Losses], path: Path | str
) -> None:
    """Compare the loss of a written adapter with that of its strength; BASE's weights are restored.

    Raises:
        InputError: They differ by more than ``MAX_WRITTEN_GAP``.
    """
    written = Swapped(model, copy, 0)
    written.arrange({}, FULL)
    loss = losses().mean
    written.arrange({})
    if not abs(loss - promised) <= MAX_WRITTEN_GAP:
        problem = f"the adapter at this strength reads back with the loss {loss:.4f} instead of {promised:.4f}"
        raise damaged(path, problem, "it was not written; report this")


def _check_writing(options: Options) -> None:
    """Check the options for writing an adapter.

    Raises:
        UsageError: One lacks another, the strength or the parts are useless, or the folder exists.
        InputError: The folder cannot be written.
    """
    if options.write is None:
        for name in ("scale", "part"):
            if options[name] not in (None, ()):
                raise UsageError(f"--{name}: needs --write with the folder for the adapter; add it, or use --scales")
        return
    if options.scale is None:
        raise UsageError("--write: needs --scale with the strength of the adapter; add it")
    if bool(options.part) != (options.by != "all"):
        raise UsageError("--write: name parts by --by block or --by type, and give them with --part; give both or none")
    if options.scale == 1 or (options.scale == 0 and not options.part):
        same = "TUNED itself" if options.scale else "BASE itself"
        raise UsageError(f"--scale {options.scale:g}: would write {same}; use another strength")
    if not options.resume:
        check_new_folder(Path(options.write))


def _list_cells(options: Options, groups: Mapping[str, tuple[str, ...]]) -> list[Cell]:
    """Return the configurations to measure besides BASE and TUNED; the last is that of an adapter to write."""
    writes = options.write is not None
    default: Sequence[float] = () if writes else (0.0,) if groups else GRID
    scales = sorted({*map(float, default if options.scales is None else options.scales)} - {1.0})
    cells = [Cell(scale, name, layers) for name, layers in groups.items() for scale in scales]
    if not groups:
        cells = [Cell(scale) for scale in scales if scale]
    if writes:
        layers = tuple(layer for name in options.part for layer in groups[name])
        last = Cell(float(options.scale), " + ".join(options.part) or None, layers)
        cells = [*(cell for cell in cells if (cell.scale, cell.part) != (last.scale, last.part)), last]
    return cells
