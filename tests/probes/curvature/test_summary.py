"""What is said of a bound that holds, of one that does not, and of a trace that cannot be told from zero."""

import pytest

from lora_diag.inspection.tables import table
from lora_diag.probes.curvature.record import Curvature, LossBound, Surrogate
from lora_diag.records import Results, Run

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


def said(*records, width=200):
    text = table(Results(RUN, (), whole=records), width)
    return " ".join(text.split())


def test_summary_calls_loose_bound_loose_and_near_model_near():
    told = said(joint(), bound(), bound(along=0.1, linear=1e-4, quadratic=1.9e-4, upper=0.1, gap=2.9e-4))
    assert "(λ/2)Σσ² is 500 to 500 times the measured gap: far too loose to choose a rank by" in told
    assert "at the truncated weights it gives 1.00 to 1.00 of the measured gap; within 10% at r=4" in told
    assert "at or above the gap at all 2 points measured" in told
    assert "⟨∇L, E⟩ is 5% of the measured gap at r=4: small beside the gap" in told
    assert "(tr H/2n)Σσ² is 0.02 at r=4; ½⟨E,HE⟩ is 0.019" in told
    assert "μ = -3: the loss bends down in some directions, so it is not convex there" in told


def test_bound_that_is_exceeded_says_where_and_why():
    told = said(joint(), bound(holds=False, upper=0.001, curvature=0.1))
    assert "is exceeded at r=4 at 1: λ is measured at TUNED alone" in told
    told = said(joint(), bound(holds=False, upper=0.001, curvature=60.0))
    assert "is exceeded at r=4 at 1: curvature on the way exceeds λ" in told
    assert "exceeds λ at the points measured" in told


def test_gap_that_is_nothing_or_negative_has_no_ratio_of_bounds():
    told = said(joint(), bound(gap=-0.01, linear=-0.02, quadratic=0.01), bound(rank=8, gap=0.0))
    assert "times the measured gap" not in told


def test_distance_near_zero_is_no_divisor():
    told = said(joint(trace_error=80.0), bound())
    assert "not to be told from zero; more --trace-vectors would say" in told
    assert "tr H/2n" not in told
    told = said(joint(matrix="ggn", smallest=1e-4), bound())
    assert "never below zero but for rounding" in told
    assert "μ = 1.0e-04 is rounding of zero" in told
    told = said(joint(smallest=1.0), bound(lower=0.2))
    assert "the loss is strongly convex there" in told


@pytest.mark.parametrize("is_joint", [True, False])
def test_share_of_joint_eigenpairs_stands_once(is_joint):
    held = Surrogate(
        eigenpairs=10,
        joint=is_joint,
        share=0.12,
        random=0.01,
        pairs_at=8,
        rank_at={"0.9": 5, "0.95": 6, "0.99": 7},
        rank=9,
    )
    layers = [
        joint(layer=f"model.layers.{i}.mlp.up_proj.weight", at="base", eigenvalues=(), surrogate=held) for i in (0, 1)
    ]
    text = table(Results(RUN, (), whole=(joint(at="base"), *layers)), 100, per="layer")
    rows = text[: text.index("Compared")]
    assert rows.count("12%") == (1 if is_joint else 2)
    assert "it has rank 5 to 5 at 90%" in " ".join(text.split())
    assert all(len(line) <= 100 for line in text.splitlines())


def test_run_without_records_yet_says_so():
    assert "the run did not finish" in said()
