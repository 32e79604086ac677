"""The records that every results file has: the run, what was left out, the end."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import Field

from lora_diag.errors import UsageError
from lora_diag.records.base import SCHEMA, LayerRecord, Norm, Record, WholeRecord

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
    "no_activations",
]


class RunInput(Record):
    r"""One input of a run: its part in the command, where it was, what it is.

    Args:
        role: ``base``, ``tuned``, ``adapter``, ``reference``, ``activations`` or ``gradients``.
        path: What the user named; bytes that are not UTF-8 are spelled ``\xff``.
        kind: What it is, in words.
        tensors: How many it holds.
        notes: What a careful reader should know.
        fingerprint: By which ``--resume`` and ``gate`` notice that the input changed; empty if it was not taken.
        sha256: Of every byte of its files, with ``--verify``; of results, the hash in their last line; else empty.
        architecture: The model's class as its ``config.json`` names it, such as ``BertForSequenceClassification``;
            empty where there is none.
        names: Of a BASE, what it is called: its folder, its Hub id, what its config says. Of an adapter, what its
            config calls its base.
        targets: How many weights of BASE an adapter's config targets; null where that is not known.
        lacking: Those of them for which the adapter's file holds nothing.
    """

    role: str
    path: str
    kind: str
    tensors: int
    notes: tuple[str, ...] = ()
    fingerprint: str = ""
    sha256: str = ""
    architecture: str = ""
    names: tuple[str, ...] = ()
    targets: int | None = None
    lacking: tuple[str, ...] = ()


class Run(Record):
    """First line of a results file: what was asked of what.

    Args:
        schema: Version of the fields, 1.
        command: The command, without ``loradiag``.
        version: Of loradiag.
        inputs: What was measured.
        settings: The options that change numbers.
        made: When the run began, in UTC, such as ``2026-11-27T04:15:19Z``; empty in files of older versions. The only
            field in which two runs of the same input and settings differ; ``SOURCE_DATE_EPOCH`` sets it.
    """

    record: Literal["run"] = "run"
    schema_: int = Field(SCHEMA, alias="schema", serialization_alias="schema")
    command: str
    version: str
    inputs: tuple[RunInput, ...]
    settings: dict[str, Any]
    made: str = Field("", pattern=r"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ)?$")


def timestamp() -> str:
    """Return the time in UTC as ``Run.made`` has it; that of ``SOURCE_DATE_EPOCH`` where it is set.

    Raises:
        UsageError: ``SOURCE_DATE_EPOCH`` is no number of seconds.

    Reference: https://reproducible-builds.org/specs/source-date-epoch/
    """
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    try:
        moment = datetime.fromtimestamp(int(given), UTC) if given else datetime.now(UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise UsageError(
            f"SOURCE_DATE_EPOCH={given}: must be a whole number of seconds since 1970; unset or correct it"
        ) from error
    return f"{moment.replace(tzinfo=None).isoformat(timespec='seconds')}Z"


class LeftOut(Record):
    """A tensor, or rows of one, without a spectrum.

    Args:
        layer: Its name.
        shape: Its shape; for rows that only one side has, theirs.
        reason: One word, for programs.
        detail: One sentence, for people.
        fro: ‖Δ‖_F where both sides have it (1-D tensors), the norm of the rows that only one side has, else null.
        base_fro: ‖W_base‖_F where both sides have it, else null.
        tuned_shape: Its shape in TUNED where that is another than in BASE (``shape_differs``), else null.
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
        layers: How many layers have records.
        left_out: How many ``left_out`` records there are.
        fro: ‖ΔW‖_F over the layers; null for records that have none.
        base_fro: ‖W_base‖_F over the layers; null if one of them is not known.
        sha256: Of the lines before this one, each with its newline; empty in files of older versions.
    """

    record: Literal["end"] = "end"
    layers: int
    left_out: int
    fro: Norm | None
    base_fro: Norm | None
    sha256: str = ""


AnyRecord = Run | LayerRecord | WholeRecord | LeftOut | End
