"""``plan``: cost of full fine-tuning and LoRA of a model, from headers or a bare ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from lora_diag.adapters import is_adapter
from lora_diag.checkpoints import Checkpoint, as_path, locate, open_checkpoint
from lora_diag.checkpoints.documents import MAX_CONFIG_BYTES, read_object
from lora_diag.checkpoints.folder import WEIGHTS
from lora_diag.decisions.plan import PlanOptions
from lora_diag.decisions.plan.architectures import weights_of
from lora_diag.decisions.plan.measure import Matrix, capacity_rules, fit, memory_of, rank_costs, types_of
from lora_diag.decisions.plan.record import Plan, PlanCapacity, PlanCost, PlanRates
from lora_diag.decisions.targets import BYTES, Training, compiled, why_no_target
from lora_diag.deltas import CONVOLUTION, EXPERTS, natural_order
from lora_diag.errors import UsageError
from lora_diag.running.amounts import read_bytes, read_count
from lora_diag.running.fingerprint import legible
from lora_diag.running.options import fill_options, show_options


@dataclass(frozen=True)
class _Model:
    """Names and shapes of a model.

    Args:
        kind: Source, as text.
        shapes: Shape of every weight by name.
        size: Stored size in bytes; None if unknown.
        config: Its ``config.json``; empty without one.
        notes: Notes on the source.
        is_derived: Whether shapes come from the config alone.
    """

    kind: str
    shapes: Mapping[str, tuple[int, ...]]
    size: int | None
    config: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    is_derived: bool = False


@show_options
def plan(base: Path | str, **options: Unpack[PlanOptions]) -> Plan:
    """Return the cost of full fine-tuning and LoRA of a model, and the ranks that a budget allows.

    Args:
        base: A checkpoint, of which only headers are read; or its ``config.json``, or a folder with that file only.
        ranks: Ranks r.
        layers: LoRA on matrices whose name contains a match; None for all except embeddings, head and routers.
        exclude: No matrices whose name contains a match.
        params: Budget of trainable parameters, such as ``"10M"``.
        memory_budget: Budget of bytes for the adapter, its gradients and its optimizer's state, such as ``"2GB"``.
        optimizer: That of ``memory_budget``: ``adamw``, ``adamw8bit``, ``sgd`` or ``sgd_momentum``.
        adapter_dtype: Dtype of the trainable parameters and their gradients.
        cost: Whether to estimate the run time of ``spectrum``, by timing this machine for some seconds.
        top: Number of largest values in the second of two estimates.
        data: Training text, JSONL or a data set: its predicted tokens are counted with the model's tokenizer.
        tokens: Their number instead, such as ``"2M"``.
        tokenizer: As for the probes.
        length: Tokens of a sequence; longer rows are truncated before counting.
        **options: ``PlanOptions``.

    Returns:
        One record: parameters, bytes and FLOPs of every matrix and rank, and the ranks within the budget.

    Raises:
        UsageError: An option is invalid, or no matrix is targeted.
        InputError: The model, the data or the tokenizer cannot be read.

    Example:
        >>> found = plan("sample_checkpoints/base/config.json", layers="q_proj|v_proj", params="10k")
        >>> found.params, found.ranks[0].params, found.fit.rank
        (853120, 7168, 5)
    """
    arguments = fill_options(PlanOptions, options)
    ranks, target, exclude, params, memory = (
        arguments[name] for name in ("ranks", "layers", "exclude", "params", "memory_budget")
    )
    dtype, cost, top = arguments["adapter_dtype"], arguments["cost"], arguments["top"]
    training = Training(arguments["optimizer"], dtype)
    if params is not None and memory is not None:
        raise UsageError("--memory-budget: cannot be combined with --params; give one of them")
    if arguments["data"] is not None and arguments["tokens"] is not None:
        raise UsageError("--tokens: cannot be combined with --data; give one of them")
    if not ranks or min(ranks) < 1:
        raise UsageError(f"--ranks {','.join(map(str, ranks))}: ranks must be whole numbers from 1 up")
    requested_ranks = sorted(set(ranks))
    included, excluded = compiled(target, "--layers"), compiled(exclude, "--exclude")
    model = _open_model(base)
    matrices = [_make_matrix(name, shape) for name, shape in model.shapes.items() if len(shape) > 1]
    targeted = frozenset(matrix.name for matrix in matrices if not why_no_target(matrix.name, included, excluded))
    if not targeted:
        requested = f"--layers {target}" if target is not None else "the model"
        raise UsageError(f"{requested}: no matrix is selected for LoRA; check --layers and --exclude")
    total = sum(math.prod(shape) for shape in model.shapes.values())
    active, notes = _active_share(model.config, matrices)
    capacity = _estimate_capacity(base, arguments, [matrix for matrix in matrices if matrix.name in targeted])
    rates, estimates = _estimate_costs(model, matrices, top) if cost else (None, ())
    return Plan(
        path=legible(base),
        kind=legible(model.kind),
        notes=tuple(map(legible, (*model.notes, *notes))),
        params=total,
        targeted=sum(matrix.entries for matrix in matrices if matrix.name in targeted),
        base_bytes=model.size,
        dtype=dtype,
        full_bytes=memory_of(total, dtype),
        types=types_of(matrices, targeted),
        ranks=tuple(rank_costs(matrices, targeted, total, rank, dtype, active) for rank in requested_ranks),
        fit=_fit(matrices, targeted, requested_ranks, params, memory, training),
        rates=rates,
        costs=estimates,
        capacity=capacity,
    )


def _estimate_capacity(base: Path | str, arguments: Mapping[str, Any], chosen: Sequence[Matrix]) -> PlanCapacity | None:
    """Count the tokens of the data and apply the rules of thumb; None without data or tokens.

    Raises:
        UsageError: The number of tokens is not positive, or the extra ``train`` is missing.
        InputError: The data or the tokenizer cannot be read.
    """
    if arguments["tokens"] is not None:
        tokens = read_count(str(arguments["tokens"]), "--tokens")
        return PlanCapacity(data="", about="as given", tokens=tokens, rules=capacity_rules(chosen, tokens))
    if arguments["data"] is None:
        return None
    # deferred: imports transformers
    from lora_diag.models.data import count_predictions, read_texts
    from lora_diag.models.opening import open_tokens

    path = as_path(base)
    folder = path.parent if path.suffix == ".json" else base
    model = open_tokens(folder, arguments["length"], arguments["tokenizer"])
    texts = read_texts(arguments["data"], model)
    tokens = count_predictions(texts, model)
    return PlanCapacity(
        data=legible(texts.path),
        about=texts.about,
        notes=texts.notes,
        tokens=tokens,
        rules=capacity_rules(chosen, tokens),
    )


def _estimate_costs(model: _Model, matrices: Sequence[Matrix], top: int) -> tuple[PlanRates, tuple[PlanCost, ...]]:
    """Estimate a run of ``spectrum``; experts from a config are counted one by one, as checkpoints store them.

    Raises:
        UsageError: K is below 1.
    """
    # deferred: imports torch
    from lora_diag.decisions.plan.cost import costs

    if top < 1:
        raise UsageError(f"--top {top}: must be at least 1")
    stored = [
        matrix_part for matrix in matrices for matrix_part in (_split_experts(matrix) if model.is_derived else [matrix])
    ]
    return costs(stored, model.size, top)


def _split_experts(matrix: Matrix) -> list[Matrix]:
    """Return the gate and up matrices of a stack of experts, which transformers holds as one; others unchanged."""
    if matrix.count == 1 or not matrix.name.endswith("gate_up_proj"):
        return [matrix]
    half = (matrix.shape[0] // 2, matrix.shape[1])
    return [Matrix(matrix.name.replace("gate_up", part), half, matrix.count) for part in ("gate", "up")]


def _fit(
    matrices: Sequence[Matrix],
    targeted: frozenset[str],
    ranks: Sequence[int],
    params: int | str | None,
    memory: int | str | None,
    training: Training,
) -> Any:
    """Return the ranks that a budget of parameters or memory allows; None without a budget."""
    if params is not None:
        return fit(matrices, targeted, ranks, f"--params {legible(str(params))}", read_count(str(params), "--params"))
    if memory is not None:
        size = read_bytes(f"{memory}B" if isinstance(memory, int) else memory, "--memory-budget")
        requested = f"--memory-budget {legible(str(memory))} ({training.optimizer}, {training.dtype})"
        return fit(matrices, targeted, ranks, requested, math.floor(size / training.bytes_per_param))
    return None


def _open_model(base: Path | str) -> _Model:
    """Return names and shapes, from headers if there are weights, else from the config.

    Raises:
        UsageError: The path is an adapter.
        InputError: Neither can be read.
    """
    base = as_path(base)
    path = locate(base)
    if path.is_dir() and (path / "config.json").is_file() and not _has_weights(path):
        path = path / "config.json"
    if path.is_file() and path.suffix == ".json" and not path.name.endswith(".index.json"):
        config = read_object(path, "model configuration", MAX_CONFIG_BYTES)
        shapes = dict(weights_of(config, str(path)))
        note = "only the language model, from its text_config" if isinstance(config.get("text_config"), Mapping) else ""
        return _Model(
            "config.json, shapes derived", shapes, _estimate_size(shapes, config), config, (note,) if note else (), True
        )
    if is_adapter(path):
        raise UsageError(f"{base}: is an adapter; give its base model")
    checkpoint = open_checkpoint(base)
    names = sorted(checkpoint, key=natural_order)
    return _Model(
        kind=checkpoint.kind,
        shapes={name: checkpoint[name].shape for name in names},
        size=_stored_size(checkpoint),
        config=checkpoint.config,
        notes=tuple(checkpoint.notes),
    )


def _has_weights(folder: Path) -> bool:
    if any((folder / name).is_file() for name in WEIGHTS):  # a web server has no listing
        return True
    return any(path.suffix in {".safetensors", ".bin", ".pt", ".pth", ".ckpt"} for path in folder.iterdir())


def _make_matrix(name: str, shape: tuple[int, ...]) -> Matrix:
    """Return a tensor's matrices: a 3-D tensor is a stack of experts, unless it is a convolution, as in ``deltas``."""
    if len(shape) == 3 and (EXPERTS.search(name) or not CONVOLUTION.search(name)):
        return Matrix(name, (shape[1], shape[2]), shape[0])
    return Matrix(name, (shape[0], math.prod(shape[1:])))


def _estimate_size(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> int | None:
    """Return the size of a model in the dtype of its config in bytes; None if the config has none."""
    dtype = config.get("dtype") or config.get("torch_dtype")
    size = BYTES.get(dtype) if isinstance(dtype, str) else None
    return None if size is None else size * sum(math.prod(shape) for shape in shapes.values())


def _stored_size(checkpoint: Checkpoint) -> int | None:
    """Return the stored size of the weights in bytes; None if quantized or of an uncommon dtype."""
    infos = [checkpoint[name] for name in checkpoint]
    if any(info.stored is not None or info.dtype not in BYTES for info in infos):
        return None
    return sum(BYTES[info.dtype] * info.numel for info in infos)


def _active_share(config: Mapping[str, Any], matrices: Sequence[Matrix]) -> tuple[float, tuple[str, ...]]:
    """Return the fraction of experts that are active for a token, and notes; 1 without experts or if unknown."""
    if not any(EXPERTS.search(matrix.name) for matrix in matrices):
        return 1.0, ()
    text_config = config.get("text_config")
    values = text_config if isinstance(text_config, Mapping) else config
    active = values.get("num_experts_per_tok")
    experts = next(
        (values[key] for key in ("num_local_experts", "num_experts", "n_routed_experts") if key in values), 0
    )
    if isinstance(active, int) and isinstance(experts, int) and 0 < active <= experts:
        return active / experts, (f"{active} of {experts} experts count for the multiply-adds per token",)
    return 1.0, ("number of active experts unknown: all count for the multiply-adds per token",)
