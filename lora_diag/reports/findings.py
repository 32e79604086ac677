"""Failure modes of the low-rank assumption that the records show.

The modes are those of "LoRA's Low-Rank Assumption: When It Holds, When It Breaks" (2026), section "Empirical Failure
Modes". Records show symptoms, not causes: each finding states the observation and its interpretation. Layers whose
update is not resolved are ignored. Effects that weights alone do not show (interfering skills, long contexts,
alignment) have no rule.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from lora_diag.diagnostics.overlap.record import Overlap
from lora_diag.diagnostics.residual.record import Residual
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.metrics.overlap import NEAR_RANDOM, is_near
from lora_diag.records.names import module_type_of, part_of
from lora_diag.reports.evidence import ARTICLE, Evidence, energy_at

# A rank that keeps less than half of a layer's energy is too small there; "most layers" are three quarters of them.
MIN_ENERGY, MOST_LAYERS = 0.5, 0.75
# Largest common LoRA rank; LoRA is not known to work well for updates that 16 does not hold at the median.
USUAL_RANK = 16
# Minimum number of layers for "everywhere".
MIN_COUNT = 4
# The rank at 90% energy of a Gaussian matrix is 0.51 of a square one's size and 0.76 of a 1:4 one's (256² to 1024²).
FLAT_RANK = 0.5
# Smaller matrices are ignored: a common rank is a large fraction of any of them.
MIN_SIZE = 4 * USUAL_RANK
# A factor within these of 1 changes ε² by less than 6% of ‖X‖²: (1 − 1/1.25)² = 0.04, (1.25 − 1)² = 0.0625.
MAX_SCALE = 1.25
# Below this cosine the adapter's direction holds less than a quarter of ‖D‖², and the scale is irrelevant.
MIN_COSINE = 0.5
# Norms and biases hold less than 0.1% of a transformer's parameters. With 5% of ‖Δ‖² in them, an adapter that is exact
# on every matrix is still at a distance of √0.05 = 0.22.
VECTORS_SHARE = 0.05
# Fraction of ‖G‖² by which tangent² must exceed its baseline, as in the summary of ``overlap``.
MIN_REACH = 0.1

# Projections into the residual stream, or from one modality to another.
_PROJECTION = re.compile(
    r"(^|[._])(o_proj|out_proj|wo|c_proj|down_proj|attention\.output\.dense"
    r"|(mm|multi_modal|visual|vision|audio|text)_proj\w*|projector|connector|merger)([._]|$)"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One failure mode found in the records.

    Args:
        name: Name of the failure mode.
        seen: The observation, with its numbers.
        means: Its interpretation, with limits.
        condition: The condition of the rule.
        source: Source of the rule.
        layers: All layers concerned, with names as in the file.
    """

    name: str
    seen: str
    means: str
    condition: str
    source: str
    layers: tuple[str, ...] = ()


def findings(evidence: Evidence) -> list[Finding]:
    """Return the failure modes that the records show, in the order of ``RULES``."""
    return [finding for rule in RULES if (finding := rule(evidence)) is not None]


def slow_decay(evidence: Evidence) -> Finding | None:
    """Find a slow spectral decay in nearly all layers."""
    shares = shares_at(USUAL_RANK, evidence.readable)
    slow = tuple(layer for layer, share in shares.items() if share < MIN_ENERGY)
    if len(shares) < MIN_COUNT or len(slow) < MOST_LAYERS * len(shares):
        return None
    return Finding(
        "Slow spectral decay everywhere",
        f"r={USUAL_RANK} keeps less than {MIN_ENERGY:.0%} of the energy in {len(slow)} of {len(shares)} matrices; "
        f"{percent(median(shares.values()))} in the median one.",
        "A sign of a large distribution shift. A task of several independent skills and a high learning rate have the "
        "same effect: compare with a second full fine-tune before attributing it to the data.",
        f"C({USUAL_RANK}) < {MIN_ENERGY} in at least {MOST_LAYERS:.0%} of the resolved matrices larger than that, "
        f"and these are {MIN_COUNT} or more",
        f"{ARTICLE}, failure modes 1 and 2",
        slow,
    )


def under_ranked(evidence: Evidence) -> Finding | None:
    """Find few important layers whose rank is too small while it suffices in most."""
    capacities = evidence.capacities
    if len(capacities) < MIN_COUNT or median(item.kept for item in capacities) < MIN_ENERGY:
        return None
    median_energy = median(item.energy for item in capacities)
    short = [item for item in capacities if item.kept < MIN_ENERGY and item.energy >= median_energy]
    if not short:
        return None
    worst = min(short, key=lambda item: item.kept)
    share = math.fsum(item.energy for item in short) / math.fsum(item.energy for item in capacities)
    return Finding(
        "Under-ranked critical layers",
        f"{named([item.layer for item in short])}: rank {ranks([item.rank for item in short])} can hold less than "
        f"{MIN_ENERGY:.0%} of the energy there (at worst {percent(worst.kept)}), compared with "
        f"{percent(median(item.kept for item in capacities))} in the median layer. Together they have "
        f"{percent(share)} of ‖ΔW‖² in these {len(capacities)} matrices.",
        "A uniform rank is too small for these layers. Energy is not loss: it measures how much a layer changed, "
        "not how much the task needs it.",
        f"C(r) < {MIN_ENERGY} at the layer's rank, at least {MIN_ENERGY} in the median layer; ‖ΔW‖ at least the median",
        f"{ARTICLE}, failure mode 4",
        tuple(item.layer for item in short),
    )


def flat_projections(evidence: Evidence) -> Finding | None:
    """Find projections with a spectrum as flat as that of a random matrix."""
    flatness: dict[str, list[tuple[str, float]]] = {}
    for record in evidence.readable:
        name, share = module_type_of(record.layer), _compute_flatness(record)
        if _PROJECTION.search(name) and share is not None and min(record.shape) >= MIN_SIZE:
            flatness.setdefault(name, []).append((record.layer, share))
    flat = {name: rows for name, rows in flatness.items() if median(share for _, share in rows) >= FLAT_RANK}
    if not flat:
        return None
    evidence_text = "; ".join(
        f"{name} needs {percent(median(share for _, share in rows))} of its directions in the median of {len(rows)}"
        for name, rows in flat.items()
    )
    return Finding(
        "Flat spectra in projection layers",
        f"For 90% of the energy, {evidence_text}.",
        "As flat as a random square matrix (51%): no small rank approximates this update. This is expected "
        "where the projection joins two modalities.",
        f"median over a projection's layers of (rank at 90% energy)/min(out, in) ≥ {FLAT_RANK}, min(out, in) ≥ "
        f"{MIN_SIZE}",
        f"{ARTICLE}, failure mode 3",
        tuple(layer for rows in flat.values() for layer, _ in rows),
    )


def scale_mismatch(evidence: Evidence) -> Finding | None:
    """Find an adapter with the right direction and the wrong scale in most layers."""
    scaled = [
        record
        for record in evidence.residuals
        if record.best_scale is not None and record.cosine is not None and record.cosine >= MIN_COSINE
    ]
    off = [record for record in scaled if not 1 / MAX_SCALE <= (record.best_scale or 0.0) <= MAX_SCALE]
    adapted = [record for record in evidence.residuals if record.best_scale is not None]
    if not off or 2 * len(off) < len(adapted):
        return None
    factor = median(record.best_scale or 0.0 for record in off)
    return Finding(
        "Scale mismatch",
        f"{evidence.adapter} is nearest to the full fine-tune at {factor:.3g} times its scale (median of {len(off)} "
        f"of {len(adapted)} adapted matrices; cosine "
        f"{median(r.cosine or 0.0 for r in off):.2f}).{_hint_at_confusion(factor, off)}",
        "The direction is right but the scale is not: check lora_alpha, the learning rate, and whether the scaling "
        "was applied exactly once.",
        f"best scale outside [{1 / MAX_SCALE:.2g}, {MAX_SCALE}], cosine ≥ {MIN_COSINE} in at least half of the "
        "adapted matrices",
        f"{ARTICLE}, rank sweep (noisy or unstable: scaling α); LoRA's α/r against rsLoRA's α/√r (arXiv 2312.03732)",
        tuple(record.layer for record in off),
    )


def large_vector_change(evidence: Evidence) -> Finding | None:
    """Find a change in norms and biases, which no adapter on matrices reaches."""
    share = evidence.shares["vectors"] if evidence.shares else 0.0
    if share < VECTORS_SHARE:
        return None
    changed = [item for item in evidence.vectors if item.fro]
    return Finding(
        "Norm- or bias-heavy update",
        f"{percent(share)} of the whole change ‖Δ‖² is in {len(changed)} norms and biases.",
        "No low-rank adapter on matrices reaches them: one that is exact elsewhere remains at a distance of "
        f"{math.sqrt(share):.2f}·‖Δ‖.",
        f"fraction of ‖Δ‖² in one-dimensional tensors ≥ {VECTORS_SHARE}",
        f"{ARTICLE}, escalation step 3 (hybrid); BitFit (Ben Zaken et al. 2022)",
        tuple(item.layer for item in sorted(changed, key=lambda item: -(item.fro or 0.0))),
    )


def out_of_reach(evidence: Evidence) -> Finding | None:
    """Find layers whose last gradient is not contained more in the adapter's subspaces than in random ones."""
    records = [
        record
        for source in evidence.of(Overlap)
        for record in source.results
        if record.kappa is not None
        and record.tangent is not None
        and record.verdict == "resolved"
        and part_of(record.layer) == "matrices"
    ]
    if not records:
        return None
    last = max(record.step for record in records)
    rank = min((record.rank for record in records), key=lambda rank: abs(math.log(rank / USUAL_RANK)))
    last_records = [record for record in records if (record.step, record.rank) == (last, rank)]
    outside = [
        record
        for record in last_records
        if is_near(record.kappa, record.kappa_random) and record.tangent**2 - record.tangent_random**2 < MIN_REACH
    ]
    if not outside:
        return None
    worst = min(outside, key=lambda record: record.tangent**2 - record.tangent_random**2)
    return Finding(
        "Gradients outside the adapter's reach",
        f"At step {last}, r={rank}, in {len(outside)} of {len(last_records)} matrices: "
        f"{named([r.layer for r in outside])}. At "
        f"worst an adapter reaches {worst.tangent:.2f} of ‖G‖, one on a random subspace {worst.tangent_random:.2f}.",
        "The remaining gradient is outside these subspaces: a higher rank or another placement may reach it. At a "
        "low loss it only shows that training has converged.",
        f"at the last step κ near its random baseline (below {NEAR_RANDOM:g}× it, or halfway from it to 1) and "
        f"tangent² above its own by less than {MIN_REACH}",
        f"{ARTICLE}, diagnostic 4 (κ)",
        tuple(record.layer for record in outside),
    )


RULES = (slow_decay, under_ranked, flat_projections, scale_mismatch, large_vector_change, out_of_reach)


def shares_at(rank: int, records: Sequence[Spectrum]) -> dict[str, float]:
    """Return C(rank) by layer, for layers that are larger than the rank and kept enough values."""
    shares = {record.layer: energy_at(record, rank) for record in records if min(record.shape) > rank}
    return {layer: share for layer, share in shares.items() if share is not None}


def percent(share: float) -> str:
    """Return a fraction as a percentage that is never rounded up to 100 or down to 0.

    >>> percent(0.414), percent(0.9996), percent(1.0), percent(0.001)
    ('41%', '>99%', '100%', '<1%')
    """
    if 0.995 <= share < 1:
        return ">99%"
    return "<1%" if 0 < share < 0.005 else f"{share:.0%}"


def named(layers: Sequence[str], limit: int = 3) -> str:
    """Return the first names and the number of further ones.

    >>> named(["a.weight", "b.weight", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    shown = ", ".join(layer.removesuffix(".weight") for layer in layers[:limit])
    return f"{shown} and {len(layers) - limit} more" if len(layers) > limit else shown


def ranks(values: Sequence[int]) -> str:
    """Return one rank, or the range of ranks.

    >>> ranks([8, 8]), ranks([16, 4])
    ('8', '4 to 16')
    """
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"


def _compute_flatness(record: Spectrum) -> float | None:
    """Return the rank at 90% energy as a fraction of the maximum; None with too few kept values."""
    rank = record.rank_at["0.9"]
    return None if rank is None else rank / min(record.shape)


def _hint_at_confusion(factor: float, records: Sequence[Residual]) -> str:
    """Return a hint if the factor is the ratio of LoRA's scaling α/r and rsLoRA's α/√r."""
    roots = [math.sqrt(record.rank) for record in records if record.rank]
    for word, sign in (("α/r where rsLoRA's α/√r was meant", 1.0), ("rsLoRA's α/√r where α/r was meant", -1.0)):
        if roots and abs(math.log(factor) - sign * math.log(median(roots))) < 0.05 < math.log(median(roots)):
            return f" This is the ratio of the two common scalings; check for {word}."
    return ""
