"""Which device computes."""

from __future__ import annotations

import torch

from lora_diag.errors import UsageError


def resolve_device(word: str) -> torch.device:
    """Turn the word of ``--device`` into a device that is there.

    Args:
        word: ``auto`` (the first CUDA device, else the CPU), ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.

    Returns:
        The device. It can do float64 arithmetic, on which the error bounds rest.

    Raises:
        UsageError: The word means nothing, or the device is not there or has no float64.
    """
    if word == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(word)
    except RuntimeError as error:
        raise UsageError(f"--device {word}: use auto, cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise UsageError(f"--device {word}: this torch sees {count} CUDA devices; use --device cpu")
    elif device.type == "mps":
        raise UsageError("--device mps: it has no float64, on which the error bounds rest; use --device cpu")
    elif device.type != "cpu":
        raise UsageError(f"--device {word}: use auto, cpu, cuda, cuda:1 or mps")
    return device
