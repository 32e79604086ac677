"""``allocate``: distribute ranks over layers, with a bound on the distance from the optimum.

``--layer-weights`` takes factors of energies, or results of ``probe fisher`` or ``probe gain``,
whose tails replace energies. Without a budget, the command gives the ranks of each layer by rules
that use one spectrum; rules that need every singular value are undefined for a truncated one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from lora_diag.adapters import open_adapter
from lora_diag.catalog import read_results, read_results_of
from lora_diag.decisions.allocate import AllocateOptions
from lora_diag.decisions.allocate.measure import Budget, Constraints, allocate_one_rank
from lora_diag.decisions.allocate.measure import allocate as allocate_spectra
from lora_diag.decisions.allocate.peft_config import (
    PeftScaling,
    compare_with_peft,
    make_peft_config,
)
from lora_diag.decisions.allocate.record import UNFINISHED, Allocation, Policies
from lora_diag.decisions.targets import TrainingMemory, read_memory
from lora_diag.decisions.trainers import PYTHON, YAML, format_settings
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.diagnostics.spectrum.run import spectrum
from lora_diag.errors import Given, InputError, UsageError
from lora_diag.files import CONFIG, RESULTS, Kind, check_output, check_outputs, write_whole
from lora_diag.metrics.energy import energy_curve, gavish_donoho, knee
from lora_diag.probes.fisher.record import Fisher
from lora_diag.probes.gain.record import LayerGain
from lora_diag.probes.sweep.verdict import swept_rate
from lora_diag.records import Results, Run, RunInput, is_results_file, totals
from lora_diag.records.file import write_results
from lora_diag.records.names import part_of
from lora_diag.records.run import timestamp
from lora_diag.rendering.statements import is_unrelated
from lora_diag.rendering.text import list_names
from lora_diag.running.amounts import read_count, read_share
from lora_diag.running.fingerprint import legible
from lora_diag.running.options import fill_options, list_typed_options, show_options
from lora_diag.storage import locate_files
from lora_diag.storage.documents import MAX_CONFIG_BYTES, read_object
from lora_diag.version import __version__

# ‖ΔW‖_F of two measurements of one update differ by at most this fraction.
_SAME = 1e-3


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Weights of layers, from a results file or from the user; all None without weights.

    Args:
        described: Input for the run record; None for weights from the user.
        factors: Factors of the layers' energies.
        losses: F(0), F(1), … by layer, which replace the energies.
        criterion: ``fisher`` or ``gain``, what the losses are; empty without them.
    """

    described: RunInput | None = None
    factors: dict[str, float] | None = None
    losses: dict[str, tuple[float, ...]] | None = None
    criterion: str = ""


def _require_finished(results: Results[Any], subject: Given | Path | str) -> None:
    """Refuse results of an interrupted run, called ``subject`` in the message.

    Raises:
        InputError: The run did not finish.
    """
    if results.end is None:
        raise InputError(
            subject,
            "the run did not finish, and missing layers would get no rank",
            f"finish it with loradiag {results.run.command} ... --resume, or accept it with "
            "$allow_unfinished",
        )


def _read_tails(path: Path, spectra: Results[Spectrum], allow_unfinished: bool) -> LayerWeights:
    """Return the tails F_ℓ(0), F_ℓ(1), … in results of ``probe fisher`` or ``probe gain``, with the
    input for the run record.

    Args:
        path: The results.
        spectra: Spectra of the update to allocate ranks for.
        allow_unfinished: Accept the results of an interrupted run.

    Raises:
        UsageError: No layer of the spectra was measured.
        InputError: The file cannot be read, is of another command or of another update, or is
            unfinished.
    """
    results = read_results(path)
    criterion = results.run.command.removeprefix("probe ")
    if criterion not in {"fisher", "gain"}:
        raise InputError(
            Given("layer_weights", path),
            f"holds results of loradiag {results.run.command}",
            "give those of probe fisher or gain, or a JSON object of layer and factor",
        )
    if not allow_unfinished:
        _require_finished(results, Given("layer_weights", path))
    records: dict[str, Fisher | LayerGain] = {r.layer: r for r in results.whole_of(Fisher)}
    for layer in results.whole_of(LayerGain):
        if layer.sigma and not layer.shifted:
            records[layer.layer] = layer
    in_both = [own for own in spectra if own.layer in records]
    if not in_both:
        raise UsageError(
            Given("layer_weights", path),
            "has no measurement of a layer of these spectra",
            "measure both on one BASE and TUNED",
        )
    for own in in_both:
        fro = own.fro if own.weights_fro is None else own.weights_fro
        if abs(records[own.layer].fro - fro) > _SAME * fro:
            raise InputError(
                Given("layer_weights", path),
                f"‖ΔW‖ of {own.layer} is {records[own.layer].fro:.4g}, but "
                f"{fro:.4g} in the spectra",
                "measure both on the same update",
            )
    missing = [
        r.layer for r in spectra if r.layer not in records and part_of(r.layer) == "matrices"
    ]
    notes = (
        [f"{len(missing)} layers were not measured and get no rank: {list_names(missing)}"]
        if missing
        else []
    )
    first = records[in_both[0].layer]
    kind = f"results of probe {criterion} on {legible(first.set)}"
    if isinstance(first, Fisher):
        kind += f", {first.sequences} gradients, labels of the {first.labels}"
    described = RunInput(
        role="weights", path=legible(path), kind=kind, tensors=len(in_both), notes=tuple(notes)
    )
    tails = {}
    for own in in_both:
        record = records[own.layer]
        tails[own.layer] = record.fisher if isinstance(record, Fisher) else record.tails
    return LayerWeights(described, losses=tails, criterion=criterion)


def apply_rank_rules(record: Spectrum) -> Policies:
    """Return the rank of one layer by every rule.

    Args:
        record: The layer's spectrum. Knee and Gavish–Donoho are null unless it holds all min(out,
            in) values and the layer changed: an adapter has the rank of its factors and no noise.
    """
    s = np.asarray(record.s)
    applicable = record.complete and len(s) == min(record.shape) and record.fro > 0
    ranks = {
        "energy 90%": record.rank_at["0.9"],
        "knee": knee(energy_curve(s, record.fro, True)) if applicable else None,
        "effective": int(np.ceil(record.effective_rank))
        if record.effective_rank is not None
        else None,
        "Gavish–Donoho": gavish_donoho(s, record.shape) if applicable else None,
        "signal": record.resolution.signal_rank,
    }
    return Policies(
        layer=record.layer,
        shape=record.shape,
        ranks=ranks,
        complete=record.complete,
        verdict=record.resolution.verdict,
    )


@show_options
def allocate(
    results: Results[Spectrum] | Path | str, **options: Unpack[AllocateOptions]
) -> Results[Allocation]:
    """Choose the rank of each layer so that the adapter keeps as much of Σσ² as a budget allows.

    Exactly one budget is given. Heads of a task (``classifier``, ``score``, ``qa_outputs``,
    ``pooler``, …) that TUNED changed or added are trained in full; budgets of parameters and bytes
    pay for them first.

    Args:
        results: Results of ``spectrum``, or its file; if measured with ``recover``, recovered
            layers use their recovered directions. Or a file of ``probe gain``, which then also is
            ``layer_weights``, and of whose update the spectra are measured.
        params: Budget: trainable parameters Σ r(d_in + d_out), such as ``10_000_000`` or ``"10M"``.
        total_rank: Budget: Σ r over the layers.
        memory_budget: Budget: bytes of the adapter, its gradients and its optimizer's state, such
            as ``"2GB"``.
        energy: Instead of a budget: the smallest rank of each layer with C(r) ≥ this fraction.
        match: Budget: the number of parameters of this adapter.
        min_rank: Smallest rank of a layer with any signal.
        max_rank: Largest rank of a layer; None for no limit.
        allowed_ranks: Allowed ranks besides 0, such as ``[8, 16, 32, 64]``; None for any.
        layers: Only layers whose name contains a match; None for the matrices that adapters usually
            target: weights of layers other than embeddings, head, routers and short convolutions.
        exclude: No layers whose name contains a match.
        layer_weights: Factor of each layer's energy, by name (``default`` for the others), or a
            JSON file of such; or results of ``probe fisher`` or ``probe gain``: then Σ F_ℓ(r_ℓ) is
            minimized instead of energy maximized.
        portable: Give every layer rank 0 or one common rank (of ``allowed_ranks``, else powers of
            two and half-way between them): a config without patterns, which every program that
            serves the adapter scales alike.
        relative: Count every layer's energy as 1: maximize Σ C(r) instead of Σ‖ΔW‖²C(r).
        optimizer: ``adamw``, ``adamw8bit``, ``sgd`` or ``sgd_momentum``; for ``memory_budget``.
        adapter_dtype: Dtype of the adapter and its gradients; for ``memory_budget``.
        allow_unfinished: Accept the results of an interrupted run.
        **options: ``AllocateOptions``.

    Returns:
        One ``Allocation`` per candidate layer, and the ``Certificate`` in ``whole``.

    Raises:
        UsageError: No budget or several; the budget is too small for the heads, the constraints or
            any rank; no layer can get a rank; an option is invalid or contradicts another; or the
            weights do not fit the layers.
        InputError: The results, the weights or the adapter to match cannot be read, or results are
            unfinished, hold no layer or are of another command or update.

    Example:
        >>> import lora_diag
        >>> base, tuned = "sample_checkpoints/base", "sample_checkpoints/full_ft"
        >>> spectra = lora_diag.spectrum(base, tuned, layers="q_proj")
        >>> plan = allocate(spectra, params="8k")
        >>> [record.rank for record in plan], plan.whole[0].spent
        ([6, 9, 9, 7], 7936.0)
    """
    options = fill_options(AllocateOptions, options)
    weights, portable = options["layer_weights"], options["portable"]
    energy, allow_unfinished = options["energy"], options["allow_unfinished"]
    if portable and energy is not None:
        raise UsageError(
            Given("portable"),
            "divides a budget over layers of one rank, and $energy gives each its own",
        )
    budget = _make_budget(options)
    ranks_from = options["allowed_ranks"]
    allowed_ranks = None if ranks_from is None else tuple(sorted(set(ranks_from)))
    constraints = Constraints(options["min_rank"], options["max_rank"], allowed_ranks)
    if not isinstance(results, Results) and weights is None and is_gain(results):
        weights = options["layer_weights"] = results
    spectra, described = _read_spectra(results, allow_unfinished)
    layer_weights = _read_layer_weights(options, spectra)
    choose = partial(
        allocate_spectra,
        spectra.layers,
        budget,
        weights=layer_weights.factors,
        relative=options["relative"],
        target=options["layers"],
        exclude=options["exclude"],
        losses=layer_weights.losses,
        left_out=spectra.left_out,
    )
    chosen = allocate_one_rank(choose, constraints) if portable else choose(constraints)
    if portable:
        _refuse_stacks(chosen.layers)
    has_memory, metric = options["memory_budget"] is not None, spectra.layers[0].metric
    run = Run(
        command="allocate",
        version=__version__,
        inputs=(
            described,
            *spectra.run.inputs,
            *((layer_weights.described,) if layer_weights.described else ()),
        ),
        settings={
            "budget": str(budget.option),
            "energy": energy,
            "min_rank": constraints.min_rank,
            "max_rank": constraints.max_rank,
            "allowed_ranks": list(allowed_ranks) if allowed_ranks else None,
            "target": options["layers"],
            "exclude": options["exclude"],
            "layer_weights": legible(weights) if isinstance(weights, str | Path) else weights,
            "relative": options["relative"],
            **({"portable": True} if portable else {}),
            **({"metric": metric} if metric != "weights" else {}),
            **({"criterion": layer_weights.criterion} if layer_weights.criterion else {}),
            "optimizer": options["optimizer"] if has_memory else None,
            "adapter_dtype": options["adapter_dtype"] if has_memory else None,
        },
        made=timestamp(),
    )
    end = totals(chosen.layers, chosen.left_out)
    return Results(run, chosen.layers, chosen.left_out, end, (chosen.certificate,))


def _read_layer_weights(options: AllocateOptions, spectra: Results[Spectrum]) -> LayerWeights:
    """Read the weights of the layers, or the losses that replace their energies.

    Raises:
        UsageError: Losses are given, and energies are to be relative.
    """
    weights = options["layer_weights"]
    if not isinstance(weights, str | Path) or not is_results_file(weights):
        return LayerWeights(factors=_read_weights(weights, spectra))
    tails = _read_tails(Path(weights), spectra, options["allow_unfinished"])
    if options["relative"]:
        raise UsageError(
            Given("relative"),
            f"not available with $layer_weights of probe {tails.criterion}, which uses no energy",
            "remove one of them",
        )
    return tails


def _refuse_stacks(layers: Iterable[Allocation]) -> None:
    """Refuse stacks of experts that get a rank.

    Raises:
        UsageError: One does.
    """
    for layer in layers:
        if layer.group and layer.rank:
            raise UsageError(
                Given("portable"),
                f"{layer.group} is a stack of experts, which has no place in a portable adapter",
                "leave it out with $exclude",
            )


def allocate_and_write(
    results: Path | str,
    output: Path | None = None,
    format: str = "peft",
    overwrite: bool = False,
    scaling: float = 2.0,
    rslora: bool = False,
    check: Path | None = None,
    sweep: Path | None = None,
    **options: Unpack[AllocateOptions],
) -> Results[Allocation] | list[Policies]:
    """Allocate ranks, and write them by ``write_allocation`` if there is an ``output``, which is
    checked first.

    With no option of ``AllocateOptions`` but ``allow_unfinished``, and neither ``output`` nor
    ``sweep``, the ranks are those of ``apply_rank_rules``.

    Args:
        results: Results of ``spectrum``, as a file.
        output: Path of ``write_allocation``; None to write nothing.
        format: As for ``write_allocation``.
        overwrite: As for ``write_allocation``.
        scaling: As for ``write_allocation``.
        rslora: As for ``write_allocation``.
        check: As for ``write_allocation``.
        sweep: Results of ``probe sweep``, from which the summary takes a learning rate; None
            without one.
        **options: ``AllocateOptions``.

    Returns:
        The allocation, as ``allocate`` returns it; or the ranks by several rules.

    Raises:
        UsageError: As ``allocate`` and ``write_allocation``; ``format`` or ``check`` is given
            without ``output``; ``output`` is an input; or ``sweep`` holds results of another
            command or without a chosen rank.
    """
    if output is None and format != "peft":
        raise UsageError(Given("format", format), "give a file with $output")
    if output is None and check is not None:
        raise UsageError(
            Given("check"), "needs a PEFT config", "write one with $output adapter_config.json"
        )
    if output is not None:
        weights = options.get("layer_weights")
        inputs = (results, None if isinstance(weights, Mapping) else weights)
        check_outputs(inputs, [(output, _find_kind(output, check, format))], overwrite)
    if (
        output is None
        and sweep is None
        and set(list_typed_options(AllocateOptions, options)) <= {"allow_unfinished"}
    ):
        spectra, _ = _read_spectra(results, options.get("allow_unfinished", False))
        return [apply_rank_rules(record) for record in spectra]
    if sweep is not None:
        swept_rate(sweep)  # refuses unsuitable results
    allocation = allocate(results, **options)
    if output is not None:
        write_allocation(allocation, output, scaling, rslora, check, overwrite, format)
    return allocation


def write_allocation(
    results: Results[Allocation],
    path: Path | str,
    scaling: float = 2.0,
    rslora: bool = False,
    check: Path | str | None = None,
    overwrite: bool = False,
    format: str = "peft",
) -> None:
    """Write an allocation as a configuration or as records (``.jsonl``).

    Args:
        results: The allocation.
        path: The file to write; its suffix determines which.
        scaling: lora_alpha / r of every layer in the config; with ``rslora`` every layer has
            lora_alpha = scaling · √r, r the most common rank.
        rslora: Whether the config makes PEFT scale by lora_alpha / √r.
        check: A model, or its ``config.json``: it is built without weights, PEFT adapts it by the
            config, and every rank and scaling is compared before anything is written. Requires the
            extra ``train``. None for no check.
        overwrite: Replace a file there that loradiag did not write; never a config next to weights.
        format: ``peft`` for ``adapter_config.json``, or a trainer of
            ``lora_diag.decisions.trainers``.

    Raises:
        UsageError: The suffix is unknown or not that of the format, the file may not be replaced,
            ``scaling`` is invalid, there is no config to check or the extra ``train`` is missing,
            portable ranks are to be scaled by rsLoRA, or the trainer cannot express these ranks.
        InputError: The file cannot be written, PEFT cannot express these ranks, or the check finds
            a difference or cannot build the model.
    """
    path = Path(path)
    kind = _find_kind(path, check, format)
    check_output(path, kind, overwrite)
    if path.suffix == ".jsonl":
        write_results(results, path, overwrite)
        return
    if rslora and results.run.settings.get("portable"):
        raise UsageError(
            Given("rslora"),
            "SGLang and llama.cpp do not read it, so the adapter would not be portable",
        )
    config = make_peft_config(results, PeftScaling(scaling, rslora))
    if check is not None:
        from lora_diag.models.peft_check import (
            adapted_by_peft,
        )  # deferred: importing transformers takes seconds

        compare_with_peft(
            results,
            adapted_by_peft(config, locate_files(check).files),
            PeftScaling(scaling, rslora),
        )
    text = (
        json.dumps(config, indent=2) + "\n" if format == "peft" else format_settings(format, config)
    )
    write_whole(path, text, kind, overwrite)


def _find_kind(path: Path, check: Path | str | None, format: str) -> Kind:
    """Return the kind of file of an allocation by its format and suffix; ``check`` is the model to
    check it with.

    Raises:
        UsageError: The suffix is unknown or not that of the format, or PEFT cannot check records.
    """
    if format != "peft":
        kind, suffixes = (PYTHON, (".py",)) if format == "unsloth" else (YAML, (".yaml", ".yml"))
        if path.suffix not in suffixes:
            raise UsageError(
                Given("output", path), f"$format {format} writes a file named *{suffixes[0]}"
            )
        return kind
    if path.suffix not in {".json", ".jsonl"}:
        raise UsageError(
            Given("output", path),
            "unknown suffix",
            "use .json for a PEFT adapter_config, or .jsonl for records",
        )
    if path.suffix == ".jsonl" and check is not None:
        raise UsageError(
            Given("check"),
            f"needs a PEFT config, but {path} gets records",
            "name it adapter_config.json",
        )
    return CONFIG if path.suffix == ".json" else RESULTS


def _make_budget(options: AllocateOptions) -> Budget:
    """Return the one given budget of ``AllocateOptions``.

    Raises:
        UsageError: Not exactly one budget is given, or its amount is invalid; optimizer or dtype is
            unknown.
    """
    training = TrainingMemory(options["optimizer"], options["adapter_dtype"])
    budgets = {
        "params": options["params"],
        "total_rank": options["total_rank"],
        "memory_budget": options["memory_budget"],
        "energy": options["energy"],
        "match": options["match"],
    }
    given = [name for name, amount in budgets.items() if amount is not None]
    if len(given) != 1:
        words = ", ".join(f"${name}" for name in given)
        problem = f"{len(given)} budgets ({words})" if given else "no budget"
        names = ", ".join(f"${name}" for name in budgets)
        raise UsageError("allocate", problem, f"give exactly one of {names}")
    amount = budgets[given[0]]
    option = Given(given[0], amount if isinstance(amount, int) else legible(str(amount)))
    if options["total_rank"] is not None:
        if options["total_rank"] < 1:
            raise UsageError(option, "must be 1 or more")
        return Budget("total_rank", options["total_rank"], option)
    if options["memory_budget"] is not None:
        size = read_memory(options["memory_budget"])
        return Budget("bytes", size, option, training.bytes_per_param)
    if options["energy"] is not None:
        return Budget("energy", read_share(options["energy"], "energy"), option)
    if options["match"] is not None:
        return Budget("params", _count_params(options["match"]), option)
    return Budget("params", read_count(str(options["params"]), "params"), option)


def _count_params(path: Path | str) -> int:
    """Return the number of parameters of an adapter's factors.

    Raises:
        InputError: The path is not an adapter, or a layer of it has no factors of known size.
    """
    total = 0
    for weight in open_adapter(path, "rank").weights():  # its scale is no parameter
        sizes = [size for size in weight.shape if size is not None]
        if weight.form != "factored" or weight.rank is None or len(sizes) != 2:
            raise InputError(
                path,
                f"{weight.layer} has no factors of known size",
                "give $match an adapter with factors",
            )
        total += weight.rank * sum(sizes)
    return total


def is_gain(path: Path | str) -> bool:
    """Return whether a file holds results of ``probe gain``."""
    return is_results_file(path) and read_results(path).run.command == "probe gain"


def _measure_spectra(path: Path | str) -> Results[Spectrum]:
    """Return the spectra of the update in results of ``probe gain``."""
    sides = {side.role: side.path for side in read_results(path).run.inputs}
    return spectrum(sides["base"], sides["adapter" if "adapter" in sides else "tuned"])


def _read_spectra(
    results: Results[Spectrum] | Path | str, allow_unfinished: bool
) -> tuple[Results[Spectrum], RunInput]:
    """Return spectra, those of recovered layers before rounding, and the input for the run record.

    Raises:
        InputError: The results cannot be read, are unfinished, or hold no layer.
    """
    if isinstance(results, Results):
        spectra = results
    elif is_gain(results):
        spectra = _measure_spectra(results)
    else:
        spectra = read_results_of(Spectrum, results)
    path = "" if isinstance(results, Results) else legible(results)
    if not allow_unfinished:
        _require_finished(spectra, path or "these results")
    if not spectra.layers:
        raise InputError(f"{path or 'these results'}: hold no layer; measure again")
    if is_unrelated(spectra.layers):
        raise InputError(
            f"{path or 'these results'}: TUNED is unrelated to BASE, so that there is no update to "
            "divide a budget over; measure with the BASE that TUNED was trained from"
        )
    notes = [] if spectra.end is not None else [UNFINISHED]
    layers = tuple(record.before_rounding() for record in spectra.layers)
    changed = sum(
        recovered is not record for recovered, record in zip(layers, spectra.layers, strict=True)
    )
    if changed:
        notes.append(
            f"{changed} of {len(layers)} layers by the update before rounding, as estimated: "
            "extract with --recover"
        )
    spectra = replace(spectra, layers=layers)
    return spectra, RunInput(
        role="results",
        path=path,
        kind="results of spectrum",
        tensors=len(spectra),
        notes=tuple(notes),
    )


def _read_weights(
    weights: Mapping[str, float] | Path | str | None, spectra: Results[Spectrum]
) -> dict[str, float] | None:
    """Return the factor of every layer, None without weights; names may omit ``.weight``.

    Raises:
        UsageError: A name matches no layer, a layer has no weight, or a weight is not a number from
            0 up.
    """
    if weights is None:
        return None
    if isinstance(weights, Mapping):
        option, table = Given("layer_weights"), weights
    else:
        option = Given("layer_weights", weights)
        table = read_object(Path(weights), "file of weights", MAX_CONFIG_BYTES)
    for name, value in table.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 <= value < float("inf")
        ):
            raise UsageError(
                option, f"the weight of {name} must be a number from 0 up, not {value!r}"
            )
    layers = {name: r.layer for r in spectra for name in (r.layer.removesuffix(".weight"), r.layer)}
    if unknown := [name for name in table if name not in layers and name != "default"]:
        raise UsageError(
            option,
            f"{unknown[0]} is not a layer of these results",
            "use names as in the results file",
        )
    by_layer = {layers[name]: float(value) for name, value in table.items() if name != "default"}
    if "default" in table:
        return dict.fromkeys(layers.values(), float(table["default"])) | by_layer
    if missing := set(layers.values()) - set(by_layer):
        raise UsageError(
            option,
            f"{len(missing)} layers have no weight, such as {min(missing)}",
            'add them, or a weight for all others under "default"',
        )
    return by_layer
