"""The rules of ``lint``: one function each, in one registry.

A rule reads ``Facts`` and yields problems. Its explanation, fix and source are its section of
``explanations/findings.md``, which ``explain`` and the site show. It is judged if all facts in ``needs`` are known.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from lora_diag.adapters import Adapter, contents
from lora_diag.adapters.contents import Contents, Item, Part, find_missing_targets, find_targeted, read_contents
from lora_diag.adapters.patterns import Scaling, find_targets
from lora_diag.adapters.source import is_named
from lora_diag.adapters.writing_targets import TABLE, Model, names_in_memory
from lora_diag.checkpoints import Checkpoint
from lora_diag.checkpoints.tensors import FLOAT_DTYPES
from lora_diag.decisions.plan.architectures import Matrix, make_matrix, select_text_config
from lora_diag.decisions.plan.measure import DERIVED, apply_capacity_rules
from lora_diag.decisions.plan_merge.record import MAX_ERROR
from lora_diag.decisions.targets import BYTES, STATE, Training, why_no_target
from lora_diag.deltas import Pairing, has_tied_head, is_head
from lora_diag.diagnostics.portability.consumers import CONSUMERS, Consumer, find_refusal
from lora_diag.errors import InputError
from lora_diag.linting.configs import Settings
from lora_diag.linting.record import Severity, StepShare
from lora_diag.records.names import RESIZABLE, module_type_of
from lora_diag.rendering.text import byte_count, count, list_names, number, quantity, small_percent

if TYPE_CHECKING:
    from lora_diag.linting.moves import Sample

# A fraction of moved entries below which most of the loss's gain is lost, and below which steps are rounded away in
# many entries (docs/reference/lint.md).
FEW, HALF = 0.05, 0.5

# Scales, and the learning rate at rank 16 and scale 2 that moves ΔW alike, beyond those of ten published recipes
# (docs/reference/lint.md; TRL has a scale of 1/16 at rank 256).
SCALES, MAX_LORA_RATE = (0.1, 8.0), 7e-4
REFERENCE = 2 * math.sqrt(16)

# Optimizers whose steps have about the size of the learning rate in every entry.
UNIT_STEPS = ("adam", "lion", "adopt")
# Tasks for which a head is added to BASE, and the programs that are checked without --servers.
TASKS_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
SERVERS = ("vllm", "sglang", "llamacpp")


class Problem(NamedTuple):
    """What a rule found: the setting that causes it, numbers and names, and a severity other than that of the rule."""

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
        mismatch: Why the saved adapter does not fit its config or BASE; empty if it does.
        tokens: Predicted tokens of the training data.
        memory: Bytes of the GPU.
        servers: Names of programs that will serve the adapter; empty for the usual ones.
    """

    settings: Settings
    base: Checkpoint | None = None
    adapter: Adapter | None = None
    pairing: Pairing | None = None
    mismatch: str = ""
    tokens: int | None = None
    memory: int | None = None
    servers: Sequence[str] = ()

    @property
    def lr(self) -> float | None:
        """The learning rate; None too for an optimizer whose steps have another size."""
        is_unit = any(name in (self.settings.optimizer or "adamw") for name in UNIT_STEPS)
        return self.settings.lr if is_unit else None

    @property
    def saved(self) -> Adapter | str | None:
        """The saved adapter, or why it does not fit."""
        return self.mismatch or self.adapter

    @property
    def dtype(self) -> str | None:
        """Dtype of the trained weights."""
        if self.settings.dtype != "auto":
            return self.settings.dtype
        kinds = Counter(self.base[name].dtype for name in self.base) if self.base is not None else None
        return kinds.most_common(1)[0][0] if kinds else None

    @property
    def entries(self) -> list[str] | None:
        """The weights of BASE whose entries can be sampled; None without any."""
        infos = [self.base[name] for name in self.base] if self.base is not None and self.base.kind != DERIVED else []
        return [
            info.name for info in infos if info.stored is None and info.dtype in FLOAT_DTYPES and info.numel
        ] or None

    @cached_property
    def modules(self) -> dict[str, str] | None:
        """Modules that PEFT could adapt, by the names of their weights in BASE."""
        if self.base is None:
            return None
        names = names_in_memory(self.adapter, self.base) if self.adapter is not None else {}
        return contents.list_modules(self.base, self.settings.peft, names, Model(self.base, names))

    @property
    def paths(self) -> set[str]:
        """The modules in memory, and the owners of all tensors of BASE, such as an ``nn.MultiheadAttention``."""
        return {name.rpartition(".")[0] for name in self.base or ()} | {*(self.modules or {}).values()}

    @cached_property
    def invalid(self) -> str:
        """Why a pattern of the config cannot be matched; empty if all can."""
        modules = list((self.modules or {"": "model.layers.0.self_attn.q_proj"}).values())
        try:
            for key in ("target_modules", "exclude_modules"):
                find_targets(self.settings.peft, modules, key)
            Scaling.read(self.settings.peft, modules)
        except InputError as error:
            return str(error)
        return ""

    @cached_property
    def targeted(self) -> dict[str, Matrix] | None:
        """The matrices that get LoRA, by their module; None if config and BASE do not determine them."""
        values, modules = self.settings.peft.values, self.modules
        if self.base is None or modules is None or self.invalid or not values.get("target_modules"):
            return None
        if any(values.get(key) for key in ("target_parameters", "layer_replication")):
            return None
        if values["target_modules"] == "all-linear":
            modules = {name: module for name, module in modules.items() if not why_no_target(name, None, None)}
        names = find_targeted(self.settings.peft, modules)
        return {modules[name]: make_matrix(name, self.base[name].shape) for name in names}

    @cached_property
    def scaling(self) -> dict[str, tuple[int, float]] | None:
        """Rank and scale of each targeted module, or of ``every layer``; None if r or α is not given."""
        if self.invalid or "r" not in self.settings.peft or "lora_alpha" not in self.settings.peft:
            return None
        modules = list(self.targeted) if self.targeted else ["every layer"]
        scaling = Scaling.read(self.settings.peft, modules)
        return {module: (scaling.rank(module), scaling.of_module(module)) for module in modules}

    @property
    def params(self) -> int | None:
        """Number of trained parameters, without those of ``modules_to_save``."""
        if self.settings.method == "full" and self.base is not None:
            return sum(self.base[name].numel for name in self.base)
        if not self.targeted or not self.scaling:
            return None
        return sum(self.scaling[module][0] * matrix.per_rank for module, matrix in self.targeted.items())

    @cached_property
    def contents(self) -> Contents | None:
        """The adapter's file: the saved one, or as PEFT will write it."""
        if self.adapter is not None:
            return read_contents(self.adapter, self.base)
        if not self.targeted or not self.scaling or self.base is None:
            return None
        peft = self.settings.peft
        saved = [m for m in (self.modules or {}).values() if any(is_named(m, n) for n in peft.names("modules_to_save"))]
        items = [Item(f"{module}.weight", module, "value", f"{module}.weight") for module in saved]
        for module, matrix in self.targeted.items():
            part: Part = "embedding" if TABLE.search(matrix.name) else "factors"
            part = "dora" if peft.flag("use_dora") else part
            key, scaling = f"{module}.lora_B.weight", self.scaling[module]
            items.append(Item(matrix.name, module, part, key, *scaling, shape=matrix.shape))
        return Contents("peft", tuple(items), peft.values, tied=has_tied_head(self.base))

    @cached_property
    def samples(self) -> list[Sample]:
        """Sampled entries of BASE, in the dtype in which they are trained."""
        from lora_diag.linting.moves import sample_entries  # deferred: imports NumPy

        assert self.base is not None
        return sample_entries(self.base, self.entries or [], str(self.dtype))

    @cached_property
    def shares(self) -> list[StepShare]:
        """Fractions of the entries of BASE that a step moves; empty if they are not trained in 16 bits, or unknown."""
        if self.dtype not in {"bfloat16", "float16"} or not self.entries or not self.lr:
            return []
        from lora_diag.linting.moves import measure_shares

        return measure_shares(self.samples, str(self.dtype), self.lr)


Check = Callable[[Facts], Iterator[Problem]]


@dataclass(frozen=True)
class Rule:
    """A rule.

    Args:
        id: Its name.
        severity: Severity of its findings, where they do not set another.
        needs: Names of ``Facts`` that it needs.
        method: ``lora`` or ``full`` if it applies to that only.
        check: Yields the problems.
    """

    id: str
    severity: Severity
    needs: tuple[str, ...]
    method: str
    check: Check


# What to give for a fact that is missing.
MISSING = {
    **dict.fromkeys(("base", "modules"), "BASE"),
    **dict.fromkeys(("targeted", "contents", "params"), "BASE and target modules"),
    "entries": "BASE with its weights",
    "scaling": "--rank and --alpha",
    "memory": "--gpu-memory",
    "saved": "an adapter",
    "pairing": "an adapter and BASE",
}

RULES: dict[str, Rule] = {}


def rule(id: str, severity: Severity, needs: str, method: str = "") -> Callable[[Check], Check]:
    """Register a rule; see ``Rule``."""

    def register(check: Check) -> Check:
        RULES[id] = Rule(id, severity, tuple(needs.split()), method, check)
        return check

    return register


@rule("bf16-step", "error", "lr dtype entries", "full")
def check_steps(facts: Facts) -> Iterator[Problem]:
    """Find weights in 16 bits of which a step of size lr moves few; with ``steps``, simulate a path."""
    if not facts.shares or facts.shares[0].moved >= HALF:
        return
    whole, *types = facts.shares
    ends = sorted(share.moved for share in types if share.entries > whole.entries / 100)
    moved, error, low, high = map(small_percent, (whole.moved, whole.error, ends[0], ends[-1]))
    text = f"in {whole.dtype} a step of lr {number(whole.lr)} moves {moved} ± {error} of the entries of BASE "
    text += f"({low} to {high} by module type)"
    if facts.settings.steps:
        from lora_diag.linting.moves import PATH_STEPS, simulate_path

        steps = min(facts.settings.steps, PATH_STEPS)
        kept = simulate_path(facts.samples, whole.dtype, whole.lr, steps)
        paths = (f"{small_percent(value)} of a path with {name}" for name, value in kept.items())
        text += f"; {steps} simulated steps keep {' and '.join(paths)}"
    yield Problem("lr", text, "error" if whole.moved < FEW else "warning")


@rule("lora-16bit", "warning", "lr dtype targeted", "lora")
def check_factors(facts: Facts) -> Iterator[Problem]:
    """Find factors in 16 bits: what a step of size lr moves of PEFT's initial A, uniform within 1/√in."""
    if facts.dtype in {"bfloat16", "float16"} and facts.targeted and facts.lr:
        from lora_diag.linting.moves import share_of_uniform

        widths = sorted(matrix.shape[1] for matrix in facts.targeted.values())
        bound = 1 / math.sqrt(widths[len(widths) // 2])
        moved, late = (share_of_uniform(bound, facts.dtype, lr) for lr in (facts.lr, facts.lr / 10))
        text = f"factors in {facts.dtype}: lr {number(facts.lr)} moves {small_percent(moved)} of A's initial entries"
        severity: Severity = "error" if moved < FEW else "warning" if moved < HALF else "note"
        yield Problem("dtype", f"{text}, and lr/10, late in a decay, {small_percent(late)}", severity)


@rule("adam-bf16", "warning", "dtype")
def check_state(facts: Facts) -> Iterator[Problem]:
    """Find AdamW's state in bf16 with a β₂ at which v·β₂ rounds to v: 1 − β₂ ≤ 2⁻⁹."""
    beta2 = facts.settings.beta2 or 0.999
    if facts.dtype == "bfloat16" and facts.settings.optimizer == "adamw" and 1 - beta2 <= 2.0**-9:
        yield Problem("optimizer", f"weights and AdamW's state in bf16 with β₂ = {beta2:g}: v·β₂ rounds back to v")


@rule("fp16-weights", "error", "dtype")
def check_fp16(facts: Facts) -> Iterator[Problem]:
    """Find trained weights in fp16."""
    if facts.dtype == "float16":
        yield Problem("dtype", "the trained weights are float16, and so are their gradients")


@rule("full-quantized", "error", "", "full")
def check_quantized(facts: Facts) -> Iterator[Problem]:
    """Find full fine-tuning of a quantized model."""
    if facts.settings.quantized:
        yield Problem("method", "all weights are to be trained, and BASE is loaded in 4 or 8 bits")


@rule("pattern-invalid", "error", "", "lora")
def check_patterns(facts: Facts) -> Iterator[Problem]:
    """Find patterns that are invalid or take too long."""
    if facts.invalid:
        yield Problem("target_modules", facts.invalid.partition(": ")[2])


@rule("target-unmatched", "error", "modules", "lora")
def check_targets(facts: Facts) -> Iterator[Problem]:
    """Find target names that match no module of BASE: a warning if others match."""
    targets, paths = facts.settings.peft.values.get("target_modules"), facts.paths
    names = [str(name) for name in targets] if isinstance(targets, list) else []
    unmatched = [name for name in names if not any(is_named(path, name) for path in paths)]
    if facts.base is not None and has_tied_head(facts.base):
        unmatched = [name for name in unmatched if not is_head(f"{name}.weight")]
    leaves = sorted({path.rpartition(".")[2] for path in (facts.modules or {}).values()})
    if facts.targeted == {} and unmatched == names:
        yield Problem("target_modules", f"{targets!r} matches no module of BASE, which has {', '.join(leaves[:8])}")
        return
    for name in unmatched:
        near = ", ".join(get_close_matches(name, leaves, n=3, cutoff=0.5) or leaves[:8])
        yield Problem("target_modules", f"{name!r} matches no module of BASE, which has {near}", "warning")


@rule("target-no-mlp", "note", "targeted", "lora")
def check_placement(facts: Facts) -> Iterator[Problem]:
    """Find targets without a matrix of an MLP."""
    targeted = [matrix.name for matrix in (facts.targeted or {}).values()]
    mlps = [name for name in facts.modules or () if "mlp" in name or "feed_forward" in name]
    if targeted and mlps and not {*targeted} & {*mlps}:
        kinds = [*dict.fromkeys(map(module_type_of, targeted))]
        yield Problem("target_modules", f"only {list_names(kinds)}; {quantity(len(mlps))} of MLPs have no factors")


@rule("trained-twice", "warning", "modules", "lora")
def check_twice(facts: Facts) -> Iterator[Problem]:
    """Find modules that are named as targets and in ``modules_to_save``."""
    peft = facts.settings.peft
    both = {*peft.names("target_modules")} & {*peft.names("modules_to_save")}
    if both:
        yield Problem("modules_to_save", f"{', '.join(sorted(both))}: also in target_modules")


@rule("save-unmatched", "warning", "base", "lora")
def check_saved_names(facts: Facts) -> Iterator[Problem]:
    """Find names in ``modules_to_save`` that match no module of BASE, heads that a task adds aside."""
    peft = facts.settings.peft
    for name in peft.names("modules_to_save") if peft.text("task_type").upper() not in TASKS_WITH_HEAD else ():
        if not is_head(f"{name}.weight") and not any(is_named(path, name) for path in facts.paths):
            yield Problem("modules_to_save", f"{name!r} matches no module of BASE")


@rule("tied-weights", "warning", "base", "lora")
def check_tied(facts: Facts) -> Iterator[Problem]:
    """Find a trained head or embedding where BASE ties them."""
    for key in ("target_modules", "modules_to_save"):
        names = [name for name in facts.settings.peft.names(key) if RESIZABLE.search(f"{name}.weight")]
        if names and facts.base is not None and has_tied_head(facts.base):
            yield Problem(key, f"{', '.join(names)}: BASE ties the head to the embedding")


@rule("rank-pattern", "error", "targeted", "lora")
def check_keys(facts: Facts) -> Iterator[Problem]:
    """Find keys of ``rank_pattern`` and ``alpha_pattern`` that match nothing, or contradict each other."""
    modules = list(facts.targeted or {})
    for text in Scaling.read(facts.settings.peft, modules).notes(modules):
        key, _, problem = text.partition(": ")
        yield Problem(key, problem, None if "matches no module" in problem else "warning")


@rule("scale", "warning", "scaling", "lora")
def check_scale(facts: Facts) -> Iterator[Problem]:
    """Find a scale outside of ``SCALES``, or one that follows from a rank and the trainer's fixed α."""
    scaling, settings = facts.scaling or {}, facts.settings
    is_default = (
        "lora_alpha" in settings.defaults and "r" not in settings.defaults and settings.family in {"peft", "trl"}
    )
    odd = [module for module, (_, scale) in scaling.items() if not SCALES[0] <= scale <= SCALES[1]]
    if odd or is_default:
        rank, scale = scaling[(odd or [*scaling])[0]]
        alpha = f"lora_alpha {settings.peft.number('lora_alpha'):g}{', a default,' if is_default else ''}"
        share = f" in {len(odd)} of {quantity(len(scaling), 'module')}" if odd and facts.targeted else ""
        yield Problem("lora_alpha", f"{alpha} at rank {rank}: scale {number(scale)}{share}", None if odd else "note")


@rule("rank-excess", "warning", "targeted scaling", "lora")
def check_rank(facts: Facts) -> Iterator[Problem]:
    """Find ranks above what a matrix can hold, or with more parameters than it has entries."""
    sizes = {m: ((facts.scaling or {})[module][0], m.shape) for module, m in (facts.targeted or {}).items()}
    excess = [m for m, (r, shape) in sizes.items() if r > min(shape) or r * sum(shape) >= math.prod(shape)]
    if excess:
        rank, shape = sizes[excess[0]]
        text = f"{list_names([m.name for m in excess])}: rank {rank} of {shape[0]}×{shape[1]}"
        yield Problem("r", f"{text} trains {rank * sum(shape):,} parameters for {math.prod(shape):,} entries")


@rule("rank-rate", "warning", "lr scaling", "lora")
def check_rate(facts: Facts) -> Iterator[Problem]:
    """Find learning rates that move ΔW, by lr·s·√r, more than any published recipe does."""
    rank, scale = max((facts.scaling or {}).values(), key=lambda pair: pair[1] * math.sqrt(pair[0]))
    rate = (facts.lr or 0.0) * scale * math.sqrt(rank) / REFERENCE
    if rate > MAX_LORA_RATE:
        text = f"lr {number(facts.lr or 0)} at rank {rank} and scale {number(scale)} moves ΔW like lr {number(rate)}"
        yield Problem("lr", f"{text} at rank 16 and scale 2")


@rule("capacity", "note", "tokens targeted scaling", "lora")
def check_capacity(facts: Facts) -> Iterator[Problem]:
    """Find data that ask for more parameters, by the rules of thumb of ``plan``."""
    tokens, params = facts.tokens or 0, facts.params or 0
    rules = apply_capacity_rules([*facts.targeted.values()], tokens) if facts.targeted else ()
    if short := [item for item in rules if item.params > params]:
        needed = "more than full rank" if short[0].rank is None else f"rank {short[0].rank}"
        text = f"{count(params)} parameters for {count(tokens)} tokens; {short[0].name} asks for {needed}"
        yield Problem("r", f"{text} ({short[0].source})")


@rule("memory", "error", "memory base params")
def check_memory(facts: Facts) -> Iterator[Problem]:
    """Find weights, gradients and optimizer state that exceed the GPU's memory; a lower bound."""
    settings, base = facts.settings, facts.base
    assert base is not None
    optimizer = settings.optimizer if settings.optimizer in STATE else "sgd"
    training = Training(optimizer, facts.dtype if facts.dtype in BYTES else "bfloat16")
    trained = math.ceil((facts.params or 0) * training.bytes_per_param)
    entries = 0 if settings.method == "full" else sum(base[name].numel for name in base)
    frozen = entries // 2 if settings.quantized else 2 * entries
    if trained + frozen > (facts.memory or 0):
        text = f"{byte_count(trained)} trained ({optimizer}, {training.dtype}) and {byte_count(frozen)} frozen"
        yield Problem("memory", f"{text} exceed {byte_count(facts.memory or 0)}")


@rule("length", "warning", "base")
def check_length(facts: Facts) -> Iterator[Problem]:
    """Find sequences longer than the positions of BASE."""
    limit = select_text_config(facts.base.config if facts.base is not None else {}).get("max_position_embeddings")
    length = facts.settings.length
    if isinstance(limit, int) and length and length > limit:
        yield Problem("length", f"{length} tokens, and BASE has {limit} positions")


@rule("server", "note", "contents", "lora")
def check_servers(facts: Facts) -> Iterator[Problem]:
    """Find servers that refuse the adapter, skip a part of it, or scale it otherwise: an error for ``--servers``."""
    assert facts.contents is not None
    servers = facts.servers or [name for name in SERVERS if facts.contents.form in CONSUMERS[name].forms]
    for consumer in map(CONSUMERS.__getitem__, servers):
        if text := _describe_service(consumer, facts.contents):
            yield Problem("server", f"{consumer.title} {consumer.newest} {text}", "error" if facts.servers else None)
        elif rank := consumer.find_rank_to_set(facts.contents):
            yield Problem("r", f"{consumer.title} needs {consumer.rank_option} {rank}")


def _describe_service(consumer: Consumer, contents: Contents) -> str:
    """Return what the newest version of a consumer does wrong with an adapter; empty if nothing."""
    if reason := find_refusal(consumer, consumer.rules[0], contents):
        return f"refuses it: {reason}"
    for item in contents.items:
        outcome = consumer.rules[0].applies(contents, item)
        if outcome.does == "dropped":
            return f"drops {item.layer}: {outcome.why}"
        if outcome.scale is not None and item.scale is not None and not math.isclose(outcome.scale, item.scale):
            return f"scales {item.layer} by {number(outcome.scale)} instead of {number(item.scale)}: {outcome.why}"
    return ""


@rule("merge-storage", "warning", "pairing entries")
def check_merge(facts: Facts) -> Iterator[Problem]:
    """Find updates that a merge into BASE's dtype rounds away: √(Σu²/12)/‖ΔW‖ over the spacings u of its entries."""
    from lora_diag.linting.moves import FORMATS, estimate_rounding

    assert facts.base is not None
    assert facts.pairing is not None
    factors = {delta.layer: getattr(delta, "thin", None) for delta in facts.pairing.deltas}
    dtypes = {facts.base[name].dtype if name in (facts.entries or ()) else "" for name in factors}
    if all(factors.values()) and len(dtypes) == 1 and dtypes <= FORMATS.keys():
        error = estimate_rounding(facts.base, factors, *dtypes)
        if error > MAX_ERROR:
            text = f"rounding to {', '.join(dtypes)} adds about {number(error)} ‖ΔW‖, more than {MAX_ERROR:g} ‖ΔW‖"
            yield Problem("", text)


@rule("adapter-mismatch", "error", "saved")
def check_fit(facts: Facts) -> Iterator[Problem]:
    """Find saved tensors that do not fit config or BASE."""
    if facts.mismatch and not facts.invalid:
        yield Problem("", facts.mismatch.rpartition("; ")[0])


@rule("adapter-incomplete", "error", "pairing")
def check_complete(facts: Facts) -> Iterator[Problem]:
    """Find targeted modules for which the file has no factors."""
    assert facts.adapter is not None
    assert facts.base is not None
    assert facts.pairing is not None
    targets, missing = find_missing_targets(facts.adapter, facts.base, facts.pairing) or (0, ())
    if missing:
        yield Problem("target_modules", f"{len(missing)} of {targets} targeted weights: {list_names(missing)}")


@rule("adapter-zero", "error", "saved")
def check_zero(facts: Facts) -> Iterator[Problem]:
    """Find factors that are still zero."""
    for text in facts.adapter.warnings() if facts.adapter is not None else ():
        if "are zero" in text:
            yield Problem("", text)
