"""``portability``: the ΔW that each serving program applies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from lora_diag.adapters import Adapter, is_adapter, open_adapter
from lora_diag.adapters.contents import Contents, contents_of
from lora_diag.checkpoints import Checkpoint, as_path, locate, open_checkpoint
from lora_diag.deltas import Pairing, Unpaired, selector
from lora_diag.diagnostics.portability.consumers import CONSUMERS
from lora_diag.diagnostics.portability.measure import Judged, Name, PortabilitySettings, judge, size
from lora_diag.diagnostics.portability.options import PortabilityOptions
from lora_diag.diagnostics.portability.record import Portability
from lora_diag.diagnostics.portability.rules import Consumer, Outcome, Rule, largest_rank
from lora_diag.errors import InputError, NothingComparedError, UsageError
from lora_diag.records import Results
from lora_diag.running.inputs import describe, describe_adapter
from lora_diag.running.layers import LayerRun
from lora_diag.running.measuring import record_unpaired
from lora_diag.running.options import show_options

Chosen = dict[Name, tuple[Consumer, Rule]]


@show_options
def portability(
    adapter: Path | str,
    base: Path | str | None = None,
    **options: Unpack[PortabilityOptions],
) -> Results[Portability]:
    r"""Determine the ΔW that each program which loads an adapter applies, and its distance from the intended one.

    Nothing is loaded by those programs: their rules, as read in their sources, are applied to the adapter's file.
    ε = ‖ΔW' − ΔW‖_F / ‖ΔW‖_F; where only the scale s' differs from s, ε = |s'/s − 1| and ΔW is never formed.

    Args:
        adapter: The adapter.
        base: The checkpoint it was trained on: for names of weights, and for DoRA.
        consumers: Programs, such as ``vllm``, or a version of one, such as ``vllm==0.31``; by default those that read
            files of this layout.
        require: Programs that must apply the intended ΔW, in the same form; they are also judged.
        intended: The program whose ΔW is intended; by default what PEFT, or the format's own rule, makes of the file.
        max_lora_rank: The maximum rank set in servers (``--max-lora-rank``); by default as large as it
            takes.
        **options: ``PortabilityOptions``.

    Returns:
        One record for each weight and program.

    Raises:
        UsageError: An option is invalid, or there is no rule for a program or its version.
        InputError: An input cannot be read, or the adapter does not fit ``base``.
        NothingComparedError: No weight is selected.

    Example:
        >>> adapter, programs = "sample_checkpoints/lora_r4", ["peft", "llamacpp"]
        >>> results = portability(adapter, consumers=programs, layers="0.*q_proj")
        >>> [(record.consumer, record.status, record.scale) for record in results]
        [('peft', 'exact', 2.0), ('llamacpp', 'exact', 2.0)]
    """
    run = LayerRun("portability", options, PortabilityOptions)
    consumers, require = run.options["consumers"], run.options["require"]
    intended, max_lora_rank = run.options["intended"], run.options["max_lora_rank"]
    path = as_path(adapter)
    if not is_adapter(locate(path)):
        raise UsageError(f"{adapter}: not an adapter; the order is: loradiag portability ADAPTER [BASE]")
    if base is not None and is_adapter(locate(base)):
        raise UsageError(f"{base}: an adapter, not a base; the order is: loradiag portability ADAPTER [BASE]")
    opened = open_adapter(locate(path), run.stated_alpha)
    checkpoint = open_checkpoint(as_path(base)) if base is not None else None
    contents = contents_of(opened, checkpoint)
    chosen = choose([*consumers, *require], contents.form)
    selected = selector(run.options["layers"], run.options["exclude"])
    pairing, notes = _pair(opened, checkpoint, run.options["allow_unmatched"])
    tasks = [task for task in judged(contents, chosen, intended, max_lora_rank, pairing) if selected(task.layer)]
    if not tasks:
        raise NothingComparedError(f"{adapter}: no weight of the adapter is selected; change --layers and --exclude")
    verify = run.options["verify"]
    described = describe_adapter(opened, path, checkpoint, pairing, notes, verify)
    missing = [item for item in pairing.unpaired if item.reason == "not_in_base" and selected(item.layer)]
    return run.over(
        tasks,
        judge,
        size,
        PortabilitySettings(),
        lambda layout, _, __: record_unpaired(Pairing((), tuple(missing)), layout, run.where.here),
        (*((describe("base", checkpoint, verify=verify),) if checkpoint is not None else ()), described),
        {
            "consumers": [f"{name}=={version}" for name, version in chosen],
            "require": [f"{name}=={version}" for name, version in choose(require, contents.form)] if require else [],
            "intended": intended,
            "max_lora_rank": max_lora_rank,
            "ranks_to_set": _find_required_options(chosen, contents, max_lora_rank),
            "newer": [f"{name}=={version}" for name, version in chosen if chosen[name, version][0].is_newer(version)],
        },
        recorded=("layers", "exclude"),
    )


def choose(names: Sequence[str], form: str) -> Chosen:
    """Return the named consumers, each with the rule of its version.

    Args:
        names: Names, with or without a version; empty for those that read files of this layout.
        form: The layout of the adapter's files.

    Raises:
        UsageError: A consumer is unknown, or has no rule for the version.
    """
    named = names or [name for name, consumer in CONSUMERS.items() if form in consumer.forms]
    chosen: Chosen = {}
    for word in named:
        name, _, version = word.partition("==")
        name = name.strip().replace(".", "").replace("-", "").lower()
        consumer = CONSUMERS.get(name)
        if consumer is None:
            raise UsageError(f"--consumers {word}: unknown program; give one of {', '.join(CONSUMERS)}")
        rule = consumer.rule(version.strip())
        chosen[name, version.strip() or consumer.newest] = consumer, rule
    return chosen


def judged(
    contents: Contents,
    chosen: Chosen,
    intended: str | None = None,
    max_lora_rank: int | None = None,
    pairing: Pairing | None = None,
) -> list[Judged]:
    """Return the treatment of every weight by every consumer.

    Raises:
        UsageError: The consumer that defines the intended ΔW refuses the adapter.
    """
    reference: Rule | None = None
    if intended is not None:
        ((name, (consumer, reference)),) = choose([intended], contents.form).items()
        if reason := refusal(consumer, reference, contents, max_lora_rank):
            raise UsageError(f"--intended {intended}: {name[0]} refuses this adapter: {reason}")
    refusals = {name: refusal(consumer, rule, contents, max_lora_rank) for name, (consumer, rule) in chosen.items()}
    unjudged = {name: rule.unjudged(contents) for name, (_, rule) in chosen.items()}
    deltas = {delta.layer: delta for delta in (pairing.deltas if pairing is not None else ())}
    tasks = []
    for item in contents.items:
        outcomes: dict[Name, Outcome | str] = {
            name: refusals[name] or replace(rule.applies(contents, item), unjudged=unjudged[name])
            for name, (_, rule) in chosen.items()
        }
        scale = item.scale if reference is None else reference.applies(contents, item).scale
        tasks.append(Judged(item, outcomes, scale, deltas.get(item.layer)))
    return tasks


def refusal(consumer: Consumer, rule: Rule, contents: Contents, max_lora_rank: int | None = None) -> str:
    """Return the reason for which a consumer does not load an adapter; empty if it does."""
    if contents.form not in consumer.forms:
        return f"it reads files of {' and '.join(sorted(consumer.forms))}, and this one is of {contents.form}"
    if contents.form == "peft" and not contents.config:
        return "adapter_config.json is missing or gives no lora_alpha; --fix writes one"
    rank = largest_rank(contents)
    limit = max_lora_rank if max_lora_rank is not None and consumer.rank_option else consumer.largest_rank
    if limit is not None and rank > limit:
        return f"rank {rank} is above {consumer.rank_option} {limit}"
    return rule.refuses(contents)


def _find_required_options(chosen: Chosen, contents: Contents, max_lora_rank: int | None) -> Mapping[str, str]:
    """Return the option with which a server must be started for this adapter, by consumer."""
    if max_lora_rank is not None:
        return {}
    needed = {consumer: consumer.rank_needed(contents) for consumer, _ in chosen.values()}
    return {consumer.name: f"{consumer.rank_option} {rank}" for consumer, rank in needed.items() if rank is not None}


def _pair(adapter: Adapter, base: Checkpoint | None, allow_unmatched: bool) -> tuple[Pairing, tuple[str, ...]]:
    """Return the ΔW of the adapter, and notes; no ΔW if BASE is needed and not given."""
    try:
        return adapter.pair(base, allow_unmatched=allow_unmatched)
    except (InputError, NothingComparedError):
        if base is not None:
            raise
        needs = [update.layer for update in adapter.reading.updates if update.needs_weight]
        unpaired = tuple(Unpaired(layer, (), "needs_base", "BASE is needed") for layer in needs)
        return Pairing((), unpaired), adapter.notes
