"""What reaches a terminal: no control character, no command of a CI system, whatever inputs and
results contain.
"""

import json
import re
import sys
from collections import Counter

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_diag import catalog
from lora_diag.cli import output
from lora_diag.cli.output import print_annotated, print_json, print_message, print_result
from lora_diag.errors import InputError
from lora_diag.rendering.statements import make_statement
from lora_diag.rendering.tables import Column, Grid, grids_table
from lora_diag.reports.evidence import Evidence, Source
from lora_diag.reports.html import html_report
from lora_diag.reports.markdown import markdown_report
from lora_diag.running.progress import Progress
from tests.conftest import save_model
from tests.served import ROOT

NAME = "A\x1b]0;p\x07\u202e\x9b31m\x7f\u2028\n::error::pwned ##[error]x"
COLORS = re.compile(r"\x1b\[[\d;]*m")
FILES = (
    *("examples/curvature", "examples/intrinsic", "examples/spectrum", "examples/sweep"),
    *(
        "examples/tune",
        "evidence/outputs-bf16",
        "evidence/overlap-lora",
        "evidence/plan-merge-bf16",
    ),
    *("evidence/recover-bf16", "evidence/fisher"),
)


def unprintable(text: str) -> set[str]:
    return {char for char in text if not char.isprintable()} - {"\n"}


def starts_command(text: str) -> bool:
    return any(line.lstrip().startswith("::") for line in text.splitlines()) or "##[" in text


def strings_of(value, path=()):
    """Yield the path of every text in a record, of lists only in the first entry."""
    if isinstance(value, str):
        yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:1])
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        yield from strings_of(item, (*path, key))


def replaced(value, path):
    if not path:
        return NAME
    changed = value.copy()
    changed[path[0]] = replaced(value[path[0]], path[1:])
    return changed


def forged(file, folder):
    """Yield readable, unfinished results in which one text is another, for each text of each kind
    of record.
    """
    kinds = Counter()
    records = []
    for line in file.read_text(encoding="utf-8").splitlines()[:-1]:
        record = json.loads(line)
        kinds[record["record"]] += 1
        if kinds[record["record"]] <= 3:
            records.append(record)
    seen = set()
    for position, record in enumerate(records):
        for path in strings_of(record):
            key = (record["record"], *(step for step in path if isinstance(step, str)))
            if key in seen or path == ("record",):
                continue
            seen.add(key)
            changed = [*records[:position], replaced(record, path), *records[position + 1 :]]
            (folder / "forged.jsonl").write_text(
                "".join(f"{json.dumps(each)}\n" for each in changed)
            )
            try:
                yield key, catalog.read_results(folder / "forged.jsonl")
            except InputError:
                continue


def check_table(file, folder):
    tried = 0
    for key, results in forged(file, folder):
        try:
            text = catalog.table(results, 80, color=True)
        except InputError:
            continue
        tried += 1
        assert not unprintable(COLORS.sub("", text)), key
        assert not re.search(r"^\s*::", COLORS.sub("", text), re.MULTILINE), key
    assert tried


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_table_of_forged_results_is_printable(tmp_path, name):
    check_table(ROOT / "docs" / f"{name}.jsonl", tmp_path)


@pytest.fixture
def made(run, tmp_path):
    """Results of lint and of geometry, which no page has."""
    samples = ROOT / "sample_checkpoints"
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 8, "lora_alpha": 0.001}'
    )
    run("lint", samples / "base", "adapter_config.json", "--lr", "1", "-o", "lint.jsonl")
    run(
        "geometry",
        samples / "base",
        samples / "full_ft",
        "--layers",
        "0.*q_proj",
        "-o",
        "geometry.jsonl",
    )
    return tmp_path


@pytest.mark.slow
def test_table_of_forged_findings_is_printable(made, tmp_path):
    check_table(made / "lint.jsonl", tmp_path)
    check_table(made / "geometry.jsonl", tmp_path)


@pytest.mark.slow
def test_report_of_forged_results_is_printable(made, tmp_path, undrawn):
    for name in ("lint.jsonl", "geometry.jsonl"):
        for key, results in forged(made / name, tmp_path):
            evidence = Evidence((Source(NAME, results),))
            for page in (html_report(evidence), markdown_report(evidence)):
                assert not unprintable(page.replace("\t", "")), key


def test_rendered_values_have_no_control_characters():
    grid = Grid(NAME, "layer", (NAME,), (Column(NAME, (NAME,), "left"),))
    text = grids_table([grid], [make_statement("x", NAME, NAME)], 400, color=True)
    assert not unprintable(COLORS.sub("", text))
    assert not re.search(r"^\s*::", text, re.MULTILINE)


@pytest.fixture(params=["GITHUB_ACTIONS", "GITLAB_CI"])
def in_ci(request, monkeypatch):
    monkeypatch.setenv(request.param, "true")


HOSTILE_LINES = (
    "::error::a\n \t::stop-commands::b\n x ##[set-output name=v;]p ##[[ "
    "\x1b[0Ksection_start:1:s\r\x1b[0K"
)


def test_print_result_carries_no_command_in_ci(in_ci, capsys):
    print_result(HOSTILE_LINES)
    out = capsys.readouterr().out
    assert not starts_command(out)
    assert "section_start:" not in out
    assert not unprintable(out)
    assert out.count("\n") == 3


def test_print_result_escapes_control_characters(capsys, monkeypatch):
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    print_result(f"a {NAME}\r\nb")
    assert not unprintable(capsys.readouterr().out.replace("\r\n", "\n"))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    print_result("\x1b[1;31mred\x1b[0m \x1b]0;p\x07")
    assert capsys.readouterr().out == "\x1b[1;31mred\x1b[0m \\x1b]0;p\\x07\n"


def test_print_message_carries_no_command_in_ci(in_ci, capsys):
    print_message(HOSTILE_LINES)
    print_message(
        "Error: x/adapter_model.safetensors: ##[set-output name=verdict;]passed has no lora_B"
    )
    err = capsys.readouterr().err
    assert not starts_command(err)
    assert len(err.splitlines()) == 2


def test_print_json_decodes_to_same_strings(in_ci, capsys):
    record = {"layer": NAME + HOSTILE_LINES, NAME: ["é文\U0001f600", "section_end:1:s"]}
    print_json(json.dumps(record, ensure_ascii=False))
    (line,) = capsys.readouterr().out.splitlines()
    assert not unprintable(line)
    assert not starts_command(line)
    assert "section_end:" not in line
    assert json.loads(line) == record


def test_print_annotated_stops_commands_around_text(in_ci, capsys):
    print_annotated("::error::a\nb", ["::error title=x::##[error]y\x1b[0m"])
    first, *text, last, command = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"::stop-commands::\w{32}", first)
    assert last == f"::{first.rpartition(':')[2]}::"
    assert not any(map(starts_command, text))
    assert command.startswith("::error title=x::")
    assert "##[" not in command
    assert not unprintable(command)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [["inspect", "base"], ["inspect", "base", "--json"], ["spectrum", "base", "tuned"]]
)
def test_command_in_ci_carries_no_command(loradiag, tmp_path, words):
    """Names of tensors, of which inspect and spectrum make a row each with --by layer."""
    rng = np.random.default_rng(0)
    for folder in ("base", "tuned"):
        names = ("::error::pwned.weight", "##[error]pwned.weight", "a\x9b31m\u202e\x7f.weight")
        save_file(
            {name: rng.normal(size=(8, 8)) for name in names},
            save_model(tmp_path / folder, {}) / "m.safetensors",
        )
    for file in tmp_path.glob("*/model.safetensors"):
        file.unlink()
    words = words if "--json" in words else [*words, "--by", "layer"]
    ran = loradiag(*words, env={"GITHUB_ACTIONS": "true"})
    assert ran.code == 0, ran.err
    assert "pwned" in ran.out
    assert not starts_command(ran.out + ran.err)
    assert not unprintable(ran.out + ran.err)
    if "--json" in words:
        names = {tensor["layer"] for record in ran.records for tensor in record["tensors"]}
        assert "a\x9b31m\u202e\x7f.weight" in names


@pytest.mark.slow
def test_usage_error_carries_no_command(loradiag):
    ran = loradiag("inspect", "x\n::error::y", "--no\n::error::z", env={"GITHUB_ACTIONS": "true"})
    assert ran.code == 2
    assert not starts_command(ran.err)


def test_traceback_carries_no_command(in_ci, capsys, monkeypatch):
    from lora_diag.__main__ import _report_unexpected

    monkeypatch.setenv("LORADIAG_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["loradiag"])
    code = 0
    try:
        raise ValueError(NAME + HOSTILE_LINES)
    except ValueError as error:
        code = _report_unexpected(error)
    assert code == 3
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert not starts_command(err)
    assert not unprintable(err)


def test_pipe_gets_one_line_a_minute(monkeypatch, capsys):
    """By hand: a layer in 25 s, so a line after every third; 7 of 10 left take 175 s."""
    now = 1000.0
    monkeypatch.setattr(output, "monotonic", lambda: now)
    with output.progress_bar(quiet=False) as show:
        for done in range(11):
            show(Progress(f"layer{done}", done, 10))
            now += 25
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(" ")[2] for line in lines] == ["layer3", "layer6", "layer9"]
    assert ["3/10" in lines[0], "2.9 min" in lines[0]] == [True, True]
    with output.progress_bar(quiet=True) as show:
        for done in range(11):
            show(Progress("layer", done, 10))
            now += 100
    assert not capsys.readouterr().err
