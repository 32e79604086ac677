"""Index of the words in loradiag's output.

A word is a command, a column (``Shown.title``), a field of a record, a value of such a field that
the field's documentation names, a built-in check of ``gate``, or a heading of ``symptoms.md``,
``findings.md`` or ``words.md``. The texts are those of the declarations and of the site.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Literal, get_args, get_origin

from pydantic import BaseModel

from lora_diag import catalog
from lora_diag.records import run
from lora_diag.records.base import Record, document_fields

# Records of every command.
SHARED: tuple[type[Record], ...] = (run.Run, run.LeftOut, run.End)


@dataclass(frozen=True, slots=True)
class Term:
    """A word and its meaning.

    Args:
        word: The word as printed.
        role: What it is, such as ``column of spectrum``.
        text: Its meaning, and for a fault what to do.
        others: Further spellings, such as the heading of its column in a terminal.
    """

    word: str
    role: str
    text: str
    others: tuple[str, ...] = ()


def find_models(kind: type[BaseModel]) -> list[type[BaseModel]]:
    """Return a class of records and the classes of its fields, each once."""
    seen: dict[type[BaseModel], None] = {}

    def visit(annotation: object) -> None:
        if (
            isinstance(annotation, type)
            and issubclass(annotation, BaseModel)
            and annotation not in seen
        ):
            seen[annotation] = None
            for field in annotation.model_fields.values():
                visit(field.annotation)
        for part in get_args(annotation):
            visit(part)

    visit(kind)
    return list(seen)


def list_values(annotation: object) -> Iterator[str]:
    """Yield the words that a field can have, of a ``Literal`` in its type.

    >>> list(list_values(Literal["left", "right"] | None))
    ['left', 'right']
    """
    for part in get_args(annotation):
        if get_origin(annotation) is Literal:
            yield str(part)
        else:
            yield from list_values(part)


def describe_value(word: str, text: str) -> str:
    """Return what the documentation of a field says about one of its values: its entry, or all of
    it.

    >>> describe_value("b", "Status. ``a``: first. ``b``: second; see ``c``. ``d``: last.")
    'Second; see c.'
    >>> describe_value("b", "Either ``a`` or ``b``.")
    'Either a or b.'
    """
    entry = re.search(rf"``{re.escape(word)}``: (.*?)(?=\s``[^`]+``: |$)", text)
    return _capitalize((entry[1] if entry else text).replace("``", ""))


@cache
def all_terms() -> tuple[Term, ...]:
    """Return all words: symptoms and general terms, commands, values, checks, columns
    and fields.
    """
    sources = (
        _find_sections,
        _find_commands,
        _find_values,
        _find_checks,
        _find_columns,
        _find_fields,
    )
    terms: dict[Term, None] = {}
    for source in sources:
        terms.update(dict.fromkeys(source()))
    return tuple(terms)


def _find_sections() -> Iterator[Term]:
    """Yield the sections of the pages of this package; commas in a heading separate spellings."""
    for role in ("symptom", "finding", "word"):
        text = (files(__package__) / f"{role}s.md").read_text(encoding="utf-8")
        for section in text.split("\n## ")[1:]:
            title, _, body = section.partition("\n")
            word, *others = title.split(", ")
            yield Term(word, role, body.strip(), tuple(others))


@cache
def remedy_of(rule: str) -> tuple[str, str]:
    """Return what to do about a finding of ``lint``, and the source of its rule: the last
    paragraphs of its section.
    """
    findings = {term.word: term.text for term in _find_sections() if term.role == "finding"}
    text = findings[rule]
    *_, fix, source = (" ".join(part.split()) for part in text.split("\n\n"))
    return fix.removeprefix("Fix: "), source.removeprefix("Source: ")


def _find_commands() -> Iterator[Term]:
    for name, _, command in catalog.commands():
        yield Term(name, "command", f"{command.help}\n\n    loradiag {name} --help")


def _find_models() -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield every class of records with the command of its records; ``every command`` for shared
    ones.
    """
    kinds_by_command: list[tuple[str, Iterable[type[BaseModel]]]] = [("every command", SHARED)]
    for feature in catalog.features():
        if feature.records:
            command = feature.commands[0].name or feature.name
            kinds_by_command.append((command, map(feature.load, feature.records)))
    for command, kinds in kinds_by_command:
        for kind in kinds:
            for model in find_models(kind):
                yield command, model


def _find_values() -> Iterator[Term]:
    for command, model in _find_models():
        documented = document_fields(model)
        for name, field in model.model_fields.items():
            for word in list_values(field.annotation):
                if f"``{word}``" in documented.get(name, ""):
                    yield Term(word, f"{name} of {command}", describe_value(word, documented[name]))


def _find_checks() -> Iterator[Term]:
    for feature in catalog.features():
        if feature.checks:
            checks = feature.load(feature.checks)
            documented = document_fields(checks)
            for name in checks.names():
                text = documented[name].replace("``", "")
                yield Term(name, f"built-in check of {feature.name}", text)


def _find_columns() -> Iterator[Term]:
    for command, model in _find_models():
        for shown in getattr(model, "shown", ()):
            about = f"{shown.about.rstrip('.')}."
            others = (shown.head, shown.path)
            yield Term(shown.title, f"column of {command}", about, others)


def _find_fields() -> Iterator[Term]:
    for command, model in _find_models():
        for name, text in document_fields(model).items():
            yield Term(name, f"field of {command}", text.replace("``", ""))


def _capitalize(text: str) -> str:
    # Not Greek letters: ε and Ε are different signs.
    return text if text[1:2].isupper() or not text[:1].isascii() else text[:1].upper() + text[1:]


def find_terms(words: str) -> list[Term]:
    """Return the terms with a spelling, ignoring case; C(16) counts as C(r).

    Without such a term: the symptoms whose titles contain all words. Empty for punctuation alone.
    """
    wanted = _normalize(words)
    if not wanted:
        return []
    found = [term for term in all_terms() if wanted in map(_normalize, (term.word, *term.others))]
    if found:
        return _merge_roles(found)
    symptoms = [term for term in all_terms() if term.role == "symptom"]
    return [term for term in symptoms if set(wanted.split()) <= _words_of(term.word)]


def find_nearest(words: str) -> list[str]:
    """Return up to five words: those of a similar spelling, then those whose meaning contains the
    given words.
    """
    spellings = {}
    for term in all_terms():
        for word in filter(None, (term.word, *term.others)):
            spellings[_normalize(word)] = term.word
    similar = get_close_matches(_normalize(words), spellings, n=5, cutoff=0.7)
    close = [spellings[word] for word in similar]
    mentioned = [term.word for term in all_terms() if words.casefold() in term.text.casefold()]
    return list(dict.fromkeys([*close, *mentioned]))[:5]


def _normalize(word: str) -> str:
    """Return a spelling in lower case, without marks around it, with blanks for ``_`` and ``-``,
    C(r) for C(16).
    """
    word = re.sub(r"^C\(\d+\)$", "C(r)", word.strip(" .:!?\"'"), flags=re.IGNORECASE)
    return " ".join(word.replace("_", " ").replace("-", " ").casefold().split())


def _words_of(title: str) -> set[str]:
    return set(re.findall(r"\w+", title.casefold()))


def _merge_roles(terms: Iterable[Term]) -> list[Term]:
    """Return a term for each distinct pair of word and text, with the roles of all its terms
    joined.
    """
    roles: dict[tuple[str, str], list[str]] = {}
    for term in terms:
        roles.setdefault((term.word, term.text), []).append(term.role)
    return [Term(word, _join_roles(named), text) for (word, text), named in roles.items()]


def _join_roles(roles: list[str]) -> str:
    """Return roles as text; roles that differ in their command only are written once, with all
    commands.

    >>> _join_roles(["verdict of spectrum", "verdict of overlap", "field of gate"])
    'verdict of spectrum, overlap; field of gate'
    """
    commands: dict[str, list[str]] = {}
    for role in roles:
        name, _, command = role.partition(" of ")
        commands.setdefault(name, []).append(command)
    return "; ".join(
        f"{name} of {', '.join(dict.fromkeys(of))}" if of[0] else name
        for name, of in commands.items()
    )
