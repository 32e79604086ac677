"""Draw the figures of the README and the docs: what a colour terminal shows, as SVG.

Run from the repository root: ``python docs/figures/make.py``.
"""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

FOLDER = Path(__file__).parent
SAMPLES = "sample_checkpoints"
FIGURES = {"spectrum": ["spectrum", f"{SAMPLES}/base", f"{SAMPLES}/full_ft"]}
WIDTH = 80


def terminal(words: list[str]) -> str:
    """Return what the command prints, colours included."""
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    command = [sys.executable, "-m", "lora_diag", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def svg(words: list[str]) -> str:
    """Return the command and its output as the picture of a terminal."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(terminal(words)))
    picture = console.export_svg(title=f"loradiag {' '.join(words)}", unique_id="loradiag")
    return re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)  # fonts from a network: not needed


if __name__ == "__main__":
    for name, words in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(svg(words), encoding="utf-8")
