"""Records made on the spot, for what is shown, advised and found: no checkpoint, no torch."""

import numpy as np

from lora_diag import catalog
from lora_diag.diagnostics.overlap.record import Overlap
from lora_diag.diagnostics.residual.record import Residual
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.records import LeftOut, Resolution, Results, Run
from tests.building import build, layer_spectrum, results
from tests.plots import making as plots

RANKS = (4, 8, 16, 32, 64)
TYPES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def names(blocks: int, types=TYPES + MLP) -> list[str]:
    return [f"model.layers.{block}.{kind}.weight" for block in range(blocks) for kind in types]


def decay(size: int, power: float, scale: float = 1.0) -> np.ndarray:
    """Return σ_i = scale · i^−power, to the 9 digits of a record."""
    return np.array([float(f"{value:.9g}") for value in scale * np.arange(1.0, size + 1) ** -power])


def flat_to(rank: int, size: int) -> np.ndarray:
    """Return ``rank`` ones and then zeros."""
    return np.array([1.0] * rank + [0.0] * (size - rank))


def spectrum(
    layer: str, s: np.ndarray, verdict: str = "resolved", shape=None, method: str = "gram"
) -> Spectrum:
    """Return the record of a layer with these singular values, all of them."""
    fields = {"base_fro": 100.0, "energy_error": 1e-9, "method": method, "complete": True}
    fields["effective_rank"] = 3.0 if any(s) else None
    return layer_spectrum(
        layer, s, RANKS, shape=shape or (len(s), len(s)), resolution={"verdict": verdict}, **fields
    )


def run(command: str, *inputs: tuple[str, str], **settings) -> Run:
    return results((), command=command, inputs=inputs, **{"ranks": list(RANKS), **settings}).run


def spectra(records, left_out=(), inputs=(("base", "base"), ("tuned", "full_ft"))) -> Results:
    return results(records, inputs=inputs, left_out=tuple(left_out), norms=1.0, ranks=list(RANKS))


def vector(layer: str, fro: float) -> LeftOut:
    return LeftOut(
        layer=layer, shape=(8,), reason="vector", detail="one-dimensional", fro=fro, base_fro=1.0
    )


def residual(
    layer: str,
    rank: int | None = 8,
    kept: float = 0.5,
    *,
    scale: float = 1.0,
    cosine: float | None = None,
    fro: float = 1.0,
    limited_by: str = "rank",
    adapter: str = "lora",
    verdict: str = "resolved",
) -> Residual:
    """Return a layer's record for an adapter that would be nearest at ``scale`` times its scale."""  # fmt: skip
    cosine = kept**0.5 if cosine is None else cosine
    floor, other = ((1 - kept) ** 0.5, cosine / scale * fro) if rank else (1.0, 0.0)
    seen = {
        "limited_by": limited_by if rank else "not adapted",
        "resolution": build(Resolution, verdict=verdict),
    }
    return plots.residual(
        layer, fro, other, cosine, floor, adapter=adapter, rank=rank, shape=(128, 128), **seen
    )


def residuals(records, adapters=("lora",)) -> Results:
    inputs = (("base", "base"), ("tuned", "full_ft"), *(("adapter", name) for name in adapters))
    return results(records, command="residual", inputs=inputs, norms=1.0, ranks=list(RANKS))


def overlap(
    layer: str, step: int, kappa: float, tangent: float, rank: int = 16, verdict: str = "resolved"
) -> Overlap:
    return Overlap(
        layer=layer, shape=(512, 512), step=step, rank=rank, kappa=kappa, kappa_random=rank / 512, tangent=tangent,
        tangent_random=(2 * rank / 512 - (rank / 512) ** 2) ** 0.5, left=tangent, left_random=(rank / 512) ** 0.5,
        right=tangent, right_random=(rank / 512) ** 0.5, gradient_fro=1.0, method="exact", verdict=verdict,
    )  # fmt: skip


def overlaps(records) -> Results:
    inputs = (("base", "base"), ("tuned", "full_ft"), ("gradients", "grads"))
    return results(records, command="overlap", inputs=inputs, ranks=list(RANKS))


def questions(*commands: str, place: int = 0) -> list[str]:
    """Return the first question, or the one in this place, that each command's feature declares."""
    return [catalog.feature_of(command).questions[place][1] for command in commands]


def low_rank() -> str:
    """Return the question about the rank of an update."""
    return questions("spectrum")[0]
