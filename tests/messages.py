"""What a text for users has to name: values, tensors, files and options, whatever its sentences
are.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator

import pytest

# Characters between two facts of one statement, at most.
APART = 120


def mentions(text: str | Iterable[str], *facts: object) -> bool:
    """Return whether a text, or one of several, names these facts as whole words, in this order and
    near each other.

    Line breaks count as spaces.

    >>> mentions(
    ...     "r=16 keeps 93% of\\nthe energy of 128 layers",
    ...     "r=16",
    ...     "93% of the energy",
    ...     "128 layers",
    ... )
    True
    >>> (
    ...     mentions("0.5 of 128 layers", 5),
    ...     mentions("r=16", "r=1"),
    ...     mentions("1,024", 24),
    ...     mentions("a.b: 16", 16, "a.b"),
    ... )
    (False, False, False, False)
    """
    between = rf".{{0,{APART}}}?"
    pattern = between.join(_whole(" ".join(str(fact).split())) for fact in facts)
    texts = [text] if isinstance(text, str) else text
    return any(re.search(pattern, " ".join(each.split())) for each in texts)


def assert_names(text: str | Iterable[str], *facts: object) -> None:
    """Assert that a text, or one of several, names these facts, in this order and near
    each other.
    """
    assert mentions(text, *facts), (
        f"{[str(fact) for fact in facts]} are not named together in: {text}"
    )


@contextlib.contextmanager
def raises_naming(
    error: type[BaseException], *facts: object
) -> Iterator[pytest.ExceptionInfo[BaseException]]:
    """Expect an error whose message names these facts, in this order and near each other."""
    with pytest.raises(error) as caught:
        yield caught
    assert_names(str(caught.value), *facts)


def _whole(fact: str) -> str:
    """Return a pattern for a fact that is no part of a longer word or number."""
    before = r"(?<![\w.,])" if fact[:1].isdigit() else r"(?<!\w)" if _is_word(fact[:1]) else ""
    after = r"(?![\w%]|[.,]\d)" if fact[-1:].isdigit() else r"(?!\w)" if _is_word(fact[-1:]) else ""
    return before + re.escape(fact) + after


def _is_word(character: str) -> bool:
    return character.isalpha() or character == "_"
