"""The summary of a spectrum run: six lines, each an answer with its number."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import median

from rich.table import Table
from rich.text import Text

from lora_diag.reports.text import count, number, percent, safe, short
from lora_diag.results import LeftOut, Results, Spectrum
from lora_diag.results.names import part_of

# A median C(16) from here on is called low-rank, and from there on partly so. Words, not measurements: they are
# printed with the number they stand on.
LOW_RANK, PARTLY = 0.9, 0.5

REASONS = {
    "vector": "1-D (norms, biases)",
    "only_in_base": "only in BASE",
    "only_in_tuned": "only in TUNED",
    "not_float": "not floating point",
    "shape_differs": "of another shape",
    "added_rows": "with rows only in TUNED",
    "removed_rows": "with rows only in BASE",
    "empty": "empty",
    "not_selected": "not selected",
    "non_finite": "not finite",
}


def summary(results: Results, then: str | None = None) -> Table:
    """Return the summary as a two-column grid: a word, and the sentence that answers it."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for word, sentence in [*_lines(results), *([("Next", then)] if then else [])]:
        grid.add_row(word, Text(sentence, style=_style(word, sentence)))
    return grid


def _style(word: str, sentence: str) -> str:
    if word in {"Warning", "Not measured"} or (word == "Resolved?" and sentence.startswith("no")):
        return "bold red"
    return "bold yellow" if word == "Resolved?" and not sentence.startswith("yes") else ""


def _lines(results: Results) -> list[tuple[str, str]]:
    records = adaptable(results)
    moved = [record for record in records if record.fro > 0]
    lines = [("Compared", _compared(results))]
    if not moved:
        lines.append(("Moved", "nothing: ΔW is zero in every matrix. Is TUNED the checkpoint you meant?"))
    else:
        lines.append(("Moved", _moved(records)))
        lines += _ranks_used(moved) if _is_factored(moved) else _ranks_needed(moved, results.run.settings["ranks"])
    if coverage := _coverage(results):
        lines.append(("Where", coverage))
    lines.append(("Left out", _left_out(results.left_out)))
    lines += [("Not measured", f"{short(item.layer)}: {item.detail}") for item in results.left_out if _failed(item)]
    if results.end is None:
        lines.append(("Warning", "the run did not finish: these are the layers measured so far"))
    return lines


def adaptable(results: Results) -> list[Spectrum]:
    """Return the records of the matrices that adapters usually target; all records if there is no such matrix."""
    records = [record for record in results if part_of(record.layer) == "matrices"]
    return records or list(results)


def _compared(results: Results) -> str:
    sides = "".join(f"{side.role:<5} {safe(side.path)} ({side.kind})\n" for side in results.run.inputs)
    entries = sum(math.prod(record.shape) for record in results)
    vocabulary = sum(part_of(record.layer) == "vocabulary" for record in results)
    tables = f" ({vocabulary} of them embeddings or head)" if vocabulary else ""
    dtypes = sorted({"/".join(dict.fromkeys(filter(None, record.dtypes))) for record in results})
    notes = "".join(f"\n{side.role}: {safe(note)}" for side in results.run.inputs for note in side.notes)
    return f"{sides}{len(results)} matrices{tables}, {count(entries)} entries, {', '.join(dtypes)}{notes}"


def _moved(records: Sequence[Spectrum]) -> str:
    total = math.hypot(*(record.fro for record in records))
    ratios = {record.layer: ratio for record in records if (ratio := record.relative) is not None}
    if not ratios:
        return f"‖ΔW‖ = {number(total)} over all matrices"
    base = math.hypot(*(record.base_fro or 0.0 for record in records))
    most, least = max(ratios, key=ratios.__getitem__), min(ratios, key=ratios.__getitem__)
    return (
        f"‖ΔW‖/‖W‖ = {number(total / base)} over all matrices\n"
        f"most {number(ratios[most])} in {short(most)}\n"
        f"least {number(ratios[least])} in {short(least)}"
    )


def _is_factored(records: Sequence[Spectrum]) -> bool:
    """Say whether these are updates of known factors, whose rank is a setting and not a finding."""
    return all(record.method == "factored" for record in records)


def _ranks_used(records: Sequence[Spectrum]) -> list[tuple[str, str]]:
    """Say how much of an adapter's rank is used."""
    used = sorted(rank for record in records if (rank := record.rank_at["0.9"]) is not None)
    if not used:
        return []
    given = sorted({len(record.s) for record in records})
    of = str(given[0]) if len(given) == 1 else f"{given[0]} to {given[-1]}"
    middle = used[len(used) // 2]
    return [
        ("Resolved?", "yes: the factors are the update; no rounding of merged weights comes between"),
        ("Rank used", f"90% of the energy in {middle} of {of} directions at the median, from {used[0]} to {used[-1]}"),
    ]


def _ranks_needed(moved: Sequence[Spectrum], ranks: Sequence[int]) -> list[tuple[str, str]]:
    """Say which rank the update needs, as far as the files can show it."""
    readable = [record for record in moved if record.resolution.verdict != "unresolved"]
    return [_files(moved), *_low_rank(readable, ranks), ("Rank at 90%", _rank_at_90(readable))]


def _files(moved: Sequence[Spectrum]) -> tuple[str, str]:
    """Say whether the files can show the update at all, before any rank is printed."""
    unresolved = [record for record in moved if record.resolution.verdict == "unresolved"]
    limited = [record for record in moved if record.resolution.verdict == "floor-limited"]
    shares = [(record.resolution.noise_fro / record.fro) ** 2 for record in moved]
    if not unresolved and not limited:
        return "Resolved?", f"yes: rounding makes up {percent(max(shares))} of ‖ΔW‖² at most"
    word = "no" if len(unresolved) > len(moved) / 2 else "partly"
    counts = [(limited, "floor-limited (~)"), (unresolved, "unresolved (!)")]
    parts = [f"{len(group)} {name}" for group, name in counts if group]
    unchanged = max(record.resolution.unchanged or 0.0 for record in moved)
    still = f", up to {percent(unchanged)} of the entries are unchanged" if unchanged >= 0.01 else ""
    return "Resolved?", (
        f"{word}: of {len(moved)} matrices {' and '.join(parts)}: rounding is expected to make up "
        f"{percent(min(1.0, median(shares)))} of the median ‖ΔW‖²{still}; ranks beyond the signal rank count noise. "
        "Measure the adapter, not its merge, or save the fine-tune in float32"
    )


def _low_rank(records: Sequence[Spectrum], ranks: Sequence[int]) -> list[tuple[str, str]]:
    """Say what each usual rank keeps at the median and at the worst layer, and put a word to it."""
    if not records:
        return [("Low-rank?", "these files cannot tell: no matrix is resolved")]
    shown = [rank for rank in ranks if rank in {8, 16, 64}] or list(ranks)[:3]
    kept: dict[int, float] = {}
    lines = []
    for rank in shown:
        shares = {r.layer: share for r in records if (share := r.energy[str(rank)]) is not None}
        if shares:
            kept[rank] = median(shares.values())
            worst = min(shares, key=shares.__getitem__)
            lines.append(f"r={rank} keeps {percent(kept[rank])}, at worst {percent(shares[worst])} in {short(worst)}")
    if not kept:
        return []
    judged = 16 if 16 in kept else max(kept)
    word = "yes" if kept[judged] >= LOW_RANK else "partly" if kept[judged] >= PARTLY else "no"
    head = f"{word}: r={judged} keeps {percent(kept[judged])} of the median layer's energy (Σσ²)"
    return [("Low-rank?", head), ("", "\n".join(lines))]


def _rank_at_90(records: Sequence[Spectrum]) -> str:
    if not records:
        return "not shown, for the same reason"
    ranks = [rank for record in records if (rank := record.rank_at["0.9"]) is not None]
    beyond = len(records) - len(ranks)
    kept = max(len(record.s) for record in records)
    if beyond > len(records) / 2:
        return f"beyond the {kept} values kept in {beyond} of {len(records)} layers; measure without --top"
    full = sorted({min(record.shape) for record in records})
    of = f"of {full[0]}" if len(full) == 1 else f"of {full[0]} to {full[-1]}"
    more = f"; beyond the {kept} values kept in {beyond} layers" if beyond else ""
    return f"median {sorted(ranks)[len(ranks) // 2]}, from {min(ranks)} to {max(ranks)} {of} possible{more}"


def _coverage(results: Results) -> str:
    """Say which share of ‖Δ‖² lies in matrices, in vocabulary tables, in norms and biases."""
    energy = dict.fromkeys(("matrices", "vocabulary", "vectors"), 0.0)
    for record in results:
        energy[part_of(record.layer)] += record.fro**2
    for item in results.left_out:
        if item.fro is not None and item.reason == "vector":
            energy["vectors"] += item.fro**2
    total = sum(energy.values())
    if total == 0:
        return ""
    words = {"matrices": "the matrices", "vocabulary": "embeddings and head", "vectors": "norms and biases"}
    shares = ", ".join(f"{percent(energy[part] / total)} in {words[part]}" for part in words if energy[part])
    selected = any(item.reason == "not_selected" for item in results.left_out)
    return f"of the whole change ‖Δ‖²{' in what was selected' if selected else ''}, {shares}"


def _left_out(left_out: Sequence[LeftOut]) -> str:
    """Count by reason; name what a user may not expect."""
    if not left_out:
        return "nothing"
    counts = Counter(item.reason for item in left_out)
    parts = []
    for reason, number_of in counts.items():
        names = [short(item.layer) for item in left_out if item.reason == reason]
        quiet = reason in {"vector", "not_selected"}
        shown = "" if quiet else f": {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        parts.append(f"{number_of} {REASONS[reason]}{shown}")
    return "; ".join(parts)


def _failed(item: LeftOut) -> bool:
    return item.reason == "non_finite"
