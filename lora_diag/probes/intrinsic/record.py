"""Records of ``probe intrinsic``: training in a random subspace, in full, or by a LoRA."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from lora_diag.records.base import Count, Nats, Shown, WholeRecord


class Intrinsic(WholeRecord):
    """The loss of one run on one evaluation set; or of BASE.

    Args:
        set: The evaluation set, by its file's name.
        shifted: Whether the user named it as shifted.
        data: Hash of the evaluation file.
        tokens: Number of predictions in the mean loss.
        subject: ``base`` (not trained), ``full`` (all parameters), ``subspace`` or ``lora``.
        dim: d of a subspace; null otherwise.
        rank: r of a LoRA; null otherwise.
        params: Number of trained parameters; 0 for BASE.
        lr: Peak learning rate of Adam; null for BASE.
        pace: For ``full`` and ``subspace``: the equivalent rate of full fine-tuning, lr·√(d/D);
            null otherwise.
        seed: Seed of the projection, of LoRA's factors, and of dropout if BASE has it.
        loss: Loss in nats; null if the run diverged.
        train_loss: Mean loss over the last tenth of the steps; null if not finite, and for BASE.
    """

    key: ClassVar[tuple[str, ...]] = ("set", "subject", "dim", "rank", "lr", "seed")
    table: ClassVar[tuple[Shown | str, ...]] = ("loss",)
    record: Literal["intrinsic"] = "intrinsic"
    set: str
    shifted: bool = False
    data: str
    tokens: Count
    subject: Literal["base", "full", "subspace", "lora"]
    dim: int | None = None
    rank: int | None = None
    params: Annotated[Count, Shown(title="parameters", main=True)]
    lr: float | None = None
    pace: float | None = None
    seed: int = 0
    loss: Annotated[Nats | None, Shown(main=True)]
    train_loss: Nats | None = None
