"""Line numbers: those that a reader would count."""

import tomllib

import pytest

from lora_diag.decisions.gate.lines import line_of, lines_of_tables

TEXT = '''# a comment
title = "x"
long = """
[[rule]]
name = "not this one"
"""
many = [
  1,

  2,
]

[[rule]]  # first
name = "a"
where = {role = "adapter", rank = 3}

[[rule]]
"name" = "b"
"a.b" = "x"
multi = [
  "q",
  "r"]

[checks]
spike = "off"
a.b = 3
[coverage] # last
minimum = 1'''


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ((), 1),
        (("title",), 2),
        (("long",), 3),
        (("many",), 7),
        (("many", 1), 7),
        (("rule",), 13),
        (("rule", 0), 13),
        (("rule", 0, "name"), 14),
        (("rule", 0, "where", "rank"), 15),
        (("rule", 0, "absent"), 13),
        (("rule", 1), 17),
        (("rule", 1, "name"), 18),
        (("rule", 1, "a.b"), 19),
        (("rule", 1, "multi"), 20),
        (("checks", "spike"), 25),
        (("checks", "a", "b"), 26),
        (("coverage",), 27),
        (("coverage", "minimum"), 28),
        (("nowhere",), 1),
    ],
)
def test_value_is_found_on_its_line(path, line):
    assert line_of(TEXT, path) == line


def test_headers_of_tables_are_found_outside_strings():
    assert lines_of_tables(TEXT, "rule") == [line_of(TEXT, ("rule", number)) for number in range(2)] == [13, 17]


def test_long_files_are_searched_quickly():
    """Fewer than 40 readings of a file of 3,000 lines."""
    text = "".join(f'[[rule]]\nname = "r{i}"\nrequire = "epsilon <= 1"\n' for i in range(1000))
    read, count = tomllib.loads, 0

    def counted(piece):
        nonlocal count
        count += 1
        return read(piece)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tomllib, "loads", counted)
        assert line_of(text, ("rule", 700, "require")) == 2103
    assert count < 40
