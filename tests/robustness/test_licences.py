"""What the program needs to run asks nothing of those who use it; and the page that says so names all of it."""

import tomllib

import pytest
from packaging.requirements import Requirement

from tests.robustness.licences import BEGIN, EXTRAS, PAGE, ROOT, forbidden, needed, rows


def test_every_licence_is_permissive() -> None:
    table = rows()
    assert {"torch", "numpy", "typer"} <= {name for name, _, when in table if when == "always"}
    assert {name: licence for name, licence, _ in table if forbidden(licence)} == {}


@pytest.mark.parametrize("expression", ["GPL-3.0-only", "MIT AND LGPL-2.1", "unknown", ""])
def test_others_are_noticed(expression: str) -> None:
    assert forbidden(expression)


def test_the_extras_are_all_there_are_but_that_for_tests() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS) - {""} == set(extras) - {"test", "audit"}


def test_the_page_has_every_package_that_is_asked_for() -> None:
    page = PAGE.read_text().partition(BEGIN)[2]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(x for e in EXTRAS if e for x in project["optional-dependencies"][e])]
    names = {Requirement(text).name.lower().replace("_", "-") for text in asked}
    assert {name for name in names if f"| {name} |" not in page} == set()
    assert needed("loradiag").keys() >= {"torch", "scipy"}
