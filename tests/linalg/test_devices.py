"""What happens on a GPU, with a stand-in for one: streams by thread, pinned copies, and the CPU as
a fallback.
"""

import math
import sys
import threading
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lora_diag.deltas import pair
from lora_diag.layers.change import compute_on_device, load_change
from lora_diag.linalg import devices
from lora_diag.linalg.difference import Difference, difference
from lora_diag.linalg.methods import decompose
from lora_diag.storage import open_checkpoint
from tests.standin import counted

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")


@pytest.fixture
def log(monkeypatch):
    """Record calls that would go to CUDA."""
    events = []

    class Stream:
        made = 0

        def __init__(self, device):
            assert device == GPU
            Stream.made += 1
            self.name = f"stream {Stream.made}"

        def synchronize(self):
            events.append(f"{self.name} is awaited")

    @contextmanager
    def stream(one):
        events.append(f"on {one.name}")
        yield
        events.append(f"off {one.name}")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("cache emptied"))
    return events


def in_a_thread(work) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_each_thread_uses_its_own_stream(log):
    def two_layers():
        for _ in range(2):
            assert compute_on_device(lambda device: log.append(f"computed on {device}"), GPU) == (
                None,
                "",
            )

    in_a_thread(two_layers)
    in_a_thread(two_layers)
    layer = ["on stream {0}", "computed on cuda:0", "off stream {0}", "stream {0} is awaited"]
    assert log == [event.format(number) for number in (1, 1, 2, 2) for event in layer]


def test_gpu_multiplies_in_full_float32_in_all_threads(log):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # as training code does, or NVIDIA's containers
    try:
        with devices.use_own_stream(GPU):
            in_a_thread(lambda: compute_on_device(lambda device: None, GPU))
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (torch.cuda.OutOfMemoryError, "no more"),
        (RuntimeError, "CUDA error: out of memory"),
        (RuntimeError, "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    ],
)
def test_gpu_out_of_memory_falls_back_after_freeing_its_own(log, kind, words):
    attempts = []

    def compute(device):
        held = torch.zeros(3)
        attempts.append(weakref.ref(held))
        if device.type == "cuda":
            raise kind(words)
        return [attempt() is None for attempt in attempts]

    in_a_thread(lambda: log.append(compute_on_device(compute, GPU)))
    assert log[-1] == ([True, False], " on the CPU: out of memory on cuda:0")
    assert "cache emptied" in log


def test_krylov_waits_once_a_check_and_repeats_a_block():
    """40 equal values: the third block of 32 has 8 directions left, and two rounds do not
    orthonormalize the others.
    """
    matrix = torch.diag(torch.cat((torch.ones(40), torch.zeros(1160))))
    there = decompose(matrix, "krylov", 24, fro=40**0.5)
    with counted() as mode:
        result = decompose(devices.move(matrix, GPU), "krylov", 24, fro=40**0.5)
    assert result.method == there.method == "krylov:160"
    assert mode.waits == 7  # three checks, one of them repeated, two probes, and the values
    assert result.s.numpy() == pytest.approx(1.0, rel=1e-12)
    assert result.energy_error == pytest.approx(there.energy_error, rel=1e-6)


BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


CASES = [((BF16, BF16), 0.6), ((BF16, F32), 0.1), ((F32, F32), 0.0), ((F64, F16), 0.1)]


@pytest.mark.parametrize(("dtypes", "still"), CASES, ids=str)
def test_pass_over_a_layer_waits_once(monkeypatch, dtypes, still):
    """Whatever the number of blocks; decisions made on the GPU are those of the CPU on the same
    pieces.
    """
    monkeypatch.setattr(sys.modules[Difference.__module__], "GPU_PIECE_ENTRIES", 12_000)
    seeded = torch.Generator().manual_seed(0)
    stored = [torch.randn(160, 200, generator=seeded) * size for size in (0.02, 4e-4, 1e-2)]
    base = stored[0].to(BF16).to(dtypes[0])  # in float32 they are still bfloat16 numbers
    tuned = (base.double() + torch.cat((stored[1][:80], stored[2][80:]))).to(
        dtypes[1]
    )  # the second half moves far
    tuned[:, : int(200 * still)] = base[:, : int(200 * still)].to(dtypes[1])
    own = difference(zip(base.split(60), tuned.split(60), strict=True), (160, 200), CPU)
    with counted() as mode:
        there = difference(zip(base.split(20), tuned.split(20), strict=True), (160, 200), GPU)
    assert mode.waits == 1
    assert torch.equal(there.matrix.as_subclass(torch.Tensor), own.matrix)
    assert numbers(there) == pytest.approx(numbers(own), rel=1e-6, nan_ok=True)
    assert (there.mantissa, there.rounding.start) == (own.mantissa, own.rounding.start)


def numbers(found):
    rounding, noise = found.rounding, found.rounding.noise
    profile = [noise.unit**2 * noise.rows, noise.unit**2 * noise.columns]
    profile += [noise.unit**4 * noise.rows_fourth, noise.unit**4 * noise.columns_fourth]
    beta = rounding.base_rounding or (math.nan, math.nan)
    single = (
        found.fro,
        found.base_fro,
        found.unchanged,
        rounding.bound,
        rounding.base_fro,
        rounding.untouched,
    )
    return np.array([*single, *beta, rounding.sides, *torch.cat(profile).tolist()])


def test_not_finite_entry_of_a_gpu_is_located_by_the_cpu(tmp_path):
    matrix = torch.zeros(4, 5)
    matrix[2, 3] = math.inf
    for name, weight in (("base", torch.zeros(4, 5)), ("tuned", matrix)):
        save_file({"a.weight": weight}, tmp_path / f"{name}.safetensors")
    sides = (open_checkpoint(tmp_path / f"{name}.safetensors") for name in ("base", "tuned"))
    (delta,) = pair(*sides).deltas
    with counted():
        change = load_change(delta, GPU)
    assert "[2, 3]" in change.non_finite
