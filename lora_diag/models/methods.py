"""Training methods: LoRA factors on a frozen BASE, all of BASE, or its biases and norms. BASE is restored afterwards.

Handles PEFT; independent of steps, rates and losses.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lora_diag.errors import InputError, UsageError, install_command
from lora_diag.models.activations import linear_layers
from lora_diag.models.opening import Model

ALPHA_OVER_RANK = 2
# rsLoRA scales by alpha/√r with one alpha for all ranks; with 16, r=64 has the scaling 2 of ``ALPHA_OVER_RANK``.
RSLORA_ALPHA = 16


@dataclass(frozen=True, slots=True)
class Lora:
    """A kind of LoRA.

    Args:
        targets: Modules as PEFT takes them: names, or a regular expression for whole names; None for all linear layers
            except the head.
        dora: Whether to also train a magnitude per output (Liu et al. 2024).
        rslora: Whether B A is scaled by alpha/√r and not alpha/r (Kalajdzievski 2023).
        config: Content of an ``adapter_config.json`` with all of this and the ranks, instead of the other fields.
        vectors: Whether BASE's biases and norms are trained, too.
    """

    targets: tuple[str, ...] | str | None = None
    dora: bool = False
    rslora: bool = False
    config: Mapping[str, Any] | None = None
    vectors: bool = False

    @property
    def description(self) -> str:
        """Description of the kind."""
        name = {(0, 0): "LoRA", (1, 0): "DoRA", (0, 1): "rsLoRA", (1, 1): "DoRA with rsLoRA's scaling"}
        alpha = f"{RSLORA_ALPHA}" if self.rslora else f"{ALPHA_OVER_RANK}r"
        return f"{name[self.dora, self.rslora]}, alpha = {alpha}"


def layers_without_head(module: Any) -> dict[str, nn.Module]:
    """Return the linear layers outside the head, by the names of their weights.

    The head is the part outside the inner model: ``lm_head``, ``classifier``, ``score``.
    """
    inner, output = getattr(module, "base_model", module), module.get_output_embeddings()
    inside = {id(submodule) for submodule in inner.modules()} - {id(output)}
    return {name: layer for name, layer in linear_layers(module).items() if id(layer) in inside}


@contextmanager
def add_lora(model: Model, rank: int, kind: Lora) -> Iterator[Model]:
    """Add fresh factors to BASE within the block, and remove them afterwards.

    Raises:
        UsageError: peft is not installed.
        InputError: PEFT finds no such module.
    """
    try:
        import peft
    except ImportError as error:
        raise UsageError(f"probe: training needs {error.name}; {install_command('train')}") from error
    options = _make_options(model, rank, kind) if kind.config is None else _drop_other_options(kind.config)
    with train_in_place(model, only_vectors=True) if kind.vectors else nullcontext():
        vectors = [parameter for parameter in model.module.parameters() if parameter.ndim == 1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                wrapped: Any = peft.get_peft_model(model.module, peft.LoraConfig(**options))
            except ValueError as error:
                raise InputError(f"--target-modules: PEFT cannot adapt this model: {error}") from error
        for parameter in vectors if kind.vectors else ():
            parameter.requires_grad_(True)
        try:
            yield replace(model, module=wrapped)
        finally:
            wrapped.unload()
            model.module.eval().requires_grad_(False)


def _make_options(model: Model, rank: int, kind: Lora) -> dict[str, Any]:
    """Return the arguments of PEFT's config for one rank everywhere."""
    targets = kind.targets
    if targets is None:
        targets = tuple(name.removesuffix(".weight") for name in layers_without_head(model.module))
    return {
        "r": rank,
        "lora_alpha": RSLORA_ALPHA if kind.rslora else ALPHA_OVER_RANK * rank,
        "lora_dropout": 0.0,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "fan_in_fan_out": is_transposed(model.module),
        "use_dora": kind.dora,
        "use_rslora": kind.rslora,
    }


def is_transposed(module: nn.Module) -> bool:
    """Return whether a model stores its matrices as ``(in, out)``, as GPT-2 does: PEFT's ``fan_in_fan_out``."""
    return any(type(layer).__name__ == "Conv1D" for layer in module.modules())


def _drop_other_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of PEFT's config, except those on how the model is wrapped or saved."""
    return {
        key: value
        for key, value in config.items()
        if key not in {"peft_type", "task_type", "base_model_name_or_path", "inference_mode"}
    }


def check_checkpointing(module: Any) -> None:
    """Refuse a model whose activations transformers cannot recompute.

    Raises:
        UsageError: transformers has no gradient checkpointing for this model.
    """
    if not getattr(module, "supports_gradient_checkpointing", False):
        raise UsageError(
            f"--gradient-checkpointing: transformers has none for {type(module).__name__}; remove the option"
        )


@contextmanager
def checkpoint_activations(module: Any) -> Iterator[None]:
    """Recompute the activations of every block in the backward pass of training, instead of keeping them.

    Args:
        module: A model of transformers, with or without an adapter in it.
    """
    # The older name is deprecated in transformers 5.24 and the only one in 5.18.
    name = "activation" if hasattr(module, "activation_checkpointing_enable") else "gradient"
    getattr(module, f"{name}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(module, f"{name}_checkpointing_disable")()
        module.disable_input_require_grads()  # which enabling enabled, for blocks in front of the first factors


@contextmanager
def train_in_place(model: Model, only_vectors: bool) -> Iterator[Model]:
    """Train BASE itself within the block, and restore its weights bit for bit from a copy in main memory.

    Args:
        model: BASE.
        only_vectors: Train only 1-D parameters: biases and norms (BitFit: Ben Zaken et al. 2022).

    Raises:
        InputError: There is nothing to train.
    """
    trained = [weight for weight in model.module.parameters() if weight.ndim == 1 or not only_vectors]
    if not trained:
        raise InputError("--bitfit: this model has no biases or norms to train; remove the option")
    changing = [*trained, *model.module.buffers()]
    kept = [tensor.detach().to("cpu", copy=True) for tensor in changing]
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        yield model
    finally:
        with torch.no_grad():
            for tensor, original in zip(changing, kept, strict=True):
                tensor.copy_(original)
        for parameter in trained:
            parameter.grad = None
        model.module.eval().requires_grad_(False)
