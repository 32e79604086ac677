"""mlx-lm: ``lora_parameters.scale`` for all modules, not divided by the rank; one rank for all.

Source: ml-explore/mlx-lm, ``tuner/utils.py`` (``load_adapters``, ``linear_to_lora_layers``), ``tuner/lora.py``,
``tuner/dora.py`` of mlx-lm 0.32.2. The model's layers are made with ``rank``, ``scale`` and ``dropout`` of the config
for the last ``num_layers`` blocks, so that a config without one of them, a factor of another rank and a tensor that is
none of ``lora_a``, ``lora_b`` and ``m`` are errors. So is one of a head that is tied to the embedding: it has no layer.
The update of the embedding acts in a tied head, too (``LoRAEmbedding.as_linear``). Date read: 2026-11-27.
"""

from __future__ import annotations

from functools import partial

from lora_diag.adapters.contents import PAIRS, Contents, Item
from lora_diag.diagnostics.portability.rules import Consumer, Outcome, Rule, join_reasons, tied_refusal, unjudged_tie


def _refuses(contents: Contents) -> str:
    config = contents.config
    if config.get("fine_tune_type") == "full":
        return ""
    settings = config.get("lora_parameters") or {}
    missing = [key for key in ("rank", "scale", "dropout") if key not in settings]
    missing += [] if "num_layers" in config else ["num_layers"]
    unequal = next((item for item in contents.pairs if item.rank != settings.get("rank")), None)
    odd = next((item for item in contents.items if item.part not in PAIRS), None)
    return join_reasons(
        f"the config gives no {', '.join(missing)}" if missing else "",
        f"{unequal.module} has rank {unequal.rank}, and lora_parameters.rank is {settings['rank']}"
        if unequal is not None and "rank" in settings
        else "",
        f"{odd.key}: no adapter parameter" if odd is not None else "",
        tied_refusal("mlx", contents) if contents.tied else "",
    )


def _applies(contents: Contents, item: Item) -> Outcome:
    return Outcome("intended", item.scale) if item.part in PAIRS else Outcome("full")


CONSUMER = Consumer(
    "mlx",
    "mlx-lm",
    frozenset({"mlx"}),
    (Rule("0.32", "", ("0.32.2",), _refuses, _applies, partial(unjudged_tie, "mlx")),),
)
