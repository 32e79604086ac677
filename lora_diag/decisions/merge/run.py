"""``merge``: write merged updates, or a single one times a factor, and record what is
kept of each.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Unpack

from lora_diag.adapters import locate
from lora_diag.adapters.layouts import PEFT, check_layout
from lora_diag.catalog import read_results
from lora_diag.decisions.extract.run import place_target, write_in_format
from lora_diag.decisions.extract.tensor_plan import TensorPlan, plan_tensors
from lora_diag.decisions.merge import (
    ALL,
    METHODS,
    JudgeOptions,
    MergeMethod,
    MergeOptions,
    MergeRunOptions,
)
from lora_diag.decisions.merge.judge import Candidate, MergeJudge
from lora_diag.decisions.merge.measure import MergeSettings, MergeTask, estimate_bytes, merge_layer
from lora_diag.decisions.merge.record import Merged, MergedLoss, select_layers
from lora_diag.decisions.merge.show import merge_card
from lora_diag.deltas import Delta, Pairing, Side, Unpaired, natural_order
from lora_diag.errors import Given, InputError, LoradiagError, NothingComparedError, UsageError
from lora_diag.records import Results, Run, RunInput
from lora_diag.rendering.statements import short_paths
from lora_diag.running.amounts import read_share
from lora_diag.running.fingerprint import legible
from lora_diag.running.inputs import Comparison, open_base, refuse_repeated
from lora_diag.running.layers import LayerRun
from lora_diag.running.options import fill_options, list_options, show_options
from lora_diag.running.output_folder import ADAPTER_FILES, OutputFolder, list_words
from lora_diag.running.updates import LayerUpdates, align_layers, list_unmeasured, tuned_path
from lora_diag.storage import as_path
from lora_diag.storage.hub import loadable
from lora_diag.storage.rewriting import MODEL, MODEL_CONFIG, RECIPE, Replacement, write_changed

RECORDS = "merge.jsonl"


class MergeFolder(OutputFolder):
    """The folder of a merge."""

    records_name: ClassVar[str] = RECORDS
    own_files: ClassVar[frozenset[str]] = ADAPTER_FILES | {MODEL, MODEL_CONFIG, RECORDS}
    description: ClassVar[str] = "a merge"


@show_options
def merge(
    base: Path | str,
    updates: Sequence[Path | str],
    output: Path | str,
    **options: Unpack[MergeOptions],
) -> Results[Merged]:
    r"""Merge updates of one model, and measure what each keeps; or write one update at another
    strength.

    M of a layer is merged from the updates that change it; an update without the layer counts as
    zero. The output is an adapter with the exact rank of M, or its best approximation of a lower
    rank, or with ``checkpoint`` the checkpoint W + M. Of one update, M = ``scale``·ΔW.

    Args:
        base: Base checkpoint.
        updates: One or more adapters or fine-tuned checkpoints.
        output: Folder to write. It is written as ``NAME.part`` and renamed when complete.
        method: ``mean``, ``sum`` (task arithmetic), ``ties``, ``dare``, ``dare_ties``, ``tsv``,
            ``iso_c``, ``knots_ties`` or ``core_ties``; see ``lora_diag.decisions.merge.methods``.
            With ``eval`` also ``all``: of those that can be written, the one that is chosen by
            its losses. Of one update, ``mean`` or ``sum``.
        weights: w_k; by default 1/K for ``mean`` and ``dare`` and 1 for the others. ``mean``
            divides them by their sum.
        scale: λ, the factor of M.
        density: Fraction of entries that TIES and DARE keep; default by method.
        rank: Largest rank of a layer.
        energy: The smallest rank of each layer that keeps this fraction of ‖M‖².
        checkpoint: Write the checkpoint W + M.
        eval: Held-out texts, each ``NAME=FILE`` with the name of an update's folder, whose task
            it is, or ``FILE``. Losses of BASE, of each update on its own text, and of the merge are
            measured.
        scales: With ``eval``: factors λ to choose from.
        choose: With several merges: the one with the smallest rise of the loss on the ``worst``
            task, or in the ``mean``, above the updates alone, by the first half of each text.
        output_dtype: Dtype of the output; by default float32 for an adapter, and that of BASE for a
            checkpoint.
        portable: Write one rank for all layers: an adapter that every program scales alike.
        format: ``peft``, ``kohya``, ``diffusers``, ``mlx`` or ``gguf``; all but the first imply
            ``portable``.
        base_name: The base model's name for config and model card; default ``base`` as given.
        seed: Seed of DARE's masks, sampled rows and random updates.
        overwrite: Replace an existing merge in ``output``.
        **options: ``MergeOptions``.

    Returns:
        One ``merged`` record for each layer and update, also in ``merge.jsonl`` of the folder.

    Raises:
        UsageError: An option is invalid or needs several updates, there is no update or one is
            given twice, ``base`` is an adapter, the merge has no factors and no rank is given, or
            ``output`` is an input or may not be replaced.
        InputError: An input cannot be read or does not fit ``base``, or the output cannot be
            written.
        NothingComparedError: No weight is in two of several updates, or every layer of the merge is
            zero.

    Example:
        >>> import tempfile
        >>> base, *updates = (
        ...     f"sample_checkpoints/{name}" for name in ("base", "lora_r4", "lora_r16")
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = merge(base, updates, f"{folder}/merged", layers=r"layers\.0\..*q_proj")
        >>> [(record.rank, round(record.weight, 3)) for record in found]
        [(20, 0.5), (20, 0.5)]
    """
    options = fill_options(MergeOptions, options)
    full, form = options["checkpoint"], options["format"]
    candidates = list_candidates(options, len(updates))
    base, paths = as_path(base), [as_path(path) for path in updates]
    refuse_repeated(paths, base)
    folder = MergeFolder(Path(output), (base, *paths), options["overwrite"], options["resume"])
    in_folder = {**options, "output": folder.records, "overwrite": False}
    run = LayerRun("merge", in_folder, MergeRunOptions)
    opened = open_base(locate(base))
    compared = [run.compare(opened, path) for path in paths]
    aligned = align_layers(compared, candidates[0].weights, vectors=full)
    skipped = list_unmeasured(compared, {layer.layer for layer in aligned})
    pairing = _join_pairings(compared, skipped.unpaired)
    sides = _find_sides(pairing, base) if full or options["eval"] else {}
    planned = None if full else _plan_adapter(replace(compared[0], pairing=pairing), options)
    tasks = _make_tasks(aligned, planned, sides)
    candidates = _select_writable(candidates, tasks, options)
    run.layout(tasks)  # raises an error on the memory limit before the folder is created
    settings = _make_layer_settings(run, options, len(paths))
    chosen, judge, losses = candidates[0], None, list[MergedLoss]()
    if options["eval"]:
        judge = MergeJudge(options, base, compared, short_paths([legible(path) for path in paths]))
        if folder.whole:
            method, scale = _read_choice(folder, options)
        else:
            losses = judge.judge(candidates, tasks, sides, settings, folder.final)
            method, scale = next((item.method, item.scale) for item in losses if item.chosen)
        settings = replace(settings, scale=scale)
        chosen = next((each for each in candidates if each.method.name == method), chosen)
    settings = replace(settings, method=chosen.method.name, density=chosen.density or 1.0)
    tasks = [chosen.weigh(task, list(map(tuned_path, compared))) for task in tasks]
    files = {task.layer: folder.factors(index) for index, task in enumerate(tasks)}
    folder.open()
    own = _make_settings(options, chosen, settings.scale, judge)

    def finish(results: Results[Merged]) -> None:
        layers = select_layers(results.layers)
        _require_nonzero(layers, full, results, folder)
        name = options["base_name"] or loadable(legible(base.parent if base.is_file() else base))
        metadata = {RECIPE: _write_recipe(results, own, options["seed"])}
        if not folder.whole and planned is not None:
            write_in_format(planned, folder, layers, results.left_out, files, name, form, metadata)
        elif not folder.whole:
            replaced = _list_replacements(layers, sides, files)
            write_changed(folder.work, opened, replaced, options["output_dtype"], metadata)
        command = _write_command(results.run, base, paths, output)
        folder.finish(merge_card(results, name, command))

    return run.over(
        [] if folder.whole else tasks,
        partial(merge_layer, files=files),
        estimate_bytes,
        settings,
        Pairing((), skipped.unpaired) if planned is None else planned.measure_left_out,
        _list_inputs(compared, judge),
        own,
        recorded=("layers", "exclude", "device", "seed"),
        finish=finish,
        conclude=lambda records: records.put(*losses),
    )


def _join_pairings(compared: Sequence[Comparison], unpaired: tuple[Unpaired, ...]) -> Pairing:
    """Return the layers of all updates, each from the first update that has it."""
    deltas: dict[str, Delta] = {}
    for each in reversed(compared):
        deltas.update({delta.layer: delta for delta in each.pairing.deltas})
    own_names: dict[str, str] = {}
    for each in (*compared[1:], compared[0]):
        own_names.update(each.pairing.own_names)
    in_order = sorted(deltas.values(), key=lambda delta: natural_order(delta.layer))
    return Pairing(tuple(in_order), unpaired, own_names)


def _plan_adapter(compared: Comparison, options: MergeOptions) -> TensorPlan:
    """Return the treatment of all tensors of an adapter, which its format must be able to hold."""
    portable = options["portable"] or options["format"] != PEFT
    planned = plan_tensors(compared, save=False, portable=portable)
    targets = map(place_target, planned.targets.values())
    check_layout(options["format"], list(targets), planned.base)
    return planned


def _make_tasks(
    aligned: Sequence[LayerUpdates], planned: TensorPlan | None, sides: Mapping[str, Side]
) -> list[MergeTask]:
    """Return the layers to merge: with a plan those that it has factors for, else all, as stored in
    BASE.
    """
    if planned is None:
        return [
            MergeTask(item.layer, item.shape, item.updates, sides[item.layer]) for item in aligned
        ]
    kept = [
        (item, planned.targets[item.layer]) for item in aligned if item.layer in planned.targets
    ]
    return [
        MergeTask(item.layer, item.shape, item.updates, transposed=target.transposed)
        for item, target in kept
    ]


def _make_layer_settings(
    run: LayerRun[MergeRunOptions], options: MergeOptions, count: int
) -> MergeSettings:
    """Return the settings of merging a layer of ``count`` updates."""
    return run.settings(
        MergeSettings,
        method=options["method"],
        count=count,
        scale=options["scale"],
        rank=options["rank"],
        energy=options["energy"],
        dtype=options["output_dtype"] or (None if options["checkpoint"] else "float32"),
    )


def _read_choice(folder: MergeFolder, options: MergeOptions) -> tuple[str, Any]:
    """Return the method and λ that were chosen for a complete folder; settings that do not fit them
    are refused as of any resumed run.
    """
    written = read_results(folder.records).run.settings
    return written["method"], written["scale"] if options["scales"] else options["scale"]


def _make_settings(
    options: MergeOptions, chosen: Candidate, scale: float, judge: MergeJudge | None
) -> dict[str, Any]:
    """Return the settings for the run record."""
    settings = {
        "method": chosen.method.name,
        "scale": scale,
        "rank": options["rank"],
        "energy": options["energy"],
        "checkpoint": options["checkpoint"],
        "output_dtype": options["output_dtype"],
        "weights": list(chosen.weights),
        "density": chosen.density,
    }
    if options["portable"]:
        settings["portable"] = True
    if options["format"] != PEFT:
        settings["format"] = options["format"]
    return settings if judge is None else settings | judge.settings


def _require_nonzero(
    layers: Iterable[Merged], full: bool, results: Results[Merged], folder: MergeFolder
) -> None:
    """Discard the folder of a merge that is zero in every layer.

    Raises:
        LoradiagError: It is.
    """
    if not any(record.rank or (full and record.merged_fro) for record in layers):
        folder.discard()
        raise _make_nothing_error(results)


def _write_command(run: Run, base: Path, paths: Sequence[Path], output: Path | str) -> str:
    """Return the command for the model card, without an evaluation: what it chose is in the other
    options.
    """
    typed = list_words(MergeOptions, run, *list_options(JudgeOptions))
    words = ["loradiag", "merge", *map(legible, (base, *paths)), *typed, "-o", legible(output)]
    return shlex.join(words)


def _list_replacements(
    layers: Iterable[Merged], sides: Mapping[str, Side], files: Mapping[str, Path]
) -> list[Replacement]:
    """Return the weights of BASE to replace by merged ones."""
    replaced = []
    for record in layers:
        side = sides[record.layer]
        replaced.append(Replacement(side.name, side.offset, record.shape, files[record.layer]))
    return replaced


def _list_inputs(compared: Sequence[Comparison], judge: MergeJudge | None) -> tuple[RunInput, ...]:
    """Return all inputs for the run record."""
    texts = [] if judge is None else judge.inputs
    return (*compared[0].inputs[:-1], *_describe_inputs(compared), *texts)


def list_candidates(options: MergeOptions, count: int) -> list[Candidate]:
    """Return the merges that the options request: one, or with ``all`` one per method.

    Args:
        options: All options of ``merge``.
        count: K.

    Raises:
        UsageError: There is no update, an option is out of range or does not apply, or merges are
            compared without an evaluation set.
    """
    if not count:
        raise UsageError("merge: no update; give BASE, then adapters or fine-tunes of it")
    name, density = options["method"], options["density"]
    if count == 1 and (name == ALL or not METHODS[name].linear):
        raise UsageError(
            Given("method", name),
            "merges several updates",
            "give two or more, or $scale alone for one",
        )
    _check_numbers(options)
    methods = METHODS.values() if name == ALL else [METHODS[name]]
    if density is not None and all(method.density is None for method in methods):
        raise UsageError(
            Given("density"), f"{name} keeps every entry", "remove it, or use a method that trims"
        )
    return [
        Candidate(
            method,
            _choose_weights(method, options["weights"], count),
            method.density if density is None or method.density is None else density,
        )
        for method in methods
    ]


def _select_writable(
    candidates: Sequence[Candidate], tasks: Sequence[MergeTask], options: MergeOptions
) -> list[Candidate]:
    """Return the candidates that can be written as requested; a single one must be.

    Raises:
        UsageError: None can, for want of factors.
    """
    writable = []
    for candidate in candidates:
        error = _find_unwritable(tasks, candidate.method, options)
        if error is None:
            writable.append(candidate)
    if error is not None and not writable:
        raise error
    return writable


def _find_unwritable(
    tasks: Sequence[MergeTask], method: MergeMethod, options: MergeOptions
) -> UsageError | None:
    """Return the error of a method that needs factors that an update lacks, or whose merge has none
    and no rank is requested; None if there is none.
    """
    limited = options["checkpoint"] or options["rank"] or options["energy"]
    for task in tasks:
        dense = task.is_matrix and not task.factored
        if dense and method.needs_factors:
            return UsageError(
                Given("method", method.name),
                f"{task.layer} has an update without factors",
                "use knots_ties or ties, or $exclude it",
            )
        if (dense or method.entrywise) and not limited:
            dense_layer = f"{task.layer} is not given by factors"
            why = f"{method.name} merges single entries" if method.entrywise else dense_layer
            return UsageError(
                "merge",
                f"{why}, so that the merge has full rank",
                "give $rank R, $energy FRACTION or $checkpoint",
            )
    return None


def _choose_weights(
    method: MergeMethod, requested: Sequence[float] | None, count: int
) -> tuple[float, ...]:
    """Return the weights: as given, divided by their sum for ``mean``, or the method's default.

    Raises:
        UsageError: There is not one for each update, or one is out of range.
    """
    if requested is None:
        return (1 / count if method.averages else 1.0,) * count
    weights = tuple(map(float, requested))
    if len(weights) != count:
        raise UsageError(
            Given("weights"),
            f"{len(weights)} weights for {count} updates",
            "give one for each, in their order",
        )
    if not all(map(math.isfinite, weights)) or not any(weights):
        raise UsageError(Given("weights"), "must be finite, and not all 0")
    if method.name != "sum" and min(weights) <= 0:
        raise UsageError(
            Given("weights"),
            f"must be positive for {method.name}",
            "$method sum also subtracts updates",
        )
    return tuple(weight / sum(weights) for weight in weights) if method.name == "mean" else weights


def _check_numbers(options: MergeOptions) -> None:
    """Check the numbers among the options, and which are given together.

    Raises:
        UsageError: A number is out of range, or an option does not apply.
    """
    rank, energy, density = options["rank"], options["energy"], options["density"]
    if rank is not None and energy is not None:
        raise UsageError("merge", "give one of $rank R and $energy FRACTION")
    if rank is not None and rank < 1:
        raise UsageError(Given("rank", rank), "must be a whole number from 1 up")
    for scale in (options["scale"], *options["scales"]):
        if not math.isfinite(scale) or scale == 0:
            raise UsageError(Given("scale", scale), "must be finite and not 0")
    if density is not None and not 0 < density <= 1:
        raise UsageError(Given("density", density), "must be above 0 and at most 1")
    of_adapters = {
        "rank": rank,
        "energy": energy,
        "portable": options["portable"],
        "format": options["format"] != PEFT,
    }
    for option, value in of_adapters.items():
        if options["checkpoint"] and value:
            raise UsageError(Given(option), "applies to adapters", "remove it, or $checkpoint")
    if not options["eval"] and (options["method"] == ALL or options["scales"]):
        raise UsageError(
            Given("method", ALL) if options["method"] == ALL else Given("scales"),
            "compares merges by their loss",
            "give $eval NAME=FILE, held-out text of each task",
        )
    if energy is not None:
        read_share(energy, "energy")


def _find_sides(pairing: Pairing, base: Path | Any) -> dict[str, Side]:
    """Return the location of every layer in BASE.

    Raises:
        InputError: BASE does not store one as plain numbers, or two layers have one location.
    """
    sides: dict[str, Side] = {}
    layers: dict[tuple[str, int], str] = {}
    for layer, side in ((delta.layer, delta.base) for delta in pairing.deltas):
        if side is None:
            problem = f"{layer}: BASE stores it as other than plain numbers"
            raise InputError(base, problem, "write an adapter, or $exclude it")
        if (earlier := layers.setdefault((side.name, side.offset), layer)) != layer:
            problem = f"{earlier} and {layer} change one weight of BASE"
            raise InputError(base, problem, "exclude one of them with $exclude")
        sides[layer] = side
    return sides


def _describe_inputs(compared: Sequence[Comparison]) -> list[RunInput]:
    """Return the updates for the run record, each with a note if it has the bytes of an earlier
    one.
    """
    first: dict[str, str] = {}
    described = []
    for item in (comparison.inputs[-1] for comparison in compared):
        earlier = first.setdefault(item.fingerprint, item.path)
        notes = (
            item.notes
            if earlier == item.path
            else (*item.notes, f"is a copy of {earlier}, and counts again")
        )
        described.append(item.model_copy(update={"notes": notes}))
    return described


def _write_recipe(results: Results[Merged], own: Mapping[str, Any], seed: int) -> str:
    """Return how a merge was made, as JSON for the metadata of its file."""
    base, *updates = (item for item in results.run.inputs if item.role != "eval")
    names = ("method", "weights", "scale", "density", "rank", "energy")
    return json.dumps(
        {
            "version": results.run.version,
            **{name: own[name] for name in names},
            "seed": seed,
            "base": base.fingerprint,
            "updates": [{"path": item.path, "fingerprint": item.fingerprint} for item in updates],
        },
        sort_keys=True,
    )


def _make_nothing_error(results: Results[Merged]) -> LoradiagError:
    """Return the error for a merge without anything to write."""
    if results.unmeasured and not results.layers:
        bad = results.unmeasured[0]
        return InputError(
            f"{bad.layer}: {bad.detail}; no other layer can be merged, so nothing was written"
        )
    density = results.run.settings["density"]
    if results.layers and density is not None and density < 1:
        return NothingComparedError(
            Given("density", density),
            "keeps no entry of any update, so that the merge is BASE itself and nothing was "
            "written",
            "keep more",
        )
    if results.layers:
        return NothingComparedError(
            "merge",
            "the updates cancel in every layer, so that the merge is BASE itself and "
            "nothing was written",
            "check $weights, and that an update is not the negative of another",
        )
    why = "every update is zero, or PEFT has no place for its factors"
    return NothingComparedError(
        "merge", f"{why}, so nothing was written", "$checkpoint merges all weights"
    )
