"""Records of ``probe fisher``."""

from __future__ import annotations

from typing import ClassVar, Literal

from lora_diag.records.base import Record, WholeRecord
from lora_diag.records.shown import Shown


class Effect(Record):
    """What truncating one layer alone did on held-out text.

    Args:
        loss: In nats a prediction.
        gap: Loss minus that of TUNED, on the same predictions.
        gap_error: Standard error of ``gap``, from the paired differences of sequences taken as independent; null for
            one sequence.
        kl: Mean KL(p_tuned ‖ p) over the predictions, in nats.
    """

    loss: float
    gap: float
    gap_error: float | None
    kl: float


class Fisher(WholeRecord):
    """What discarding the tail T_r = ΔW − ΔW_r of one layer is expected to cost, r by r.

    ℓ_s is the summed negative log-likelihood of sequence s at TUNED, N the number of predictions of all sequences.

    Args:
        layer: The weight's name in BASE.
        shape: ``(out, in)`` as it is stored.
        set: The text that the gradients are of, by its file's name.
        labels: ``data`` for the text's own labels (the empirical Fisher), ``model`` for labels drawn from TUNED.
        sequences: How many gradients.
        predictions: N.
        tokens: Inputs of the layer that C and G are means over.
        fro: ‖ΔW‖_F.
        fisher: F(0), F(1), …: Σ_s⟨∇ℓ_s, T_r⟩²/N for every rank, to 9 significant digits. F(r)/2 is the second-order
            estimate of the mean KL a prediction.
        linear: −Σ_s⟨∇ℓ_s, T_r⟩/N by r: what the loss on that text changes by in first order.
        weight: ‖T_r‖_F² by r.
        data: E‖T_r x‖² = ‖T_r·C^½‖_F² by r.
        kfac: tokens/N·‖G^½·T_r·C^½‖_F² by r, which is F(r) where inputs and gradients, and tokens, are independent.
        on: The held-out text of ``effect``; null if nothing was measured.
        effect: What truncation did there, by r; null if nothing was measured.
    """

    key: ClassVar[tuple[str, ...]] = ("layer",)
    shown: ClassVar[tuple[Shown, ...]] = (Shown("fro", "‖ΔW‖", "Frobenius norm of the update", main=True),)
    record: Literal["fisher"] = "fisher"
    layer: str
    shape: tuple[int, int]
    set: str
    labels: Literal["data", "model"]
    sequences: int
    predictions: int
    tokens: int
    fro: float
    fisher: tuple[float, ...]
    linear: dict[str, float]
    weight: dict[str, float]
    data: dict[str, float]
    kfac: dict[str, float]
    on: str | None = None
    effect: dict[str, Effect] | None = None

    def at(self, rank: int) -> float:
        """Return F(r); 0 beyond the values that there are."""
        return self.fisher[rank] if rank < len(self.fisher) else 0.0
