"""Names of tensors in PEFT adapter files: ``base_model.model.MODULE.PART[.ADAPTER][.weight]``.

Groups the tensors of a module, and checks them against each other and the config.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from lora_diag.adapters.source import Source
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
    """Group tensor names by module.

    PEFT removes the adapter's name on saving (``lora_A.weight``); a manual dump still has it
    (``lora_A.default.weight``), which is accepted if there is only one.

    Args:
        names: All names of the file.
        parts: Names of the family's parts, such as ``lora_A``; a bias is the part ``lora_B.bias``.
        path: For the message.

    Returns:
        The parts of every module, and the names without a part.

    Raises:
        InputError: The file holds several adapters.

    Example:
        >>> by_module(["base_model.model.h.0.fc.lora_A.weight", "h.bias"], ("lora_A",), Path("x"))
        ({'h.0.fc': {'lora_A': 'base_model.model.h.0.fc.lora_A.weight'}}, ['h.bias'])
    """
    alternatives = "|".join(map(re.escape, parts))
    pattern = re.compile(
        rf"(?:(?P<module>.+)\.)?(?P<part>{alternatives})(?:\.(?!weight$|bias$)(?P<name>[^.]+))?(\.weight|(?P<bias>\.bias))?"
    )
    modules: Modules = {}
    rest: list[str] = []
    adapters: set[str | None] = set()
    for name in names:
        match = pattern.fullmatch(strip(name))
        if match is None:
            rest.append(name)
            continue
        adapters.add(match["name"])
        modules.setdefault(match["module"] or "", {})[match["part"] + (match["bias"] or "")] = name
    if len(adapters) > 1:
        shown = ", ".join(sorted(name or "(no name)" for name in adapters))
        raise InputError(f"{path}: holds several adapters ({shown}); save one of them separately")
    return modules, rest


def is_named(module: str, name: str) -> bool:
    """Return whether a name in a config matches a module: equal, or the module ends in ``.name``.

    >>> is_named("h.0.q_proj", "q_proj"), is_named("h.0.q_proj", "proj")
    (True, False)
    """
    return module == name or module.endswith(f".{name}")


def pair_of(source: Source, module: str, parts: dict[str, str], prefix: str = "lora_") -> tuple[str, str]:
    """Return the names of A and B of a module.

    Raises:
        InputError: One is missing, or is not a matrix.
    """
    for part in ("A", "B"):
        if prefix + part not in parts:
            other = parts.get(prefix + ("B" if part == "A" else "A"), module)
            raise InputError(
                f"{source.checkpoint.path}: {module} has no {prefix}{part}, only {other}, so the file is "
                "incomplete; save the adapter again"
            )
        shape = source.checkpoint[parts[prefix + part]].shape
        if len(shape) < 2 or 0 in shape:
            raise InputError(
                f"{source.checkpoint.path}: {parts[prefix + part]} has shape {list(shape)}, as saved under "
                "DeepSpeed ZeRO-3 or FSDP without gathering the shards; save the adapter again, gathered"
            )
    return parts[prefix + "A"], parts[prefix + "B"]


def check_rank(source: Source, module: str, rank_a: int, expected: int, rank_b: int) -> None:
    """Check the ranks of a module's factors against each other and against the config.

    Raises:
        InputError: They differ, so that the scaling is unknown.
    """
    if rank_a != rank_b:
        raise InputError(
            f"{source.checkpoint.path}: {module}: A has rank {rank_a}, but B has rank {rank_b}; save the adapter again"
        )
    if rank_a != expected:
        raise InputError(
            f"{source.checkpoint.path}: {module} has rank {rank_a}, but {source.settings.path.name} says {expected}, "
            "so the scaling is unknown; give the config that this adapter was trained with"
        )
