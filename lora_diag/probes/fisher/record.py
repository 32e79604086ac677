"""Records of ``probe fisher``."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from lora_diag.records.base import Count, Nats, Norm, Record, Shown, WholeRecord


class Effect(Record):
    """Effect of truncating one layer alone, on the text ``Fisher.on``.

    Args:
        loss: Loss in nats per prediction.
        gap: Loss minus that of TUNED, on the same predictions.
        gap_error: Standard error of ``gap``, from paired differences of blocks of sequences; null
            for one sequence.
        kl: Mean KL(p_tuned ‖ p) over the predictions, in nats.
    """

    loss: Nats
    gap: Nats
    gap_error: Nats | None
    kl: Nats


class Fisher(WholeRecord):
    """Expected cost of discarding the tail T_r = ΔW − ΔW_r of one layer, by r.

    ℓ_s is the summed negative log-likelihood of sequence s at TUNED, N the number of predictions of
    all sequences.

    Args:
        layer: The weight's name in BASE.
        shape: ``(out, in)`` as stored.
        set: File name of the text of the gradients.
        labels: ``data`` for the text's own labels (the empirical Fisher), ``model`` for labels
            sampled from TUNED.
        sequences: Number of gradients.
        predictions: N.
        tokens: Number of layer inputs in the means C and G.
        fro: Frobenius norm of the update, ‖ΔW‖_F.
        fisher: F(0), F(1), …: Σ_s⟨∇ℓ_s, T_r⟩²/N for every rank, to 9 significant digits. F(r)/2 is
            the second-order estimate of the mean KL per prediction.
        linear: −Σ_s⟨∇ℓ_s, T_r⟩/N by r: the first-order change of the loss on that text.
        weight: ‖T_r‖_F² by r.
        data: E‖T_r x‖² = ‖T_r·C^½‖_F² by r.
        kfac: tokens/N·‖G^½·T_r·C^½‖_F² by r, which equals F(r) if inputs and gradients, and tokens,
            are independent.
        on: File name of the text of ``effect``: held-out, or that of the gradients; null if not
            measured.
        effect: Measured effect of truncation, by r below min(out, in); null if not measured.
    """

    key: ClassVar[tuple[str, ...]] = ("layer",)
    record: Literal["fisher"] = "fisher"
    layer: str
    shape: tuple[int, int]
    set: str
    labels: Literal["data", "model"]
    sequences: Count
    predictions: Count
    tokens: Count
    fro: Annotated[Norm, Shown(title="‖ΔW‖", main=True)]
    fisher: tuple[float, ...]
    linear: dict[str, Nats]
    weight: dict[str, float]
    data: dict[str, float]
    kfac: dict[str, float]
    on: str | None = None
    effect: dict[str, Effect] | None = None

    def at(self, rank: int) -> float:
        """Return F(r); 0 beyond the last value."""
        return self.fisher[rank] if rank < len(self.fisher) else 0.0
