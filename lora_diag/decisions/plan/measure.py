"""``plan``: cost of LoRA and of full fine-tuning from names and shapes, and the rank that rules of
thumb require.

The cost is parameters, memory and multiply-adds. It follows from the shapes in headers or of a bare
``config.json``, not from training. The published rules estimate the capacity of an adapter, not the
need of a task; repeated passes over the data add no information.

References: The article, "Parameter Count and State Complexity" and "Forward/Backward Compute
Overhead"; Thinking Machines Lab, LoRA primer (Tinker documentation, 2025); Schulman et al. 2025,
"LoRA Without Regret", thinkingmachines.ai/blog/lora; Allen-Zhu and Li 2024, "Physics of Language
Models: Part 3.3, Knowledge Capacity Scaling Laws", arXiv 2404.05405.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any, Unpack

from lora_diag.adapters import locate
from lora_diag.decisions.plan import PlanOptions
from lora_diag.decisions.plan.architectures import (
    Matrix,
    make_matrix,
    select_text_config,
    split_experts,
    weights_of,
)
from lora_diag.decisions.plan.record import (
    Plan,
    PlanCapacity,
    PlanCost,
    PlanFit,
    PlanRank,
    PlanRates,
    PlanRule,
    PlanType,
)
from lora_diag.decisions.targets import (
    BYTES,
    STATE,
    TrainingMemory,
    read_memory,
    why_no_target,
)
from lora_diag.deltas import EXPERTS, compile_pattern, natural_order
from lora_diag.errors import Given, UsageError
from lora_diag.records.names import depth_of, module_type_of, part_of, type_order
from lora_diag.running.amounts import read_count
from lora_diag.running.fingerprint import legible
from lora_diag.running.inputs import open_base
from lora_diag.running.options import fill_options, show_options
from lora_diag.storage import Checkpoint, TensorFile, TensorInfo, as_path
from lora_diag.storage.documents import MAX_CONFIG_BYTES, read_object
from lora_diag.storage.locating import find_named_weights

# Capacity of a parameter in bits after long training (Allen-Zhu and Li 2024, arXiv 2404.05405).
BITS_PER_PARAM = 2
# Typical loss of a language model's data, 1 bit or 0.69 nats a token (Schulman et al. 2025).
BITS_PER_TOKEN = 1

# Kind of a model without weights.
DERIVED = "config.json, shapes derived"

# Best learning rate of LoRA over that of full fine-tuning, nearly independent of the rank.
LORA_RATE = 10
RATE_SOURCE = "Schulman et al. 2025"

# Rule, its source, and the required parameters per predicted token.
_BITS_RULE = f"{BITS_PER_PARAM} bits per parameter, {BITS_PER_TOKEN} per token"
RULES = (
    ("a parameter per completion token", "Thinking Machines Lab 2025", Fraction(1)),
    (_BITS_RULE, "Allen-Zhu and Li 2024", Fraction(BITS_PER_TOKEN, BITS_PER_PARAM)),
)


def apply_capacity_rules(chosen: Sequence[Matrix], tokens: int) -> tuple[PlanRule, ...]:
    """Return the parameters and the rank required by each rule; a rank above every min(m, n) is
    null.

    Args:
        chosen: The matrices that LoRA is put on.
        tokens: Predicted tokens of the training data, counted once.

    Example:
        >>> [
        ...     (rule.params, rule.rank)
        ...     for rule in apply_capacity_rules([Matrix("q", (64, 64), 4)], 10_000)
        ... ]
        [(10000, 20), (5000, 10)]
    """
    per_rank = sum(matrix.per_rank for matrix in chosen)
    full_rank = max(min(matrix.shape) for matrix in chosen)
    rules = []
    for name, source, per_token in RULES:
        params = math.ceil(tokens * per_token)
        needed = max(1, -(-params // per_rank))
        rank = needed if needed <= full_rank else None
        rules.append(PlanRule(name=name, source=source, params=params, rank=rank))
    return tuple(rules)


_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)(\.weight)?$")
_EXPERT = re.compile(r"\.experts(\.|$|\[)")


def group_types(matrices: Sequence[Matrix], targeted: frozenset[str]) -> tuple[PlanType, ...]:
    """Return the matrices grouped by module type, shape, and whether they get LoRA.

    Args:
        matrices: All matrices of the model.
        targeted: Names of the matrices with LoRA.
    """
    groups: dict[tuple[str, tuple[int, int], bool], list[Matrix]] = {}
    for matrix in sorted(matrices, key=lambda matrix: type_order(matrix.name)):
        key = module_type_of(matrix.name), matrix.shape, matrix.name in targeted
        groups.setdefault(key, []).append(matrix)
    return tuple(
        PlanType(
            name=name,
            shape=shape,
            matrices=sum(matrix.count for matrix in group),
            params=sum(matrix.entries for matrix in group),
            per_rank=sum(matrix.per_rank for matrix in group),
            targeted=is_targeted,
        )
        for (name, shape, is_targeted), group in groups.items()
    )


def compute_rank_cost(
    matrices: Sequence[Matrix],
    chosen: Sequence[Matrix],
    params: int,
    rank: int,
    dtype: str,
    active: float = 1.0,
) -> PlanRank:
    """Return the cost of LoRA of one rank.

    Args:
        matrices: All matrices of the model.
        chosen: Those with LoRA.
        params: Number of parameters of the model.
        rank: r.
        dtype: Dtype of the adapter and its gradients.
        active: Fraction of a mixture's experts that are active for a token.
    """
    trained = rank * sum(matrix.per_rank for matrix in chosen)

    def is_active(matrix: Matrix) -> float:
        """Return the fraction of tokens that a matrix multiplies."""
        return active if _EXPERT.search(matrix.name) else 1.0

    extra = rank * math.fsum(matrix.per_rank * is_active(matrix) for matrix in chosen)
    base = math.fsum(matrix.entries * is_active(matrix) for matrix in _select_multiplied(matrices))
    return PlanRank(
        rank=rank,
        params=trained,
        rho=trained / sum(matrix.entries for matrix in chosen),
        of_model=trained / params,
        bytes=memory_of(trained, dtype),
        flops=extra / base,
    )


def _select_multiplied(matrices: Sequence[Matrix]) -> list[Matrix]:
    """Return the matrices that multiply a token: no embeddings, unless one is also the head."""
    tables = [matrix for matrix in matrices if part_of(matrix.name) == "vocabulary"]
    heads = [matrix for matrix in tables if _HEAD.search(matrix.name)]
    if tables and not heads:
        heads = [max(tables, key=lambda matrix: matrix.entries)]
    return [matrix for matrix in matrices if part_of(matrix.name) == "matrices"] + heads


def memory_of(params: int, dtype: str) -> dict[str, int]:
    """Return the memory of trainable parameters with gradients and optimizer state, in bytes, by
    optimizer.

    >>> memory_of(1_000_000, "float32")["adamw"]
    16000000
    """
    return {name: math.ceil(params * TrainingMemory(name, dtype).bytes_per_param) for name in STATE}


def fit_ranks(
    chosen: Sequence[Matrix], ranks: Sequence[int], requested: str, budget: int
) -> PlanFit:
    """Return the ranks that a budget of parameters allows.

    Args:
        chosen: The matrices with LoRA.
        ranks: The requested ranks.
        requested: The option as given.
        budget: Budget in parameters.

    Example:
        >>> attention = [
        ...     Matrix(f"layers.{i}.{name}", (4096, 4096)) for i in range(32) for name in ("q", "v")
        ... ]
        >>> found = fit_ranks(attention, [4, 8, 16, 64], "--params 10M", 10_000_000)
        >>> found.rank, found.listed, found.listed_left, found.doubled
        (19, 16, 1611392, 6)
    """
    per_rank = sum(matrix.per_rank for matrix in chosen)
    full_rank = max(min(matrix.shape) for matrix in chosen)
    rank = min(budget // per_rank, full_rank)
    listed = max((candidate for candidate in ranks if candidate <= rank), default=None)
    block_costs = Counter[int | None]()
    for matrix in chosen:
        block_costs[depth_of(matrix.name)] += matrix.per_rank
    listed_left, doubled = None, 0
    if listed is not None:
        listed_left = budget - listed * per_rank
        costs = accumulate(sorted(block_costs.values()))
        doubled = sum(listed * cost <= listed_left for cost in costs)
    return PlanFit(
        asked=requested,
        budget=budget,
        rank=rank,
        full_rank=full_rank,
        spent=rank * per_rank,
        left=budget - rank * per_rank,
        listed=listed,
        listed_left=listed_left,
        doubled=doubled,
        blocks=len(block_costs),
    )


@show_options
def plan(base: Path | str, **options: Unpack[PlanOptions]) -> Plan:
    """Return the cost of full fine-tuning and LoRA of a model, and the ranks that a budget allows.

    Args:
        base: A checkpoint, of which only headers are read; or its ``config.json``, or a folder with
            that file only.
        ranks: Ranks r.
        layers: LoRA on matrices whose name contains a match; None for the weights of layers other
            than embeddings, head, routers and short convolutions.
        exclude: No matrices whose name contains a match.
        params: Budget of trainable parameters, such as ``"10M"``; not with ``memory_budget``.
        memory_budget: Budget of bytes for the adapter, its gradients and its optimizer's state,
            such as ``"2GB"``.
        optimizer: ``adamw``, ``adamw8bit``, ``sgd`` or ``sgd_momentum``; for ``memory_budget``.
        adapter_dtype: Dtype of the trainable parameters and their gradients.
        cost: Whether to estimate the run time of ``spectrum``, by timing this machine for some
            seconds.
        top: Number of largest values in the second of two estimates.
        data: Training text, JSONL or a data set: its predicted tokens are counted with the model's
            tokenizer.
        tokens: Number of predicted tokens, such as ``"2M"``, instead of ``data``.
        tokenizer: ``auto`` for that of the model, ``bytes`` for UTF-8 bytes, or a folder with one;
            for ``data``.
        length: Tokens of a sequence; longer rows are truncated before counting. None for 512 or the
            model's limit.
        **options: ``PlanOptions``.

    Returns:
        One record: parameters of every module type, cost of every rank, and the ranks within the
            budget.

    Raises:
        UsageError: An option is invalid or contradicts another, no matrix is targeted, ``base`` is
            an adapter, or a library to count the tokens of ``data`` is not installed.
        InputError: The model, the data or the tokenizer cannot be read.

    Example:
        >>> found = plan(
        ...     "sample_checkpoints/base/config.json", layers="q_proj|v_proj", params="10k"
        ... )
        >>> found.params, found.ranks[0].params, found.fit.rank
        (853120, 7168, 5)
    """
    options = fill_options(PlanOptions, options)
    target, params, memory = options["layers"], options["params"], options["memory_budget"]
    ranks, dtype = sorted(set(options["ranks"])), options["adapter_dtype"]
    training = TrainingMemory(options["optimizer"], dtype)
    if params is not None and memory is not None:
        raise UsageError(
            Given("memory_budget"), "cannot be combined with $params", "give one of them"
        )
    if options["data"] is not None and options["tokens"] is not None:
        raise UsageError(Given("tokens"), "cannot be combined with $data", "give one of them")
    if not ranks or ranks[0] < 1:
        raise UsageError(Given("ranks", options["ranks"]), "ranks must be whole numbers from 1 up")
    included = compile_pattern(target, "layers")
    excluded = compile_pattern(options["exclude"], "exclude")
    model = open_headers(base)
    infos = [model[name] for name in sorted(model, key=natural_order)]
    matrices = [make_matrix(info.name, info.shape) for info in infos if len(info.shape) > 1]
    chosen = [matrix for matrix in matrices if not why_no_target(matrix.name, included, excluded)]
    if not chosen:
        subject = "the model" if target is None else Given("layers", target)
        raise UsageError(subject, "no matrix is selected for LoRA", "check $layers and $exclude")
    fit = None
    if params is not None:
        budget = read_count(str(params), "params")
        fit = fit_ranks(chosen, ranks, f"--params {legible(str(params))}", budget)
    elif memory is not None:
        budget = math.floor(read_memory(memory) / training.bytes_per_param)
        requested = f"--memory-budget {legible(str(memory))} ({training.optimizer}, {dtype})"
        fit = fit_ranks(chosen, ranks, requested, budget)
    total = sum(info.numel for info in infos)
    active, notes = _find_active_share(model.config, matrices)
    capacity = _estimate_capacity(base, options, chosen)
    rates: PlanRates | None = None
    costs: tuple[PlanCost, ...] = ()
    if options["cost"]:
        rates, costs = _estimate_costs(model, matrices, options["top"])
    return Plan(
        path=legible(base),
        kind=legible(model.kind),
        notes=tuple(map(legible, (*model.notes, *notes))),
        params=total,
        targeted=sum(matrix.entries for matrix in chosen),
        base_bytes=compute_stored_size(model),
        dtype=dtype,
        full_bytes=memory_of(total, dtype),
        types=group_types(matrices, frozenset(matrix.name for matrix in chosen)),
        ranks=tuple(
            compute_rank_cost(matrices, chosen, total, rank, dtype, active) for rank in ranks
        ),
        fit=fit,
        rates=rates,
        costs=costs,
        capacity=capacity,
    )


def _estimate_capacity(
    base: Path | str, options: PlanOptions, chosen: Sequence[Matrix]
) -> PlanCapacity | None:
    """Return the number of tokens of the data and the ranks by the rules of thumb; None without
    data or tokens.
    """
    if options["tokens"] is not None:
        tokens = read_count(str(options["tokens"]), "tokens")
        rules = apply_capacity_rules(chosen, tokens)
        return PlanCapacity(data="", about="as given", tokens=tokens, rules=rules)
    if options["data"] is None:
        return None
    # deferred: imports transformers
    from lora_diag.models.data import count_predictions, read_texts
    from lora_diag.models.opening import open_tokenizer

    path = as_path(base)
    folder = path.parent if path.suffix == ".json" else base
    model = open_tokenizer(folder, options["length"], options["tokenizer"])
    texts = read_texts(options["data"], model)
    tokens = count_predictions(texts, model)
    return PlanCapacity(
        data=legible(texts.path),
        about=texts.about,
        notes=texts.notes,
        tokens=tokens,
        rules=apply_capacity_rules(chosen, tokens),
    )


def _estimate_costs(
    model: Checkpoint, matrices: Sequence[Matrix], top: int
) -> tuple[PlanRates, tuple[PlanCost, ...]]:
    """Return this machine's speed, and the cost of ``spectrum`` for all values and, with krylov,
    the ``top`` largest.

    The gate and up matrices of experts from a config are counted one by one, as checkpoints store
    them.

    Raises:
        UsageError: ``top`` is below 1.
    """
    # deferred: imports torch
    from lora_diag.decisions.plan.cost import estimate_costs

    if top < 1:
        raise UsageError(Given("top", top), "must be at least 1")
    if model.kind == DERIVED:
        matrices = [part for matrix in matrices for part in split_experts(matrix)]
    return estimate_costs(matrices, compute_stored_size(model), top)


def open_headers(base: Path | str) -> Checkpoint:
    """Open BASE by its headers; if a config is given or alone in its folder, names and shapes that
    follow from it.

    Without weights, the kind is ``DERIVED``, and no entries can be read.
    """
    source = locate(base)
    path = source.files
    if path.is_dir() and (path / "config.json").is_file() and not _has_weights(path):
        path = path / "config.json"
    if not path.is_file() or path.suffix != ".json" or path.name.endswith(".index.json"):
        return open_base(source)
    config = read_object(path, "model configuration", MAX_CONFIG_BYTES)
    dtype = str(config.get("dtype") or config.get("torch_dtype"))
    file = TensorFile()
    file.path = path
    file.tensors = {
        name: TensorInfo(name, shape, dtype) for name, shape in weights_of(config, str(path))
    }
    notes = []
    if select_text_config(config) is not config:
        notes.append("only the language model, from its text_config")
    return Checkpoint(source.path, DERIVED, (file,), tuple(notes), config)


def _has_weights(folder: Path) -> bool:
    if find_named_weights(folder) is not None:  # a web server has no listing
        return True
    return any(
        path.suffix in {".safetensors", ".bin", ".pt", ".pth", ".ckpt"} for path in folder.iterdir()
    )


def compute_stored_size(checkpoint: Checkpoint) -> int | None:
    """Return the stored size of the weights in bytes; None if one is quantized or of another dtype
    than ``BYTES``.
    """
    infos = [checkpoint[name] for name in checkpoint]
    if any(info.stored is not None or info.dtype not in BYTES for info in infos):
        return None
    return sum(BYTES[info.dtype] * info.numel for info in infos)


def _find_active_share(
    config: Mapping[str, Any], matrices: Sequence[Matrix]
) -> tuple[float, tuple[str, ...]]:
    """Return the fraction of experts that are active for a token, and notes; 1 without experts or
    if unknown.
    """
    if not any(EXPERTS.search(matrix.name) for matrix in matrices):
        return 1.0, ()
    values = select_text_config(config)
    active = values.get("num_experts_per_tok")
    keys = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((values[key] for key in keys if key in values), 0)
    if isinstance(active, int) and isinstance(experts, int) and 0 < active <= experts:
        note = f"{active} of {experts} experts count for the multiply-adds per token"
        return active / experts, (note,)
    return 1.0, ("number of active experts unknown: all count for the multiply-adds per token",)
