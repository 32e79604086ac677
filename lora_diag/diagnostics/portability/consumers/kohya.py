"""kohya's sd-scripts: α/r of each module, α from the file; a missing α, or one of 0, means r.

Source: kohya-ss/sd-scripts, ``networks/lora.py`` (``LoRAModule.__init__``, ``create_network_from_weights``,
``load_weights``) at commit 02298e3c4a7e. The rank is that of ``lora_down``. Weights are loaded without ``strict``, so
that tensors other than factors and α are ignored: the magnitudes of DoRA and the parts of LyCORIS. Date read:
2026-11-27.
"""

from __future__ import annotations

from lora_diag.adapters.contents import Contents, Item
from lora_diag.diagnostics.portability.rules import Consumer, Outcome, Rule


def _refuses(contents: Contents) -> str:
    return ""


def _applies(contents: Contents, item: Item) -> Outcome:
    if item.rank is None or item.part == "other":
        return Outcome("dropped", why="only pairs of factors are read; other parts need LyCORIS")
    return Outcome("applied", item.alpha / item.rank if item.alpha else 1.0)


CONSUMER = Consumer("kohya", "sd-scripts", frozenset({"kohya"}), (Rule("", "", ("02298e3c4a7e",), _refuses, _applies),))
