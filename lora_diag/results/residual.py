"""Records of ``residual``."""

from __future__ import annotations

from typing import ClassVar, Literal

from lora_diag.results.base import Norm, Record, Share, least_epsilon
from lora_diag.results.spectrum import Resolution

Limit = Literal["rank", "scale", "direction", "not adapted", "exact", "noise"]


class Distance(Record):
    """How far an adapter's update X is from the full update D, in one norm ‖·‖.

    A value that does not exist is null: all of them where D is zero, cosine and scale where X is.

    Args:
        epsilon: ε = ‖D − X‖ / ‖D‖. Not a share: it exceeds 1 whenever the norm ratio exceeds twice the cosine.
        epsilon_min: √(1 − C(r)), the smallest ε that any update of the adapter's rank r has (Eckart–Young), as far as
            D's spectrum is known: ``energy_error``; null where the adapter has no rank.
        excess: ε² − ε_min²: what direction and scale cost, as a share of ‖D‖². Not negative but for the rounding of
            the adapter's factors and for ``energy_error``.
        norm_ratio: ‖X‖ / ‖D‖.
        cosine: ⟨D, X⟩ / (‖D‖‖X‖).
        best_scale: c = ⟨D, X⟩ / ‖X‖², by which X would have to be multiplied to come nearest to D.
        epsilon_best_scale: ‖D − cX‖ / ‖D‖.
        energy_error: Bound on the error of ε_min² and ``excess``.
    """

    epsilon: Norm | None
    epsilon_min: Norm | None
    excess: float | None
    norm_ratio: Norm | None
    cosine: float | None
    best_scale: float | None
    epsilon_best_scale: Norm | None
    energy_error: float | None = None

    @property
    def least_epsilon(self) -> float | None:
        """√(max(0, ε_min² − energy_error)): a lower bound on the ε of every update of the adapter's rank."""
        return None if self.epsilon_min is None else least_epsilon(self.epsilon_min, self.energy_error)


class Agreement(Record):
    """Principal angles between a space of the adapter's update and that of the top k singular vectors of D.

    Args:
        cosines: Of the principal angles, descending, min(k, rank of X) of them.
        overlap: Mean of their squares: 1 for the same space, 0 for orthogonal ones.
        random: What ``overlap`` is on average for a random space: k/m for column spaces, k/n for row spaces.
    """

    cosines: tuple[float, ...]
    overlap: Share
    random: Share


class Residual(Distance):
    """One layer of a full fine-tune D = W_tuned − W_base, and what one adapter makes of it, in the Frobenius norm.

    Args:
        layer: The weight's name in BASE.
        shape: ``(out, in)``; of a 1-D tensor ``(n,)``.
        adapter: Which of the run's inputs X is, by its path.
        role: ``adapter``; or ``reference``, another full fine-tune to judge distances by.
        rank: Columns of the adapter's factors; 0 where it leaves the layer alone; null where X has no factors.
        fro: ‖D‖_F.
        base_fro: ‖W_base‖_F.
        adapter_fro: ‖X‖_F.
        method: What computed the singular values of D.
        blocks: In how many row blocks D was read, again and again, because memory did not hold it; null if it did.
        column_space: Agreement of the left singular vectors, of D's top ``rank`` (8 where X has no rank); null for 1-D
            tensors and where D or X is zero.
        row_space: The same of the right ones.
        data: The distance in the data metric ‖D·C^½‖_F with C = E[xxᵀ], the mean square of the change in the layer's
            output; null without activations for the layer.
        limited_by: What ε is mostly made of (``metrics.limit``).
        resolution: What the files' rounding lets one see of D; null for a 1-D tensor.
    """

    key: ClassVar[tuple[str, ...]] = ("layer", "adapter")
    record: Literal["residual"] = "residual"
    layer: str
    shape: tuple[int, ...]
    adapter: str
    role: Literal["adapter", "reference"]
    rank: int | None
    fro: Norm
    base_fro: Norm | None
    adapter_fro: Norm
    method: str
    column_space: Agreement | None
    row_space: Agreement | None
    data: Distance | None
    limited_by: Limit | None
    resolution: Resolution | None
    blocks: int | None = None

    @property
    def gap(self) -> float:
        """‖D − X‖_F."""
        return self.adapter_fro if self.epsilon is None else self.epsilon * self.fro

    @property
    def inner(self) -> float:
        """⟨D, X⟩."""
        return (self.cosine or 0.0) * self.fro * self.adapter_fro

    @property
    def floor(self) -> float:
        """Lower bound on ‖D − X‖_F of X's rank; 0 where X has no rank, ‖D‖_F where it is zero."""
        least = self.least_epsilon
        return (float(self.adapter_fro == 0.0) if least is None else least) * self.fro
