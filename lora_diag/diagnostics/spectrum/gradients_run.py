"""``gradient-spectrum``: the spectrum of the gradients of all steps, before any update exists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_diag.checkpoints import open_checkpoint
from lora_diag.deltas import Pairing, Unpaired, selector
from lora_diag.diagnostics.spectrum.gradients import covariance, size
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.diagnostics.spectrum.task import SpectrumSettings
from lora_diag.errors import NothingComparedError, UsageError
from lora_diag.gradients import History, histories, open_steps
from lora_diag.records import LeftOut, Results
from lora_diag.running.gradients import describe_steps
from lora_diag.running.inputs import describe
from lora_diag.running.layers import LayerRun
from lora_diag.running.measuring import record_unpaired

NOT_SELECTED = "left out by --layers or --exclude"


def gradient_spectrum(
    run: LayerRun, base: Path | str | None, gradients: Sequence[Path | str], settings: SpectrumSettings
) -> Results[Spectrum]:
    """Measure the spectrum of the gradients of every matrix; see ``spectrum``.

    Raises:
        UsageError: The requested method does not apply.
        InputError: An input cannot be read.
        NothingComparedError: No gradient of a matrix exists or is selected.
    """
    if settings.method not in {"auto", "gram"}:
        raise UsageError(f"--method {settings.method}: gradients are summed up as Gram matrices; use auto or gram")
    chosen = selector(run.options["layers"], run.options["exclude"])
    steps = open_steps(gradients)
    checkpoint = open_checkpoint(base) if base is not None else None
    followed, rest = histories(steps, checkpoint)
    tasks = [history for history in followed if chosen(history.layer)]
    if not tasks:
        raise NothingComparedError("no gradient of a matrix of BASE was found, or none is selected")
    shapes = {item.layer: item.shape for item in followed} | {item.layer: item.shape for item in rest}
    unpaired = [
        *(item for item in rest if chosen(item.layer)),
        *(Unpaired(name, shape, "not_selected", NOT_SELECTED) for name, shape in shapes.items() if not chosen(name)),
    ]
    verify = run.options["verify"]
    return run.over(
        tasks,
        _measure_layer,
        size,
        settings,
        lambda layout, _, __: record_unpaired(Pairing((), tuple(unpaired)), layout, run.where.here),
        (
            *([describe("base", checkpoint, verify=verify)] if checkpoint is not None else []),
            describe_steps(gradients, steps, verify),
        ),
        {"ranks": list(settings.ranks), "source": "gradients", "top": settings.top},
        recorded=("layers", "exclude", "top", "device"),
    )


def _measure_layer(history: History, settings: SpectrumSettings) -> tuple[Spectrum | LeftOut]:
    return (covariance(history, settings),)
