"""``loradiag report`` as a user runs it."""

import re
import shlex

import pytest

from tests.conftest import ROOT
from tests.reports.test_html import small

pytestmark = pytest.mark.slow

SAMPLES = ROOT / "sample_checkpoints"


@pytest.fixture
def files(tmp_path):
    """Return the names of three results files in the working folder."""
    names = ("spectrum.jsonl", "residual.jsonl", "overlap.jsonl")
    for name, results in zip(names, small(), strict=True):
        results.write(tmp_path / name)
    return names


def test_page_with_name_and_one_without(loradiag, files, tmp_path):
    ran = loradiag("report", files[2])  # curves of three steps: the figure that is drawn soonest
    assert (ran.code, ran.out) == (0, "")
    assert re.fullmatch(r"report\.html: \d.* MB\n", ran.err)
    ran = loradiag("report", files[2], "-o", "my page.html", "-q")
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    one, two = ((tmp_path / name).read_text() for name in ("report.html", "my page.html"))
    changing = r"made \S+ \S+ UTC|<!-- loradiag \w+ -->\n$"
    assert re.sub(changing, "", one) == re.sub(changing, "", two)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*files, "report.html", "my page.html"]
    )


def test_markdown_and_csv_go_to_standard_output_or_file(loradiag, files, tmp_path):
    for form, begins in (
        ("md", "# full_ft compared with base\n"),
        ("csv", "results,record,layer,"),
    ):
        ran = loradiag("report", *files, "--format", form)
        assert (ran.code, ran.err) == (0, "")
        assert ran.out.startswith(begins)
        assert loradiag("report", *files, "-o", f"r.{form}").code == 0
        written = re.sub(r"<!-- loradiag \w+ -->\n$", "", (tmp_path / f"r.{form}").read_text())
        assert written.replace("\r", "").strip() == ran.out.replace("\r", "").strip()


def test_real_samples_and_advice_runs(loradiag, tmp_path):
    base, tuned = SAMPLES / "base", SAMPLES / "full_ft"
    assert loradiag("spectrum", base, tuned, "-o", "s.jsonl", "-q").code == 0
    assert loradiag("residual", base, tuned, SAMPLES / "lora_r4", "-o", "r.jsonl", "-q").code == 0
    text = loradiag("report", "s.jsonl", "--format", "md").out
    (command,) = re.findall(r"`(loradiag allocate .*?)`", text)
    assert loradiag(*shlex.split(command)[1:]).code == 0
    # Direction limits the adapter, so that no larger rank is advised.
    assert "loradiag allocate" not in loradiag("report", "s.jsonl", "r.jsonl", "--format", "md").out


def test_unsafe_path_moves_no_cursor(loradiag, files, tmp_path):
    (tmp_path / "a\x1b[2J.jsonl").write_bytes((tmp_path / files[0]).read_bytes())
    ran = loradiag("report", "a\x1b[2J.jsonl", "--format", "md")
    assert ran.code == 0
    assert "\x1b" not in ran.out + ran.err
