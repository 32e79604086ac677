"""Recommended next steps: the escalation path of the article, each step with its evidence and its command.

Rules are evaluated in order: those on held-out losses (``loss_advice``), those on probes of parts (``advice_probes``),
then those in this module, the cheapest step first. Each rule sees all runs of one full fine-tune: all adapters, an
allocation with its budget, and options that losses have shown to be worse (``worth.rejected_options``), which are not
recommended again. A rule does not apply if its evidence is missing or at the rounding noise floor. The rules in this
module use energy in weights, which bounds what a rank can hold of *this* full fine-tune; the loss of an adapter trained
at that rank may be lower or higher.
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
from lora_diag.reports.advice_probes import PROBE_RULES, fit_rank, negligible_layers
from lora_diag.reports.budget import find_allocations, reference, saved_params
from lora_diag.reports.evidence import ARTICLE, Capacity, Evidence, energy_at
from lora_diag.reports.findings import (
    MIN_ENERGY,
    MOST_LAYERS,
    VECTORS_SHARE,
    large_vector_change,
    named,
    percent,
    ranks,
    scale_mismatch,
    shares_at,
)
from lora_diag.reports.loss_advice import LOSS_RULES, flag_shifted_loss, sweep_of
from lora_diag.reports.step import Advice, command, format_ranks
from lora_diag.reports.worth import rejected_options, swept, without_matrices
from lora_diag.running.options import list_typed_options

# Ranks commonly used in training and supported by servers.
COMMON_RANKS = (4, 8, 16, 32, 64)
# Energy fraction of every layer from which a rank is sufficient.
SUFFICIENT_ENERGY = 0.9
# Fraction of the change from which adapting a skipped part of the model is recommended.
PLACEMENT_SHARE = 0.1
# A LoRA of rank r on an n×n matrix has 2r/n of its parameters: for n < 4r it is not small.
SIZEABLE_RATIO = 4


def advice(evidence: Evidence) -> list[Advice]:
    """Return the steps supported by the records, those on losses first, then the cheapest first.

    Unfinished runs support no step. A step that applies to several full fine-tunes is listed once and names them all.
    """
    groups = evidence.finished().groups()
    by_command: dict[tuple[str, ...], Advice] = {}
    for group in groups:
        about = (group.path_of("tuned"),) if len(groups) > 1 else ()
        for step in _advise_one(group):
            known = by_command.get(step.argv, step)
            by_command[step.argv] = replace(known, about=(*known.about, *about))
    # A step that applies to all applies to the page.
    return [replace(step, about=()) if len(step.about) == len(groups) else step for step in by_command.values()]


def _advise_one(evidence: Evidence) -> list[Advice]:
    """Return the steps for one full fine-tune and its adapters.

    If the held-out loss shows that an adapter is as good as the full fine-tune, only steps on shifted text remain; if
    the full fine-tune is worse than BASE, no step uses its weights; if a sweep has shown a sufficient rank, no step
    derives one from weights.
    """
    first = [step for rule in LOSS_RULES if (step := rule(evidence)) is not None]
    rules = {step.rule for step in first}
    if "keep the adapter" in rules:
        shift = flag_shifted_loss(evidence)
        return [step for step in first if step.rule == "keep the adapter" or step == shift]
    if "fine-tune worse than BASE" in rules:
        return [step for step in first if step.rule != "compress"]
    rank_sweep = swept(evidence)
    has_rank = rank_sweep is not None and rank_sweep.verdict.rank is not None
    parts, weights = (
        [step for rule in rules if not (has_rank and rule in RANK_RULES) and (step := rule(evidence)) is not None]
        for rules in (PROBE_RULES, RULES)
    )
    last = None if first or weights else extract_at_small_rank(evidence) or sweep(evidence)
    return [*first, *parts, *weights, *([last] if last is not None else [])]


def set_scale(evidence: Evidence) -> Advice | None:
    """Step 0: correct the scale of adapters, without training."""
    scales = {}
    for path in evidence.adapted or ([evidence.adapter] if evidence.adapter else []):
        single = replace(evidence, about=path)
        if (mismatch := scale_mismatch(single)) is not None:
            off = [record.best_scale or 0.0 for record in single.residuals if record.layer in set(mismatch.layers)]
            scales[path] = (median(off), mismatch)
    if not scales:
        return None
    factors = ", ".join(f"of {path} by {factor:.3g}" for path, (factor, _) in scales.items())
    return Advice(
        "scale",
        f"Multiply lora_alpha {factors} and measure again, before changing any rank",
        " ".join(mismatch.seen for _, mismatch in scales.values()),
        next(iter(scales.values()))[1].condition,
        f"{ARTICLE}, rank selection step 4 (α scaling)",
        command("residual", evidence.path_of("base"), evidence.path_of("tuned"), list(scales)),
        adapters=tuple(scales),
        layers=tuple(dict.fromkeys(layer for _, mismatch in scales.values() for layer in mismatch.layers)),
    )


def take_allocation(evidence: Evidence) -> Advice | None:
    """Step 1 with a budget of the user: the ranks chosen by ``allocate``."""
    for source, certificate in find_allocations(evidence):
        argv = _repeat_allocation(source.results.run, evidence)
        if argv is None or not evidence.readable:
            continue
        short = [r for r in source.results if isinstance(r, Allocation) and r.kept is not None and r.kept < MIN_ENERGY]
        uniform = certificate.uniform
        baseline_text = f", {uniform.name} {percent(uniform.kept)}" if uniform is not None else ""
        budget_text = f"{number(certificate.spent)}" + (
            f" of {number(certificate.budget)}" if certificate.budget else ""
        )
        return Advice(
            "take the allocation",
            f"Train with the ranks of {source.name}, {certificate.params:,} parameters",
            f"They use {budget_text} ({certificate.unit.replace('_', ' ')}) and keep {percent(certificate.kept)} of "
            f"the energy{baseline_text}; {len(short)} of {len(source.results)} matrices keep less than "
            f"{MIN_ENERGY:.0%}.",
            "an allocation by a budget, and no evidence that a smaller rank suffices",
            f"{ARTICLE}, multi-layer allocation",
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
    capacities, worse = evidence.largest, rejected_options(evidence)
    insufficient = [item for item in capacities if item.kept < MIN_ENERGY]
    if not insufficient or worse.more_rank or any(find_allocations(evidence)):
        return None
    is_local = 2 * len(insufficient) <= len(capacities)
    measured = {record.layer: record for record in evidence.readable}
    is_measured = all(item.layer in measured for item in capacities)
    target = (
        _target(measured, insufficient if is_local else capacities, 1.0 if is_local else 0.5, worse.trained)
        if is_measured
        else None
    )
    if (
        is_measured
        and target is None
        and (not is_local or COMMON_RANKS[-1] <= worse.trained or train_fully(evidence) is not None)
    ):
        return None  # no common rank suffices for these layers: handled by ``train_fully``
    current, worst = ranks([item.rank for item in insufficient]), min(insufficient, key=lambda item: item.kept)
    affected = f"{len(insufficient)} of {len(capacities)} matrices"
    largest_adapters = _find_largest_adapters(evidence)
    state = f"At rank {current}{f' ({_join_paths(largest_adapters)})' if largest_adapters else ''}"
    reason = (
        f"{state}, {affected} can hold less than {MIN_ENERGY:.0%} of their energy: at worst {percent(worst.kept)}, in "
        f"{named([worst.layer])}."
    )
    rule = "raise rank in named layers" if is_local else "raise rank everywhere"
    condition = (
        f"C(r) < {MIN_ENERGY} in at most half of the resolved matrices, at the largest rank of any adapter there"
        if is_local
        else f"C(r) < {MIN_ENERGY} in more than half of the resolved matrices, at the largest rank of any adapter "
        f"there; a rank up to {COMMON_RANKS[-1]} suffices for the median"
    )
    source, layers = (
        f"{ARTICLE}, rank selection step 5.1; Eckart & Young 1936",
        tuple(item.layer for item in insufficient),
    )
    reason += _describe_limits(evidence, largest_adapters)
    if not is_measured:
        action = f"Measure which rank above {current} the update needs"
        return Advice(rule, action, reason, condition, source, _make_spectrum_command(evidence), layers=layers)
    target_rank = target or COMMON_RANKS[-1]
    chosen = {item.layer for item in (insufficient if is_local else capacities)}
    total = sum(sum(i.shape) * (max(target_rank, i.rank) if i.layer in chosen else i.rank) for i in capacities)
    params, reference_params, reference_text = total + saved_params(evidence), *reference(evidence)
    placement = f"r={target_rank} in {'these' if is_local else 'all of them'}"
    effect = (
        f"holds half of the energy in {'each of them' if is_local else 'the median matrix'}"
        if target
        else "holds less than half of the energy in some of them"
    )
    reason += (
        f" The budget is that of {placement}{', with the others unchanged' if is_local else ''}, which "
        f"{effect}.{_describe_energy_kept(evidence, params)}"
    )
    return Advice(
        rule,
        f"Allocate {params:,} trainable parameters to ranks by energy: {params / reference_params:.2g} times "
        f"{reference_text}",
        reason,
        condition,
        source,
        command("allocate", _find_spectrum_file(evidence), params=params, o="adapter_config.json"),
        params=params,
        layers=layers,
    )


def widen_placement(evidence: Evidence) -> Advice | None:
    """Step 2: adapt module types that no adapter covers, with the same budget."""
    if not any(record.rank for records in evidence.adapted.values() for record in records):
        return None
    # A weight that is trained in full (modules_to_save) has an update without a rank.
    reached = {r.layer for records in evidence.adapted.values() for r in records if r.rank or r.adapter_fro > 0}
    by_layer = {r.layer: r for records in evidence.adapted.values() for r in records}
    negligible = negligible_layers(evidence)
    unreached = {layer: r.fro**2 for layer, r in by_layer.items() if layer not in reached and layer not in negligible}
    total = math.fsum(record.fro**2 for record in by_layer.values())
    fractions: dict[str, float] = {}
    for layer, energy in unreached.items():
        name = module_type_of(layer)
        fractions[name] = fractions.get(name, 0.0) + energy / total
    if math.fsum(fractions.values()) < PLACEMENT_SHARE or any(find_allocations(evidence)):
        return None
    params, reference_text = reference(evidence)
    missing_types = ", ".join(sorted(fractions, key=lambda name: -fractions[name]))
    measured = evidence.update is not None
    return Advice(
        "widen placement",
        f"Allocate {params:,} trainable parameters, {reference_text}, to all matrices: {missing_types} have none"
        if measured
        else f"Measure the spectrum, to adapt {missing_types} too",
        f"{percent(math.fsum(fractions.values()))} of ‖ΔW‖² is in matrices that {_join_paths(list(evidence.adapted))} "
        f"{'does' if len(evidence.adapted) == 1 else 'do'} not adapt: {_fractions_text(fractions)}.",
        f"fraction of ‖ΔW‖² in matrices without an adapter ≥ {PLACEMENT_SHARE}",
        f"{ARTICLE}, rank selection step 5.2",
        command("allocate", _find_spectrum_file(evidence), params=params, o="adapter_config.json")
        if measured
        else _make_spectrum_command(evidence),
        params=params if measured else None,
        layers=tuple(unreached),
    )


def train_other_weights(evidence: Evidence) -> Advice | None:
    """Steps 2 and 3: embeddings and head, norms and biases, which adapters of matrices do not reach."""
    fraction = evidence.shares["vocabulary"] if evidence.shares else 0.0
    vectors = large_vector_change(evidence)
    has_tables = fraction >= PLACEMENT_SHARE and bool(evidence.readable)
    gain_without_matrices = without_matrices(evidence)
    if not (has_tables or vectors) or (gain_without_matrices is not None and gain_without_matrices < PLACEMENT_SHARE):
        return None
    parts = [*(["embeddings and head"] if has_tables else []), *(["norms and biases"] if vectors else [])]
    parts_text = " and ".join(parts)
    reason = f"{percent(fraction)} of the whole change ‖Δ‖² is in embeddings and head." if has_tables else ""
    reason += f" {vectors.seen} Most in {named(vectors.layers)}." if vectors else ""
    sides = (evidence.path_of("base"), evidence.path_of("tuned"))
    text = evidence.path_of("eval", "HELD_OUT_TEXT")
    if not evidence.spectra:
        action = "Train norms and biases alone: no matrix outside embeddings and head changed"
        sweep_ranks: tuple[int, ...] = (COMMON_RANKS[0],)
        action += f"; compare with {format_ranks(sweep_ranks)} in addition, to see whether matrices matter"
        argv = sweep_of(evidence, sweep_ranks, bitfit=True)
    elif gain_without_matrices is None:
        sweep_ranks = (0,)
        action = f"Measure the gain of {parts_text} alone, with every matrix truncated to r=0"
        argv = command(
            "probe truncation", *sides, eval=text, ranks=sweep_ranks, untruncated="tuned", o="truncation.jsonl"
        )
    else:
        sweep_ranks = (
            next(
                (rank for rank in COMMON_RANKS if rank > rejected_options(evidence).truncated_rank),
                2 * COMMON_RANKS[-1],
            ),
        )
        action = (
            f"Also train {parts_text} (PEFT: modules_to_save), as in an adapter of {format_ranks(sweep_ranks)} "
            "that saves all of them"
        )
        reason += f" With every matrix as in BASE they give {percent(gain_without_matrices)} of the gain."
        argv = command("extract", *sides, rank=sweep_ranks[0], unfactored="save", o="adapter/")
    return Advice(
        "hybrid" if vectors else "train embeddings and head",
        action,
        f"{reason} An adapter on the other matrices cannot reach it.".strip(),
        f"fraction of ‖Δ‖² in embeddings and head ≥ {PLACEMENT_SHARE}, or in norms and biases ≥ {VECTORS_SHARE}; "
        f"truncation to r=0, if measured, keeps ≥ {PLACEMENT_SHARE} of the gain",
        f"{ARTICLE}, rank selection steps 5.2, carried over to tables, and 5.3; BitFit (Ben Zaken et al. 2022)",
        argv,
        ranks=sweep_ranks,
        layers=vectors.layers if vectors else (),
    )


def train_fully(evidence: Evidence) -> Advice | None:
    """Step 4: train the weights themselves if the largest common rank is too small."""
    rank = COMMON_RANKS[-1]
    large = [record for record in evidence.readable if min(record.shape) >= SIZEABLE_RATIO * rank]
    by_type: dict[str, list[float]] = {}
    for layer, fraction in shares_at(rank, large).items():
        by_type.setdefault(module_type_of(layer), []).append(fraction)
    flat_types = [
        name
        for name, fractions in by_type.items()
        if sum(fraction < MIN_ENERGY for fraction in fractions) >= MOST_LAYERS * len(fractions)
    ]
    if not flat_types or rejected_options(evidence).has_better_adapter:
        return None
    all_types = len(flat_types) == len(by_type)
    kept = median(fraction for name in flat_types for fraction in by_type[name])
    return Advice(
        "full fine-tuning" if all_types else "partial fine-tuning",
        (f"Fine-tune fully, or accept a low-rank bias; compare the cost with r={rank}" if all_types else "")
        or f"Unfreeze {', '.join(flat_types)}, adapters on the rest; compare the cost with r={rank} everywhere",
        f"Even r={rank} keeps {percent(kept)} of the energy in the median matrix of "
        f"{'every type' if all_types else f'these types, {len(flat_types)} of {len(by_type)}'}.",
        f"C({rank}) < {MIN_ENERGY} in at least {MOST_LAYERS:.0%} of a type's resolved matrices with both sizes ≥ "
        f"{SIZEABLE_RATIO * rank}",
        f"{ARTICLE}, rank selection step 5.4; Biderman et al. 2024 (arXiv 2405.09673) measure 10 to 100 times common "
        "ranks",
        command("plan", evidence.path_of("base"), ranks=(rank,)),
        ranks=(rank,),
        layers=tuple(record.layer for record in large if module_type_of(record.layer) in flat_types),
    )


RULES = (set_scale, take_allocation, raise_rank, widen_placement, train_other_weights, train_fully)
RANK_RULES = (fit_rank, take_allocation, raise_rank, train_fully)


def extract_at_small_rank(evidence: Evidence) -> Advice | None:
    """Without another rule: recommend a small rank that suffices for every layer, if there is one."""
    for rank in COMMON_RANKS[:-1]:
        kept = [energy_at(record, rank) for record in evidence.readable]
        known = [fraction for fraction in kept if fraction is not None]
        small = [record for record in evidence.readable if min(record.shape) >= SIZEABLE_RATIO * rank]
        if rank <= rejected_options(evidence).truncated_rank:
            continue
        if len(known) == len(evidence.spectra) <= 2 * len(small) and small and min(known) >= SUFFICIENT_ENERGY:
            return Advice(
                "sufficient rank",
                f"Extract the update at r={rank}, which is sufficient",
                f"r={rank} keeps {percent(min(known))} of the energy in the worst of {len(known)} matrices, and no "
                "measured change is outside the reach of an adapter.",
                f"C({rank}) ≥ {SUFFICIENT_ENERGY} in every matrix outside embeddings and head, all resolved, half "
                f"of them {SIZEABLE_RATIO * rank} or more wide; no other rule applies",
                f"{ARTICLE}, rank sweep (fast saturation); Eckart & Young 1936",
                command("extract", evidence.path_of("base"), evidence.path_of("tuned"), rank=rank, o="adapter/"),
                ranks=(rank,),
            )
    return None


def sweep(evidence: Evidence) -> Advice | None:
    """Without another rule and without a sufficient small rank: compare losses."""
    items = evidence.largest
    kept = [item.kept for item in items]
    above = [
        rank
        for rank in (*COMMON_RANKS, *(COMMON_RANKS[-1] * 2**i for i in (1, 2)))
        if rank > rejected_options(evidence).trained
    ]
    if not kept or rejected_options(evidence).more_rank:
        return None
    rank = ranks([item.rank for item in items])
    nearest = min(range(len(above)), key=lambda index: abs(math.log(above[index] / median(i.rank for i in items))))
    candidates = tuple(above[max(0, nearest - 1) : max(0, nearest - 1) + 3])
    return Advice(
        "sweep",
        f"Compare the held-out loss: train at {format_ranks(candidates)}",
        f"Rank {rank} keeps between {percent(min(kept))} and {percent(max(kept))} of the energy, "
        f"{percent(median(kept))} in the median matrix: no other rule shows whether that is sufficient.",
        "no other rule applies",
        f"{ARTICLE}, diagnostic 3 (rank sweep)",
        sweep_of(evidence, candidates),
        ranks=candidates,
    )


def _target(
    measured: Mapping[str, Spectrum], items: Sequence[Capacity], at_least: float, larger_than: int
) -> int | None:
    """Return the smallest common rank that keeps half of the energy in a fraction of the layers; None if none does."""
    for rank in COMMON_RANKS:
        kept = [energy_at(measured[item.layer], rank) or 0.0 for item in items]
        is_higher = rank > max(larger_than, *(item.rank for item in items)) if len(items) else False
        if is_higher and sum(k >= MIN_ENERGY for k in kept) >= at_least * len(kept):
            return rank
    return None


def _find_largest_adapters(evidence: Evidence) -> list[str]:
    """Return the adapters with the largest rank in some layer."""
    largest = {item.layer: item.rank for item in evidence.largest}
    return [
        path
        for path, records in evidence.adapted.items()
        if any(record.rank and largest.get(record.layer) == record.rank for record in records)
    ]


def _describe_limits(evidence: Evidence, paths: Sequence[str]) -> str:
    """State where adapters are limited by factors other than rank."""
    limited = [record.limited_by for path in paths for record in evidence.adapted[path] if record.rank]
    by_rank = limited.count("rank")
    if not limited or 2 * by_rank >= len(limited):
        return ""
    return (
        f" But rank is the larger part of ε in {f'only {by_rank}' if by_rank else 'none'} of the {len(limited)} "
        f"matrices that {_join_paths(paths)} {'adapts' if len(paths) == 1 else 'adapt'}: the adapter found another "
        "solution, which may be as good."
    )


def _describe_energy_kept(evidence: Evidence, params: int) -> str:
    """State the energy that the command will keep, by running it on these records."""
    assert evidence.update is not None
    results = evidence.update.results
    try:
        allocation = allocate(results.layers, Budget("params", params, "--params"), left_out=results.left_out)
    except UsageError:
        return ""
    return f" Allocated this way, they keep {percent(allocation.certificate.kept)} of the energy of all matrices."


def _repeat_allocation(run: Run, evidence: Evidence) -> tuple[str, ...] | None:
    """Return the command of an allocation that writes its config; None if its weights were given in Python."""
    settings = run.settings
    if isinstance(settings.get("weights"), Mapping):
        return None
    results_file = next((side.path for side in run.inputs if side.role == "results" and side.path), None)
    return command(
        "allocate",
        results_file or _find_spectrum_file(evidence),
        **budget_of(settings),
        **{name: value for name, value in list_typed_options(AllocateOptions, settings).items() if name != "energy"},
        o="adapter_config.json",
    )


def _join_paths(paths: Sequence[str]) -> str:
    return " and ".join([", ".join(paths[:-1]), paths[-1]]) if len(paths) > 1 else "".join(paths)


def _fractions_text(fractions: Mapping[str, float]) -> str:
    return ", ".join(
        f"{percent(fractions[name])} in {name}" for name in sorted(fractions, key=lambda name: -fractions[name])
    )


def _find_spectrum_file(evidence: Evidence) -> str:
    return evidence.update.name if evidence.update else "spectrum.jsonl"


def _make_spectrum_command(evidence: Evidence) -> tuple[str, ...]:
    return command("spectrum", evidence.path_of("base"), evidence.path_of("tuned"), o="spectrum.jsonl")
