"""The rules of ``lint``: one function each, in one registry.

A rule takes facts, by the names of its parameters, and yields problems; it is judged if all of them
are known. Its explanation, fix and source are its section of ``explanations/findings.md``, which
``explain`` and the site show.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from statistics import median_low
from typing import NamedTuple

from lora_diag.adapters import Adapter, contents
from lora_diag.adapters.contents import (
    Contents,
    Item,
    Part,
    find_missing_targets,
    find_targeted,
    read_contents,
)
from lora_diag.adapters.patterns import Scaling, find_targets
from lora_diag.adapters.source import Config, ends_of
from lora_diag.adapters.writing_targets import TABLE, MemoryModel, names_in_memory
from lora_diag.decisions.plan.architectures import Matrix, make_matrix, select_text_config
from lora_diag.decisions.plan.measure import DERIVED, apply_capacity_rules
from lora_diag.decisions.plan_merge.record import MAX_ERROR
from lora_diag.decisions.targets import BYTES, STATE, TrainingMemory, why_no_target
from lora_diag.deltas import Pairing, has_tied_head, is_head
from lora_diag.diagnostics.portability.consumers import CONSUMERS, Consumer, find_refusal
from lora_diag.errors import InputError
from lora_diag.linting import moves
from lora_diag.linting.configs import Settings
from lora_diag.linting.record import Severity, StepShare
from lora_diag.records.names import RESIZABLE, module_type_of
from lora_diag.rendering.text import byte_count, count, list_names, number, quantity, small_percent
from lora_diag.storage import Checkpoint
from lora_diag.storage.tensors import FLOAT_DTYPES

# A fraction of moved entries below which most of the loss's gain is lost, and below which steps are
# rounded away in many entries (docs/reference/lint.md).
FEW, HALF = 0.05, 0.5

# Scales, and learning rates at rank 16 and scale 2 that move ΔW alike, beyond those of nearly all
# of 313 published configurations, and the rates of the middle 90% (docs/reference/lint.md).
SCALES, MIN_LORA_RATE, MAX_LORA_RATE = (0.1, 8.0), 1.5e-6, 7e-4
USUAL_RATES = (5e-6, 6e-4)
REFERENCE = 2 * math.sqrt(16)
# Σ lr of a run, at rank 16 and scale 2, that suffices however small the rate is: 7,000 steps of
# MIN_LORA_RATE, which a published run of reinforcement learning makes.
LONG_PATH = 1e-2

SIXTEEN_BITS = ("bfloat16", "float16")
# Optimizers whose steps have about the size of the learning rate in every entry.
UNIT_STEPS = ("adam", "lion", "adopt")
# Tasks for which a head is added to BASE, and the programs that are checked without --consumers.
TASKS_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
SERVERS = ("vllm", "sglang", "llamacpp")


class Problem(NamedTuple):
    """What a rule found: the setting that causes it, numbers and names, and a severity other than
    that of the rule.
    """

    key: str
    evidence: str
    severity: Severity | None = None


@dataclass(frozen=True)
class Facts:
    """What the rules read; a fact that is not known is None.

    Args:
        settings: The configuration.
        base: BASE; None without one.
        adapter: A saved adapter; None without one.
        pairing: Its ΔW in BASE; None without both.
        mismatch: Why the saved adapter does not fit its config or BASE; empty if it does, None
            without one.
        tokens: Predicted tokens of the training data.
        gpu_memory: Bytes of the GPU.
        consumers: Names of programs that will serve the adapter; empty for the usual ones.
    """

    settings: Settings
    base: Checkpoint | None = None
    adapter: Adapter | None = None
    pairing: Pairing | None = None
    mismatch: str | None = None
    tokens: int | None = None
    gpu_memory: int | None = None
    consumers: Sequence[str] = ()

    @property
    def peft(self) -> Config:
        """The LoRA settings."""
        return self.settings.peft

    @property
    def lr(self) -> float | None:
        """The learning rate; None too for an optimizer whose steps have another size."""
        is_unit = any(name in (self.settings.optimizer or "adamw") for name in UNIT_STEPS)
        return self.settings.lr if is_unit else None

    @property
    def dtype(self) -> str | None:
        """Dtype of the trained weights."""
        if self.settings.dtype != "auto":
            return self.settings.dtype
        if not self.base:
            return None
        kinds = Counter(self.base[name].dtype for name in self.base)
        return kinds.most_common(1)[0][0]

    @property
    def weights(self) -> list[str] | None:
        """The weights of BASE whose entries can be sampled; None without any."""
        if self.base is None or self.base.kind == DERIVED:
            return None
        infos = [self.base[name] for name in self.base]
        plain = [info for info in infos if info.stored is None and info.dtype in FLOAT_DTYPES]
        return [info.name for info in plain if info.numel] or None

    @cached_property
    def modules(self) -> dict[str, str] | None:
        """Modules that PEFT could adapt, by the names of their weights in BASE."""
        if self.base is None:
            return None
        names = names_in_memory(self.adapter, self.base) if self.adapter is not None else {}
        return contents.list_modules(self.base, self.peft, names, MemoryModel(self.base, names))

    @property
    def paths(self) -> set[str] | None:
        """The modules in memory, and the owners of all tensors of BASE, such as an
        ``nn.MultiheadAttention``.
        """
        if self.modules is None:
            return None
        owners = {name.rpartition(".")[0] for name in self.base or ()}
        return owners.union(self.modules.values())

    @cached_property
    def invalid(self) -> str:
        """Why a pattern of the config cannot be matched; empty if all can."""
        modules = list((self.modules or {"": "model.layers.0.self_attn.q_proj"}).values())
        try:
            for key in ("target_modules", "exclude_modules"):
                find_targets(self.peft, modules, key)
            Scaling.read(self.peft, modules)
        except InputError as error:
            return str(error)
        return ""

    @cached_property
    def targeted(self) -> dict[str, Matrix] | None:
        """The matrices that get LoRA, by their module; None if config and BASE do not determine
        them.
        """
        values, modules = self.peft.values, self.modules
        unknown = any(values.get(key) for key in ("target_parameters", "layer_replication"))
        if self.base is None or modules is None or self.invalid:
            return None
        if unknown or not values.get("target_modules"):
            return None
        if values["target_modules"] == "all-linear":
            linear = [name for name in modules if not why_no_target(name, None, None)]
            modules = {name: modules[name] for name in linear}
        names = find_targeted(self.peft, modules)
        return {modules[name]: make_matrix(name, self.base[name].shape) for name in names}

    @cached_property
    def scaling(self) -> dict[str, tuple[int, float]] | None:
        """Rank and scale of each targeted module, or of ``every layer``; None if r or α is not
        given.
        """
        if self.invalid or "r" not in self.peft or "lora_alpha" not in self.peft:
            return None
        modules = list(self.targeted) if self.targeted else ["every layer"]
        scaling = Scaling.read(self.peft, modules)
        return {module: (scaling.rank(module), scaling.of_module(module)) for module in modules}

    @property
    def params(self) -> int | None:
        """Number of trained parameters, without those of ``modules_to_save``."""
        if self.settings.finetuning_type == "full" and self.base is not None:
            return sum(self.base[name].numel for name in self.base)
        if not self.targeted or not self.scaling:
            return None
        params = 0
        for module, matrix in self.targeted.items():
            rank, _ = self.scaling[module]
            params += rank * matrix.per_rank
        return params

    @cached_property
    def contents(self) -> Contents | None:
        """The adapter's file: the saved one, or as PEFT will write it."""
        if self.adapter is not None:
            return read_contents(self.adapter, self.base)
        if not self.targeted or not self.scaling or self.base is None:
            return None
        peft, is_dora = self.peft, self.peft.flag("use_dora")
        names = frozenset(peft.names("modules_to_save"))
        items = []
        for module in (self.modules or {}).values():
            if not names.isdisjoint(ends_of(module)):
                items.append(Item(f"{module}.weight", module, "value", f"{module}.weight"))
        for module, matrix in self.targeted.items():
            part: Part = "embedding" if TABLE.search(matrix.name) else "factors"
            if is_dora:
                part = "dora"
            key, scaling = f"{module}.lora_B.weight", self.scaling[module]
            items.append(Item(matrix.name, module, part, key, *scaling, shape=matrix.shape))
        return Contents("peft", tuple(items), peft.values, tied=has_tied_head(self.base))

    @cached_property
    def steps(self) -> tuple[list[moves.TypeSample], list[StepShare]] | None:
        """Sampled entries of BASE in the 16-bit dtype in which they are trained, and fractions that
        a step moves.
        """
        if self.lr is None or self.dtype is None or self.weights is None or self.base is None:
            return None
        if self.dtype not in SIXTEEN_BITS:
            return [], []
        samples = moves.sample_entries(self.base, self.weights, self.dtype)
        return samples, moves.measure_shares(samples, self.dtype, self.lr)


Check = Callable[..., Iterator[Problem]]
Targeted = Mapping[str, Matrix]
Scales = Mapping[str, tuple[int, float]]


class LintRule(NamedTuple):
    """A rule.

    Args:
        severity: Severity of its findings, where they do not set another.
        method: ``lora`` or ``full`` if it applies to that only.
        check: Yields the problems; its parameters are names of ``Facts``.
    """

    severity: Severity
    method: str
    check: Check


# What to give for a fact that is missing.
MISSING = {
    **dict.fromkeys(("base", "modules", "paths"), "BASE"),
    **dict.fromkeys(("targeted", "contents", "params"), "BASE and target modules"),
    **dict.fromkeys(("weights", "steps"), "BASE with its weights, --lr and --dtype"),
    **dict.fromkeys(("mismatch", "adapter"), "an adapter"),
    "pairing": "an adapter and BASE",
    "scaling": "--rank and --alpha",
}

RULES: dict[str, LintRule] = {}


def rule(id: str, severity: Severity, method: str = "") -> Callable[[Check], Check]:
    """Register a rule; see ``LintRule``."""

    def register(check: Check) -> Check:
        RULES[id] = LintRule(severity, method, check)
        return check

    return register


@rule("bf16-step", "error", "full")
def check_steps(
    steps: tuple[list[moves.TypeSample], list[StepShare]], settings: Settings
) -> Iterator[Problem]:
    """Find weights in 16 bits of which a step of size lr moves less than half; simulate the path of
    given steps.
    """
    samples, shares = steps
    if not shares or shares[0].moved >= HALF:
        return
    whole, *types = shares
    ends = sorted(share.moved for share in types if share.entries > whole.entries / 100)
    moved, error, low, high = map(small_percent, (whole.moved, whole.error, ends[0], ends[-1]))
    text = (
        f"in {whole.dtype} a step of lr {number(whole.lr)} moves {moved} ± {error} of the "
        "entries of BASE "
    )
    text += f"({low} to {high} by module type)"
    if settings.steps:
        count_of_steps = min(settings.steps, moves.PATH_STEPS)
        kept = moves.simulate_path(samples, whole.dtype, whole.lr, count_of_steps)
        paths = (f"{small_percent(value)} of a path with {name}" for name, value in kept.items())
        text += f"; {count_of_steps} simulated steps keep {' and '.join(paths)}"
    yield Problem("lr", text, "error" if whole.moved < FEW else "warning")


@rule("lora-16bit", "warning", "lora")
def check_factors(lr: float, dtype: str, targeted: Targeted) -> Iterator[Problem]:
    """Find factors in 16 bits: what a step of size lr moves of PEFT's initial A, uniform within
    1/√in.
    """
    if dtype in SIXTEEN_BITS and targeted:
        bound = 1 / math.sqrt(median_low(matrix.shape[1] for matrix in targeted.values()))
        moved, late = (moves.share_of_uniform(bound, dtype, rate) for rate in (lr, lr / 10))
        text = (
            f"factors in {dtype}: lr {number(lr)} moves {small_percent(moved)} of A's initial "
            "entries"
        )
        text += f", and lr/10, late in a decay, {small_percent(late)}"
        severity: Severity = "error" if moved < FEW else "warning" if moved < HALF else "note"
        yield Problem("dtype", text, severity)


@rule("adam-bf16", "note")
def check_state(dtype: str, settings: Settings) -> Iterator[Problem]:
    """Find AdamW's state in bf16 with a β₂ at which v·β₂ rounds to v: 1 − β₂ ≤ 2⁻⁹."""
    beta2 = settings.beta2 or 0.999
    if dtype == "bfloat16" and settings.optimizer == "adamw" and 1 - beta2 <= 2.0**-9:
        yield Problem(
            "optimizer",
            f"weights and AdamW's state in bf16 with β₂ = {beta2:g}: v·β₂ rounds back to v",
        )


@rule("fp16-weights", "error")
def check_fp16(dtype: str) -> Iterator[Problem]:
    """Find trained weights in fp16."""
    if dtype == "float16":
        yield Problem("dtype", "the trained weights are float16, and so are their gradients")


@rule("full-quantized", "error", "full")
def check_quantized(settings: Settings) -> Iterator[Problem]:
    """Find full fine-tuning of a quantized model."""
    if settings.quantized:
        yield Problem(
            "finetuning_type", "all weights are to be trained, and BASE is loaded in 4 or 8 bits"
        )


@rule("pattern-invalid", "error", "lora")
def check_patterns(invalid: str) -> Iterator[Problem]:
    """Find patterns that are invalid or take too long."""
    if invalid:
        keys = ("rank_pattern", "alpha_pattern", "exclude_modules", "target_modules")
        yield Problem(next(key for key in keys if key in invalid), invalid.partition(": ")[2])


@rule("target-unmatched", "error", "lora")
def check_targets(
    base: Checkpoint, targeted: Targeted, paths: set[str], peft: Config
) -> Iterator[Problem]:
    """Find target names that match no module of BASE: a warning if others match."""
    names = peft.values["target_modules"]
    if not isinstance(names, list):  # a pattern, which matches or not
        names = [] if targeted else [names]
    leaves = sorted({path.rpartition(".")[2] for path in paths} - {""})
    known = _list_names_of(paths)
    for name in names:
        if name in known:
            continue
        near = ", ".join(get_close_matches(name, leaves, n=3, cutoff=0.5) or leaves[:9])
        text = f"{name!r} matches no module of BASE, which has {near}"
        if not (is_head(f"{name}.weight") and has_tied_head(base)):
            yield Problem("target_modules", text, "warning" if targeted else None)


@rule("target-no-mlp", "note", "lora")
def check_placement(targeted: Targeted, modules: Mapping[str, str]) -> Iterator[Problem]:
    """Find targets without a matrix of an MLP."""
    names = [matrix.name for matrix in targeted.values()]
    mlps = [name for name in modules if "mlp" in name or "feed_forward" in name]
    if names and mlps and not {*names} & {*mlps}:
        kinds = [*dict.fromkeys(map(module_type_of, names))]
        yield Problem(
            "target_modules",
            f"only {list_names(kinds)}; {quantity(len(mlps))} of MLPs have no factors",
        )


@rule("trained-twice", "warning", "lora")
def check_twice(peft: Config) -> Iterator[Problem]:
    """Find modules that are named as targets and in ``modules_to_save``."""
    both = {*peft.names("target_modules")} & {*peft.names("modules_to_save")}
    if both:
        yield Problem("modules_to_save", f"{', '.join(sorted(both))}: also in target_modules")


@rule("save-unmatched", "warning", "lora")
def check_saved_names(paths: set[str], peft: Config) -> Iterator[Problem]:
    """Find names in ``modules_to_save`` that match no module of BASE, heads that a task
    adds aside.
    """
    if peft.text("task_type").upper() in TASKS_WITH_HEAD:
        return
    known = _list_names_of(paths)
    for name in peft.names("modules_to_save"):
        if not is_head(f"{name}.weight") and name not in known:
            yield Problem("modules_to_save", f"{name!r} matches no module of BASE")


def _list_names_of(paths: set[str]) -> set[str]:
    """Return the names of which each matches a module, by ``is_named``."""
    return {name for path in paths for name in ends_of(path)}


@rule("tied-weights", "warning", "lora")
def check_tied(base: Checkpoint, peft: Config) -> Iterator[Problem]:
    """Find a trained head or embedding where BASE ties them."""
    for key in ("target_modules", "modules_to_save"):
        names = [name for name in peft.names(key) if RESIZABLE.search(f"{name}.weight")]
        if names and has_tied_head(base):
            yield Problem(key, f"{', '.join(names)}: BASE ties the head to the embedding")


@rule("rank-pattern", "error", "lora")
def check_keys(targeted: Targeted, peft: Config) -> Iterator[Problem]:
    """Find keys of ``rank_pattern`` and ``alpha_pattern`` that match nothing, or contradict each
    other.
    """
    for text in Scaling.read(peft, list(targeted)).notes(list(targeted)):
        key, _, problem = text.partition(": ")
        yield Problem(key, problem, None if "matches no module" in problem else "warning")


@rule("scale", "warning", "lora")
def check_scale(scaling: Scales, settings: Settings, peft: Config) -> Iterator[Problem]:
    """Find a scale outside of ``SCALES``, or one that follows from a rank and the trainer's fixed
    α.
    """
    is_default = "lora_alpha" in settings.defaults and "r" not in settings.defaults
    odd = [module for module, (_, scale) in scaling.items() if not SCALES[0] <= scale <= SCALES[1]]
    if odd or is_default:
        rank, scale = scaling[(odd or [*scaling])[0]]
        text = f"lora_alpha {peft.number('lora_alpha'):g}"
        if is_default:
            text += ", a default,"
        text += f" at rank {rank}: scale {number(scale)}"
        if odd and len(scaling) > 1:
            text += f" in {len(odd)} of {len(scaling)} modules"
        yield Problem("lora_alpha", text, None if odd else "note")


@rule("rank-excess", "warning", "lora")
def check_rank(targeted: Targeted, scaling: Scales) -> Iterator[Problem]:
    """Find ranks above what a matrix can hold, or with more parameters than it has entries."""
    excess = {}
    for module, matrix in targeted.items():
        (rank, _), shape = scaling[module], matrix.shape
        if rank > min(shape) or rank * sum(shape) >= math.prod(shape):
            excess[matrix.name] = rank, shape
    if excess:
        rank, shape = next(iter(excess.values()))
        text = (
            f"{list_names(list(excess))}: rank {rank} of {shape[0]}×{shape[1]} trains "
            f"{rank * sum(shape):,} parameters"
        )
        yield Problem("r", f"{text} for {math.prod(shape):,} entries")


@rule("rank-rate", "warning", "lora")
def check_rate(lr: float, scaling: Scales) -> Iterator[Problem]:
    """Find learning rates that move ΔW, by lr·s·√r, more than nearly all published recipes do."""
    reach, text = _find_reach(lr, scaling)
    if lr * reach > MAX_LORA_RATE:
        highest = number(MAX_LORA_RATE / reach)
        yield Problem("lr", f"{text}, where nearly all published recipes stay below {highest}")


@rule("rate-low", "warning", "lora")
def check_low_rate(lr: float, scaling: Scales, settings: Settings) -> Iterator[Problem]:
    """Find learning rates that move ΔW less than published recipes do, where no long run makes up
    for it.
    """
    reach, text = _find_reach(lr, scaling)
    path = lr * reach * (settings.steps or 0)
    if reach > 0 and lr * reach < MIN_LORA_RATE and path < LONG_PATH:
        low, high = USUAL_RATES
        text += f", where lr {number(low / reach)} to {number(high / reach)} is usual"
        if settings.steps:
            text += (
                f": {settings.steps} steps move ΔW at most like {number(path / low)} at the "
                "lowest of these"
            )
        yield Problem("lr", text)


def _find_reach(lr: float, scaling: Scales) -> tuple[float, str]:
    """Return the largest s·√r as a multiple of that of rank 16 and scale 2, and a text with its lr,
    r and s.
    """
    rank, scale = max(scaling.values(), key=lambda pair: pair[1] * math.sqrt(pair[0]))
    reach = scale * math.sqrt(rank) / REFERENCE
    return reach, f"lr {number(lr)} at rank {rank} and scale {number(scale)}"


@rule("capacity", "note", "lora")
def check_capacity(tokens: int, targeted: Targeted, params: int) -> Iterator[Problem]:
    """Find data that ask for more parameters, by the rules of thumb of ``plan``."""
    rules = apply_capacity_rules([*targeted.values()], tokens) if targeted else ()
    short = [item for item in rules if item.params > params]
    if short:
        needed = "more than full rank" if short[0].rank is None else f"rank {short[0].rank}"
        text = (
            f"{count(params)} parameters for {count(tokens)} tokens; {short[0].name} asks for "
            f"{needed}"
        )
        yield Problem("r", f"{text} ({short[0].source})")


@rule("memory", "error")
def check_memory(
    gpu_memory: int, base: Checkpoint, params: int, dtype: str, settings: Settings
) -> Iterator[Problem]:
    """Find weights, gradients and optimizer state that exceed the GPU's memory; a lower bound."""
    named = (settings.optimizer or "").removesuffix("32bit")
    optimizer = named if named in STATE else "sgd"
    training = TrainingMemory(optimizer, dtype if dtype in BYTES else "bfloat16")
    trained = math.ceil(params * training.bytes_per_param)
    entries = 0 if settings.finetuning_type == "full" else sum(base[name].numel for name in base)
    frozen = entries // 2 if settings.quantized else 2 * entries
    if trained + frozen > gpu_memory:
        text = (
            f"{byte_count(trained)} trained ({optimizer}, {dtype}) and {byte_count(frozen)} frozen"
        )
        yield Problem("memory", f"{text} exceed {byte_count(gpu_memory)}")


@rule("length", "warning")
def check_length(base: Checkpoint, settings: Settings) -> Iterator[Problem]:
    """Find sequences longer than the positions of BASE."""
    limit = select_text_config(base.config).get("max_position_embeddings")
    if isinstance(limit, int) and settings.length and settings.length > limit:
        yield Problem("length", f"{settings.length} tokens, and BASE has {limit} positions")


@rule("server", "note", "lora")
def check_servers(contents: Contents, consumers: Sequence[str]) -> Iterator[Problem]:
    """Find servers that refuse the adapter, skip a part of it, or scale it otherwise: an error for
    ``--consumers``.
    """
    names = consumers or [name for name in SERVERS if contents.form in CONSUMERS[name].forms]
    for name in names:
        consumer = CONSUMERS[name]
        fault = _describe_service(consumer, contents)
        if fault:
            text = f"{consumer.title} {consumer.newest} {fault}"
            yield Problem("server", text, "error" if consumers else None)
            continue
        rank = consumer.find_rank_to_set(contents)
        if rank:
            yield Problem("r", f"{consumer.title} needs {consumer.rank_option} {rank}")


def _describe_service(consumer: Consumer, contents: Contents) -> str:
    """Return what the newest version of a consumer does wrong with an adapter; empty if nothing."""
    reason = find_refusal(consumer, consumer.rules[0], contents)
    if reason:
        return f"refuses it: {reason}"
    for item in contents.items:
        outcome = consumer.rules[0].applies(contents, item)
        if outcome.does == "dropped":
            return f"drops {item.layer}: {outcome.why}"
        if outcome.scale is None or item.scale is None:
            continue
        if not math.isclose(outcome.scale, item.scale):
            return (
                f"scales {item.layer} by {number(outcome.scale)} instead of "
                f"{number(item.scale)}: {outcome.why}"
            )
    return ""


@rule("merge-storage", "warning")
def check_merge(pairing: Pairing, base: Checkpoint, weights: list[str]) -> Iterator[Problem]:
    """Find updates that a merge into BASE's dtype rounds away, by the rule of ``plan-merge`` on
    sampled entries.
    """
    factors = {delta.layer: getattr(delta, "thin", None) for delta in pairing.deltas}
    dtypes = {base[name].dtype if name in weights else "" for name in factors}
    if all(factors.values()) and len(dtypes) == 1 and dtypes <= {*SIXTEEN_BITS}:
        (dtype,) = dtypes
        error = moves.estimate_rounding(base, factors, dtype)
        if error > MAX_ERROR:
            text = f"rounding to {dtype} adds about {number(error)} ‖ΔW‖"
            yield Problem("", f"{text}, more than {MAX_ERROR:g} ‖ΔW‖")


@rule("adapter-mismatch", "error")
def check_fit(mismatch: str, invalid: str) -> Iterator[Problem]:
    """Find saved tensors that do not fit config or BASE."""
    if mismatch and not invalid:
        yield Problem("", mismatch.rpartition("; ")[0])


@rule("adapter-incomplete", "error")
def check_complete(adapter: Adapter, base: Checkpoint, pairing: Pairing) -> Iterator[Problem]:
    """Find targeted modules for which the file has no factors."""
    targets, missing = find_missing_targets(adapter, base, pairing) or (0, ())
    if missing:
        yield Problem(
            "target_modules", f"{len(missing)} of {targets} targeted weights: {list_names(missing)}"
        )


@rule("adapter-zero", "error")
def check_zero(adapter: Adapter) -> Iterator[Problem]:
    """Find factors that are still zero."""
    for text in adapter.warnings():
        if "are zero" in text:
            yield Problem("", text)
