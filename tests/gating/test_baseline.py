"""A baseline is never fallen behind unnoticed, and never loosened."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_diag
from lora_diag.errors import InputError, UsageError
from tests.gating.making import ADAPTER, LAYERS, judge, residual, write
from tests.messages import assert_names, mentions, raises_naming


def policy(worse: str = "higher", tolerance: str = "0.1"):
    return f'[[baseline]]\nfield = "residual.epsilon"\nworse = "{worse}"\ntolerance = {tolerance}\n'


def file(path, epsilons, adapter="a", names=LAYERS, **changes):
    records = [
        residual(name, adapter, e, **changes) for name, e in zip(names, epsilons, strict=False)
    ]
    return write(path, records, inputs=(("base", "b"), ("adapter", adapter)))


def compare(tmp_path, now, before, rules=None):
    new, main = file(tmp_path / "new.jsonl", now), file(tmp_path / "main.jsonl", before)
    return judge(rules or policy(), new, baseline=main)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=5),
    st.integers(0, 10),
    st.sampled_from(["higher", "lower"]),
    st.booleans(),
)
def test_layer_fails_if_worse_than_tolerance(tmp_path_factory, pairs, tolerance, worse, relative):
    now, before = ([pair[i] / 8 for pair in pairs] for i in range(2))
    rules = policy(worse=worse, tolerance=f'"{tolerance}%"' if relative else str(tolerance / 8))
    _, verdicts = compare(tmp_path_factory.mktemp("b"), now, before, rules)
    expected = []
    for a, b in zip(now, before, strict=True):
        room = tolerance / 100 * b if relative else tolerance / 8
        expected.append(
            "passed" if (a <= b + room if worse == "higher" else a >= b - room) else "failed"
        )
    assert [v.status for v in verdicts if v.rule == "baseline.residual.epsilon"] == expected


def test_rerun_with_moved_adapter_is_compared_by_place(tmp_path):
    new = file(tmp_path / "new.jsonl", [0.5, 0.9], adapter="runs/2/adapter")
    main = file(tmp_path / "main.jsonl", [0.5, 0.5], adapter="runs/1/adapter")
    _, verdicts = judge(policy(), new, baseline=main)
    assert [v.status for v in verdicts if v.rule.startswith("baseline")] == ["passed", "failed"]
    assert_names(verdicts[-1].allowed, "0.5", "baseline")


def test_missing_layer_fails_and_new_is_inconclusive(tmp_path):
    status, gone = compare(tmp_path, [0.5], [0.5, 0.5])
    assert status == "failed"
    assert [(v.rule, v.layer) for v in gone if v.status == "failed"] == [("missing", LAYERS[1])]
    status, new = compare(tmp_path, [0.5, 0.5], [0.5])
    assert status == "inconclusive"
    assert [v.layer for v in new if v.status == "inconclusive"] == [LAYERS[1]]


def test_nulls_on_either_side_are_open(tmp_path):
    for now, before in (([None], [0.5]), ([0.5], [None])):
        assert compare(tmp_path, now, before)[0] == "inconclusive"


def test_baseline_with_duplicate_record_is_inconclusive(tmp_path):
    """The worse of the two last: comparing with it would let a regression pass."""
    new = file(tmp_path / "new.jsonl", [0.7])
    twice = [residual(LAYERS[0], "a", 0.5), residual(LAYERS[0], "a", 0.9)]
    main = write(tmp_path / "main.jsonl", twice, inputs=ADAPTER)
    status, verdicts = judge(policy(), new, baseline=main)
    assert status == "inconclusive"
    assert any(mentions(verdict.message, "nothing distinguishes") for verdict in verdicts)


def test_policy_and_baseline_require_each_other(tmp_path):
    new = file(tmp_path / "new.jsonl", [0.5])
    assert judge(policy(), new)[0] == "inconclusive"
    rules = '[[rule]]\nname = "r"\nrequire = "epsilon <= 1"'
    with raises_naming(UsageError, "nothing", "compared"):
        judge(rules, new, baseline=new)
    with pytest.raises(UsageError, match="--ratchet"):
        judge(rules, new, ratchet=True)


def test_unfinished_baseline_is_refused(tmp_path):
    new = file(tmp_path / "new.jsonl", [0.5])
    main = write(
        tmp_path / "main.jsonl", [residual(LAYERS[0], "a", 0.5)], inputs=ADAPTER, finished=False
    )
    with pytest.raises(InputError, match="cannot be a baseline"):
        judge(policy(), new, baseline=main)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(*[st.integers(0, 8)] * 4), min_size=1, max_size=5), st.integers(0, 4))
def test_ratchet_never_loosens(tmp_path_factory, layers, tolerance):
    """Two fields are compared; a stored record is exchanged only for one that is better in one and
    worse in none.
    """
    folder = tmp_path_factory.mktemp("r")
    rules = policy(tolerance=tolerance / 8)
    rules += policy("lower", tolerance / 8).replace("epsilon", "column_space.overlap")

    def space(overlap):
        return {"cosines": [], "overlap": overlap, "random": 0.1}

    def records(i, adapter):
        pairs = zip(LAYERS, layers, strict=False)
        return [
            residual(name, adapter, new[i] / 8, column_space=space(new[i + 2] / 8))
            for name, new in pairs
        ]

    new = write(folder / "new.jsonl", records(0, "x"), inputs=(("base", "b"), ("adapter", "x")))
    main = write(folder / "main.jsonl", records(1, "a"), inputs=ADAPTER)
    before = list(lora_diag.read_results(main))
    status, _ = judge(rules, new, baseline=main, ratchet=True)
    after = list(lora_diag.read_results(main))
    assert [record.layer for record in after] == [record.layer for record in before]
    for old, now, (e_new, e_old, c_new, c_old) in zip(before, after, layers, strict=False):
        better = e_new <= e_old and c_new >= c_old and (e_new, c_new) != (e_old, c_old)
        wanted = (
            (e_new / 8, space(c_new / 8))
            if better and status == "passed"
            else (e_old / 8, space(c_old / 8))
        )
        assert (now.epsilon, now.column_space.model_dump(mode="json")) == wanted
        assert (now.adapter, old.adapter) == ("a", "a")
    if status == "passed":
        assert judge(rules, new, baseline=main)[0] == "passed"


def test_ratchet_refuses_link(tmp_path):
    (tmp_path / "store").mkdir()
    main = file(tmp_path / "store" / "main.jsonl", [0.5, 0.5])
    link = tmp_path / "link.jsonl"
    link.symlink_to(main)
    new = file(tmp_path / "new.jsonl", [0.4, 0.5])
    with raises_naming(UsageError, "link.jsonl", "symbolic link"):
        judge(policy(), new, baseline=link, ratchet=True)
    judge(policy(), new, baseline=main, ratchet=True)
    assert [record.epsilon for record in lora_diag.read_results(main)] == [0.4, 0.5]
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["main.jsonl"]
    assert json.loads(main.read_text().splitlines()[-1])["layers"] == 2
