"""Copy the output of real runs into the README and the docs: ``python tools/refresh.py [PAGE ...]``
from the root.

A block between ``<!-- run: WORDS -->`` and ``<!-- end -->`` becomes what ``loradiag WORDS`` prints
at 80 columns; its first 9 lines where WORDS end with ``| head -9``.
"""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

BLOCK = re.compile(
    r"<!-- run: (?P<words>.*?)(?: \| head -(?P<lines>\d+))? -->\n.*?<!-- end -->", re.DOTALL
)


def output(words: str) -> str:
    """Return what the command prints in an 80-column terminal without colours."""
    command = [sys.executable, "-m", "lora_diag", *words.split()]
    environment = {
        **os.environ,
        "COLUMNS": "80",
        "NO_COLOR": "1",
        "SOURCE_DATE_EPOCH": "1700000000",
    }
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout.strip("\n")


def prompt(line: str) -> str:
    """Return the command as typed, continued on further lines where it is longer than 80 columns.

    An option stays with its value.
    """
    glued = re.sub(
        r"(?<= )(-\S+) (?=[^-|])|(\|) (head) ",
        lambda at: at[0].strip().replace(" ", "\0") + "\0",
        line,
    )
    wrapped = textwrap.wrap(
        f"$ loradiag {glued}", 78, subsequent_indent="    ", break_on_hyphens=False
    )
    return " \\\n".join(wrapped).replace("\0", " ")


def refreshed(text: str) -> str:
    """Return a page with every block run again."""

    def block(found: re.Match[str]) -> str:
        words, lines = found["words"], found["lines"]
        line = f"{words} | head -{lines}" if lines else words
        shown = "\n".join(output(words).split("\n")[: int(lines) if lines else None])
        return f"<!-- run: {line} -->\n```console\n{prompt(line)}\n{shown}\n```\n<!-- end -->"

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    for page in map(
        Path, sys.argv[1:] or ["README.md", *sorted(map(str, Path("docs").rglob("*.md")))]
    ):
        page.write_text(refreshed(page.read_text(encoding="utf-8")), encoding="utf-8")
