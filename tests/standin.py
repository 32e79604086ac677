"""A stand-in for a GPU: tensors in the CPU's memory that say they are on ``cuda:0`` and refuse to
meet others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda:0")


class OnGpu(torch.Tensor):
    """A tensor on the stand-in."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU


def _to_cpu(value: Any) -> Any:
    if isinstance(value, OnGpu):
        return value.as_subclass(torch.Tensor)
    if isinstance(value, tuple | list):
        return type(value)(map(_to_cpu, value)) if type(value) in {tuple, list} else value
    return value


def _to_gpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.as_subclass(OnGpu)
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        parts = [_to_gpu(each) for each in value]
        return type(value)(parts) if type(value) is not tuple else tuple(parts)
    return value


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


# Copies between devices, and what may take an index from the CPU.
_MOVES = {
    "to",
    "cpu",
    "copy_",
    "pin_memory",
    "__get__",
    "item",
    "tolist",
    "__float__",
    "__int__",
    "__bool__",
}


# Results of these are awaited by the CPU, as are sizes that depend on values, and copies to the
# CPU.
_WAITS = {
    "cpu",
    "item",
    "tolist",
    "numpy",
    "nonzero",
    "bincount",
    "__float__",
    "__int__",
    "__bool__",
    "__index__",
}

# So are the error codes of these solvers, which torch reads.
_WAITS |= {
    f"linalg_{name}"
    for name in ("eigh", "eigvalsh", "svd", "svdvals", "cholesky", "inv", "pinv", "solve")
}


class StandIn(TorchFunctionMode):
    """Run code that is given ``GPU`` on the CPU; as on a GPU, tensors of both in one operation are
    an error.

    Attributes:
        waits: How often the CPU would have waited for the GPU.
    """

    waits = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = list(_tensors((*args, *kwargs.values())))
        name = getattr(func, "__name__", "")
        far = [tensor for tensor in given if isinstance(tensor, OnGpu)]
        near = [tensor for tensor in given if not isinstance(tensor, OnGpu) and tensor.dim() > 0]
        if name == "pin_memory":
            return args[0]
        if far and near and name not in _MOVES:
            raise RuntimeError(
                f"{name}: expected all tensors to be on one device, found cuda:0 and cpu"
            )
        on_gpu = bool(far) and name != "cpu"
        masked = name == "__getitem__" and any(
            index.dtype == torch.bool for index in _tensors(args[1:])
        )
        awaited = name in _WAITS or (masked and bool(far))
        args = list(args)
        wanted = [
            value for value in (*args[1:], kwargs.get("device")) if isinstance(value, torch.device)
        ]
        if name == "to" and len(args) > 1 and isinstance(args[1], torch.Tensor):
            on_gpu = isinstance(args[1], OnGpu)
        elif wanted:
            on_gpu = wanted[0].type == "cuda"
            args = [
                torch.device("cpu") if isinstance(value, torch.device) else value for value in args
            ]
            kwargs |= {"device": torch.device("cpu")} if "device" in kwargs else {}
        if name == "copy_" or (name.endswith("_") and args):
            on_gpu = isinstance(args[0], OnGpu)
        arrives = (
            name == "to" and on_gpu and not far and not kwargs.get("non_blocking")
        )  # from pageable memory
        self.waits += arrives or (
            bool(far) and (awaited or (name in {"to", "copy_"} and not on_gpu))
        )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(
                *_to_cpu(tuple(args)), **{key: _to_cpu(value) for key, value in kwargs.items()}
            )
        return _to_gpu(result) if on_gpu else result


@contextmanager
def stand_in() -> Iterator[torch.device]:
    """Give a device that behaves like a GPU within the block."""
    with StandIn():
        yield GPU


@contextmanager
def counted() -> Iterator[StandIn]:
    """Give the stand-in, which counts how often the CPU waits for it."""
    with StandIn() as mode:
        yield mode
