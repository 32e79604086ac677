"""The table of ``verify-merge`` is a function of its records."""

import pytest

from lora_diag.diagnostics.verify_merge.faults import Fit
from lora_diag.diagnostics.verify_merge.record import CORRECT, Merge, outcome
from lora_diag.diagnostics.verify_merge.show import ORDER, REMEDIES, merge_lines
from lora_diag.records import Results
from lora_diag.rendering.statements import find
from tests.building import build, results

RIGHT = {
    "layer": "q",
    "shape": (12, 12),
    "adapted": True,
    "status": "ok",
    "scale": 0.99,
    "retained": 0.99,
}
RIGHT |= {
    "differing": 0,
    "differing_share": 0.0,
    "unchanged": 0.05,
    "expected_fro": 1.0,
    "cause": "",
}
RIGHT |= {
    "dtype": "bfloat16",
    "max_ulp": 0.5,
    "residual": 0.1,
    "observed_fro": 1.0,
    "base_fro": 10.0,
}


def record(**changes) -> Merge:
    return build(Merge, **(RIGHT | changes))


def wrong(status: str, **changes) -> Merge:
    return record(
        **({"status": status, "retained": None, "differing": 144, "differing_share": 1.0} | changes)
    )


def results_of(*records: Merge) -> Results:
    inputs = [(role, role) for role in ("base", "adapter", "merged")]
    return results(records, command="verify-merge", inputs=inputs)


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
    correct = find(merge_lines(results_of(*records)), "correct")
    levels = {"correct": "ok", "inconclusive": "warning", "failed": "failure"}
    assert (correct.level if correct else None) == (levels[expected] if records else None)


def test_failing_statuses_come_first_with_remedy():
    failing = [status for status in ORDER if record(status=status).failed]
    assert set(REMEDIES) == set(failing)
    assert list(ORDER[: len(failing)]) == failing
    assert set(ORDER) >= CORRECT


def test_layers_with_one_wrong_scale_are_stated_together():
    """Fits of one scale differ by their errors; another scale is a cause of its own."""
    fits = (("a", 1.4999999987, 2e-9), ("b", 1.5000000021, 3e-9), ("c", 1.5001, 3e-9))
    causes = {
        name: f"ΔW was added times {Fit(factor, error, 1e-8, None)}, which"
        for name, factor, error in fits
    }
    assert causes["a"] == "ΔW was added times 1.50 ± 2e-09, which"
    found = find(
        merge_lines(
            results_of(*(wrong("wrong scale", layer=n, cause=c) for n, c in causes.items()))
        ),
        "wrong_scale",
    )
    assert [line.partition(":")[0] for line in found.lines] == ["a, b", "c"]
