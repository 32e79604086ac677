"""Measurement of ``portability``: the ΔW that each serving program applies to an adapter, and its
error.

The treatment of each adapter feature by each consumer and version is computed from the rules, for
tables; the records of a weight have the relative error of the applied ΔW. With ``--fix`` an adapter
that every consumer scales alike is written and judged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from lora_diag.adapters import Adapter, locate, open_adapter, open_input
from lora_diag.adapters.contents import Contents, Item, Part, read_contents
from lora_diag.adapters.portable import write_portable
from lora_diag.adapters.source import StatedAlpha, get_stated_alpha
from lora_diag.adapters.updates import UpdateSite
from lora_diag.deltas import Delta, DenseDelta, Pairing, Unpaired, drop_base, selector
from lora_diag.diagnostics.portability import PortabilityOptions
from lora_diag.diagnostics.portability.consumers import (
    CONSUMERS,
    Consumer,
    ConsumerRule,
    Outcome,
    find_refusal,
    join_reasons,
)
from lora_diag.diagnostics.portability.record import (
    AS_INTENDED,
    NONLINEAR_PARTS,
    Portability,
    Status,
)
from lora_diag.diagnostics.portability.show import describe_treatment
from lora_diag.errors import Given, InputError, NothingComparedError, UsageError
from lora_diag.layers.change import PRODUCT_OVERFLOW, load_change
from lora_diag.layers.metric import fro_of
from lora_diag.layers.task import LayerSettings, not_finite
from lora_diag.linalg.devices import resolve_device
from lora_diag.linalg.distance import frobenius_distance
from lora_diag.records import LeftOut, Results
from lora_diag.rendering.tables import Column, Grid
from lora_diag.running.inputs import describe, describe_adapter
from lora_diag.running.layers import LayerRun
from lora_diag.running.options import show_options
from lora_diag.storage import Checkpoint

if TYPE_CHECKING:
    from lora_diag.linalg.distance import Matrix


# Scales that differ by less than this are equal, computed in another order: α/√r and √(α²/r).
SAME = 1e-9

# Consumer and version.
Name = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Judged:
    """A weight that an adapter changes, to be judged.

    Args:
        item: The contents of the adapter's file for the weight.
        outcomes: The treatment of the weight by each consumer.
        intended: The intended s; None without factors, 0 if the program whose ΔW is intended drops
            the weight.
        delta: ΔW; None if it is not known, such as without weights, or where it needs a BASE and
            none is given.
    """

    item: Item
    outcomes: Mapping[Name, Outcome]
    intended: float | None
    delta: Delta | None = None

    @property
    def layer(self) -> str:
        """The weight's name."""
        return self.item.layer

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``; ``(1, n)`` for a vector."""
        if self.delta is not None:
            return self.delta.shape
        shape = self.item.shape or (0,)
        return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, shape[0])


def judge_portability(task: Judged, settings: LayerSettings) -> tuple[Portability | LeftOut, ...]:
    """Return the record of every consumer; one ``left_out`` record if ΔW is not finite or its norm
    overflows.

    Where only the scale differs, ε = ‖s'BA − sBA‖/‖sBA‖ = |s'/s − 1|, independent of B and A; ‖sBA‖
    comes from QR of the factors (``decompose_factored``). For DoRA and for initialisations that
    changed the base, s'BA is compared with ΔW itself.
    """
    fro: float | None = None
    update: Matrix | None = None
    if task.delta is not None:
        change = load_change(
            drop_base(task.delta), resolve_device("cpu"), keep=task.item.part in NONLINEAR_PARTS
        )
        if change.non_finite is not None:
            return (not_finite(task.delta, change.non_finite),)
        fro = fro_of(change)
        if not math.isfinite(fro):
            return (not_finite(task.delta, PRODUCT_OVERFLOW),)
        update = change.matrix if change.factors is None else change.factors
    return tuple(
        _judge(task, name, outcome, fro, update) for name, outcome in task.outcomes.items()
    )


def _judge(
    task: Judged, name: Name, outcome: Outcome, fro: float | None, update: Matrix | None
) -> Portability:
    """Return the record of one consumer, given ‖ΔW‖_F and ΔW; None where they are not known."""
    item = task.item
    scale = outcome.scale
    intended = task.intended
    is_zero = fro == 0.0
    status: Status = "exact"
    epsilon = None if is_zero else 0.0
    why = ""
    if outcome.does == "dropped" and intended == 0.0:
        scale = epsilon = None
    elif outcome.does in {"refused", "dropped"}:
        status = outcome.does
        scale = None
        epsilon = None if is_zero or status == "refused" else 1.0
        why = outcome.why
    elif outcome.does == "full":
        status = "full"
        scale = None
    elif item.part in NONLINEAR_PARTS and outcome.does == "applied":
        status = "wrong"
        epsilon = _measure_distance(task, scale, fro, update)
        omission = "what the initialisation took from the base"
        if item.part == "dora":
            omission = "the magnitudes of DoRA"
        why = join_reasons(f"B·A alone is added, without {omission}", outcome.why)
    elif scale is None or intended is None or (is_zero and item.scale != 0):
        pass
    elif intended == 0.0 != scale:
        status = "wrong"
        epsilon = None
        why = join_reasons("the intended program drops this weight", outcome.why)
    elif not math.isclose(scale, intended, rel_tol=SAME):
        status = "wrong"
        epsilon = abs(scale / intended - 1)
        why = outcome.why
    if outcome.unjudged and status in AS_INTENDED:
        status = "unknown"
        epsilon = None
        why = outcome.unjudged
    return Portability(
        layer=task.layer,
        consumer=name[0],
        version=name[1],
        status=status,
        part=item.part,
        rank=item.rank,
        scale=scale,
        intended=intended,
        epsilon=epsilon,
        fro=fro,
        why=why,
    )


def _measure_distance(
    task: Judged, scale: float | None, fro: float | None, update: Matrix | None
) -> float | None:
    """Return ‖s'BA − ΔW‖_F / ‖ΔW‖_F for the applied s'; None if ΔW is 0, or ΔW, s' or the adapter's
    s is unknown.
    """
    item = task.item
    delta = task.delta
    if delta is None or update is None or not fro:
        return None
    if item.load is None or scale is None or not item.scale:
        return None
    loaded = item.load(UpdateSite(delta.shape))
    assert isinstance(loaded, tuple)
    b, a = loaded
    if (len(b), a.shape[1]) != delta.shape:
        b, a = a.T, b.T
    return frobenius_distance((b * (scale / item.scale), a), update) / fro


def estimate_bytes(task: Judged, settings: LayerSettings) -> int:
    """Estimate the memory of judging a weight in bytes: its factors; of a changed base, or without
    factors, ΔW.
    """
    is_changed = task.item.part in NONLINEAR_PARTS and task.delta is not None
    if is_changed or isinstance(task.delta, DenseDelta):
        return 8 * 4 * math.prod(task.shape)
    return 8 * 3 * (task.item.rank or 64) * sum(task.shape)


# Rounding of s·B to float32 is 2^-24 per entry; a larger error is a fault of the writer.
ROUNDING = 1e-5


def make_portable(
    adapter: Path | str,
    output: Path | str,
    base: Path | str | None = None,
    *,
    form: str | None = None,
    dora_to_lora: bool = False,
    leave_out: bool = False,
    consumers: Sequence[str] = (),
    require: Sequence[str] = (),
    max_lora_rank: int | None = None,
    alpha: float | None = None,
    alpha_is_rank: bool = False,
) -> Results[Portability]:
    r"""Write an adapter that every program scales alike: one rank, zeros where it was lower, α = r,
    s folded into B.

    Args:
        adapter: The adapter.
        output: Folder to write; must not exist.
        base: The checkpoint it was trained on: for updates that depend on it, such as DoRA, for
            names missing from the adapter, and for other layouts.
        form: ``peft``, ``kohya``, ``diffusers``, ``mlx`` or ``gguf``; by default that of the
            adapter.
        dora_to_lora: Write the nearest LoRA of its rank for DoRA, with its error.
        leave_out: Omit tensors that it cannot store (biases, weights in full), instead of raising
            an error.
        consumers: Programs for which the written adapter is judged; by default only those of
            ``require``, or else those that read files of its layout.
        require: Programs that must apply the written adapter; they are also judged. By default
            none.
        max_lora_rank: Largest rank that servers are configured to serve; by default as large as
            each takes.
        alpha: α if the adapter's files have none; by default, the scale is then 1 (PEFT: an error).
        alpha_is_rank: State that α = r if they have none.

    Returns:
        The results of ``portability`` for the written adapter. Their settings name under ``fixed``
            the rank, the dtype,
        the errors ε of truncated factors (also pooled), the largest ε of folded ones, and the
            skipped weights.

    Raises:
        UsageError: ``adapter`` is not an adapter, ``base`` is one, an option is invalid, ``output``
            exists, or there is no rule for a program.
        InputError: An input cannot be read or does not fit ``base``, a portable adapter cannot
            store a tensor, or the folder cannot be written or reads back differently.
        NothingComparedError: No ΔW can be measured against ``base``.

    Example:
        >>> found = make_portable("sample_checkpoints/lora_r4", "portable/")  # doctest: +SKIP
        >>> [(record.consumer, record.status) for record in found]  # doctest: +SKIP
    """
    stated_alpha = get_stated_alpha({"alpha": alpha, "alpha_is_rank": alpha_is_rank})
    opened, checkpoint = _open_inputs(adapter, base, stated_alpha, " --fix -o OUT")
    # Refuses an unknown program before anything is written.
    choose_rules([*consumers, *require], form or opened.form)
    folder = Path(output)
    written = write_portable(opened, folder, checkpoint, form, dora_to_lora, leave_out)
    worst = max(measure_rounding(opened, folder, checkpoint).values(), default=0.0)
    if worst > ROUNDING and written.dtype == "float32":
        raise InputError(
            f"{folder}: reads back with an error of {worst:.1e}; do not use the output, and report "
            "this"
        )
    results = portability(
        base, folder, consumers=consumers, require=require, max_lora_rank=max_lora_rank
    )
    fixed = {
        "rank": written.rank,
        "dtype": written.dtype,
        "rounding": worst,
        "truncated": dict(written.truncated),
        "epsilon": written.epsilon,
        "left_out": dict(written.unsupported),
    }
    run = results.run.model_copy(update={"settings": {**results.run.settings, "fixed": fixed}})
    return replace(results, run=run)


def judge_or_fix(
    base: Path | str | None = None,
    adapter: Path | str | None = None,
    *,
    fix: bool = False,
    format: str | None = None,
    dora_to_lora: bool = False,
    leave_out: bool = False,
    rules: bool = False,
    **options: Unpack[PortabilityOptions],
) -> Results[Portability] | list[Grid]:
    """Judge an adapter, write a portable one, or return the rules of all programs, as the options
    say.

    Raises:
        UsageError: No adapter is given, options of ``fix`` are given without it, an option that
            ``fix`` needs is missing, one that it excludes is given; or as the called function.
    """
    if rules:
        return rules_grids()
    base, adapter = _order_inputs(base, adapter)
    if not fix:
        needs_fix = {"format": format, "dora_to_lora": dora_to_lora, "leave_out": leave_out}
        if option := next((name for name, value in needs_fix.items() if value), None):
            problem = "needs $fix, and $output with the folder to write"
            raise UsageError(Given(option), problem, "add both")
        return portability(base, adapter, **options)
    output, on_record = options.get("output"), options.get("on_record")
    if output is None:
        raise UsageError(Given("fix"), "no output folder", "give it with $output")
    if any(options.get(name) for name in ("resume", "overwrite", "layers", "exclude", "intended")):
        raise UsageError(
            Given("fix"),
            "writes the whole adapter to a new folder",
            "remove $resume, $overwrite, $layers, $exclude and $intended",
        )
    kept = {"consumers", "require", "max_lora_rank", "alpha", "alpha_is_rank"}
    judging: dict[str, Any] = {name: value for name, value in options.items() if name in kept}
    results = make_portable(
        adapter,
        output,
        base,
        form=format,
        dora_to_lora=dora_to_lora,
        leave_out=leave_out,
        **judging,
    )
    if on_record is not None:
        for record in results.records():
            on_record(record)
    return results


def measure_rounding(before: Adapter, after: Path, base: Checkpoint | None) -> dict[str, float]:
    """Return ‖ΔW' − ΔW‖_F / ‖ΔW‖_F of the written adapter by weight, for plain factors; 0 if ΔW is
    zero.

    The updates are compared in factored form. Without BASE, weights that another layout renames are
    omitted.

    Raises:
        InputError: A file could not be read, or a written weight is not one of the original
            adapter.
    """
    originals = {item.layer: item for item in read_contents(before, base).items}
    errors = {}
    opened = open_adapter(after)
    for item in read_contents(opened, base).items:
        counterpart = originals.get(item.layer)
        if counterpart is None:
            # Two layouts name weights differently, and only BASE relates the names.
            if base is None and opened.form != before.form:
                continue
            raise InputError(
                f"{after}: {item.layer} is not a weight of {before.path}; do not use the output, "
                "and report this"
            )
        if counterpart.load is None or item.load is None or counterpart.part in NONLINEAR_PARTS:
            continue
        written = item.load(UpdateSite(item.shape))
        original = counterpart.load(UpdateSite(counterpart.shape))
        assert isinstance(written, tuple)
        assert isinstance(original, tuple)
        norm = frobenius_distance(original, (original[0] * 0, original[1]))
        errors[item.layer] = frobenius_distance(written, original) / norm if norm else 0.0
    return errors


Chosen = dict[Name, tuple[Consumer, ConsumerRule]]


@show_options
def portability(
    base: Path | str | None = None,
    adapter: Path | str | None = None,
    **options: Unpack[PortabilityOptions],
) -> Results[Portability]:
    r"""Determine the ΔW that each program which loads an adapter applies, and its distance from the
    intended one.

    Nothing is loaded by those programs: their rules, as read in their sources, are applied to the
    adapter's file. ε = ‖ΔW' − ΔW‖_F / ‖ΔW‖_F; where only the scale s' differs from s, ε = |s'/s −
    1| and ΔW is never formed.

    Args:
        base: The checkpoint the adapter was trained on: for names of weights, and for updates that
            depend on it, such as DoRA; or an adapter to be judged alone.
        adapter: The adapter; None if ``base`` is it.
        consumers: Programs, such as ``vllm``, or a version of one, such as ``vllm==0.31``; by
            default only those of ``require``, or else those that read files of this layout.
        require: Programs that must apply the intended ΔW, in the same form; they are also judged.
            By default none.
        intended: The program whose ΔW is intended; by default what PEFT, or the format's own rule,
            makes of the file.
        max_lora_rank: The maximum rank set in servers (``--max-lora-rank``); by default as large as
            each takes.
        **options: ``PortabilityOptions``.

    Returns:
        One record for each selected weight of the adapter and each program. Weights that are not
            finite, or that
        ``base`` does not have, are in ``left_out``.

    Raises:
        UsageError: An option is invalid, no adapter is given, ``base`` is a second one, there is
            no rule for a program or its version, the ``intended`` program refuses the adapter, or
            ``output`` may be neither replaced nor resumed.
        InputError: An input cannot be read, the adapter does not fit ``base``, or the results file
            cannot be written.
        NothingComparedError: No weight is selected, or no ΔW can be measured against ``base``.

    Example:
        >>> adapter, programs = "sample_checkpoints/lora_r4", ["peft", "llamacpp"]
        >>> results = portability(adapter, consumers=programs, layers="0.*q_proj")
        >>> [(record.consumer, record.status, record.scale) for record in results]
        [('peft', 'exact', 2.0), ('llamacpp', 'exact', 2.0)]
    """
    run = LayerRun("portability", options, PortabilityOptions)
    consumers, require = run.options["consumers"], run.options["require"]
    intended, max_lora_rank = run.options["intended"], run.options["max_lora_rank"]
    base, adapter = _order_inputs(base, adapter)
    opened, checkpoint = _open_inputs(adapter, base, run.stated_alpha)
    contents = read_contents(opened, checkpoint)
    chosen = choose_rules([*consumers, *require], contents.form)
    selected = selector(run.options["layers"], run.options["exclude"])
    pairing, notes = _pair(opened, checkpoint, run.options["allow_unmatched"])
    tasks = [
        task
        for task in make_tasks(contents, chosen, intended, max_lora_rank, pairing)
        if selected(task.layer)
    ]
    if not tasks:
        raise NothingComparedError(
            adapter, "no weight of the adapter is selected", "change $layers and $exclude"
        )
    verify = run.options["verify"]
    adapter_input = describe_adapter(opened, checkpoint, pairing, notes, verify)
    inputs = [adapter_input]
    if checkpoint is not None:
        inputs.insert(0, describe("base", checkpoint, verify=verify))
    missing = [
        item for item in pairing.unpaired if item.reason == "not_in_base" and selected(item.layer)
    ]
    required = choose_rules(require, contents.form) if require else {}
    newer = [name for name, (consumer, _) in chosen.items() if consumer.is_newer(name[1])]
    return run.over(
        tasks,
        judge_portability,
        estimate_bytes,
        LayerSettings(),
        Pairing((), tuple(missing)),
        tuple(inputs),
        {
            "consumers": _join_names(chosen),
            "require": _join_names(required),
            "intended": intended,
            "max_lora_rank": max_lora_rank,
            "ranks_to_set": _find_required_options(chosen, contents, max_lora_rank),
            "newer": _join_names(newer),
        },
        recorded=("layers", "exclude"),
    )


def _join_names(names: Iterable[Name]) -> list[str]:
    """Return names with their versions, such as ``vllm==0.33.0``."""
    return ["==".join(name) for name in names]


def choose_rules(names: Sequence[str], form: str) -> Chosen:
    """Return the named consumers, each with the rule of its version, by name and version.

    Args:
        names: Names, with or without a version; empty for those that read files of this layout.
        form: The layout of the adapter's files.

    Raises:
        UsageError: A consumer is unknown, or has no rule for the version.
    """
    requests = names or [name for name, consumer in CONSUMERS.items() if form in consumer.forms]
    chosen: Chosen = {}
    for request in requests:
        name, _, version = (part.strip() for part in request.partition("=="))
        name = name.replace(".", "").replace("-", "").lower()
        consumer = CONSUMERS.get(name)
        if consumer is None:
            raise UsageError(
                Given("consumers", request),
                "unknown program",
                f"give one of {', '.join(CONSUMERS)}",
            )
        chosen[name, version or consumer.newest] = consumer, consumer.find_rule(version)
    return chosen


def make_tasks(
    contents: Contents,
    chosen: Chosen,
    intended: str | None = None,
    max_lora_rank: int | None = None,
    pairing: Pairing | None = None,
) -> list[Judged]:
    """Return one task per weight, with its treatment by every consumer.

    Args:
        contents: The contents of the adapter's file.
        chosen: The consumers and their rules.
        intended: The consumer whose ΔW is intended; None for the scales as read by this package.
        max_lora_rank: The maximum rank set in servers; None for as large as each takes.
        pairing: The ΔW of the adapter; None without weights.

    Raises:
        UsageError: The consumer that defines the intended ΔW is unknown, has no rule for its
            version, or refuses the adapter.
    """
    reference: ConsumerRule | None = None
    if intended is not None:
        ((name, (consumer, reference)),) = choose_rules([intended], contents.form).items()
        if reason := find_refusal(consumer, reference, contents, max_lora_rank):
            raise UsageError(
                Given("intended", intended), f"{name[0]} refuses this adapter: {reason}"
            )
    refused, unjudged = dict[Name, Outcome](), dict[Name, str]()
    for chosen_name, (consumer, rule) in chosen.items():
        unjudged[chosen_name] = rule.unjudged(contents)
        if reason := find_refusal(consumer, rule, contents, max_lora_rank):
            refused[chosen_name] = Outcome("refused", why=reason)
    deltas = {}
    if pairing is not None:
        deltas = {delta.layer: delta for delta in pairing.deltas}
    tasks = []
    for item in contents.items:
        outcomes = dict[Name, Outcome]()
        for name, (_, rule) in chosen.items():
            outcome = refused.get(name) or rule.applies(contents, item)
            outcomes[name] = replace(outcome, unjudged=outcome.unjudged or unjudged[name])
        scale = item.scale
        if reference is not None:
            treatment = reference.applies(contents, item)
            scale = 0.0 if treatment.does == "dropped" else treatment.scale
        tasks.append(Judged(item, outcomes, scale, deltas.get(item.layer)))
    return tasks


def _find_required_options(
    chosen: Chosen, contents: Contents, max_lora_rank: int | None
) -> Mapping[str, str]:
    """Return the rank option that a server needs for this adapter, by consumer; empty if
    ``max_lora_rank`` is set.
    """
    if max_lora_rank is not None:
        return {}
    consumers = (consumer for consumer, _ in chosen.values())
    return {
        consumer.name: f"{consumer.rank_option} {rank}"
        for consumer in consumers
        if (rank := consumer.find_rank_to_set(contents)) is not None
    }


def _order_inputs(
    base: Path | str | None, adapter: Path | str | None
) -> tuple[Path | str | None, Path | str]:
    """Return BASE and the adapter; a single path is the adapter.

    Raises:
        UsageError: There is neither.
    """
    if adapter is None:
        base, adapter = None, base
    if adapter is None:
        raise UsageError(
            "portability",
            "no adapter is given",
            "give one, or use $rules for the rules of all programs",
        )
    return base, adapter


def _open_inputs(
    adapter: Path | str, base: Path | str | None, stated_alpha: StatedAlpha, options: str = ""
) -> tuple[Adapter, Checkpoint | None]:
    """Open the adapter, and BASE if it is given.

    Raises:
        UsageError: ``adapter`` is not an adapter, or ``base`` is one.
    """
    order = f"the order is: loradiag portability [BASE] ADAPTER{options}"
    opened = open_input(locate(adapter), stated_alpha)
    if not isinstance(opened, Adapter):
        raise UsageError(f"{adapter}: not an adapter; {order}")
    checkpoint = None if base is None else open_input(locate(base))
    if isinstance(checkpoint, Adapter):
        raise UsageError(f"{base}: an adapter, not a base; {order}")
    return opened, checkpoint


def _pair(
    adapter: Adapter, base: Checkpoint | None, allow_unmatched: bool
) -> tuple[Pairing, tuple[str, ...]]:
    """Return the ΔW of the adapter, and notes; without BASE, no ΔW if not all can be had, as if one
    needs BASE.
    """
    try:
        return adapter.pair(base, allow_unmatched=allow_unmatched)
    except (InputError, NothingComparedError):
        if base is not None:
            raise
        needs = [update.layer for update in adapter.reading.updates if update.needs_weight]
        unpaired = tuple(Unpaired(layer, (), "needs_base", "BASE is needed") for layer in needs)
        return Pairing((), unpaired), adapter.notes


_Q, _V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
_UNET = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1"
_CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}


def _make_item(
    module: str,
    rank: int = 8,
    scale: float = 2.0,
    alpha: float | None = None,
    part: Part = "factors",
) -> Item:
    """Return the item of a module with factors, without weights."""
    return Item(
        f"{module}.weight", module, part, f"{module}.lora_B.weight", rank, scale, alpha, (16, 16)
    )


def _make_peft_contents(
    *extra: Item,
    rank: int = 8,
    scales: tuple[float, float] = (2.0, 2.0),
    part: Part = "factors",
    tied: bool | None = None,
    **config: object,
) -> Contents:
    """Return the contents of a PEFT file of two layers, the first of the given rank, and further
    items.
    """
    items = (
        _make_item(_Q, rank, scales[0], part=part),
        _make_item(_V, 8, scales[1], part=part),
        *extra,
    )
    return Contents("peft", items, {**_CONFIG, **config}, tied=tied)


def _make_kohya_contents(*pairs: tuple[int, float, float | None]) -> Contents:
    """Return the contents of a kohya file with a layer for each rank, scale and α."""
    items = (_make_item(f"lora_unet_block_{n}", *pair) for n, pair in enumerate(pairs))
    return Contents("kohya", tuple(items))


# Feature -> the contents of an adapter with only this feature, and with the intended scales.
FEATURES: dict[str, Contents] = {
    "one rank, one alpha": _make_peft_contents(),
    "rsLoRA": _make_peft_contents(scales=(16 / 8**0.5, 16 / 8**0.5), use_rslora=True),
    "rank_pattern": _make_peft_contents(
        rank=4, scales=(4.0, 2.0), rank_pattern={"layers.0.self_attn.q_proj": 4}
    ),
    "alpha_pattern": _make_peft_contents(
        scales=(4.0, 2.0), alpha_pattern={"layers.0.self_attn.q_proj": 32}
    ),
    "both, alpha = rank": _make_peft_contents(
        rank=4,
        scales=(1.0, 1.0),
        lora_alpha=8,
        rank_pattern={"q_proj": 4},
        alpha_pattern={"q_proj": 4},
    ),
    "anchored pattern (^)": _make_peft_contents(scales=(4.0, 2.0), alpha_pattern={f"^{_Q}": 32}),
    "target_modules is a regex": _make_peft_contents(target_modules=".*(q|v)_proj"),
    "q_proj without v_proj": Contents("peft", (_make_item(_Q),), _CONFIG),
    "embeddings (untied head)": _make_peft_contents(
        _make_item("model.embed_tokens", part="embedding"),
        tied=False,
        target_modules=["q_proj", "v_proj", "embed_tokens"],
    ),
    "target_parameters (experts)": _make_peft_contents(
        _make_item("model.layers.0.mlp.experts.down_proj", part="experts")
    ),
    "DoRA": _make_peft_contents(part="dora", use_dora=True),
    "lora_bias": _make_peft_contents(
        Item(f"{_Q}.bias", _Q, "bias", f"{_Q}.lora_B.bias"), lora_bias=True
    ),
    "modules_to_save": _make_peft_contents(
        Item("lm_head.weight", "lm_head", "value", "lm_head.weight"), modules_to_save=["lm_head"]
    ),
    "PiSSA, not converted": _make_peft_contents(part="residual", init_lora_weights="pissa"),
    "no alpha, unequal ranks": _make_kohya_contents((16, 1.0, None), (4, 1.0, None)),
    "one alpha, unequal ranks": _make_kohya_contents((16, 0.25, 4.0), (4, 1.0, 4.0)),
    "alpha in some modules": _make_kohya_contents((16, 0.25, 4.0), (16, 1.0, None)),
    "unequal alphas, U-Net attention": Contents(
        "kohya",
        tuple(
            _make_item(f"{_UNET}_{leaf}", scale=a / 8, alpha=a)
            for leaf, a in (("to_q", 8.0), ("to_v", 4.0))
        ),
    ),
    "DoRA (dora_scale)": Contents("kohya", (_make_item(f"{_UNET}_to_q", part="dora", alpha=16.0),)),
}


def rules_grids() -> list[Grid]:
    """Return two tables per file layout of ``FEATURES``, of the newest and of older rules, with one
    row per feature.
    """
    grids = []
    for form in dict.fromkeys(contents.form for contents in FEATURES.values()):
        features = {name: contents for name, contents in FEATURES.items() if contents.form == form}
        newest, older = [], []
        for consumer in CONSUMERS.values():
            if form in consumer.forms:
                first, *others = (
                    _make_column(consumer, rule, features.values()) for rule in consumer.rules
                )
                newest.append(first)
                older += others
        rows = tuple(features)
        grids.append(Grid(f"Files of {form}", "feature", rows, tuple(newest)))
        grids.append(Grid(f"Files of {form}, older versions", "feature", rows, tuple(older)))
    return grids


def _make_column(consumer: Consumer, rule: ConsumerRule, features: Iterable[Contents]) -> Column:
    """Return the column of a rule: its treatment of each feature."""
    cells = []
    for contents in features:
        tasks = make_tasks(contents, {(consumer.name, rule.read[-1]): (consumer, rule)})
        judged = (record for task in tasks for record in judge_portability(task, LayerSettings()))
        records = [record for record in judged if isinstance(record, Portability)]
        cells.append(describe_treatment(records) or "-")
    return Column(f"{consumer.title} {rule.versions}".removesuffix(" all"), tuple(cells), "left")
