"""Order, concurrency, memory and failure of the local engine."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

import lora_diag
from lora_diag.errors import InputError
from lora_diag.running.engines import MachineLayout, run_local
from lora_diag.running.layers import LayerRun
from lora_diag.running.options import LayerOptions


def test_records_come_in_order_of_tasks():
    def slow_first(task):
        time.sleep(0.05 if task == 0 else 0)
        return task * 10

    result = list(run_local(slow_first, range(20), MachineLayout(4, 100), lambda task: 1))
    assert result == [task * 10 for task in range(20)]


@pytest.mark.parametrize(
    ("workers", "size", "at_once"), [(None, 1, 4), (None, 100, 1), (None, 40, 2), (3, 100, 3)]
)
def test_large_tasks_run_alone_and_small_ones_side_by_side(workers, size, at_once):
    running = most = 0
    lock, together = threading.Lock(), threading.Barrier(at_once)

    def measure(task):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        together.wait(300)  # for so many at once; and then for more, of whom there must be none
        time.sleep(0.02)
        with lock:
            running -= 1
        return torch.get_num_threads()

    list(run_local(measure, range(12), MachineLayout(4, 100, workers), lambda task: size))
    assert most == at_once


def test_threads_of_task_depend_on_its_size_alone():
    """And those of the caller are restored."""
    layout, before = MachineLayout(2, 100), torch.get_num_threads()
    result = list(
        run_local(lambda task: torch.get_num_threads(), [1, 90, 1, 90], layout, lambda task: task)
    )
    assert result == [1, 2, 1, 2]
    assert torch.get_num_threads() == before


def test_first_error_cancels_later_tasks():
    started = []

    def measure(task):
        started.append(task)
        if task == 3:
            raise InputError("three")
        time.sleep(0.01)
        return task

    result = []
    with pytest.raises(InputError, match="three"):
        result.extend(run_local(measure, range(1000), MachineLayout(2, 100), lambda task: 1))
    assert len(started) < 1000


def test_any_number_of_workers_gives_same_records(pair_of_models):
    base, tuned, *_ = pair_of_models
    one = lora_diag.spectrum(base, tuned, workers=1)
    for workers in (2, 5, None):
        other = lora_diag.spectrum(base, tuned, workers=workers)
        assert [record.layer for record in other] == [record.layer for record in one]
        for a, b in zip(one, other, strict=True):
            assert a.s == pytest.approx(b.s, rel=1e-6, abs=1e-12)


def test_only_large_layer_of_run_gets_all_cores(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    run = LayerRun("spectrum", {}, LayerOptions)
    run.use_numpy()
    large, small = (SimpleNamespace(layer="x", shape=(order, order)) for order in (4096, 512))
    for tasks, cores in (([large], 8), ([large] * 2, 4), ([small], 1)):
        assert run.layout(tasks).threads(20 * tasks[0].shape[0] ** 2) == cores
