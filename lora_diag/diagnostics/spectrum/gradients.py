"""``spectrum --gradients``: the spectrum of a layer's gradients of all steps, before any update
exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lora_diag.adapters import locate
from lora_diag.deltas import Pairing, Unpaired, selector
from lora_diag.diagnostics.spectrum import SpectrumOptions
from lora_diag.diagnostics.spectrum.record import GradientStack, Spectrum
from lora_diag.diagnostics.spectrum.values import SpectrumSettings, record_of
from lora_diag.errors import Given, NothingComparedError, UsageError
from lora_diag.gradients import History, histories, open_steps
from lora_diag.layers.change import SPACING_OVERFLOW, compute_on_device
from lora_diag.layers.resolution import make_resolution, noise_of
from lora_diag.linalg.devices import move, resolve_device
from lora_diag.linalg.difference import first_non_finite, norm
from lora_diag.linalg.exact import Factors, decompose_stack, rounding_threshold
from lora_diag.linalg.methods import READING_BYTES, require_memory
from lora_diag.linalg.rounding import Spacing, mix_profiles
from lora_diag.linalg.streamed import ROWS
from lora_diag.records import LeftOut, Results
from lora_diag.running.inputs import describe, describe_steps, open_base
from lora_diag.running.layers import LayerRun

# Largest order of the larger side's Gram matrix: it takes 128 MiB, and its eigenvalues take 2 s.
OTHER_GRAM_UP_TO = 4096


class _NotFiniteError(Exception):
    """An entry of a gradient is not finite, or a norm or the spacing overflows; the message says
    which.
    """


def max_bytes(history: History) -> int:
    """Return an upper bound of the memory of a layer in bytes: one gradient, and the largest Gram
    matrix computed.

    Example:
        >>> round(max_bytes(History("w", (4096, 4096), ())) / 2**20)
        384
    """
    order = max(history.shape) if max(history.shape) <= OTHER_GRAM_UP_TO else min(history.shape)
    entry = 8 if "float64" in history.dtypes else 4
    return READING_BYTES + entry * math.prod(history.shape) + 16 * order * (order + ROWS)


def measure_gradients(history: History, settings: SpectrumSettings) -> tuple[Spectrum | LeftOut]:
    """Measure the spectrum of the gradients of one layer.

    ΣG_tG_tᵀ and ΣG_tᵀG_t are the Gram matrices of the gradients concatenated horizontally, [G_1 G_2
    …], and vertically, [G_1; G_2; …]. C(r) of the first is the fraction of Σ‖G_t‖² in the best
    r-dimensional column space common to all steps, C(r) of the second that in the best row space.

    Args:
        history: The layer's gradients.
        settings: Settings of the measurement; ``method``, ``tol`` and ``seed`` are not used.

    Returns:
        The spectrum of the smaller side, with the energy fractions and ranks of the other if that
            is small enough or
        there is a single step; or a ``left_out`` record if a gradient is not finite, or its norm or
            spacing overflows.
    """
    try:
        (smaller, larger, spacing), fallback = compute_on_device(
            partial(_compute, history, settings), resolve_device(settings.device)
        )
    except _NotFiniteError as error:
        return (
            LeftOut(
                layer=history.layer, shape=history.shape, reason="non_finite", detail=str(error)
            ),
        )
    noise = noise_of(mix_profiles([(1 / 12, spacing.profile)], _stacked_shape(history)), 1)
    edge = max(noise.edge, rounding_threshold(smaller))
    rounding_fro = math.sqrt(spacing.squares) / 2
    file_resolution = make_resolution(
        smaller.s.numpy(), smaller.fro, smaller.complete, rounding_fro, noise.fro, edge
    )

    def make_record(factors: Factors) -> Spectrum:
        dtypes = (None, "/".join(history.dtypes))
        return record_of(
            history.layer, history.shape, dtypes, None, factors, settings.ranks, file_resolution
        )

    method = f"{smaller.method} of {len(history.snapshots)} gradients{fallback}"
    other = make_record(larger) if larger is not None else None
    stack = GradientStack(
        steps=tuple(snapshot.step for snapshot in history.snapshots),
        side="left" if history.shape[0] < history.shape[1] else "right",
        other_energy=other.energy if other else None,
        other_rank_at=other.rank_at if other else None,
    )
    record = make_record(replace(smaller, method=method))
    return (record.model_copy(update={"source": "gradients", "stack": stack}),)


def _compute(
    history: History, settings: SpectrumSettings, device: torch.device
) -> tuple[Factors, Factors | None, Spacing]:
    """Return the spectra of the smaller side and, if it is small enough, of the larger, and the
    spacing of the files.

    The gradients are read once for each side: two concurrent Gram matrices would take twice the
    memory. A single gradient has the same spectrum on both sides, and is read once.

    Raises:
        _NotFiniteError: An entry is not finite, or a norm or the spacing overflows.
    """
    if (
        settings.memory is not None and device.type == "cpu"
    ):  # the limit applies to memory of the host
        description = "a gradient and its Gram matrix take"
        require_memory(
            max_bytes(history), settings.memory, history.shape, description, "$exclude it"
        )
    spacing = Spacing.of(_stacked_shape(history))
    left = history.shape[0] < history.shape[1]
    smaller = decompose_stack(_read_gradients(history, device, left, spacing), settings.top)
    if not math.isfinite(spacing.squares):
        raise _NotFiniteError(SPACING_OVERFLOW)
    larger = None
    if len(history.snapshots) == 1:
        larger = smaller
    elif max(history.shape) <= OTHER_GRAM_UP_TO:
        larger = decompose_stack(_read_gradients(history, device, not left, None), settings.top)
    return smaller, larger, spacing


def _read_gradients(
    history: History, device: torch.device, transposed: bool, spacing: Spacing | None
) -> Iterator[Tensor]:
    """Yield G_t, or its transpose, step by step; add the spacing of the stored values to
    ``spacing``, if given.

    Raises:
        _NotFiniteError: An entry is not finite, or the norm of a block of rows overflows.
    """
    rows, columns = history.shape
    stacks_columns = rows < columns  # as in the smaller of both Gram matrices
    for number, snapshot in enumerate(history.snapshots):
        gradient: Tensor | None = None
        row = 0
        for stored in snapshot.blocks(history.shape):
            block = move(stored, device)
            if not math.isfinite(norm([block])):
                problem = (
                    first_non_finite("the gradient holds", block, row)
                    or "the norm of the gradient overflows"
                )
                raise _NotFiniteError(f"step {snapshot.step}: {problem}")
            if gradient is None:
                gradient = torch.empty(history.shape, dtype=block.dtype, device=device)
            gradient[row : row + len(block)] = block
            if spacing is not None:
                above, left = (0, number * columns) if stacks_columns else (number * rows, 0)
                spacing.add(block, row=above + row, column=left)
            row += len(block)
        assert gradient is not None
        yield gradient.T if transposed else gradient


def _stacked_shape(history: History) -> tuple[int, int]:
    """Return the shape of the gradients concatenated vertically, or horizontally if they are wider
    than tall.
    """
    (rows, columns), steps = history.shape, len(history.snapshots)
    return (rows, columns * steps) if rows < columns else (rows * steps, columns)


def gradient_spectrum(
    run: LayerRun[SpectrumOptions], base: Path | str | None, settings: SpectrumSettings
) -> Results[Spectrum]:
    """Measure the spectrum of the gradients of every matrix; see ``spectrum``.

    Raises:
        UsageError: The requested method does not apply, a selection is invalid, ``base`` is an
            adapter or among the gradients, or the output may be neither replaced nor resumed.
        InputError: An input cannot be read; a snapshot has no valid step, or its step or shapes
            contradict those of another; or the results file cannot be written.
        NothingComparedError: No gradient of a matrix exists or is selected.
    """
    if settings.method not in {"auto", "gram"}:
        raise UsageError(
            Given("svd", settings.method),
            "gradients are summed up as Gram matrices",
            "use auto or gram",
        )
    gradients = run.options["gradients"]
    selected = selector(run.options["layers"], run.options["exclude"])
    steps = open_steps(gradients)
    checkpoint = open_base(locate(base)) if base is not None else None
    folders = {file.path.parent for step in steps for file in step.checkpoint.files}
    if checkpoint is not None and any(file.path.parent in folders for file in checkpoint.files):
        raise UsageError(
            base, "is among the gradients", "repeat $gradients for each file, or give their folder"
        )
    matrices, unmatched = histories(steps, checkpoint)
    tasks = [history for history in matrices if selected(history.layer)]
    if not tasks:
        raise NothingComparedError("no gradient of a matrix of BASE was found, or none is selected")
    unpaired = [tensor for tensor in unmatched if selected(tensor.layer)]
    shapes: dict[str, tuple[int, ...]] = {history.layer: history.shape for history in matrices}
    shapes |= {tensor.layer: tensor.shape for tensor in unmatched}
    unpaired += [
        Unpaired.by_selection(name, shape) for name, shape in shapes.items() if not selected(name)
    ]
    verify = run.options["verify"]
    described = [describe("base", checkpoint, verify=verify)] if checkpoint is not None else []
    return run.over(
        tasks,
        measure_gradients,
        lambda history, settings: max_bytes(history),
        settings,
        Pairing((), tuple(unpaired)),
        (*described, describe_steps(gradients, steps, verify)),
        {"ranks": list(settings.ranks), "source": "gradients", "top": settings.top},
        recorded=("layers", "exclude", "top", "device"),
    )
