"""Policies: each kind of mistake is one message with its line."""

import re

import pytest

from lora_diag.errors import UsageError
from lora_diag.gating.policy import READY, read_policy, ready_policy
from tests.messages import raises_naming

GOOD = """\
title = "x"

[[rule]]
name = "drift"
require = "relative <= 0.3"
"""


WAIVER = """\
[[waiver]]
rule = "drift"
layers = "x"
reason = "y"
expires = 2030-01-01
"""


@pytest.mark.parametrize(
    ("line", "printed", "text"),
    [
        (6, "unknown key 'requir'", GOOD + 'requir = "x"'),
        (1, 'about is "adapter" or "tuned"', 'about = "base"\n' + GOOD),
        (6, "severity is", GOOD + 'severity = "fatal"'),
        (6, "the first and the last block", GOOD + "depth = [1]"),
        (6, "selects nothing", GOOD + "depth = [3, 1]"),
        (6, "a number from 0 to 1", GOOD + "coverage = 90"),
        (6, "never 'adaptor'", GOOD + 'where = {role = "adaptor"}'),
        (5, "always true", GOOD.replace("relative <= 0.3", "energy.16 <= 1")),
        (5, "require is text", GOOD.replace('"relative <= 0.3"', "0.3")),
        (4, "built-in", GOOD.replace("drift", "spike")),
        (7, "second rule", GOOD + GOOD.replace('title = "x"\n\n', "")),
        (1, "no [[rule]]", "title = 'x'"),
        (6, "not a valid regular expression", GOOD + f"layers = '{'(' * 5000}{')' * 5000}'"),
        (6, "list of tables", "[checks]\n\n\n\n\n[rule]\nname = 'x'"),
        (7, "spike is", GOOD + "[checks]\nspike = 'never'"),
        (7, "always an error", GOOD + "[checks]\nnon_finite = 'off'"),
        (7, "no effect", GOOD + "[checks]\nspike_above = 1"),
        (7, "cannot be left out", GOOD + "[coverage]\nleft_out = ['non_finite']"),
        (7, "is not a number", GOOD + "[[baseline]]\nfield = 'limited_by'\nworse = 'lower'"),
        (6, "'worse' is missing", GOOD + "[[baseline]]\nfield = 'epsilon'"),
        (
            9,
            "tolerance is",
            GOOD + "[[baseline]]\nfield = 'epsilon'\nworse = 'higher'\ntolerance = -1",
        ),
        (
            7,
            "no rule is called 'drft'; did you mean 'drift'",
            GOOD + WAIVER.replace("drift", "drft"),
        ),
        (7, "cannot be waived", GOOD + WAIVER.replace("drift", "inputs")),
        (8, "waives every layer", GOOD + WAIVER.replace('"x"', '""')),
        (9, "text in quotes that gives the reason", GOOD + WAIVER.replace('"y"', '" "')),
        (10, "a date", GOOD + WAIVER.replace("2030-01-01", "'2030-01-01'")),
        (4, "is not valid TOML", "title = 'x'\n\n[[rule]]\nname drift"),
        (
            6,
            "value of the whole run",
            GOOD.replace("relative <= 0.3", "certificate.gap <= 0.1") + "layers = 'x'",
        ),
    ],
)
def test_policy_error_names_line(line, printed, text):
    with pytest.raises(UsageError) as error:
        read_policy("p.toml", text)
    message = str(error.value)
    result = re.match(r"p\.toml: line (\d+): (.*)", message, re.DOTALL)
    assert result, message
    assert printed in result[2], message
    assert int(result[1]) == line, message


def test_invalid_policies_are_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin.toml").write_bytes(b"title = '\xe9'")
    for file in (tmp_path / "absent.toml", tmp_path / "folder", tmp_path / "latin.toml"):
        with pytest.raises(UsageError, match=r"no such file|cannot be read as a policy"):
            read_policy(file)


@pytest.mark.parametrize("name", READY)
def test_every_ready_policy_is_valid_and_states_fixes(name):
    policy = ready_policy(name)
    assert policy.title
    assert all(rule.message for rule in policy.rules)
    assert any(rule.severity == "error" for rule in policy.rules)


def test_unknown_ready_policy_lists_policies():
    with pytest.raises(UsageError, match="adapter-basic"):
        ready_policy("../secrets")
    with raises_naming(UsageError, "no such file", "--policy"):
        read_policy("merge")
