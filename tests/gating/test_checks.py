"""Built-in checks: each finds its fault, and nothing else does."""

import pytest

import lora_diag
from lora_diag.errors import InputError, NothingComparedError
from tests.gating.making import ADAPTER, LAYERS, judge, left_out, residual, spectrum, write
from tests.messages import raises_naming


def found(path, policy="[checks]\n"):
    status, verdicts = judge(policy, path)
    made = {"inputs", "complete", "base"}  # of results made by hand, whose inputs are nowhere and have no names
    message = [v for v in verdicts if v.status != "passed" and (v.status, v.rule in made) != ("not judged", True)]
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
        ("unused_rank", spectrum("x.weight", s=(4.0, 3.0, 1e-7), method="factored"), None, ADAPTER, "passed"),
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
        tmp_path / "r.jsonl", records, [lost] if lost else [], inputs=inputs or (("base", "b"), ("tuned", "t"))
    )
    status = "failed" if comes_to == "failed" else "warned"
    assert found(path) == (comes_to, [(name, "x.weight", status)])
    if name not in {"non_finite", "finished"}:
        assert found(path, f'[checks]\n{name} = "off"') == ("passed", [])
        assert found(path, f'[checks]\n{name} = "error"')[0] == "failed"


def test_dead_adapter_among_residuals_is_found(tmp_path):
    """A layer that has factors and no update; an adapter without factors (IA3, norms) only where it changes nothing."""
    alive = residual(LAYERS[0], "a", 0.5)
    for dead, wanted in (
        (residual(LAYERS[1], "a", 1.0, adapter_fro=0.0), [("dead", LAYERS[1], "failed")]),
        (residual(LAYERS[1], "a", 1.0, adapter_fro=0.0, rank=None), []),
    ):
        assert found(write(tmp_path / "r.jsonl", [alive, dead], inputs=ADAPTER))[1] == wanted
    nothing = [residual(name, "a", 1.0, adapter_fro=0.0, rank=None) for name in LAYERS]
    assert found(write(tmp_path / "r.jsonl", nothing, inputs=ADAPTER)) == ("failed", [("dead", None, "failed")])


def test_consistent_records_pass(tmp_path):
    """A frozen layer of a full fine-tune, a rank-1 adapter, an adapter that leaves a layer alone."""
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
    """A file of overlaps, say, given by mistake: exit code 4, and with a rule for it the checks say nothing."""
    record = {"record": "overlap", "layer": LAYERS[0], "shape": [4, 4], "step": 0, "rank": 2, "gradient_fro": 1.0}
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
    for field, value in (("fro", -1.0), ("base_fro", -1.0), ("energy", {"4": 7.0, "8": 1.0, "16": 1.0})):
        path = write(tmp_path / "r.jsonl", [spectrum(LAYERS[0]) | {field: value}])
        with raises_naming(InputError, "line 2", field):
            lora_diag.read_results(path)
