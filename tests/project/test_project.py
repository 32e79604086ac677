"""The project file: what names and defaults do to a command line, and what may not be in one."""

import json
from pathlib import Path

import pytest

from lora_diag.cli.project import Project, find_project, replace_names
from lora_diag.errors import UsageError
from tests.messages import assert_names, raises_naming
from tests.served import ROOT

SAMPLES = ROOT / "sample_checkpoints"


@pytest.fixture
def project(tmp_path):
    """Writes a project file."""
    for name, source in (("base", "base"), ("tuned", "full_ft")):
        (tmp_path / name).symlink_to(SAMPLES / source)

    def write(text: str, folder: Path = tmp_path) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / "loradiag.toml").write_text(text)
        return folder / "loradiag.toml"

    return write


def settings_of(path: Path) -> dict:
    return json.loads(path.read_text().splitlines()[0])["settings"]


NAMES = '[names]\nbase = "base"\ntuned = "tuned"\n'


def test_names_stand_for_paths_in_arguments_and_options(run, project, tmp_path):
    project(NAMES)
    ran = run("probe", "outputs", "@base", "@base", "--tuned=@tuned")
    assert ran.code == 2
    assert_names(ran.err, "--eval")  # what is missing, not a file of that name
    assert run("spectrum", "@base", "@tuned", "-o", "s.jsonl").code == 0
    inputs = json.loads((tmp_path / "s.jsonl").read_text().splitlines()[0])["inputs"]
    assert [each["path"] for each in inputs] == ["base", "tuned"]


def test_names_are_relative_to_their_file(project, tmp_path, monkeypatch):
    project('[names]\nbase = "base"\nrun = "out/"\nhub = "org/model"\nfar = "s3://bucket/base"\n')
    (tmp_path / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "er")
    words = replace_names(["@base", "@run", "@hub", "@far", "@run/x"], find_project(Path.cwd()))
    assert words == ["../../base", "../../out/", "org/model", "s3://bucket/base", "../../out/x"]


def test_words_that_are_no_names_stay():
    words = ["./@base", "a@b", "--eval", "@", "org/model@main", "--", "@base"]
    assert replace_names(words, Project()) == words


def test_name_without_project_file_says_how_to_write_one(run):
    ran = run("spectrum", "@base")
    assert ran.code == 2
    assert_names(ran.err, "@base", "loradiag init")


def test_nearest_table_of_pyproject_is_read(project, tmp_path):
    (tmp_path / "pyproject.toml").write_text('[tool.loradiag.names]\nbase = "base"\n')
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "pyproject.toml").write_text("[tool.other]\n")
    assert find_project(tmp_path / "sub").path == tmp_path / "pyproject.toml"


def test_defaults_reach_results_unless_typed(run, project, tmp_path):
    project(NAMES + '[defaults]\nranks = [3, 5]\nlayers = "q_proj"\nlength = 64\n')
    ran = run("spectrum", "@base", "@tuned", "--ranks", "2", "-o", "s.jsonl")
    assert ran.code == 0
    assert_names(ran.err, "loradiag.toml", "q_proj")
    settings = settings_of(tmp_path / "s.jsonl")
    assert (settings["ranks"], settings["layers"]) == ([2], "q_proj")
    assert "length" not in settings


def test_gate_does_not_read_the_project_file(run, project):
    spectra = ROOT / "docs" / "examples" / "spectrum.jsonl"
    without = run("gate", "--policy", "full-ft-drift", spectra)
    project("[broken")
    assert run("gate", "--policy", "full-ft-drift", spectra) == without
    assert run("spectrum", "base").code == 2


def test_lint_takes_no_defaults(run, project, tmp_path):
    (tmp_path / "train.yaml").write_text("base_model: base\nadapter: lora\nlora_r: 8\n")
    found = run("lint", "train.yaml")
    project(NAMES + '[defaults]\ndtype = "float16"\nrank = 1\n')
    assert run("lint", "train.yaml") == found


def test_project_file_is_ignored_in_ci(run, project, tmp_path, monkeypatch):
    project(NAMES + '[defaults]\nlayers = "nothing"\n')
    monkeypatch.setenv("LORADIAG_PROJECT", "0")
    assert run("spectrum", "base", "tuned", "-o", "s.jsonl").code == 0
    assert settings_of(tmp_path / "s.jsonl")["layers"] is None


def test_steps_of_ci_ignore_project_files():
    for path in (".github/action/gate.sh", ".github/action/key.sh", "templates/gate.yml"):
        assert "LORADIAG_PROJECT" in (ROOT / path).read_text()


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("[defaults]\nlenght = 64\n", ("lenght", "length")),
        ('[defaults]\nlength = "long"\n', ("length", "number", "long")),
        ("[defaults]\nlength = 6.5\n", ("length", "whole number")),
        ("[defaults]\nkfac = 1\n", ("kfac", "true or false")),
        ('[defaults]\ndevice = ["cpu"]\n', ("device", "single value")),
        ("[defaults]\nbatch = 0\n", ("batch", "at least 1")),
        ("[defaults]\nlayers = true\n", ("layers", "single value")),
        ("[defaults]\nranks = [[1]]\n", ("ranks", "list")),
        ('[defaults]\nby = "type"\n', ("by", "probe strength")),
        ('[defaults]\nshifted = "@other"\n', ("@other", "add it")),
        ("[names]\nbase = 3\n", ("names.base", "path")),
        ('[names]\n"a b" = "x"\n', ("a b", "path")),
        ("[plugins]\nx = 1\n", ("plugins", "names")),
        ("names = 1\n", ("names", "table")),
        ("[names", ("TOML",)),
        ("x = 1" + "0" * 5000, ("TOML",)),
        ("#" * 1_000_001, ("1,000,000 bytes",)),
        *(
            (f'[defaults]\n{name} = "x"\n', (name, "no such option"))
            for name in ("output", "plugins", "overwrite", "resume", "yes", "junit", "policy")
        ),
    ],
)
def test_invalid_project_file_is_one_message(project, tmp_path, text, facts):
    path = project(text)
    with raises_naming(UsageError, *facts) as caught:
        find_project(tmp_path)
    assert str(path) in str(caught.value)


def test_like_takes_texts_and_settings_of_results(run, project, tmp_path):
    project(NAMES)
    first = ("spectrum", "@base", "@tuned", "--ranks", "3", "--layers", "q_proj", "-o", "a.jsonl")
    assert run(*first).code == 0
    (tmp_path / "loradiag.toml").unlink()
    ran = run("spectrum", "@base", "@tuned", "--like", "a.jsonl", "-o", "b.jsonl")
    assert ran.code == 0
    assert settings_of(tmp_path / "b.jsonl") == settings_of(tmp_path / "a.jsonl")
    assert run("spectrum", "@base", "@tuned", "--like", "base").code == 3


def test_init_names_what_the_folder_holds(run, project, tmp_path):
    (tmp_path / "train.yaml").write_text(
        "base_model: base\nadapter: lora\nsequence_len: 96\nlearning_rate: 1e-4\n"
    )
    (tmp_path / "out").symlink_to(SAMPLES / "run")
    (tmp_path / "my task-2.txt").write_text("text")
    assert run("init").code == 0
    found = find_project(tmp_path)
    assert found.names == {
        "base": "base", "tuned": "tuned", "run": "out/", "my_task": "my task-2.txt"
    }  # fmt: skip
    assert found.defaults["probe outputs"]["length"] == 96
    again = run("init")
    assert again.code == 2
    assert_names(again.err, "loradiag.toml", "exists")


@pytest.mark.parametrize("name", ['a"b', "new\nline", "\x1b[2J"])
def test_init_writes_names_of_hostile_files_as_text(run, tmp_path, name):
    (tmp_path / f"{name}.txt").write_text("text")
    (tmp_path / name).mkdir()
    config = {"base_model_name_or_path": "org/model"}
    (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    assert run("init").code == 0
    assert list(find_project(tmp_path).names.values()) == ["org/model", f"{name}.txt"]


def test_init_follows_no_link(run, tmp_path):
    (tmp_path / "task.txt").write_text("text")
    (tmp_path / "loradiag.toml").symlink_to("elsewhere")
    ran = run("init")
    assert ran.code == 2
    assert_names(ran.err, "loradiag.toml", "exists")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("tool", ["tool = 1", f"[tool.other]\na = {'9' * 150_000!r}"])
def test_pyproject_of_other_tools_is_passed_over(tmp_path, tool):
    (tmp_path / "pyproject.toml").write_text(tool)
    assert find_project(tmp_path) is None


def test_init_needs_something_to_name(run, tmp_path):
    ran = run("init")
    assert ran.code == 2
    assert not (tmp_path / "loradiag.toml").exists()
    assert run("init", "missing").code == 3
