"""The docs show what the program prints today."""

import doctest
import importlib.util
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def refresh(loradiag):
    def output(words: str) -> str:
        ran = loradiag(*words.split(), cwd=ROOT, env={"COLUMNS": "80"})
        assert ran.code == 0, ran.err
        return ran.out.strip("\n")

    spec = importlib.util.spec_from_file_location("refresh", ROOT / "docs" / "refresh.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.output = output  # by a process that need not start anew
    return module


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_output_on_a_page_is_that_of_a_run(page, refresh):
    text = page.read_text(encoding="utf-8")
    assert refresh.refreshed(text) == text, "run `python docs/refresh.py`"


@pytest.mark.parametrize("page", [page for page in PAGES if ">>> " in page.read_text(encoding="utf-8")], ids=name)
def test_python_on_a_page_gives_what_it_says(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    code = re.sub(r"^```.*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = doctest.DocTestParser().get_doctest(code, {}, page.name, str(page), 0)
    outcome = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(found)
    assert outcome.attempted > 4
    assert not outcome.failed


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_that_installs_says_where_from(page):
    text = page.read_text(encoding="utf-8")
    assert (
        "pip install loradiag" not in text.replace("'", "") or "installation.md" in text or page.stem == "installation"
    )


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / Path(target)).exists(), target
