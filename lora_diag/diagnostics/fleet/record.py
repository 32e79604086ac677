"""Records of ``fleet``: one adapter of a fleet."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from lora_diag.records.base import Count, Guard, LayerRecord, Norm, Record, Share, Shown


class FleetLayer(Record):
    """One layer of one adapter.

    Args:
        fro: ‖ΔW‖_F.
        rank: Columns of the factors; null for an update that has none.
        rank_99: Smallest r with C(r) ≥ 0.99; 0 for a zero update.
        spike: σ_1² / ‖ΔW‖_F²; null for a zero update.
    """

    fro: Norm
    rank: int | None
    rank_99: int
    spike: Share | None


class Fleet(LayerRecord):
    """One adapter of a fleet, with all its layers.

    Args:
        adapter: Its path.
        kind: Type of adapter, as text.
        modules: Number of adapted matrices.
        dead: Number of matrices with a zero update.
        rank: The largest rank of its factors; null if no layer has factors.
        fro: Frobenius norm of the update over all matrices.
        total_rank: Σ of the ranks; null if a layer has no factors.
        total_rank_99: Σ of the ranks at 99% of each layer's energy.
        used: Fraction of its rank that it uses, ``total_rank_99`` / ``total_rank``; null if that is
            null or 0.
        spike: Fraction of the energy in the largest direction of every layer, Σσ_1² / Σ‖ΔW‖_F²;
            null for a zero update.
        layers: Each layer, by its name.
        update: A sketch of the update: inner products of sketches estimate those of updates.
        space: A sketch of the column spaces of its directions up to 99% of the energy, likewise.
    """

    key: ClassVar[tuple[str, ...]] = ("layer",)
    long: ClassVar[tuple[str, ...]] = ("layers",)
    table: ClassVar[tuple[Shown | str, ...]] = (
        "modules",
        "rank",
        Shown(
            "mean_rank_99",
            "r at 99%",
            "Mean rank at 99% of a layer's energy",
            drop=2,
            terminal=True,
        ),
        "used",
        "spike",
        "fro",
    )
    guards: ClassVar[tuple[Guard, ...]] = (
        Guard("used", "lower", "this adapter uses less of its rank than the fleet before"),
    )
    record: Literal["fleet"] = "fleet"
    adapter: str
    kind: str
    modules: Annotated[Count, Shown(title="layers", drop=5, terminal=True)]
    dead: Annotated[Count, Shown(main=True, terminal=False)]
    rank: Annotated[int | None, Shown(main=True, head="r")]
    fro: Annotated[Norm, Shown(title="‖ΔW‖", main=True, drop=3)]
    total_rank: int | None
    total_rank_99: int
    used: Annotated[float | None, Shown(share=True, main=True, form="percent")]
    spike: Annotated[Share | None, Shown(drop=4, form="percent", terminal=True)]
    layers: dict[str, FleetLayer]
    update: tuple[float, ...]
    space: tuple[float, ...]

    @property
    def layer(self) -> str:
        """The adapter's path, in place of a layer name."""
        return self.adapter

    @property
    def family(self) -> str:
        """What the adapter is, without its rank and scale: ``kind`` up to the first comma."""
        return self.kind.partition(",")[0]

    @property
    def mean_rank_99(self) -> float | None:
        """``total_rank_99`` over ``modules``; None without any."""
        return self.total_rank_99 / self.modules if self.modules else None
