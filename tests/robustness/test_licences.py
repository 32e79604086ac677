"""The licences of run-time dependencies impose nothing on users, and the page lists all of them."""

import re

import pytest
from packaging.requirements import Requirement

from tests.robustness.licences import BEGIN, PAGE, cuda_licences, forbidden, needed, own, rows


def test_every_licence_is_permissive() -> None:
    table = rows()
    assert {"torch", "numpy", "typer"} <= {name for name, _, when in table if when == "always"}
    assert {name: licence for name, licence, _ in table if forbidden(licence)} == {}


def test_torch_adds_only_nvidia_licences() -> None:
    others = {
        name: licence
        for name, licence in cuda_licences().items()
        if forbidden(licence) and not re.match(r"nvidia-|cuda-toolkit$", name)
    }
    assert others == {}


@pytest.mark.parametrize("expression", ["GPL-3.0-only", "MIT AND LGPL-2.1", "unknown", ""])
def test_non_permissive_licence_is_detected(expression: str) -> None:
    assert forbidden(expression)


def test_doctor_page_lists_every_package() -> None:
    page = PAGE.read_text().partition(BEGIN)[2]
    names = {Requirement(text).name.lower().replace("_", "-") for text in own()}
    assert {name for name in names if f"| {name} |" not in page} == set()
    assert needed("loradiag").keys() >= {"torch", "scipy"}
