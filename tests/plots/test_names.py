"""What runs are called: by what they measured, and never alike."""

import pytest

from lora_diag.records import Run, RunInput
from lora_diag.rendering.figures.series import Options, names_of, series_of, split_series
from tests.plots import making


def run(*inputs, command="spectrum", **settings):
    sides = tuple(RunInput(role=role, path=path, kind="", tensors=1) for role, path in inputs)
    return Run(command=command, version="0", inputs=sides, settings=settings)


BASE, FULL = ("base", "m/base"), ("tuned", "m/full")
ADAPTERS = [("adapter", f"runs/r{rank}") for rank in (4, 8, 16)]


@pytest.mark.parametrize(
    ("runs", "files", "names"),
    [
        ([run(BASE, FULL), run(*ADAPTERS)], (), ["full", "r4 + r8 + r16"]),
        ([run(BASE, ("tuned", "a/x")), run(BASE, ("tuned", "b/x"))], (), ["a/x", "b/x"]),
        ([run(BASE, FULL, top=8), run(BASE, FULL)], (), ["top 8", "default settings"]),
        ([run(BASE, a=[1] * 20), run(BASE, a=[2] * 20)], (), ["base (1)", "base (2)"]),
        ([run(BASE, FULL), run(BASE, FULL)], ("a/r.jsonl", "b/r.jsonl"), ["a/r", "b/r"]),
    ],
)
def test_runs_of_one_command_are_distinguished(runs, files, names):
    assert names_of(runs, files=files) == names


def test_adapters_of_several_runs_keep_own_names():
    def results(adapters, tuned="full"):
        return making.results(
            [making.residual("h.0.q.weight", 1, 1, 0.3, 0.2, adapter=a) for a in adapters],
            name=tuned,
        )

    def labels(*runs):
        return [one.label for one in split_series(series_of(runs), Options())]

    assert labels(results(["runs/r4", "runs/r16"]), results(["runs/svd"])) == ["r4", "r16", "svd"]
    assert labels(results(["a/lora", "b/lora"])) == ["a/lora", "b/lora"]
    assert labels(results(["runs/r4"], "one"), results(["runs/r4"], "two")) == [
        "one: r4",
        "two: r4",
    ]
