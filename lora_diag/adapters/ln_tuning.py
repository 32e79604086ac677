"""LN tuning: normalisation layers are trained in full and stored with their new values.

Reference: Zhao et al. 2023, https://arxiv.org/abs/2312.11420; ``peft.tuners.ln_tuning``.
"""

from __future__ import annotations

import re

from lora_diag.adapters.keys import strip
from lora_diag.adapters.source import Source
from lora_diag.adapters.updates import NewValue, Reading
from lora_diag.adapters.values import stored_values

PART = re.compile(r"\.ln_tuning_layers(\.(?!weight$|bias$)[^.]+)?(?=\.(weight|bias)$)")


def is_ln_tuning(source: Source) -> bool:
    """Say whether this family reads the adapter."""
    return source.peft_type == "LN_TUNING"


def read_ln_tuning(source: Source) -> Reading:
    """Read a PEFT LN_TUNING adapter."""
    own = [key for key in source.checkpoint if PART.search(key)]
    values = [NewValue(PART.sub("", strip(key)), key) for key in own]
    more, extra, ignored = stored_values(source, [key for key in source.checkpoint if key not in set(own)])
    return Reading(f"PEFT LN tuning, {len(own)} tensors", tuple(extra), (*values, *more), (), ignored)
