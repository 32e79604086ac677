"""Weights that get adapters, by the user's pattern or by default, and the memory of their trainable
parameters.

By default these are the matrices that adapters usually target.

The memory of a trainable parameter is that of its value, its gradient and its optimizer's state.
Activations, the frozen base and fragmentation of the allocator are not included, so results are
lower bounds on the memory of training.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lora_diag.errors import Given, UsageError
from lora_diag.records.names import part_of
from lora_diag.running.amounts import read_bytes

# The router of a mixture of experts: a few rows, and since transformers 5 a separate module that
# PEFT cannot adapt.
ROUTER = re.compile(r"\.(gate|router|router\.layer|shared_expert_gate|mlp\.router)(\.weight)?$")

# Parameters of modules that are not layers (tokens, positions, tables of biases, Mamba's A),
# recognized by name, and the short convolutions of state-space models: PEFT's all-linear skips
# them, and PEFT refuses them as targets.
BARE = re.compile(
    r"(^|[._])(A_log|probe|tokens?|position_embeddings|positional_embedding\w*|time_mix_\w+|bias(_table)?"
    r"|(in|input)_(proj|projection)_weight)(\[\d+\])?$"
)
SHORT_CONVOLUTION = re.compile(r"\.(conv_?1d|conv\.conv)\.weight$")


def why_no_target(
    name: str, target: re.Pattern[str] | None, exclude: re.Pattern[str] | None
) -> str:
    """Return why a matrix gets no adapter; empty if it may get one.

    Args:
        name: Its name in BASE.
        target: Pattern of ``--layers``; None for the default.
        exclude: Pattern of ``--exclude``; None without one.

    >>> why_no_target("model.layers.0.self_attn.q_proj.weight", None, None)
    ''
    >>> why_no_target("model.layers.0.mlp.gate.weight", None, None)
    'a router is no usual target; name it with --layers to give it a rank'
    >>> why_no_target("vision_tower.head.probe[0]", None, None)
    'not the weight of a layer, so no usual target; name it with --layers to give it a rank'
    >>> why_no_target("model.layers.0.mamba.conv1d.weight", None, None)
    'a convolution in groups is no usual target; name it with --layers to give it a rank'
    """
    if exclude is not None and exclude.search(name):
        return "matches --exclude"
    if target is not None:
        return "" if target.search(name) else "does not match --layers"
    if part_of(name) == "vocabulary":
        why = "embeddings and head are no usual target"
    elif BARE.search(name):
        why = "not the weight of a layer, so no usual target"
    elif SHORT_CONVOLUTION.search(name):
        why = "a convolution in groups is no usual target"
    elif ROUTER.search(name):
        why = "a router is no usual target"
    else:
        return ""
    return f"{why}; name it with --layers to give it a rank"


def read_memory(amount: int | str) -> int:
    """Return the bytes of ``--memory-budget``; an integer counts bytes."""
    return read_bytes(f"{amount}B" if isinstance(amount, int) else amount, "memory_budget")


BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Bytes of optimizer state per parameter. Adam keeps two float32 moments. 8-bit Adam keeps two
# bytes, and a float32 scale per block of 256 (Dettmers et al. 2022, section 2.2; bitsandbytes keeps
# tensors below 4096 entries in 32 bits, which the estimate neglects). SGD keeps nothing, with
# momentum one float32.
STATE = {"adamw": 8.0, "adamw8bit": 2 + 2 * 4 / 256, "sgd": 0.0, "sgd_momentum": 4.0}


@dataclass(frozen=True)
class TrainingMemory:
    """Training settings that determine memory.

    Args:
        optimizer: A key of ``STATE``.
        dtype: Dtype of the trainable parameters and their gradients. PEFT keeps those of adapters
            in float32 by default.
    """

    optimizer: str = "adamw"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Refuse unknown optimizers and dtypes.

        Raises:
            UsageError: Optimizer or dtype is unknown.
        """
        if self.optimizer not in STATE:
            raise UsageError(
                Given("optimizer", self.optimizer), f"must be one of {', '.join(STATE)}"
            )
        if self.dtype not in BYTES:
            raise UsageError(
                Given("adapter_dtype", self.dtype), f"must be one of {', '.join(BYTES)}"
            )

    @property
    def bytes_per_param(self) -> float:
        """The memory of one trainable parameter in bytes: value, gradient and optimizer state.

        >>> TrainingMemory().bytes_per_param, TrainingMemory("sgd", "bfloat16").bytes_per_param
        (16.0, 4.0)
        """
        return 2 * BYTES[self.dtype] + STATE[self.optimizer]
