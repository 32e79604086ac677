"""Calls from Python: errors name parameters, and one path or word in place of a list is refused."""

import ast
import inspect
import re
import sys
import traceback

import pytest

import lora_diag
from lora_diag import catalog
from lora_diag.cli.options import CLUSTER, DISPLAY
from lora_diag.errors import UsageError
from lora_diag.records import Results
from lora_diag.running.options import list_options
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


def test_function_is_found_beside_empty_folder(monkeypatch, tmp_path):
    """The byte code of a package that was renamed may stay in a clone."""
    (tmp_path / "spectrum").mkdir()
    monkeypatch.setattr(lora_diag, "__path__", [*lora_diag.__path__, str(tmp_path)])
    assert lora_diag.spectrum.__name__ == "spectrum"


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
        ({"ranks": 8}, ["ranks=8", "whole numbers", "[8]"]),
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


def test_errors_of_named_values_are_about_the_parameter():
    with pytest.raises(UsageError, match=r"^layer_weights: x is not a layer"):
        lora_diag.allocate(SPECTRA, params="50k", layer_weights={"x": 1.0})
    with pytest.raises(UsageError, match=r"^allowed_ranks: "):
        lora_diag.allocate(SPECTRA, params="50k", allowed_ranks=[0])


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


def texts_of_errors():
    """Yield (file, text) of what is wrong and what to do, in every error of the package."""
    for path in sorted((ROOT / "lora_diag").rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(getattr(call, "func", None), "id", "")
            if name == "damaged" or name.endswith("Error"):
                nodes = [node for argument in call.args[1:] for node in ast.walk(argument)]
                yield from (
                    (path.name, node.value)
                    for node in nodes
                    if isinstance(node, ast.Constant) and isinstance(node.value, str)
                )


@pytest.mark.slow
def test_texts_of_errors_name_options_as_parameters():
    groups = [
        group for _, feature, each in catalog.commands() for group in feature.option_groups(each)
    ]
    options = {name for group in groups for name in list_options(group)} | {*DISPLAY, *CLUSTER}
    texts = list(texts_of_errors())
    named = [(name, file) for file, text in texts for name in re.findall(r"\$([a-z_]+)", text)]
    assert [(name, file) for name, file in named if name not in options] == []
    assert len(named) > 80
    flags = [(file, text) for file, text in texts if re.search(r"(^|\s)--[a-z]", text)]
    commands = ("... --resume", "ray start --head")  # as typed, in Python too
    assert [text for _, text in flags if not any(each in text for each in commands)] == []
