"""SGLang: α/r for all modules, regardless of patterns and rsLoRA; factors of another rank than r are an error.

Source: sgl-project/sglang, ``srt/lora/lora.py`` (``LoRAAdapter.__init__``, ``_process_weight``, ``normalize_qkv_proj``,
``normalize_gate_up_proj``), ``lora_config.py``, ``lora_manager.py`` (``validate_new_adapter``), ``mem_pool.py``
(``load_lora_weight_to_buffer``), ``utils.py`` (``get_normalized_target_modules``, ``get_target_module_name``).

- The scale is ``lora_alpha / r``; rsLoRA is not read (issue 40835, open in September 2026), nor are patterns.
- A buffer has r rows and takes a factor of r rows and no other: unequal ranks fail an assertion.
- ``target_modules`` must be a list, or ``all`` or ``all-linear``: a regular expression is refused.
- q, k and v of a layer are joined: with one of them adapted, q and v must be (a missing k is zero).
- ``lm_head`` and embeddings that ``target_modules`` does not name are skipped, as is every weight outside the layers;
  ``lora_B.bias`` is overwritten by ``lora_B.weight``, which sorts after it.
- DoRA is refused: in 0.5.23 by name, before by the shape of its magnitudes.

Read in 0.5.10 and 0.5.23. A later ``lora_config.py`` (commit 0ceb81fe) keeps entries of patterns that differ from the
defaults, to decide about them when an adapter is loaded: not judged here. Date read: 2026-11-27.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from lora_diag.adapters.contents import Contents, Item
from lora_diag.diagnostics.portability.rules import Consumer, Outcome, Rule, join_reasons

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_JOINED = ("q_proj", "k_proj", "v_proj")
_TABLES = ("embed_tokens", "lm_head")


def _refuses(contents: Contents) -> str:
    config = contents.config
    kind = str(config.get("peft_type"))
    targets = config.get("target_modules")
    odd = contents.first("other", "convolution", "experts", "residual" if config.get("kasa_config") else "other")
    rank = config.get("r")
    unequal = next((item for item in contents.pairs if item.rank != rank and item.part != "experts"), None)
    return join_reasons(
        f"peft_type {kind}" if kind.lower() != "lora" else "",
        "DoRA" if config.get("use_dora") or contents.first("dora") else "",
        "target_modules as a regular expression"
        if isinstance(targets, str) and targets not in {"all", "all-linear"}
        else "no target_modules"
        if not targets
        else "",
        f"{odd.key}: no target module of the server has such a name" if odd is not None else "",
        f"{unequal.module} has rank {unequal.rank}, and r is {rank}: an assertion fails" if unequal is not None else "",
        next(_find_incomplete(contents), ""),
    )


def _find_incomplete(contents: Contents) -> Iterator[str]:
    """Yield, for each layer without all of the factors that are joined into one, what it lacks."""
    owners: dict[str, set[str]] = {}
    for item in contents.pairs:
        owner, _, leaf = item.module.rpartition(".")
        if leaf in _JOINED and _LAYER.search(item.module):
            owners.setdefault(owner, set()).add(leaf)
    for owner, leaves in owners.items():
        if missing := [leaf for leaf in ("q_proj", "v_proj") if leaf not in leaves]:
            yield f"{owner} has factors for {', '.join(sorted(leaves))} and none for {', '.join(missing)}"


def _applies(contents: Contents, item: Item) -> Outcome:
    if item.part == "bias":
        return Outcome("dropped", why="lora_B.bias is overwritten by lora_B.weight, other biases are skipped")
    if item.part in {"value", "norm", "rows"}:
        return Outcome("dropped", why="what is no pair of factors is skipped")
    table = next((name for name in _TABLES if name in item.module), None)
    if not _LAYER.search(item.module + "."):
        target_modules = contents.config.get("target_modules") or ()
        targets = (
            {"all"} if isinstance(target_modules, str) else {str(name).rpartition(".")[2] for name in target_modules}
        )
        if table is None or not targets & {table, "all"}:
            return Outcome("dropped", why="outside the layers, and not named in target_modules")
    scale = float(contents.config["lora_alpha"] / contents.config["r"])
    return Outcome("applied", scale, "lora_alpha / r for all modules; rsLoRA and patterns are not read")


CONSUMER = Consumer(
    "sglang",
    "SGLang",
    frozenset({"peft"}),
    (Rule("0.5.10", "", ("0.5.10", "0.5.23"), _refuses, _applies),),
    rank_option="--max-lora-rank",
)
