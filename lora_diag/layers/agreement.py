"""Principal angles between two spaces, as a record."""

from __future__ import annotations

from torch import Tensor

from lora_diag.linalg import principal_cosines
from lora_diag.records import Agreement


def agreement(u: Tensor, v: Tensor) -> Agreement:
    """Return the record of the principal angles between two spaces, given by orthonormal columns."""
    cosines = principal_cosines(u, v)
    return Agreement(
        cosines=tuple(round(cosine, 6) for cosine in cosines.tolist()),
        overlap=min(1.0, float((cosines**2).mean())),
        random=max(u.shape[1], v.shape[1]) / len(u),
    )
