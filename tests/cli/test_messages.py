"""What is said on standard error: one line for a log, wrapped between words on a terminal."""

import io
import sys

import pytest

from lora_diag.cli.output import message

PATH = "runs/a-folder-with-hyphens/and-a-name-that-is-longer-than-a-narrow-terminal-is-wide/model.safetensors"
LINE = f"about 4 min: 128 batches of 2 s each, and evaluation of what was trained on {PATH}: take fewer sequences"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("columns", "width"), [("80", 80), ("200", 200), ("10", 60), ("", 80), ("many", 80)])
def test_a_terminal_gets_lines_that_fit_and_whole_paths(monkeypatch, columns, width):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "stderr", Terminal())
    message(LINE)
    lines = sys.stderr.getvalue().splitlines()
    assert " ".join(map(str.strip, lines)) == LINE
    assert all(len(line) <= width or line.strip() == f"{PATH}:" for line in lines)
    assert all(line.startswith("  ") for line in lines[1:])


def test_a_log_gets_one_line(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    message(LINE)
    assert capsys.readouterr().err == f"{LINE}\n"
