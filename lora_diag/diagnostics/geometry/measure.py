"""``geometry``: measure where an update lies in W, and where independent updates of the same size
would lie.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from lora_diag.adapters import locate
from lora_diag.deltas import Delta, FactoredDelta, StoredDelta
from lora_diag.diagnostics.geometry import GeometryOptions
from lora_diag.diagnostics.geometry.lens import DIRECTIONS, find_tables, look_through
from lora_diag.diagnostics.geometry.movement import MovementFrame, measure_movement, pool_draws
from lora_diag.diagnostics.geometry.nulls import (
    add_stored,
    flip_signs,
    permute,
    random_update,
    undo_rounding,
)
from lora_diag.diagnostics.geometry.parts import list_heads, measure_heads, split_magnitude
from lora_diag.diagnostics.geometry.record import Geometry, GeometryBaseline, TokenDirection
from lora_diag.diagnostics.intruders.measure import (
    IntruderSettings,
    classify_directions,
    make_intruders,
)
from lora_diag.diagnostics.intruders.record import Intruders
from lora_diag.layers.change import Change, form_tuned, load_with_base, measure_on_device
from lora_diag.layers.resolution import resolution
from lora_diag.layers.task import LayerSettings, leave_out, not_finite
from lora_diag.linalg.difference import norm
from lora_diag.linalg.exact import Factors, numerical_rank
from lora_diag.linalg.methods import (
    Allowance,
    check_request,
    decompose,
    whole_bytes,
)
from lora_diag.linalg.rotation import Spaces, bound_space_error, principal_angles
from lora_diag.linalg.rounding import LAYOUT
from lora_diag.metrics.energy import energy_curve, rank_at
from lora_diag.records import LeftOut, Results
from lora_diag.running.inputs import open_base
from lora_diag.running.layers import LayerRun
from lora_diag.running.options import show_options
from lora_diag.storage import Checkpoint

NEEDS_BASE = (
    "an update is compared with the weight that it changes, and BASE does not hold this one"
)

# Formats of the rounding null; the smaller the layer, the more draws, up to ``MOST_DRAWS``.
FORMATS = ("bfloat16", "float16", "float32", "float64")
FEWEST_DRAWS, MOST_DRAWS, ENTRIES_PER_DRAW = 2, 8, 2**17


@dataclass(frozen=True, slots=True, kw_only=True)
class GeometrySettings(LayerSettings):
    """Settings of the measurement of a layer.

    Args:
        k: Dimension of the leading singular spaces.
        eta: η, the relative change up to which an entry is unchanged.
        draws: Draws of each baseline; None to choose by the size of the layer.
        lens: Whether to look at tokens.
    """

    k: int = 64
    eta: float = 1e-3
    draws: int | None = None
    lens: bool = False


def max_bytes(delta: Delta, settings: GeometrySettings) -> int:
    """Return an upper bound of the memory of a layer in bytes: nine float64 copies, and one with
    its decomposition.

    Example:
        >>> from lora_diag.deltas import FactoredDelta
        >>> delta = FactoredDelta("w", (4096, 4096), lambda: None, ("bfloat16", "bfloat16"))
        >>> round(max_bytes(delta, GeometrySettings()) / 2**20)
        2240
    """
    decomposed = whole_bytes(delta.shape, Allowance(0, "gram", min(delta.shape), vectors=True), 8)
    return 9 * 8 * math.prod(delta.shape) + decomposed


def measure_layer(delta: Delta, settings: GeometrySettings) -> tuple[Geometry | LeftOut]:
    """Measure where the update of a layer lies in W.

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


def _measure(delta: Delta, settings: GeometrySettings, device: torch.device) -> Geometry | LeftOut:
    """Return the record of a layer with a weight in BASE, measured on this device; see
    ``measure_layer``.
    """
    use = "both weights, their singular vectors and a baseline take"
    loaded = load_with_base(delta, device, settings.memory, max_bytes(delta, settings), use)
    if isinstance(loaded, str):
        return not_finite(delta, loaded)
    change, weight = loaded[0], loaded[1].double()
    update = form_tuned(delta, change, weight, device).double() - weight
    fro = norm([update])
    if not math.isfinite(fro):
        return not_finite(delta, "W_base + ΔW is not finite")
    k = max(1, min(settings.k, min(delta.shape) // 2))
    common: dict[str, Any] = {"layer": delta.layer, "shape": delta.shape, "eta": settings.eta}
    common |= {"base_fro": norm([weight]), "k": k, "fro": fro}
    if fro == 0.0:
        return Geometry(**common)
    factors = decompose(update) if change.factors is None else change.decompose()
    signal = resolution(change.rounding, factors).signal_rank
    has_space = signal is not None and 0 < signal <= min(delta.shape) // 2
    top = max(k, IntruderSettings().k, signal if signal and has_space else 0)
    frame = MovementFrame.of(weight, k, min(top, *delta.shape), settings.eta, settings.method)
    moved, spaces = measure_movement(frame, update, float(factors.s[0]))
    seed = settings.seed + zlib.crc32(delta.layer.encode())
    random = torch.Generator().manual_seed(seed % 2**63)
    rank_random = rank_90_random = left = right = None
    if not isinstance(delta, FactoredDelta):
        signs = decompose(flip_signs(update, random))
        rank_random = numerical_rank(signs)
        rank_90_random = _find_rank_90(signs)
    if signal and has_space:
        left, right = _compare_spaces(frame.spaces, spaces, signal)
    draws = _count_draws(delta, settings)
    chance = _measure_chance(frame, fro, draws, random)
    stored = _find_format(delta, change)
    rounding = _measure_rounding(frame, update, stored, draws, random)
    assert delta.base is not None
    heads = list_heads(delta.layer, delta.shape, delta.base.checkpoint.config)
    return Geometry(
        **common,
        stored=stored,
        angle_error=_bound_angle_error(weight, update, (frame.spaces, spaces), k),
        signal_rank=signal,
        signal_left=left,
        signal_right=right,
        rank=numerical_rank(factors),
        rank_90=_find_rank_90(factors),
        rank_random=rank_random,
        rank_90_random=rank_90_random,
        moved=moved,
        chance=chance,
        rounding=rounding,
        magnitude=split_magnitude(weight, update),
        heads=tuple(measure_heads(heads, weight, update)),
        lens=tuple(_look(delta, change, update, random)) if settings.lens else (),
        intruders=_find_intruders(delta, frame, spaces, fro),
        method=frame.spaces.method,
    )


def _bound_angle_error(
    weight: Tensor, update: Tensor, spaces: tuple[Spaces, Spaces], k: int
) -> float:
    """Return a bound on the error of the angles between both leading spaces, in degrees."""
    before = bound_space_error(weight, spaces[0], k)
    after = bound_space_error(weight + update, spaces[1], k)
    return min(90.0, math.degrees(math.asin(before)) + math.degrees(math.asin(after)))


def _find_intruders(delta: Delta, frame: MovementFrame, spaces: Spaces, fro: float) -> Intruders:
    """Return the record that ``intruders`` makes of a layer by default."""
    settings = IntruderSettings()
    k = min(settings.k, *delta.shape)
    directions = classify_directions(
        (frame.spaces.s, frame.spaces.u), (spaces.s[:k], spaces.u[:, :k]), settings
    )
    return make_intruders(
        delta, settings, directions, fro, norm([frame.weight]), frame.spaces.method
    )


def _look(
    delta: Delta, change: Change, update: Tensor, random: torch.Generator
) -> list[TokenDirection]:
    """Return the tokens of the leading directions of ΔW."""
    assert delta.base is not None
    count = min(DIRECTIONS, *delta.shape)
    if change.factors:
        factors = change.decompose(top=count, vectors=True)
    else:
        factors = decompose(update, "auto", count, None, True)
    u, vh = factors.vectors
    kept = min(count, numerical_rank(factors))
    return look_through(delta.layer, (u[:, :kept], vh[:kept].T), delta.base.checkpoint, random)


def _count_draws(delta: Delta, settings: GeometrySettings) -> int:
    """Return the number of draws of a baseline: as set, or more for a small layer, whose statistics
    vary more.
    """
    by_size = min(MOST_DRAWS, max(FEWEST_DRAWS, ENTRIES_PER_DRAW // math.prod(delta.shape)))
    return settings.draws or by_size


def _find_format(delta: Delta, change: Change) -> str | None:
    """Return the format of TUNED's values, bfloat16 also where a float32 file holds such values;
    None without one.
    """
    if not isinstance(delta, StoredDelta) or delta.tuned.is_quantized or change.rounding is None:
        return None
    dtype = delta.tuned.dtype
    if dtype == "float32" and 0 < change.rounding.mantissa[1] <= LAYOUT[torch.bfloat16][2]:
        dtype = "bfloat16"
    return dtype if dtype in FORMATS else None


def _find_rank_90(factors: Factors) -> int:
    """Return the smallest r with C(r) ≥ 0.9 of all singular values."""
    curve = energy_curve(factors.s.numpy(), factors.fro, complete=True)
    return rank_at(curve, 0.9) or len(curve)


def _compare_spaces(before: Spaces, after: Spaces, k: int) -> tuple[float, float]:
    """Return the mean principal angles of the leading left and right spaces of dimension k, in
    degrees.
    """
    left = principal_angles(before.u[:, :k], after.u[:, :k])
    right = principal_angles(before.v[:, :k], after.v[:, :k])
    return float(left.mean()), float(right.mean())


def _measure_chance(
    frame: MovementFrame, fro: float, draws: int, random: torch.Generator
) -> GeometryBaseline:
    """Return the statistics of Gaussian updates of the same norm."""
    rows, columns = frame.weight.shape
    updates = (
        random_update((rows, columns), fro, random).to(frame.weight.device) for _ in range(draws)
    )
    return pool_draws([measure_movement(frame, update)[0] for update in updates])


def _measure_rounding(
    frame: MovementFrame, update: Tensor, stored: str | None, draws: int, random: torch.Generator
) -> GeometryBaseline | None:
    """Return the statistics of the rounding null; None without a format, or if rounding leaves
    nothing of any draw.
    """
    if stored is None:
        return None
    dtype = getattr(torch, stored)
    entries = undo_rounding(frame.weight, update, dtype, random)
    placed = (
        add_stored(frame.weight, permute(entries, random), dtype) - frame.weight
        for _ in range(draws)
    )
    found = [measure_movement(frame, each)[0] for each in placed if bool(each.any())]
    return pool_draws(found) if found else None


@show_options
def geometry(
    base: Path | str,
    tuned: Path | str,
    **options: Unpack[GeometryOptions],
) -> Results[Geometry]:
    r"""Measure where an update lies in the base weights, and where chance and rounding alone would
    put it.

    Args:
        base: Base checkpoint.
        tuned: Fine-tuned checkpoint or adapter.
        top: k, the dimension of the leading singular spaces of W, at most half of min(out, in).
        eta: η: an entry is unchanged if |ΔW| ≤ η·max(|W|, |W + ΔW|). Between bfloat16 files 0.001
            is bit identity.
        draws: Number of draws of each baseline.
        lens: Whether to find the tokens that the leading directions of ΔW write through the
            unembedding of BASE and read through its embedding.
        **options: ``GeometryOptions``.

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
        >>> found = geometry(base, tuned, layers=r"0\.mlp\.up_proj").layers[0]
        >>> round(found.moved.scaling + found.moved.mixing + found.moved.outside, 9)
        1.0
    """
    run = LayerRun("geometry", options, GeometryOptions)
    options = run.options
    check_request(options["svd"], options["top"], options["tol"])
    settings = run.settings(
        GeometrySettings,
        k=options["top"],
        eta=options["eta"],
        draws=options["draws"],
        lens=options["lens"],
    )
    opened = open_base(locate(base)) if settings.lens else base
    if isinstance(opened, Checkpoint):
        find_tables(opened)
    return run.pair(opened, tuned, measure_layer, max_bytes, run.own, settings)
