"""Sections of a model card that loradiag keeps up to date."""

from __future__ import annotations

import re


def with_section(card: str, name: str, section: str) -> str:
    """Return a card with a section in place of an earlier one of that name, or at its end.

    Front matter and line ends stay. A section that lost its end stays, too: what follows it may be the user's own text.

    Args:
        card: The card as it is.
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
    if found := re.search(f"{begin}((?!{begin}).)*?{finish}", card, re.DOTALL):
        return f"{card[: found.start()]}{block}{card[found.end() :]}"
    return f"{card.rstrip()}{end * 2 if card.strip() else ''}{block}{end}"
