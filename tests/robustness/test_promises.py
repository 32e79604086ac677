"""The page of promises names tests that exist."""

import re

from tests.conftest import ROOT

PAGE = ROOT / "docs" / "explanation" / "promises.md"


def test_every_promise_names_existing_tests() -> None:
    rows = [
        line
        for line in PAGE.read_text().splitlines()
        if line.startswith("| ") and "promise" not in line
    ]
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", row)
        assert named, row
        for file, test in named:
            text = (ROOT / "tests" / file).read_text()
            assert not test or re.search(rf"^def {test}\(", text, re.MULTILINE), f"{file}::{test}"
