"""``spectrum --gradients``: what a first-order pilot would show before any update exists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from lora_diag.checkpoints import open_checkpoint
from lora_diag.deltas import Pairing, Unpaired, selector
from lora_diag.diagnostics.spectrum.gradients import covariance, size
from lora_diag.diagnostics.spectrum.measure import SpectrumSettings
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.errors import NothingComparedError, UsageError
from lora_diag.gradients import History, histories, open_steps
from lora_diag.records import LeftOut, Results, ResultsWriter, Run
from lora_diag.running.engines import Ray
from lora_diag.running.gradients import describe_steps
from lora_diag.running.inputs import describe
from lora_diag.running.measuring import Place, Watch, layout_of, measure_layers, not_paired
from lora_diag.version import __version__

NOT_SELECTED = "left out by --layers or --exclude"


def gradient_spectrum(
    base: Path | str | None,
    gradients: Sequence[Path | str],
    settings: SpectrumSettings,
    layers: str | None,
    exclude: str | None,
    workers: int | None,
    memory: int | None,
    output: Path | str | None,
    resume: bool,
    overwrite: bool,
    verify: bool,
    watch: Watch,
    where: Place,
    engine: Ray | None,
) -> Results[Spectrum]:
    """Measure the spectrum of the gradients of every matrix; see ``spectrum``.

    Raises:
        UsageError: A method was asked for that does not apply.
        InputError: An input cannot be read.
        NothingComparedError: There is no gradient of a matrix, or none is selected.
    """
    if settings.method not in {"auto", "gram"}:
        raise UsageError(f"--method {settings.method}: gradients are summed up as Gram matrices; use auto or gram")
    chosen = selector(layers, exclude)
    steps = open_steps(gradients)
    stored = open_checkpoint(base) if base is not None else None
    followed, rest = histories(steps, stored)
    tasks = [history for history in followed if chosen(history.layer)]
    if not tasks:
        raise NothingComparedError("no gradient of a matrix of BASE was found, or none is selected")
    named = {item.layer: item.shape for item in followed} | {item.layer: item.shape for item in rest}
    unpaired = [
        *(item for item in rest if chosen(item.layer)),
        *(Unpaired(name, shape, "not_selected", NOT_SELECTED) for name, shape in named.items() if not chosen(name)),
    ]
    run = Run(
        command="spectrum",
        version=__version__,
        inputs=(
            *([describe("base", stored, verify=verify)] if stored is not None else []),
            describe_steps(gradients, steps, verify),
        ),
        settings={
            "ranks": list(settings.ranks),
            "source": "gradients",
            "layers": layers,
            "exclude": exclude,
            "top": settings.top,
            "device": where.kind,
        },
    )
    layout = layout_of(tasks, workers, where.kind, memory)
    settings = replace(settings, memory=layout.limit)
    with ResultsWriter[Spectrum](output, run, resume, overwrite) as writer:
        return measure_layers(
            writer,
            tasks,
            partial(_one_layer, settings=settings),
            lambda: not_paired(Pairing((), tuple(unpaired)), layout, where.here),
            layout,
            partial(size, settings=settings),
            watch,
            engine,
        )


def _one_layer(history: History, settings: SpectrumSettings) -> tuple[Spectrum | LeftOut]:
    return (covariance(history, settings),)
