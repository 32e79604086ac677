"""Records of ``probe strength``."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from lora_diag.records.base import Count, Guard, Nats, Shown, WholeRecord


class Strength(WholeRecord):
    """The loss at one strength of the update, W_0 + t·ΔW, on one evaluation set.

    Args:
        set: The evaluation set, by its file's name.
        shifted: Whether the user declared it as shifted.
        scale: t.
        part: The block or module type at t, others at 1; null for the whole update.
        tokens: Number of predictions in the mean loss.
        data: Hash of the evaluation file.
        loss: Loss in nats.
        loss_error: Its standard error, from blocks of sequences; null for one sequence.
        gap: Loss minus that of TUNED, t = 1, on the same tokens.
        gap_error: Standard error of ``gap``, from paired differences of blocks of sequences; null
            for one sequence.
        change: Loss minus that of BASE, t = 0, on the same tokens.
        change_error: Standard error of ``change``, likewise.
        kept: Fraction of TUNED's change of the loss, (loss_base − loss) / (loss_base − loss_tuned).
            Not clamped; null if these are equal.
        nll: Summed negative log-likelihood of each sequence, in nats to 6 decimals.
        predictions: Number of predictions of each sequence; only for t = 0 of the whole update.
    """

    key: ClassVar[tuple[str, ...]] = ("set", "scale", "part")
    table: ClassVar[tuple[Shown | str, ...]] = (
        "loss",
        Shown(
            "to_tuned",
            "to t = 1",
            "Loss minus that of TUNED",
            form="+.4f",
            terminal=True,
            error="gap_error",
        ),
        Shown(
            "to_base",
            "to BASE",
            "Loss minus that of BASE",
            form="+.4f",
            terminal=True,
            error="change_error",
        ),
    )
    record: Literal["strength"] = "strength"
    set: str
    shifted: bool = False
    scale: float
    part: str | None = None
    tokens: Count
    data: str
    loss: Annotated[Nats, Shown(main=True, form=".4f")]
    loss_error: Nats | None
    gap: Nats
    gap_error: Nats | None
    change: Nats
    change_error: Nats | None
    kept: Annotated[float | None, Shown(drop=1, form=".2f", terminal=True)]
    nll: tuple[Nats, ...]
    predictions: tuple[Count, ...] = ()

    @property
    def to_tuned(self) -> float | None:
        """``gap``; None for TUNED itself."""
        return None if self.part is None and self.scale == 1 else self.gap

    @property
    def to_base(self) -> float | None:
        """``change``; None for BASE itself."""
        return None if self.part is None and self.scale == 0 else self.change


class StrengthChoice(WholeRecord):
    """The strength to use by the losses on one evaluation set, which is not shifted.

    All intervals are of 95%, from paired differences of blocks of sequences. Several strengths are
    compared, so each comparison has the level of 95% for all of them together (Bonferroni).

    Args:
        set: The evaluation set.
        recommended: 1, unless a measured t is significantly better; then the best of those.
        best: The measured t with the lowest loss.
        best_gap: Loss at ``best`` minus that at t = 1.
        best_gap_error: Its standard error; null for one sequence.
        low: Next t below ``best`` at which the loss is significantly higher, by a cubic spline
            through the losses; the smallest t without one; null for fewer than five strengths.
        high: Next t above, likewise.
        gain: Loss of BASE minus that at ``recommended``.
        gain_error: Its standard error; null for one sequence.
        sufficient: Smallest t that keeps 90% of ``gain``, likewise; null if the gain is not
            significant or fewer than five strengths were measured.
        sufficient_low: Smallest t at which keeping 90% is not excluded; null without
            ``sufficient``.
        sufficient_high: Smallest t that significantly keeps 90%; null without one.
        fit: ``quadratic`` if the parabola through the best of the run's t and its neighbours holds
            at its minimum; ``poor`` if it does not; ``flat`` if its curvature is not significant;
            ``edge`` if that t is the smallest or the largest; ``few`` for fewer than five
            strengths.
        optimum: t at the minimum of the parabola; null unless ``quadratic``.
        optimum_low: Lower end of its interval (Fieller).
        optimum_high: Upper end of its interval.
        checked: ``optimum`` to two decimals, where the loss was measured.
        checked_gap: Loss measured there minus the parabola.
    """

    key: ClassVar[tuple[str, ...]] = ("set",)
    guards: ClassVar[tuple[Guard, ...]] = (
        Guard("gain", "lower", "the update gains less on held-out data", tolerance="5%"),
    )
    record: Literal["strength_choice"] = "strength_choice"
    set: str
    recommended: float
    best: float
    best_gap: Nats
    best_gap_error: Nats | None
    low: float | None = None
    high: float | None = None
    gain: Nats
    gain_error: Nats | None
    sufficient: float | None = None
    sufficient_low: float | None = None
    sufficient_high: float | None = None
    fit: Literal["quadratic", "poor", "flat", "edge", "few"] = "few"
    optimum: float | None = None
    optimum_low: float | None = None
    optimum_high: float | None = None
    checked: float | None = None
    checked_gap: Nats | None = None
