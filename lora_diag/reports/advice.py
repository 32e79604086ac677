"""What to do next: the escalation path of the article, each step with its evidence and the command that begins it.

Rules are read from top to bottom: those on held-out losses (``loss_advice``), those on probes of parts
(``advice_probes``), then those here, the cheapest step first. A rule is silent where its evidence is missing or lies at
the rounding floor. The rules here speak of energy in weights, which says what a rank could carry of *this* full
fine-tune; the loss of an adapter trained at that rank is another matter: it may be lower or higher.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from statistics import median

from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.records.names import module_type_of
from lora_diag.reports.advice_probes import PROBE_RULES, fit_rank
from lora_diag.reports.evidence import Capacity, Evidence, kept_at
from lora_diag.reports.findings import (
    MOST,
    SHORT,
    VECTORS,
    heavy_vectors,
    named,
    percent,
    ranks,
    scale_mismatch,
    shares_at,
)
from lora_diag.reports.loss_advice import LOSS_RULES, sweep_of
from lora_diag.reports.step import Advice
from lora_diag.reports.worth import swept

# Ranks that are tried and that servers take.
LADDER = (4, 8, 16, 32, 64)
# A rank is enough where it keeps so much of every layer's energy.
ENOUGH = 0.9
# A part of the model that the adapter leaves alone is worth adapting from this share of the change on.
PLACEMENT = 0.1
# A LoRA of rank r on an n×n matrix has 2r/n of its parameters: from n = 4r down it is no longer small.
SIZEABLE = 4


def advice(evidence: Evidence) -> list[Advice]:
    """Return the steps that the records support, losses first, then the cheapest first; none where they support none.

    Where held-out loss has settled that an adapter does as well as the full fine-tune, weights are not asked; where a
    sweep has shown a rank to be enough, they are not asked for one.
    """
    first = [step for rule in LOSS_RULES if (step := rule(evidence)) is not None]
    settled = {step.rule for step in first}
    if "keep the adapter" in settled:
        return first
    rank_sweep = swept(evidence)
    found = rank_sweep is not None and rank_sweep.verdict.rank is not None
    parts, weights = (
        [step for rule in rules if not (found and rule in ABOUT_RANK) and (step := rule(evidence)) is not None]
        for rules in (PROBE_RULES, RULES)
    )
    last = None if first or weights else enough(evidence) or sweep(evidence)
    return [*first, *parts, *weights, *([last] if last is not None else [])]


def set_scale(evidence: Evidence) -> Advice | None:
    """Step 0: an adapter at the wrong scale is repaired without training."""
    found = scale_mismatch(evidence)
    if found is None:
        return None
    off = [record.best_scale or 0.0 for record in evidence.residuals if record.layer in set(found.layers)]
    return Advice(
        "scale",
        f"Multiply lora_alpha by {median(off):.3g} and measure again, before any rank is changed",
        found.seen,
        found.condition,
        "Article, rank selection step 4 (α scaling)",
        _audit_again(evidence),
        found.layers,
    )


def raise_rank(evidence: Evidence) -> Advice | None:
    """Step 1: more rank where it is short; in named layers if these are few, else everywhere."""
    capacities = evidence.capacities
    short = [item for item in capacities if item.kept < SHORT]
    if not short:
        return None
    few = 2 * len(short) <= len(capacities)
    measured = {record.layer: record for record in evidence.readable}
    known = all(item.layer in measured for item in capacities)
    target = _target(measured, short if few else capacities, at_least=1.0 if few else 0.5) if known else None
    if known and target is None and (not few or train_fully(evidence) is not None):
        return None  # no usual rank mends these layers, which is for ``train_fully`` to say
    now, worst = ranks([item.rank for item in short]), min(short, key=lambda item: item.kept)
    many = f"{len(short)} of {len(capacities)} matrices"
    where = f"in {many}: {named([item.layer for item in short])}" if few else "everywhere"
    if not known:
        to, mends = "", "How much it takes, the spectrum of the full fine-tune says."
    elif target is None:
        to, mends = f" to {LADDER[-1]}", f"Not even r={LADDER[-1]} carries that in each of them."
    else:
        to, mends = f" to {target}", f"r={target} carries that in {'each of them' if few else 'the median one'}."
    return Advice(
        "raise rank in named layers" if few else "raise rank everywhere",
        f"Raise the rank from {now}{to} {where}",
        f"At rank {now}, {many} can carry less than {SHORT:.0%} of their energy (at worst {percent(worst.kept)} in "
        f"{named([worst.layer])}). {mends}{_limits(evidence)}",
        f"C(r) < {SHORT} in at most half of the resolved matrices"
        if few
        else f"C(r) < {SHORT} in more than half of the resolved matrices; a rank up to {LADDER[-1]} mends the median",
        "Article, rank selection step 5.1; Eckart & Young 1936",
        _allocate(evidence, sum(item.rank for item in capacities) if few else (target or 0) * len(capacities))
        if known
        else f"loradiag spectrum {_both(evidence)} -o spectrum.jsonl",
        tuple(item.layer for item in short),
    )


def widen_placement(evidence: Evidence) -> Advice | None:
    """Step 2: adapt the module types that the adapter leaves alone."""
    records = evidence.residuals
    if not any(record.rank for record in records):
        return None
    shares: dict[str, float] = {}
    total = math.fsum(record.fro**2 for record in records)
    for record in records:
        if record.rank == 0:
            name = module_type_of(record.layer)
            shares[name] = shares.get(name, 0.0) + record.fro**2 / total
    missed = math.fsum(shares.values())
    if missed < PLACEMENT:
        return None
    return Advice(
        "widen placement",
        f"Adapt {', '.join(sorted(shares, key=lambda name: -shares[name]))} too",
        f"{percent(missed)} of ‖ΔW‖² lies in matrices that {evidence.adapter} leaves alone: {_listed(shares)}.",
        f"share of ‖ΔW‖² in matrices without an adapter ≥ {PLACEMENT}",
        "Article, rank selection step 5.2",
        f"loradiag allocate {_spectrum_file(evidence)} --match {shlex.quote(evidence.adapter or 'ADAPTER')}",
        tuple(record.layer for record in records if record.rank == 0),
    )


def train_vocabulary(evidence: Evidence) -> Advice | None:
    """Step 2, too: embeddings and head, which adapters rarely target."""
    share = evidence.shares["vocabulary"] if evidence.shares else 0.0
    if share < PLACEMENT or not evidence.readable:
        return None
    return Advice(
        "train embeddings and head",
        "Train embeddings and head too (PEFT: modules_to_save), or check that the task needs them unchanged",
        f"{percent(share)} of the whole change ‖Δ‖² lies there; an adapter on the other matrices cannot reach it.",
        f"share of ‖Δ‖² in embeddings and head ≥ {PLACEMENT}",
        "Article, rank selection step 5.2 (placement), carried over to tables",
        _extract(evidence, "--rest save"),
    )


def hybrid(evidence: Evidence) -> Advice | None:
    """Step 3: unfreeze norms and biases."""
    found = heavy_vectors(evidence)
    if found is None:
        return None
    return Advice(
        "hybrid",
        "Unfreeze norms and biases beside the adapter (PEFT: bias='all', modules_to_save for norms)"
        if evidence.spectra
        else "Train norms and biases alone: no matrix outside embeddings and head moved",
        f"{found.seen} Most in {named(found.layers)}.",
        f"share of ‖Δ‖² in norms and biases ≥ {VECTORS}",
        "Article, rank selection step 5.3; BitFit (Ben Zaken et al. 2022)",
        _extract(evidence, "--rest save"),
        found.layers,
    )


def train_fully(evidence: Evidence) -> Advice | None:
    """Step 4: where even the largest usual rank is short, train the weights themselves."""
    rank = LADDER[-1]
    large = [record for record in evidence.readable if min(record.shape) >= SIZEABLE * rank]
    by_type: dict[str, list[float]] = {}
    for layer, share in shares_at(rank, large).items():
        by_type.setdefault(module_type_of(layer), []).append(share)
    slow = [name for name, shares in by_type.items() if sum(share < SHORT for share in shares) >= MOST * len(shares)]
    if not slow:
        return None
    every = len(slow) == len(by_type)
    kept = median(share for name in slow for share in by_type[name])
    return Advice(
        "full fine-tuning" if every else "partial fine-tuning",
        "Fine-tune fully, or accept a low-rank bias" if every else f"Unfreeze {', '.join(slow)}; adapters on the rest",
        f"Even r={rank} keeps {percent(kept)} of the energy in the median matrix of "
        f"{'every type' if every else f'these types, {len(slow)} of {len(by_type)}'}.",
        f"C({rank}) < {SHORT} in at least {MOST:.0%} of a type's resolved matrices with both sizes ≥ {SIZEABLE * rank}",
        "Article, rank selection step 5.4; Biderman et al. 2024 (arXiv 2405.09673) measure 10 to 100 times usual ranks",
        f"loradiag plan {_input(evidence, 'base', 'BASE')}",
        tuple(record.layer for record in large if module_type_of(record.layer) in slow),
    )


RULES = (set_scale, raise_rank, widen_placement, train_vocabulary, hybrid, train_fully)
ABOUT_RANK = (fit_rank, raise_rank, train_fully)


def enough(evidence: Evidence) -> Advice | None:
    """Where no rule speaks: say that a small rank carries every layer, if one does."""
    for rank in LADDER[:-1]:
        kept = [kept_at(record, rank) for record in evidence.readable]
        known = [share for share in kept if share is not None]
        small = [record for record in evidence.readable if min(record.shape) >= SIZEABLE * rank]
        if len(known) == len(evidence.spectra) <= 2 * len(small) and small and min(known) >= ENOUGH:
            return Advice(
                "enough",
                f"Nothing: r={rank} is enough",
                f"r={rank} keeps {percent(min(known))} of the energy in the worst of {len(known)} matrices, and "
                "nothing that was measured lies where an adapter does not reach.",
                f"C({rank}) ≥ {ENOUGH} in every matrix outside embeddings and head, all resolved, half of them "
                f"{SIZEABLE * rank} or more wide; no other rule speaks",
                "Article, rank sweep (fast saturation); Eckart & Young 1936",
                _extract(evidence, "", rank),
            )
    return None


def sweep(evidence: Evidence) -> Advice | None:
    """Where no rule speaks and no small rank carries all: only the loss can tell."""
    kept = [item.kept for item in evidence.capacities]
    if not kept:
        return None
    rank = ranks([item.rank for item in evidence.capacities])
    return Advice(
        "sweep",
        "Let the held-out loss decide: train two or three ranks",
        f"Rank {rank} keeps between {percent(min(kept))} and {percent(max(kept))} of the energy, "
        f"{percent(median(kept))} in the median matrix: no rule above settles whether that is enough.",
        "no other rule speaks",
        "Article, diagnostic 3 (rank sweep)",
        sweep_of(evidence),
    )


def _target(measured: Mapping[str, Spectrum], items: Sequence[Capacity], at_least: float) -> int | None:
    """Return the smallest usual rank that keeps half of the energy in a share of the layers; None if none does."""
    for rank in LADDER:
        kept = [kept_at(measured[item.layer], rank) or 0.0 for item in items]
        if rank > min(item.rank for item in items) and sum(k >= SHORT for k in kept) >= at_least * len(kept):
            return rank
    return None


def _limits(evidence: Evidence) -> str:
    """Say where an audited adapter is limited by something that rank does not mend."""
    limited = [record.limited_by for record in evidence.residuals if record.rank]
    times = limited.count("rank")
    if not limited or 2 * times >= len(limited):
        return ""
    return (
        f" But rank is the larger part of ε in {f'only {times}' if times else 'none'} of the {len(limited)} matrices "
        f"that {evidence.adapter} adapts: it found another solution there, which may be as good."
    )


def _listed(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{percent(shares[name])} in {name}" for name in sorted(shares, key=lambda name: -shares[name]))


def _input(evidence: Evidence, role: str, otherwise: str) -> str:
    """Return what the user named as an input, as a shell takes it."""
    source = evidence.update or evidence.audit
    paths = [side.path for side in source.results.run.inputs if side.role == role] if source else []
    return shlex.quote(paths[0]) if paths else otherwise


def _spectrum_file(evidence: Evidence) -> str:
    return shlex.quote(evidence.update.name) if evidence.update else "spectrum.jsonl"


def _allocate(evidence: Evidence, total: int) -> str:
    return f"loradiag allocate {_spectrum_file(evidence)} --total-rank {total}"


def _extract(evidence: Evidence, more: str, rank: int = 8) -> str:
    return f"loradiag extract {_both(evidence)} --rank {rank}{f' {more}' if more else ''} -o adapter/"


def _audit_again(evidence: Evidence) -> str:
    return f"loradiag residual {_both(evidence)} {shlex.quote(evidence.adapter or 'ADAPTER')}"


def _both(evidence: Evidence) -> str:
    return f"{_input(evidence, 'base', 'BASE')} {_input(evidence, 'tuned', 'TUNED')}"
