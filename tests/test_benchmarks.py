"""Benchmarks that judge: what they accept and what they refuse. No time is asserted."""

import math
from types import SimpleNamespace

import pytest

from benchmarks import gpu, quick


def test_quick_refuses_slower_kernels_only():
    stored = {"a": 1.0, "b": 2.0}
    assert quick.compare({"a": 1.29, "b": 1.0}, stored)[1]
    rows, good = quick.compare({"a": 1.31, "b": 2.0}, stored)
    assert not good
    assert [row[0] for row in rows if "SLOWER" in row[-1]] == ["a"]


def test_quick_refuses_kernels_without_stored_ratio():
    assert not quick.compare({"a": 1.0, "new": 1.0}, {"a": 1.0})[1]


@pytest.mark.slow
def test_gpu_benchmark_runs_and_checks_on_stand_in(capsys):
    assert gpu.main(["--device", "cpu", "--small"]) == 0
    table = capsys.readouterr().out
    assert "stand-in" in table
    assert not any(word in table for word in (gpu.EXCEEDED, gpu.FAILED, gpu.LATE))
    assert table.count("| `residual`: ε") == 1


@pytest.mark.slow
def test_gpu_benchmark_fails_on_wrong_values(monkeypatch, capsys):
    measured = gpu.spectrum

    def wrong(*sides, **options):
        for record in measured(*sides, **options):
            yield record.model_copy(update={"s": (record.s[0] * 1.001, *record.s[1:])})

    monkeypatch.setattr(gpu, "spectrum", wrong)
    for name in ("kernels", "small_orders", "whole", "residual"):
        monkeypatch.setattr(gpu, name, lambda *_, **__: ())
    assert gpu.main(["--device", "cpu", "--small"]) == 1
    assert gpu.EXCEEDED in capsys.readouterr().out


def test_gpu_comparison_of_fields_names_the_worst():
    def record(**values):
        return SimpleNamespace(
            energy_error=0.0, model_dump=lambda: {"s": (1.0,), "tail_error": 1.0, **values}
        )

    own = record(fro=1.0, energy={"4": 0.5}, note="a", missing=None)
    assert gpu.fields(
        [own], [record(fro=1.0, energy={"4": 0.5 + 1e-6}, note="b", missing=None)]
    ).startswith("2.0e-01")
    for other in (
        record(fro=1.0, energy={"4": 0.6}),
        record(fro=1.0, energy={}),
        record(fro=math.nan),
    ):
        assert gpu.EXCEEDED in gpu.fields([own], [other])
    assert "(energy.4)" in gpu.fields([own], [record(fro=1.0, energy={"4": 0.6})])
    assert gpu.EXCEEDED in gpu.fields([own], [])
