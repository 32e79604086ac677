"""Calls from Python: errors name parameters, and one path or word in place of a list is refused."""

import inspect
import sys
import traceback

import pytest

import lora_diag
from lora_diag import catalog
from lora_diag.errors import UsageError
from lora_diag.records import Results
from tests.conftest import ROOT
from tests.messages import assert_names
from tests.reports.making import run

SAMPLES = ROOT / "sample_checkpoints"
PAIR = (SAMPLES / "base", SAMPLES / "full_ft")
SPECTRA = ROOT / "docs" / "examples" / "spectrum.jsonl"

LISTS = [
    (name, parameter)
    for name in catalog.functions()
    if not isinstance(getattr(lora_diag, name), type)
    for parameter, each in inspect.signature(getattr(lora_diag, name)).parameters.items()
    if str(each.annotation).removeprefix("collections.abc.").startswith(("Sequence[", "Iterable["))
]


@pytest.mark.parametrize(("name", "parameter"), LISTS)
def test_one_word_is_no_list(name, parameter):
    function = getattr(lora_diag, name)
    arguments = {
        each.name: ["x"] if (name, each.name) in LISTS else "x"
        for each in inspect.signature(function).parameters.values()
        if each.default is each.empty and each.kind is not each.VAR_POSITIONAL
    }
    with pytest.raises(UsageError, match=rf"^{parameter}='x': must be a list"):
        function(**arguments | {parameter: "x"})


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"ranks": "abc"}, ["ranks='abc'", "whole numbers", "[8]"]),
        ({"ranks": [4, "8"]}, ["ranks=[4, '8']", "whole numbers"]),
        ({"ranks": [0]}, ["ranks=[0]", "from 1 up"]),
        ({"top": "many"}, ["top='many'", "whole number"]),
        ({"tol": "small"}, ["tol='small'", "number"]),
        ({"kfac": True}, ["kfac", "needs activations"]),
        ({"device": "tpu"}, ["device='tpu'"]),
        ({"resume": True}, ["resume", "with output"]),
    ],
)
def test_errors_name_parameters(options, facts):
    with pytest.raises(UsageError) as caught:
        lora_diag.spectrum(*PAIR, **options)
    assert_names(str(caught.value), *facts)
    assert "--" not in str(caught.value)


def test_parameter_of_another_name_than_its_option():
    with pytest.raises(UsageError, match=r"^layer_weights: x is not a layer"):
        lora_diag.allocate(SPECTRA, params="50k", weights={"x": 1.0})
    with pytest.raises(UsageError, match=r"^allowed_ranks: "):
        lora_diag.allocate(SPECTRA, params="50k", ranks_from=[0])


@pytest.mark.parametrize(
    ("convert", "package", "command"),
    [
        ("to_pandas", "pandas", "pip install '.[pandas]'"),
        ("to_arrow", "pyarrow", "pip install '.[arrow]'"),
        ("to_polars", "polars", "pip install '.[arrow]' polars"),
    ],
)
def test_missing_package_is_one_line_without_the_import(monkeypatch, convert, package, command):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError) as caught:
        getattr(Results(run("gate"), ()), convert)()
    assert_names(str(caught.value), convert, package, command)
    assert "ModuleNotFoundError" not in "".join(traceback.format_exception(caught.value))
