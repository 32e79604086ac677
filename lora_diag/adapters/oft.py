"""OFT: rotation of a layer's inputs, W_tuned = W·Rᵀ, with R orthogonal and block-diagonal; for an embedding W·R.

Each block is made of a skew-symmetric Q, whose upper triangle is stored: the Cayley transform (I − Q)(I + Q)⁻¹, or the
first terms of the Neumann series I + 2Q + 2Q² + … of its inverse (I + Q)(I − Q)⁻¹; PEFT uses both with the same R.

Reference: Qiu et al. 2023, https://arxiv.org/abs/2306.07280; ``peft.tuners.oft.layer.OFTRotationModule``.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from lora_diag.adapters.refused import MERGE
from lora_diag.adapters.source import Source, by_module
from lora_diag.adapters.updates import Reading, Shape, Site, Update, add_stored_values, read
from lora_diag.checkpoints import Checkpoint
from lora_diag.errors import InputError

if TYPE_CHECKING:
    import torch


# Name of a rotation in a layer and in an embedding.
LAYER, TABLE = "oft_R", "oft_embedding_R"

# PEFT's default is 5; each term is a product of all blocks.
MAX_TERMS = 1000


def read_oft(source: Source) -> Reading:
    """Read a PEFT OFT adapter.

    Raises:
        InputError: It uses an unsupported constraint, its config is invalid, or its parts are inconsistent.
    """
    config = source.settings
    if config.flag("coft"):
        raise InputError(f"{source.path}: constrained OFT (coft=true) is not supported; {MERGE}")
    modules, unclaimed = by_module(source.checkpoint, (LAYER, TABLE), source.path)
    terms = config.integer("num_cayley_neumann_terms", 5) if config.values.get("use_cayley_neumann", True) else 0
    if terms > MAX_TERMS:
        raise InputError(
            f"{config.path}: num_cayley_neumann_terms {terms} is above the limit of {MAX_TERMS}; check the config"
        )
    updates = tuple(_read_update(source, module, parts, terms) for module, parts in modules.items())
    return add_stored_values(Reading(f"PEFT OFT, {len(modules)} modules", updates), source, unclaimed)


def _read_update(source: Source, module: str, parts: dict[str, str], terms: int) -> Update:
    (part, key), *_ = parts.items()
    shape = source.shape(key, 2)
    size = (1 + math.isqrt(1 + 8 * shape[-1])) // 2
    if size * (size - 1) // 2 != shape[1]:
        raise InputError(
            f"{source.checkpoint.path}: {key} has shape {list(shape)} instead of (blocks, b(b-1)/2), possibly from "
            f"an older PEFT; {MERGE}"
        )
    if source.settings.flag("block_share") and shape[0] != 1:
        raise InputError(
            f"{source.checkpoint.path}: {key} has {shape[0]} blocks, but block_share means a single one; check the "
            "config"
        )
    expected: Shape = (None, None if source.settings.flag("block_share") else shape[0] * size)
    load = partial(delta, source.checkpoint, key, size, terms, part == TABLE)
    return Update(f"{module}.weight", expected, load, False, source.checkpoint[key].dtype, "OFT")


def delta(checkpoint: Checkpoint, key: str, size: int, terms: int, is_table: bool, site: Site) -> torch.Tensor:
    """Return W·Rᵀ − W, or W·R − W for an embedding, block by block of W's columns.

    Raises:
        InputError: The blocks do not divide the columns.
    """
    import torch

    upper = read(checkpoint, key)
    q = torch.zeros(len(upper), size, size, dtype=torch.float64)
    rows, columns = torch.triu_indices(size, size, 1)
    q[:, rows, columns] = upper
    q = q - q.transpose(1, 2)
    change = _cayley_transform(q, terms) - torch.eye(size, dtype=torch.float64)
    if is_table:
        change = change.transpose(1, 2)
    w = site.weight()
    if w.shape[1] % size:
        raise InputError(
            f"{checkpoint.path}: {key}: blocks of {size} do not divide the {w.shape[1]} columns of BASE; check that it "
            "belongs to this BASE"
        )
    blocks = w.reshape(w.shape[0], -1, size)
    rotated: torch.Tensor = torch.einsum("obi,bji->obj", blocks, change.expand(blocks.shape[1], -1, -1))
    return rotated.reshape(w.shape)


def _cayley_transform(q: torch.Tensor, terms: int) -> torch.Tensor:
    """Return R of every block, ``(blocks, b, b)``; ``terms`` of the Neumann series, or 0 for the exact transform."""
    import torch

    eye = torch.eye(q.shape[-1], dtype=q.dtype).expand_as(q)
    if terms == 0:
        exact: torch.Tensor = torch.linalg.solve(eye + q, eye - q, left=False)
        return exact
    # As summed by PEFT: two terms are I + 2Q, three and four are both I + 2Q + 2Q² + Q³, and so on.
    last = max(terms - 1, 3) if terms > 2 else terms - 1
    result, power = eye.clone(), eye
    for exponent in range(1, last + 1):
        power = power @ q
        result = result + power * (1.0 if exponent == last > 1 else 2.0)
    return result
