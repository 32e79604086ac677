"""An option is declared once: Python's signature and help, and the command line, show that declaration."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

import lora_diag
from lora_diag import catalog
from lora_diag.cli.app import application
from lora_diag.errors import UsageError
from lora_diag.running.options import LayerOptions, RunOptions, fill_options, list_options, show_options
from tests.messages import assert_names

# Function -> some of its options with their defaults, written here a second time on purpose.
EXPECTED = {
    "spectrum": {"layers": None, "memory": None, "tol": 5e-4, "method": "auto", "resume": False, "on_record": None},
    "residual": {"exclude": None, "tol": 5e-4, "engine": None, "verify": False},
    "overlap": {"method": "auto", "seed": 0},
    "interference": {"tol": 5e-4, "output": None},
    "intruders": {"device": "auto", "workers": None},
    "verify_merge": {"allow_unmatched": False, "memory": None},
    "portability": {"alpha": None, "alpha_is_rank": False, "memory": None, "output": None},
    "subspaces": {"layers": None, "seed": 0, "workers": None},
    "fleet": {"device": "auto", "overwrite": False},
    "recover": {"memory": None, "tol": 5e-4, "overwrite": False},
    "extract": {"memory": None, "tol": 5e-4, "overwrite": False, "dtype": "float32"},
    "allocate": {"params": None, "method": "optimal", "ranks_from": None},
    "plan": {"ranks": (4, 8, 16, 64), "memory_budget": None},
    "gate": {"baseline": (), "shipped": ()},
    "plot": {"per": "layer", "width": "slide"},
    "report": {"format": None, "values": False},
    "tune": {"widen": 1, "ranks": (), "dry_run": False, "overwrite": False},
    "plan_merge": {"exclude": None, "output": None, "overwrite": False},
}
# Options that a function must not have: it could not heed them.
ABSENT = {
    "overlap": {"tol"},
    "subspaces": {"tol", "output", "memory", "engine"},
    "verify_merge": {"tol", "method", "seed", "device"},
    "fleet": {"memory", "tol", "method", "seed", "allow_unmatched"},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_signature_shows_every_option(name):
    parameters = inspect.signature(getattr(lora_diag, name)).parameters
    assert {option: parameters[option].default for option in EXPECTED[name]} == EXPECTED[name]
    assert all(parameters[option].kind is inspect.Parameter.KEYWORD_ONLY for option in EXPECTED[name])
    assert not ABSENT.get(name, set()) & set(parameters)
    assert all(each.kind is not inspect.Parameter.VAR_KEYWORD for each in parameters.values())


@pytest.mark.parametrize("name", EXPECTED)
def test_documentation_names_every_parameter(name):
    function = getattr(lora_diag, name)
    documented = [line.strip().partition(":")[0] for line in function.__doc__.splitlines()]
    assert [each for each in inspect.signature(function).parameters if each not in documented] == []


def test_documentation_names_choices():
    assert_names(lora_diag.overlap.__doc__, "method", "auto|exact|gram|krylov")


@pytest.mark.parametrize("name", EXPECTED)
def test_unknown_option_is_refused_before_work(name):
    function = getattr(lora_diag, name)
    required = [each for each in inspect.signature(function).parameters.values() if each.default is each.empty]
    given = {each.name: "x" for each in required if each.kind is each.KEYWORD_ONLY}
    places = ["sample_checkpoints/base"] * (len(required) - len(given))
    with pytest.raises(TypeError, match="'layer'"):
        function(*places, **given, layer="q_proj")


def commands(command):
    yield command
    for each in getattr(command, "commands", {}).values():
        yield from commands(each)


def test_command_line_matches_declaration():
    """By name, default and help; ``engine`` is three options there, and a callback none."""
    result = {command.name: command for command in commands(typer.main.get_command(application()))}
    for name in ("spectrum", "residual", "intruders", "interference", "extract", "recover"):
        shown = {each.name: each for each in result[name].params}
        assert {"ray_address", "gpus_per_task"} <= set(shown)
        for option, (_, each) in list_options(LayerOptions).items():
            own = name in {"extract", "recover"} and option in {"output", "overwrite"}
            if each.cli and not own:
                assert (shown[option].default, shown[option].help) == (each.default, each.help)
            assert each.cli or option == "engine" or option not in shown
    assert "tol" not in {each.name for each in result["overlap"].params}
    assert "method" not in {each.name for each in result["verify-merge"].params}


def test_every_function_with_options_is_checked_here():
    hidden = {name for name, load in catalog.functions().items() if hasattr(load(), "__signature__")}
    assert {name for name in hidden if not name.startswith(("probe_", "nuclear"))} == set(EXPECTED)


def test_filled_adds_defaults():
    result = fill_options(RunOptions, {"layers": "q_proj", "resume": True})
    assert (result["layers"], result["exclude"], result["resume"]) == ("q_proj", None, True)
    assert set(result) == set(list_options(RunOptions))


def test_option_group_with_postponed_annotations(tmp_path, monkeypatch):
    """A third-party group extends one of ours."""
    (tmp_path / "their_options.py").write_text(
        "from __future__ import annotations\nfrom typing import Annotated, Unpack\n"
        "from lora_diag.running.options import Option, Selection, show_options\n"
        "class Theirs(Selection, total=False):\n    p: Annotated[float, Option(2.0, 'Order of the norm.', 'P')]\n"
        "@show_options\ndef norm(base: str, **options: Unpack[Theirs]) -> None:\n"
        "    '''Measure.\n\n    Args:\n        base: Where.\n        **options: ``Theirs``.\n    '''\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from their_options import Theirs, norm

    assert list_options(Theirs)["p"][0] is float
    assert fill_options(Theirs, {}) == {"layers": None, "exclude": None, "p": 2.0}
    assert str(inspect.signature(norm).parameters["p"]) == "p: float = 2.0"
    assert_names(norm.__doc__, "p:", "Order")


def test_show_options_needs_group():
    with pytest.raises((ValueError, TypeError)):

        @show_options
        def without(base, **options):
            pass


def test_groups_are_read_without_heavy_imports():
    code = "import sys, lora_diag.running.options; print({'torch', 'numpy', 'pydantic', 'typer'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout == b"set()\n"


@pytest.mark.parametrize("option", [{"ray_address": "10.0.0.1:6379"}, {"gpus_per_task": 1.0}])
def test_cluster_options_without_cluster_are_refused(option):
    from lora_diag.cli.options import make_cluster

    with pytest.raises(UsageError, match="--engine ray"):
        make_cluster(**{"engine": "local", "ray_address": None, "gpus_per_task": 0.0, **option})


def test_resume_without_output_is_refused():
    from lora_diag.cli.options import check_output

    with pytest.raises(UsageError, match="-o"):
        check_output(None, resume=True, overwrite=False)
    check_output(Path("new.jsonl"), resume=False, overwrite=False)
