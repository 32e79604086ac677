"""Records of ``tune``: the plan, every run, every decision, and the choice."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lora_diag.records.base import Count, Nats, Record, Seconds, Shown, WholeRecord


class TuneStage(Record):
    """One stage of the plan.

    Args:
        name: Name of the stage.
        runs: Training runs, at most.
        seconds: Estimated from one timed step.
        decides: Question that the stage answers.
    """

    name: str
    runs: Count
    seconds: Seconds
    decides: str


class TunePlan(WholeRecord):
    """The plan of a search: printed first, and followed when it is resumed.

    Args:
        budget: Trainable parameters allowed.
        per_rank: Parameters of one rank on all targeted layers.
        magnitudes: Parameters of DoRA's magnitudes, the same at every rank; 0 for LoRA.
        kind: Kind of LoRA, with its alpha.
        slots: Concurrent runs.
        largest: Largest shared rank within the budget.
        tokens: Predicted tokens of the training data.
        rules: Rank required by each rule of thumb; null where full rank has fewer parameters.
        ranks: Shared ranks to try.
        rates: Learning rates to try.
        steps: Number of updates per run.
        repeats: Number of seeds.
        widen: Learning rates beyond the grid.
        halving: Whether a short round chooses the learning rates.
        full: Whether full fine-tuning is a baseline.
        more_seeds: Whether seeds are added where they would decide.
        finer: Whether a rank in between is tried.
        redistribute: Whether non-uniform ranks are trained.
        trials: Configurations that stability and escalation train at most.
        step_seconds: Measured time of one training step at the largest of the ranks.
        full_step_seconds: The same of full fine-tuning; of LoRA if ``limit`` does not allow a
            baseline; 0 without one.
        evaluation_seconds: Time of evaluating all sets, from one measured batch.
        error: Relative error of these times where they are extrapolated from short sequences; 0
            where they are measured.
        memory_bytes: Memory of a step, at least: tensors kept for the backward pass, extrapolated
            from short sequences, and of full fine-tuning gradients and moments; 0 in files of
            earlier versions.
        length: Tokens of a sequence; 0 in files of earlier versions.
        sequences: Largest number of sequences of an evaluation set; likewise.
        seconds: Estimate for the whole search.
        limit: ``--time`` in seconds; null for none.
        left_out: What is omitted: to stay within ``limit``, or full fine-tuning of weights that are
            not float32.
        saved: Estimated seconds by omission; without full fine-tuning of weights that are not
            float32, and in an extended search without the steps omitted before.
        stages: The stages of the search.
    """

    key: ClassVar[tuple[str, ...]] = ("record",)
    record: Literal["tune_plan"] = "tune_plan"
    budget: Count
    per_rank: Count
    largest: int
    tokens: Count
    rules: dict[str, int | None]
    ranks: tuple[int, ...]
    rates: tuple[float, ...]
    steps: Count
    repeats: Count
    widen: Count
    halving: bool
    full: bool
    more_seeds: bool
    finer: bool
    redistribute: bool
    trials: Count
    step_seconds: Seconds
    full_step_seconds: Seconds
    evaluation_seconds: Seconds
    seconds: Seconds
    limit: Seconds | None
    left_out: tuple[str, ...]
    stages: tuple[TuneStage, ...]
    magnitudes: Count = 0
    kind: str = ""
    slots: Count = 1
    saved: dict[str, Seconds] = Field(default_factory=dict)
    error: float = 0.0
    memory_bytes: Count = 0
    length: Count = 0
    sequences: Count = 0

    def params(self, rank: int) -> int:
        """Return the trainable parameters of one rank on all targeted layers."""
        return rank * self.per_rank + self.magnitudes


class TuneTrial(WholeRecord):
    """The loss of one run on one evaluation set; or of BASE.

    Those of the sweep over shared ranks, and of full fine-tuning, are copies of records in
    ``sweep.jsonl``.

    Args:
        set: The evaluation set, by its file's name.
        shifted: Whether the user named it as shifted.
        data: Hash of the evaluation file.
        tokens: Predictions that the loss is the mean of.
        variant: The configuration: ``base``, ``uniform-r8``, ``full``, ``prior``,
            ``uniform-r8+dropout``, …
        params: Trainable parameters; 0 for BASE.
        lr: Peak learning rate; null for BASE.
        steps: Updates; 0 for BASE.
        seed: Seed of the factors' initial values.
        loss: Mean loss in nats; null where it is not finite.
        train_loss: Mean loss over the last tenth of the steps; of BASE on training sequences; null
            where not finite.
        nll: Summed negative log-likelihood of each sequence, by which any two runs can be paired;
            empty without a loss.
        predictions: Number of predictions of each sequence; for BASE only.
    """

    key: ClassVar[tuple[str, ...]] = ("variant", "lr", "seed", "set")
    table: ClassVar[tuple[Shown | str, ...]] = ("loss",)
    record: Literal["tune_trial"] = "tune_trial"
    set: str
    shifted: bool = False
    data: str
    tokens: Count
    variant: str
    params: Annotated[Count, Shown(main=True)]
    lr: float | None = None
    steps: Count = 0
    seed: int = 0
    loss: Annotated[Nats | None, Shown(main=True, form=".4f")]
    train_loss: Nats | None = None
    nll: tuple[Nats, ...] = ()
    predictions: tuple[Count, ...] = ()


class TuneDecision(WholeRecord):
    """One decision, in the order in which it was made.

    Args:
        stage: The stage.
        name: Subject of the decision.
        outcome: ``chosen``: of all candidates of the stage. ``kept``: a candidate that replaced the
            incumbent. ``rejected``: a candidate that did not. ``not needed``: there is nothing to
            try, or no reason to. ``proposed``: to try next: it lowers the loss but is outside the
            budget, or was not trained, with its predicted ``seconds``. ``not tried``: not trained,
            for the reason in ``why``.
        why: The reason, with its numbers.
        rank: A shared rank; null without one.
        lr: Peak learning rate; null without a single one.
        params: Trainable parameters; null if not applicable.
        gap: Loss minus that of the incumbent on the deciding set, in nats, on the same seeds; in
            the stage ``ranks``, minus that of the best rank. Null where not trained, or without a
            seed at which both have a loss.
        error: Standard error of ``gap``; for one seed null, except in the stage ``escalation``:
            over paired sequences. Null in the stage ``ranks``.
        half: Half of the interval of ``gap`` that decides; null likewise, and in files of earlier
            versions.
        gap_shifted: Mean of the same over the shifted sets, of one seed on the first; null without
            any, in the stage ``ranks``, and if a candidate was rejected at the first seed.
        error_shifted: Standard error of ``gap_shifted``; null without it, or if it is not known.
        seeds: Number of seeds of ``gap``; of ``more seeds`` that were not tried, the number that
            would decide.
        seconds: Predicted duration of what was not trained, or that it saves; null if not known, or
            trained.
        layers: Layers that it is about, where these are named.
        files: Files in the run's folder that it is based on.
    """

    key: ClassVar[tuple[str, ...]] = ("stage", "name")
    record: Literal["tune_decision"] = "tune_decision"
    stage: str
    name: str
    outcome: Literal["chosen", "kept", "rejected", "not needed", "proposed", "not tried"]
    why: str
    rank: int | None = None
    lr: float | None = None
    params: Count | None = None
    gap: Nats | None = None
    error: Nats | None = None
    half: Nats | None = None
    gap_shifted: Nats | None = None
    error_shifted: Nats | None = None
    seeds: Count = 0
    seconds: Seconds | None = None
    layers: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


class Tune(WholeRecord):
    """The choice.

    Args:
        set: The evaluation set that decided.
        variant: The chosen configuration: ``uniform-r8``, or the name of a candidate that was kept.
        rank: The shared rank that it is based on.
        ranks: Rank of each layer by its path in the model; empty where all have ``rank``.
        significant: Whether the rank is shown to be enough and the gain is significant.
        lr: Peak learning rate.
        steps: Updates.
        alpha_over_rank: lora_alpha / r.
        alpha: lora_alpha where it does not follow the rank (rsLoRA); null otherwise.
        dora: Whether it is DoRA.
        dropout: Dropout probability, lora_dropout.
        weight_decay: Weight decay of AdamW.
        params: Trainable parameters.
        budget: Trainable parameters allowed.
        base_loss: Loss of BASE.
        loss: Mean loss over seeds.
        gain: Loss of BASE minus that of the chosen adapter, ``base_loss`` − ``loss``, in nats.
        gain_error: Standard error of ``gain`` over seeds; null for one seed.
        gain_of_full: Gain of full fine-tuning; null if it was not trained or has no gain.
        share_of_full: ``gain`` / ``gain_of_full``; null if that is.
        next_rank: The next higher rank tried; null if none.
        next_gain: Its additional gain in nats; null if none was tried.
        non_uniform: Whether non-uniform ranks were ``kept``, ``rejected``, or ``not tried``.
        gain_shifted: Gain on the first shifted set; null without a loss on one.
        gain_shifted_error: Standard error of ``gain_shifted`` over seeds; null for fewer than two.
        set_shifted: Name of the first shifted set; empty without one.
        seeds: Seeds of the chosen configuration.
    """

    key: ClassVar[tuple[str, ...]] = ("record",)
    table: ClassVar[tuple[Shown | str, ...]] = (
        "gain",
        "gain_error",
    )
    record: Literal["tune"] = "tune"
    set: str
    variant: str
    rank: int
    ranks: dict[str, int] = Field(default_factory=dict)
    significant: bool
    lr: float
    steps: Count
    alpha_over_rank: float
    dropout: float
    weight_decay: float
    params: Annotated[Count, Shown(main=True)]
    budget: Count
    base_loss: Nats
    loss: Nats
    gain: Annotated[Nats, Shown(main=True, form=".4f")]
    gain_error: Annotated[Nats | None, Shown(title="± gain", main=True)]
    gain_of_full: Nats | None
    share_of_full: float | None
    next_rank: int | None
    next_gain: Nats | None
    non_uniform: Literal["kept", "rejected", "not tried"]
    gain_shifted: Nats | None
    gain_shifted_error: Nats | None
    set_shifted: str
    seeds: Count
    alpha: float | None = None
    dora: bool = False

    def half_of(self, error: float | None) -> float | None:
        """Return half of the interval of a mean over the seeds; None for one seed."""
        from lora_diag.metrics.statistics import errors_needed  # deferred: imports SciPy

        return None if error is None else errors_needed(self.seeds - 1) * error

    @property
    def has_significant_gain(self) -> bool:
        """Whether the gain is larger than half of its interval; not of one seed."""
        half = self.half_of(self.gain_error)
        return half is not None and self.gain > half
