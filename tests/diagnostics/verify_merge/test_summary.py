"""The table of ``verify-merge`` is a function of its records."""

import pytest

from lora_diag.catalog import read_results, table
from lora_diag.diagnostics.verify_merge.record import CORRECT, Merge, outcome
from lora_diag.diagnostics.verify_merge.show import ORDER, REMEDIES, merge_lines
from lora_diag.records import End, Results, Run, RunInput
from lora_diag.rendering.statements import find

RIGHT = {
    "layer": "model.layers.0.self_attn.q_proj.weight", "shape": (12, 12), "adapted": True, "status": "ok",
    "dtype": "bfloat16", "differing": 0, "differing_share": 0.0, "max_ulp": 0.5, "scale": 0.99, "retained": 0.99,
    "residual": 0.1, "unchanged": 0.05, "expected_fro": 1.0, "observed_fro": 1.0, "base_fro": 10.0, "cause": "",
}  # fmt: skip


def record(**changes) -> Merge:
    return Merge(**(RIGHT | changes))


def wrong(status: str, **changes) -> Merge:
    return record(**({"status": status, "retained": None, "differing": 144, "differing_share": 1.0} | changes))


def results(*records: Merge, left_out=(), finished=True) -> Results:
    inputs = tuple(RunInput(role=role, path=role, kind="a file", tensors=1) for role in ("base", "adapter", "merged"))
    run = Run(command="verify-merge", version="0", inputs=inputs, settings={})
    end = End(layers=len(records), left_out=len(left_out), fro=None, base_fro=None) if finished else None
    return Results(run, records, tuple(left_out), end)


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([record()], "correct"),
        ([record(), record(layer="b", status="coarse")], "correct"),
        ([record(), wrong("dropped", layer="b")], "failed"),
        ([record(), wrong("changed", layer="b", adapted=False)], "failed"),
        ([record(), wrong("missing", layer="b", unchanged=None)], "failed"),
        ([record(), record(layer="b", status="inconclusive")], "inconclusive"),
        ([wrong("dropped", layer="b"), record(layer="c", status="inconclusive")], "failed"),
        ([record(unchanged=1.0, scale=0.0, retained=0.0)], "inconclusive"),
        ([record(expected_fro=0.0, scale=None, retained=None)], "inconclusive"),
        ([record(adapted=False, expected_fro=0.0)], "inconclusive"),
        ([], "inconclusive"),
    ],
)
def test_summary_pools_layers(records, expected):
    assert outcome(records) == expected
    correct = find(merge_lines(results(*records)), "correct")
    levels = {"correct": "ok", "inconclusive": "warning", "failed": "failure"}
    assert (correct.level if correct else None) == (levels[expected] if records else None)


def test_failing_statuses_come_first_with_remedy():
    failing = [status for status in ORDER if record(status=status).failed]
    assert set(REMEDIES) == set(failing)
    assert list(ORDER[: len(failing)]) == failing
    assert set(ORDER) >= CORRECT


def test_names_and_causes_from_files_are_escaped():
    evil = wrong("dropped", layer="q\x1b[2J", cause="\x1b[31m")
    assert "\x1b" not in table(results(evil), per="layer")


def test_older_merge_records_are_read(tmp_path):
    result = results(record(), wrong("missing", layer="b", dtype=None, unchanged=None, scale=None))
    result.write(tmp_path / "r.jsonl")
    read = read_results(tmp_path / "r.jsonl")
    assert (read.run, read.layers, read.left_out) == (result.run, result.layers, result.left_out)
    assert table(read_results(tmp_path / "r.jsonl")) == table(result)
