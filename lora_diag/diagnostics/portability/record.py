"""Records of ``portability``."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from lora_diag.records.base import LayerRecord, Norm, Ratio, Shown

Status = Literal["exact", "wrong", "dropped", "full", "refused", "unknown"]

# From worst to best.
ORDER: tuple[Status, ...] = ("refused", "dropped", "wrong", "unknown", "full", "exact")

# Statuses of a layer that is applied as intended.
AS_INTENDED: tuple[Status, ...] = ("exact", "full")

# Parts whose ΔW is not B·A, so that an error may be other than a wrong scale.
NONLINEAR_PARTS = frozenset({"dora", "residual"})


class Portability(LayerRecord):
    """Treatment of one changed weight by one consumer.

    Args:
        layer: The weight's name in BASE; where that is not known, in the adapter.
        consumer: The program that loads the adapter, such as ``vllm``.
        version: Version of the program: the requested one, or the newest in which the rule was
            read.
        status: Treatment of the weight by the consumer. ``exact``: it applies the intended ΔW.
            ``wrong``: it applies another one, mostly by another scale; write the adapter with
            ``--fix``. ``dropped``: it silently leaves the weight as it is; merge the adapter, or
            serve it elsewhere. ``full``: it takes a weight that the file holds in full.
            ``refused``: it stops with an error, which holds for the whole adapter; write the
            adapter with ``--fix``. ``unknown``: that depends on a BASE which is not given, or on
            what no file says; ``why`` states it.
        part: Its contents in the file: ``factors``, ``dora``, ``bias``, ``value`` and so on.
        rank: r of its factors; null without factors.
        scale: Factor s' by which the consumer multiplies B·A; null without factors, and if dropped
            or refused.
        intended: The intended s; null without factors; 0 if the program whose ΔW is intended drops
            the weight.
        epsilon: Relative error of the applied ΔW', ‖ΔW' − ΔW‖_F / ‖ΔW‖_F. |s'/s − 1| where only the
            scale differs, 1 if dropped; null if refused or unknown, if ΔW = 0, if the program whose
            ΔW is intended drops the weight, and where a BASE is needed and missing.
        fro: ‖ΔW‖_F of the update as PEFT, or the format's own rule, makes it of the file; null if
            it is not known, such as where that needs a BASE and none is given.
        why: The reason, in one sentence; empty if it is ``exact`` or ``full``.
    """

    key: ClassVar[tuple[str, ...]] = ("layer", "consumer", "version")
    part_label: ClassVar[str] = "{consumer} {version}"
    table: ClassVar[tuple[Shown | str, ...]] = (
        "status",
        "epsilon",
    )
    record: Literal["portability"] = "portability"
    layer: str
    consumer: str
    version: str
    status: Annotated[Status, Shown(main=True)]
    part: str
    rank: int | None
    scale: Annotated[float | None, Shown(axis="applied scale")]
    intended: float | None
    epsilon: Annotated[Ratio | None, Shown(title="ε", axis="relative error ε")]
    fro: Norm | None
    why: str = ""
