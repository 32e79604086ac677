"""Verdicts compared with an oracle that reads the JSON itself; cases that never pass."""

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_diag.errors import InputError, NothingComparedError, UsageError
from tests.gating.making import LAYERS, judge, left_out, residual, spectrum, write
from tests.messages import raises_naming


def judged(policy: str, *files):
    status, verdicts = judge(policy, *files)
    return status, {(v.rule, v.layer, v.group): v for v in verdicts}


def rule(require: str, more: str = "", coverage: str = "") -> str:
    return f'{coverage}\n[[rule]]\nname = "r"\nrequire = "{require}"\n{more}\n'


values = st.one_of(st.none(), st.integers(0, 40).map(lambda n: n / 20))
layer = st.tuples(values, st.sampled_from([0.0, 1.0, 1.0, 3.0]), st.booleans())


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(
    st.lists(layer, min_size=1, max_size=6),
    st.integers(0, 40).map(lambda n: n / 20),
    st.sampled_from(["", "max ", "median ", "share"]),
    st.sampled_from(["energy", "layers"]),
    st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    st.booleans(),
)
def test_rule_follows_definition(tmp_path_factory, layers, limit, kind, by, minimum, ignore):
    """Epsilon is null where drawn so; a third of the layers may be floor-limited; zero updates have
    no value.
    """
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(len(layers))]
    records = []
    for name, (value, fro, limited) in zip(names, layers, strict=True):
        verdict = "floor-limited" if limited else "resolved"
        resolution = spectrum(name, verdict=verdict)["resolution"]
        records.append(residual(name, "a", value if fro else None, fro=fro, resolution=resolution))
    path = write(
        tmp_path_factory.mktemp("r") / "r.jsonl", records, inputs=[("base", "b"), ("adapter", "a")]
    )
    text = (
        f"share of layers with epsilon <= {limit} is >= 0.5"
        if kind == "share"
        else f"{kind}epsilon <= {limit}"
    )
    policy = rule(
        text, 'floor = "ignore"' if ignore else "", f'[coverage]\nby = "{by}"\nminimum = {minimum}'
    )

    known, energy, lost_energy = [], 0.0, 0.0
    for value, fro, limited in layers:
        if value is not None and fro and (ignore or not limited):
            known.append(value)
            energy += fro**2
        else:
            lost_energy += fro**2
    share = (
        len(known) / len(layers)
        if by == "layers"
        else energy / (energy + lost_energy)
        if known
        else 0.0
    )
    if not known or share < minimum:
        wanted = "inconclusive"
    elif kind == "share":
        wanted = (
            "passed" if sum(value <= limit for value in known) / len(known) >= 0.5 else "failed"
        )
    elif kind == "median ":
        wanted = "passed" if statistics.median(known) <= limit else "failed"
    else:
        wanted = "passed" if max(known) <= limit else "failed"
    if kind == "" and any(value > limit for value in known):
        wanted = "failed"  # what is known to be wrong fails, whatever else is not known
    assert judged(policy, path)[0] == wanted


def test_each_layer_has_its_verdict_with_value_and_condition(tmp_path):
    path = write(tmp_path / "r.jsonl", [spectrum(LAYERS[0]), spectrum(LAYERS[1], s=(9.0, 1.0))])
    status, result = judged(rule("relative <= 0.08", 'message = "look"'), path)
    assert status == "failed"
    good, bad = result["r", LAYERS[0], ""], result["r", LAYERS[1], ""]
    assert (good.status, good.measured, good.message) == (
        "passed",
        pytest.approx(21**0.5 / 100),
        "",
    )
    assert (bad.status, bad.measured, bad.message) == (
        "failed",
        pytest.approx(82**0.5 / 100),
        "look",
    )
    assert (bad.allowed, bad.line) == ("relative <= 0.08", 2)
    status, result = judged(rule("relative <= 0.08", 'severity = "warning"'), path)
    assert (status, result["r", LAYERS[1], ""].status) == ("passed", "warned")


@pytest.mark.parametrize(
    ("selector", "chosen"),
    [
        ("", LAYERS),
        ("layers = 'q_proj'", LAYERS[::2]),
        ("exclude = 'q_proj'", LAYERS[1::2]),
        ("type = 'mlp\\..*'", LAYERS[1::2]),
        ("type = 'self_attn.q_proj'", LAYERS[::2]),
        ("depth = [1, 2]", LAYERS[2:]),
        ("depth = [1, 1]\nlayers = 'up'", LAYERS[3:4]),
    ],
)
def test_selectors_choose_by_name_type_and_depth(tmp_path, selector, chosen):
    path = write(tmp_path / "r.jsonl", [spectrum(name) for name in LAYERS])
    _, result = judged(rule("relative <= 1", selector), path)
    assert [key[1] for key in result if key[0] == "r"] == list(chosen)


def test_where_selects_records_and_must_match(tmp_path):
    records = [
        residual(name, a, e, role)
        for name in LAYERS[:2]
        for a, e, role in (("a", 0.1, "adapter"), ("t", 9.0, "reference"))
    ]
    path = write(
        tmp_path / "r.jsonl", records, inputs=[("base", "b"), ("adapter", "a"), ("reference", "t")]
    )
    assert judged(rule("epsilon <= 1", 'where = {role = "adapter"}'), path)[0] == "passed"
    assert judged(rule("epsilon <= 1"), path)[0] == "failed"
    with pytest.raises(UsageError, match="matches 'where'"):
        judged(rule("epsilon <= 1", 'where = {adapter = "else"}'), path)
    with raises_naming(UsageError, "residual record"):
        judged(rule("epsilon <= 1", "where = {step = 3}"), path)


def test_aggregates_are_per_adapter(tmp_path):
    records = [residual(name, a, e) for name in LAYERS for a, e in (("good", 0.1), ("bad", 0.9))]
    path = write(
        tmp_path / "r.jsonl",
        records,
        inputs=[("base", "b"), ("adapter", "good"), ("adapter", "bad")],
    )
    status, result = judged(rule("median epsilon <= 0.5"), path)
    assert status == "failed"
    assert {key[2]: v.status for key, v in result.items() if key[0] == "r"} == {
        "adapter good": "passed",
        "adapter bad": "failed",
    }


def test_gate_reports_adapter_without_records(tmp_path):
    records = [residual(name, "good", 0.1) for name in LAYERS]
    inputs = [("base", "b"), ("adapter", "good"), ("adapter", "lost")]
    path = write(tmp_path / "r.jsonl", records, inputs=inputs)
    assert judged(rule("epsilon <= 0.5"), path)[0] == "inconclusive"
    assert judged(rule("epsilon <= 0.5", 'where = {role = "adapter"}'), path)[0] == "inconclusive"
    assert judged(rule("median epsilon <= 0.5"), path)[0] == "inconclusive"


def test_missing_record_makes_layer_inconclusive(tmp_path):
    records = [
        residual(name, a, 0.1) for name in LAYERS for a in "ab" if (name, a) != (LAYERS[3], "b")
    ]
    path = write(
        tmp_path / "r.jsonl", records, inputs=[("base", "b"), ("adapter", "a"), ("adapter", "b")]
    )
    status, result = judged(rule("epsilon <= 0.5"), path)
    assert status == "inconclusive"
    assert [key for key, v in result.items() if v.status == "inconclusive"] == [
        ("r", LAYERS[3], "adapter b")
    ]


@pytest.mark.parametrize(
    ("reason", "shape", "comes_to"),
    [
        ("vector", (24,), "passed"),
        ("not_selected", (24,), "passed"),
        ("added_rows", (2, 32), "passed"),
        ("empty", (0, 32), "passed"),
        ("not_selected", (24, 32), "inconclusive"),
        ("only_in_tuned", (24, 32), "inconclusive"),
        ("only_in_base", (24, 32), "inconclusive"),
        ("not_float", (24, 32), "inconclusive"),
        ("shape_differs", (24, 32), "inconclusive"),
        ("non_finite", (24, 32), "failed"),
    ],
)
def test_unmeasured_matrix_is_reported(tmp_path, reason, shape, comes_to):
    path = write(
        tmp_path / "r.jsonl", [spectrum(LAYERS[0])], [left_out("other.weight", reason, shape)]
    )
    assert judged(rule("relative <= 1"), path)[0] == comes_to
    spared = f"[coverage]\nleft_out = ['{reason}']"
    if reason != "non_finite":
        assert judged(rule("relative <= 1", coverage=spared), path)[0] == "passed"
    assert judged(rule("relative <= 1", "exclude = 'other'"), path)[0] == (
        "failed" if reason == "non_finite" else "passed"
    )


@pytest.mark.parametrize(
    ("require", "layer", "named"),
    [
        ("certificate.gap <= 0.1", None, "loradiag allocate"),
        ("energy.12 >= 0.5", LAYERS[0], "4, 8, 16"),
    ],
)
def test_unmeasured_field_is_inconclusive_with_what_to_measure(tmp_path, require, layer, named):
    status, result = judged(rule(require), write(tmp_path / "r.jsonl", [spectrum(LAYERS[0])]))
    assert status == "inconclusive"
    assert named in result["r", layer, ""].message


def test_ambiguous_field_needs_record_kind(tmp_path):
    a = write(tmp_path / "a.jsonl", [spectrum(LAYERS[0])])
    b = write(
        tmp_path / "b.jsonl",
        [residual(LAYERS[0], "x", 0.1)],
        inputs=[("base", "b"), ("adapter", "x")],
    )
    assert judged(rule("fro <= 10"), a)[0] == "passed"
    with raises_naming(UsageError, "line 2", "fro", "spectrum.fro", "residual.fro"):
        judged(rule("fro <= 10"), a, b)
    assert judged(rule("spectrum.fro <= 10"), a, b)[0] == "passed"


def test_gate_judges_unrounded_values(tmp_path):
    path = write(
        tmp_path / "r.jsonl", [spectrum(LAYERS[0])], [left_out("norm.weight", "vector", (3,))]
    )
    assert judged(rule("end.left_out <= 1"), path)[0] == "passed"
    assert judged(rule("end.left_out < 1"), path)[0] == "failed"
    unfinished = write(tmp_path / "u.jsonl", [spectrum(LAYERS[0])], finished=False)
    assert judged(rule("end.left_out <= 1"), unfinished)[0] == "inconclusive"


def test_missing_or_damaged_results_never_pass(tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    for name in ("empty.jsonl", "absent.jsonl"):
        with pytest.raises(InputError):
            judged(rule("relative <= 1"), tmp_path / name)
    with pytest.raises(NothingComparedError):
        judged(rule("relative <= 1"), write(tmp_path / "none.jsonl", []))
    one = [spectrum(LAYERS[0])]
    assert (
        judged(rule("relative <= 1"), write(tmp_path / "u.jsonl", one, finished=False))[0]
        == "inconclusive"
    )
    assert judged(rule("relative <= 1e-9"), tmp_path / "u.jsonl")[0] == "failed"
    with pytest.raises(UsageError, match="at least one"):
        judged(rule("relative <= 1"))


def test_tiny_unjudged_layer_is_counted(tmp_path):
    records = [residual(LAYERS[0], "a", 0.1, fro=1.0), residual(LAYERS[1], "a", None, fro=1e-12)]
    path = write(tmp_path / "r.jsonl", records, inputs=[("base", "b"), ("adapter", "a")])
    assert judged(rule("epsilon <= 1"), path)[0] == "inconclusive"
    assert judged(rule("epsilon <= 1", "coverage = 0.999"), path)[0] == "passed"


def test_inconclusive_records_are_inconclusive(tmp_path):
    merge = {
        "record": "merge",
        "layer": "a.weight",
        "shape": [2, 2],
        "adapted": True,
        "dtype": "float32",
        "cause": "",
    }
    merge |= dict.fromkeys(
        ("differing", "differing_share", "max_ulp", "scale", "retained", "residual", "unchanged")
    )
    merge |= dict.fromkeys(("expected_fro", "observed_fro", "base_fro"))
    for status, comes_to in (
        ("ok", "passed"),
        ("dropped", "failed"),
        ("inconclusive", "inconclusive"),
    ):
        path = write(tmp_path / "m.jsonl", [merge | {"status": status}], command="verify-merge")
        assert judged(rule("merge.status in (ok, coarse)"), path)[0] == comes_to
