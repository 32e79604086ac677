"""Choice of the device, its streams, and transfers from and to it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from lora_diag.errors import Given, UsageError

Value = TypeVar("Value")


def resolve_device(word: str) -> torch.device:
    """Return the device for a value of ``--device``.

    Args:
        word: ``auto`` (the first CUDA device, else the CPU), ``cpu``, ``cuda`` or ``cuda:1``;
            ``mps`` is refused.

    Returns:
        The device, which supports float64 arithmetic, as required by the error bounds.

    Raises:
        UsageError: The value is unknown, or the device does not exist or has no float64.
    """
    if word == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(word)
    except RuntimeError as error:
        raise UsageError(Given("device", word), "use auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise UsageError(
                Given("device", word), f"this torch sees {count} CUDA devices", "use $device cpu"
            )
    elif device.type == "mps":
        raise UsageError(
            Given("device", "mps"),
            "it has no float64, which the error bounds need",
            "use $device cpu",
        )
    elif device.type != "cpu":
        raise UsageError(Given("device", word), "use auto, cpu, cuda or cuda:1")
    return device


# Up to this order eigenvalues and singular values of a matrix on a GPU are computed on the CPU,
# where LAPACK takes 2 to 10 ms at orders 256 to 512. cuSOLVER runs on one such matrix in many small
# kernels, and torch's batched solvers are a loop over the matrices from order 33 on
# (github.com/pytorch/pytorch/issues/175585). Not measured on a GPU.
CPU_SOLVER_UP_TO = 512

_streams = threading.local()


@contextmanager
def use_own_stream(device: torch.device) -> Iterator[None]:
    """Compute on a stream of this thread: on a GPU the transfers of one layer then overlap with
    kernels of another.

    There, float32 products have full precision in the block.

    On other devices this does nothing. Results are complete when the block ends, and may be used by
    other threads.
    """
    if device.type != "cuda":
        yield
        return
    streams = vars(_streams).setdefault(
        "by_device", {}
    )  # one for each thread: memory freed on it is used again on it
    stream = streams.get(device)
    if stream is None:
        stream = streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream), _full_float32:
        yield
    stream.synchronize()


class SharedSetting(Generic[Value]):
    """A setting of the process within a block, which several threads may enter; the last one to
    leave restores it.

    Args:
        read: Returns the setting.
        write: Changes it.
        value: The setting within the block.
    """

    def __init__(
        self, read: Callable[[], Value], write: Callable[[Value], object], value: Value
    ) -> None:
        self.read, self.write, self.value = read, write, value
        self.lock, self.inside, self.before = threading.Lock(), 0, value

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.before = self.read()
                self.write(self.value)
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.write(self.before)


# The bounds rest on the 24 bits of float32. TensorFloat-32, which training code and NVIDIA's
# containers (``TORCH_ALLOW_TF32_CUBLAS_OVERRIDE``) turn on for the whole process, has 11.
_full_float32 = SharedSetting(
    torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"
)


def zeros(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a matrix of zeros, float32 or float64; NumPy asks the system for huge pages, which
    torch does not.

    The first write to 64 MiB took 7 ms instead of 28 on an AMD EPYC, where a page fault takes 2 us.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(shape, np.float64 if dtype == torch.float64 else np.float32))


def move(block: Tensor, device: torch.device) -> Tensor:
    """Return a block on a device; it is copied to a GPU through pinned memory, so that the CPU does
    not wait.

    PyTorch keeps the pinned memory until the copy is complete, then reuses it.
    """
    if device.type != "cuda" or block.is_cuda:
        return block.to(device)
    return block.contiguous().pin_memory().to(device, non_blocking=True)


def move_if_small(matrix: Tensor) -> Tensor:
    """Return a matrix on the CPU if it is small, else where it is."""
    return matrix.cpu() if min(matrix.shape) <= CPU_SOLVER_UP_TO else matrix


def fetch(*tensors: Tensor) -> list[Tensor]:
    """Return tensors of one dtype on the CPU, copied in one transfer, so that it waits for a GPU
    once.
    """
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return list(tensors)
    whole = torch.cat([tensor.reshape(-1) for tensor in tensors]).cpu()
    parts = torch.split(whole, [tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
