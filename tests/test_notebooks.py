"""The notebooks of the docs: a new run gives the stored outputs."""

import json
import re

import pytest

from tests.served import ROOT
from tools import notebooks as make

NOTEBOOKS = ROOT / "docs" / "notebooks"


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_output_matches_text(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    source = path.with_suffix(".py").read_text(encoding="utf-8")
    made, kept = make.notebook(source), json.loads(path.read_text(encoding="utf-8"))
    pictures = 0
    for cell, old in zip(made["cells"], kept["cells"], strict=True):
        assert cell["source"] == old["source"]
        for output, before in zip(cell.get("outputs", []), old.get("outputs", []), strict=True):
            data, older = output.get("data", {}), before.get("data", {})
            pictures += "image/png" in data
            assert data.keys() == older.keys()
            for part in ("text/html", "text/plain"):
                assert rounded(data.get(part, "")) == rounded(older.get(part, ""))
            assert rounded(output.get("text", "")) == rounded(before.get("text", ""))
    assert pictures


def rounded(text: str) -> str:
    """Return text whose numbers have two digits: losses differ by processor in the later ones."""
    return re.sub(r"\d+\.\d+(e-\d+)?", lambda result: f"{float(result[0]):.1e}", text)
