"""LN tuning: normalization layers trained in full and stored with their new values.

Reference: Zhao et al. 2023, https://arxiv.org/abs/2312.11420; ``peft.tuners.ln_tuning``.
"""

from __future__ import annotations

import re

from lora_diag.adapters.keys import strip
from lora_diag.adapters.source import Source
from lora_diag.adapters.updates import NewValue, Reading
from lora_diag.adapters.values import add_stored_values

PART = re.compile(r"\.ln_tuning_layers(\.(?!weight$|bias$)[^.]+)?(?=\.(weight|bias)$)")


def read_ln_tuning(source: Source) -> Reading:
    """Read a PEFT LN_TUNING adapter."""
    norm_keys = [key for key in source.checkpoint if PART.search(key)]
    values = tuple(NewValue(PART.sub("", strip(key)), key) for key in norm_keys)
    rest = [key for key in source.checkpoint if key not in set(norm_keys)]
    return add_stored_values(Reading(f"PEFT LN tuning, {len(norm_keys)} tensors", (), values), source, rest)
