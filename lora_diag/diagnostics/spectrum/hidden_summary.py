"""Statements on the update before rounding, and when ``recover`` is worth running."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import median

from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.records.vocabulary import Hidden
from lora_diag.rendering.statements import Statement, make_statement
from lora_diag.rendering.text import number, percent, short

# From this share of entries on that rounding left unchanged recover is named: at a third the recovered checkpoint has
# the loss of the stored one, at 65% it keeps 3 points more of the gain, at 89% twice as much (see docs/reference).
HIDDEN_FRACTION = 0.5

WORDS = {"recovered": "recovered", "size_only": "size only", "not_hidden": "not hidden", "refused": "refused"}


def suggested_fix(changed: Sequence[Spectrum]) -> str:
    """Return a clause that names ``recover`` where rounding left most entries unchanged and it was not tried."""
    candidates = [
        record
        for record in changed
        if record.hidden is None
        and record.metric == "weights"
        and record.resolution.verdict != "resolved"
        and (record.resolution.unchanged or 0.0) - (record.resolution.untouched or 0.0) >= HIDDEN_FRACTION
    ]
    if not candidates:
        return ""
    suffix = "" if len(candidates) == len(changed) else f" in {len(candidates)} of {len(changed)} matrices"
    return f"; loradiag recover (or --recover here) can estimate the update before rounding{suffix}"


def before_rounding(changed: Sequence[Spectrum]) -> list[Statement]:
    """Return the statement on size, ranks and directions before rounding; none where they were not requested."""
    tried = [(record, record.hidden) for record in changed if record.hidden is not None]
    if not tried:
        return []
    counts: Counter[str] = Counter(hidden.status for _, hidden in tried)
    parts = ", ".join(f"{counts[status]} {words}" for status, words in WORDS.items() if counts[status])
    lines = []
    sized = [(record, hidden) for record, hidden in tried if hidden.fro_interval is not None]
    if sized:
        whole = math.hypot(*(hidden.fro_estimate or 0.0 for _, hidden in sized))
        files = math.hypot(*(record.fro for record, _ in sized))
        errors = [(high - low) / (high + low) for _, hidden in sized for low, high in [hidden.fro_interval or (1, 1)]]
        lines.append(
            f"‖X‖ = {number(whole)}, ± {percent(median(errors))} in the median matrix; the files' ‖ΔW‖ is "
            f"{number(files / whole)} times that"
        )
    lines.append(f"of {len(tried)} matrices that the files do not resolve {parts}")
    recovered = [(record, hidden) for record, hidden in sized if hidden.status == "recovered"]
    if recovered:
        middle, lowest, highest = (
            _median_text(ranks) for ranks in zip(*(_list_ranks(hidden) for _, hidden in recovered), strict=True)
        )
        read = _median_text([record.rank_at["0.9"] for record, _ in recovered])
        lines.append(
            f"rank at 90% {middle} (interval {lowest} to {highest}) at the median, where the files read {read}"
        )
        signal = _median_text([record.resolution.signal_rank for record, _ in recovered])
        directions = _median_text([hidden.directions for _, hidden in recovered])
        lines.append(f"signal rank {directions} by rounding cells at the median, {signal} by the files' noise edge")
    refused = [(record, hidden) for record, hidden in tried if hidden.status == "refused"]
    if refused:
        lines.append(f"{short(refused[0][0].layer)}: {refused[0][1].reason}")
    return [make_statement("before_rounding", "Before rounding", *lines)]


def _list_ranks(hidden: Hidden) -> tuple[int | None, int | None, int | None]:
    """Return the rank at 90% and the ends of its interval."""
    lowest, highest = (hidden.rank_at_interval or {}).get("0.9", (None, None))
    return (hidden.rank_at_estimate or {}).get("0.9"), lowest, highest


def _median_text(ranks: Sequence[int | None]) -> str:
    """Return the median; of ranks that most layers do not reach, that it is not known."""
    known = [rank for rank in ranks if rank is not None]
    return str(int(median(known))) if 2 * len(known) > len(ranks) else "unknown"
