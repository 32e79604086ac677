"""What is trained: LoRA's factors on a frozen BASE, all of BASE, or its biases and norms. BASE is the same after.

Knows PEFT; refuses to know steps, rates and losses.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lora_diag.errors import InputError, UsageError
from lora_diag.models.activations import linear_layers
from lora_diag.models.opening import Model

ALPHA_OVER_RANK = 2
# rsLoRA scales by alpha/√r with one alpha for all ranks; with 16, r=64 has the scaling 2 of ``ALPHA_OVER_RANK``.
RSLORA_ALPHA = 16


@dataclass(frozen=True, slots=True)
class Lora:
    """The kind of LoRA.

    Args:
        targets: Modules as PEFT takes them: names, or a regular expression for whole names; None for all linear layers
            but the head.
        dora: Whether a magnitude of each output is trained, too (Liu et al. 2024).
        rslora: Whether B A is scaled by alpha/√r and not alpha/r (Kalajdzievski 2023).
    """

    targets: tuple[str, ...] | str | None = None
    dora: bool = False
    rslora: bool = False

    @property
    def about(self) -> str:
        """What it is, in words."""
        name = {(0, 0): "LoRA", (1, 0): "DoRA", (0, 1): "rsLoRA", (1, 1): "DoRA with rsLoRA's scaling"}
        alpha = f"{RSLORA_ALPHA}" if self.rslora else f"{ALPHA_OVER_RANK}r"
        return f"{name[self.dora, self.rslora]}, alpha = {alpha}"


def inner_layers(module: Any) -> dict[str, nn.Module]:
    """Return the linear layers but those of the head, by the names of their weights.

    The head is what stands outside the inner model: ``lm_head``, ``classifier``, ``score``.
    """
    inner, output = getattr(module, "base_model", module), module.get_output_embeddings()
    inside = {id(each) for each in inner.modules()} - {id(output)}
    return {name: layer for name, layer in linear_layers(module).items() if id(layer) in inside}


@contextmanager
def with_lora(model: Model, rank: int, kind: Lora) -> Iterator[Model]:
    """Give BASE with fresh factors, and take them off again.

    Raises:
        UsageError: peft is not installed.
        InputError: PEFT finds no such module.
    """
    try:
        import peft
    except ImportError as error:
        raise UsageError(f"probe: training needs {error.name}: pip install 'loradiag[train]'") from error
    targets = kind.targets
    if targets is None:
        targets = tuple(name.removesuffix(".weight") for name in inner_layers(model.module))
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=RSLORA_ALPHA if kind.rslora else ALPHA_OVER_RANK * rank,
        lora_dropout=0.0,
        target_modules=targets if isinstance(targets, str) else list(targets),
        fan_in_fan_out=any(type(layer).__name__ == "Conv1D" for layer in model.module.modules()),
        use_dora=kind.dora,
        use_rslora=kind.rslora,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wrapped: Any = peft.get_peft_model(model.module, config)
        except ValueError as error:
            raise InputError(f"--target-modules: PEFT cannot adapt this model: {error}") from error
    try:
        yield replace(model, module=wrapped)
    finally:
        wrapped.unload()
        model.module.eval().requires_grad_(False)


@contextmanager
def in_place(model: Model, only_vectors: bool) -> Iterator[Model]:
    """Let BASE itself be trained, and give its weights back, bit for bit, from a copy in main memory.

    Args:
        model: BASE.
        only_vectors: Train only what has one dimension: biases and norms (BitFit: Ben Zaken et al. 2022).

    Raises:
        InputError: There is nothing to train.
    """
    trained = [each for each in model.module.parameters() if each.ndim == 1 or not only_vectors]
    if not trained:
        raise InputError("--bitfit: this model has no biases and no norms to train")
    changing = [*trained, *model.module.buffers()]
    kept = [tensor.detach().to("cpu", copy=True) for tensor in changing]
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        yield model
    finally:
        with torch.no_grad():
            for tensor, before in zip(changing, kept, strict=True):
                tensor.copy_(before)
        for parameter in trained:
            parameter.grad = None
        model.module.eval().requires_grad_(False)
