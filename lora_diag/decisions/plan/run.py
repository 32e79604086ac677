"""``plan``: what do full fine-tuning and LoRA cost on this model? Reads headers, or a bare ``config.json``."""

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
from lora_diag.decisions.memory import BYTES, Training
from lora_diag.decisions.plan.architectures import weights_of
from lora_diag.decisions.plan.capacity import capacity_rules
from lora_diag.decisions.plan.measure import Matrix, fit, memory_of, rank_costs, types_of
from lora_diag.decisions.plan.options import PlanOptions
from lora_diag.decisions.plan.record import Plan, PlanCapacity, PlanCost, PlanRates
from lora_diag.decisions.targets import compiled, why_no_target
from lora_diag.deltas import CONVOLUTION, EXPERTS, natural_order
from lora_diag.errors import UsageError
from lora_diag.running.amounts import read_bytes, read_count
from lora_diag.running.fingerprint import legible
from lora_diag.running.options import filled, show_options


@dataclass(frozen=True)
class _Model:
    """Names and shapes of a model, however they were come by.

    Args:
        kind: Where from, in words.
        shapes: Of every weight by its name.
        size: Bytes as it is stored; None if that is not known.
        config: Its ``config.json``; empty without one.
        notes: What a careful reader should know.
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
    """Return what full fine-tuning and LoRA of a model cost, and what a budget allows.

    Args:
        base: A checkpoint, of which only headers are read; or its ``config.json``, or a folder with nothing else.
        ranks: Ranks to count.
        layers: LoRA on the matrices whose name contains a match; None for all but embeddings, head and routers.
        exclude: No matrices whose name contains a match.
        params: Budget of trainable parameters, such as ``"10M"``.
        memory_budget: Budget of bytes for the adapter, its gradients and its optimizer's state, such as ``"2GB"``.
        optimizer: That of ``memory_budget``: ``adamw``, ``adamw8bit``, ``sgd`` or ``sgd_momentum``.
        adapter_dtype: Of the trainable parameters and their gradients.
        cost: Whether to estimate what ``spectrum`` takes on this machine, whose speed is measured for some seconds.
        top: How many of the largest values the second of two estimates is for.
        data: Training text, JSONL or a data set: its predicted tokens are counted with the model's tokenizer.
        tokens: Their number instead, such as ``"2M"``.
        tokenizer: As for the probes.
        length: Tokens of a sequence; longer rows are cut and only what is left is counted.
        **options: ``PlanOptions``.

    Raises:
        UsageError: An option makes no sense, or no matrix is targeted.
        InputError: The model cannot be read.

    Example:
        >>> found = plan("sample_checkpoints/base/config.json", layers="q_proj|v_proj", params="10k")
        >>> found.params, found.ranks[0].params, found.fit.rank
        (853120, 7168, 5)
    """
    given = filled(PlanOptions, options)
    ranks, target, exclude, params, memory = (
        given[name] for name in ("ranks", "layers", "exclude", "params", "memory_budget")
    )
    dtype, cost, top = given["adapter_dtype"], given["cost"], given["top"]
    training = Training(given["optimizer"], dtype)
    if params is not None and memory is not None:
        raise UsageError("give --params or --memory-budget, not both")
    if given["data"] is not None and given["tokens"] is not None:
        raise UsageError("give --data or --tokens, not both")
    if not ranks or min(ranks) < 1:
        raise UsageError(f"--ranks {','.join(map(str, ranks))}: ranks must be whole numbers from 1 up")
    asked_ranks = sorted(set(ranks))
    wanted, unwanted = compiled(target, "--layers"), compiled(exclude, "--exclude")
    model = _model(base)
    matrices = [_matrix(name, shape) for name, shape in model.shapes.items() if len(shape) > 1]
    targeted = frozenset(matrix.name for matrix in matrices if not why_no_target(matrix.name, wanted, unwanted))
    if not targeted:
        asked = f"--layers {target}" if target is not None else "the model"
        raise UsageError(f"{asked}: there is no matrix to put LoRA on")
    total = sum(math.prod(shape) for shape in model.shapes.values())
    active, notes = _active(model.config, matrices)
    capacity = _capacity(base, given, [matrix for matrix in matrices if matrix.name in targeted])
    rates, estimates = _costs(model, matrices, top) if cost else (None, ())
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
        ranks=tuple(rank_costs(matrices, targeted, total, rank, dtype, active) for rank in asked_ranks),
        fit=_fit(matrices, targeted, asked_ranks, params, memory, training),
        rates=rates,
        costs=estimates,
        capacity=capacity,
    )


def _capacity(base: Path | str, given: Mapping[str, Any], chosen: Sequence[Matrix]) -> PlanCapacity | None:
    """Count what there is to learn, and apply the rules of thumb; None where neither data nor tokens are given.

    Raises:
        UsageError: The number of tokens is none, or the extra ``train`` is missing.
        InputError: The data or the tokenizer cannot be read.
    """
    if given["tokens"] is not None:
        tokens = read_count(str(given["tokens"]), "--tokens")
        return PlanCapacity(data="", about="as given", tokens=tokens, rules=capacity_rules(chosen, tokens))
    if given["data"] is None:
        return None
    # transformers comes with them: not before it is needed
    from lora_diag.models.data import predicted, read_texts
    from lora_diag.models.opening import open_tokens

    path = as_path(base)
    folder = path.parent if path.suffix == ".json" else base
    model = open_tokens(folder, given["length"], given["tokenizer"])
    texts = read_texts(given["data"], model)
    tokens = predicted(texts, model)
    return PlanCapacity(
        data=legible(texts.path),
        about=texts.about,
        notes=texts.notes,
        tokens=tokens,
        rules=capacity_rules(chosen, tokens),
    )


def _costs(model: _Model, matrices: Sequence[Matrix], top: int) -> tuple[PlanRates, tuple[PlanCost, ...]]:
    """Estimate a run of ``spectrum``; experts whose shapes a config gave are apart, as checkpoints store them."""
    # torch comes with it: not before it is needed
    from lora_diag.decisions.plan.speed import costs

    if top < 1:
        raise UsageError(f"--top {top}: must be at least 1")
    stored = [each for matrix in matrices for each in (_apart(matrix) if model.is_derived else [matrix])]
    return costs(stored, model.size, top)


def _apart(matrix: Matrix) -> list[Matrix]:
    """Return gate and up of a stack of experts, which transformers holds as one."""
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
    if params is not None:
        return fit(matrices, targeted, ranks, f"--params {legible(str(params))}", read_count(str(params), "--params"))
    if memory is not None:
        size = read_bytes(f"{memory}B" if isinstance(memory, int) else memory, "--memory-budget")
        asked = f"--memory-budget {legible(str(memory))} ({training.optimizer}, {training.dtype})"
        return fit(matrices, targeted, ranks, asked, math.floor(size / training.bytes_per_param))
    return None


def _model(base: Path | str) -> _Model:
    """Return names and shapes, from headers where there are weights, else from the config.

    Raises:
        UsageError: It is an adapter.
        InputError: Neither can be read.
    """
    base = as_path(base)
    path = locate(base)
    if path.is_dir() and (path / "config.json").is_file() and not _has_weights(path):
        path = path / "config.json"
    if path.is_file() and path.suffix == ".json" and not path.name.endswith(".index.json"):
        config = read_object(path, "model configuration", MAX_CONFIG_BYTES)
        shapes = dict(weights_of(config, str(path)))
        note = "only the language model: its text_config" if isinstance(config.get("text_config"), Mapping) else ""
        return _Model(
            "config.json, shapes derived", shapes, _size(shapes, config), config, (note,) if note else (), True
        )
    if is_adapter(path):
        raise UsageError(f"{base}: is an adapter; give the model it belongs to")
    checkpoint = open_checkpoint(base)
    names = sorted(checkpoint, key=natural_order)
    return _Model(
        kind=checkpoint.kind,
        shapes={name: checkpoint[name].shape for name in names},
        size=_stored(checkpoint),
        config=checkpoint.config,
        notes=tuple(checkpoint.notes),
    )


def _has_weights(folder: Path) -> bool:
    if any((folder / name).is_file() for name in WEIGHTS):  # a web server does not list
        return True
    return any(path.suffix in {".safetensors", ".bin", ".pt", ".pth", ".ckpt"} for path in folder.iterdir())


def _matrix(name: str, shape: tuple[int, ...]) -> Matrix:
    """Return a tensor's matrices: a 3-D one is a stack of experts, unless it is a convolution, as in ``deltas``."""
    if len(shape) == 3 and (EXPERTS.search(name) or not CONVOLUTION.search(name)):
        return Matrix(name, (shape[1], shape[2]), shape[0])
    return Matrix(name, (shape[0], math.prod(shape[1:])))


def _size(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> int | None:
    """Return the bytes of a model in the dtype that its config names; None if it names none."""
    dtype = config.get("dtype") or config.get("torch_dtype")
    each = BYTES.get(dtype) if isinstance(dtype, str) else None
    return None if each is None else each * sum(math.prod(shape) for shape in shapes.values())


def _stored(checkpoint: Checkpoint) -> int | None:
    """Return the bytes of the weights as they are stored; None where that is quantized or not a common dtype."""
    infos = [checkpoint[name] for name in checkpoint]
    if any(info.stored is not None or info.dtype not in BYTES for info in infos):
        return None
    return sum(BYTES[info.dtype] * info.numel for info in infos)


def _active(config: Mapping[str, Any], matrices: Sequence[Matrix]) -> tuple[float, tuple[str, ...]]:
    """Return the share of a mixture's experts that a token passes through, and what to say of it."""
    if not any(EXPERTS.search(matrix.name) for matrix in matrices):
        return 1.0, ()
    inner = config.get("text_config")
    values = inner if isinstance(inner, Mapping) else config
    chosen = values.get("num_experts_per_tok")
    experts = next(
        (values[key] for key in ("num_local_experts", "num_experts", "n_routed_experts") if key in values), 0
    )
    if isinstance(chosen, int) and isinstance(experts, int) and 0 < chosen <= experts:
        return chosen / experts, (f"of the experts, {chosen} of {experts} count as multiply-adds of a token",)
    return 1.0, ("how many experts a token passes through is not known: all count as its multiply-adds",)
