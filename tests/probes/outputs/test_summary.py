"""The summary of ``probe outputs``: the choice is shown first, whatever the number of models."""

import numpy as np
import pytest

from lora_diag.probes.outputs.show import outputs_lines, suggest_next
from lora_diag.records import Probe, Results, Run
from lora_diag.rendering.statements import find, limit_lines, summary_of
from lora_diag.rendering.text import to_text


def compared(losses, sequences=40):
    """Results for adapters whose loss is above that of the best by a value each, the same on every sequence."""
    rng = np.random.default_rng(0)
    counts = rng.integers(20, 60, sequences)
    hard = counts * rng.uniform(1, 3, sequences)
    records = []
    for name, above in {"": 0.5, **losses}.items():
        nll = hard + counts * (above + 0.001 * rng.normal(size=sequences))
        subject, predictions = ("adapter", ()) if name else ("base", tuple(counts.tolist()))
        loss = float(nll.sum() / counts.sum())
        records.append(
            Probe(probe="outputs", set="held_out", subject=subject, name=name, tokens=int(counts.sum()), data="0",
                  loss=loss, nll=tuple(nll), predictions=predictions)
        )  # fmt: skip
    settings = {"length": 128, "dtype": "float32", "device": "cpu", "tokens": "byte tokens"}
    run = Run(command="probe outputs", version="0", inputs=(), settings=settings)
    return Results(run, (), (), None, tuple(records))


@pytest.mark.parametrize("count", [2, 9, 30])
def test_summary_shows_best_of_many_checkpoints(count):
    losses = {f"runs/checkpoint-{step}": 0.1 + 0.01 * abs(step - 1) for step in range(count)}
    results = compared(losses)
    assert find(outputs_lines(results), "on").lead.startswith(f"use checkpoint-1, the best of {count};")
    with limit_lines(8):
        text = to_text(summary_of(outputs_lines(results)), 80, False)
    assert "use checkpoint-1," in text
    hint = suggest_next(results, {"base": "base"})
    assert hint.command == "portability runs/checkpoint-1 base"


def test_summary_names_equal_checkpoints_in_one_line():
    statement = find(outputs_lines(compared({f"r{rank}": 0.1 for rank in range(9)})), "on")
    assert statement.lead.endswith("not significantly worse: all")
    assert len(statement.lead) < 80
