"""Memory of a trainable parameter: its value, its gradient, and the state of its optimizer.

Activations, the frozen base and fragmentation of the allocator are not included, so results are lower bounds on the
memory of training.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_diag.errors import UsageError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Bytes of optimizer state per parameter. Adam keeps two float32 moments. 8-bit Adam keeps two bytes, and a float32
# scale per block of 256 (Dettmers et al. 2022, section 2.2; bitsandbytes keeps tensors below 4096 entries in 32 bits,
# which the estimate neglects). SGD keeps nothing, with momentum one float32.
STATE = {"adamw": 8.0, "adamw8bit": 2 + 2 * 4 / 256, "sgd": 0.0, "sgd_momentum": 4.0}


@dataclass(frozen=True)
class Training:
    """Training settings that determine memory.

    Args:
        optimizer: A key of ``STATE``.
        dtype: Dtype of the trainable parameters and their gradients. PEFT keeps those of adapters in float32 by
            default.
    """

    optimizer: str = "adamw"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Refuse unknown optimizers and dtypes.

        Raises:
            UsageError: Optimizer or dtype is unknown.
        """
        if self.optimizer not in STATE:
            raise UsageError(f"--optimizer {self.optimizer}: must be one of {', '.join(STATE)}")
        if self.dtype not in BYTES:
            raise UsageError(f"--adapter-dtype {self.dtype}: must be one of {', '.join(BYTES)}")

    @property
    def bytes_per_param(self) -> float:
        """Memory of one trainable parameter in bytes: value, gradient and optimizer state.

        >>> Training().bytes_per_param, Training("sgd", "bfloat16").bytes_per_param
        (16.0, 4.0)
        """
        return 2 * BYTES[self.dtype] + STATE[self.optimizer]
