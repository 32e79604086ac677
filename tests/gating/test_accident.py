"""Nobody passes by accident: what fails may turn into an error or an open question, never into a
pass.
"""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_diag.errors import LoradiagError
from tests.gating.making import LAYERS, judge, left_out, lines, sealed, spectrum

pytestmark = pytest.mark.slow

POLICY = """
[[rule]]
name = "drift"
require = "relative <= 0.09"
[[rule]]
name = "energy"
require = "energy.4 >= 0.5"
layers = "proj"
[[rule]]
name = "rank"
require = "max rank_at.0.9 <= 2"
"""


def comes_to(policy: str, content: bytes, folder) -> str:
    path = folder / "r.jsonl"
    path.write_bytes(content)
    try:
        return judge(policy, path)[0]
    except LoradiagError as error:
        return "error" if error.exit_code in {2, 3, 4} else f"exit code {error.exit_code}"


def content(records) -> bytes:
    return sealed(records).encode()


def failing() -> list[dict]:
    """Six layers, of which the third breaks two rules."""
    records = [spectrum(name, s=(8.0, 1.0)) for name in LAYERS]
    records[2] = spectrum(LAYERS[2], s=(9.0, 8.0, 7.0))
    return lines(records, [left_out("norm.weight", "vector", (3,))])


def passing() -> list[dict]:
    return lines([spectrum(LAYERS[0], s=(8.0, 1.0))], [left_out("norm.weight", "vector", (3,))])


def test_sample_checkpoints_match_their_names(tmp_path):
    assert comes_to(POLICY, content(failing()), tmp_path) == "failed"
    assert comes_to(POLICY, content(passing()), tmp_path) == "passed"


def test_file_cut_at_any_byte_does_not_pass(tmp_path):
    whole = content(passing())
    for end in range(len(whole) - 1):
        assert comes_to(POLICY, whole[:end], tmp_path) != "passed", end
    assert comes_to(POLICY, whole[:-1], tmp_path) == "passed"  # only its last newline is missing


def test_missing_line_does_not_pass(tmp_path):
    for records in (failing(), passing()):
        for i in range(len(records)):
            assert (
                comes_to(POLICY, content(records[:i] + records[i + 1 :]), tmp_path) != "passed"
            ), records[i]


def places(value, path=()):
    """Every place in a record that holds a number, a word, a list or a table."""
    if path:
        yield path
    inside = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in inside:
        yield from places(item, (*path, key))


def changed(record: dict, path: tuple, value) -> dict:
    copy = json.loads(json.dumps(record))
    inner = copy
    for step in path[:-1]:
        inner = inner[step]
    if value is KeyError:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return copy


def test_edited_value_does_not_pass(tmp_path):
    """Any value of any line, also of the last, which no hash covers; the other lines stay as they
    were.
    """
    whole = content(passing()).decode().splitlines()
    for i, line in enumerate(whole):
        for path in places(record := json.loads(line)):
            value = record
            for step in path:
                value = value[step]
            if isinstance(value, dict | list):
                continue
            edits = (
                (value * 1.01 + 1, None)
                if isinstance(value, int | float)
                else (f"{value}0", "", None)
            )
            for edit in edits:
                if (edited := changed(record, path, edit)) != record:
                    broken = [*whole[:i], json.dumps(edited), *whole[i + 1 :]]
                    assert comes_to(POLICY, "\n".join(broken).encode(), tmp_path) != "passed", (
                        path,
                        edit,
                    )


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "", KeyError, {}, []], ids=str)
def test_null_or_missing_value_of_failing_layer_does_not_pass(tmp_path, value):
    """From a layer that fails one rule, only the field of the rule is removed."""
    records = failing()
    for path in places(records[3]):
        if path[0] == "layer":
            continue
        broken = [*records[:3], changed(records[3], path, value), *records[4:]]
        assert comes_to(POLICY, content(broken), tmp_path) != "passed", (path, value)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_misspelled_policy_does_not_pass(tmp_path_factory, data):
    """One character of the policy is dropped, doubled or changed; the failing layer does not come
    through.

    Changed limits and names are another policy, not a misspelt one, so digits and the words in
    quotes are left alone, but for fields.
    """
    at = data.draw(st.sampled_from([i for i, char in enumerate(POLICY) if char.isalpha()]))
    edit = data.draw(st.sampled_from(["", POLICY[at] * 2, "x", "_", "."]))
    policy = POLICY[:at] + edit + POLICY[at + 1 :]
    folder = tmp_path_factory.mktemp("p")
    status = comes_to(policy, content(failing()), folder)
    assert status != "passed", policy


def test_policy_cut_at_any_byte_does_not_pass_what_fails(tmp_path):
    """Cut behind a whole rule it is a shorter policy that may be met: here its first rule fails
    already.
    """
    for end in range(len(POLICY)):
        assert comes_to(POLICY[:end], content(failing()), tmp_path) != "passed", POLICY[:end]


SELECTORS = [
    "layers = 'nothing'",
    "type = 'nothing'",
    "depth = [50, 60]",
    "exclude = '.'",
    "layers = '^$'",
]


@pytest.mark.parametrize("selector", SELECTORS)
def test_selector_without_match_does_not_pass(tmp_path, selector):
    for records in (failing(), passing()):
        assert comes_to(f"{POLICY}\n{selector}", content(records), tmp_path) == "error"


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(
        ["relative <= 0.09", "max relative <= 0.09", "p95 relative <= 0.09", "energy.4 >= 0.99"]
    ),
    st.lists(st.integers(0, len(LAYERS) - 1), max_size=3),
    st.booleans(),
)
def test_gate_misses_no_layer_when_records_are_removed(tmp_path_factory, require, gone, keep_count):
    """Layers are removed from the file; unless its last line is changed too, the gate reports
    missing layers.
    """
    records = [spectrum(name, s=(8.0, 1.0)) for name in LAYERS]
    kept = [record for i, record in enumerate(records) if i not in gone]
    whole, part = lines(records), lines(kept)
    end = part[-1] if keep_count and not gone else whole[-1]
    policy = f'[[rule]]\nname = "r"\nrequire = "{require}"'
    status = comes_to(policy, content([*part[:-1], end]), tmp_path_factory.mktemp("g"))
    assert (status == "passed") == (not gone)
