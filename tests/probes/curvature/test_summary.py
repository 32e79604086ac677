"""Summaries of bounds that hold or not, and of traces."""

import pytest

from lora_diag.catalog import table
from lora_diag.probes.curvature.record import Curvature, LossBound
from lora_diag.probes.curvature.show import curvature_lines
from lora_diag.records import Results, Run
from lora_diag.rendering.statements import find

SETTINGS = {"length": 8, "dtype": "float32", "device": "cpu", "tokens": "bytes"}
RUN = Run(command="probe curvature", version="0", inputs=(), settings=SETTINGS)


def joint(**change):
    fields = {
        "layer": None,
        "at": "tuned",
        "matrix": "hessian",
        "params": 1000,
        "loss": 1.0,
        "gradient": 0.5,
        "eigenvalues": (50.0, 20.0),
        "residual": 1e-4,
        "smallest": -3.0,
        "trace": 100.0,
        "trace_error": 10.0,
    }
    return Curvature(set="held", data="0", tokens=9, **{**fields, **change})


def bound(**change):
    fields = {
        "rank": 4,
        "along": 1.0,
        "tail_energy": 0.4,
        "linear": 0.001,
        "quadratic": 0.019,
        "upper": 10.0,
        "lower": None,
        "curvature": 0.1,
        "loss": 1.02,
        "gap": 0.02,
        "gap_error": 0.01,
        "holds": True,
    }
    return LossBound(set="held", data="0", tokens=9, **{**fields, **change})


SITUATIONS = {
    "loose bound and near model": (
        *(joint(), bound()),
        bound(along=0.1, linear=1e-4, quadratic=1.9e-4, upper=0.1, gap=2.9e-4),
    ),
    "exceeded, less curved on the way": (joint(), bound(holds=False, upper=0.001, curvature=0.1)),
    "exceeded, more curved on the way": (joint(), bound(holds=False, upper=0.001, curvature=60.0)),
    "negative and no gap": (joint(), bound(gap=-0.01, linear=-0.02, quadratic=0.01), bound(rank=8, gap=0.0)),
    "trace near zero": (joint(trace_error=80.0), bound()),
    "GGN": (joint(matrix="ggn", smallest=1e-4), bound()),
    "strongly convex": (joint(smallest=1.0), bound(lower=0.2)),
    "nothing yet": (),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_summary_states_bound_of_any_situation(situation):
    records = SITUATIONS[situation]
    results = Results(RUN, (), whole=records)
    assert all(len(line) <= 100 for line in table(results, 100).splitlines())
    statement = find(curvature_lines(results), "bound")
    assert (statement is None) == (not records)
    if records:
        assert ("exceeded" in statement.lead) == any(not r.holds for r in records if isinstance(r, LossBound))
        assert bool(statement.answer) == any(r.gap > 1e-6 for r in records if isinstance(r, LossBound))
