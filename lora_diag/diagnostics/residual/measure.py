"""Measurement of ``residual``: the distance of adapters from a full fine-tune, by comparison of
their ΔW.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, Unpack

import torch

from lora_diag.adapters import Adapter
from lora_diag.deltas import (
    Delta,
    FactoredDelta,
    Pairing,
    StoredDelta,
    Unpaired,
    drop_base,
    footprint,
)
from lora_diag.diagnostics.residual import ResidualOptions
from lora_diag.diagnostics.residual.record import Distance, Expected, Residual
from lora_diag.errors import UsageError
from lora_diag.layers.change import Change, load_change, measure_on_device, why_not_comparable
from lora_diag.layers.metric import Metric, MomentLocation, agreement, read_root, times
from lora_diag.layers.recovery import DEFAULT_RANKS, recover_layer, recovery_bytes
from lora_diag.layers.resolution import resolution
from lora_diag.layers.task import LayerSettings, LayerTask, not_finite
from lora_diag.linalg.distance import compare_blocks
from lora_diag.linalg.exact import Factors, numerical_rank
from lora_diag.linalg.methods import Allowance, check_request
from lora_diag.metrics.subspaces import Distances, compute_distances
from lora_diag.records import Agreement, LeftOut, Results, RunInput
from lora_diag.running.inputs import Comparison, refuse_repeated, second_moments
from lora_diag.running.layers import LayerRun
from lora_diag.running.options import show_options

Role = Literal["adapter", "reference"]

# Number of singular vectors to compare if no adapter determines it.
SUBSPACE = 8


@dataclass(frozen=True, slots=True)
class ComparedUpdate:
    """An update that is compared with the full fine-tune in one layer.

    Args:
        name: The adapter's or the reference's path.
        role: ``adapter`` or ``reference``.
        delta: Its ΔW; None if it has none of the layer.
    """

    name: str
    role: Role
    delta: Delta | None


@dataclass(frozen=True, slots=True)
class ResidualLayer(LayerTask):
    """One layer of a full fine-tune, and the updates compared with it.

    Args:
        updates: The adapters and the reference, in order.
        moments: Location of C of the layer's input; None without one.
        recover: Whether to estimate the update before rounding.
    """

    updates: tuple[ComparedUpdate, ...]
    moments: MomentLocation | None = None
    recover: bool = False


def estimate_bytes(layer: ResidualLayer, settings: LayerSettings) -> int:
    """Estimate the memory of measuring a layer in bytes: D, the largest X, the data metric, and
    cells.

    With a memory limit, the limit: it is what the measurement may take.
    """
    if settings.memory is not None:
        # D alone may need this, and the ranks of the others are unknown before they are read.
        return settings.memory
    needed = footprint(layer.delta) + _estimate_weighting_bytes(layer)
    needed += max((footprint(update.delta) for update in layer.updates if update.delta), default=0)
    if layer.recover and isinstance(layer.delta, StoredDelta):
        needed += recovery_bytes(layer.shape)
    return needed


def _estimate_weighting_bytes(layer: ResidualLayer) -> int:
    """Estimate the memory of the data metric in bytes: a root and its eigenvectors, D and X times
    the root.
    """
    order = layer.moments.size if layer.moments else 0
    return 8 * order * (3 * order + 2 * max(layer.shape))


def _make_allowance(layer: ResidualLayer, top: int, settings: LayerSettings) -> Allowance | None:
    """Return the allowance for D, half of the memory if a dense X is in memory with it; None
    without a limit.
    """
    if settings.memory is None:
        return None
    limit = settings.memory - _estimate_weighting_bytes(layer)
    deltas = [update.delta for update in layer.updates if update.delta is not None]
    if not all(isinstance(delta, FactoredDelta) for delta in deltas):
        limit //= 2
    return Allowance(limit, settings.method, top, vectors=True)


def measure_layer(layer: ResidualLayer, settings: LayerSettings) -> tuple[Residual | LeftOut, ...]:
    """Compare every adapter with the full fine-tune in one layer.

    Args:
        layer: The layer.
        settings: Settings of the measurement.

    Returns:
        One record for each adapter and reference; if the fine-tune is not finite or its norm out of
            range, a
        single ``left_out`` record, and if an adapter or reference is, one in place of its record.
    """
    return measure_on_device(partial(_measure_residual, layer, settings), settings.device)


def _measure_residual(
    layer: ResidualLayer, settings: LayerSettings, device: torch.device
) -> tuple[Residual | LeftOut, ...]:
    """Return the records of a layer as ``measure_layer`` does, measured on this device."""
    # Thin factors are all read at once, because the largest rank determines how much of D is
    # needed; others one by one.
    thin = {
        each.name: load_change(each.delta, device)
        for each in layer.updates
        if isinstance(each.delta, FactoredDelta)
    }
    top = min(max([SUBSPACE, *map(_count_columns, thin.values())]), *layer.shape)
    allowance = _make_allowance(layer, top, settings)
    full = load_change(layer.delta, device, allowance=allowance)
    if full.non_finite is not None:
        return (not_finite(layer.delta, full.non_finite),)
    weight_metric = Metric(full, _decompose(full, top, settings), layer.shape)
    if problem := why_not_comparable(weight_metric.factors.fro):
        return (not_finite(layer.delta, problem),)
    data_metric = None
    if layer.moments is not None:  # distances are those of D·L, with L·Lᵀ = C
        root, on_rows = read_root(layer.moments, device).matrix, layer.moments.on_rows
        weighted = times(full, root, on_rows)
        data_metric = Metric(
            weighted, _decompose(weighted, top, settings, vectors=False), layer.shape, root, on_rows
        )
    before_rounding = _estimate_before_rounding(layer, full, settings, device)
    records: list[Residual | LeftOut] = []
    for update in layer.updates:
        change = thin.get(update.name)
        if change is None and update.delta is not None:
            change = load_change(update.delta, device, allowance=allowance)
        record = _make_record(
            layer, update, change, weight_metric, data_metric, before_rounding, settings
        )
        del change  # frees a dense X before the next is read
        if isinstance(record, str):
            left_out = not_finite(layer.delta, record)
            detail = f"{update.name}: {left_out.detail}"
            records.append(left_out.model_copy(update={"detail": detail}))
        else:
            records.append(record)
    return tuple(records)


def _make_record(
    layer: ResidualLayer,
    update: ComparedUpdate,
    change: Change | None,
    weight_metric: Metric,
    data_metric: Metric | None,
    before_rounding: BeforeRounding | None,
    settings: LayerSettings,
) -> Residual | str:
    """Return the record of one adapter or reference; if its update is not finite or not comparable,
    why.
    """
    if change is not None and change.non_finite is not None:
        return change.non_finite
    is_matrix, factors = layer.delta.is_matrix, weight_metric.factors
    rank = None  # of a 1-D tensor, and of an X without factors
    if is_matrix and (change is None or isinstance(update.delta, FactoredDelta)):
        rank = 0 if change is None else _count_columns(change)
    distances, norm = weight_metric.distances(change, rank)
    if problem := why_not_comparable(norm):
        return problem
    column_space = row_space = data = hidden = file_resolution = None
    if is_matrix and change is not None and norm > 0 and factors.fro > 0:
        column_space, row_space = _measure_agreements(weight_metric, change, rank, settings)
    if data_metric is not None:
        weighted, _ = data_metric.distances(change, rank)
        data = Distance(**_add_energy_error(weighted, data_metric.factors))
    if before_rounding is not None:
        hidden = before_rounding.distance(change, layer.shape)
    is_noise = False
    if is_matrix:
        file_resolution = resolution(weight_metric.change.rounding, factors)
        is_noise = file_resolution.verdict == "unresolved" and distances.epsilon is not None
    distance_fields = _add_energy_error(distances, factors)
    record = Residual(
        cosine_to_base=weight_metric.change.cosine_to_base,
        layer=layer.layer,
        shape=layer.shape if is_matrix else layer.shape[1:],
        adapter=update.name,
        role=update.role,
        rank=rank,
        fro=factors.fro,
        base_fro=weight_metric.change.base_fro,
        adapter_fro=norm,
        method=factors.method,
        blocks=weight_metric.change.row_blocks,
        column_space=column_space,
        row_space=row_space,
        data=data,
        before_rounding=hidden,
        limited_by="noise" if is_noise else Distance(**distance_fields).limit,
        resolution=file_resolution,
        **distance_fields,
    )
    # ε from a difference of unrelated weights has no cause in the adapter.
    if record.lineage == "unrelated":
        return record.model_copy(update={"limited_by": None})
    return record


@dataclass(frozen=True, slots=True)
class BeforeRounding:
    """The estimated update before rounding.

    Args:
        mean: E[X | cells].
        fro: √E[‖X‖² | cells].
    """

    mean: Change
    fro: float

    def distance(self, change: Change | None, shape: tuple[int, int]) -> Expected:
        """Return the expected distance of an adapter: E‖X − B·A‖² = ‖E[X] − B·A‖² + E‖X‖² −
        ‖E[X]‖².
        """
        gap, norm, inner = self.fro, 0.0, 0.0
        if change is not None:
            near, norm, inner = compare_blocks(
                zip(self.mean.blocks(shape), change.blocks(shape), strict=True)
            )
            hidden = max(0.0, self.fro**2 - (self.mean.fro or 0.0) ** 2)
            gap = math.hypot(near, math.sqrt(hidden))
        return Expected(**asdict(compute_distances(self.fro, norm, gap, inner, None)), fro=self.fro)


def _estimate_before_rounding(
    layer: ResidualLayer, full: Change, settings: LayerSettings, device: torch.device
) -> BeforeRounding | None:
    """Return the update before rounding; None where it was not requested, is not hidden, or cannot
    be estimated.
    """
    delta = layer.delta
    if not layer.recover or not isinstance(delta, StoredDelta):
        return None
    if not delta.is_matrix or not full.fro:
        return None
    memory = settings.memory
    recovered = recover_layer(delta, full.fro, DEFAULT_RANKS, settings.seed, device, memory)
    if recovered.cells is None:
        return None
    return BeforeRounding(recovered.change(memory), recovered.norm())


def _add_energy_error(distances: Distances, factors: Factors) -> dict[str, float | None]:
    """Return the fields of a ``Distance``; the error is None without a lower bound."""
    return asdict(distances) | {
        "energy_error": None if distances.epsilon_min is None else factors.energy_error
    }


def _decompose(change: Change, top: int, settings: LayerSettings, vectors: bool = True) -> Factors:
    """Return the largest singular values of an update, by default with vectors."""
    return change.decompose(settings.method, top, vectors, settings.tol, settings.seed)


def _count_columns(change: Change) -> int:
    """Return the number of columns of B; 0 without factors."""
    return change.factors[0].shape[1] if change.factors is not None else 0


def _measure_agreements(
    weight_metric: Metric, change: Change, rank: int | None, settings: LayerSettings
) -> tuple[Agreement, Agreement]:
    """Return the agreement of the column spaces of D and X, and that of their row spaces.

    Args:
        weight_metric: D, with singular vectors.
        change: X.
        rank: Columns of the factors of X; None without factors.
        settings: Settings of the measurement.
    """
    dimension = min(rank or SUBSPACE, *weight_metric.shape)
    full = weight_metric.factors
    adapter = _decompose(change, dimension, settings)
    k = min(dimension, numerical_rank(full))
    j = numerical_rank(adapter)
    u, vh = full.vectors
    adapter_u, adapter_vh = adapter.vectors
    return agreement(u[:, :k], adapter_u[:, :j]), agreement(vh[:k].T, adapter_vh[:j].T)


@show_options
def residual(
    base: Path | str,
    tuned: Path | str,
    adapters: Sequence[Path | str] = (),
    **options: Unpack[ResidualOptions],
) -> Results[Residual]:
    r"""Measure the distance of adapters from a full fine-tune: ε = ‖ΔW_FT − ΔW_adapter‖_F /
    ‖ΔW_FT‖_F, by layer.

    Without a memory limit, ΔW_FT is computed once per layer, independent of the number of adapters.

    Args:
        base: Base checkpoint.
        tuned: Full fine-tune that gives D; may be an adapter.
        adapters: Adapters, or checkpoints with a merged adapter.
        reference: Another full fine-tune, such as another seed, to show the distance between
            equally good solutions; None for none.
        activations: Second moments C = E[xxᵀ] of the layers' inputs: a safetensors file with one
            ``(in, in)`` matrix under each weight's name, as ``probe_activations`` writes it.
            Distances are then also given in the norm ‖·C^½‖_F. None for the Frobenius norm only.
        recover: Estimate the update before rounding, as ``recover`` does, and give the expected
            distance to it, too.
        **options: ``ResidualOptions``.

    Returns:
        One record for each layer of ``tuned`` and each adapter or reference, including layers that
            it does not change,
        and norms and biases, which have no rank. What cannot be measured is in ``left_out``.

    Raises:
        UsageError: An option is invalid, there is nothing to compare with ``tuned``, an input is
            given twice or in the wrong place, or ``output`` may be neither replaced nor resumed.
        InputError: An input cannot be read or does not fit ``base``, or the results file cannot be
            written.
        NothingComparedError: The sides have no weight in common, or none is selected; or no matrix
            is, with ``activations``.

    Example:
        >>> names = ("base", "full_ft", "lora_r16")
        >>> base, tuned, adapter = (f"sample_checkpoints/{name}" for name in names)
        >>> found = residual(base, tuned, [adapter], layers=r"layers\.0\..*q_proj")
        >>> found.layers[0].rank, found.layers[0].epsilon > found.layers[0].epsilon_min
        (16, True)
    """
    run = LayerRun("residual", options, ResidualOptions)
    reference, activations = run.options["reference"], run.options["activations"]
    recover = run.options["recover"]
    check_request(run.options["svd"], 1, run.options["tol"])
    others: list[tuple[Path | str, Role]] = [(path, "adapter") for path in adapters]
    if reference is not None:
        others.append((reference, "reference"))
    if not others:
        raise UsageError(
            "residual",
            "nothing to compare with TUNED",
            "give at least one ADAPTER, or another full fine-tune with $reference",
        )
    refuse_repeated([path for path, _ in others], tuned)
    full = run.compare(base, tuned)
    assert full.base is not None
    comparisons = [run.compare(full.base, path, role) for path, role in others]
    moments = None
    if activations is not None:
        moments = second_moments(activations, full.base, full.pairing, run.options["verify"])
    by_layer = [
        {delta.layer: drop_base(delta) for delta in comparison.pairing.deltas}
        for comparison in comparisons
    ]
    tasks = [
        ResidualLayer(
            delta,
            tuple(
                ComparedUpdate(comparison.inputs[-1].path, role, deltas.get(delta.layer))
                for (_, role), comparison, deltas in zip(others, comparisons, by_layer, strict=True)
            ),
            moments.of.get(delta.layer) if moments else None,
            recover,
        )
        for delta in full.pairing.deltas
    ]
    return run.over(
        tasks,
        measure_layer,
        estimate_bytes,
        run.settings(LayerSettings),
        Pairing((), (*full.pairing.unpaired, *_list_unmatched(full.pairing, comparisons))),
        (
            *_note_tuned(full, comparisons),
            *(comparison.inputs[-1] for comparison in comparisons),
            *((moments.described,) if moments else ()),
        ),
        {"recover": True} if recover else {},
        rest=_find_rest,
    )


def _note_tuned(full: Comparison, comparisons: Sequence[Comparison]) -> tuple[RunInput, ...]:
    """Return the inputs BASE and TUNED; with a note if TUNED may be one of the adapters, given in
    its place.
    """
    if not all(isinstance(comparison.update, Adapter) for comparison in (full, *comparisons)):
        return full.inputs
    *before, tuned = full.inputs
    note = (
        "an adapter in the place of TUNED: distances are from this adapter, not from a full "
        "fine-tune"
    )
    return (*before, tuned.model_copy(update={"notes": (*tuned.notes, note)}))


def _find_rest(task: ResidualLayer, records: Sequence[Residual]) -> ResidualLayer | None:
    """Return a layer with those of its updates that have no record; None if all have one."""
    done = {record.adapter for record in records}
    updates = tuple(update for update in task.updates if update.name not in done)
    return replace(task, updates=updates) if updates else None


def _list_unmatched(full: Pairing, comparisons: Sequence[Comparison]) -> Iterator[Unpaired]:
    """Yield the tensors of the adapters and the reference that are neither compared nor skipped
    tensors of TUNED.
    """
    full_layers = {each.layer for each in (*full.deltas, *full.unpaired)}
    for comparison in comparisons:
        path = comparison.inputs[-1].path
        for delta in comparison.pairing.deltas:
            if delta.layer not in full_layers:
                detail = f"{path} changes it, but TUNED does not contain it"
                yield Unpaired(delta.layer, delta.shape, "only_in_adapter", detail)
        for tensor in comparison.pairing.unpaired:
            if tensor.layer not in full_layers:
                yield replace(tensor, detail=f"{path}: {tensor.detail}")
