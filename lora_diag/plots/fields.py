"""A number of a record by its dotted name, and how it is called on an axis."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from lora_diag.results import LayerRecord, Spectrum
from lora_diag.results.base import Record
from lora_diag.results.spectrum import METRIC_NAMES, NORMS

# How fields are called; what is not here keeps its own name.
_NAMES = {
    "fro": "‖ΔW‖_F",
    "base_fro": "‖W_base‖_F",
    "relative": "‖ΔW‖_F / ‖W_base‖_F",
    "stable_rank": "stable rank ‖ΔW‖_F² / σ₁²",
    "effective_rank": "effective rank exp H(σᵢ²/Σσ²)",
    "resolution.signal_rank": "signal rank: σᵢ above the rounding noise",
    "resolution.unchanged": "share of unchanged entries",
    "resolution.edge": "edge of the rounding noise (singular value)",
    "epsilon": "ε = ‖ΔW − X‖_F / ‖ΔW‖_F",
    "epsilon_min": "ε_min = √(1 − C(r)), least ε at this rank",
    "excess": "excess ε² − ε_min²",
    "norm_ratio": "‖X‖_F / ‖ΔW‖_F",
    "cosine": "cosine of the two updates (Frobenius)",
    "additive_effective": "effective rank of the sum over those of the updates",
    "energy_ratio": "‖ΣΔW_k‖² / Σ‖ΔW_k‖²",
    "intruders": "intruder dimensions",
    "kappa": "κ = ‖UᵀGV‖_F / ‖G‖_F",
    "tangent": "tangent overlap ‖P_T G‖_F / ‖G‖_F",
    "gradient_fro": "‖G‖_F of the gradient",
    "kept": "energy share C(r) kept",
    "rank": "rank r",
    "params": "adapter parameters r (out + in)",
}

# Fields of spectra whose name says nothing of whose they are.
_OF_ENERGY = ("energy.", "rank_at.", "tail.", "effective_rank")


def changes_of(records: Iterable[LayerRecord]) -> str:
    """Return what the values of spectra are of: ``ΔW``, or in another metric ``ΔW·C^½``; of several, all of them."""
    found = dict.fromkeys(record.metric for record in records if isinstance(record, Spectrum))
    return " and ".join(NORMS[metric][0].strip("‖") for metric in found) or "ΔW"


def metric_said(records: Iterable[LayerRecord]) -> str:
    """Return words to put behind what all records are, in another metric than the weights'."""
    found = {record.metric for record in records if isinstance(record, Spectrum)} or {"weights"}
    return f", in {METRIC_NAMES[found.pop()]}" if len(found) == 1 and found != {"weights"} else ""


def title_in(field: str, records: Iterable[LayerRecord]) -> str:
    """Return what a field is called on an axis, in the metric of the records."""
    records = tuple(records)
    title, of = title_of(field), changes_of(records)
    if of == "ΔW":
        return title
    if "ΔW" in title or "W_base" in title:
        each = of.split(" and ")
        return " and ".join(title.replace("ΔW", one).replace("W_base", one.replace("ΔW", "W_base")) for one in each)
    return f"{title} of {of}" if field.startswith(_OF_ENERGY) else title


def title_of(field: str) -> str:
    """Return what a field is called on an axis.

    >>> title_of("energy.8"), title_of("rank_at.0.9"), title_of("tail.8.fro"), title_of("other")
    ('energy share C(8)', 'rank at 90% of the energy', 'tail of rank 8: √Σᵢ﹥ᵣσᵢ²', 'other')
    """
    head, _, rest = field.partition(".")
    if head == "energy" and rest.isdigit():
        return f"energy share C({rest})"
    if head == "rank_at" and rest:
        return f"rank at {_percent(rest)} of the energy"
    if head == "additive" and rest:
        return f"rank of the sum over ranks of the updates, at {_percent(rest)}"
    if head == "tail" and rest.endswith(".fro"):
        return f"tail of rank {rest.removesuffix('.fro')}: √Σᵢ﹥ᵣσᵢ²"
    return _NAMES.get(field, field)


def _percent(share: str) -> str:
    try:
        return f"{float(share):.0%}"
    except ValueError:
        return share


def value_of(record: LayerRecord, field: str) -> float | None:
    """Return a number of a record; None where it is null or does not exist.

    Args:
        record: Of any diagnostic.
        field: Its name, dotted: ``energy.16``, ``resolution.signal_rank``, ``rank_at.0.9``.
    """
    found: Any = record
    rest = field
    while rest:
        if isinstance(found, dict):
            if rest in found:
                found, rest = found[rest], ""
                break
            key, _, rest = rest.partition(".")
            found = found.get(key)
        elif isinstance(found, Record):
            key, _, rest = rest.partition(".")
            known = key in type(found).model_fields or isinstance(getattr(type(found), key, None), property)
            found = getattr(found, key) if known else None
        else:
            return None
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def numbers_of(records: Iterable[Record]) -> list[str]:
    """Return the names of all fields that are a number in some record.

    What is computed from fields is among them for layers only: a run that diverged has no loss to compute from.
    """
    names: dict[str, None] = {}
    for record in records:
        content = {key: getattr(record, key) for key in type(record).model_fields}
        names.update(dict.fromkeys(_numbers(content, "")))
        if isinstance(record, LayerRecord):
            properties = [key for key, found in vars(type(record)).items() if isinstance(found, property)]
            names.update((key, None) for key in properties if value_of(record, key) is not None)
    return list(names)


def _numbers(content: Any, prefix: str) -> Iterable[str]:
    if isinstance(content, Record):
        content = {key: getattr(content, key) for key in type(content).model_fields}
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _numbers(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield prefix


def written(value: float) -> str:
    """Return a number as short as a cell needs it.

    >>> written(0.4123), written(12.0), written(1234.5), written(2.6e-5)
    ('0.41', '12', '1234', '3e-05')
    """
    if value == 0 or (value == math.floor(value) and abs(value) < 1e4):
        return f"{value:.0f}"
    if abs(value) >= 1e6 or abs(value) < 1e-2:
        return f"{value:.0e}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
