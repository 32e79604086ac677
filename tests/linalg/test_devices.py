"""What happens on a GPU, with a stand-in for one: streams by thread, pinned copies, and the CPU as a fallback."""

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from lora_diag.errors import UsageError
from lora_diag.layers.change import on_device
from lora_diag.linalg import decompose, devices, difference
from tests.standin import counted

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")


@pytest.fixture
def log(monkeypatch):
    """Record what would be asked of CUDA."""
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


def test_each_thread_computes_on_one_stream_of_its_own(log):
    def two_layers():
        for _ in range(2):
            assert on_device(lambda device: log.append(f"computed on {device}"), GPU) == (None, "")

    in_a_thread(two_layers)
    in_a_thread(two_layers)
    layer = ["on stream {0}", "computed on cuda:0", "off stream {0}", "stream {0} is awaited"]
    assert log == [event.format(number) for number in (1, 1, 2, 2) for event in layer]


def test_cpu_needs_no_stream(log):
    assert on_device(lambda device: device.type, CPU) == ("cpu", "")
    assert log == []


def test_out_of_memory_on_gpu_falls_back_and_says_so(log):
    def compute(device):
        if device.type == "cuda":
            raise torch.cuda.OutOfMemoryError("no more")
        return 7

    found = []
    in_a_thread(lambda: found.append(on_device(compute, GPU)))
    assert found == [(7, " on the CPU: out of memory on cuda:0")]
    assert "cache emptied" in log


def test_copies_to_gpu_are_pinned_and_do_not_wait():
    block = torch.arange(3.0)
    assert devices.move(block, CPU) is block
    seen = []
    block = SimpleNamespace(is_cuda=False, contiguous=lambda: block, pin_memory=lambda: block)
    block.to = lambda device, non_blocking: seen.append((device, non_blocking))
    devices.move(block, GPU)
    assert seen == [(GPU, True)]


def test_krylov_waits_once_a_check_and_repeats_a_block():
    """40 equal values: the third block of 32 has 8 directions left, and two rounds do not orthonormalize the others."""
    matrix = torch.diag(torch.cat((torch.ones(40), torch.zeros(1160))))
    there = decompose(matrix, "krylov", 24, fro=40**0.5)
    with counted() as mode:
        found = decompose(devices.move(matrix, GPU), "krylov", 24, fro=40**0.5)
    assert found.method == there.method == "krylov:192"
    assert mode.waits == 7  # three checks, one of them repeated, two probes, and the values
    assert found.s.numpy() == pytest.approx(1.0, rel=1e-12)
    assert found.energy_error == pytest.approx(there.energy_error, rel=1e-6)


@pytest.mark.parametrize(("dtypes", "most"), [(("bfloat16", "bfloat16"), 7), (("bfloat16", "float32"), 10)], ids=str)
def test_layer_makes_cpu_wait_a_few_times(dtypes, most):
    """Whatever the number of blocks; and the numbers are those of the CPU."""
    seeded = torch.Generator().manual_seed(0)
    base = torch.randn(160, 200, generator=seeded).to(getattr(torch, dtypes[0]))
    tuned = (base.float() + torch.randn(160, 200, generator=seeded) / 50).to(getattr(torch, dtypes[1]))
    tuned[:, :9] = base[:, :9]

    def measure(device):
        found = difference(zip(base.split(20), tuned.split(20), strict=True), (160, 200), device)
        return found, decompose(found.matrix, fro=found.fro)

    with counted() as mode:
        found, factors = measure(GPU)
    own, there = measure(CPU)
    assert 1 <= mode.waits <= most
    assert float((factors.s - there.s).abs().max()) < 1e-6 * float(there.s[0])
    assert (found.unchanged, found.rounding.start) == (own.unchanged, own.rounding.start)
    assert found.fro == pytest.approx(own.fro, rel=1e-12)
    assert found.rounding.fro == pytest.approx(own.rounding.fro, rel=1e-2)


def test_other_errors_are_not_taken_for_lack_of_memory():
    def fails(device):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        on_device(fails, CPU)


def test_devices_that_are_not_there_are_refused():
    for word, said in (("cuda:99", "this torch sees"), ("mps", "no float64"), ("tpu", "use auto")):
        with pytest.raises(UsageError, match=said):
            devices.resolve_device(word)
