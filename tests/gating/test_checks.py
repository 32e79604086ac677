"""Built-in checks: each finds its fault, and nothing else does."""

import pytest

import lora_diag
from lora_diag.errors import InputError, NothingComparedError
from tests.gating.making import (
    ADAPTER,
    LAYERS,
    judge,
    left_out,
    lines,
    residual,
    sealed,
    spectrum,
    write,
)
from tests.messages import raises_naming


def found(path, policy="[checks]\n"):
    status, verdicts = judge(policy, path)
    made = {
        "inputs",
        "complete",
        "base",
    }  # of results made by hand, whose inputs are nowhere and have no names
    message = [
        v
        for v in verdicts
        if v.status != "passed" and (v.status, v.rule in made) != ("not judged", True)
    ]
    return status, [(v.rule, v.layer, v.status) for v in message]


@pytest.mark.parametrize(("about", "role"), [("adapter", "tuned"), ("tuned", "adapter")])
def test_policy_without_its_results_is_inconclusive(tmp_path, about, role):
    records = [spectrum(name, method="factored") for name in LAYERS]
    others = write(tmp_path / "others.jsonl", records, inputs=(("base", "b"), (role, "x")))
    policy = f'about = "{about}"\n[checks]\n'
    assert found(others, policy) == ("inconclusive", [("about", None, "inconclusive")])
    own = write(tmp_path / "own.jsonl", records, inputs=(("base", "b"), (about, "x")))
    assert found(own, policy) == ("passed", [])
    assert judge(policy, others, own)[0] == "passed"


@pytest.mark.parametrize(
    ("name", "record", "lost", "inputs", "comes_to"),
    [
        ("non_finite", None, left_out("x.weight", "non_finite"), (), "failed"),
        ("mismatch", None, left_out("x.weight", "not_in_base"), ADAPTER, "failed"),
        ("mismatch", None, left_out("x.weight", "shape_differs"), ADAPTER, "failed"),
        ("mismatch", None, left_out("x.weight", "needs_base"), ADAPTER, "failed"),
        ("dead", spectrum("x.weight", s=(0.0, 0.0)), None, ADAPTER, "failed"),
        (
            "unused_rank",
            spectrum("x.weight", s=(4.0, 3.0, 1e-7), method="factored"),
            None,
            ADAPTER,
            "passed",
        ),
        ("spike", spectrum("x.weight", s=(9.0, 1.0)), None, (), "passed"),
        ("spike", spectrum("x.weight", base_fro=3.9), None, (), "passed"),
        ("unresolved", spectrum("x.weight", verdict="unresolved"), None, (), "passed"),
    ],
)
def test_each_fault_is_found_by_its_check_alone(tmp_path, name, record, lost, inputs, comes_to):
    records = [record] if record else []
    if not record or record["record"] == "spectrum":
        records = [spectrum(LAYERS[0], method="factored"), *records]
    path = write(
        tmp_path / "r.jsonl",
        records,
        [lost] if lost else [],
        inputs=inputs or (("base", "b"), ("tuned", "t")),
    )
    status = "failed" if comes_to == "failed" else "warned"
    assert found(path) == (comes_to, [(name, "x.weight", status)])
    if name not in {"non_finite", "finished"}:
        assert found(path, f'[checks]\n{name} = "off"') == ("passed", [])
        assert found(path, f'[checks]\n{name} = "error"')[0] == "failed"


@pytest.mark.parametrize(
    ("s", "dtypes", "scaling", "is_dead"),
    [
        ((1e-39, 1e-39), ("float32", "float32"), (2.0, 2.0), True),
        ((1e-39, 0.0), ("bfloat16", "bfloat16"), None, True),
        ((1e-39, 0.0), ("float32", "float64"), None, True),
        ((2e-38, 0.0), ("float32", "float32"), (1.0, 1.0), False),
        ((2e-38, 0.0), ("float32", "float32"), (0.5, 0.5), False),
        ((1e-30, 0.0), ("float32", "float32"), (1e20, 1e20), True),
        ((1e-30, 0.0), ("float32", "float32"), (1.0, 1e20), False),
        ((2e-8, 1e-8), ("float32", "float16"), None, True),
        ((2e-8, 1e-8), ("float16", "float32"), None, False),
        ((4e-8, 1e-8), ("float16", "float16"), None, False),
    ],
)
def test_dead_counts_products_that_underflow(tmp_path, s, dtypes, scaling, is_dead):
    """Entries are at most ‖BA‖; float32 has normal numbers from 2^-126, float16 numbers that round
    to zero to 2^-25.
    """
    records = lines([spectrum("x.weight", s=s, dtypes=list(dtypes))], inputs=ADAPTER)
    records[0]["inputs"][1]["scaling"] = scaling
    (tmp_path / "r.jsonl").write_text(sealed(records))
    _, verdicts = judge("[checks]\n", tmp_path / "r.jsonl")
    (dead,) = [verdict for verdict in verdicts if verdict.rule == "dead"]
    assert dead.status == ("failed" if is_dead else "passed")
    assert ("underflows" in dead.message) == is_dead


def test_dead_residual_counts_underflow(tmp_path):
    dead = residual(LAYERS[1], "a", 1.0, adapter_fro=1e-84)
    wanted = ("failed", [("dead", LAYERS[1], "failed")])
    assert (
        found(write(tmp_path / "r.jsonl", [residual(LAYERS[0], "a", 0.5), dead], inputs=ADAPTER))
        == wanted
    )


@pytest.mark.parametrize(
    ("scaling", "status"),
    [((-2.0, -2.0), "failed"), ((-2.0, 1.0), "failed"), ((0.5, 2.0), "passed"), (None, None)],
)
def test_negative_scaling_fails(tmp_path, scaling, status):
    records = lines([spectrum("x.weight", method="factored")], inputs=ADAPTER)
    records[0]["inputs"][1]["scaling"] = scaling
    (tmp_path / "r.jsonl").write_text(sealed(records))
    outcome, verdicts = judge("[checks]\n", tmp_path / "r.jsonl")
    assert outcome == (status or "passed")
    assert [verdict.status for verdict in verdicts if verdict.rule == "negative"] == (
        [status] if status else []
    )


def test_dead_adapter_among_residuals_is_found(tmp_path):
    """A layer that has factors and no update; an adapter without factors (IA3, norms) only where it
    changes nothing.
    """
    alive = residual(LAYERS[0], "a", 0.5)
    for dead, wanted in (
        (residual(LAYERS[1], "a", 1.0, adapter_fro=0.0), [("dead", LAYERS[1], "failed")]),
        (residual(LAYERS[1], "a", 1.0, adapter_fro=0.0, rank=None), []),
    ):
        assert found(write(tmp_path / "r.jsonl", [alive, dead], inputs=ADAPTER))[1] == wanted
    nothing = [residual(name, "a", 1.0, adapter_fro=0.0, rank=None) for name in LAYERS]
    assert found(write(tmp_path / "r.jsonl", nothing, inputs=ADAPTER)) == (
        "failed",
        [("dead", None, "failed")],
    )


def test_consistent_records_pass(tmp_path):
    """A frozen layer of a full fine-tune, a rank-1 adapter, an adapter that leaves a
    layer alone.
    """
    pair = [spectrum(LAYERS[0]), spectrum(LAYERS[1], s=(0.0, 0.0))]
    assert found(write(tmp_path / "a.jsonl", pair)) == ("passed", [])
    one = [spectrum(LAYERS[0], s=(4.0,), method="factored")]
    assert found(write(tmp_path / "b.jsonl", one, inputs=ADAPTER)) == ("passed", [])
    alone = [residual(LAYERS[0], "a", 1.0, rank=0, adapter_fro=0.0), residual(LAYERS[1], "a", 0.5)]
    assert found(write(tmp_path / "c.jsonl", alone, inputs=ADAPTER)) == ("passed", [])


def test_spike_limit_comes_from_policy(tmp_path):
    path = write(tmp_path / "r.jsonl", [spectrum(LAYERS[0], s=(2.0, 1.0))])  # 0.8
    assert found(path)[1] == []
    assert found(path, "[checks]\nspike_above = 0.79")[1] == [("spike", LAYERS[0], "warned")]
    (spike,) = [v for v in judge("[checks]\nspike_above = 0.79", path)[1] if v.rule == "spike"]
    assert (spike.measured, spike.allowed) == (pytest.approx(0.8), "spike <= 0.79")


def test_built_in_checks_alone_do_not_pass_empty_results(tmp_path):
    """A file of overlaps, say, given by mistake: exit code 4, and with a rule for it the checks say
    nothing.
    """
    record = {
        "record": "overlap",
        "layer": LAYERS[0],
        "shape": [4, 4],
        "step": 0,
        "rank": 2,
        "gradient_fro": 1.0,
    }
    record |= dict.fromkeys(("kappa", "tangent", "left", "right"), 0.5)
    record |= dict.fromkeys(("kappa_random", "tangent_random", "left_random", "right_random"), 0.1)
    path = write(tmp_path / "o.jsonl", [record | {"method": "exact", "verdict": "resolved"}])
    with raises_naming(NothingComparedError, "anything else"):
        found(path)
    status, bad = found(path, '[[rule]]\nname = "k"\nrequire = "kappa >= 0.4"')
    assert status == "passed"
    assert {(rule, status) for rule, _, status in bad} == {
        (rule, "not judged") for rule in ("dead", "unused_rank", "spike", "unresolved")
    }


def test_impossible_norm_or_fraction_is_refused(tmp_path):
    for field, value in (
        ("fro", -1.0),
        ("base_fro", -1.0),
        ("energy", {"4": 7.0, "8": 1.0, "16": 1.0}),
    ):
        path = write(tmp_path / "r.jsonl", [spectrum(LAYERS[0]) | {field: value}])
        with raises_naming(InputError, "line 2", field):
            lora_diag.read_results(path)
