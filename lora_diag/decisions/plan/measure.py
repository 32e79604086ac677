"""Cost of LoRA and of full fine-tuning from names and shapes, and the rank that rules of thumb require for the data.

The cost is parameters, memory and multiply-adds. It uses shapes only; independent of checkpoints and of the outcome of
training. The published rules estimate the capacity of an adapter, not the need of a task. Repeated passes over the data
add no information.

References: The article, "Parameter Count and State Complexity" and "Forward/Backward Compute Overhead"; Thinking
Machines Lab, LoRA primer (Tinker documentation, 2025); Schulman et al. 2025, "LoRA Without Regret",
thinkingmachines.ai/blog/lora; Allen-Zhu and Li 2024, "Physics of Language Models: Part 3.3, Knowledge Capacity Scaling
Laws", arXiv 2404.05405.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from lora_diag.decisions.plan.record import PlanFit, PlanRank, PlanRule, PlanType
from lora_diag.decisions.targets import STATE, Training
from lora_diag.records.names import depth_of, module_type_of, part_of, place_of

# Capacity of a parameter in bits after long training (Allen-Zhu and Li 2024, arXiv 2404.05405).
BITS_PER_PARAM = 2
# Typical loss of a language model's data, 1 bit or 0.69 nats a token (Schulman et al. 2025).
BITS_PER_TOKEN = 1

# Best learning rate of LoRA over that of full fine-tuning, nearly independent of the rank.
LORA_RATE = 10
RATE_SOURCE = "Schulman et al. 2025"

# Rule, its source, and the required parameters per predicted token.
RULES = (
    (
        "a parameter per completion token",
        "Thinking Machines Lab 2025",
        Fraction(1),
    ),
    (
        f"{BITS_PER_PARAM} bits per parameter, {BITS_PER_TOKEN} per token",
        "Allen-Zhu and Li 2024",
        Fraction(BITS_PER_TOKEN, BITS_PER_PARAM),
    ),
)


def capacity_rules(chosen: Sequence[Matrix], tokens: int) -> tuple[PlanRule, ...]:
    """Return the parameters and the rank required by each rule.

    Args:
        chosen: The matrices that LoRA is put on.
        tokens: Predicted tokens of the training data, counted once.

    Example:
        >>> [(rule.params, rule.rank) for rule in capacity_rules([Matrix("q", (64, 64), 4)], 10_000)]
        [(10000, 20), (5000, 10)]
    """
    per_rank = sum(matrix.per_rank for matrix in chosen)
    full_rank = max(min(matrix.shape) for matrix in chosen)
    rules = []
    for name, source, per_token in RULES:
        params = math.ceil(tokens * per_token)
        rank = max(1, -(-params // per_rank))
        rules.append(PlanRule(name=name, source=source, params=params, rank=rank if rank <= full_rank else None))
    return tuple(rules)


_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)(\.weight)?$")
_EXPERT = re.compile(r"\.experts(\.|$|\[)")


@dataclass(frozen=True, slots=True)
class Matrix:
    """The matrices of one tensor.

    Args:
        name: The tensor's name.
        shape: ``(out, in)`` of each.
        count: Number of matrices in the tensor: the experts of a stack, else 1.
    """

    name: str
    shape: tuple[int, int]
    count: int = 1

    @property
    def entries(self) -> int:
        """Total number of entries."""
        return self.count * math.prod(self.shape)

    @property
    def per_rank(self) -> int:
        """Number of parameters of one rank on all of them."""
        return self.count * sum(self.shape)


def types_of(matrices: Sequence[Matrix], targeted: frozenset[str]) -> tuple[PlanType, ...]:
    """Return the module types: matrices grouped by type, shape, and whether they get LoRA.

    Args:
        matrices: All matrices of the model.
        targeted: Names of the matrices with LoRA.
    """
    groups: dict[tuple[str, tuple[int, int], bool], list[Matrix]] = {}
    for matrix in sorted(matrices, key=lambda matrix: place_of(matrix.name)):
        groups.setdefault((module_type_of(matrix.name), matrix.shape, matrix.name in targeted), []).append(matrix)
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


def rank_costs(
    matrices: Sequence[Matrix], targeted: frozenset[str], params: int, rank: int, dtype: str, active: float = 1.0
) -> PlanRank:
    """Return the cost of LoRA of one rank.

    Args:
        matrices: All matrices of the model.
        targeted: Names of the matrices with LoRA.
        params: Number of parameters of the model.
        rank: r.
        dtype: Dtype of the adapter and its gradients.
        active: Fraction of a mixture's experts that are active for a token.
    """
    chosen = [matrix for matrix in matrices if matrix.name in targeted]
    trained = rank * sum(matrix.per_rank for matrix in chosen)
    active_fractions = {matrix.name: active if _EXPERT.search(matrix.name) else 1.0 for matrix in matrices}
    extra = rank * math.fsum(matrix.per_rank * active_fractions[matrix.name] for matrix in chosen)
    base = math.fsum(matrix.entries * active_fractions[matrix.name] for matrix in _select_multiplied(matrices))
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
    inside = [matrix for matrix in matrices if part_of(matrix.name) == "matrices"]
    tables = [matrix for matrix in matrices if part_of(matrix.name) == "vocabulary"]
    heads = [matrix for matrix in tables if _HEAD.search(matrix.name)]
    return inside + (heads or sorted(tables, key=lambda matrix: -matrix.entries)[:1])


def memory_of(params: int, dtype: str) -> dict[str, int]:
    """Return the memory of trainable parameters with gradients and optimizer state, in bytes, by optimizer.

    >>> memory_of(1_000_000, "float32")["adamw"]
    16000000
    """
    return {name: math.ceil(params * Training(name, dtype).bytes_per_param) for name in STATE}


def fit(
    matrices: Sequence[Matrix], targeted: frozenset[str], ranks: Sequence[int], requested: str, budget: int
) -> PlanFit:
    """Return the ranks that a budget of parameters allows.

    Args:
        matrices: All matrices of the model.
        targeted: Names of the matrices with LoRA.
        ranks: The requested ranks.
        requested: The option as given.
        budget: Budget in parameters.

    Example:
        >>> attention = [Matrix(f"layers.{i}.{name}", (4096, 4096)) for i in range(32) for name in ("q", "v")]
        >>> found = fit(attention, frozenset(m.name for m in attention), [4, 8, 16, 64], "--params 10M", 10_000_000)
        >>> found.rank, found.listed, found.listed_left, found.doubled
        (19, 16, 1611392, 6)
    """
    chosen = [matrix for matrix in matrices if matrix.name in targeted]
    per_rank = sum(matrix.per_rank for matrix in chosen)
    full_rank = max(min(matrix.shape) for matrix in chosen)
    rank = min(budget // per_rank, full_rank)
    listed = max((candidate for candidate in ranks if candidate <= rank), default=None)
    params_by_block: dict[int | None, int] = {}
    for matrix in chosen:
        depth = depth_of(matrix.name)
        params_by_block[depth] = params_by_block.get(depth, 0) + matrix.per_rank
    remaining = budget - listed * per_rank if listed is not None else None
    doubled, left = 0, remaining or 0
    for cost in sorted(params_by_block.values()):
        if listed is None or (left := left - cost * listed) < 0:
            break
        doubled += 1
    return PlanFit(
        asked=requested,
        budget=budget,
        rank=rank,
        full_rank=full_rank,
        spent=rank * per_rank,
        left=budget - rank * per_rank,
        listed=listed,
        listed_left=remaining,
        doubled=doubled,
        blocks=len(params_by_block),
    )
