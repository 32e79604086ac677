"""The parts of a matrix: attention heads, as the model's config lays them out; and lengths and
directions of rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_diag.diagnostics.geometry.record import Head
from lora_diag.linalg.difference import norm
from lora_diag.linalg.methods import decompose
from lora_diag.metrics.energy import curve_at, energy_curve, rank_at

# Names of projections, at the end of a weight's name, and what their heads are: those of queries
# and outputs count as ``num_attention_heads``, those of keys and values as ``num_key_value_heads``.
# A fused weight has several in a row.
PROJECTIONS = (
    (r"(q_proj|wq|attn_q|q_lin|query)", ("query",)),
    (r"(k_proj|wk|attn_k|k_lin|key)", ("key",)),
    (r"(v_proj|wv|attn_v|v_lin|value)", ("value",)),
    (
        r"(o_proj|wo|attn_output|out_lin|attn\.out_proj|attn\.c_proj|attention\.(output\.)?dense)",
        ("output",),
    ),
    (r"(qkv_proj|Wqkv|attn\.c_attn)", ("query", "key", "value")),
)
# Ranks of the energy curve of a head.
RANKS = (1, 4, 16)


class Block(NamedTuple):
    """The rows (axis 0) or columns (axis 1) ``first:last`` of a matrix that belong to a head."""

    kind: str
    number: int
    axis: int
    first: int
    last: int

    def of(self, matrix: Tensor) -> Tensor:
        """Return the head's part of a matrix."""
        return matrix.narrow(self.axis, self.first, self.last - self.first)


def list_heads(layer: str, shape: tuple[int, int], config: Mapping[str, Any]) -> tuple[Block, ...]:
    """Return the heads of a matrix; none if it is no projection of attention, or does not fit the
    config.

    Args:
        layer: The weight's name.
        shape: ``(m, n)``; heads are rows, or columns of an output projection; the reverse in GPT-2,
            stored transposed.
        config: ``config.json`` of the model.

    Example:
        >>> config = {"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
        >>> [block[1:] for block in list_heads("h.0.k_proj.weight", (4, 8), config)]
        [(0, 0, 0, 2), (1, 0, 2, 4)]
        >>> list_heads("h.0.up_proj.weight", (4, 8), config)
        ()
    """
    name = layer.removesuffix(".weight")
    kinds = next(
        (kinds for pattern, kinds in PROJECTIONS if re.search(rf"(^|[._]){pattern}$", name)), ()
    )
    text = config.get("text_config")
    values = {**config, **(text if isinstance(text, dict) else {})}
    heads = _read_size(values, "num_attention_heads", "n_head")
    hidden = _read_size(values, "hidden_size", "n_embd")
    if not kinds or not heads or not hidden:
        return ()
    width = _read_size(values, "head_dim") or hidden // heads
    counts = [
        (_read_size(values, "num_key_value_heads") or heads) if kind in {"key", "value"} else heads
        for kind in kinds
    ]
    is_transposed = values.get("model_type") == "gpt2"  # Conv1D, (in, out)
    axis = int((kinds == ("output",)) != is_transposed)
    if shape[axis] != sum(counts) * width:
        return ()
    indices = [
        (kind, index) for kind, count in zip(kinds, counts, strict=True) for index in range(count)
    ]
    return tuple(Block(*each, axis, i * width, (i + 1) * width) for i, each in enumerate(indices))


def _read_size(values: Mapping[str, Any], *names: str) -> int | None:
    """Return the first positive whole number under one of the names; None without one."""
    found = (values.get(name) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def measure_heads(blocks: tuple[Block, ...], weight: Tensor, update: Tensor) -> Iterator[Head]:
    """Yield the record of each head: the size of its part of ΔW ≠ 0, and how many directions that
    has.
    """
    total = norm([update]) ** 2
    for block in blocks:
        part = block.of(update)
        fro = norm([part])
        factors = decompose(part) if fro else None
        curve = None if factors is None else energy_curve(factors.s.numpy(), fro, complete=True)
        ranks = [rank for rank in RANKS if rank <= min(part.shape)]
        energies = [] if factors is None else curve_at(factors.s.tolist(), fro, True, ranks)
        yield Head(
            kind=block.kind,
            index=block.number,
            fro=fro,
            base_fro=norm([block.of(weight)]),
            share=fro**2 / total,
            energy={str(rank): energy for rank, energy in zip(ranks, energies, strict=False)},
            rank_90=0 if curve is None else rank_at(curve, 0.9) or len(curve),
        )


def split_magnitude(weight: Tensor, update: Tensor) -> float:
    """Return the fraction of ‖ΔW‖² that changes the lengths of rows; the rest changes their
    directions.

    For rows w and w' = w + δ at an angle θ, ‖δ‖² = (‖w'‖ − ‖w‖)² + 2‖w‖‖w'‖(1 − cos θ).

    Reference: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, for
    the decomposition into magnitude and direction.

    Example:
        >>> updates = torch.eye(2) / 2, torch.ones(2, 2).tril(-1)
        >>> [round(split_magnitude(torch.eye(2), update), 4) for update in updates]
        [1.0, 0.1716]
    """
    lengths = [torch.linalg.vector_norm(rows, dim=1) for rows in (weight, weight + update)]
    return min(1.0, float((lengths[1] - lengths[0]).square().sum()) / norm([update]) ** 2)
