"""The weights of a model in training with an available gradient, and its computation.

A trained weight has its own gradient. A weight frozen under a LoRA has none: autograd only passes
through it. But with y = W·x + s·B·A·x + b the gradient of the loss with respect to W would be

    G = Σ_tokens δy xᵀ,    δy = ∂L/∂y,

and both are available: x is the input of the adapted layer and δy its output gradient. The
gradients of the factors follow from G, ∂L/∂B = s·G·Aᵀ and ∂L/∂A = s·Bᵀ·G (Hu et al. 2021, *LoRA*,
eq. 3, differentiated).

Also the environment of a backward pass: other processes with their parts of the batch, and the loss
scale of fp16.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_diag.errors import UsageError
from lora_diag.models.activations import input_of
from lora_diag.storage.reading import plain_names

# Prefixes that PEFT adds to the names of wrapped weights.
_PEFT = re.compile(r"^base_model\.model\.|\.modules_to_save\.[^.]+(?=\.)")


@dataclass
class Trained:
    """A weight with its own gradient.

    Args:
        name: Name of the weight without wrappers and adapters.
        parameter: The weight.
    """

    name: str
    parameter: nn.Parameter

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight as stored."""
        return tuple(self.parameter.shape)

    def gradient(self) -> Tensor | None:
        """Return the gradient accumulated by autograd; None if there is none yet."""
        return self.parameter.grad


@dataclass
class Frozen:
    """A frozen weight under a LoRA; its gradient is accumulated from the inputs and output
    gradients of its layer.

    Args:
        name: Name of the weight without wrappers and adapters.
        module: The LoRA layer around it.
        active: Whether to record the current step; else nothing is computed or kept.
    """

    name: str
    module: Any
    active: bool = False
    _sum: Tensor | None = field(default=None, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight as stored; of a quantized one, that before quantization."""
        base = self.module.get_base_layer()
        if isinstance(base, nn.Linear):
            return base.out_features, base.in_features
        return tuple(base.weight.shape)

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return B ``(m, r)``, A ``(r, n)`` and c ``(r,)`` of the LoRA B·diag(c)·A, as the weight
        is stored.

        Those of several active adapters are concatenated. B and A have the dtype of the parameters;
        c, float64, is the scaling, of AdaLoRA times its diagonal.
        """
        module = self.module
        down: list[Tensor] = []
        up: list[Tensor] = []
        sizes: list[Tensor] = []
        for name in module.active_adapters:
            if name in module.lora_A:
                down.append(_read_matrix(module.lora_A[name]))
                up.append(_read_matrix(module.lora_B[name]))
            elif name in module.lora_embedding_A:
                down.append(module.lora_embedding_A[name].detach())
                up.append(module.lora_embedding_B[name].detach())
            else:
                continue
            size = down[-1].new_full((len(down[-1]),), module.scaling[name], dtype=torch.float64)
            if hasattr(module, "lora_E"):  # AdaLoRA
                size *= module.lora_E[name].detach()[:, 0] / (module.ranknum[name] + 1e-5)
            sizes.append(size)
        b, a, c = torch.cat(up, 1), torch.cat(down, 0), torch.cat(sizes)
        if isinstance(module.get_base_layer(), nn.Embedding | Conv1D):
            return a.T, b.T, c
        return b, a, c

    def gradient(self) -> Tensor | None:
        """Return the sum over the backward passes of this step, float32; None if there was none."""
        return self._sum

    def start(self, active: bool) -> None:
        """Discard the last step, and set whether to record the next one."""
        self.active, self._sum = active, None

    def hook(self) -> Callable[[], None]:
        """Register a hook on the layer; return a function that removes it."""
        stop: Callable[[], None] = self.module.register_forward_hook(
            self._forward, with_kwargs=True
        ).remove
        return stop

    def _forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        """Register a hook on an output that adds its gradient, if the step is recorded and there
        will be one.
        """
        if self.active and torch.is_grad_enabled() and output.requires_grad:
            inputs = input_of(args, kwargs).detach()
            output.register_hook(lambda gradient: self._add(inputs, gradient.detach()))  # type: ignore[no-untyped-call]

    def _add(self, x: Tensor, dy: Tensor) -> None:
        """Add Σ δy xᵀ of one backward pass."""
        if self._sum is None:
            self._sum = torch.zeros(self.shape, dtype=torch.float32, device=dy.device)
        base = self.module.get_base_layer()
        with torch.autocast(dy.device.type, enabled=False):
            rows = dy.reshape(-1, dy.shape[-1]).float()
            if isinstance(base, nn.Embedding):
                ids = x.reshape(-1)
                counted = (
                    torch.ones_like(ids, dtype=torch.bool)
                    if base.padding_idx is None
                    else ids != base.padding_idx
                )
                self._sum.index_add_(0, ids[counted], rows[counted])
            elif isinstance(base, Conv1D):  # stores its weight as (in, out)
                self._sum.addmm_(x.reshape(-1, x.shape[-1]).float().T, rows)
            else:
                self._sum.addmm_(rows.T, x.reshape(-1, x.shape[-1]).float())


def _read_matrix(layer: Any) -> Tensor:
    """Return the weight of a layer, or a parameter as it is, detached."""
    weight = layer.weight if isinstance(layer, nn.Module) else layer
    assert isinstance(weight, Tensor)
    return weight.detach()


Weight = Trained | Frozen


def weights_of(
    model: nn.Module, is_selected: Callable[[str], bool]
) -> tuple[list[Weight], dict[str, str]]:
    """Return the weights of two or more dimensions with an available gradient, and why adapted
    frozen ones have none.

    Args:
        model: A model, possibly wrapped for data parallelism or with PEFT adapters.
        is_selected: Returns whether a name is selected.

    Returns:
        The weights, sorted by name; and for frozen weights under an adapter without one, the reason
            by name.
    """
    weights: list[Weight] = []
    unread: dict[str, str] = {}
    for name, module, parameter in _iterate_named(model):
        if not is_selected(name):
            continue
        if parameter is not None:
            _refuse_sharded(name, parameter)
            if parameter.ndim >= 2 and parameter.requires_grad:
                weights.append(Trained(name, parameter))
        elif (why := _explain_unavailable(module)) is None:
            weights.append(Frozen(name, module))
        else:
            unread[name] = why
    return sorted(weights, key=lambda weight: weight.name), unread


def _iterate_named(model: nn.Module) -> Iterator[tuple[str, Any, nn.Parameter | None]]:
    """Yield plain name, module and parameter of every parameter outside adapters, and of the weight
    that each adapts.

    The parameter is None for an adapted weight that is frozen; its module is the adapter's layer.
    """
    prefixes: tuple[str, ...] = ()
    entries: list[tuple[str, Any, nn.Parameter | None]] = []
    for path, module in model.named_modules():
        if path.startswith(prefixes) and prefixes:
            continue
        if isinstance(module, BaseTunerLayer):
            prefixes = (*prefixes, f"{path}.")
            weight = getattr(module.get_base_layer(), "weight", None)
            is_trained = isinstance(weight, nn.Parameter) and weight.requires_grad
            entries.append((f"{path}.weight", module, weight if is_trained else None))
        else:
            entries += [
                (f"{path}.{name}", module, p) for name, p in module.named_parameters(recurse=False)
            ]
    names = plain_names([name.removeprefix(".") for name, _, _ in entries])
    for name, (_, module, parameter) in zip(names, entries, strict=True):
        yield _PEFT.sub("", name), module, parameter


def _explain_unavailable(module: Any) -> str | None:
    """Return why the exact gradient of a frozen weight is not available; None if it is."""
    base = module.get_base_layer()
    if not isinstance(module, LoraLayer):
        return f"a {type(module).__name__} is not a LoRA: its output is not W·x plus an update"
    if module.lora_variant or any(module.use_dora.values()):
        kind = next((type(v).__name__ for v in module.lora_variant.values()), "DoRA")
        return f"with {kind} the output is not W·x plus an update"
    if isinstance(base, nn.Embedding) and hasattr(base, "embed_scale"):
        return "a scaled embedding"
    if not isinstance(base, (nn.Linear, nn.Embedding, Conv1D)):
        return f"a {type(base).__name__} under a LoRA"
    return None


def _refuse_sharded(name: str, parameter: nn.Parameter) -> None:
    """Refuse a weight that is sharded over processes.

    Raises:
        UsageError: FSDP or DeepSpeed ZeRO-3 has sharded the weight.
    """
    if is_sharded(name, parameter):
        problem = (
            f"{name}: is sharded over processes (FSDP, ZeRO-3), so no process has its whole "
            "gradient"
        )
        raise UsageError(f"{problem}; record with plain data parallelism or on one device")


def is_sharded(name: str, parameter: Tensor) -> bool:
    """Return whether FSDP or DeepSpeed ZeRO-3 has sharded a parameter over processes."""
    wrapped = "_flat_param" in name or "_fsdp_wrapped_module" in name
    return wrapped or hasattr(parameter, "ds_id") or hasattr(parameter.data, "device_mesh")


def is_unscaled(scaler: Any) -> bool:
    """Return whether ``unscale_`` of a gradient scaler was already called for this update, as
    needed for clipping.
    """
    states = getattr(scaler, "_per_optimizer_states", {})
    return any(getattr(state.get("stage"), "name", "") == "UNSCALED" for state in states.values())


def is_main() -> bool:
    """Return whether this process is the only one or that of rank 0, which writes the output."""
    distributed = torch.distributed
    return (
        not (distributed.is_available() and distributed.is_initialized())
        or distributed.get_rank() == 0
    )


def average_over_processes(weight: Frozen) -> Tensor | None:
    """Return the gradient of a weight, averaged in place over processes; all of them must call
    this.

    Each process has summed over its part of the batch. None for a single process without a backward
    pass.
    """
    distributed, gradient = torch.distributed, weight.gradient()
    if not (distributed.is_available() and distributed.is_initialized()):
        return gradient
    if gradient is None:  # an expert that got no token of this process
        gradient = torch.zeros(weight.shape, device=next(weight.module.parameters()).device)
    distributed.all_reduce(gradient)
    return gradient.div_(distributed.get_world_size())
