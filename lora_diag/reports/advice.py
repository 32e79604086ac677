"""Recommended next steps: a table of conditions, sentences and commands over the fields of records.

``RULES`` is evaluated from top to bottom for each full fine-tune of the page. Rules on held-out
losses come first; weights are only indications, so a rule requests the loss where none was
compared, before a higher rank. A rule does not apply if its evidence is missing, within its error
or at the rounding noise floor. Sentence and command of a rule are filled from the same values, so
that they cannot disagree.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from statistics import median
from typing import Any

from lora_diag.catalog import feature_of
from lora_diag.diagnostics.residual.record import Residual
from lora_diag.errors import flag
from lora_diag.probes.outputs.show import (
    SUFFICIENT_SHARE,
    AdapterContest,
    find_gain,
    is_tuned_worse,
)
from lora_diag.probes.sweep import SweepOptions
from lora_diag.probes.sweep.show import state_verdict
from lora_diag.records import Probe
from lora_diag.records.names import short_names
from lora_diag.records.probe import main_sets
from lora_diag.rendering.losses import format_gap
from lora_diag.rendering.text import list_names, percent, safe, span
from lora_diag.reports.evidence import Evidence, Source, energy_at
from lora_diag.running.options import list_options, list_typed_options

# A rank that keeps less than half of a layer's energy is too small there; one that keeps 90% in all
# is sufficient.
MIN_ENERGY, SUFFICIENT_ENERGY = 0.5, 0.9
# A factor within these of 1 changes ε² by less than 6% of ‖X‖²: (1 − 1/1.25)² = 0.04, (1.25 − 1)² =
# 0.0625.
MAX_SCALE = 1.25
# Below this cosine the adapter's direction holds less than a quarter of ‖D‖², and the scale is
# irrelevant.
MIN_COSINE = 0.5
# A LoRA of rank r on an n×n matrix has 2r/n of its parameters: for n < 4r it is not small.
SIZEABLE_RATIO = 4
# Maximum number of values that are all listed in a sentence.
_LISTED = 4
# Ranks that a step may try.
COMMON_RANKS = tuple(2**power for power in range(2, 12))

Facts = dict[str, Any]
# docs/evidence.md: a language model's update truncated to rank 2 kept 93% of the gain with 23% of
# the energy.
ENERGY = (
    "Energy bounds what a rank can hold of this one full fine-tune; the held-out loss may "
    "need a lower rank."
)


@dataclass(frozen=True, slots=True)
class AdviceRule:
    """A row of the table.

    Args:
        name: Its name.
        find: Returns the values of sentence and command; None if the condition is false.
        do: The step, a format string.
        because: Its evidence, a format string.
        command: Its command without ``loradiag``, words of format strings; ``{base}``, ``{tuned}``,
            ``{eval}`` and ``{data}`` are inputs of the page, and a word that is a tuple of text is
            several.
        unless: Names of the rules above that replace it.
    """

    name: str
    find: Callable[[Evidence], Facts | None]
    do: str
    because: str
    command: str
    unless: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AdviceStep:
    """One step.

    Args:
        rule: The name of the rule, as in the documentation of ``report``.
        do: What to do.
        because: The evidence, with its numbers.
        argv: The command, word by word.
        facts: The values of sentence and command.
        about: Paths of the full fine-tunes concerned; empty if it concerns all of the page.
    """

    rule: str
    do: str
    because: str
    argv: tuple[str, ...]
    facts: Mapping[str, Any] = field(compare=False)
    about: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """All layers concerned, with names as in the file."""
        layers: tuple[str, ...] = self.facts.get("layers", ())
        return layers

    @property
    def command(self) -> str:
        """The command, quoted for a shell."""
        return shlex.join(self.argv)


def advice(evidence: Evidence) -> list[AdviceStep]:
    """Return the steps supported by the records, for each full fine-tune in the order of ``RULES``.

    Unfinished runs support no step. A step that applies to several full fine-tunes is listed once
    and names them all.
    """
    groups = evidence.finished().groups()
    by_command: dict[tuple[str, ...], AdviceStep] = {}
    for group in groups:
        about = (group.path_of("tuned"),) if len(groups) > 1 else ()
        for step in _apply_rules(group):
            earlier = by_command.get(step.argv, step)
            by_command[step.argv] = replace(earlier, about=(*earlier.about, *about))
    for argv, step in by_command.items():
        if len(step.about) == len(groups):  # a step that applies to all applies to the page
            by_command[argv] = replace(step, about=())
    return list(by_command.values())


_PLACEHOLDERS = {"base": "", "tuned": "", "eval": "HELD_OUT_TEXT", "data": "TRAIN_TEXT"}


def _apply_rules(evidence: Evidence) -> Iterator[AdviceStep]:
    """Yield the steps of the rules that apply to one full fine-tune."""
    applied: set[str] = set()
    short = short_names(chain.from_iterable(source.paths() for source in evidence.sources), safe)
    paths = {role: evidence.path_of(role, word) for role, word in _PLACEHOLDERS.items()}
    for rule in RULES:
        if not applied.isdisjoint(rule.unless):
            continue
        values = rule.find(evidence)
        if values is None:
            continue
        applied.add(rule.name)
        facts: Facts = {**paths, **values}
        texts = {name: _join(value, short) for name, value in facts.items()}
        do = rule.do.format_map(texts)
        because = " ".join(rule.because.format_map(texts).split())
        argv = ("loradiag", *_fill_command(rule.command, facts))
        yield AdviceStep(rule.name, do, because, argv, facts)


def _fill_command(template: str, facts: Facts) -> Iterator[str]:
    """Yield the words of a command: several for a tuple of text, one with commas for a tuple of
    numbers.
    """
    for word in template.split():
        value = facts.get(word[1:-1])
        if not (word.startswith("{") and isinstance(value, tuple)):
            yield word.format_map(facts)
        elif value and not isinstance(value[0], str):
            yield _format(value)
        else:
            yield from value


def _join(value: object, short: Mapping[str, str] | None = None) -> str:
    """Return a value, or those of a tuple, as part of a sentence: paths shortened to what differs,
    and many counted.

    >>> _join("a"), _join((4, 8, 16)), _join(("runs/a", "b"), {"runs/a": "a"})
    ('a', '4, 8 and 16', 'a and b')
    >>> _join(tuple("abcdefg"))
    'a, b, c and 4 more'
    """
    values = value if isinstance(value, tuple) else (value,)
    words = list(map(_format, values))
    if short is not None:
        words = [short.get(word, word) for word in words]
    if len(words) > _LISTED:
        words = [*words[:3], f"{len(words) - 3} more"]
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _format(value: object) -> str:
    """Return a value as a word; several numbers with commas."""
    if isinstance(value, tuple | list):
        return ",".join(map(_format, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _find_worse_finetune(evidence: Evidence) -> Facts | None:
    """Return the set on which the full fine-tune is worst, if it is worse than BASE on all; else
    None.
    """
    records: list[Probe] = []
    for _, of_run in evidence.losses("outputs", "truncation"):
        records += of_run
    sets = main_sets(records)
    bases = [record for record in records if record.subject == "base" and record.layer is None]
    bases = [record for record in bases if record.set in sets]
    if not bases or not all(map(is_tuned_worse, bases)):
        return None
    worst = min(bases, key=lambda record: record.gap or 0.0)
    return {"set": worst.set, "gap": format_gap(worst)}


def _find_equal_adapter(evidence: Evidence) -> Facts | None:
    """Return the best adapter that is as good as the full fine-tune, and the others."""
    equal = [contest for contest in evidence.contests if contest.outcome == "as good"]
    if not equal:
        return None
    best, *others = sorted(equal, key=lambda contest: contest.worst.nats)
    others_sentence = ""
    if others:
        names = tuple(contest.name for contest in others)
        others_sentence = f"The same holds for {_join(names)}: use the smallest."
    return {"adapter": best.name, "others": others_sentence, **_facts_of(best)}


def _facts_of(contest: AdapterContest) -> Facts:
    """Return set, gap and kept fraction of the gain of an adapter on its worst set."""
    record = contest.worst
    return {
        "set": record.set,
        "gap": format_gap(record),
        "kept": "-" if record.kept is None else f"{record.kept:.0%}",
    }


def _find_tuned_configuration(evidence: Evidence) -> Facts | None:
    """Return the configuration that a search chose within its budget; None without one
    that gains.
    """
    for source in evidence.sources:
        feature = feature_of(source.results.run.command)
        if feature is None or not feature.advice:
            continue
        facts: Facts | None = feature.load(feature.advice)(source.results)
        if facts is not None:
            return {**facts, "eval": source.paths("eval")[0]}
    return None


def _find_swept_rank(evidence: Evidence) -> Facts | None:
    """Return the rank and learning rate of a sweep and the next command; None without a sweep.

    That command is a sweep of more seeds, ranks or rates where those of this one do not settle it.
    """
    if evidence.sweep is None:
        return None
    source, swept = evidence.sweep
    verdict, chosen = swept.verdict, swept.verdict.chosen
    facts: Facts = {
        "set": swept.set,
        "ranks": swept.ranks,
        "outcome": verdict.outcome,
        "why": state_verdict(swept)[0],
    }
    typed = list_typed_options(SweepOptions, source.results.run.settings) | {"ranks": swept.ranks}
    if chosen is None:
        lowest_rate = min(_learning_rates(evidence))
        rates = tuple(float(f"{lowest_rate / factor:.2g}") for factor in (100, 10, 3))
        action = f"Change the training before the rank: try learning rates {_join(rates)}"
        then = (*_sweep_again(source, typed | {"lr": rates}), "-o", "sweep-2.jsonl")
        return facts | {"rates": rates, "action": action, "then": then}
    action = f"Train at r={chosen.rank} with learning rate {chosen.lr:g}"
    higher: tuple[int, ...] = ()
    if chosen.rank == swept.ranks[-1]:
        higher = (2 * chosen.rank, 4 * chosen.rank)
        action += f"; also sweep r={_join(higher)}, the loss still decreases"
    if verdict.needed_seeds is not None:
        action += f"; {verdict.needed_seeds} seeds would confirm it"
    facts |= {
        "rank": chosen.rank,
        "lr": chosen.lr,
        "seeds": verdict.needed_seeds,
        "higher": higher,
        "action": action,
    }
    if higher or verdict.needed_seeds is not None:
        typed |= {
            "ranks": (*swept.ranks, *higher),
            "repeats": verdict.needed_seeds or verdict.seeds,
        }
        return facts | {"then": (*_sweep_again(source, typed), "--resume", "-o", source.name)}
    if not evidence.changed or evidence.update is None:
        return facts | {"then": ("plan", evidence.path_of("base"), "--ranks", str(chosen.rank))}
    facts["params"] = sum(chosen.rank * sum(record.shape) for record in evidence.changed)
    size_options = ("--params", str(facts["params"]), "--sweep", source.name)
    return facts | {"then": _allocate(evidence.update, *size_options)}


def _learning_rates(evidence: Evidence) -> Iterator[float]:
    """Yield the learning rates of all sweeps."""
    for _, records in evidence.losses("sweep"):
        for record in records:
            if record.lr:
                yield record.lr


def _allocate(update: Source, *size_options: str) -> tuple[str, ...]:
    """Return the words of the command that allocates ranks by the spectrum of an update."""
    return ("allocate", update.name, *size_options, "-o", "adapter_config.json")


def _sweep_again(source: Source, options: Mapping[str, Any]) -> Iterator[str]:
    """Yield the words of a sweep with the inputs and the options of an earlier one."""
    declared, run = list_options(SweepOptions), source.results.run
    # Options that the run record has in another form.
    texts = [item for item in run.inputs if item.role in {"eval", "shifted"}]
    limits = [item.tensors for item in texts if item.notes]
    kinds = {kind.lower(): kind in run.settings.get("kind", "") for kind in ("DoRA", "rsLoRA")}
    full = bool(run.settings.get("full_lr"))
    options = {**options, **kinds, "full": full, "max_sequences": max(limits, default=None)}
    training_texts = [*source.paths("data"), "TRAIN_TEXT"]
    yield from ("probe", "sweep", *source.paths("base"), "--data", training_texts[0])
    for role in ("eval", "shifted"):
        for path in source.paths(role):
            yield f"--{role}"
            yield path
    for name, value in options.items():
        if name in declared and value and value != "all-linear":
            yield flag(name)
            if value is not True:
                yield _format(value)


def _find_gap(evidence: Evidence) -> Facts | None:
    """Return the gap of the best adapter if all are worse than the full fine-tune; None otherwise.

    None also if an adapter of a higher rank is worse than one of a lower rank.
    """
    contests = evidence.contests
    if {contest.outcome for contest in contests} != {"worse"} or evidence.higher_rank_is_worse:
        return None
    best = min(contests, key=lambda contest: contest.worst.gap or 0.0)
    ranks = tuple(rank for rank in COMMON_RANKS if rank > evidence.insufficient_rank)[:3]
    return {"adapter": best.name, "ranks": ranks, "count": len(contests), **_facts_of(best)}


def _find_small_rank(evidence: Evidence) -> Facts | None:
    """Return the matrices in which the largest adapter's rank, or ``DEFAULT_RANK``, holds less than
    half of the energy.

    None without any, if an adapter of a higher rank is worse, and if direction is the largest part
    of ε² in more than half of the adapted matrices: these adapters found other solutions, which may
    be as good.
    """
    adapted, capacities = evidence.adapted, evidence.capacities
    if 2 * sum(record.limited_by == "direction" for record in adapted) > len(adapted):
        return None
    too_small = [item for item in capacities if item.kept < MIN_ENERGY]
    if not too_small or evidence.higher_rank_is_worse:
        return None
    too_small.sort(key=lambda item: item.kept)
    layers = tuple(item.layer for item in too_small)
    facts: Facts = {
        "rank": span(item.rank for item in too_small),
        "short": len(too_small),
        "count": len(capacities),
        "worst": percent(too_small[0].kept),
        "layers": layers,
        "named": list_names(layers),
    }
    if evidence.update is None:
        inputs = (evidence.path_of("base"), evidence.path_of("tuned"))
        then: tuple[str, ...] = ("spectrum", *inputs, "-o", "spectrum.jsonl")
        return facts | {"action": "Measure which rank the update needs", "then": then}
    facts["min_rank"] = min(item.rank for item in capacities)
    energy = f"{MIN_ENERGY:g}"
    then = _allocate(evidence.update, "--energy", energy, "--min-rank", str(facts["min_rank"]))
    action = "Raise the rank where it is too small"
    if all(contest.outcome != "worse" for contest in evidence.contests):
        action += ", if the loss needs it"
    return facts | {"action": action, "then": then}


def _find_sufficient_rank(evidence: Evidence) -> Facts | None:
    """Return the smallest rank of the update that keeps its gain; without losses, its energy in
    every matrix.

    None if no measured rank does, or if energy alone cannot decide.
    """
    insufficient = 0
    for source, records in evidence.losses("truncation"):
        settings = source.results.run.settings
        if settings.get("layers") or settings.get("exclude"):
            continue
        kept_by_rank = _measure_kept(records)
        for rank in sorted(kept_by_rank.keys() - {0}):
            kept = kept_by_rank[rank]
            if kept < SUFFICIENT_SHARE:
                insufficient = max(insufficient, rank)
                continue
            others = ""
            options: tuple[str, ...] = ()
            if settings.get("untruncated") == "tuned" and kept_by_rank.get(0) != 0:
                others = " with the norms, biases, embeddings and head of TUNED"
                options = ("--unfactored", "save")
                if 0 in kept_by_rank:
                    others += f", which keep {kept_by_rank[0]:.0%} alone"
            why = f"r={rank} keeps {kept:.0%} of the gain on held-out text{others}."
            return {"rank": rank, "why": why, "unfactored": options}
    return _find_rank_by_energy(evidence, insufficient)


def _measure_kept(records: Sequence[Probe]) -> dict[int, float]:
    """Return the kept fraction of the gain by rank, on the worst set; of rank 0, on the best set.

    Empty unless there is a gain on every set.
    """
    joint = [record for record in records if record.layer is None and record.module_type is None]
    sets = main_sets(joint)
    base_by_set = {record.set: record for record in joint if record.subject == "base"}
    if any(find_gain(base_by_set.get(name)) is None for name in sets):
        return {}
    by_rank: dict[int, list[float]] = {}
    for record in joint:
        if record.subject == "truncated" and record.set in sets and record.rank is not None:
            by_rank.setdefault(record.rank, []).append(record.kept or 0.0)
    kept_by_rank = {}
    for rank, kept in by_rank.items():
        if rank == 0:
            kept_by_rank[rank] = max(kept)
        elif len(kept) < len(sets):
            kept_by_rank[rank] = 0.0
        else:
            kept_by_rank[rank] = min(kept)
    return kept_by_rank


def _find_rank_by_energy(evidence: Evidence, insufficient: int) -> Facts | None:
    """Return the smallest rank above ``insufficient`` that holds the energy of every matrix."""
    resolved = evidence.resolved
    if evidence.contests or evidence.sweep or not resolved:
        return None
    if any(item.kept < MIN_ENERGY for item in evidence.capacities):
        return None
    if len(resolved) < len(evidence.changed):
        return None
    for rank in COMMON_RANKS[:4]:
        worst = min(energy_at(record, rank) or 0.0 for record in resolved)
        sizeable = [record for record in resolved if min(record.shape) >= SIZEABLE_RATIO * rank]
        is_conclusive = rank > insufficient and 2 * len(sizeable) >= len(resolved)
        if is_conclusive and worst >= SUFFICIENT_ENERGY:
            kept = f"{percent(worst)} of the energy in the worst of {len(resolved)} matrices"
            why = f"r={rank} keeps {kept}. {ENERGY}"
            return {"rank": rank, "why": why, "unfactored": ()}
    return None


def _find_scale(evidence: Evidence) -> Facts | None:
    """Return the adapters with the right direction and a wrong scale in at least half of their
    layers; None without.
    """
    factor_by_path: dict[str, float] = {}
    layers: list[str] = []
    hint = ""
    for path, records in evidence.compared.items():
        scaled = [record for record in records if record.best_scale is not None]
        off = list(filter(_is_scale_wrong, scaled))
        if not off or 2 * len(off) < len(scaled):
            continue
        layers += [record.layer for record in off]
        factor = factor_by_path[path] = median(map(_scale, off))
        log_root = math.log(median(record.rank or 1 for record in off)) / 2
        if log_root > 0.05 > abs(abs(math.log(factor)) - log_root):
            hint = (
                "This is √r, the ratio of rsLoRA's α/√r and LoRA's α/r: check which one was meant."
            )
    if not factor_by_path:
        return None
    return {
        "factors": factor_by_path,
        "by": tuple(f"{factor:.3g}" for factor in factor_by_path.values()),
        "adapters": tuple(factor_by_path),
        "hint": hint,
        "layers": tuple(dict.fromkeys(layers)),
        "count": len(layers),
    }


def _is_scale_wrong(record: Residual) -> bool:
    """Return whether an adapter's direction is right, and its scale is not."""
    has_direction = (record.cosine or 0.0) >= MIN_COSINE
    return has_direction and abs(math.log(_scale(record))) > math.log(MAX_SCALE)


def _scale(record: Residual) -> float:
    """Return the best scale of an adapter, at least 1e-9, so that it has a logarithm."""
    return max(record.best_scale or 0.0, 1e-9)


def _find_unknown_loss(evidence: Evidence) -> Facts | None:
    """Return the adapters whose losses do not decide; without losses, all with distances, or the
    update alone.
    """
    contests = evidence.contests
    unknown = tuple(contest.name for contest in contests if contest.outcome == "not known")
    if unknown:
        gaps = [f"{c.name} is {format_gap(c.worst)} nats from the full fine-tune" for c in contests]
        return {
            "why": f"{'; '.join(gaps)}: too little text to decide.",
            "eval": "MORE_TEXT",
            "file": "outputs-2",
            "adapters": unknown,
            "subject": unknown,
            "probe": "outputs",
            "before": "relying on distances",
        }
    if any(evidence.losses("outputs", "truncation", "sweep")):
        return None
    if evidence.adapters:
        return {
            "why": "Distances in weights do not show which model is better.",
            "file": "outputs",
            "adapters": tuple(evidence.adapters),
            "subject": tuple(evidence.adapters),
            "probe": "outputs",
            "before": "relying on distances",
        }
    if evidence.changed:
        return {
            "why": "Energies do not show which rank the loss needs.",
            "file": "truncation",
            "adapters": (),
            "subject": "the update at each rank",
            "probe": "truncation",
            "before": "choosing a rank",
        }
    return None


_LOSS_RULES = ("fine-tune worse than BASE", "keep the adapter")
RULES = (
    AdviceRule(
        "fine-tune worse than BASE",
        _find_worse_finetune,
        "Do not ship or imitate {tuned}: measure it on other held-out text first",
        "On {set}, BASE is {gap} nats from the full fine-tune: training made the model worse "
        "there.",
        "probe truncation {base} {tuned} --eval OTHER_TEXT --ranks 0 -o truncation-2.jsonl",
    ),
    AdviceRule(
        "keep the adapter",
        _find_equal_adapter,
        "No change: {adapter} does as well as the full fine-tune on held-out text",
        "It is {gap} nats from the full fine-tune on {set} and keeps {kept} of its gain. {others} "
        "Distances in weights do not contradict this.",
        "gate --policy adapter-basic --base {base} --adapter {adapter}",
    ),
    AdviceRule(
        "tuned",
        _find_tuned_configuration,
        "{action}",
        "{why} config.trl.py and the other configurations next to the report train it and write "
        "the adapter to out.",
        "probe outputs {base} out --eval {eval} -o outputs.jsonl",
        _LOSS_RULES,
    ),
    AdviceRule(
        "sweep",
        _find_swept_rank,
        "{action}",
        "On {set}, {why}.",
        "{then}",
        ("keep the adapter", "tuned"),
    ),
    AdviceRule(
        "close the gap",
        _find_gap,
        "Do not ship {adapter} yet: train at r={ranks} and compare the held-out loss",
        "It is the best of {count}, {gap} nats from the full fine-tune on {set}, and keeps {kept} "
        "of its gain.",
        "probe sweep {base} --data {data} --eval {eval} --ranks {ranks} -o sweep.jsonl",
        (*_LOSS_RULES, "tuned", "sweep"),
    ),
    AdviceRule(
        "scale",
        _find_scale,
        "Multiply lora_alpha of {adapters} by {by} and measure again, before changing any rank",
        "In {count} matrices the direction is right and the scale is not. {hint}",
        "residual {base} {tuned} {adapters}",
        _LOSS_RULES,
    ),
    AdviceRule(
        "sufficient rank",
        _find_sufficient_rank,
        "Extract the update at r={rank}, without training",
        "{why}",
        "extract {base} {tuned} --rank {rank} {unfactored} -o adapter/",
        _LOSS_RULES,
    ),
    AdviceRule(
        "measure the loss",
        _find_unknown_loss,
        "Measure the held-out loss of {subject} on {eval} before {before}",
        "{why}",
        "probe {probe} {base} {tuned} {adapters} --eval {eval} -o {file}.jsonl",
        ("keep the adapter",),
    ),
    AdviceRule(
        "raise the rank",
        _find_small_rank,
        "{action}",
        "Rank {rank} can hold less than half of the energy in {short} of {count} matrices, at "
        "worst {worst}: {named}. " + ENERGY,
        "{then}",
        (*_LOSS_RULES, "tuned", "sweep", "sufficient rank"),
    ),
)
