"""Records of ``probe sensitivity``: gains of layers adapted alone, and first-order predictions of
them.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from lora_diag.records.base import Count, Nats, Norm, Shown, WholeRecord


class Sensitivity(WholeRecord):
    """The loss of one run, in which one unit was adapted and all else frozen, on one evaluation
    set; or of BASE.

    Args:
        set: The evaluation set, by its file's name.
        shifted: Whether the user named it as shifted.
        data: Hash of the evaluation file.
        tokens: Number of predictions in the mean loss.
        unit: Name of the adapted layer, block of layers or module type; empty for BASE.
        layers: Names of its weights in BASE.
        rank: r of every factor pair; null for BASE.
        params: Σ r(out + in); 0 for BASE.
        lr: Peak learning rate; null for BASE.
        seed: Seed of the initial factors, and of dropout if BASE has it.
        loss: Loss in nats; null if the run diverged.
        gain: Loss of BASE minus this one, on the same tokens; null for BASE and if the run
            diverged.
        gain_error: Standard error of ``gain``, from paired differences of blocks of sequences; null
            for one sequence, for BASE, and if the run diverged.
        train_loss: Mean loss over the last tenth of the steps; null if not finite, and for BASE.
        nll: Summed negative log-likelihood of each sequence, in nats to 6 decimals, for pairing any
            two runs. Empty if the run diverged.
        predictions: Number of predictions of each sequence; only for BASE, since it is the same for
            all runs.
    """

    key: ClassVar[tuple[str, ...]] = ("set", "unit", "rank", "lr", "seed")
    table: ClassVar[tuple[Shown | str, ...]] = (
        "gain",
        "gain_error",
    )
    record: Literal["sensitivity"] = "sensitivity"
    set: str
    shifted: bool = False
    data: str
    tokens: Count
    unit: str = ""
    layers: tuple[str, ...] = ()
    rank: int | None = None
    params: Count = 0
    lr: float | None = None
    seed: int = 0
    loss: Annotated[Nats | None, Shown(main=True)]
    gain: Annotated[Nats | None, Shown(main=True)] = None
    gain_error: Annotated[Nats | None, Shown(title="± gain", main=True)] = None
    train_loss: Nats | None = None
    nll: tuple[Nats, ...] = ()
    predictions: tuple[Count, ...] = ()


class FirstOrder(WholeRecord):
    """First-order predictions from the gradient G of one layer at BASE.

    Args:
        layer: The weight's name in BASE.
        shape: ``(out, in)``.
        rank: r.
        gradient_fro: ‖G‖_F, G = ∂L/∂W ``(out, in)`` over the sequences below.
        top: Σ_{i≤r}σ_i(G)², the square of the steepest descent per ‖ΔW‖_F that a matrix of rank r
            allows.
        fresh: (r/in)·‖G‖_F², the mean of ‖P_T G‖_F² over fresh adapters: at B = 0 only the row
            space of A can be reached; at most ‖G‖_F².
        adam: r·s·√(2/(3π·in))·Σ_i‖g_i‖, g_i the rows of G and s the scaling: the decrease of the
            loss per unit of learning rate in Adam's first step, mean over A as initialized by PEFT.
        sequences: Number of sequences in the mean gradient.
        data: Hash of their file.
    """

    key: ClassVar[tuple[str, ...]] = ("layer",)
    record: Literal["first_order"] = "first_order"
    layer: str
    shape: tuple[int, int]
    rank: int
    gradient_fro: Norm
    top: float
    fresh: float
    adam: float
    sequences: Count
    data: str
