"""Sections of a model card that loradiag keeps up to date."""

from __future__ import annotations

import re
from pathlib import Path

from lora_diag.errors import InputError, UsageError
from lora_diag.files import CARD


def with_section(card: str, name: str, section: str) -> str:
    """Return a card with a section in place of an earlier one of that name, or at its end.

    Front matter and line ends stay. A section that lost its end stays, too: text after it may be the user's.

    Args:
        card: The existing card.
        name: Name of the section in its markers, such as ``gate``.
        section: The new text.

    Example:
        >>> card = with_section("# Model", "gate", "passed")
        >>> card == with_section(card, "gate", "passed"), "passed" in with_section(card, "gate", "failed")
        (True, False)
    """
    begin, finish = f"<!-- loradiag {name}: begin -->", f"<!-- loradiag {name}: end -->"
    end = "\r\n" if "\r\n" in card else "\n"
    block = f"{begin}\n{section.strip()}\n{finish}".replace("\n", end)
    if match := re.search(f"{begin}((?!{begin}).)*?{finish}", card, re.DOTALL):
        return f"{card[: match.start()]}{block}{card[match.end() :]}"
    return f"{card.rstrip()}{end * 2 if card.strip() else ''}{block}{end}"


def read_card(path: Path) -> str:
    """Return the text of a model card with its line ends unchanged; empty if it does not exist.

    Raises:
        UsageError: It is not Markdown in UTF-8.
        InputError: It cannot be read.
    """
    try:
        if path.suffix.lower() not in {".md", ".markdown"} or (path.exists() and not CARD.is_at(path)):
            raise UsageError(f"{path}: is not Markdown; give a Markdown file whose name ends in .md")
        return path.read_bytes().decode("utf-8") if path.exists() else ""
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8 text ({error}); convert it") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
