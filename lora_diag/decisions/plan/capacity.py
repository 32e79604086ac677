"""Rank that published rules of thumb require for the tokens of the training data.

They estimate the capacity of an adapter, not the need of a task. Repeated passes over the data add no information.

References: Thinking Machines Lab, LoRA primer (Tinker documentation, 2025); Schulman et al. 2025, "LoRA Without
Regret", thinkingmachines.ai/blog/lora; Allen-Zhu and Li 2024, "Physics of Language Models: Part 3.3, Knowledge
Capacity Scaling Laws", arXiv 2404.05405.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from lora_diag.decisions.plan.measure import Matrix
from lora_diag.decisions.plan.record import PlanRule

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
    """Return the parameters required by each rule.

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
