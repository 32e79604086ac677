"""Extraction of one layer: its rank, the factors of its best update of this rank, and the error of
those stored.

The rank is one value for all layers, or follows from a rule or an allocation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_diag.adapters.writing import read_config_ranks
from lora_diag.adapters.writing_targets import PeftTarget
from lora_diag.catalog import read_results_of
from lora_diag.decisions.allocate.measure import (
    Allocated,
    Budget,
    Constraints,
    allocate,
    allocate_one_rank,
)
from lora_diag.decisions.allocate.record import Allocation
from lora_diag.decisions.extract import ExtractOptions
from lora_diag.decisions.extract.record import Extraction, OnData
from lora_diag.deltas import Delta, StoredDelta
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.errors import Given, InputError, UsageError
from lora_diag.layers.change import (
    PARTS,
    PRODUCT_OVERFLOW,
    Change,
    bytes_of,
    load_change,
    measure_on_device,
)
from lora_diag.layers.metric import Weighted, Weighting, fro_of, times, weigh, weighting_bytes
from lora_diag.layers.recovery import DEFAULT_RANKS, recover_layer, recovery_bytes
from lora_diag.layers.resolution import resolution
from lora_diag.layers.task import LayerSettings, LayerTask, leave_out, not_finite
from lora_diag.linalg.devices import resolve_device
from lora_diag.linalg.difference import norm
from lora_diag.linalg.distance import frobenius_distance
from lora_diag.linalg.exact import Factors, decompose_factored
from lora_diag.linalg.methods import Allowance
from lora_diag.metrics.energy import energy_curve, rank_at
from lora_diag.probes.gain.choice import Direction
from lora_diag.records import LeftOut, Results, is_results_file
from lora_diag.records.vocabulary import Hidden
from lora_diag.running.amounts import read_count, read_share

RANK_OPTIONS = "$rank R, $energy FRACTION, $params N, $allocation FILE, $directions FILE or $signal"


def list_amounts(options: ExtractOptions) -> dict[str, Any]:
    """Return the given options of those that say how many ``directions`` to take."""
    values = {"params": options["params"], "keep": options["keep"], "drop": options["drop"]}
    return {name: value for name, value in values.items() if value}


def read_rank_option(options: ExtractOptions) -> tuple[str, Any]:
    """Return the name and the value of the option that determines the ranks; ``params`` as a
    number.

    Args:
        options: All options; of ``rank``, ``energy``, ``params``, ``allocation``, ``directions``
            and ``signal`` exactly one is given, but ``directions`` with one of
            ``list_amounts``.

    Raises:
        UsageError: Not exactly one is given, or a number is out of range.
    """
    rank, energy, params = options["rank"], options["energy"], options["params"]
    given: dict[str, Any] = {
        "rank": rank,
        "energy": energy,
        "params": params,
        "allocation": options["allocation"],
        "directions": options["directions"],
        "signal": options["signal"] or None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    amounts = list_amounts(options)
    if options["directions"] is not None:
        given.pop("params", None)
        if len(amounts) != 1:
            problem = "needs exactly one amount"
            fix = "give $params N, $keep FRACTION or $drop"
            raise UsageError(Given("directions"), problem, fix)
    elif options["drop"] or options["keep"] is not None:
        name = "drop" if options["drop"] else "keep"
        raise UsageError(Given(name), "needs a choice by gain", "give $directions FILE")
    if len(given) != 1:
        raise UsageError("extract", "ranks need exactly one option", f"give {RANK_OPTIONS}")
    if rank is not None and rank < 1:
        raise UsageError(Given("rank", rank), "must be a whole number from 1 up")
    if energy is not None:
        read_share(energy, "energy")
    if options["keep"] is not None:
        read_share(options["keep"], "keep")
    if "params" in given:
        return "params", read_count(str(params), "params")
    return next(iter(given.items()))


def choose_rank_rules(
    name: str,
    value: Any,
    targets: Mapping[str, PeftTarget],
    measure_spectra: Callable[[], Results[Spectrum]],
    portable: bool = False,
) -> dict[str, Rank]:
    """Return the rule for the rank of every layer.

    Args:
        name: The option that determines the ranks.
        value: Its value.
        targets: PEFT's view of each layer.
        measure_spectra: Measures the spectra of all layers; called for a budget.
        portable: Whether lower ranks are padded to the largest, which the budget then has to pay.
    """
    if name == "params":
        reachable = tuple(
            record.before_rounding() for record in measure_spectra() if record.layer in targets
        )
        budget = Budget("params", value, Given("params", value))
        choose = partial(_allocate_layers, reachable, budget)
        allocated = allocate_one_rank(choose, Constraints()) if portable else choose(Constraints())
        ranks = {record.layer: record.rank for record in allocated.layers}
    elif name == "allocation":
        ranks = _read_ranks(Path(value), targets)
    else:
        return dict.fromkeys(targets, Rank(**{"at_most" if name == "rank" else name: value}))
    return {layer: Rank(ranks.get(layer, 0)) for layer in targets}


def choose_ranks_of(directions: Iterable[Direction], targets: Collection[str]) -> dict[str, Rank]:
    """Return the rule for every layer, by chosen directions.

    Raises:
        InputError: One is of an unknown layer.
    """
    chosen: dict[str, list[tuple[int, float]]] = {layer: [] for layer in targets}
    for direction in directions:
        if direction.layer not in chosen:
            problem = "gets directions by the results, but is not among the layers"
            raise InputError(direction.layer, problem, "use the same pair, $layers and $exclude")
        chosen[direction.layer].append((direction.place, direction.sigma))
    return {
        layer: Rank(max((place + 1 for place, _ in own), default=0), tuple(sorted(own)))
        for layer, own in chosen.items()
    }


def _allocate_layers(
    spectra: Sequence[Spectrum], budget: Budget, constraints: Constraints
) -> Allocated:
    """Return the ranks within a budget; heads are layers here, since tensors without factors are
    lost unless --unfactored save keeps them.
    """
    return allocate(spectra, budget, constraints, save_heads=False)


def _read_ranks(path: Path, targets: Mapping[str, PeftTarget]) -> dict[str, int]:
    """Return the ranks of layers from a results file of ``allocate`` or from a PEFT config.

    Raises:
        InputError: The file cannot be read, or gives ranks to unknown layers.
    """
    if not is_results_file(path):
        return read_config_ranks(path / "adapter_config.json" if path.is_dir() else path, targets)
    ranks = {record.layer: record.rank for record in read_results_of(Allocation, path)}
    if unknown := sorted(layer for layer, rank in ranks.items() if rank and layer not in targets):
        raise InputError(
            path,
            f"gives ranks to {len(unknown)} unknown layers, such as {unknown[0]}, but "
            f"layers have names like {next(iter(targets), '(none)')}",
            "use ranks of the same pair, with the same $layers and $exclude",
        )
    return ranks


Kind = Literal["linear", "conv1d", "embedding", "convolution", "parameter"]

# Singular values below this fraction of the largest are rounding of a lower rank, and get no
# column.
NUMERICALLY_ZERO = 1e-10

# Singular values of two measurements of one update differ by at most this fraction of the largest.
SAME_SIGMA = 1e-3

# Dtypes that PEFT reads.
DTYPES = ("float32", "bfloat16", "float16")

# Takes B and A, stores them, and returns them as stored.
Store = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Rank:
    """The rule for the rank of a layer; exactly one field is set, but ``at_most`` with
    ``directions``.

    Args:
        at_most: r, or less if the matrix or its rank is smaller.
        directions: Singular directions to choose from the r leading ones: position and σ of each.
        energy: The smallest r with C(r) ≥ this fraction.
        signal: Whether r is the number of singular values above the rounding noise of the files.
    """

    at_most: int | None = None
    directions: tuple[tuple[int, float], ...] = ()
    energy: float | None = None
    signal: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractionSettings(LayerSettings):
    """Computation and storage of factors.

    Args:
        dtype: Dtype of the factors: ``float32``, ``bfloat16`` or ``float16``.
        split: ``both`` for B = U√Σ and A = √Σ·Vᵀ; ``b`` for B = UΣ and A = Vᵀ.
        recover: Whether to factor the estimated update before rounding where its directions are
            significant.
        match_norm: Whether to lengthen B·A to the norm of ΔW.
    """

    dtype: str = "float32"
    split: Literal["both", "b"] = "both"
    recover: bool = False
    match_norm: bool = False


@dataclass(frozen=True, slots=True)
class ExtractLayer(LayerTask):
    """One matrix, and its place in PEFT.

    Args:
        delta: Its ΔW.
        module: PEFT's name of the module.
        kind: Kind of the module.
        transposed: Whether PEFT's B·A is the transpose of the stored ΔW.
        rank: The rule for its rank.
        weighting: Second moments of its inputs, or of its inputs and output gradients, for factors
            that are best in this metric; None for the Frobenius norm.
    """

    module: str
    kind: Kind
    transposed: bool
    rank: Rank
    weighting: Weighting | None = None


def estimate_bytes(layer: ExtractLayer, settings: ExtractionSettings) -> int:
    """Estimate the memory of factoring a layer in bytes: ΔW, its metric, and recovery."""
    needed = bytes_of(layer.delta, _make_allowance(layer, settings)) + weighting_bytes(
        layer.weighting, layer.shape
    )
    if settings.recover and isinstance(layer.delta, StoredDelta):
        needed += recovery_bytes(layer.shape, settings.memory)
    return needed


def _make_allowance(layer: ExtractLayer, settings: ExtractionSettings) -> Allowance | None:
    """Return the memory and the number of values for decomposing ΔW; None without a limit.

    All values are needed where the rank depends on them.
    """
    if settings.memory is None:
        return None
    memory = settings.memory - weighting_bytes(layer.weighting, layer.shape)
    return Allowance(memory, settings.method, layer.rank.at_most or None, vectors=True)


def extract(
    layer: ExtractLayer, settings: ExtractionSettings, store: Store
) -> Extraction | LeftOut:
    """Factor one ΔW by its truncated singular value decomposition, ΔW ≈ U_r Σ_r V_rᵀ = B·A.

    In the metric of the data, with L·Lᵀ = C = E[xxᵀ] and U_r the left singular vectors of ΔW·L, B·A
    = U_rU_rᵀΔW has the smallest E‖(ΔW − B·A)x‖² of its rank: (U_rU_rᵀΔW)L = (ΔW·L)_r, the nearest
    matrix of rank r. No root of C is inverted, so C may be singular and no damping is needed. With
    K·Kᵀ = G on the other side, B·A = K^{-T}U_rU_rᵀKᵀΔW with U_r of KᵀΔW·L has the smallest ‖G^½(ΔW
    − B·A)C^½‖; K is inverted on the eigenvalues of G above 1e-7 of the largest.

    Args:
        layer: The layer.
        settings: Settings of the extraction.
        store: Writes B ``(out, r)`` and A ``(r, in)``, in PEFT's orientation, to a file, and
            returns them as stored.

    Returns:
        The record, with ε of the stored factors; or why there are none: an entry that is not
            finite, or rank 0.
    """
    return measure_on_device(partial(_extract, layer, settings, store), settings.device)


def _extract(
    layer: ExtractLayer, settings: ExtractionSettings, store: Store, device: torch.device
) -> Extraction | LeftOut:
    change = load_change(layer.delta, device, allowance=_make_allowance(layer, settings))
    if change.non_finite is not None:
        return not_finite(layer.delta, change.non_finite)
    if change.is_unrelated(layer.shape):
        detail = "TUNED is unrelated to BASE here, so that their difference is no update"
        return leave_out(layer.delta, "unrelated", detail, fro=change.fro, base_fro=change.base_fro)
    weighted = data = lengthened = hidden = None
    if layer.weighting is not None:
        weighted = weigh(change, layer.delta, layer.weighting, device)
    as_stored = change
    if settings.recover and isinstance(layer.delta, StoredDelta) and change.fro:
        change, hidden = _estimate_before_rounding(change, layer.delta, settings, device)
    decomposed = change if weighted is None else weighted.change
    best, spectrum = _decompose(decomposed, layer, settings, weighted, hidden)
    if not math.isfinite(best.fro):
        return not_finite(layer.delta, PRODUCT_OVERFLOW)
    rank = int((best.s > NUMERICALLY_ZERO * best.s[:1]).sum())
    if rank == 0 or best.fro == 0.0:
        plain_fro = best.fro if weighted is None else weighted.plain_fro
        return _explain_missing_factors(layer, change, plain_fro, best.fro)
    plain = factors = best
    if change is not as_stored:
        spectrum = as_stored.decompose(settings.method, tol=settings.tol, seed=settings.seed)
    if weighted is not None:
        factors = _project(change, best, rank, weighted)
        plain = spectrum = change.decompose(
            settings.method, rank, False, settings.tol, settings.seed
        )
    if layer.rank.directions:
        factors, rank = _select(best, layer), len(layer.rank.directions)
    curve = _compute_curve(plain, rank)
    if settings.match_norm:
        lengthened = plain.fro / float(torch.linalg.vector_norm(factors.s[:rank]))
        factors = replace(factors, s=factors.s * lengthened)
    b, a = _store_factors(factors, rank, layer, settings, store)
    if weighted is not None:
        data = _error_on_data(weighted, best, rank, (b.to(device), a.to(device)), layer)
    return Extraction(
        cosine_to_base=change.cosine_to_base,
        layer=layer.layer,
        shape=layer.shape,
        module=layer.module,
        kind=layer.kind,
        rank=rank,
        params=rank * sum(layer.shape),
        kept=float(curve[-1]),
        energy_error=plain.energy_error,
        epsilon=_compute_gap(change, b.to(device), a.to(device), layer.shape) / plain.fro,
        epsilon_min=math.sqrt(1 - float(curve[-1])),
        lengthened=lengthened,
        places=tuple(place for place, _ in layer.rank.directions) or None,
        fro=plain.fro,
        base_fro=change.base_fro,
        dtype=settings.dtype,
        method=best.method,
        blocks=change.row_blocks,
        resolution=resolution(as_stored.rounding, spectrum),
        hidden=hidden,
        data=data,
    )


def _select(factors: Factors, layer: ExtractLayer) -> Factors:
    """Return the chosen singular directions.

    Raises:
        InputError: The update has other singular values than those that were chosen.
    """
    places = [place for place, _ in layer.rank.directions]
    for place, sigma in layer.rank.directions:
        found = float(factors.s[place]) if place < len(factors.s) else 0.0
        if abs(found - sigma) > SAME_SIGMA * float(factors.s[0]):
            problem = (
                f"its singular value {place + 1} is {found:.4g}, but {sigma:.4g} in the results"
            )
            raise InputError(layer.layer, problem, "give $directions measured on the same update")
    u, vh = factors.vectors
    return replace(factors, s=factors.s[places], u=u[:, places], vh=vh[places])


def _store_factors(
    factors: Factors, rank: int, layer: ExtractLayer, settings: ExtractionSettings, store: Store
) -> tuple[Tensor, Tensor]:
    """Write the factors of a layer, and return them as stored, with B·A as ΔW is stored in BASE.

    Raises:
        InputError: The dtype cannot hold them.
    """
    parts = split_factors(factors, rank, layer.transposed, settings.split)
    b, a = store(*(part.to(dtype=getattr(torch, settings.dtype)).cpu() for part in parts))
    if not (torch.isfinite(b).all() and torch.isfinite(a).all()):
        fix = "use $adapter_dtype float32"
        if settings.dtype == "float32":
            fix = "exclude it with $exclude"
        raise InputError(layer.layer, f"{settings.dtype} cannot hold its factors", fix)
    return (a.T, b.T) if layer.transposed else (b, a)


def _estimate_before_rounding(
    change: Change, delta: StoredDelta, settings: ExtractionSettings, device: torch.device
) -> tuple[Change, Hidden]:
    """Return E[X | cells] if directions are significant, else ``change``; and the record of the
    estimate.
    """
    assert change.fro is not None
    estimate = recover_layer(
        delta, change.fro, DEFAULT_RANKS, settings.seed, device, settings.memory
    )
    if estimate.hidden.status != "recovered":
        return change, estimate.hidden
    mean = estimate.change(settings.memory)
    new = replace(
        change, fro=mean.fro, matrix=mean.matrix, streamed=mean.streamed, limit=mean.limit
    )
    return new, estimate.hidden


def _compute_curve(factors: Factors, rank: int) -> NDArray[np.float64]:
    """Return C(1), …, C(rank)."""
    return energy_curve(
        factors.s[:rank].numpy(), factors.fro, factors.complete and rank == len(factors.s)
    )


def _project(change: Change, best: Factors, rank: int, weighted: Weighted) -> Factors:
    """Return the decomposition of U_rU_rᵀΔW, or of ΔW·V_rV_rᵀ if C belongs to the rows.

    With K·Kᵀ = G on the other side, of K^{-T}U_rU_rᵀKᵀΔW, or of ΔW·K·V_rV_rᵀK^{-1}.
    """
    on_rows, (u, vh) = weighted.roots[0].on_rows, best.vectors
    vectors = vh[:rank].T if on_rows else u[:, :rank]
    inside = outside = vectors
    for k in weighted.roots[1:]:
        inside, outside = k.matrix @ vectors, k.inverse @ vectors
    if change.factors is not None:
        left, right = (factor.to(torch.float64) for factor in change.factors)
    else:
        assert change.matrix is not None
        left, right = change.matrix.to(torch.float64), None
    if on_rows:
        inner = left @ (inside if right is None else right @ inside)
        return decompose_factored(inner, outside.T, vectors=True)
    outer = inside.T @ left
    return decompose_factored(outside, outer if right is None else outer @ right, vectors=True)


def _error_on_data(
    weighted: Weighted,
    best: Factors,
    rank: int,
    factors: tuple[Tensor, Tensor],
    layer: ExtractLayer,
) -> OnData:
    """Return the error of the stored factors in the data metric or the K-FAC metric."""
    kept = float(_compute_curve(best, rank)[-1])
    written = Change(None, None, factors=factors)
    for root in weighted.roots:
        written = times(written, root.matrix, root.on_rows)
    stored = written.factors
    assert stored is not None
    return OnData(
        metric="data" if len(weighted.roots) == 1 else "kfac",
        fro=best.fro,
        kept=kept,
        energy_error=min(1.0, best.energy_error + weighted.error),
        epsilon=_compute_gap(weighted.change, *stored, layer.shape) / best.fro,
        epsilon_min=math.sqrt(1 - kept),
    )


def _decompose(
    change: Change,
    layer: ExtractLayer,
    settings: ExtractionSettings,
    weighted: Weighted | None,
    hidden: Hidden | None,
) -> tuple[Factors, Factors]:
    """Return the kept singular values with vectors, and all values of ``change``; for a given r,
    the kept ones twice.

    All values decide how many are kept, except of a recovered update: there the values of its
    estimate do.
    """
    if layer.rank.at_most is not None:
        factors = _compute_vectors(change, min(layer.rank.at_most, *layer.shape), settings)
        return factors, factors
    spectrum = change.decompose(
        settings.method if settings.method != "krylov" else "auto", seed=settings.seed
    )
    rank = 0
    if hidden is not None and hidden.status == "recovered":
        values = np.array(hidden.values_estimate or ())
        curve = np.cumsum((values / (hidden.fro_estimate or math.inf)) ** 2)
        rank = (
            len(values)
            if layer.rank.energy is None
            else rank_at(curve, layer.rank.energy) or len(values)
        )
    elif spectrum.fro > 0 and layer.rank.energy is not None:
        curve = energy_curve(spectrum.s.numpy(), spectrum.fro, spectrum.complete)
        rank = rank_at(curve, layer.rank.energy) or len(spectrum.s)
    elif spectrum.fro > 0:
        gains = weighted.gains if weighted is not None else None
        signal = resolution(change.rounding, spectrum, gains).signal_rank
        rank = len(spectrum.s) if signal is None else signal
    return _compute_vectors(change, rank, settings, spectrum), spectrum


def _compute_vectors(
    change: Change, rank: int, settings: ExtractionSettings, spectrum: Factors | None = None
) -> Factors:
    """Return the ``rank`` largest singular values with their vectors; none for rank 0."""
    if rank == 0:
        empty = torch.zeros(0, dtype=torch.float64)
        fro = spectrum.fro if spectrum is not None else fro_of(change)
        return Factors(empty, False, "none", 0.0, fro)
    return change.decompose(settings.method, rank, True, settings.tol, settings.seed)


def split_factors(
    factors: Factors, rank: int, transposed: bool, split: str
) -> tuple[Tensor, Tensor]:
    """Return B ``(out, rank)`` and A ``(rank, in)`` in PEFT's orientation, float64; ``split`` as in
    the settings.
    """
    left, right = factors.vectors[0][:, :rank], factors.vectors[1][:rank]
    if transposed:
        left, right = right.T, left.T
    s = factors.s[:rank].to(left.device)
    if split == "b":
        return left * s, right
    return left * s.sqrt(), s.sqrt()[:, None] * right


def _compute_gap(change: Change, b: Tensor, a: Tensor, shape: tuple[int, int]) -> float:
    """Return ‖ΔW − B·A‖_F."""
    if change.factors is not None:
        return frobenius_distance(change.factors, (b, a))
    b, a = b.to(torch.float64), a.to(torch.float64)
    distance, row = 0.0, 0
    for block in change.blocks(shape, PARTS):
        distance = math.hypot(
            distance, norm([torch.addmm(block, b[row : row + len(block)], a, alpha=-1)])
        )
        row += len(block)
    return distance


def measure_left_out(delta: Delta, detail: str, device: str) -> LeftOut:
    """Return the record of a matrix without factors: with the norm of its change, or an entry that
    is not finite.
    """
    change = load_change(delta, resolve_device(device), keep=False)
    if change.non_finite is not None:
        return not_finite(delta, change.non_finite)
    return leave_out(delta, "no_factors", detail, fro=fro_of(change), base_fro=change.base_fro)


def _explain_missing_factors(
    layer: ExtractLayer, change: Change, fro: float, weighted_fro: float
) -> LeftOut:
    """Return the record of a layer whose rank is 0, with the reason.

    Args:
        layer: The layer.
        change: Its update.
        fro: ‖ΔW‖_F.
        weighted_fro: Norm of ΔW in the data or K-FAC metric; ``fro`` without one.
    """
    if fro == 0.0:
        detail = "its update is zero"
    elif weighted_fro == 0.0:
        detail = "its update does not change its output on this text"
    elif layer.rank.signal:
        detail = "no singular value is above the rounding noise of the files"
    else:
        detail = "its allocated rank is 0"
    return leave_out(layer.delta, "rank_0", detail, fro=fro, base_fro=change.base_fro)
