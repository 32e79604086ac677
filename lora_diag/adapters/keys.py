"""How PEFT names the tensors of an adapter file: ``base_model.model.MODULE.PART[.ADAPTER][.weight]``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from lora_diag.errors import InputError

PREFIX = "base_model.model."

# module -> part -> the tensor's name in the file.
Modules = dict[str, dict[str, str]]


def strip(name: str) -> str:
    """Return a name without PEFT's wrapper.

    >>> strip("base_model.model.model.norm.weight")
    'model.norm.weight'
    """
    return name.removeprefix(PREFIX)


def by_module(names: Iterable[str], parts: tuple[str, ...], path: Path) -> tuple[Modules, list[str]]:
    """Sort tensor names by the module they belong to.

    PEFT drops the adapter's name when it saves (``lora_A.weight``); a dump made by hand still has it
    (``lora_A.default.weight``), which is accepted as long as there is only one.

    Args:
        names: All names of the file.
        parts: The family's own words, such as ``lora_A``; a bias is the part ``lora_B.bias``.
        path: For the message.

    Returns:
        The parts of every module, and the names that have none.

    Raises:
        InputError: The file holds several adapters.

    Example:
        >>> by_module(["base_model.model.h.0.fc.lora_A.weight", "h.bias"], ("lora_A",), Path("x"))
        ({'h.0.fc': {'lora_A': 'base_model.model.h.0.fc.lora_A.weight'}}, ['h.bias'])
    """
    words = "|".join(map(re.escape, parts))
    key = re.compile(
        rf"(?:(?P<module>.+)\.)?(?P<part>{words})(?:\.(?!weight$|bias$)(?P<name>[^.]+))?(\.weight|(?P<bias>\.bias))?"
    )
    modules: Modules = {}
    rest: list[str] = []
    adapters: set[str | None] = set()
    for name in names:
        found = key.fullmatch(strip(name))
        if found is None:
            rest.append(name)
            continue
        adapters.add(found["name"])
        modules.setdefault(found["module"] or "", {})[found["part"] + (found["bias"] or "")] = name
    if len(adapters) > 1:
        shown = ", ".join(sorted(name or "(no name)" for name in adapters))
        raise InputError(f"{path}: holds several adapters ({shown}); save one of them alone")
    return modules, rest
