"""Baselines of ``geometry``: updates that know nothing of W.

**Chance** is a Gaussian ΔW of the same norm, added without rounding. The **rounding null** is the
same ΔW at random places, stored as TUNED is: what independence of W and rounding alone give.

Rounding has already removed the part of ΔW that depends on W: a stored TUNED determines an entry to
± half the spacing h of its value only, and h grows with |W|. A permutation of the rounded ΔW would
be rounded twice, and the bias of rounding would come out too small. So the entries are first drawn
as they were before rounding, as far as independence determines them. In the order of |W|, binade by
binade, an entry with a change of less than ``COARSE`` h is replaced by a random one of the finer
entries' that lies within ± h of it, or by a uniform one where there is none. If ΔW is independent
of W, these are draws from the distribution of ΔW: the estimate for censored observations of
Turnbull 1976 ("The empirical distribution function with arbitrarily grouped, censored and truncated
data"), of which Kaplan and Meier's is a case, taken by its redistribution of mass (Efron 1967).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Changes from this many half spacings on are known well enough: drawing them again would move few
# of them.
COARSE = 8
# Entries of finer binades from which are drawn, at random; and how many it takes to start.
POOL, FEWEST = 2**17, 200


def add_stored(weight: Tensor, update: Tensor, dtype: torch.dtype) -> Tensor:
    """Return W + ΔW, added in float32 and stored in a dtype, as float64; for float64 added in
    float64.
    """
    if dtype == torch.float64:
        return weight + update
    return (weight.float() + update.float()).to(dtype).double()


def random_update(shape: tuple[int, int], fro: float, generator: torch.Generator) -> Tensor:
    """Return a Gaussian matrix of norm ``fro``, ``(m, n)`` float64 on the CPU."""
    matrix = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return matrix * (fro / float(torch.linalg.vector_norm(matrix)))


def permute(matrix: Tensor, generator: torch.Generator) -> Tensor:
    """Return a matrix with its entries at random places."""
    order = torch.randperm(matrix.numel(), generator=generator).to(matrix.device)
    return matrix.reshape(-1)[order].view_as(matrix)


def flip_signs(matrix: Tensor, generator: torch.Generator) -> Tensor:
    """Return a matrix of the same magnitudes at the same places with random signs."""
    bits = torch.randint(0, 2, matrix.shape, generator=generator, dtype=torch.int8).to(
        matrix.device
    )
    return matrix * (2 * bits - 1)


def undo_rounding(
    weight: Tensor, update: Tensor, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Return ΔW as it was before TUNED was rounded, as far as independence of W determines it.

    Args:
        weight: W, ``(m, n)`` float64.
        update: ΔW = TUNED − W, float64.
        dtype: Format of the values of TUNED.
        generator: Source of the draws, on the CPU.

    Example:
        >>> source = torch.Generator().manual_seed(0)
        >>> w, x = (
        ...     torch.randn(400, 400, generator=source).bfloat16(),
        ...     2e-3 * torch.randn(400, 400, generator=source),
        ... )
        >>> stored = (w + x).bfloat16().double() - w.double()
        >>> again = undo_rounding(w.double(), stored, torch.bfloat16, source)
        >>> [round(float((each.abs() > 1e-3).double().mean()), 2) for each in (x, stored, again)]
        [0.62, 0.33, 0.59]
    """
    base, changes = weight.reshape(-1), update.reshape(-1).clone()
    half, binade = half_spacing(base + changes, dtype), half_spacing(base, dtype)
    pool = changes.new_empty(0)
    for level in torch.unique(binade).tolist():
        here = ((binade == level) & (changes.abs() < COARSE * half)).nonzero().squeeze(1)
        seen, width = changes[here], half[here]
        draws = torch.rand(len(here), generator=generator, dtype=torch.float64).to(seen.device)
        changes[here] = seen + (2 * draws - 1) * width
        if len(pool) >= FEWEST:
            first = torch.searchsorted(pool, seen - width)
            count = torch.searchsorted(pool, seen + width) - first
            chosen = (first + (draws * count).long()).clamp(max=len(pool) - 1)
            changes[here] = torch.where(count > 0, pool[chosen], changes[here])
        finer = (binade <= level).nonzero().squeeze(1)
        if len(finer) > POOL:
            finer = finer[torch.randint(len(finer), (POOL,), generator=generator).to(finer.device)]
        pool = changes[finer].sort().values
    return changes.view_as(update)


def half_spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return half the spacing of the numbers of a dtype at values, float64."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values)  # |value| in [½, 1)·2^exponent
    smallest = math.frexp(info.tiny)[1]
    exponent = torch.where(values == 0, smallest, exponent).clamp(min=smallest)
    return torch.ldexp(torch.full_like(values, info.eps / 4), exponent)
