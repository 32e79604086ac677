"""The docs show what the program prints today."""

import doctest
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from lora_diag import catalog
from tests.conftest import ROOT
from tools import hooks, refresh

pytestmark = pytest.mark.slow

ABOVE = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "sample_checkpoints" / "README.md",
]
PAGES = [*ABOVE, *sorted((ROOT / "docs").rglob("*.md"))]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


PRINTED: dict[str, str] = {}  # pages show the same commands


@pytest.fixture
def refreshed(loradiag, monkeypatch):
    def output(words: str) -> str:
        if words in PRINTED:
            return PRINTED[words]
        ran = loradiag(*words.split(), cwd=ROOT, env={"COLUMNS": "80"}, brief=True)
        assert ran.code == 0, ran.err
        PRINTED[words] = ran.out.strip("\n")
        return PRINTED[words]

    monkeypatch.setattr(refresh, "output", output)  # by a process that need not start anew
    return refresh.refreshed


# A number with a fraction or an exponent; not a version, nor a part of a name.
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![\w]|\.\d)")


def agree(printed: str, written: str) -> bool:
    """Return whether two texts differ at most by one unit in the last digit of numbers that are not
    integers.

    A number near the middle of two printed ones is rounded to either, by the order in which a
    processor adds. A number that is determined to the digits that are printed cannot differ by
    more.
    """
    if NUMBER.sub("#", printed) != NUMBER.sub("#", written):
        return False
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(written), strict=True)
    return all(one == other or is_next(Decimal(one), Decimal(other)) for one, other in pairs)


def is_next(one: Decimal, other: Decimal) -> bool:
    """Return whether two numbers of at least two digits, some after the point, are neighbours in
    the last one.
    """
    digits, last = one.as_tuple()[1:]
    if last >= 0 or len(digits) < 2:
        return False
    return last == other.as_tuple().exponent and abs(one - other) <= Decimal(10) ** last


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ("loss 0.586, 3 of 12 layers, 2.0e-06, 1.2.3", True),
        ("loss 0.584, 3 of 12 layers, 1.9e-06, 1.2.3", True),
        ("loss 0.587, 3 of 12 layers, 2.0e-06, 1.2.3", False),
        ("loss 0.59, 3 of 12 layers, 2.0e-06, 1.2.3", False),
        ("loss -0.585, 3 of 12 layers, 2.0e-06, 1.2.3", False),
        ("loss 0.585, 4 of 12 layers, 2.0e-06, 1.2.3", False),
        ("loss 0.585, 3 of 12 layers, 2.0e-05, 1.2.3", False),
        ("loss 0.585, 3 of 12 layers, 2e-06, 1.2.3", False),
        ("loss 0.585, 3 of 12 layers, 2.0e-06, 1.2.4", False),
        ("cost 0.585, 3 of 12 layers, 2.0e-06, 1.2.3", False),
    ],
)
def test_wrong_digit_of_transcript_is_found(other, same):
    assert agree(other, "loss 0.585, 3 of 12 layers, 2.0e-06, 1.2.3") == same


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_transcripts_equal_command_output(page, refreshed):
    text = page.read_text(encoding="utf-8")
    printed = refreshed(text)
    assert agree(printed, text) or printed == text, (
        "run `python tools/refresh.py`"
    )  # the latter shows the lines


@pytest.mark.parametrize(
    "page", [page for page in PAGES if ">>> " in page.read_text(encoding="utf-8")], ids=name
)
def test_python_examples_match_output(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    code = re.sub(r"^```.*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    result = doctest.DocTestParser().get_doctest(code, {}, page.name, str(page), 0)
    outcome = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(result)
    assert outcome.attempted > 3
    assert not outcome.failed


def test_links_resolve():
    """Linked files and headings exist, in the sources of a page and in the built site."""
    pages = {page: page.read_text(encoding="utf-8") for page in PAGES}
    headings = {
        page: anchors(hooks.completed(name(page).removeprefix("docs/"), text))
        for page, text in pages.items()
    }
    wrong = []
    for page, text in pages.items():
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
            if "://" not in target:
                there = (page.parent / target).resolve() if target else page
                if not there.exists() or (anchor and anchor not in headings[there]):
                    wrong.append(f"{name(page)}: {target}#{anchor}")
    assert not wrong


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    heads = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", head).strip().lower()).replace(" ", "-")
        for head in heads
    }


def site() -> dict:
    """mkdocs.yml, whose tags name Python functions."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    return yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)


def test_navigation_has_every_page():
    """Which fails where a page is written or moved and not listed; features list themselves."""
    config = SimpleNamespace(nav=site()["nav"])
    hooks.on_config(config)
    listed = re.findall(r"[\w/-]+\.md", str(config.nav))
    written = [name(page).removeprefix("docs/") for page in PAGES if name(page).startswith("docs/")]
    generated = [hooks.page_of(feature) for feature in catalog.features()]
    assert sorted(listed) == sorted({*written, *generated, *hooks.ELSEWHERE.values()})


@pytest.mark.parametrize("feature", catalog.features(), ids=lambda feature: feature.name)
def test_generated_tables_describe_every_option_and_field(feature):
    for command in hooks.commands(feature).values():
        shown = "\n".join(hooks.option_tables(command))
        for each in command.params:
            assert (
                getattr(each, "hidden", False)
                or "--help" in each.opts
                or hooks.cell(each.help) in shown
            ), each.name
    for kind in hooks.kinds(feature):
        for one in hooks.find_models(kind):
            message = hooks.document_fields(one)
            names = {field.alias or field_name for field_name, field in one.model_fields.items()}
            assert names - {"record"} <= {result for result, text in message.items() if text}, one
            assert all(f"| `{each}` |" in hooks.field_table(one, {}) for each in names)


def test_hooks_examples():
    outcome = doctest.testmod(hooks)
    assert outcome.attempted > 3
    assert not outcome.failed


def test_shared_records_describe_every_field():
    classes = hooks.shared()
    assert {"Run", "End", "LeftOut", "Resolution"} <= {one.__name__ for one in classes}
    for one in classes:
        names = {field.alias or field_name for field_name, field in one.model_fields.items()}
        assert names - {"record"} <= set(hooks.document_fields(one)), one


def test_site_builds(tmp_path):
    """As ``make docs`` does, where its packages are installed."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "Bound on the absolute error" in (
        tmp_path / "reference" / "spectrum" / "index.html"
    ).read_text("utf-8")


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.name
)
def test_workflow_runs_targets_of_make(path):
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    called = re.findall(r"\bmake ([a-z]+)", "\n".join(step.get("run", "") for step in steps))
    targets = re.findall(
        r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert called
    assert set(called) <= set(targets)
