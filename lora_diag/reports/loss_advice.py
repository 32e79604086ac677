"""Advice rules based on held-out losses. They take precedence over those on weights, which are only indications.

A rule does not apply without its probe's records. Each rule names its set and gives the paired standard error, or the
difference detectable with the seeds, which determine significance.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_diag.metrics.equivalence import LEVEL
from lora_diag.probes.outputs.choice import Choice, choices
from lora_diag.probes.outputs.contest import SUFFICIENT_SHARE, Contest, deciding_sets
from lora_diag.probes.sweep.verdict import SweepVerdict, confident, reasons
from lora_diag.records import Probe
from lora_diag.rendering.text import two_digits
from lora_diag.reports.evidence import ARTICLE, Evidence
from lora_diag.reports.step import Advice, command, format_ranks
from lora_diag.reports.worth import SweptRun, compressed, contests, of, rejected_options, swept

# Ranks of a recommended sweep.
_RANKS = tuple(2**power for power in range(2, 12))
_PAIRED = "two paired standard errors by sequence, more for few (Cochran 1977, section 2.11; Student's t)"


def keep_adapter(evidence: Evidence) -> Advice | None:
    """Recommend no change if an adapter is as good as the full fine-tune."""
    equivalent = [contest for contest in contests(evidence) if contest.outcome == "as good"]
    if not equivalent:
        return None
    best = min(equivalent, key=lambda contest: contest.worst.gap or 0.0)
    others = ", ".join(_describe_outcome(contest) for contest in equivalent if contest is not best)
    source, records = next(of(evidence, "outputs"))
    on_main = choices([record for record in records if record.set in deciding_sets(records)])
    choices_text = "".join(f" {_describe_choice(choice)}." for choice in on_main)
    return Advice(
        "keep the adapter",
        f"No change: {best.name} does as well as the full fine-tune on held-out text",
        f"{_describe_outcome(best)}.{f' The same holds for {others}.' if others else ''}{choices_text} Distances "
        "in weights do not contradict this.",
        f"loss significantly within {1 - SUFFICIENT_SHARE:.0%} of the full fine-tune's gain on every set that is not "
        "shifted and where that gain is positive, and that gain significant",
        f"{ARTICLE}, diagnostic 3 (validation loss); {_PAIRED}",
        command("gate", policy="adapter-basic", base=source.path_of("base"), adapter=best.name),
        adapters=(best.name,),
    )


def flag_worse_finetune(evidence: Evidence) -> Advice | None:
    """Advise against imitating a full fine-tune that is worse than BASE."""
    if not rejected_options(evidence).tuned or not (
        measured := [*of(evidence, "outputs"), *of(evidence, "truncation")]
    ):
        return None
    source, records = measured[0]
    worst = max((r for r in records if r.subject == "base" and r.layer is None), key=lambda r: -(r.gap or 0.0))
    return Advice(
        "fine-tune worse than BASE",
        f"Do not imitate {source.path_of('tuned')}: measure it on other held-out text first",
        f"On {worst.set}, BASE is {_format_gap(worst)} nats from the full fine-tune: training made the model worse "
        "there.",
        "the full fine-tune significantly worse than BASE on every set that is not shifted",
        f"{ARTICLE}, diagnostic 3 (validation loss); {_PAIRED}",
        command(
            "probe truncation",
            source.path_of("base"),
            source.path_of("tuned"),
            eval="OTHER_TEXT",
            ranks=(0,),
            o="truncation-2.jsonl",
        ),
        ranks=(0,),
    )


def close_gap(evidence: Evidence) -> Advice | None:
    """State the gap if every measured adapter is worse than the full fine-tune."""
    all_contests = contests(evidence)
    if (
        not all_contests
        or any(contest.outcome != "worse" for contest in all_contests)
        or train_at_rank(evidence) is not None
    ):
        return None  # a sweep recommends the training
    best = min(all_contests, key=lambda contest: contest.worst.gap or 0.0)
    sweep = swept(evidence)
    highest = max([rejected_options(evidence).trained, *(sweep.ranks if sweep else ())])
    candidates = () if rejected_options(evidence).more_rank else tuple(rank for rank in _RANKS if rank > highest)[:3]
    argv = sweep_of(evidence, candidates)
    return Advice(
        "close the gap",
        f"Close a gap of {_format_gap(best.worst)} nats to the full fine-tune: "
        f"{f'train at {format_ranks(candidates)}' if candidates else 'sweep learning rates'}",
        f"{_describe_outcome(best)}{', the best of ' + str(len(all_contests)) if len(all_contests) > 1 else ''}. Steps "
        "based on weights suggest its cause; train and measure the loss again.",
        f"every adapter significantly worse on some set, and not shown to keep {SUFFICIENT_SHARE:.0%} of the gain",
        f"{ARTICLE}, rank selection step 5 (escalation); {_PAIRED}",
        argv,
        ranks=candidates,
    )


def measure_more(evidence: Evidence) -> Advice | None:
    """Recommend more held-out text if the comparison is inconclusive."""
    all_contests = contests(evidence)
    unknown = [contest for contest in all_contests if contest.outcome == "not known"]
    if not unknown or any(contest.outcome == "as good" for contest in all_contests):
        return None
    source, _ = next(of(evidence, "outputs"))
    return Advice(
        "measure more",
        f"Measure the loss of {', '.join(contest.name for contest in unknown)} on more held-out text",
        f"{'; '.join(map(_describe_outcome, unknown))}: not enough text to decide whether "
        f"{'it does' if len(unknown) == 1 else 'they do'} as well as the full fine-tune.",
        f"neither significantly within {1 - SUFFICIENT_SHARE:.0%} of the gain nor significantly worse",
        _PAIRED,
        command(
            "probe outputs",
            source.path_of("base"),
            source.path_of("tuned"),
            [contest.name for contest in unknown],
            eval="MORE_TEXT",
            o="outputs-2.jsonl",
        ),
        adapters=tuple(contest.name for contest in unknown),
    )


def train_at_rank(evidence: Evidence) -> Advice | None:
    """Recommend the rank and learning rate of a sweep; or the best candidate, and the seeds needed to confirm it."""
    sweep = swept(evidence)
    if sweep is None or sweep.verdict.outcome == "no verdict":
        return None
    verdict, base, chosen = sweep.verdict, sweep.base, sweep.verdict.chosen
    all_ranks, path = ", ".join(map(str, sweep.ranks)), sweep.source.path_of("base")
    rates: tuple[float, ...] = ()
    seeds, next_ranks = None, sweep.ranks
    if chosen is None:
        lowest = min(record.lr for _, records in of(evidence, "sweep") for record in records if record.lr)
        rates = tuple(float(f"{lowest / factor:.2g}") for factor in (100, 10, 3))
        action = f"Change the training before the rank: try learning rates {', '.join(f'{rate:g}' for rate in rates)}"
        reason = (
            f"On {sweep.set}, every rank is worse than BASE: the best of r = {all_ranks} is {-verdict.gain:.3g} nats "
            f"above its {base.nats:.4g}, at learning rates from {lowest:g} up."
        )
        argv = sweep_of(evidence, next_ranks, rates)
    else:
        setting = f"r={chosen.rank} with learning rate {chosen.lr:g}"
        confidence = chosen.confidence if verdict.rank is not None else verdict.confidence
        confidence_text = "" if confidence is None else f", {confident(confidence)} confidence"
        lead = (
            f"the smallest rank of {all_ranks} shown to keep"
            if verdict.rank is not None
            else f"the best candidate of {all_ranks}, not yet confirmed, to keep"
        )
        tolerance = sweep.tolerance
        shown = (
            f"On {sweep.set}, r={chosen.rank} is {lead} {100 * (1 - tolerance):.4g}% of every other rank's "
            f"gain{confidence_text}"
        )
        reason = f"{'; '.join([shown, *reasons(verdict, tolerance)])}."
        seeds = verdict.more_seeds
        higher = (2 * chosen.rank, 4 * chosen.rank) if chosen.rank == sweep.ranks[-1] else ()
        action = f"Train at {setting}"
        if higher:
            action += f", and also sweep {format_ranks(higher)}: the loss still decreases there"
        if seeds is not None:
            action += f"; {seeds} seeds would confirm{' more' if higher else ' it'}"
        next_ranks = (*sweep.ranks, *higher)
        if higher or seeds is not None:
            argv = extend_sweep(sweep, next_ranks, seeds or verdict.seeds)
        else:
            next_ranks = (chosen.rank,)
            argv = command("plan", path, ranks=next_ranks)
    return Advice(
        f"sweep: {verdict.outcome}",
        action,
        reason,
        f"equivalence test over seeds (one-sided t-tests at {LEVEL:.0%}, variance pooled over ranks), each rank at "
        "its best learning rate",
        f"{ARTICLE}, diagnostic 3 (rank sweep); Schuirmann 1987",
        argv,
        ranks=next_ranks,
        rates=rates,
        seeds=seeds,
    )


def extend_sweep(sweep: SweptRun, ranks: Sequence[int], seeds: int) -> tuple[str, ...]:
    """Return the command that adds ranks and seeds to a finished sweep."""
    run = sweep.source.results.run
    settings = run.settings
    sides = {role: [side.path for side in run.inputs if side.role == role] for role in ("data", "eval", "shifted")}
    sides["data"] = sides["data"] or ["DATA"]
    texts = [word for role, paths in sides.items() for path in paths for word in (f"--{role}", path)]
    limits = [side.tensors for side in run.inputs if side.role in {"eval", "shifted"} and side.notes]
    single = ("steps", "batch", "length", "seed", "widen", "quantized", "dtype")
    targets = settings.get("targets")
    return command(
        "probe sweep",
        sweep.source.path_of("base"),
        texts,
        max_sequences=max(limits, default=None),
        ranks=ranks,
        lr=settings.get("rates"),
        full_lr=settings.get("full_rates"),
        **{name: settings.get(name) for name in single},
        full=bool(settings.get("full_rates")),
        bitfit=bool(settings.get("bitfit")),
        gain_tolerance=settings.get("tolerance"),
        target_modules=targets if isinstance(targets, list) else None,
        **{kind.lower(): True for kind in ("DoRA", "rsLoRA") if kind in settings.get("kind", "")},
        repeats=seeds,
        resume=True,
        o=sweep.source.name,
    )


def flag_shifted_loss(evidence: Evidence) -> Advice | None:
    """Report a shifted set that a sweep makes worse, or that needs a higher rank."""
    sweep = swept(evidence)
    if sweep is None:
        return None
    for name, other in sweep.shifted.items():
        if other.outcome == "no gain" and sweep.verdict.gain > 0:
            action = f"Train on a mixture with text like {name} if it matters: training makes every rank worse there"
            ranks, argv = sweep.ranks, sweep_of(evidence, sweep.ranks, data="MIXED_TEXT")
            gain = f"for a gain of {sweep.verdict.gain:.3g} on {sweep.set}"
            reason = f"Least at r={other.best}, by {-other.gain:.3g} nats, {gain}."
        elif other.rank is not None and sweep.verdict.rank is not None and _is_insufficient(other, sweep.verdict.rank):
            action = f"Take r={other.rank} if {name} matters: r={sweep.verdict.rank} is sufficient on {sweep.set} only"
            ranks = (sweep.verdict.rank, other.rank)
            argv = command("plan", sweep.source.path_of("base"), ranks=ranks)
            reason = (
                f"On {name}, r={other.rank} is the smallest rank shown to be sufficient, and r={sweep.verdict.rank} "
                "is not."
            )
        else:
            continue
        return Advice(
            "shifted set",
            action,
            reason,
            "on a shifted set no rank is better than BASE, or the rank that is sufficient elsewhere is shown to be "
            "insufficient",
            f"{ARTICLE}, diagnostic 3 (in-domain and shifted sets); Biderman et al. 2024 (arXiv 2405.09673)",
            argv,
            ranks=ranks,
        )
    return None


def _is_insufficient(verdict: SweepVerdict, rank: int) -> bool:
    return any(standing.rank == rank and standing.enough == "no" for standing in verdict.standings)


def compress(evidence: Evidence) -> Advice | None:
    """Recommend extracting the full fine-tune itself at a rank."""
    truncation = compressed(evidence)
    if truncation is None or truncation.rank <= rejected_options(evidence).truncated_rank:
        return None
    worst = min(truncation.records, key=lambda record: record.kept or 0.0)
    energy = "" if worst.energy is None else f", while C({truncation.rank}) = {worst.energy:.2f}"
    source = truncation.source
    # Measured with all other weights as in TUNED; without them the rank keeps less.
    saved = source.results.run.settings.get("rest") == "tuned" and truncation.without != 0
    fraction = "" if truncation.without is None else f", which give {truncation.without:.0%} of it alone"
    saved_text = (
        f" Measured with TUNED's norms, biases, embeddings and head{fraction}: they are saved." if saved else ""
    )
    return Advice(
        "compress",
        f"To ship the full fine-tune as an adapter, truncate it to r={truncation.rank}, without training",
        f"It keeps {worst.kept:.0%} of the gain on {worst.set} (loss {_format_gap(worst)} to the full "
        f"fine-tune){energy}.{saved_text}",
        f"smallest rank measured that keeps ≥ {SUFFICIENT_SHARE:.0%} of the gain on every set that is not shifted; "
        "that gain more than two of its standard errors",
        "Eckart & Young 1936; measured, not bounded",
        command(
            "extract",
            source.path_of("base"),
            source.path_of("tuned"),
            rank=truncation.rank,
            unfactored="save" if saved else None,
            o="adapter/",
        ),
        ranks=(truncation.rank,),
    )


LOSS_RULES = (keep_adapter, flag_worse_finetune, close_gap, measure_more, train_at_rank, flag_shifted_loss, compress)


def _describe_choice(choice: Choice) -> str:
    """State which adapter is significantly better than all others on a set, or which are not distinguishable."""
    equal = ", ".join(rival.name for rival in choice.equals)
    if not equal:
        return f"On {choice.set}, paired by sequence, {choice.best} is better than every other adapter"
    return f"On {choice.set}, {choice.best} is not distinguishable from {equal}: use the cheapest"


def _describe_outcome(contest: Contest) -> str:
    """State the result of an adapter on its worst set."""
    record = contest.worst
    kept_text = "" if record.kept is None else f", {record.kept:.0%} of its gain"
    return f"{contest.name} is {_format_gap(record)} nats from the full fine-tune on {record.set}{kept_text}"


def _format_gap(record: Probe) -> str:
    error = "" if record.gap_error is None else f" ± {two_digits(record.gap_error)}"
    return f"{record.gap or 0.0:+.4f}{error}"


def sweep_of(
    evidence: Evidence,
    ranks: Sequence[int] = (),
    rates: Sequence[float] = (),
    data: str | None = None,
    bitfit: bool = False,
) -> tuple[str, ...]:
    """Return the command of a rank sweep on the inputs in the records; unknown inputs are placeholders in capitals."""
    sweep = swept(evidence)
    source = sweep.source if sweep else None
    texts = [
        word
        for role in ("eval", "shifted")
        for path in (source.paths(role) if source else ())
        for word in (f"--{role}", path)
    ]
    return command(
        "probe sweep",
        source.path_of("base") if source else evidence.path_of("base"),
        ["--data", data or (source.path_of("data") if source else "TRAIN_TEXT")],
        texts or ["--eval", "HELD_OUT_TEXT"],
        lr=rates,
        ranks=ranks,
        steps=source.results.run.settings.get("steps") if source else None,
        bitfit=bitfit,
        o=f"{'sweep-2' if sweep else 'sweep'}.jsonl",
    )
