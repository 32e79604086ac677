"""The record of ``nuclear``."""

from typing import Annotated, Literal

from lora_diag.records.base import LayerRecord, Shown


class Nuclear(LayerRecord):
    """The nuclear norm of one ΔW.

    Args:
        layer: The weight's name in BASE.
        shape: ``(out, in)``.
        fro: ‖ΔW‖_F.
        nuclear: Nuclear norm of the update, Σσ_i.
        peak: Largest |entry| of ΔW.
        flatness: Σσ_i / (‖ΔW‖_F √min(out, in)): 1 where all σ are equal; null for a zero update.
    """

    record: Literal["nuclear"] = "nuclear"
    layer: str
    shape: tuple[int, int]
    fro: float
    nuclear: Annotated[
        float,
        Shown(
            title="Σσ",
            axis="nuclear norm Σσ",
            main=True,
            pool=lambda rs: sum(r.nuclear for r in rs),
        ),
    ]
    flatness: Annotated[float | None, Shown(share=True, main=True)]
    peak: Annotated[float, Shown()]
