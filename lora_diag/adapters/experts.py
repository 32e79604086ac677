"""``target_parameters``: LoRA on parameters themselves, mostly the fused experts of a mixture
``(E, d1, d2)``.

PEFT wraps the module that owns the parameter once per parameter, so the depth of ``.base_layer`` in
a key, not its name, identifies the parameter: the last registered one is outermost. The factors of
all experts are stored in two matrices, ordered differently
(``peft.tuners.lora.layer.ParamWrapper.get_delta_weight``):

    A  (r·E, in)   row e·r + k          ->  A_e = A.reshape(E, r, in)[e]
    B  (out, r·E)  column k·E + e       ->  B_e = B.reshape(out, r, E)[:, :, e]
    ΔW_e = s·B_e·A_e
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from lora_diag.adapters.patterns import find_targets
from lora_diag.adapters.source import AdapterFiles, Config, Modules, find_pair, is_named
from lora_diag.adapters.updates import UpdateSite, WeightUpdate, as_float64
from lora_diag.errors import damaged
from lora_diag.storage import Checkpoint

if TYPE_CHECKING:
    from lora_diag.adapters.updates import Factors

# Order in which the expert modules of transformers 5 register their parameters.
REGISTERED = (
    "gate_up_proj", "gate_up_proj_bias", "gate_proj", "input_linear", "w1", "v1", "up_proj", "w3",
    "down_proj", "down_proj_bias", "output_linear", "w2", "weight", "bias",
)  # fmt: skip

# Models with experts stored as (E, in, out): ``is_transposed=True`` in transformers 5.24.
TRANSPOSED_MODELS = frozenset({"gpt_oss", "aria", "aria_text", "openai_privacy_filter"})


@dataclass(frozen=True)
class Stack:
    """The factors of one parameter.

    Args:
        module: The module in the adapter's keys, with its ``.base_layer``s.
        parameter: The parameter's own path, such as ``model.layers.0.mlp.experts.gate_up_proj``.
        parts: Names of its tensors, by their parts.
    """

    module: str
    parameter: str
    parts: dict[str, str]


def separate_stacks(modules: Modules, config: Config) -> tuple[list[Stack], Modules]:
    """Separate the factors of parameters from those of layers.

    Args:
        modules: All modules of the adapter.
        config: The adapter's config.

    Returns:
        The factors of parameters, and the other modules.
    """
    targets = config.names("target_parameters")
    if not targets:
        return [], modules
    owners = {module: re.sub(r"(\.base_layer)+$", "", module) for module in modules}
    # PEFT refuses to adapt both a module and its parameter: a target module is not a target
    # parameter. ``all-linear`` stands for linear layers without parameters as targets.
    is_all_linear = config.values.get("target_modules") == "all-linear"
    target_modules = frozenset[str]() if is_all_linear else find_targets(config, owners.values())
    modules_by_owner: dict[str, list[str]] = {}
    for module, owner in owners.items():
        if _find_parameters(owner, targets) and owner not in target_modules:
            modules_by_owner.setdefault(owner, []).append(module)
    found = (
        _find_stacks(owner, wrapped, targets, modules, config)
        for owner, wrapped in modules_by_owner.items()
    )
    stacks = {stack.module: stack for stacks in found for stack in stacks}
    return [*stacks.values()], {
        module: parts for module, parts in modules.items() if module not in stacks
    }


def _find_parameters(owner: str, targets: list[str]) -> list[str]:
    """Return the names of a module's parameters whose paths equal a target of the config, or end in
    a dot and one.
    """
    leaves = dict.fromkeys(target.rpartition(".")[2] for target in targets)
    return [
        leaf for leaf in leaves if any(is_named(f"{owner}.{leaf}", target) for target in targets)
    ]


def _find_leaves(owner: str, targets: list[str], count: int) -> list[str]:
    """Return the parameters of a module for its ``count`` pairs of factors; all targeted ones if no
    choice has as many.

    ``gate_up_proj`` alone may belong to any module, ``gate.weight`` is the router's, as written by
    PEFT 0.21 for ``all-linear`` or ``gate_proj`` on a mixture of experts.
    """
    targeted = _find_parameters(owner, targets)
    with_dot = _find_parameters(owner, [target for target in targets if "." in target])
    candidates = targeted, with_dot, [leaf for leaf in targeted if leaf not in with_dot]
    return next((leaves for leaves in candidates if len(leaves) == count), targeted)


def _find_stacks(
    owner: str, wrapped: list[str], targets: list[str], modules: Modules, config: Config
) -> list[Stack]:
    """Return the factors of each adapted parameter of ``owner``; ``wrapped`` are its names with
    ``.base_layer``s.
    """
    leaves = _find_leaves(owner, targets, len(wrapped))
    outermost_first = sorted(wrapped, key=len)
    is_order_known = all(leaf in REGISTERED for leaf in leaves) or len(leaves) == 1
    if len(leaves) != len(wrapped) or not is_order_known:
        named = f"target_parameters names {', '.join(leaves)}"
        problem = (
            f"the parameters of {owner} for its {len(wrapped)} pairs of factors are "
            f"ambiguous ({named})"
        )
        raise damaged(
            config.path, problem, "merge the adapter with peft and pass the merged checkpoint"
        )
    ordered = sorted(
        leaves, key=lambda leaf: REGISTERED.index(leaf) if len(leaves) > 1 else 0, reverse=True
    )
    pairs = zip(outermost_first, ordered, strict=True)
    return [Stack(module, f"{owner}.{leaf}", modules[module]) for module, leaf in pairs]


def read_stack(
    source: AdapterFiles,
    stack: Stack,
    rank_of: Callable[[str], int],
    scale_of: Callable[[str], float],
) -> list[WeightUpdate]:
    """Return one update per expert, or a single one for a parameter that is a matrix.

    Args:
        source: The adapter.
        stack: The parameter's factors.
        rank_of: r of a parameter.
        scale_of: s of a parameter.

    Raises:
        InputError: A factor is missing or invalid, the factors do not fit together or do not hold a
            whole number of experts, or the config gives no valid r or α.
    """
    a_key, b_key = find_pair(source, stack.module, stack.parts)
    a, b = source.shape(a_key, 2), source.shape(b_key, 2)
    rank, scale = rank_of(stack.parameter), scale_of(stack.parameter)
    if a[0] != b[1] or a[0] % rank:
        claim = f"do not hold experts of rank {rank}, as given by {source.settings.path.name}"
        problem = f"{stack.parameter}: A {list(a)} and B {list(b)} {claim}"
        raise damaged(
            source.checkpoint.path, problem, "use the config that this adapter was trained with"
        )
    count = a[0] // rank
    return [
        WeightUpdate(
            weight=stack.parameter,
            shape=(b[0], a[1]),
            load=partial(load_expert_factors, source.checkpoint, b_key, a_key, scale, index, count),
            factored=True,
            dtype=source.checkpoint[b_key].dtype,
            zero_if=b_key,
            rank=rank,
            scale=scale,
            expert=(index, count) if count > 1 else None,
            in_out=partial(is_stored_in_out, source.settings.text("peft_version"))
            if count > 1
            else None,
        )
        for index in range(count)
    ]


def load_expert_factors(
    checkpoint: Checkpoint,
    b_key: str,
    a_key: str,
    scale: float,
    index: int,
    count: int,
    site: UpdateSite,
) -> Factors:
    """Return s·B_e ``(out, r)`` and A_e ``(r, in)`` of one expert."""
    rows, columns = checkpoint[a_key].shape
    rank = rows // count
    # Of A only the entries of the expert are read. Those of B are spread over its rows: B is read
    # whole, but only the entries of the expert are converted.
    a_e = checkpoint.read(a_key, index * rank * columns, (index + 1) * rank * columns).view(
        rank, columns
    )
    b_e = checkpoint.read(b_key).view(-1, rank, count)[:, :, index]
    return as_float64(b_e) * scale, as_float64(a_e)


def is_stored_in_out(peft_version: str, model_type: str) -> bool:
    """Return whether square experts are stored as ``(in, out)`` in BASE; for others the shapes
    decide.

    PEFT up to 0.18.1 (which wrote no version) treated every 3-D parameter as ``(E, in, out)``;
    0.19.0 had the condition inverted; since 0.19.1 it follows the model (huggingface/peft#3165).

    >>> (
    ...     is_stored_in_out("0.21.2", "mixtral"),
    ...     is_stored_in_out("0.21.2", "gpt_oss"),
    ...     is_stored_in_out("", "mixtral"),
    ... )
    (False, True, True)
    """
    transposed = model_type in TRANSPOSED_MODELS
    version = tuple(int(part) for part in re.findall(r"\d{1,9}", peft_version)[:3])
    if version == (0, 19, 0):
        return not transposed
    return transposed or version < (0, 19, 0)
