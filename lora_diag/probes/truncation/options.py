"""Options of ``probe truncation``."""

from collections.abc import Sequence
from typing import Annotated

from lora_diag.running.options import GRANULARITY, RANKS, LayerProbeOptions, MissingAlpha, Option, Shifted


class TruncationOptions(Shifted, LayerProbeOptions, MissingAlpha, total=False):
    """Options of ``probe truncation``."""

    ranks: Annotated[Sequence[int], RANKS.by((0, 1, 2, 4, 8, 16, 32, 64))]
    granularity: Annotated[str, GRANULARITY]
    untruncated: Annotated[
        str,
        Option(
            "tuned",
            "Norms, biases, embeddings and head: as in TUNED, or BASE.",
            "tuned|base",
            ("--untruncated",),
            setting="rest",
        ),
    ]
