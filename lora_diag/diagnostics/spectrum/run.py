"""``spectrum``: measure the singular values of ΔW, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from lora_diag.deltas import Pairing, Unpaired, footprint
from lora_diag.diagnostics.spectrum import SpectrumOptions
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.diagnostics.spectrum.values import (
    SpectrumSettings,
    WeightedLayer,
    is_quick,
    is_thin,
    thin_spectrum,
)
from lora_diag.errors import Given, UsageError
from lora_diag.records import LeftOut, Results
from lora_diag.running.inputs import (
    NEEDS_ACTIVATIONS,
    SecondMoments,
    refuse_without_rounding,
    second_moments,
)
from lora_diag.running.layers import LayerRun, check_ranks
from lora_diag.running.options import show_options
from lora_diag.storage.remote import RemotePath


@show_options
def spectrum(
    base: Path | str | None = None,
    tuned: Path | str | None = None,
    **options: Unpack[SpectrumOptions],
) -> Results[Spectrum]:
    r"""Measure the spectrum of ΔW = W_tuned − W_base for every matrix that both checkpoints have.

    Layers are measured concurrently, as far as cores and memory permit; by default one by one if
    they are small factors of a local adapter.

    Args:
        base: Base checkpoint: a file, a folder, or a shard index; or an adapter to be measured
            alone. None only with ``gradients``.
        tuned: Fine-tuned checkpoint, or an adapter; None if ``base`` is an adapter, and with
            ``gradients``.
        gradients: Snapshots as in ``overlap``. The spectrum is then that of the stacked gradients
            of all steps, a first-order estimate before any update exists. ``base`` only gives the
            names.
        activations: Second moments C = E[xxᵀ] of the layers' inputs, as ``probe_activations``
            records them. Singular values are then those of ΔW·C^½, energies E‖ΔW x‖², and layers
            without C are skipped. None for the norm of the weights.
        kfac: Also weigh the output side: G^½·ΔW·C^½ with G = E[ggᵀ] of the output gradients in the
            same file.
        recover: Estimate size, energy curve and ranks of the update before rounding, as ``recover``
            does, in layers whose files do not resolve it; in the field ``hidden``.
        ranks: Ranks r of C(r) and the truncation errors.
        top: Number of largest singular values to keep; None for all.
        **options: ``SpectrumOptions``.

    Returns:
        All records of the run. Tensors that are not measured are in ``left_out``, with the reason.

    Raises:
        UsageError: An option is invalid, inputs and options cannot be combined, or ``output`` may
            be neither replaced nor resumed.
        InputError: An input cannot be read or does not fit another, or the results file cannot be
            written.
        NothingComparedError: The sides have no weight in common, or none is selected; or no matrix
            is, with ``activations`` or ``gradients``.

    Example:
        >>> base, tuned = "sample_checkpoints/base", "sample_checkpoints/full_ft"
        >>> results = spectrum(base, tuned, layers=r"layers\.0\..*q_proj")
        >>> [(record.layer, record.shape) for record in results]
        [('model.layers.0.self_attn.q_proj.weight', (128, 128))]
    """
    run = LayerRun("spectrum", options, SpectrumOptions)
    options = run.options
    top, recover, kfac = options["top"], options["recover"], options["kfac"]
    settings = run.settings(
        SpectrumSettings, ranks=check_ranks(options["ranks"]), top=top, recover=recover
    )
    defaults = SpectrumSettings()
    if (settings.method, top, settings.tol) != (defaults.method, defaults.top, defaults.tol):
        from lora_diag.linalg.methods import check_request  # deferred: imports torch

        check_request(settings.method, top, settings.tol)
    _check_inputs(base, tuned, options)
    if options["gradients"]:
        from lora_diag.diagnostics.spectrum.gradients import gradient_spectrum

        return gradient_spectrum(run, base, settings)
    assert base is not None
    compared = run.compare(base, tuned)
    pairing, moments = compared.pairing, None
    if recover:
        refuse_without_rounding(compared)
    if options["activations"] is not None and compared.base is not None:
        moments = second_moments(
            options["activations"], compared.base, pairing, options["verify"], kfac
        )
    pairing, matrices = _split_by_moments(pairing, moments, kfac)
    if (
        all(is_thin(layer, settings) for layer in matrices)
        and len(matrices) == len(pairing.deltas)
        and all(item.rows is None for item in pairing.unpaired)
    ):
        is_local = not isinstance(compared.update.path, RemotePath)
        run.use_numpy(workers=1 if is_local and is_quick(matrices) else None)
    return run.over(
        matrices,
        _measure_layer,
        _estimate_bytes,
        settings,
        pairing,
        (*compared.inputs, *((moments.described,) if moments else ())),
        {
            "ranks": list(settings.ranks),
            **({"metric": "kfac" if kfac else "data"} if moments else {}),
            **({"recover": True} if recover else {}),
            "top": top,
        },
        recorded=("layers", "exclude", "svd", "top", "tol", "device", "seed"),
    )


def _check_inputs(
    base: Path | str | None, tuned: Path | str | None, options: SpectrumOptions
) -> None:
    """Refuse inputs and options that lack what they need, or are given with what they exclude.

    Raises:
        UsageError: One does.
    """
    if options["kfac"] and not options["activations"]:
        raise UsageError(Given("kfac"), *NEEDS_ACTIVATIONS)
    if options["recover"] and options["activations"]:
        raise UsageError(
            Given("recover"), "estimates an update in the weights' metric", "remove $activations"
        )
    if options["gradients"]:
        _check_gradients(tuned, options)
    elif not base:
        raise UsageError("spectrum: nothing to measure; give BASE and TUNED, or an adapter alone")
    elif options["activations"] and not tuned:
        raise UsageError(
            Given("activations"), "needs BASE to identify the layers", "give it before the adapter"
        )


def _check_gradients(tuned: Path | str | None, options: SpectrumOptions) -> None:
    """Refuse an input or an option of updates where gradients are measured.

    Raises:
        UsageError: One is given.
    """
    for option, value in (
        ("recover", options["recover"]),
        ("activations", options["activations"]),
        ("alpha", options["alpha"]),
        ("alpha_is_rank", options["alpha_is_rank"]),
        ("allow_unmatched", options["allow_unmatched"]),
    ):
        if value:
            raise UsageError(Given(option), "applies to an update, not to $gradients", "remove one")
    if tuned:
        raise UsageError(
            Given("gradients"),
            "cannot be combined with TUNED",
            "give BASE alone, and of files their folder",
        )


def _split_by_moments(
    pairing: Pairing, moments: SecondMoments | None, kfac: bool
) -> tuple[Pairing, list[WeightedLayer]]:
    """Return the pairing with matrices without second moments unpaired, and the others with their
    weighting.

    Without ``moments``, the pairing is unchanged, and all matrices are returned without weighting.
    """
    matrices = [delta for delta in pairing.deltas if delta.is_matrix]
    if moments is None:
        return pairing, [WeightedLayer(delta) for delta in matrices]
    layers = [WeightedLayer(delta, moments.weighting(delta.layer, kfac)) for delta in matrices]
    needed = "second moment of its input" + (" and of its output's gradient" if kfac else "")
    missing = {
        layer.layer: Unpaired(
            layer.layer, layer.shape, "no_activations", f"the file has no {needed}"
        )
        for layer in layers
        if layer.weighting is None
    }
    deltas = tuple(delta for delta in pairing.deltas if delta.layer not in missing)
    remaining = Pairing(deltas, (*pairing.unpaired, *missing.values()))
    return remaining, [layer for layer in layers if layer.weighting is not None]


def _measure_layer(layer: WeightedLayer, settings: SpectrumSettings) -> tuple[Spectrum | LeftOut]:
    """Return the record of a layer; torch is imported only if NumPy alone cannot measure it."""
    if is_thin(layer, settings) and (record := thin_spectrum(layer, settings)) is not None:
        return (record,)
    from lora_diag.diagnostics.spectrum.measure import (
        spectrum as measure,
    )  # deferred: imports torch

    return (measure(layer.delta, settings, layer.weighting),)


def _estimate_bytes(layer: WeightedLayer, settings: SpectrumSettings) -> int:
    """Estimate the memory of measuring a layer in bytes."""
    if is_thin(layer, settings):
        return footprint(layer.delta)
    from lora_diag.diagnostics.spectrum.measure import estimate_bytes

    return estimate_bytes(layer, settings)
