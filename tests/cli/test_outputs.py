"""One rule for every output of every command, found by looking at the application: a new one is
tested unasked.

No input of these commands exists, so what refuses an output did it before any work.
"""

import inspect
import json
import os
from operator import attrgetter
from pathlib import Path
from typing import get_args

import pytest
import typer.main

import lora_diag
from lora_diag.cli.app import application
from lora_diag.files import PAGE, write_whole
from lora_diag.records import Run, to_line, totals
from lora_diag.running.options import OUTPUT
from tests.conftest import ROOT
from tests.messages import mentions

pytestmark = pytest.mark.slow

PAIR = [str(ROOT / "sample_checkpoints" / name) for name in ("base", "lora_r4")]
TRAINED = '{\n  "alpha_pattern": {},\n  "peft_type": "LORA",\n  "r": 8\n}'
UNFINISHED = to_line(Run(command="overlap", version="1", inputs=(), settings={})) + "\n"
FINISHED = UNFINISHED + to_line(totals((), ())) + "\n"

# Where an output needs a name of its own, and what of that name a stranger may have written.
NAMES = {"plot": "out.png", "allocate": "out.json", "report": "out.html", "model_card": "out.md"}
FOREIGN = {
    ".png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(17) + b"\0\0\0\x0ftEXtSoftware\0Matplotlib",
    ".json": TRAINED.encode(),
    ".html": b"<!doctype html>\n<p>mine</p>\n",
    ".jsonl": b'{"text": "mine"}\n',
    ".md": b"\x00\x01weights",
}


def commands(command, words=()):
    inner = getattr(command, "commands", None)
    if inner is None:
        yield words, command
    for name, each in (inner or {}).items():
        yield from commands(each, (*words, name))


def has_path(annotation):
    return annotation is Path or any(map(has_path, get_args(annotation)))


def outputs():
    for words, command in commands(typer.main.get_command(application())):
        kinds = inspect.signature(command.callback, eval_str=True).parameters
        options = {each.name: each for each in command.params if each.opts[0].startswith("-")}
        required = []
        for each in command.params:
            if each.required and each.name != "output":
                word = (
                    each.metavar.split("|")[0]
                    if each.metavar and "|" in each.metavar
                    else "missing"
                )
                required += [each.opts[0], word] if each.name in options else [word]
        required += ["--yes"] if "yes" in options else []
        required = (
            ["missing", "one", "two"] if words[0] == "merge" else required
        )  # two updates or more
        for name, option in options.items():
            if has_path(kinds[name].annotation) and option.rich_help_panel == OUTPUT:
                yield pytest.param(
                    [*words, *required], option.opts[0], name, id=" ".join((*words, option.opts[0]))
                )
    yield pytest.param(["gate", "init", "missing"], "-o", "policy", id="gate init -o")


OUTPUTS = list(outputs())

# Commands whose output is a folder.
FOLDERS = {"extract", "merge", "tune"}


def names_of(words, name):
    return NAMES.get(name) or NAMES.get(words[0] if name == "output" else "", "out.jsonl")


@pytest.fixture
def run(run):
    """Return the exit code of a command and what it writes to standard error."""
    return lambda *words: attrgetter("code", "err")(run(*words))


def state(folder):
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else path.is_file() and path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_commands_and_their_outputs_are_found():
    result = {
        " ".join(each.values[0]).removesuffix(" missing") + " " + each.values[1] for each in OUTPUTS
    }
    assert len(OUTPUTS) >= 22
    assert {"gate --model-card", "extract missing --output", "plot --output"} <= result


@pytest.mark.parametrize(("words", "option", "name"), OUTPUTS)
def test_unsafe_paths_are_refused_before_work(run, tmp_path, words, option, name):
    """Links, foreign files, files of another kind, folders: nothing changes, and the message gives
    a fix.
    """
    out = tmp_path / names_of(words, name)
    folder = words[0] in FOLDERS
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x00weights")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "kept").write_text("mine")
    write_whole(tmp_path / "page", "<!doctype html>", PAGE)

    def refused(told, *, overwrite_too):
        before = state(tmp_path)
        for more in ([], ["--overwrite"])[: 1 + overwrite_too]:
            code, err = run(*words, option, out.name, *more)
            assert (code, told in err, out.name in err) == (2, True, True), err
            assert state(tmp_path) == before
        out.unlink()

    for target in ("adapter_model.safetensors", "gone", "there"):
        out.symlink_to(target)
        if words[0] == "plot" and target == "there":  # a folder of figures may be a link to one
            out.unlink()
            continue
        refused("is a symbolic link", overwrite_too=True)
    way_out = (
        "is a file" if folder else "name ends in .md" if name == "model_card" else "--overwrite"
    )
    out.write_bytes(FOREIGN[out.suffix])
    refused(way_out, overwrite_too=folder or name == "model_card")
    if words[0] != "report":
        out.write_bytes((tmp_path / "page").read_bytes())
        refused("is not" if not folder else way_out, overwrite_too=folder)
    if not folder:
        out.write_text(UNFINISHED)
        refused("unfinished", overwrite_too=True)
    if not folder and out.suffix != ".jsonl":
        out.write_text(FINISHED)
        refused("is not", overwrite_too=False)
    out.mkdir()
    (out / "kept").write_text("mine")
    if (
        words[0] == "plot"
    ):  # of figures; each file in it is looked at when it is known which are drawn
        return
    before = state(tmp_path)
    for more in ([], ["--overwrite"]):
        assert run(*words, option, out.name, *more)[0] == 2
    assert state(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "option", "name"), [each for each in OUTPUTS if each.values[0][0] not in FOLDERS]
)
def test_overwrite_allows_foreign_file(run, tmp_path, words, option, name):
    """With the option, the error is about the missing inputs; the file still exists, because
    nothing was written.
    """
    out = tmp_path / names_of(words, name)
    out.write_bytes(b"# mine\n" if name == "model_card" else FOREIGN[out.suffix])
    before = state(tmp_path)
    _, err = run(*words, option, out.name, "--overwrite")
    assert err
    assert out.name not in err.replace(f"{option} {out.name}", "")
    made = words[0] == "fleet"  # leaves out an adapter that is not there, and measures the others
    assert (state(tmp_path) != before) == made


@pytest.mark.parametrize(("words", "option", "name"), OUTPUTS)
def test_outputs_do_not_replace_config(run, tmp_path, words, option, name):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "adapter_config.json").write_text(TRAINED)
    before = state(tmp_path)
    for more in ([], ["--overwrite"]):
        assert run(*words, option, "adapter_config.json", *more)[0] == 2
    assert state(tmp_path) == before


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    path = tmp_path_factory.mktemp("records") / "r.jsonl"
    lora_diag.spectrum(*PAIR, layers=r"\.0\..*o_proj", output=path)
    return path


MADE = {
    "s.jsonl": ["spectrum", *PAIR, "--layers", r"\.0\..*o_proj", "-q", "-o"],
    "a.json": ["allocate", "r.jsonl", "--energy", "0.9", "-q", "-o"],
    "a.jsonl": ["allocate", "r.jsonl", "--energy", "0.9", "-q", "-o"],
    "v.jsonl": ["gate", "r.jsonl", "--policy", "adapter-basic", "-q", "-o"],
    "v.xml": ["gate", "r.jsonl", "--policy", "adapter-basic", "-q", "--junit"],
    "r.html": ["report", "r.jsonl", "-q", "-o"],
    "r.md": ["report", "r.jsonl", "-q", "-o"],
    "r.csv": ["report", "r.jsonl", "-q", "-o"],
    "r.parquet": ["report", "r.jsonl", "-q", "-o"],
    "f.png": ["plot", "r.jsonl", "--figure", "energy", "-q", "-o"],
    "f.svg": ["plot", "r.jsonl", "--figure", "energy", "-q", "-o"],
    "f.pdf": ["plot", "r.jsonl", "--figure", "energy", "-q", "-o"],
}


@pytest.mark.parametrize("file", MADE)
def test_write_replaces_own_files_others_on_request(run, tmp_path, records, undrawn, file):
    """What a command wrote it replaces unasked, under one of two names of a hard link; a stranger's
    with a word.
    """
    for extra in {".parquet": ["pandas", "pyarrow"], ".png": ["matplotlib"]}.get(
        Path(file).suffix, []
    ):
        pytest.importorskip(extra)
    (tmp_path / "r.jsonl").write_bytes(records.read_bytes())
    path = tmp_path / file
    code, err = run(*MADE[file], file)
    assert code in {0, 1, 5}
    assert (err == "") == (MADE[file][0] != "gate")  # which says why it did not pass
    made = path.read_bytes()
    os.link(path, tmp_path / "second")
    again, replaced = run(*MADE[file], file)
    assert again == code
    assert replaced.endswith(err)
    assert path.stat().st_ino != (tmp_path / "second").stat().st_ino
    assert (tmp_path / "second").read_bytes() == made
    (tmp_path / "second").write_text("mine\n")
    path.unlink()
    os.link(tmp_path / "second", path)
    assert run(*MADE[file], file)[0] == 2
    assert path.read_text() == "mine\n"
    assert run(*MADE[file], file, "--overwrite") == (code, err)
    assert path.read_bytes()[:60] == made[:60]
    assert (tmp_path / "second").read_text() == "mine\n"
    assert names(tmp_path) == sorted({"r.jsonl", "second", file})


def test_figures_in_folder_are_all_or_none(run, tmp_path, records):
    """A stranger's file, or a link to weights, among the figures: nothing is drawn.

    A linked folder is a folder.
    """
    pytest.importorskip("matplotlib")
    (tmp_path / "scratch").mkdir()
    (tmp_path / "figs").symlink_to("scratch")
    weights, figure = tmp_path / "adapter_model.safetensors", tmp_path / "figs" / "spectrum.png"
    weights.write_bytes(b"weights")
    figure.symlink_to(weights)
    words = ["plot", records, "-q", "-o", "figs"]
    for more in ([], ["--overwrite"]):
        code, err = run(*words, *more)
        assert (code, mentions(err, "spectrum.png", "symbolic link")) == (2, True)
    figure.unlink()
    figure.write_bytes(FOREIGN[".png"])
    assert run(*words)[0] == 2
    assert names(tmp_path / "scratch") == ["spectrum.png"]
    assert run(*words, "--overwrite") == (0, "")
    assert run(*words) == (0, "")
    assert len(names(tmp_path / "scratch")) > 2
    assert weights.read_bytes() == b"weights"


def test_overwrite_spares_inputs_and_replaces_at_end(run, tmp_path, records):
    config = tmp_path / "mine.json"
    config.write_text("mine")
    words = ["spectrum", *PAIR, "--layers", "o_proj", "-q", "--overwrite", "-o"]
    code, err = run("spectrum", PAIR[0], tmp_path / "nothing", "--overwrite", "-o", "mine.json")
    assert (code, config.read_text()) == (3, "mine")
    for place in (Path(PAIR[1]) / "adapter_model.safetensors", Path(PAIR[0]) / "config.json"):
        before = place.read_bytes()
        code, err = run(*words, place)
        assert (code, mentions(err, "belongs", "input"), place.read_bytes() == before) == (
            2,
            True,
            True,
        )
    for name in (records, "r.xml"):
        code, err = run(
            "gate", records, "--policy", "adapter-basic", "--overwrite", "-o", name, "--junit", name
        )
        assert (code, "another name" in err) == (2, True)
    assert not (tmp_path / "r.xml").exists()


def test_model_card_keeps_other_text(run, tmp_path, records):
    """Line ends, text behind a block that lost its end, and every byte outside of our block."""
    card = tmp_path / "README.md"
    cut = "# Mine\r\n<!-- loradiag gate: begin -->\r\nmy own words\r\n"
    card.write_bytes(cut.encode())
    words = ["gate", records, "--policy", "adapter-basic", "-q", "--model-card"]
    run(*words, card)
    once = card.read_bytes()
    run(*words, card)
    assert card.read_bytes() == once
    assert once.startswith(cut.encode())
    assert once.count(b"\n") == once.count(b"\r\n")
    for name in ("card.txt", "adapter_model.safetensors"):
        (tmp_path / name).write_text("text")
        code, err = run(*words, name, "--overwrite")
        assert (code, ".md" in err, (tmp_path / name).read_text()) == (2, True, "text")


def test_results_file_below_linked_folder(run, tmp_path):
    """A user's ~/runs that leads to scratch storage; and output into the file behind standard
    output.
    """
    (tmp_path / "scratch").mkdir()
    (tmp_path / "runs").symlink_to("scratch")
    assert run(*MADE["s.jsonl"], "runs/s.jsonl") == (0, "")
    assert run(*MADE["s.jsonl"], "runs/s.jsonl", "--overwrite") == (0, "")
    assert names(tmp_path / "scratch") == ["s.jsonl"]
    assert (
        json.loads((tmp_path / "scratch" / "s.jsonl").read_text().splitlines()[-1])["record"]
        == "end"
    )
