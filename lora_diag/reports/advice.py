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
from statistics import median
from typing import Any

from lora_diag.catalog import feature_of
from lora_diag.diagnostics.residual.record import Residual
from lora_diag.errors import flag
from lora_diag.probes.outputs.show import SUFFICIENT_SHARE, Contest, find_gain, is_tuned_worse
from lora_diag.probes.sweep import SweepOptions
from lora_diag.probes.sweep.show import state_verdict
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
class Rule:
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
class Step:
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


def advice(evidence: Evidence) -> list[Step]:
    """Return the steps supported by the records, for each full fine-tune in the order of ``RULES``.

    Unfinished runs support no step. A step that applies to several full fine-tunes is listed once
    and names them all.
    """
    groups = evidence.finished().groups()
    by_command: dict[tuple[str, ...], Step] = {}
    for group in groups:
        about = (group.path_of("tuned"),) if len(groups) > 1 else ()
        for step in _apply_rules(group):
            earlier = by_command.get(step.argv, step)
            by_command[step.argv] = replace(earlier, about=(*earlier.about, *about))
    # A step that applies to all applies to the page.
    return [
        replace(step, about=()) if len(step.about) == len(groups) else step
        for step in by_command.values()
    ]


_PLACEHOLDERS = {"base": "", "tuned": "", "eval": "HELD_OUT_TEXT", "data": "TRAIN_TEXT"}


def _apply_rules(evidence: Evidence) -> Iterator[Step]:
    """Yield the steps of the rules that apply to one full fine-tune."""
    applied: set[str] = set()
    short = short_names((path for source in evidence.sources for path in source.paths()), safe)
    paths = {
        role: evidence.path_of(role, placeholder) for role, placeholder in _PLACEHOLDERS.items()
    }
    for rule in RULES:
        if applied & set(rule.unless) or (values := rule.find(evidence)) is None:
            continue
        applied.add(rule.name)
        facts: Facts = {**paths, **values}
        texts = {
            name: _join(value if isinstance(value, tuple) else [value], short)
            for name, value in facts.items()
        }
        do, because = rule.do.format_map(texts), " ".join(rule.because.format_map(texts).split())
        argv = ("loradiag", *_fill_command(rule.command, facts))
        yield Step(rule.name, do, because, argv, facts)


def _fill_command(template: str, facts: Facts) -> Iterator[str]:
    """Yield the words of a command: several for a tuple of text, one with commas for a tuple of
    numbers.
    """
    for word in template.split():
        value = facts.get(word[1:-1])
        if not (word.startswith("{") and isinstance(value, tuple)):
            yield word.format_map(facts)
        elif value and not isinstance(value[0], str):
            yield ",".join(map(_format, value))
        else:
            yield from value


def _join(values: Sequence[Any], short: Mapping[str, str] | None = None) -> str:
    """Return values as part of a sentence: paths shortened to what differs, and many counted.

    >>> _join(["a"]), _join([4, 8, 16]), _join(["runs/a", "b"], {"runs/a": "a"})
    ('a', '4, 8 and 16', 'a and b')
    >>> _join("abcdefg")
    'a, b, c and 4 more'
    """
    words = [
        (short or {}).get(value, value) if isinstance(value, str) else _format(value)
        for value in values
    ]
    if len(words) > _LISTED:
        words = [*words[:3], f"{len(words) - 3} more"]
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _format(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _find_worse_finetune(evidence: Evidence) -> Facts | None:
    records = [
        record for _, of_run in evidence.losses("outputs", "truncation") for record in of_run
    ]
    bases = [
        r
        for r in records
        if r.subject == "base" and r.layer is None and r.set in main_sets(records)
    ]
    if not bases or not all(map(is_tuned_worse, bases)):
        return None
    worst = min(bases, key=lambda record: record.gap or 0.0)
    return {"set": worst.set, "gap": format_gap(worst)}


def _find_equal_adapter(evidence: Evidence) -> Facts | None:
    equal = sorted(
        (c for c in evidence.contests if c.outcome == "as good"),
        key=lambda contest: contest.worst.nats,
    )
    if not equal:
        return None
    best, *others = equal
    others_sentence = (
        f"The same holds for {_join([c.name for c in others])}: use the smallest." if others else ""
    )
    return {"adapter": best.name, "others": others_sentence, **_facts_of(best)}


def _facts_of(contest: Contest) -> Facts:
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
        if feature is not None and feature.advice:
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
        lowest_rate = min(
            record.lr for _, records in evidence.losses("sweep") for record in records if record.lr
        )
        rates = tuple(float(f"{lowest_rate / factor:.2g}") for factor in (100, 10, 3))
        action = f"Change the training before the rank: try learning rates {_join(rates)}"
        then = (*_sweep_again(source, typed | {"lr": rates}), "-o", "sweep-2.jsonl")
        return facts | {"rates": rates, "action": action, "then": then}
    higher = (2 * chosen.rank, 4 * chosen.rank) if chosen.rank == swept.ranks[-1] else ()
    action = f"Train at r={chosen.rank} with learning rate {chosen.lr:g}"
    action += f"; also sweep r={_join(higher)}, the loss still decreases" if higher else ""
    action += (
        f"; {verdict.needed_seeds} seeds would confirm it"
        if verdict.needed_seeds is not None
        else ""
    )
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
    size_options = (
        "--params",
        str(facts["params"]),
        "--sweep",
        source.name,
        "-o",
        "adapter_config.json",
    )
    return facts | {"then": ("allocate", evidence.update.name, *size_options)}


def _sweep_again(source: Source, options: Mapping[str, Any]) -> Iterator[str]:
    """Yield the words of a sweep with the inputs and the options of an earlier one."""
    declared, run = list_options(SweepOptions), source.results.run
    # Options that the run record has in another form.
    limits = [
        item.tensors for item in run.inputs if item.role in {"eval", "shifted"} and item.notes
    ]
    kinds = {kind.lower(): kind in run.settings.get("kind", "") for kind in ("DoRA", "rsLoRA")}
    full = bool(run.settings.get("full_lr"))
    options = {**options, **kinds, "full": full, "max_sequences": max(limits, default=None)}
    yield from (
        "probe",
        "sweep",
        *source.paths("base"),
        "--data",
        *(source.paths("data") or ["TRAIN_TEXT"])[:1],
    )
    for role in ("eval", "shifted"):
        yield from (word for path in source.paths(role) for word in (f"--{role}", path))
    for name, value in options.items():
        if name in declared and value and value != "all-linear":
            yield flag(name)
            if value is not True:
                yield (
                    ",".join(map(_format, value))
                    if isinstance(value, tuple | list)
                    else _format(value)
                )


def _find_gap(evidence: Evidence) -> Facts | None:
    """Return the gap of the best adapter if all are worse than the full fine-tune; None otherwise.

    None also if an adapter of a higher rank is worse than one of a lower rank.
    """
    contests = evidence.contests
    if (
        not contests
        or any(contest.outcome != "worse" for contest in contests)
        or evidence.higher_rank_is_worse
    ):
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
    adapted = [
        record for records in evidence.compared.values() for record in records if record.rank
    ]
    if 2 * sum(record.limited_by == "direction" for record in adapted) > len(adapted):
        return None
    capacities = evidence.capacities
    too_small = sorted(
        (item for item in capacities if item.kept < MIN_ENERGY), key=lambda item: item.kept
    )
    if not too_small or evidence.higher_rank_is_worse:
        return None
    facts: Facts = {
        "rank": span(item.rank for item in too_small),
        "short": len(too_small),
        "count": len(capacities),
        "worst": percent(too_small[0].kept),
        "layers": tuple(item.layer for item in too_small),
        "named": list_names([item.layer for item in too_small]),
    }
    if evidence.update is None:
        measure = (
            "spectrum",
            evidence.path_of("base"),
            evidence.path_of("tuned"),
            "-o",
            "spectrum.jsonl",
        )
        return facts | {"action": "Measure which rank the update needs", "then": measure}
    facts["min_rank"] = min(item.rank for item in capacities)
    size_options = (
        "--energy",
        f"{MIN_ENERGY:g}",
        "--min-rank",
        str(facts["min_rank"]),
        "-o",
        "adapter_config.json",
    )
    then = ("allocate", evidence.update.name, *size_options)
    condition = (
        ""
        if any(contest.outcome == "worse" for contest in evidence.contests)
        else ", if the loss needs it"
    )
    return facts | {"action": f"Raise the rank where it is too small{condition}", "then": then}


def _find_sufficient_rank(evidence: Evidence) -> Facts | None:
    """Return the smallest rank of the update that keeps its gain; without losses, its energy in
    every matrix.

    None if no measured rank does, or if energy alone cannot decide.
    """
    truncated_rank = 0
    for source, records in evidence.losses("truncation"):
        settings = source.results.run.settings
        if settings.get("layers") or settings.get("exclude"):
            continue
        joint = [
            record for record in records if record.layer is None and record.module_type is None
        ]
        sets = main_sets(joint)
        base_by_set = {record.set: record for record in joint if record.subject == "base"}
        if any(find_gain(base_by_set.get(name)) is None for name in sets):
            continue
        truncated = [
            record for record in joint if record.subject == "truncated" and record.set in sets
        ]
        for rank in sorted({record.rank for record in truncated if record.rank}):
            kept = [record.kept or 0.0 for record in truncated if record.rank == rank]
            if len(kept) < len(sets) or min(kept) < SUFFICIENT_SHARE:
                truncated_rank = max(truncated_rank, rank)
                continue
            kept_by_rest = max(
                (record.kept or 0.0 for record in truncated if record.rank == 0), default=None
            )
            saved = settings.get("untruncated") == "tuned" and kept_by_rest != 0
            alone = "" if kept_by_rest is None else f", which keep {kept_by_rest:.0%} alone"
            others = (
                f" with the norms, biases, embeddings and head of TUNED{alone}" if saved else ""
            )
            return {
                "rank": rank,
                "why": f"r={rank} keeps {min(kept):.0%} of the gain on held-out text{others}.",
                "unfactored": ("--unfactored", "save") if saved else (),
            }
    if (
        evidence.contests
        or evidence.sweep
        or any(item.kept < MIN_ENERGY for item in evidence.capacities)
    ):
        return None
    for rank in COMMON_RANKS[:4]:
        energies = [energy_at(record, rank) or 0.0 for record in evidence.resolved]
        sizeable = [
            record for record in evidence.resolved if min(record.shape) >= SIZEABLE_RATIO * rank
        ]
        is_conclusive = rank > truncated_rank and 0 < len(energies) == len(
            evidence.changed
        ) <= 2 * len(sizeable)
        if is_conclusive and min(energies) >= SUFFICIENT_ENERGY:
            why = (
                f"r={rank} keeps {percent(min(energies))} of the energy in the worst of "
                f"{len(energies)} matrices."
            )
            return {"rank": rank, "why": f"{why} {ENERGY}", "unfactored": ()}
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
        off = [
            r
            for r in scaled
            if (r.cosine or 0.0) >= MIN_COSINE and abs(math.log(_scale(r))) > math.log(MAX_SCALE)
        ]
        if off and 2 * len(off) >= len(scaled):
            factor_by_path[path] = median(map(_scale, off))
            layers += [record.layer for record in off]
            root = math.sqrt(median(record.rank or 1 for record in off))
            if abs(abs(math.log(factor_by_path[path])) - math.log(root)) < 0.05 < math.log(root):
                hint = (
                    "This is √r, the ratio of rsLoRA's α/√r and LoRA's α/r: check which one was "
                    "meant."
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


def _scale(record: Residual) -> float:
    """Return the best scale of an adapter, at least 1e-9, so that it has a logarithm."""
    return max(record.best_scale or 0.0, 1e-9)


def _find_unknown_loss(evidence: Evidence) -> Facts | None:
    """Return the adapters whose losses do not decide; without losses, all with distances, or the
    update alone.
    """
    unknown = tuple(contest.name for contest in evidence.contests if contest.outcome == "not known")
    if unknown:
        state = "; ".join(
            f"{c.name} is {format_gap(c.worst)} nats from the full fine-tune"
            for c in evidence.contests
        )
        facts = {
            "why": f"{state}: too little text to decide.",
            "eval": "MORE_TEXT",
            "file": "outputs-2",
        }
        return facts | {
            "adapters": unknown,
            "subject": unknown,
            "probe": "outputs",
            "before": "relying on distances",
        }
    if any(evidence.losses("outputs", "truncation", "sweep")) or not (
        evidence.changed or evidence.adapters
    ):
        return None
    if not (adapters := tuple(evidence.adapters)):
        facts = {
            "why": "Energies do not show which rank the loss needs.",
            "file": "truncation",
            "probe": "truncation",
        }
        return facts | {
            "adapters": (),
            "subject": "the update at each rank",
            "before": "choosing a rank",
        }
    facts = {
        "why": "Distances in weights do not show which model is better.",
        "file": "outputs",
        "probe": "outputs",
    }
    return facts | {"adapters": adapters, "subject": adapters, "before": "relying on distances"}


_LOSS_RULES = ("fine-tune worse than BASE", "keep the adapter")
RULES = (
    Rule(
        "fine-tune worse than BASE",
        _find_worse_finetune,
        "Do not ship or imitate {tuned}: measure it on other held-out text first",
        "On {set}, BASE is {gap} nats from the full fine-tune: training made the model worse "
        "there.",
        "probe truncation {base} {tuned} --eval OTHER_TEXT --ranks 0 -o truncation-2.jsonl",
    ),
    Rule(
        "keep the adapter",
        _find_equal_adapter,
        "No change: {adapter} does as well as the full fine-tune on held-out text",
        "It is {gap} nats from the full fine-tune on {set} and keeps {kept} of its gain. {others} "
        "Distances in weights do not contradict this.",
        "gate --policy adapter-basic --base {base} --adapter {adapter}",
    ),
    Rule(
        "tuned",
        _find_tuned_configuration,
        "{action}",
        "{why} config.trl.py and the other configurations next to the report train it and write "
        "the adapter to out.",
        "probe outputs {base} out --eval {eval} -o outputs.jsonl",
        _LOSS_RULES,
    ),
    Rule(
        "sweep",
        _find_swept_rank,
        "{action}",
        "On {set}, {why}.",
        "{then}",
        ("keep the adapter", "tuned"),
    ),
    Rule(
        "close the gap",
        _find_gap,
        "Do not ship {adapter} yet: train at r={ranks} and compare the held-out loss",
        "It is the best of {count}, {gap} nats from the full fine-tune on {set}, and keeps {kept} "
        "of its gain.",
        "probe sweep {base} --data {data} --eval {eval} --ranks {ranks} -o sweep.jsonl",
        (*_LOSS_RULES, "tuned", "sweep"),
    ),
    Rule(
        "scale",
        _find_scale,
        "Multiply lora_alpha of {adapters} by {by} and measure again, before changing any rank",
        "In {count} matrices the direction is right and the scale is not. {hint}",
        "residual {base} {tuned} {adapters}",
        _LOSS_RULES,
    ),
    Rule(
        "sufficient rank",
        _find_sufficient_rank,
        "Extract the update at r={rank}, without training",
        "{why}",
        "extract {base} {tuned} --rank {rank} {unfactored} -o adapter/",
        _LOSS_RULES,
    ),
    Rule(
        "measure the loss",
        _find_unknown_loss,
        "Measure the held-out loss of {subject} on {eval} before {before}",
        "{why}",
        "probe {probe} {base} {tuned} {adapters} --eval {eval} -o {file}.jsonl",
        ("keep the adapter",),
    ),
    Rule(
        "raise the rank",
        _find_small_rank,
        "{action}",
        "Rank {rank} can hold less than half of the energy in {short} of {count} matrices, at "
        "worst {worst}: {named}. " + ENERGY,
        "{then}",
        (*_LOSS_RULES, "tuned", "sweep", "sufficient rank"),
    ),
)
