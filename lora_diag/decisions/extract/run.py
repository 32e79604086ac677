"""``extract``: write the best adapter of given ranks for an update, in PEFT's format or another."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Unpack

from lora_diag.adapters import open_adapter
from lora_diag.adapters.contents import Item, Part
from lora_diag.adapters.layouts import LAYOUTS, PEFT, Placed, check_layout
from lora_diag.adapters.portable import convert
from lora_diag.adapters.writing import check_converted, store_factors
from lora_diag.adapters.writing_targets import PeftTarget
from lora_diag.decisions.extract import ExtractOptions
from lora_diag.decisions.extract.measure import (
    ExtractionSettings,
    ExtractLayer,
    Rank,
    choose_rank_rules,
    choose_ranks_of,
    estimate_bytes,
    list_amounts,
    read_rank_option,
)
from lora_diag.decisions.extract.measure import extract as factor
from lora_diag.decisions.extract.record import Extraction
from lora_diag.decisions.extract.show import extraction_card
from lora_diag.decisions.extract.tensor_plan import TensorPlan, plan_tensors
from lora_diag.deltas import Delta, FactoredDelta, Pairing
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.diagnostics.spectrum.run import spectrum
from lora_diag.errors import Given, InputError, LoradiagError, NothingComparedError, UsageError
from lora_diag.layers.lineage import make_unrelated_error
from lora_diag.linalg.methods import check_request
from lora_diag.probes.gain.choice import Chosen, choose_directions
from lora_diag.probes.gain.show_losses import describe_chosen
from lora_diag.probes.sweep.verdict import swept_rate
from lora_diag.records import LeftOut, Results, Run
from lora_diag.running.amounts import read_count
from lora_diag.running.fingerprint import legible
from lora_diag.running.inputs import (
    NEEDS_ACTIVATIONS,
    SecondMoments,
    refuse_without_rounding,
    second_moments,
)
from lora_diag.running.layers import RECORDED, LayerRun
from lora_diag.running.options import (
    FolderOptions,
    LayerOptions,
    fill_options,
    select_options,
    show_options,
)
from lora_diag.running.output_folder import ADAPTER_FILES, FACTORS, OutputFolder, list_words
from lora_diag.storage import as_path
from lora_diag.storage.hub import loadable

RECORDS = "extraction.jsonl"


class ExtractionFolder(OutputFolder):
    """The folder of an extraction."""

    records_name: ClassVar[str] = RECORDS
    own_files: ClassVar[frozenset[str]] = ADAPTER_FILES | {RECORDS}
    description: ClassVar[str] = "an extraction"


@show_options
def extract(
    base: Path | str,
    tuned: Path | str,
    output: Path | str,
    **options: Unpack[ExtractOptions],
) -> Results[Extraction]:
    r"""Write the best low-rank adapter for ΔW = W_tuned − W_base, by default its truncated SVD in
    PEFT's format.

    By default, B·A = U_r Σ_r V_rᵀ in every layer, the nearest matrix of rank r to ΔW in the
    Frobenius and the spectral norm (Eckart and Young 1936). ε = ‖ΔW − B·A‖_F / ‖ΔW‖_F is computed
    from the stored factors in their dtype. Exactly one of ``rank``, ``energy``, ``params``,
    ``allocation``, ``directions`` and ``signal`` is given.

    Args:
        base: Base checkpoint.
        tuned: Fine-tuned checkpoint; or an adapter, which is compressed again without forming B·A.
        output: Adapter folder to write. It is written as ``NAME.part`` and renamed when complete.
        rank: r of every layer; less if a matrix is smaller, or the rank of its update is.
        energy: The smallest r of each layer with C(r) ≥ this fraction.
        params: Largest number of parameters of the adapter, such as ``"10M"``, allocated as by
            ``allocate``; with ``portable``, of the padded factors.
        allocation: Results file of ``allocate``, or an ``adapter_config.json`` or its folder.
        directions: Results of ``probe gain``: instead of the leading directions, those with the
            largest gain per parameter. With one of the next two, or ``params``.
        keep: The fewest directions that were measured to keep this fraction of the gain.
        drop: All but those that were measured to be best dropped.
        signal: r is the number of singular values above the files' rounding noise.
        recover: Factor the estimated update before rounding, E[X | cells], in layers where rounding
            hides it and its directions are significant, see ``recover``; the other layers as
            without this option.
        match_norm: Write (‖ΔW‖/‖ΔW_r‖)·ΔW_r instead of ΔW_r in every layer: the same directions, at
            the length of ΔW.
        activations: Second moments C = E[xxᵀ] of the layers' inputs, as ``probe_activations``
            records them. Factors are then those with the smallest E‖(ΔW − B·A)x‖² of their rank,
            U_rU_rᵀΔW with U_r of ΔW·C^½, and ``energy``, ``params`` and ``signal`` refer to that
            metric. Layers without C are factored as without this option.
        kfac: Minimize ‖G^½(ΔW − B·A)C^½‖ instead, with G = E[ggᵀ] of the output gradients in the
            same file: the K-FAC estimate of the loss that the factors miss. Requires
            ``activations``.
        split: ``both`` for B = U√Σ and A = √Σ·Vᵀ; ``b`` for B = UΣ and A = Vᵀ.
        adapter_dtype: Dtype of the factors: ``float32``, ``bfloat16`` or ``float16``.
        unfactored: ``save`` to store tensors without factors in full (norms, biases, resized
            tables), ``list`` to list them.
        portable: Write one rank for all layers, with smaller factors padded with zeros: an adapter
            that every program scales alike, see ``portability``. Stacked experts are skipped.
        format: ``peft``, ``kohya``, ``diffusers``, ``mlx`` or ``gguf``; all but the first imply
            ``portable``.
        base_name: The base model's name for config and model card; default ``base`` as given.
        sweep: Results of ``probe sweep``, source of the learning rate in the model card; None for a
            card without one.
        overwrite: Replace an existing adapter in ``output``.
        **options: ``ExtractOptions``.

    Returns:
        The records, also in ``extraction.jsonl`` of the folder. Layers with entries that are not
            finite are in
        ``left_out`` and not in the adapter.

    Raises:
        UsageError: An option is invalid, ``params`` is too small for any rank, ``sweep`` has no
            chosen rank, ``base`` is an adapter, or ``output`` is an input or exists and may not be
            replaced.
        InputError: An input cannot be read, entries are not finite and no other layer gets factors,
            or the adapter cannot be written.
        NothingComparedError: The sides have no weight in common, none is selected, or no layer gets
            factors.

    Example:
        >>> import tempfile
        >>> pair = ("sample_checkpoints/base", "sample_checkpoints/full_ft")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = extract(*pair, f"{folder}/adapter", rank=8, layers=r"layers\.0\..*q_proj")
        >>> found.layers[0].rank, found.layers[0].epsilon - found.layers[0].epsilon_min < 1e-6
        (8, True)

    Reference: Eckart and Young 1936, "The approximation of one matrix by another of lower rank",
    Psychometrika 1.
    """
    options = fill_options(ExtractOptions, options)
    activations, kfac, form = options["activations"], options["kfac"], options["format"]
    base, tuned = as_path(base), as_path(tuned)
    folder = ExtractionFolder(Path(output), (base, tuned), options["overwrite"], options["resume"])
    rank_name, rank_value = read_rank_option(options)
    rank_words = [f"--{rank_name}", *([] if rank_value is True else [str(rank_value)])]
    _check_options(options)
    chosen = _choose_directions(options)
    if chosen is not None:
        ((name, amount),) = list_amounts(options).items()
        rank_words += [f"--{name}", *([] if amount is True else [str(amount)])]
    rate = None if options["sweep"] is None else swept_rate(options["sweep"])
    common = select_options(FolderOptions, options)
    run = LayerRun("extract", {**common, "output": folder.records}, LayerOptions)
    check_request(options["svd"], 1, options["tol"])
    compared = run.compare(base, tuned)
    if options["recover"]:
        refuse_without_rounding(compared)
    planned = plan_tensors(compared, options["unfactored"] == "save", _is_portable(options))
    check_layout(form, [place_target(target) for target in planned.targets.values()], planned.base)
    moments = None
    if activations is not None:
        moments = second_moments(activations, planned.base, compared.pairing, kfac=kfac)
    tasks: list[ExtractLayer] = []
    if not folder.whole:
        if chosen is not None:
            rules = choose_ranks_of(chosen.directions, planned.targets)
        else:
            rules = _choose_rules(base, tuned, planned, folder, options)
        tasks = _make_tasks(compared.pairing, planned, rules, moments, kfac)
    files = {task.layer: folder.factors(index) for index, task in enumerate(tasks)}
    run.layout(tasks)  # raises an error on the memory limit before the folder is created
    folder.open()

    def finish(results: Results[Extraction]) -> None:
        _require_factors(results, folder, base, tuned)
        name = options["base_name"] or loadable(legible(base.parent if base.is_file() else base))
        if not folder.whole:
            matched = {"loradiag.match_norm": "B·A = (‖ΔW‖/‖ΔW_r‖)·ΔW_r"}
            metadata = matched if options["match_norm"] else None
            write_in_format(planned, folder, results, results.left_out, files, name, form, metadata)
        words = [*map(legible, ("loradiag", "extract", str(base), str(tuned))), *rank_words]
        words += [*_list_words(options, results.run), "-o", legible(output)]
        measured = "" if chosen is None else describe_chosen(chosen)
        folder.finish(extraction_card(results, name, shlex.join(words), rate, measured))

    *other_inputs, tuned_input = compared.inputs
    return run.over(
        tasks,
        partial(_extract_layer, files=files),
        estimate_bytes,
        run.settings(
            ExtractionSettings,
            dtype=options["adapter_dtype"],
            split=options["split"],
            recover=options["recover"],
            match_norm=options["match_norm"],
        ),
        planned.measure_left_out,
        (
            *other_inputs,
            tuned_input.model_copy(update={"notes": (*tuned_input.notes, *planned.list_notes())}),
            *((moments.described,) if moments is not None else ()),
        ),
        {"ranks": " ".join(rank_words), **_make_settings(options)},
        recorded=RECORDED if moments is None else (*RECORDED, "metric"),
        finish=finish,
    )


def _check_options(options: ExtractOptions) -> None:
    """Refuse options that exclude or need one another.

    Raises:
        UsageError: Two of them do.
    """
    activations, form = options["activations"], options["format"]
    if options["recover"] and activations is not None:
        raise UsageError(
            Given("recover"), "factors an update in the weights' metric", "remove $activations"
        )
    if options["match_norm"] and activations is not None:
        raise UsageError(
            Given("match_norm"), "matches the norm of the weights", "remove it or $activations"
        )
    if options["directions"] is not None and (options["recover"] or activations is not None):
        other = "recover" if options["recover"] else "activations"
        raise UsageError(Given("directions"), "are those of ΔW itself", f"remove ${other}")
    if options["kfac"] and activations is None:
        raise UsageError(Given("kfac"), *NEEDS_ACTIVATIONS)
    if _is_portable(options) and options["unfactored"] == "save":
        kind = "a portable adapter" if options["portable"] else f"an adapter in {form}"
        raise UsageError(
            Given("unfactored", "save"),
            f"{kind} cannot store weights in full",
            "remove one of the two",
        )


def _choose_directions(options: ExtractOptions) -> Chosen | None:
    """Return the directions to keep; None where the leading ones are."""
    path, params = options["directions"], options["params"]
    if path is None:
        return None
    budget = None if params is None else read_count(str(params), "params")
    return choose_directions(path, budget, options["keep"], options["drop"])


def _is_portable(options: ExtractOptions) -> bool:
    return options["portable"] or options["format"] != PEFT


def _make_settings(options: ExtractOptions) -> dict[str, Any]:
    """Return the options for the run record, without those of the ranks."""
    settings: dict[str, Any] = {
        "split": options["split"],
        "adapter_dtype": options["adapter_dtype"],
        "unfactored": options["unfactored"],
    }
    if _is_portable(options):
        settings["portable"] = True
    if options["format"] != PEFT:
        settings["format"] = options["format"]
    if options["recover"]:
        settings["recover"] = True
    if options["match_norm"]:
        settings["match_norm"] = True
    if options["activations"] is not None:
        settings["metric"] = "kfac" if options["kfac"] else "data"
    return settings


def _list_words(options: ExtractOptions, run: Run) -> list[str]:
    """Return the words of the command in the model card, without the paths and the ranks."""
    words = list_words(ExtractOptions, run)
    if options["activations"] is not None:
        words += ["--activations", legible(options["activations"])]
        words += ["--kfac"] if options["kfac"] else []
    if options["sweep"] is not None:
        words += ["--sweep", legible(options["sweep"])]
    return words


def _measure_spectra(
    base: Path, tuned: Path, folder: OutputFolder, options: ExtractOptions
) -> Results[Spectrum]:
    """Measure the spectra that ranks are chosen by, into the folder, or go on with them."""
    folder.open()
    shared: dict[str, Any] = {
        name: value
        for name, value in select_options(FolderOptions, options).items()
        if name not in {"svd", "tol", "on_record"}
    }
    shared |= {"output": folder.spectra, "resume": folder.spectra.exists()}
    return spectrum(
        base,
        tuned,
        activations=options["activations"],
        kfac=options["kfac"],
        recover=options["recover"],
        **shared,
    )


def _choose_rules(
    base: Path, tuned: Path, planned: TensorPlan, folder: OutputFolder, options: ExtractOptions
) -> dict[str, Rank]:
    """Return the rule for the rank of every layer; of a budget, by spectra kept in the folder."""
    name, value = read_rank_option(options)
    measure_spectra = partial(_measure_spectra, base, tuned, folder, options)
    try:
        return choose_rank_rules(name, value, planned.targets, measure_spectra, planned.portable)
    except UsageError as error:
        if not folder.spectra.exists():
            raise
        kept = f"the spectra are kept in {folder.work}: use $resume with another budget"
        raise UsageError(*error.args, kept) from error


def _make_tasks(
    pairing: Pairing,
    planned: TensorPlan,
    rules: Mapping[str, Rank],
    moments: SecondMoments | None,
    kfac: bool,
) -> list[ExtractLayer]:
    """Return the layers to factor, each with its rule and its metric."""
    tasks = []
    for delta in pairing.deltas:
        target = planned.targets.get(delta.layer)
        if target is None:
            continue
        tasks.append(
            ExtractLayer(
                _drop_base(delta),
                target.module,
                target.kind,
                target.transposed,
                rules[delta.layer],
                moments.weighting(delta.layer, kfac) if moments is not None else None,
            )
        )
    return tasks


def _require_factors(
    results: Results[Extraction], folder: OutputFolder, base: Path, tuned: Path
) -> None:
    """Discard the folder of an extraction without factors, or of unrelated checkpoints.

    Raises:
        LoradiagError: It is one.
    """
    unrelated = [item.layer for item in results.left_out if item.reason == "unrelated"]
    if len(unrelated) > sum(record.lineage == "descends" for record in results):
        folder.discard()
        raise make_unrelated_error(base, tuned, unrelated)
    if not results.layers:
        folder.discard()
        raise _make_no_factors_error(tuned, results)


def place_target(target: PeftTarget) -> Placed:
    """Return a layer of BASE in the form used by the layouts of adapters."""
    part: Part = target.kind if target.kind in {"embedding", "convolution"} else "factors"
    shape = target.shape if target.kind == "embedding" else target.peft_shape
    return Placed(
        Item(target.layer, target.module, part, shape=shape, kernel=target.kernel), 1, shape
    )


def write_in_format(
    planned: TensorPlan,
    folder: OutputFolder,
    results: Iterable[Any],
    left_out: Iterable[LeftOut],
    files: Mapping[str, Path],
    base_name: str,
    form: str,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the adapter in PEFT's layout, and convert it if ``form`` is another, which has no
    metadata.

    Args:
        planned: The treatment of all tensors.
        folder: The open folder.
        results: As of ``TensorPlan.write``, like the next ones.
        left_out: The tensors to store in full, and others.
        files: File with the factors of each layer.
        base_name: Name of the base model for the config.
        form: One of ``LAYOUTS``.
        metadata: Metadata of the weights file.
    """
    if form == PEFT:
        planned.write(folder.work, results, left_out, files, base_name, metadata)
        return
    scratch = folder.work / FACTORS / PEFT
    scratch.mkdir(exist_ok=True)
    planned.write(scratch, results, left_out, files, base_name)
    convert(open_adapter(scratch), folder.work, scratch, planned.base, form, for_tied_head=True)
    check_converted(folder.work / LAYOUTS[form].file, scratch, planned.base)


def _drop_base(delta: Delta) -> Delta:
    """Return an update given by factors without its base weight, which takes minutes to read;
    others unchanged.
    """
    return replace(delta, base=None) if isinstance(delta, FactoredDelta) else delta


def _extract_layer(
    task: ExtractLayer, files: Mapping[str, Path], settings: ExtractionSettings
) -> tuple[Extraction | LeftOut]:
    return (factor(task, settings, partial(store_factors, files[task.layer])),)


def _make_no_factors_error(tuned: Path | str, results: Results[Extraction]) -> LoradiagError:
    """Return the error for an extraction without factors."""
    if results.non_finite:
        bad = results.non_finite[0]
        return InputError(
            f"{tuned}: {bad.layer}: {bad.detail}; no other layer has factors, so nothing was "
            "written"
        )
    reasons = sorted(
        {item.detail for item in results.left_out if item.reason in {"rank_0", "no_factors"}}
    )
    why = f" ({'; '.join(reasons[:3])})" if reasons else ""
    return NothingComparedError(f"{tuned}: no layer has factors{why}, so nothing was written")
