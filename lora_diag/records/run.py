"""Records of every results file (the run, the skipped tensors, the end), and those that only
``inspect`` prints.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_diag.errors import UsageError
from lora_diag.records.base import SCHEMA, Count, LayerRecord, Norm, Record, Shown, WholeRecord

Reason = Literal[
    "vector",
    "only_in_base",
    "only_in_tuned",
    "not_float",
    "shape_differs",
    "added_rows",
    "removed_rows",
    "empty",
    "not_selected",
    "non_finite",
    "not_in_base",
    "needs_base",
    "only_in_adapter",
    "no_gradient",
    "no_reference",
    "rank_0",
    "no_factors",
    "saved",
    "unreadable",
    "not_in_model",
    "memory",
    "time",
    "no_activations",
    "unrelated",
]


class RunInput(Record):
    r"""One input of a run: its role, path and kind.

    Args:
        role: Its role, such as ``base``, ``tuned``, ``adapter``, ``reference``, ``activations``,
            ``gradients`` or ``eval``.
        path: The path as given; bytes that are not UTF-8 are escaped as ``\xff``.
        kind: Its format, in words.
        tensors: Number of tensors.
        notes: Notes on the input.
        fingerprint: Detects a changed input in ``--resume`` and ``gate``; empty if not computed.
        sha256: Hash of every byte of its files with ``--verify``; for results, the hash in their
            last line; else empty.
        architecture: The model's class in its ``config.json``, such as
            ``BertForSequenceClassification``; empty without one.
        names: Names of a BASE: its folder, its Hub id, the name in its config. For an adapter, the
            name of the base in its config.
        targets: Number of weights of BASE that an adapter's config targets; null if unknown.
        lacking: Targeted weights that the adapter's file does not contain.
        scaling: Smallest and largest scaling s of an adapter's updates, such as α/r; null if
            unknown.
    """

    role: str
    path: str
    kind: str
    tensors: Count
    notes: tuple[str, ...] = ()
    fingerprint: str = ""
    sha256: str = ""
    architecture: str = ""
    names: tuple[str, ...] = ()
    targets: Count | None = None
    lacking: tuple[str, ...] = ()
    scaling: tuple[float, float] | None = None


class Run(Record):
    """First line of a results file: command, inputs and settings.

    Args:
        schema: Version of the fields, 1.
        command: The command, without ``loradiag``; of ``fleet``, ``spectrum --adapters``.
        version: Version of loradiag.
        inputs: The inputs, such as BASE and TUNED.
        settings: The options that affect results.
        made: When the run began, in UTC, such as ``2026-11-27T04:15:19Z``; empty in files of older
            versions. The only field that differs between runs with the same input and settings; set
            by ``SOURCE_DATE_EPOCH``.
    """

    record: Literal["run"] = "run"
    schema_: int = Field(SCHEMA, alias="schema", serialization_alias="schema")
    command: str
    version: str
    inputs: tuple[RunInput, ...]
    settings: dict[str, Any]
    made: str = Field("", pattern=r"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ)?$")


def timestamp() -> str:
    """Return the current time in UTC in the form of ``Run.made``; or ``SOURCE_DATE_EPOCH`` if set.

    Raises:
        UsageError: ``SOURCE_DATE_EPOCH`` is not a number of seconds.

    Reference: https://reproducible-builds.org/specs/source-date-epoch/
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    try:
        moment = datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now(UTC)
    except (ValueError, OverflowError, OSError) as error:
        problem = f"SOURCE_DATE_EPOCH={epoch}: must be a whole number of seconds since 1970"
        raise UsageError(f"{problem}; unset or correct it") from error
    return f"{moment.replace(tzinfo=None).isoformat(timespec='seconds')}Z"


class LeftOut(Record):
    """A tensor, or rows of one, that the command skipped or could not measure.

    Args:
        layer: Its name.
        shape: Its shape; for rows that only one side has, the shape of the rows.
        reason: Machine-readable reason. ``vector``: one dimension, such as norms and biases: it has
            no rank. ``only_in_base``: TUNED does not have it; check that TUNED was saved
            completely. ``only_in_tuned``: BASE does not have it; check that BASE is the model that
            training started from. ``not_float``: its numbers are no floating-point numbers.
            ``shape_differs``: BASE and TUNED store it in different shapes; give two checkpoints of
            one model. ``added_rows``: rows of a vocabulary that TUNED added. ``removed_rows``: rows
            of a vocabulary that TUNED removed. ``empty``: it has no entries. ``not_selected``: left
            out by ``--layers``, ``--exclude`` or another option. ``non_finite``: it has NaN or Inf:
            training diverged, or the file is damaged; do not ship it. ``not_in_base``: BASE has no
            such weight, or not of this shape; give the BASE of the adapter. ``needs_base``: its
            update depends on BASE; give BASE. ``only_in_adapter``: the adapter changes it, and the
            compared checkpoint does not have it. ``no_gradient``: it has no gradient; check that it
            is trained. ``no_reference``: no update whose subspaces could be compared. ``rank_0``:
            no rank was given to it. ``no_factors``: its update cannot be stored as factors.
            ``saved``: it is trained and saved in full (``modules_to_save``). ``unreadable``: the
            file cannot be read; the detail says why. ``not_in_model``: the model has no such
            weight, or does not use it. ``memory``: it needs more than ``--memory``; raise the
            limit. ``time``: ``--time`` was over; resume with more. ``no_activations``: the file of
            activations does not cover its input; collect it with ``probe activations``.
            ``unrelated``: TUNED does not descend from BASE here, so that their difference is no
            update; give the BASE that TUNED was trained from.
        detail: Reason as text.
        fro: ‖ΔW‖_F if it was measured, as of 1-D tensors; for rows that only one side has, their
            norm; else null.
        base_fro: ‖W_base‖_F if it was measured, else null.
        tuned_shape: Its shape in TUNED if different from BASE (``shape_differs``), else null.
    """

    record: Literal["left_out"] = "left_out"
    layer: str
    shape: tuple[int, ...]
    reason: Reason
    detail: str
    fro: Norm | None = None
    base_fro: Norm | None = None
    tuned_shape: tuple[int, ...] | None = None


class End(Record):
    """Last line of a finished results file; without it, the run was interrupted.

    Args:
        layers: Number of layers with records.
        left_out: Number of ``left_out`` records.
        fro: ‖ΔW‖_F over the layers; null if that of any is unknown, or beyond float64.
        base_fro: ‖W_base‖_F over the layers, likewise.
        sha256: Hash of the lines before this one, each with its newline; empty in files of older
            versions.
    """

    record: Literal["end"] = "end"
    layers: Count
    left_out: Count
    fro: Norm | None
    base_fro: Norm | None
    sha256: str = ""


AnyRecord = Run | LayerRecord | WholeRecord | LeftOut | End


def _common_shape(rows: Sequence[Any]) -> str:
    """Return the common shape of the records as text, ``?`` for an unknown size."""
    return "×".join("?" if size is None else str(size) for size in rows[0].shape) or "scalar"


def _count_entries(record: ListedTensor) -> int:
    return math.prod(record.shape)


class ListedTensor(Record):
    """One tensor of a checkpoint, as its header describes it.

    Args:
        layer: Its name.
        shape: Its shape.
        dtype: Stored dtype.
        left_out: Reason why ``spectrum`` would skip it; null if it would not.
    """

    table: ClassVar[tuple[Shown | str, ...]] = (
        Shown("shape", "shape", "Of each", main=True, pool=_common_shape),
        "dtype",
        Shown(
            "shape",
            "entries",
            "Of all",
            main=True,
            form="count",
            pool=lambda rows: sum(map(_count_entries, rows)),
        ),
        Shown("spectrum", "spectrum", "Whether it would be measured", main=True),
    )
    layer: str
    shape: tuple[int, ...]
    dtype: Annotated[str, Shown(main=True)]
    left_out: str | None = None

    @property
    def spectrum(self) -> str:
        """Whether ``spectrum`` would measure it, and why not."""
        return f"no: {self.left_out}" if self.left_out else "yes"


class AdaptedWeight(Record):
    """One weight that an adapter changes.

    Args:
        layer: Its name in the adapter; for stacked experts, one of them.
        shape: ``(out, in)`` in the adapter's orientation; a size that depends on the base is null.
        form: ``factored`` (B·A), ``dense`` (computed in full) or ``value`` (the weight's new
            value).
        dtype: Stored dtype.
        rank: r of its factors; null without factors.
        scaling: Their scaling s; null without one, or if it is stored as a tensor.
        needs_base: Reason why ΔW depends on the base weight, such as ``DoRA``; empty if it does
            not.
    """

    table: ClassVar[tuple[Shown | str, ...]] = (
        "shape",
        "rank",
        "scaling",
        Shown("about", "form", "How it is stored, and what it needs", main=True),
    )
    layer: str
    shape: Annotated[tuple[int | None, ...], Shown(main=True, pool=_common_shape)]
    form: Literal["factored", "dense", "value"]
    dtype: str
    rank: Annotated[int | None, Shown(main=True)] = None
    scaling: Annotated[float | None, Shown(main=True, form=".4g")] = None
    needs_base: str = ""

    @property
    def about(self) -> str:
        """How it is stored, and whether it needs BASE."""
        form = "new value" if self.form == "value" else self.form
        return f"{form}, needs BASE ({self.needs_base})" if self.needs_base else form


class Inventory(Record):
    """The contents of a checkpoint or an adapter, from headers alone.

    Args:
        path: Its path.
        kind: Its kind, as text.
        notes: Notes on the input.
        tensors: The tensors of its files.
        adapts: For an adapter: the adapted weights; else empty.
        scaling: For an adapter: the scaling of its updates and its source.
    """

    record: Literal["inventory"] = "inventory"
    path: str
    kind: str
    notes: tuple[str, ...]
    tensors: tuple[ListedTensor, ...]
    adapts: tuple[AdaptedWeight, ...] = ()
    scaling: str = ""
