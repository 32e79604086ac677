"""α for adapters whose files give none: the user's ``--alpha`` or ``--alpha-is-rank``.

It never overrides an α in a file. A PEFT file without its config is read by the ranks of its factors.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_diag.adapters.keys import by_module
from lora_diag.adapters.source import Config, Source, StatedAlpha
from lora_diag.errors import UsageError

_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


def alpha_option(options: Mapping[str, Any]) -> StatedAlpha:
    """Return the α of the options ``alpha`` and ``alpha_is_rank``; ``rank`` for α = r, None without either.

    Raises:
        UsageError: Both are given, or α is zero or not finite.
    """
    alpha, is_rank = options.get("alpha"), bool(options.get("alpha_is_rank"))
    if alpha is not None and is_rank:
        raise UsageError("--alpha and --alpha-is-rank: contradict each other; give only one of them")
    if alpha is not None and not (math.isfinite(alpha) and alpha != 0):
        raise UsageError(f"--alpha {alpha:g}: must be a finite number other than 0")
    return "rank" if is_rank else alpha


def add_config(source: Source) -> Source:
    """Return a source with the settings that are missing in a PEFT file, from the ranks of its factors and the given α.

    Raises:
        InputError: The file holds several adapters.
    """
    if source.stated_alpha is None:
        return source
    config = source.config
    if config is None and any(".lora_A" in name or ".lora_embedding_A" in name for name in source.checkpoint):
        return replace(
            source, config=Config(Path(f"{source.path} (--alpha)"), _make_settings(source)), is_completed=True
        )
    if config is not None and config.text("peft_type").upper() == "LORA" and "lora_alpha" not in config:
        added: dict[str, Any] = {"lora_alpha": source.stated_alpha}
        if source.stated_alpha == "rank":
            added = {"lora_alpha": config.integer("r"), "alpha_pattern": config.table("rank_pattern")}
        return replace(source, config=Config(config.path, {**config.values, **added}), is_completed=True)
    return source


def _make_settings(source: Source) -> dict[str, Any]:
    """Return the settings of a PEFT file without a config, from the shapes of its factors and the given α."""
    modules, _ = by_module(source.checkpoint, _FACTORS, source.path)
    ranks = {
        module: source.checkpoint[parts[key]].shape[0]
        for module, parts in modules.items()
        for key in ("lora_A", "lora_embedding_A")
        if key in parts and source.checkpoint[parts[key]].shape
    }
    default_rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    pattern = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != default_rank}
    return {
        "peft_type": "LORA",
        "r": default_rank,
        "lora_alpha": default_rank if source.stated_alpha == "rank" else source.stated_alpha,
        "rank_pattern": pattern,
        "alpha_pattern": pattern if source.stated_alpha == "rank" else {},
        "use_dora": any("lora_magnitude_vector" in parts for parts in modules.values()),
    }
