"""What a trainable parameter takes in memory: itself, its gradient, and the state of its optimizer.

It knows bytes per parameter, and refuses to know activations, the frozen base and the fragmentation of an allocator:
what it returns is a lower bound on what training takes beyond those.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_diag.errors import UsageError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Bytes of optimizer state per parameter. Adam keeps two float32 moments. 8-bit Adam keeps two bytes, and a float32
# scale for each block of 256 of them (Dettmers et al. 2022, section 2.2; bitsandbytes keeps tensors below 4096 entries
# in 32 bits, which an estimate may neglect). SGD keeps nothing, with momentum one float32.
STATE = {"adamw": 8.0, "adamw8bit": 2 + 2 * 4 / 256, "sgd": 0.0, "sgd_momentum": 4.0}


@dataclass(frozen=True)
class Training:
    """How adapters are trained, as far as memory goes.

    Args:
        optimizer: A key of ``STATE``.
        dtype: Of the trainable parameters and their gradients. PEFT keeps those of adapters in float32 by default.
    """

    optimizer: str = "adamw"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Refuse what is not known.

        Raises:
            UsageError: Optimizer or dtype is none of those known.
        """
        if self.optimizer not in STATE:
            raise UsageError(f"--optimizer {self.optimizer}: must be one of {', '.join(STATE)}")
        if self.dtype not in BYTES:
            raise UsageError(f"--adapter-dtype {self.dtype}: must be one of {', '.join(BYTES)}")

    @property
    def bytes_per_param(self) -> float:
        """Bytes that one trainable parameter takes: itself, its gradient and its optimizer's state.

        >>> Training().bytes_per_param, Training("sgd", "bfloat16").bytes_per_param
        (16.0, 4.0)
        """
        return 2 * BYTES[self.dtype] + STATE[self.optimizer]
