"""An option is declared once: Python's signature and help, and the command line, show that
declaration.
"""

import inspect
import subprocess
import sys

import pytest

from lora_diag import catalog
from lora_diag.errors import UsageError
from lora_diag.running.options import LayerOptions, fill_options, list_options
from tests.messages import assert_names

# Options that a function must not have: it could not heed them.
ABSENT = {
    "overlap": {"tol"},
    "subspaces": {"tol", "output", "memory", "engine"},
    "verify_merge": {"tol", "svd", "seed", "device"},
    "fleet": {"memory", "tol", "svd", "seed", "allow_unmatched"},
}


# Functions of features that take options; those of probes need a model.
FUNCTIONS = {
    name: load()
    for name, load in catalog.functions().items()
    if hasattr(load(), "__signature__") and not name.startswith(("probe_", "nuclear"))
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature_and_documentation_name_every_option(name):
    function = FUNCTIONS[name]
    parameters = inspect.signature(function).parameters
    assert not ABSENT.get(name, set()) & set(parameters)
    assert all(each.kind is not inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    documented = [line.strip().partition(":")[0] for line in function.__doc__.splitlines()]
    assert [each for each in parameters if each not in documented] == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_unknown_option_is_refused_before_work(name):
    function = FUNCTIONS[name]
    required = [
        each
        for each in inspect.signature(function).parameters.values()
        if each.default is each.empty
    ]
    given = {each.name: "x" for each in required if each.kind is each.KEYWORD_ONLY}
    places = ["sample_checkpoints/base"] * (len(required) - len(given))
    with pytest.raises(TypeError, match="'layer'"):
        function(*places, **given, layer="q_proj")


def test_option_group_with_postponed_annotations(tmp_path, monkeypatch):
    """A third-party group extends one of ours."""
    (tmp_path / "their_options.py").write_text(
        "from __future__ import annotations\nfrom typing import Annotated, Unpack\n"
        "from lora_diag.running.options import Option, Selection, show_options\n"
        "class Theirs(Selection, total=False):\n    p: Annotated[float, Option(2.0, 'Order of the "
        "norm.', 'P')]\n"
        "@show_options\ndef norm(base: str, **options: Unpack[Theirs]) -> None:\n"
        "    '''Measure.\n\n    Args:\n        base: Where.\n        **options: ``Theirs``.\n    "
        "'''\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from their_options import Theirs, norm

    assert list_options(Theirs)["p"][0] is float
    assert fill_options(Theirs, {}) == {"layers": None, "exclude": None, "p": 2.0}
    assert str(inspect.signature(norm).parameters["p"]) == "p: float = 2.0"
    assert_names(norm.__doc__, "p:", "Order")


def test_groups_are_read_without_heavy_imports():
    code = (
        "import sys, lora_diag.running.options; print({'torch', 'numpy', 'pydantic', 'typer'} & "
        "set(sys.modules))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout
        == b"set()\n"
    )


@pytest.mark.parametrize("option", [{"ray_address": "10.0.0.1:6379"}, {"gpus_per_task": 1.0}])
def test_cluster_options_without_cluster_are_refused(option):
    from lora_diag.cli.options import make_cluster

    with pytest.raises(UsageError, match="--engine ray"):
        make_cluster(**{"engine": "local", "ray_address": None, "gpus_per_task": 0.0, **option})


def test_resume_without_output_is_refused():
    with pytest.raises(UsageError, match="-o"):
        fill_options(LayerOptions, {"resume": True})
    fill_options(LayerOptions, {"resume": True, "output": "new.jsonl"})
