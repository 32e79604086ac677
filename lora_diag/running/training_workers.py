"""Training runs as tasks of a cluster: a worker opens the model and the texts, trains, and returns the records.

A task is a small descriptor. What a worker opened is kept for its next tasks. BASE is measured, and a step timed, in
the submitting program.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from lora_diag.checkpoints import Checkpoint
from lora_diag.errors import InputError
from lora_diag.models.data import Texts, read_texts
from lora_diag.models.opening import Model, open_model
from lora_diag.running.engines import Layout, Ray, capacity_of, run_ray

Record = TypeVar("Record")

# A shape and a footprint by which the engine sends every run alone: its cost is above that of a batch of layers.
UNBATCHED_SHAPE, UNBATCHED_BYTES = (2**12, 2**12), 2**40

MEMORY_FIX = "add a node with more, or lower --batch or --length"


@dataclass(frozen=True)
class Site:
    """What a worker opens for training runs.

    Args:
        base: The model.
        device: Its device on the worker.
        dtype: As in ``open_model``.
        length: As in ``open_model``.
        tokenizer: As in ``open_model``.
        texts: The training text, and then the evaluation sets, all without their sequences.
        most: Maximum number of sequences of an evaluation set.
        stored: BASE's files, by which the engine checks that a worker has the same.
    """

    base: str
    device: str
    dtype: str
    length: int | None
    tokenizer: str
    texts: tuple[Texts, ...]
    most: int | None
    stored: Checkpoint = field(compare=False)


@dataclass(frozen=True)
class RunTask:
    """One training run, as the engine takes it.

    Args:
        layer: Its label.
        work: Descriptor of the run.
    """

    layer: str
    work: Any
    shape: tuple[int, ...] = UNBATCHED_SHAPE


@dataclass(frozen=True)
class Workers:
    """The workers of one probe.

    Args:
        site: What each of them opens.
        on: The cluster.
        layout: Its ``budget`` is the number of concurrent runs of a node, in footprints.
        slots: Concurrent runs of the cluster when the probe was started.
    """

    site: Site
    on: Ray
    layout: Layout
    slots: int

    def run(
        self, measure: Callable[[RunTask], Record], runs: Sequence[tuple[str, Any]], poll: Callable[[], None]
    ) -> Iterator[Record]:
        """Yield the records of every run, in the order of the runs.

        Args:
            measure: A function of a module, with its settings bound.
            runs: Label and descriptor of each.
            poll: Called every few seconds; may raise to end all runs.

        Raises:
            LoradiagError: The error of the first failing run, or the cluster was lost.
        """
        tasks = [RunTask(label, work) for label, work in runs]
        return run_ray(measure, tasks, self.layout, lambda task: UNBATCHED_BYTES, self.on, poll, MEMORY_FIX)


def workers_for(site: Site, engine: Ray, concurrent: int | None) -> Workers:
    """Return the workers of a cluster that this process is connected to.

    Args:
        site: What each opens.
        engine: The cluster.
        concurrent: Concurrent runs of a node; None for one, or on GPUs as many as these allow.
    """
    layout = layout_of_runs(concurrent)
    return Workers(site, engine, layout, capacity_of(engine, layout, UNBATCHED_BYTES)[0])


def threads_of_run(engine: Ray, concurrent: int | None) -> int:
    """Return the cores of one run on a cluster that this process is connected to."""
    return capacity_of(engine, layout_of_runs(concurrent), UNBATCHED_BYTES)[1]


def layout_of_runs(concurrent: int | None) -> Layout:
    """Return the allocation of a node to concurrent runs."""
    return Layout(torch.get_num_threads(), (concurrent or 1) * UNBATCHED_BYTES)


def drop_sequences(texts: Texts) -> Texts:
    """Return a text without its sequences: what a worker needs to read it."""
    return replace(texts, sequences=())


# What this process opened last.
_open: tuple[Site, Model, list[Texts]] | None = None


def open_site(site: Site) -> tuple[Model, Texts, list[Texts]]:
    """Return the model, the training text and the evaluation sets; opened once per process.

    Raises:
        InputError: An input cannot be read on this worker, or differs from that of the run.
    """
    global _open
    if _open is None or _open[0] != site:
        _open = None  # two models may not fit
        model = open_model(site.base, torch.device(site.device), site.dtype, site.length, site.tokenizer)
        texts = [_read(source, model, site.most if place else None) for place, source in enumerate(site.texts)]
        _open = (site, model, texts)
    _, model, (text, *sets) = _open
    return model, text, sets


def _read(wanted: Texts, model: Model, max_sequences: int | None) -> Texts:
    texts = read_texts(wanted.path, model, max_sequences, shifted=wanted.shifted)
    if texts.hash != wanted.hash:
        raise InputError(
            f"{wanted.path}: has other contents on the worker on {platform.node()}; put inputs on storage that all "
            "nodes share, or copy the same file to every node"
        )
    return texts
