"""Recommended next steps: the escalation path of the article, each step with its evidence and its command.

Rules are evaluated in order: those on held-out losses (``loss_advice``), those on probes of parts (``advice_probes``),
then those in this module, the cheapest step first. Each rule sees all runs of one full fine-tune: all adapters, an
allocation with its budget, and options that losses have shown to be worse (``worth.lost``), which are not recommended
again. A rule does not apply if its evidence is missing or at the rounding noise floor. The rules in this module use
energy in weights, which bounds what a rank can hold of *this* full fine-tune; the loss of an adapter trained at that
rank may be lower or higher.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

from lora_diag.decisions.allocate.allocation import Budget, allocate, budget_of
from lora_diag.decisions.allocate.options import AllocateOptions
from lora_diag.decisions.allocate.record import Allocation
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.errors import UsageError
from lora_diag.records import Run
from lora_diag.records.names import module_type_of
from lora_diag.rendering.text import number
from lora_diag.reports.advice_probes import PROBE_RULES, fit_rank, idle_layers
from lora_diag.reports.budget import allocated, reference, saved_params
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
from lora_diag.reports.loss_advice import LOSS_RULES, mind_the_shift, sweep_of
from lora_diag.reports.step import Advice, command, listed
from lora_diag.reports.worth import lost, swept, without_matrices
from lora_diag.running.options import typed

# Ranks commonly used in training and supported by servers.
LADDER = (4, 8, 16, 32, 64)
# Energy fraction of every layer from which a rank is sufficient.
ENOUGH = 0.9
# Fraction of the change from which adapting a skipped part of the model is recommended.
PLACEMENT = 0.1
# A LoRA of rank r on an n×n matrix has 2r/n of its parameters: for n < 4r it is not small.
SIZEABLE = 4


def advice(evidence: Evidence) -> list[Advice]:
    """Return the steps supported by the records, those on losses first, then the cheapest first.

    Unfinished runs support no step. A step that applies to several full fine-tunes is listed once and names them all.
    """
    groups = evidence.finished().groups()
    found: dict[tuple[str, ...], Advice] = {}
    for group in groups:
        about = (group.given("tuned"),) if len(groups) > 1 else ()
        for step in _of_one(group):
            known = found.get(step.argv, step)
            found[step.argv] = replace(known, about=(*known.about, *about))
    # A step that applies to all applies to the page.
    return [replace(step, about=()) if len(step.about) == len(groups) else step for step in found.values()]


def _of_one(evidence: Evidence) -> list[Advice]:
    """Return the steps for one full fine-tune and its adapters.

    If the held-out loss shows that an adapter is as good as the full fine-tune, only steps on shifted text remain; if
    the full fine-tune is worse than BASE, no step uses its weights; if a sweep has shown a sufficient rank, no step
    derives one from weights.
    """
    first = [step for rule in LOSS_RULES if (step := rule(evidence)) is not None]
    rules = {step.rule for step in first}
    if "keep the adapter" in rules:
        shift = mind_the_shift(evidence)
        return [step for step in first if step.rule == "keep the adapter" or step == shift]
    if "distrust the fine-tune" in rules:
        return [step for step in first if step.rule != "compress"]
    rank_sweep = swept(evidence)
    found = rank_sweep is not None and rank_sweep.verdict.rank is not None
    parts, weights = (
        [step for rule in rules if not (found and rule in ABOUT_RANK) and (step := rule(evidence)) is not None]
        for rules in (PROBE_RULES, RULES)
    )
    last = None if first or weights else enough(evidence) or sweep(evidence)
    return [*first, *parts, *weights, *([last] if last is not None else [])]


def set_scale(evidence: Evidence) -> Advice | None:
    """Step 0: correct the scale of adapters, without training."""
    found = {}
    for path in evidence.adapted or ([evidence.adapter] if evidence.adapter else []):
        one = replace(evidence, about=path)
        if (seen := scale_mismatch(one)) is not None:
            off = [record.best_scale or 0.0 for record in one.residuals if record.layer in set(seen.layers)]
            found[path] = (median(off), seen)
    if not found:
        return None
    factors = ", ".join(f"of {path} by {factor:.3g}" for path, (factor, _) in found.items())
    return Advice(
        "scale",
        f"Multiply lora_alpha {factors} and measure again, before changing any rank",
        " ".join(seen.seen for _, seen in found.values()),
        next(iter(found.values()))[1].condition,
        "Article, rank selection step 4 (α scaling)",
        command("residual", evidence.given("base"), evidence.given("tuned"), list(found)),
        adapters=tuple(found),
        layers=tuple(dict.fromkeys(layer for _, seen in found.values() for layer in seen.layers)),
    )


def take_allocation(evidence: Evidence) -> Advice | None:
    """Step 1 with a budget of the user: the ranks chosen by ``allocate``."""
    for source, certificate in allocated(evidence):
        argv = _again(source.results.run, evidence)
        if argv is None or not evidence.readable:
            continue
        short = [r for r in source.results if isinstance(r, Allocation) and r.kept is not None and r.kept < SHORT]
        uniform = certificate.uniform
        beside = f", {uniform.name} {percent(uniform.kept)}" if uniform is not None else ""
        amount = f"{number(certificate.spent)}" + (f" of {number(certificate.budget)}" if certificate.budget else "")
        return Advice(
            "take the allocation",
            f"Train with the ranks of {source.name}, {certificate.params:,} parameters",
            f"They use {amount} ({certificate.unit.replace('_', ' ')}) and keep {percent(certificate.kept)} of the "
            f"energy{beside}; {len(short)} of {len(source.results)} matrices keep less than {SHORT:.0%}.",
            "an allocation by a budget, and no evidence that a smaller rank suffices",
            "Article, multi-layer allocation",
            argv,
            params=certificate.params,
            layers=tuple(record.layer for record in short),
        )
    return None


def raise_rank(evidence: Evidence) -> Advice | None:
    """Step 1: a higher rank if the largest one is too small, in named layers if these are few, else everywhere.

    Does not apply to adapters superseded by a larger one, if losses show that a higher rank is worse, or if an
    allocation uses the user's budget.
    """
    capacities, worse = evidence.largest, lost(evidence)
    short = [item for item in capacities if item.kept < SHORT]
    if not short or worse.more_rank or any(allocated(evidence)):
        return None
    few = 2 * len(short) <= len(capacities)
    measured = {record.layer: record for record in evidence.readable}
    known = all(item.layer in measured for item in capacities)
    target = _target(measured, short if few else capacities, 1.0 if few else 0.5, worse.trained) if known else None
    if known and target is None and (not few or LADDER[-1] <= worse.trained or train_fully(evidence) is not None):
        return None  # no common rank suffices for these layers: handled by ``train_fully``
    now, worst = ranks([item.rank for item in short]), min(short, key=lambda item: item.kept)
    many = f"{len(short)} of {len(capacities)} matrices"
    holders = _holders(evidence)
    at = f"At rank {now}{f' ({_some(holders)})' if holders else ''}"
    because = (
        f"{at}, {many} can hold less than {SHORT:.0%} of their energy: at worst {percent(worst.kept)}, in "
        f"{named([worst.layer])}."
    )
    rule = "raise rank in named layers" if few else "raise rank everywhere"
    condition = (
        f"C(r) < {SHORT} in at most half of the resolved matrices, at the largest rank of any adapter there"
        if few
        else f"C(r) < {SHORT} in more than half of the resolved matrices, at the largest rank of any adapter there; a "
        f"rank up to {LADDER[-1]} suffices for the median"
    )
    source, layers = "Article, rank selection step 5.1; Eckart & Young 1936", tuple(item.layer for item in short)
    because += _limits(evidence, holders)
    if not known:
        do = f"Measure which rank above {now} the update needs"
        return Advice(rule, do, because, condition, source, _spectrum(evidence), layers=layers)
    to = target or LADDER[-1]
    chosen = {item.layer for item in (short if few else capacities)}
    spent = sum(sum(i.shape) * (max(to, i.rank) if i.layer in chosen else i.rank) for i in capacities)
    params, now_spent, words = spent + saved_params(evidence), *reference(evidence)
    where = f"r={to} in {'these' if few else 'all of them'}"
    mends = (
        f"holds half of the energy in {'each of them' if few else 'the median matrix'}"
        if target
        else "holds less than half of the energy in some of them"
    )
    because += (
        f" The budget is that of {where}{', with the others unchanged' if few else ''}, which "
        f"{mends}.{_kept_by(evidence, params)}"
    )
    return Advice(
        rule,
        f"Allocate {params:,} trainable parameters to ranks by energy: {params / now_spent:.2g} times {words}",
        because,
        condition,
        source,
        command("allocate", _spectrum_file(evidence), params=params, o="adapter_config.json"),
        params=params,
        layers=layers,
    )


def widen_placement(evidence: Evidence) -> Advice | None:
    """Step 2: adapt module types that no adapter covers, with the same budget."""
    if not any(record.rank for records in evidence.adapted.values() for record in records):
        return None
    reached = {r.layer for records in evidence.adapted.values() for r in records if r.rank}
    every = {r.layer: r for records in evidence.adapted.values() for r in records}
    idle = idle_layers(evidence)
    missed = {layer: r.fro**2 for layer, r in every.items() if layer not in reached and layer not in idle}
    total = math.fsum(record.fro**2 for record in every.values())
    shares: dict[str, float] = {}
    for layer, energy in missed.items():
        name = module_type_of(layer)
        shares[name] = shares.get(name, 0.0) + energy / total
    if math.fsum(shares.values()) < PLACEMENT or any(allocated(evidence)):
        return None
    params, words = reference(evidence)
    kinds = ", ".join(sorted(shares, key=lambda name: -shares[name]))
    measured = evidence.update is not None
    return Advice(
        "widen placement",
        f"Allocate {params:,} trainable parameters, {words}, to all matrices: {kinds} have none"
        if measured
        else f"Measure the spectrum, to adapt {kinds} too",
        f"{percent(math.fsum(shares.values()))} of ‖ΔW‖² is in matrices that {_some(list(evidence.adapted))} "
        f"{'does' if len(evidence.adapted) == 1 else 'do'} not adapt: {_listed(shares)}.",
        f"fraction of ‖ΔW‖² in matrices without an adapter ≥ {PLACEMENT}",
        "Article, rank selection step 5.2",
        command("allocate", _spectrum_file(evidence), params=params, o="adapter_config.json")
        if measured
        else _spectrum(evidence),
        params=params if measured else None,
        layers=tuple(missed),
    )


def train_the_rest(evidence: Evidence) -> Advice | None:
    """Steps 2 and 3: embeddings and head, norms and biases, which adapters of matrices do not reach."""
    share = evidence.shares["vocabulary"] if evidence.shares else 0.0
    vectors = heavy_vectors(evidence)
    table = share >= PLACEMENT and bool(evidence.readable)
    brings = without_matrices(evidence)
    if not (table or vectors) or (brings is not None and brings < PLACEMENT):
        return None
    parts = [*(["embeddings and head"] if table else []), *(["norms and biases"] if vectors else [])]
    what = " and ".join(parts)
    seen = f"{percent(share)} of the whole change ‖Δ‖² is in embeddings and head." if table else ""
    seen += f" {vectors.seen} Most in {named(vectors.layers)}." if vectors else ""
    both = (evidence.given("base"), evidence.given("tuned"))
    text = evidence.given("eval", "HELD_OUT_TEXT")
    if not evidence.spectra:
        do = "Train norms and biases alone: no matrix outside embeddings and head changed"
        tried: tuple[int, ...] = (LADDER[0],)
        do += f"; compare with {listed(tried)} in addition, to see whether matrices matter"
        argv = sweep_of(evidence, tried, bitfit=True)
    elif brings is None:
        tried = (0,)
        do = f"Measure the gain of {what} alone, with every matrix truncated to r=0"
        argv = command("probe truncation", *both, eval=text, ranks=tried, untruncated="tuned", o="truncation.jsonl")
    else:
        tried = (next((rank for rank in LADDER if rank > lost(evidence).cut), 2 * LADDER[-1]),)
        do = f"Also train {what} (PEFT: modules_to_save), as in an adapter of {listed(tried)} that saves all of them"
        seen += f" With every matrix as in BASE they give {percent(brings)} of the gain."
        argv = command("extract", *both, rank=tried[0], unfactored="save", o="adapter/")
    return Advice(
        "hybrid" if vectors else "train embeddings and head",
        do,
        f"{seen} An adapter on the other matrices cannot reach it.".strip(),
        f"fraction of ‖Δ‖² in embeddings and head ≥ {PLACEMENT}, or in norms and biases ≥ {VECTORS}; truncation to "
        f"r=0, if measured, keeps ≥ {PLACEMENT} of the gain",
        "Article, rank selection steps 5.2, carried over to tables, and 5.3; BitFit (Ben Zaken et al. 2022)",
        argv,
        ranks=tried,
        layers=vectors.layers if vectors else (),
    )


def train_fully(evidence: Evidence) -> Advice | None:
    """Step 4: train the weights themselves if the largest common rank is too small."""
    rank = LADDER[-1]
    large = [record for record in evidence.readable if min(record.shape) >= SIZEABLE * rank]
    by_type: dict[str, list[float]] = {}
    for layer, share in shares_at(rank, large).items():
        by_type.setdefault(module_type_of(layer), []).append(share)
    slow = [name for name, shares in by_type.items() if sum(share < SHORT for share in shares) >= MOST * len(shares)]
    if not slow or lost(evidence).beaten:
        return None
    every = len(slow) == len(by_type)
    kept = median(share for name in slow for share in by_type[name])
    return Advice(
        "full fine-tuning" if every else "partial fine-tuning",
        (f"Fine-tune fully, or accept a low-rank bias; compare the cost with r={rank}" if every else "")
        or f"Unfreeze {', '.join(slow)}, adapters on the rest; compare the cost with r={rank} everywhere",
        f"Even r={rank} keeps {percent(kept)} of the energy in the median matrix of "
        f"{'every type' if every else f'these types, {len(slow)} of {len(by_type)}'}.",
        f"C({rank}) < {SHORT} in at least {MOST:.0%} of a type's resolved matrices with both sizes ≥ {SIZEABLE * rank}",
        "Article, rank selection step 5.4; Biderman et al. 2024 (arXiv 2405.09673) measure 10 to 100 times common "
        "ranks",
        command("plan", evidence.given("base"), ranks=(rank,)),
        ranks=(rank,),
        layers=tuple(record.layer for record in large if module_type_of(record.layer) in slow),
    )


RULES = (set_scale, take_allocation, raise_rank, widen_placement, train_the_rest, train_fully)
ABOUT_RANK = (fit_rank, take_allocation, raise_rank, train_fully)


def enough(evidence: Evidence) -> Advice | None:
    """Without another rule: recommend a small rank that suffices for every layer, if there is one."""
    for rank in LADDER[:-1]:
        kept = [kept_at(record, rank) for record in evidence.readable]
        known = [share for share in kept if share is not None]
        small = [record for record in evidence.readable if min(record.shape) >= SIZEABLE * rank]
        if rank <= lost(evidence).cut:
            continue
        if len(known) == len(evidence.spectra) <= 2 * len(small) and small and min(known) >= ENOUGH:
            return Advice(
                "enough",
                f"Extract the update at r={rank}, which is sufficient",
                f"r={rank} keeps {percent(min(known))} of the energy in the worst of {len(known)} matrices, and no "
                "measured change is outside the reach of an adapter.",
                f"C({rank}) ≥ {ENOUGH} in every matrix outside embeddings and head, all resolved, half of them "
                f"{SIZEABLE * rank} or more wide; no other rule applies",
                "Article, rank sweep (fast saturation); Eckart & Young 1936",
                command("extract", evidence.given("base"), evidence.given("tuned"), rank=rank, o="adapter/"),
                ranks=(rank,),
            )
    return None


def sweep(evidence: Evidence) -> Advice | None:
    """Without another rule and without a sufficient small rank: compare losses."""
    items = evidence.largest
    kept = [item.kept for item in items]
    above = [rank for rank in (*LADDER, *(LADDER[-1] * 2**i for i in (1, 2))) if rank > lost(evidence).trained]
    if not kept or lost(evidence).more_rank:
        return None
    rank = ranks([item.rank for item in items])
    nearest = min(range(len(above)), key=lambda place: abs(math.log(above[place] / median(i.rank for i in items))))
    tried = tuple(above[max(0, nearest - 1) : max(0, nearest - 1) + 3])
    return Advice(
        "sweep",
        f"Compare the held-out loss: train at {listed(tried)}",
        f"Rank {rank} keeps between {percent(min(kept))} and {percent(max(kept))} of the energy, "
        f"{percent(median(kept))} in the median matrix: no other rule shows whether that is sufficient.",
        "no other rule applies",
        "Article, diagnostic 3 (rank sweep)",
        sweep_of(evidence, tried),
        ranks=tried,
    )


def _target(measured: Mapping[str, Spectrum], items: Sequence[Capacity], at_least: float, above: int) -> int | None:
    """Return the smallest common rank that keeps half of the energy in a fraction of the layers; None if none does."""
    for rank in LADDER:
        kept = [kept_at(measured[item.layer], rank) or 0.0 for item in items]
        more = rank > max(above, *(item.rank for item in items)) if len(items) else False
        if more and sum(k >= SHORT for k in kept) >= at_least * len(kept):
            return rank
    return None


def _holders(evidence: Evidence) -> list[str]:
    """Return the adapters with the largest rank in some layer."""
    most = {item.layer: item.rank for item in evidence.largest}
    return [
        path
        for path, records in evidence.adapted.items()
        if any(record.rank and most.get(record.layer) == record.rank for record in records)
    ]


def _limits(evidence: Evidence, holders: Sequence[str]) -> str:
    """State where adapters are limited by factors other than rank."""
    limited = [record.limited_by for path in holders for record in evidence.adapted[path] if record.rank]
    times = limited.count("rank")
    if not limited or 2 * times >= len(limited):
        return ""
    return (
        f" But rank is the larger part of ε in {f'only {times}' if times else 'none'} of the {len(limited)} "
        f"matrices that {_some(holders)} {'adapts' if len(holders) == 1 else 'adapt'}: the adapter found another "
        "solution, which may be as good."
    )


def _kept_by(evidence: Evidence, params: int) -> str:
    """State what the command will keep, by running it on these records."""
    assert evidence.update is not None
    results = evidence.update.results
    try:
        found = allocate(results.layers, Budget("params", params, "--params"), left_out=results.left_out)
    except UsageError:
        return ""
    return f" Allocated this way, they keep {percent(found.certificate.kept)} of the energy of all matrices."


def _again(run: Run, evidence: Evidence) -> tuple[str, ...] | None:
    """Return the command of an allocation that writes its config; None if its weights were given in Python."""
    settings = run.settings
    if isinstance(settings.get("weights"), Mapping):
        return None
    given = next((side.path for side in run.inputs if side.role == "results" and side.path), None)
    return command(
        "allocate",
        given or _spectrum_file(evidence),
        **budget_of(settings),
        **{name: value for name, value in typed(AllocateOptions, settings).items() if name != "energy"},
        o="adapter_config.json",
    )


def _some(paths: Sequence[str]) -> str:
    return " and ".join([", ".join(paths[:-1]), paths[-1]]) if len(paths) > 1 else "".join(paths)


def _listed(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{percent(shares[name])} in {name}" for name in sorted(shares, key=lambda name: -shares[name]))


def _spectrum_file(evidence: Evidence) -> str:
    return evidence.update.name if evidence.update else "spectrum.jsonl"


def _spectrum(evidence: Evidence) -> tuple[str, ...]:
    return command("spectrum", evidence.given("base"), evidence.given("tuned"), o="spectrum.jsonl")
