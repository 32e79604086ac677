"""The path understand, train, ship: no command's next step leads back (``catalog.PATH``)."""

import re
from pathlib import Path

import pytest

from lora_diag import catalog

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# A command of a transcript, and the next step printed below its results.
STEP = re.compile(
    r"^ *\$ (?:\w+=\S+ )*loradiag ([^\n]+)((?:\n(?! *\$ | *```).*)*?)\n *Next +loradiag ([^\n]+)",
    re.MULTILINE,
)


def command_in(words):
    """Return the command that a line starts with: one or two words."""
    first, second = [*words.split(), ""][:2]
    return f"{first} {second}" if f"{first} {second}" in catalog.PATH else first


def is_forward(command, following):
    """Return whether a step leads on; a command outside the path, such as a plugin's, may lead
    anywhere.
    """
    if command == following or not {command, following} <= {*catalog.PATH}:
        return True
    return catalog.PATH.index(command) < catalog.PATH.index(following)


def test_path_names_commands():
    assert len(set(catalog.PATH)) == len(catalog.PATH)
    assert set(catalog.PATH) <= {name for name, _, _ in catalog.commands()}


def test_declared_hints_lead_forward():
    steps = [
        (name, command_in(hint.command))
        for name, _, command in catalog.commands()
        for hint in command.hints
        if not hint.command.startswith("-")
    ]
    assert steps
    assert [step for step in steps if not is_forward(*step)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_printed_next_steps_lead_forward(page):
    steps = [
        (command_in(words), command_in(following))
        for words, _, following in STEP.findall(page.read_text())
    ]
    assert [step for step in steps if not is_forward(*step)] == []
