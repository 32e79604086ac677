"""Output of ``explain``: the meanings of a word, or the list of symptoms."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from json import dumps
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from lora_diag.errors import DONE, UsageError
from lora_diag.explanations.terms import Term, all_terms, find_nearest, find_terms
from lora_diag.rendering.text import safe, to_text

if TYPE_CHECKING:
    from lora_diag.cli.options import OutputChoice


def run_explain(shown: OutputChoice, words: Sequence[str]) -> int:
    """Print the meanings of a word, or without one the symptoms.

    Raises:
        UsageError: The word is unknown.
    """
    word = " ".join(words)
    terms = find_terms(word) if word else [term for term in all_terms() if term.role == "symptom"]
    if not terms:
        nearest = find_nearest(word)
        hint = (
            f"did you mean {', '.join(nearest)}?" if nearest else "loradiag explain lists symptoms"
        )
        raise UsageError(f"explain: {safe(word)} is no word of the output; {hint}")
    if shown.json:
        for term in terms:
            shown.print_line(dumps(asdict(term), ensure_ascii=False))
    else:
        drawn = Group(*map(_draw_term, terms)) if word else _list_symptoms(terms)
        shown.print(to_text(drawn, *shown.terminal))
    return DONE


def _draw_term(term: Term) -> RenderableType:
    """Return a word and its meaning."""
    heading = Text.assemble((term.word, "bold"), f"   {term.role}")
    blocks = [_draw_block(block) for block in term.text.split("\n\n")]
    return Group(heading, *(Padding(block, (0, 0, 0, 2)) for block in blocks), Text())


def _draw_block(block: str) -> Text:
    """Return a paragraph of Markdown as text, without marks of code and targets of links; indented
    lines stay.
    """
    if block.startswith("    "):
        code = "\n".join(line[2:] for line in block.splitlines())
        return Text(code, no_wrap=True, overflow="fold")
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(block.split()))
    return Text(text.replace("`", ""))


def _list_symptoms(terms: Sequence[Term]) -> RenderableType:
    lines = [Text(f"  {term.word}") for term in terms]
    return Group(
        Text("Symptoms", style="bold"),
        *lines,
        Text(),
        Text("Next: loradiag explain SYMPTOM, or any WORD"),
    )
