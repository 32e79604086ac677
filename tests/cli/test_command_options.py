"""The options of all commands together: one name, one meaning; former names; help; and how much a
command prints.
"""

import json
from collections import defaultdict

import pytest
import typer.main

import lora_diag
from lora_diag.cli import options
from lora_diag.cli.app import application
from lora_diag.errors import flag
from lora_diag.probes.intrinsic import IntrinsicOptions
from lora_diag.probes.truncation import TruncationOptions
from lora_diag.running.options import fill_options, rename_settings
from tests.conftest import ROOT, save_model, save_pair
from tests.messages import mentions

LINES = options.LINES  # before the fixture that shows all
SAMPLES = ROOT / "sample_checkpoints"

# What may differ between commands, with the reason.
DIFFERENT = {
    "--output": "each command names what it writes",
    "--format": "figures and reports have other formats",
    "--density": "interference has one default, and 0; merge has one by method",
    "--consumers": "portability has rules by version, lint only the newest",
    "--eval": "merge gives a text to the update that it tests",
    "--scales": "probe strength has strengths of an update, merge factors of the merge",
    "--directions": "intruders tests each, checkpoints compares their spaces",
    "--by": "a probe has the units that it can change alone",
    "--top": "plan estimates its cost",
    **dict.fromkeys(
        ("--alpha", "--dtype", "--lr", "--optimizer", "--steps", "--tokens"),
        "lint takes what a configuration says of one run",
    ),
    "--measure": "a probe has its own parts to leave out",
    "--to": "a format to merge into, or a service to send a report to",
    "--tuned": "gate measures it on --base; probe outputs also takes it as its first model",
}


def leaves(command, name=""):
    if not hasattr(command, "commands"):
        return {name: command}
    return {
        key: leaf
        for word, each in command.commands.items()
        for key, leaf in leaves(each, f"{name} {word}").items()
    }


COMMANDS = {
    name.strip(): command for name, command in leaves(typer.main.get_command(application())).items()
}


def visible(command):
    return [each for each in command.params if each.param_type_name == "option" and not each.hidden]


def test_option_names_are_consistent():
    meanings = defaultdict(set)
    for command in COMMANDS.values():
        for each in visible(command):
            for word in each.opts:
                meanings[word].add((each.metavar, each.help, each.is_flag, each.multiple))
    assert {word for word, result in meanings.items() if len(result) > 1} == {*DIFFERENT, "-o"}
    assert len(meanings) > 80


@pytest.mark.parametrize("command", COMMANDS)
def test_flag_is_spelled_as_its_parameter(command):
    for each in visible(COMMANDS[command]):
        assert [word for word in each.opts if word.startswith("--")] == [flag(each.name)]
        assert each.secondary_opts == []


def below_the_table(text):
    return text.rstrip("\n").split("\n\n")[-1].splitlines()


EXAMPLES = sorted((ROOT / "docs/examples").glob("*.jsonl"))


def stored_settings(path):
    with path.open(encoding="utf-8") as file:
        return json.loads(file.readline())["settings"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_settings_are_named_as_options(path):
    assert lora_diag.read_results(path).run.settings == stored_settings(path)


def test_settings_of_earlier_files_are_renamed():
    path = ROOT / "docs/evidence/curvature.jsonl"
    settings = lora_diag.read_results(path).run.settings
    assert settings["by"] == stored_settings(path)["per"]
    assert not {"per", "top", "probes"} & {*settings}


@pytest.mark.parametrize("former", ["granularity", "per"])
def test_each_former_name_of_option_is_known(former):
    assert rename_settings(TruncationOptions, {former: "type"}) == {"by": "type"}
    with pytest.raises(TypeError, match=f"'{former}'; use by"):
        fill_options(TruncationOptions, {former: "type"})


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [["inspect", path] for path in EXAMPLES], ids=[path.stem for path in EXAMPLES]
)
def test_summary_of_example_is_short(loradiag, words):
    short, whole = (below_the_table(loradiag(*words, brief=brief).out) for brief in (True, False))
    assert len(short) <= LINES < len(whole)
    assert short[-1].endswith("with -v")
    assert whole == below_the_table(loradiag(*words, "-v", brief=True).out)


def test_decisions_and_warnings_are_never_hidden():
    from io import StringIO

    from rich.console import Console

    from lora_diag.rendering.statements import limit_lines, make_statement, summary_of

    alarm = make_statement("alarm", "Warning", *(f"alarm {n}" for n in range(20)), level="warning")
    notes = [
        make_statement(f"note{n}", f"Note {n}", f"lead {n}", *["detail"] * 3, priority=2 - n % 3)
        for n in range(9)
    ]
    console = Console(file=StringIO(), width=40)
    with limit_lines(8):
        summary = summary_of([*notes, alarm], "loradiag inspect r.jsonl")
    console.print(summary)
    text = console.file.getvalue()
    assert "loradiag inspect r.jsonl" in text
    assert [n for n in range(20) if f"alarm {n}" in text] == [0]
    assert [n for n in range(9) if f"lead {n}" in text] == [1, 2, 4, 5, 8]
    assert "detail" not in text
    assert text.rstrip().endswith("50 more lines with -v")


@pytest.mark.parametrize("command", ["spectrum", "intruders", "recover"])
def test_tensor_of_another_shape_is_stated_first(loradiag, tmp_path, command):
    base, tuned, _, tensors = save_pair(tmp_path)
    name = "model.layers.0.mlp.up_proj"
    save_model(tuned, tensors | {f"{name}.weight": tensors[f"{name}.weight"][:-1]})
    summary = loradiag(command, base, tuned, brief=True).out.rpartition("\n\n")[2]
    assert mentions(" ".join(summary.splitlines()[:3]), "1 of another shape", name)


def test_unknown_and_missing_keywords_are_refused():
    with pytest.raises(TypeError, match="'runs'"):
        fill_options(IntrinsicOptions, {"data": "t", "runs": 3})
    with pytest.raises(TypeError, match="'seeds'; use repeats"):
        fill_options(IntrinsicOptions, {"data": "t", "seeds": 3})
    with pytest.raises(TypeError, match="'data'"):
        fill_options(IntrinsicOptions, {})
