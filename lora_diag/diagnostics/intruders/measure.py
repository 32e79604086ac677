"""``intruders``: compare the largest left singular vectors of W_tuned with all of W_base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from lora_diag.deltas import Delta, DenseDelta
from lora_diag.diagnostics.intruders import IntruderOptions
from lora_diag.diagnostics.intruders.record import Direction, Intruders
from lora_diag.errors import Given, UsageError
from lora_diag.layers.change import (
    COMPUTED_ENTRY_BYTES,
    form_tuned,
    load_with_base,
    measure_on_device,
)
from lora_diag.layers.task import LayerSettings, leave_out, not_finite
from lora_diag.linalg.difference import norm
from lora_diag.linalg.methods import (
    Allowance,
    check_request,
    decompose,
    whole_bytes,
)
from lora_diag.metrics.subspaces import below_at_random, classify_direction, similarity_at_random
from lora_diag.records import LeftOut, Results
from lora_diag.running.layers import LayerRun
from lora_diag.running.options import show_options

NEEDS_BASE = "the weights themselves are compared, and BASE does not hold this one"


@dataclass(frozen=True, slots=True, kw_only=True)
class IntruderSettings(LayerSettings):
    """Settings of the measurement of a layer.

    Args:
        k: Number of largest directions of W_tuned to compare.
        epsilon: ε in (0, 1), the similarity below which a direction is an intruder or rotated.
        window: Singular values σ_i of W_base with |σ_i − σ_j| ≤ window·σ_j count as nearly σ_j.
    """

    k: int = 10
    epsilon: float = 0.5
    window: float = 0.1


def max_bytes(delta: Delta, settings: IntruderSettings) -> int:
    """Return an upper bound of the memory of a layer in bytes: ΔW, both weights, and the vectors of
    both.

    Example:
        >>> from lora_diag.deltas import FactoredDelta
        >>> delta = FactoredDelta("w", (4096, 4096), lambda: None, ("bfloat16", "bfloat16"))
        >>> round(max_bytes(delta, IntruderSettings()) / 2**20)
        1152
    """
    entry_bytes = 8 if "float64" in delta.dtypes else 4
    update_bytes = math.prod(delta.shape) * (
        COMPUTED_ENTRY_BYTES if isinstance(delta, DenseDelta) else entry_bytes
    )
    base_bytes = whole_bytes(delta.shape, Allowance(0, vectors=True), entry_bytes)
    vector_bytes = 8 * min(delta.shape) * sum(delta.shape)
    top_values = Allowance(0, settings.method, min(settings.k, *delta.shape), vectors=True)
    tuned_bytes = whole_bytes(delta.shape, top_values, entry_bytes)
    return (
        update_bytes
        + math.prod(delta.shape) * entry_bytes
        + max(base_bytes, vector_bytes + tuned_bytes)
    )


def measure_layer(delta: Delta, settings: IntruderSettings) -> tuple[Intruders | LeftOut]:
    """Compare the largest directions of a fine-tuned weight with all directions of its base.

    Args:
        delta: The layer.
        settings: Settings of the measurement.

    Returns:
        One record; a ``left_out`` record if a weight or a norm is not finite, or BASE does not have
            the weight.
    """
    if delta.base is None:
        return (leave_out(delta, "not_in_base", NEEDS_BASE),)
    return (measure_on_device(partial(_measure, delta, settings), settings.device),)


def _measure(delta: Delta, settings: IntruderSettings, device: torch.device) -> Intruders | LeftOut:
    """Return the record of a layer with a weight in BASE, measured on this device; see
    ``measure_layer``.
    """
    use = "both weights with all singular vectors of BASE take"
    loaded = load_with_base(delta, device, settings.memory, max_bytes(delta, settings), use)
    if isinstance(loaded, str):
        return not_finite(delta, loaded)
    change, before = loaded
    after = form_tuned(delta, change, before, device)
    fro = change.fro if change.fro is not None else norm(change.blocks(delta.shape))
    if not (after.isfinite().all() and math.isfinite(fro)):
        return not_finite(delta, "W_base + ΔW is not finite")
    base_fro, method, directions = norm([before]), "none: ΔW is zero", list[Direction]()
    if fro:
        base = decompose(before, vectors=True)
        k = min(settings.k, *delta.shape)
        top = decompose(
            after, settings.method, k, vectors=True, tol=settings.tol, seed=settings.seed
        )
        directions = classify_directions(
            (base.s, base.vectors[0]), (top.s, top.vectors[0]), settings
        )
        base_fro, method = base.fro, f"{base.method}, {top.method}"
    return make_intruders(delta, settings, directions, fro, base_fro, method)


def make_intruders(
    delta: Delta,
    settings: IntruderSettings,
    directions: Sequence[Direction],
    fro: float,
    base_fro: float,
    method: str,
) -> Intruders:
    """Return the record of a layer, given its classified directions; none if ΔW = 0."""
    rotated, new = (
        sum(direction.kind == kind for direction in directions) for kind in ("rotated", "intruder")
    )
    rows, vectors, k = delta.shape[0], min(delta.shape), min(settings.k, *delta.shape)
    return Intruders(
        layer=delta.layer,
        shape=delta.shape,
        k=k,
        epsilon=settings.epsilon,
        window=settings.window,
        fro=fro,
        base_fro=base_fro,
        count=rotated + new,
        rotated=rotated,
        intruders=new,
        share=new / k,
        similarity_lowest=min((direction.similarity for direction in directions), default=None),
        similarity_random=similarity_at_random(rows, vectors),
        count_random=k * below_at_random(rows, vectors, settings.epsilon),
        directions=tuple(directions),
        method=method,
    )


def classify_directions(
    base: tuple[Tensor, Tensor], top: tuple[Tensor, Tensor], settings: IntruderSettings
) -> list[Direction]:
    """Return each of the largest left singular vectors of W_tuned as compared with all of W_base.

    Args:
        base: All singular values of W_base, ``(n,)`` on the CPU, and its left vectors, ``(m, n)``.
        top: The largest of W_tuned, ``(k,)``, and their left vectors, ``(m, k)``.
        settings: ε and the window.
    """
    (s, u), (top_s, top_u) = base, top
    cosines = (u.T @ top_u).abs().cpu()
    directions = []
    for sigma, column in zip(top_s.tolist(), cosines.T, strict=True):
        near = (s - sigma).abs() <= settings.window * sigma
        near_count = int(near.sum())
        similarity, nearest = column.max(0)
        projection = min(1.0, float(column[near].square().sum().sqrt()))
        by_chance = (near_count / len(top_u)) ** 0.5
        directions.append(
            Direction(
                sigma=sigma,
                similarity=min(1.0, float(similarity)),
                nearest=int(nearest) + 1,
                window=near_count,
                projection=projection,
                projection_random=by_chance,
                kind=classify_direction(float(similarity), projection, by_chance, settings.epsilon),
            )
        )
    return directions


@show_options
def intruders(
    base: Path | str,
    tuned: Path | str,
    **options: Unpack[IntruderOptions],
) -> Results[Intruders]:
    r"""Count intruder dimensions: those of the largest left singular vectors of W_tuned that W_base
    does not have.

    Args:
        base: Base checkpoint.
        tuned: Fine-tuned checkpoint or adapter.
        directions: k, the number of largest directions of each weight to compare.
        epsilon: ε in (0, 1): a direction with max_i |⟨u_i(W_base), u_j⟩| < ε has no counterpart in
            W_base; it is an intruder unless it lies in the span of the directions in the window
            clearly more than by chance.
        window: Half-width of the window of nearly equal singular values around σ_j, as a fraction
            of σ_j.
        **options: ``IntruderOptions``.

    Returns:
        One record per finite matrix that both sides have; other tensors are in ``left_out``.

    Raises:
        UsageError: An option is invalid, an input is in the wrong place, or ``output`` may be
            neither replaced nor resumed.
        InputError: An input cannot be read or does not fit ``base``, or the results file cannot be
            written.
        NothingComparedError: The sides have no weight in common, or none is selected.

    Example:
        >>> base, tuned = "sample_checkpoints/base", "sample_checkpoints/full_ft"
        >>> found = intruders(base, tuned, layers=r"0\.mlp\.up_proj")
        >>> found.layers[0].k, found.layers[0].intruders
        (10, 0)
    """
    run = LayerRun("intruders", options, IntruderOptions)
    options = run.options
    k, epsilon, window = options["directions"], options["epsilon"], options["window"]
    check_request(options["svd"], k, options["tol"])
    if not 0 < epsilon < 1:
        raise UsageError(Given("epsilon", epsilon), "must lie between 0 and 1")
    if not 0 <= window < 1:
        raise UsageError(Given("window", window), "must lie between 0 and 1")
    settings = run.settings(IntruderSettings, k=k, epsilon=epsilon, window=window)
    return run.pair(base, tuned, measure_layer, max_bytes, run.own, settings)
