r"""diffusers: a ``LoraConfig`` made from the file's ranks and alphas, or from its metadata.

Source: huggingface/diffusers, ``utils/peft_utils.py`` (``get_peft_kwargs``), ``loaders/peft.py``
(``load_lora_adapter``), ``loaders/lora_conversion_utils.py``. Each part of the pipeline (U-Net, transformer, text
encoder) has its own config:

- r is the most frequent rank, ``rank_pattern`` names the others.
- With alphas in the file: α is the most frequent of them (or the only one), ``alpha_pattern`` names the others, and a
  module without one gets that α.
- Without any: α = r in every module since 0.40 (pull request 14409; read in 0.40.0, 0.42.1); before, the rank of the
  first module in the file is the α of all (read in 0.36.0, 0.39.0).
- ``lora_adapter_metadata`` in the file takes the place of all this.

Date read: 2026-11-27.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from lora_diag.adapters.contents import Contents, Item, component_of
from lora_diag.diagnostics.portability.rules import Consumer, Outcome, Rule


def _refuses(contents: Contents) -> str:
    odd = contents.first("other")
    return f"{odd.key}: a part that is no LoRA" if odd is not None else ""


def _applies(contents: Contents, item: Item, alpha_is_rank: bool) -> Outcome:
    if item.rank is None:
        return Outcome("full")
    if item.part == "dora" or (contents.has_metadata and item.alpha is None):
        return Outcome("intended", item.scale)
    alpha, ranks_are_alphas = _choose_alpha(contents.components[component_of(item.module)], alpha_is_rank)
    if ranks_are_alphas:
        return Outcome("applied", 1.0)
    own_alpha = item.alpha if item.alpha is not None else alpha
    why = "" if item.alpha is not None else f"gives no alpha, and gets {alpha:g}, that of other modules"
    return Outcome("applied", own_alpha / item.rank, why)


def _choose_alpha(items: Sequence[Item], alpha_is_rank: bool) -> tuple[float, bool]:
    """Return the α of modules without one, and whether it is each module's own rank."""
    alphas = [item.alpha for item in items if item.alpha is not None]
    if alphas:
        return Counter(alphas).most_common(1)[0][0], False
    first = min(items, key=lambda item: item.key)
    return float(first.rank or 1), alpha_is_rank


_NEW: Callable[[Contents, Item], Outcome] = partial(_applies, alpha_is_rank=True)
_OLD: Callable[[Contents, Item], Outcome] = partial(_applies, alpha_is_rank=False)

CONSUMER = Consumer(
    "diffusers",
    "diffusers",
    frozenset({"diffusers", "kohya"}),
    (
        Rule("0.40", "", ("0.40.0", "0.42.1"), _refuses, _NEW),
        Rule("", "0.40", ("0.36.0", "0.39.0"), _refuses, _OLD),
    ),
)
