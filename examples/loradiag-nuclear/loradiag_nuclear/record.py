"""The record of ``nuclear``."""

from typing import ClassVar, Literal

from lora_diag.records.base import LayerRecord, Shown


class Nuclear(LayerRecord):
    """The nuclear norm of one ΔW.

    Args:
        layer: The weight's name in BASE.
        shape: ``(out, in)``.
        fro: ‖ΔW‖_F.
        nuclear: Σσ_i.
        peak: Largest |entry| of ΔW.
        flatness: Σσ_i / (‖ΔW‖_F √min(out, in)): 1 where all σ are equal; null for a zero update.
    """

    shown: ClassVar[tuple[Shown, ...]] = (
        Shown(
            "nuclear",
            "Σσ",
            "nuclear norm of the update",
            axis="nuclear norm Σσ",
            main=True,
            pool=lambda rs: sum(r.nuclear for r in rs),
        ),
        Shown(
            "flatness",
            "flatness",
            "Σσ over its largest value for this ‖ΔW‖_F",
            share=True,
            main=True,
        ),
        Shown("peak", "peak", "largest entry of the update"),
    )
    record: Literal["nuclear"] = "nuclear"
    layer: str
    shape: tuple[int, int]
    fro: float
    nuclear: float
    peak: float
    flatness: float | None
