"""Records of ``spectrum``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from lora_diag.results.base import Record, Share


class Tail(Record):
    """Eckart–Young errors of the best rank-r approximation.

    Args:
        fro: √Σ_{i>r}σ_i²; its square is off by at most ``energy_error``·‖ΔW‖_F².
        spectral: σ_{r+1}; null if it was not computed.
        spectral_error: Bound on the error of ``spectral``, from ``energy_error``; null in results of older versions.
    """

    fro: float
    spectral: float | None
    spectral_error: float | None = None


class Resolution(Record):
    """What the files' rounding lets one see of ΔW.

    Args:
        unchanged: Share of the entries that are bit-identical on both sides; null for an adapter, which has no sides.
        mantissa: Mantissa bits that the stored values of base and tuned really use; null for an adapter.
        rounding_fro: Bound on ‖E‖_F, the norm of the rounding error of ΔW; by Mirsky Σ(σ_i − σ̂_i)² ≤ ‖E‖_F².
        noise_fro: Expected ‖E‖_F if E behaves like noise.
        edge: Where the singular values of such noise end: the largest stands above it in at most 1% of layers.
        signal_rank: Singular values above the edge; null if all that were kept are and there are more.
        verdict: Whether the files can show this update.
        start: ``exact`` if the stored BASE is taken for the start of training; ``rounded`` if its rounding counts,
            because BASE is stored no more finely than TUNED or ``base_rounding`` shows it; null for an adapter.
        base_noise_fro: Expected norm of the rounding error of BASE, if it was rounded after the start of training;
            null for an adapter.
        base_rounding: β of E[ΔW²] = α + β·ulp²/12 + γw² + δ|w| and its standard error: 1 if BASE was rounded after the
            start, 0 if not; null where TUNED is not stored more finely.
        untouched: Estimated share of entries that training left alone (a sparse update), as opposed to those that
            rounding left unchanged; null for an adapter.
    """

    unchanged: Share | None
    mantissa: tuple[int, int] | None
    rounding_fro: float
    noise_fro: float
    edge: float
    signal_rank: int | None
    verdict: Literal["resolved", "floor-limited", "unresolved"]
    start: Literal["exact", "rounded"] | None = None
    base_noise_fro: float | None = None
    base_rounding: tuple[float, float] | None = None
    untouched: Share | None = None


class Stack(Record):
    """What the spectrum of gradients is one of: G_t of several steps, on top of or beside each other.

    Args:
        steps: The steps t.
        side: ``right`` if ``s`` are the roots of the eigenvalues of ΣG_tᵀG_t (in × in), ``left`` if of ΣG_tG_tᵀ
            (out × out): the smaller of the two.
        other_energy: Energy shares of the other side; null where it was not computed. With one step both are equal.
        other_rank_at: Ranks at the thresholds, likewise.
    """

    steps: tuple[int, ...]
    side: Literal["left", "right"]
    other_energy: dict[str, Share | None] | None
    other_rank_at: dict[str, int | None] | None


Metric = Literal["weights", "data", "kfac"]

# What ‖ΔW‖ and ‖W‖ are called in each metric, and it itself.
NORMS = {
    "weights": ("‖ΔW‖", "‖W‖"),
    "data": ("‖ΔW·C^½‖", "‖W·C^½‖"),
    "kfac": ("‖G^½·ΔW·C^½‖", "‖G^½·W·C^½‖"),
}
METRIC_NAMES = {"weights": "the weights' metric", "data": "the data's metric", "kfac": "K-FAC's metric"}


class Spectrum(Record):
    """The singular values of one ΔW and what follows from them; of ΔW·C^½ or G^½·ΔW·C^½ in another ``metric``.

    Args:
        layer: The weight's name in BASE; one matrix of a stack is ``name[3]``.
        shape: ``(out, in)``.
        dtypes: Stored dtypes of base and tuned; of an adapter: of the base (null without one) and of its factors.
        fro: ‖ΔW‖_F, accumulated in float64.
        base_fro: ‖W_base‖_F, likewise; null if the base was not given.
        s: Singular values of ΔW, descending, to 9 significant digits.
        complete: True if ``s`` holds all min(out, in) of them, or all that can differ from zero (an adapter's r).
        method: What computed them, such as ``gram`` or ``exact``.
        energy_error: Bound on the absolute error of every energy fraction in this record, the digits of ``s`` included,
            for ΔW as it was subtracted: in float32, unless a file is float64, for 2.4e-7 more at the very most.
        energy: C(r) = Σ_{i≤r}σ_i² / ‖ΔW‖_F² by r; null for a zero update and for r beyond the values kept.
        rank_at: Smallest r with C(r) ≥ the threshold; null if it is beyond the values kept, 0 for a zero update.
        tail: Errors of the best rank-r approximation, by r.
        stable_rank: ‖ΔW‖_F² / σ_1²; null for a zero update.
        effective_rank: exp of the entropy of p_i = σ_i²/Σσ²; null for a zero update or an incomplete spectrum.
        resolution: What the files' rounding lets one see.
        blocks: In how many row blocks ΔW was read, again and again, because memory did not hold it; null if it did.
        source: ``update``; or ``gradients``, where ΔW stands for the gradients of several steps, stacked.
        stack: Which gradients; null for an update.
        metric: What an energy means. ``weights``: ‖ΔW‖_F². ``data``: E‖ΔW x‖² = ‖ΔW·C^½‖_F² with C = E[xxᵀ] of the
            layer's input, the mean square of what the update changes in the layer's output. ``kfac``:
            ‖G^½·ΔW·C^½‖_F² with G = E[ggᵀ] of the loss's gradient by that output. All fields are in this metric: s,
            fro, base_fro (‖W_base·C^½‖_F), tail and the norms of ``resolution``.
        weights_fro: ‖ΔW‖_F in another metric than ``weights``; null in that.
    """

    record: Literal["spectrum"] = "spectrum"
    layer: str
    shape: tuple[int, int]
    dtypes: tuple[str | None, str]
    fro: float
    base_fro: float | None
    s: tuple[float, ...]
    complete: bool
    method: str
    energy_error: float
    energy: dict[str, Share | None]
    rank_at: dict[str, int | None]
    tail: dict[str, Tail | None]
    stable_rank: float | None
    effective_rank: float | None
    resolution: Resolution
    blocks: int | None = None
    source: Literal["update", "gradients"] = "update"
    stack: Stack | None = None
    metric: Metric = "weights"
    weights_fro: float | None = None

    @property
    def relative(self) -> float | None:
        """‖ΔW‖ / ‖W_base‖ in the metric; None without a base, or where it is zero."""
        return self.fro / self.base_fro if self.base_fro else None

    @property
    def spike(self) -> Share | None:
        """σ_1² / ‖ΔW‖_F², the energy in the largest direction alone; None for a zero update."""
        return 1 / self.stable_rank if self.stable_rank else None

    @property
    def spike_to_base(self) -> float | None:
        """σ_1(ΔW) / ‖W_base‖_F, a lower bound of σ_1(ΔW) / σ_1(W_base); None without a base, or where it is zero."""
        return self.s[0] / self.base_fro if self.base_fro and self.s else None


def metric_of(records: Iterable[object]) -> Metric:
    """Return the metric of the spectra among some records of one run, which mixes none; ``weights`` without any."""
    return next((record.metric for record in records if isinstance(record, Spectrum)), "weights")
