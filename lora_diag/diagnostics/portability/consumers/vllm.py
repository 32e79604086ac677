"""vLLM: α/r or α/√r, since 0.32 with the patterns; refuses unsupported settings.

Source: vllm-project/vllm, ``lora/peft_helper.py`` (``PEFTHelper``: ``get_rank_and_scaling``, ``_validate_features``,
``validate_legal``), ``lora/lora_model.py`` (``from_lora_tensors``, ``check_unexpected_modules``), ``lora/utils.py``
(``parse_fine_tuned_lora_name``), ``config/lora.py`` (``MaxLoRARanks``).

- 0.32 and later: the scale of each module by PEFT's rule; ``lora_bias``, initialisations that change the base,
  activated LoRA, ``layer_replication``, BD-LoRA and QA-LoRA are refused (read in 0.32.0, 0.33.0);
- before: one scale for all modules, patterns are not read; these are not detected, and ``lora_B.bias`` is overwritten
  by ``lora_B.weight``, which sorts after it (read in 0.28.0, 0.30.0, 0.31.0);
- 0.10: any ``modules_to_save`` is refused, and so are stacked experts; ``lora_bias`` is applied with
  ``--enable-lora-bias`` and dropped without (read in 0.10.0). When that changed between 0.10 and 0.28 was not read.

Whether a model of vLLM takes factors on a module is not known here, only that none takes them on a convolution. Date
read: 2026-11-27.
"""

from __future__ import annotations

from functools import partial

from lora_diag.adapters.contents import Contents, Item
from lora_diag.diagnostics.portability.rules import Consumer, Outcome, Rule, join_reasons, one_scale

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

# Initialisations after which the base is the one that the adapter names.
_PLAIN_STARTS = {"gaussian", "eva", "orthogonal", "mica", "lora_ga"}
_UNSUPPORTED = {
    "lora_bias": "lora_bias",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer_replication",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QA-LoRA",
}


def _explain_saved(contents: Contents, allowed: set[str]) -> str:
    refused = [name for name in contents.config.get("modules_to_save") or () if name not in allowed]
    return f"modules_to_save {', '.join(map(str, refused))}" if refused else ""


def _refuses(contents: Contents, since: str) -> str:
    config = contents.config
    start = config.get("init_lora_weights")
    unsupported = [word for key, word in _UNSUPPORTED.items() if config.get(key)]
    changed = isinstance(start, str) and start.lower() not in _PLAIN_STARTS
    odd = contents.first("convolution", "rows", "other") or (contents.first("experts") if since == "0.10" else None)
    value = contents.first("value", "norm")
    plain_value = value is not None and value.module.rpartition(".")[2] in {"classifier", "score"}
    return join_reasons(
        _explain_saved(contents, {"classifier", "score"} if since != "0.10" else set()),
        "DoRA" if config.get("use_dora") or contents.first("dora") else "",
        f"bias={config['bias']!r}" if config.get("bias") not in (None, "none") else "",
        ", ".join(unsupported) if since == "0.32" else "",
        f"init_lora_weights={start!r}, which changes the base" if changed and since == "0.32" else "",
        f"{odd.key}: a tensor that it has no place for" if odd is not None else "",
        f"{value.key}: a weight in full" if value is not None and not plain_value else "",
    )


def _applies(contents: Contents, item: Item) -> Outcome:
    if item.part in {"value", "norm"}:
        return Outcome("full")
    return Outcome("applied", item.scale)


def _applies_old(contents: Contents, item: Item) -> Outcome:
    if item.part in {"value", "norm"}:
        return Outcome("full")
    if item.part == "bias":
        return Outcome("dropped", why="lora_B.bias is overwritten by lora_B.weight")
    return Outcome("applied", one_scale(contents.config), "one scale for all modules; patterns are not read")


CONSUMER = Consumer(
    "vllm",
    "vLLM",
    frozenset({"peft"}),
    (
        Rule("0.32", "", ("0.32.0", "0.33.0"), partial(_refuses, since="0.32"), _applies),
        Rule("0.28", "0.32", ("0.28.0", "0.30.0", "0.31.0"), partial(_refuses, since="0.28"), _applies_old),
        Rule("0.10", "0.28", ("0.10.0",), partial(_refuses, since="0.10"), _applies_old),
    ),
    largest_rank=RANKS[-1],
    default_rank=16,
    rank_option="--max-lora-rank",
    rank_choices=RANKS,
)
