"""Ranks of one layer by several rules.

Uses one spectrum. Rules that need every singular value are undefined for a truncated one.
"""

from __future__ import annotations

import numpy as np

from lora_diag.decisions.allocate.record import Policies
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.metrics import energy_curve
from lora_diag.metrics.thresholds import gavish_donoho, knee


def policies(record: Spectrum) -> Policies:
    """Return the rank of one layer by every rule.

    Args:
        record: Its spectrum. Knee, effective rank and Gavish–Donoho are null unless it holds all min(out, in) values:
            an adapter has the rank of its factors and no noise.
    """
    s = np.asarray(record.s)
    full = record.complete and len(s) == min(record.shape)
    changed = record.fro > 0
    ranks = {
        "energy 90%": record.rank_at["0.9"],
        "knee": knee(energy_curve(s, record.fro, True)) if full and changed else None,
        "effective": int(np.ceil(record.effective_rank)) if record.effective_rank is not None else None,
        "Gavish–Donoho": gavish_donoho(s, record.shape) if full and changed else None,
        "signal": record.resolution.signal_rank,
    }
    return Policies(
        layer=record.layer,
        shape=record.shape,
        ranks=ranks,
        complete=record.complete,
        verdict=record.resolution.verdict,
    )
