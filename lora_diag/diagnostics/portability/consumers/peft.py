r"""PEFT: s = α/r or α/√r, r and α of each module from ``rank_pattern`` and ``alpha_pattern``.

Source: huggingface/peft, ``tuners/lora/model.py`` (``_create_and_replace``), ``tuners/lora/layer.py``
(``update_layer``), ``utils/other.py`` (``get_pattern_key``). A key k of a pattern is for module m if

- 0.15 and later: ``re.match(rf"(.*\.)?({k})$", m)``, looked up separately for r and α (read in 0.15.0, 0.21.2);
- 0.14: ``re.match(rf".*\.{k}$", m)``, so that a key that is the whole name or is anchored (``^``) matches nothing (read
  in 0.14.0);
- 0.13 and before: the same, and the first key of both tables together decides about r and α (read in 0.13.2).

Where r is not that of the file's factors, loading fails with a size mismatch. Fields of a config that a version does
not know are dropped (0.13.2, ``config.py``); this check covers only ``lora_bias``, added in 0.14. Date
read: 2026-11-27.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import partial
from typing import Any

from lora_diag.adapters.contents import PAIRS, Contents, Item
from lora_diag.diagnostics.portability.rules import Consumer, Outcome, Rule


def _refuses(contents: Contents) -> str:
    return ""


def _applies(contents: Contents, item: Item) -> Outcome:
    return Outcome("intended", item.scale) if item.part in {*PAIRS, "other"} else Outcome("full")


def _find_pattern_key(keys: Iterable[str], module: str) -> str:
    """Return the key of a pattern that PEFT before 0.15 uses for a module."""
    return next((key for key in keys if re.match(rf".*\.{key}$", module)), module)


def _read_settings(contents: Contents, item: Item, together: bool) -> tuple[int, float]:
    """Return r and α of a module by the rule of old versions."""
    config = contents.config
    ranks, alphas = (dict[str, Any](config.get(name) or {}) for name in ("rank_pattern", "alpha_pattern"))
    if together:
        key = _find_pattern_key([*ranks, *alphas], item.module)
        keys = key, key
    else:
        keys = _find_pattern_key(ranks, item.module), _find_pattern_key(alphas, item.module)
    return ranks.get(keys[0], config["r"]), alphas.get(keys[1], config["lora_alpha"])


def _refuses_old(contents: Contents, together: bool) -> str:
    if contents.config.get("peft_type") != "LORA":
        return ""
    for item in contents.pairs:
        rank, _ = _read_settings(contents, item, together)
        if item.part != "experts" and rank != item.rank:
            return f"{item.module} has rank {item.rank}, and its patterns give it {rank}: size mismatch"
    return ""


def _applies_old(contents: Contents, item: Item, together: bool) -> Outcome:
    if together and item.part == "bias" and contents.config.get("lora_bias"):
        return Outcome("dropped", why="lora_bias is not known to it")
    if item.part not in {"factors", "embedding", "convolution"}:
        return _applies(contents, item)
    rank, alpha = _read_settings(contents, item, together)
    scale = alpha / (math.sqrt(rank) if contents.config.get("use_rslora") else rank)
    return Outcome("applied", scale, "a pattern's key is matched otherwise than today")


CONSUMER = Consumer(
    "peft",
    "PEFT",
    frozenset({"peft"}),
    (
        Rule("0.15", "", ("0.15.0", "0.21.2"), _refuses, _applies),
        Rule("0.14", "0.15", ("0.14.0",), partial(_refuses_old, together=False), partial(_applies_old, together=False)),
        Rule("", "0.14", ("0.13.2",), partial(_refuses_old, together=True), partial(_applies_old, together=True)),
    ),
)
