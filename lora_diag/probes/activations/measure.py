"""``probe activations``: second moments of layer inputs on a text, for ``--activations``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Unpack

from lora_diag.deltas import natural_order, selector
from lora_diag.errors import Given, NothingComparedError, UsageError
from lora_diag.files import SECOND_MOMENTS, check_output
from lora_diag.models.activations import (
    Listener,
    iterate_equal_batches,
    linear_layers,
    record,
    shape_of,
)
from lora_diag.models.data import Texts
from lora_diag.models.losses import Draw
from lora_diag.models.opening import Model, Weights
from lora_diag.probes.activations import ActivationsOptions
from lora_diag.records.probe import Activations, LayerInput
from lora_diag.rendering.text import quantity
from lora_diag.running.fingerprint import fingerprint, legible
from lora_diag.running.inputs import GRADIENTS, MOMENTS
from lora_diag.running.options import show_options
from lora_diag.running.probing import ProbeRun
from lora_diag.storage import Checkpoint, open_checkpoint
from lora_diag.storage.safetensors import write_safetensors
from lora_diag.storage.tensors import TensorInfo
from lora_diag.version import __version__


@show_options
def probe_activations(
    base: Path | str, data: Path | str, output: Path | str, **options: Unpack[ActivationsOptions]
) -> Activations:
    r"""Record C = E[xxᵀ] of every selected linear layer: the mean over its inputs x while the model
    reads a text.

    With C, E‖ΔW x‖² = tr(ΔW C ΔWᵀ) = ‖ΔW C^½‖_F² is the mean square change of the layer's output
    due to the update.

    Args:
        base: Model whose layer inputs are recorded: a folder that transformers can open, or a Hub
            id.
        data: A text or JSONL file, or a data set.
        output: A new safetensors file: one float32 matrix ``(in, in)`` under each weight's name in
            ``base``.
        output_gradients: Also record G = E[ggᵀ] of the gradient of a sequence's summed loss with
            respect to each output of a layer, for the K-FAC metric: ``(out, out)`` under
            ``output_gradients.`` and the weight's name. Needs a backward pass.
        labels: Labels of that loss: ``data`` for those of the text, ``model`` for labels sampled
            from the model.
        seed: Seed of the sampled labels.
        overwrite: Replace an existing ``output``.
        **options: ``ActivationsOptions``.

    Returns:
        The output file, the text, the recorded layers, and the skipped ones with the reason.

    Raises:
        UsageError: An option is invalid, BASE is an adapter, ``output`` exists without
            ``overwrite``, or the extra ``train``, or ``datasets`` for a data set, is not installed.
        InputError: An input cannot be read, transformers cannot open BASE, the output cannot be
            written, the loss whose gradients are recorded is not finite, or layers share an input
            in some batches only.
        NothingComparedError: No linear layer is selected.

    Example:
        >>> recorded = probe_activations(
        ...     "sample_checkpoints/base",  # doctest: +SKIP
        ...     "sample_checkpoints/eval/in_domain.txt",
        ...     "activations.safetensors",
        ... )
        >>> spectrum(
        ...     "sample_checkpoints/base",
        ...     "sample_checkpoints/full_ft",
        ...     activations="activations.safetensors",
        ... )  # doctest: +SKIP
    """
    run = ProbeRun("probe activations", options, ActivationsOptions)
    options = run.options
    gradients, labels = options["output_gradients"], options["labels"]
    if labels != "data" and not gradients:
        raise UsageError(Given("labels", labels), "needs $output_gradients")
    output = Path(output)
    check_output(output, SECOND_MOMENTS, options["overwrite"])
    selected = selector(**run.selection)
    stored = open_checkpoint(base)
    model = run.open(base)
    texts = run.read(data)
    base_names, left_out = _choose_layers(model, stored, selected)
    run.watch.total = sum(1 for _ in iterate_equal_batches(texts, run.batch))
    layers = {
        name: layer for name, layer in linear_layers(model.module).items() if name in base_names
    }
    cost_note = _describe_cost(map(shape_of, layers.values()), gradients)
    run.estimate(texts, f"{quantity(len(layers), 'layer')} on 1 set", cost_note)
    draw = Draw(labels, options["seed"]) if gradients else None
    listener = record(model, texts, layers, run.batch, partial(run.watch.batch, "reading"), draw)
    moments = {
        base_names[layer]: moment for moment in listener.moments.values() for layer in moment.layers
    }
    left_out |= {
        base_names[layer]: "not used on this text"
        for layer in layers
        if base_names[layer] not in moments
    }
    moments |= {GRADIENTS + base_names[layer]: moment for layer, moment in listener.outputs.items()}
    tokens = sum(len(sequence.ids) for sequence in texts.sequences)
    metadata = _make_metadata(stored, model, texts, tokens)
    if gradients:
        metadata["gradients"] = f"of labels of the {labels}"
    infos = {
        name: TensorInfo(name, tuple(moment.total.shape), "float32")
        for name, moment in moments.items()
    }
    write_safetensors(
        output,
        infos,
        lambda name: moments[name].mean.float(),
        metadata,
        SECOND_MOMENTS,
        options["overwrite"],
    )
    return Activations(
        path=legible(output),
        model=legible(base),
        text=legible(texts.path),
        about=f"{texts.about}; {model.tokens.about}",
        notes=texts.notes,
        tokens=tokens,
        gradients=labels if gradients else None,
        layers=tuple(_list_layer_inputs(listener, base_names)),
        left_out={
            legible(name): why
            for name, why in sorted(left_out.items(), key=lambda item: natural_order(item[0]))
        },
    )


def _describe_cost(shapes: Iterable[tuple[int, int]], gradients: bool) -> str:
    """Return the memory of the sums, where it is large, and the time of a backward pass as text."""
    gib = 8 * sum(inputs**2 + gradients * outputs**2 for outputs, inputs in shapes) / 2**30
    note = ""
    if gib >= 0.1:
        note += f"; the sums take up to {gib:.1f} GiB"
    if gradients:
        note += "; about three times as long with the backward pass"
    return note


def _choose_layers(
    model: Model, stored: Checkpoint, selected: Callable[[str], bool]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the names in BASE of the selected linear layers, by their names in the model; and why
    others are skipped.

    The reasons are by names in BASE, or in the model for a layer that is not stored.

    Raises:
        NothingComparedError: No linear layer is selected.
    """
    linear = linear_layers(model.module)
    stored_names = Weights(model.module).base_names(stored)
    base_names: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for name in linear:
        if name not in stored_names:
            left_out[name] = "not stored under a name of its own in BASE (tied)"
        elif selected(stored_names[name]):
            base_names[name] = stored_names[name]
    for name, stored_name in stored_names.items():
        if name in base_names or len(stored[stored_name].shape) < 2:
            continue
        left_out[stored_name] = (
            "not selected" if name in linear else "not a linear layer of its own"
        )
    if not base_names:
        raise NothingComparedError(
            stored.path,
            "no linear layer is selected, so there is nothing to record",
            "change $layers or $exclude",
        )
    return base_names, left_out


def _make_metadata(stored: Checkpoint, model: Model, texts: Texts, tokens: int) -> dict[str, str]:
    return {
        "kind": MOMENTS,
        "tokens": str(tokens),
        "set": legible(texts.name),
        "data": texts.hash,
        "sequences": str(len(texts.sequences)),
        "length": str(model.length),
        "tokenizer": legible(model.tokens.about),
        "dtype": str(model.module.dtype).removeprefix("torch."),
        "base": fingerprint(stored),
        "loradiag": __version__,
    }


def _list_layer_inputs(listener: Listener, base_names: dict[str, str]) -> list[LayerInput]:
    """Return the statistics of every layer's inputs, in the natural order of the names in BASE."""
    inputs: list[LayerInput] = []
    for moment in listener.moments.values():
        c, first = moment.mean, moment.layers[0]
        square, fro = float(c.trace()), float(c.norm())
        inputs += [
            LayerInput(
                layer=legible(base_names[layer]),
                size=len(c),
                rows=moment.rows,
                square=square,
                directions=(square / fro) ** 2 if fro else 1.0,
                shares=None if layer == first else legible(base_names[first]),
            )
            for layer in moment.layers
        ]
    return sorted(inputs, key=lambda layer_input: natural_order(layer_input.layer))
