"""Write a man page for each command from its options: ``python tools/man.py FOLDER``."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_diag.cli.app import commands
from lora_diag.version import __version__


def roff(text: str) -> str:
    r"""Return a text as roff shows it literally.

    >>> print(roff(".x --rank 'q' a\\b"))
    \&.x \-\-rank \(aqq\(aq a\eb
    """
    escaped = text.replace("\\", r"\e").replace("-", r"\-").replace("'", r"\(aq")
    return re.sub(r"^\.", r"\\&.", escaped, flags=re.MULTILINE)


def every(group: Any, prefix: str = "loradiag") -> Iterator[tuple[str, Any]]:
    """Yield each command below a group with its full name."""
    for name, command in group.commands.items():
        yield f"{prefix} {name}", command
        if hasattr(command, "commands"):
            yield from every(command, f"{prefix} {name}")


def page(name: str, command: Any) -> str:
    """Return a man page.

    Args:
        name: Full name, such as ``loradiag probe sweep``.
        command: The command as Typer makes it.
    """
    text = re.sub(r"\n\s*", "\n", (command.help or "").strip())
    first, _, rest = text.partition("\n")
    lines = [
        f'.TH "{name.replace(" ", "-").upper()}" 1 "" "loradiag {__version__}"',
        ".SH NAME",
        f"{roff(name.replace(' ', '-'))} \\- {roff(first)}",
        ".SH SYNOPSIS",
    ]
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    words = [
        f"[{each.metavar}]" if not each.required else each.metavar or each.name.upper()
        for each in arguments
    ]
    lines += [f".B {roff(name)}", roff(" ".join([*words, "[OPTIONS]"]))]
    if rest.strip():
        lines += [".SH DESCRIPTION", roff(rest.strip()).replace("\n", "\n.br\n")]
    groups: dict[str, list[Any]] = {}
    for each in command.params:
        if not getattr(each, "hidden", False):
            group = (
                "Arguments"
                if each in arguments
                else getattr(each, "rich_help_panel", None) or "Options"
            )
            groups.setdefault(group, []).append(each)
    for group, members in groups.items():
        lines.append(f".SH {group.upper()}")
        for each in members:
            names = each.metavar or each.name.upper() if each in arguments else ", ".join(each.opts)
            value = f" {each.metavar}" if each not in arguments and each.metavar else ""
            lines += [".TP", f".B {roff(names + value)}", roff(" ".join((each.help or "").split()))]
    if hasattr(command, "commands"):
        lines.append(".SH COMMANDS")
        for word, each in command.commands.items():
            lines += [".TP", f".B {roff(word)}", roff(each.get_short_help_str())]
    return "\n".join(lines) + "\n"


def main(folder: Path) -> None:
    """Write ``loradiag.1`` and one page per command into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    top = commands()
    for name, command in [("loradiag", top), *every(top)]:
        (folder / f"{name.replace(' ', '-')}.1").write_text(page(name, command), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
