"""Records of ``probe``: losses of a model, statistics of its layers' inputs; and the sets that
losses are on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal

from lora_diag.records.base import Count, Guard, Nats, Ratio, Record, Share, Shown, WholeRecord

Subject = Literal[
    "base",
    "tuned",
    "truncated",
    "reference",
    "adapter",
    "lora",
    "full",
    "bitfit",
    "checkpoint",
    "combination",
]


class Probe(WholeRecord):
    """One loss on one evaluation set: of a truncated update, of an adapter, of a run of a sweep, or
    of a checkpoint.

    A loss is the mean negative log-likelihood over the predicted tokens (over the examples, for a
    classifier), in nats.

    Args:
        probe: The command that measured it, without the word probe, such as ``truncation``.
        set: The evaluation set, by its file's name.
        shifted: Whether the user declared it as shifted.
        subject: Model of the loss: ``base``, ``tuned``, ``truncated``, ``reference``, ``adapter``;
            for a sweep's run ``lora``, or ``full`` and ``bitfit`` for the reference lines; of a
            run's checkpoints ``checkpoint``, or ``combination`` for an average or extrapolation.
        name: Path of an adapter, a reference or a checkpoint; the rule of a combination; for BASE
            the grid that it is rounded to, if any; else empty.
        layer: The layer that was truncated alone; null for all together.
        module_type: The module type that was truncated alone; null for all types together.
        rank: r; null if not applicable.
        match_norm: Whether a truncated update is lengthened to the norm of ΔW, (‖ΔW‖/‖ΔW_r‖)·ΔW_r
            in each layer.
        lr: Peak learning rate of a sweep's run; null otherwise.
        seed: Seed of the run: of a sweep's factors; otherwise informational only.
        tokens: Number of predictions in the mean loss.
        data: Hash of the evaluation file.
        loss: Loss in nats; null if a sweep's run diverged or a checkpoint is not finite.
        gap: Loss minus that of TUNED, on the same tokens. Of ``truncation`` and ``outputs``; null
            if unknown.
        gap_error: Standard error of ``gap``, from paired differences of blocks of sequences.
        kept: Fraction of TUNED's change of the loss, (loss_base − loss) / (loss_base − loss_tuned).
            Not clamped; null if TUNED's loss equals that of BASE and, for ``outputs``, if it is not
            below.
        energy: Fraction of ‖ΔW‖² of the truncated layers at rank r, C(r) over all of them; null
            otherwise.
        distance: ‖z_tuned − z‖ / ‖z_tuned − z_base‖ over all logits z.
        hidden: The same for the hidden states of every token at each depth: the embeddings, then
            the output of each block, as in transformers; null at a depth where BASE and TUNED
            agree, and if not recorded.
        kl: Mean KL(p_tuned ‖ p) over the predictions, in nats.
        agreement: Fraction of the predictions with the same most likely token as TUNED.
        change: Loss minus that of BASE, on the same tokens. Above 0 on a text of another kind it is
            what the fine-tune forgot. Of ``outputs`` and ``checkpoints``; null in other probes and
            in files of earlier versions, as the next five fields; the last three are of ``outputs``
            only.
        change_error: Standard error of ``change``, from paired differences of blocks of sequences;
            null for one.
        lost_at_most: Upper end of the one-sided 95% interval of ``change``, by Student's t over
            blocks of sequences; null without an error.
        kl_base: Mean KL(p_base ‖ p) over the predictions, in nats.
        kl_base_error: Standard error of ``kl_base``, likewise.
        confident: Fraction of the predictions whose label has a probability above 1/2.
        train_loss: Mean loss over the last tenth of a sweep's steps.
        nll: Summed negative log-likelihood of each sequence, in nats to 6 decimals, by which any
            two models can be paired; empty without a finite loss, and for ``truncation`` without
            ``--match-norm``.
        predictions: Number of predictions of each sequence; only for BASE, since it is the same for
            all models.
        sequences: Number of sequences, for ``truncation``; null elsewhere, where ``nll`` has it.
    """

    key: ClassVar[tuple[str, ...]] = (
        *(
            "probe",
            "set",
            "subject",
            "name",
            "layer",
            "module_type",
            "rank",
            "match_norm",
            "lr",
            "seed",
        ),
    )
    table: ClassVar[tuple[Shown | str, ...]] = (
        "loss",
        "gap",
        "gap_error",
        Shown(
            "to_tuned",
            "to TUNED",
            "Loss minus that of TUNED, with its standard error; empty for TUNED",
            form="+.4f",
            terminal=True,
            error="gap_error",
        ),
        "kept",
        "distance",
        "kl",
        "agreement",
        "change",
        "change_error",
        Shown(
            "to_base",
            "to BASE",
            "Loss minus that of BASE, with its standard error; empty for BASE",
            form="+.4f",
            terminal=True,
            drop=3,
            error="change_error",
        ),
    )
    guards: ClassVar[tuple[Guard, ...]] = (
        Guard("loss", "higher", "the loss on held-out data is higher than before", tolerance="1%"),
        Guard(
            "lost_at_most",
            "higher",
            "too much may be forgotten on this text: use fewer steps, a lower learning rate, or "
            "data of its kind",
            where=(("shifted", True),),
            limit_by="set",
        ),
    )
    record: Literal["probe"] = "probe"
    probe: str
    set: str
    shifted: bool = False
    subject: Subject
    name: str = ""
    layer: str | None = None
    module_type: str | None = None
    rank: int | None = None
    lr: float | None = None
    seed: int = 0
    tokens: Count
    data: str
    loss: Annotated[Nats | None, Shown(main=True, form=".4f")]
    gap: Annotated[Nats | None, Shown(main=True, terminal=False)] = None
    gap_error: Annotated[Nats | None, Shown(title="± gap", main=True, terminal=False)] = None
    kept: Annotated[float | None, Shown(drop=2, form=".2f", terminal=True)] = None
    energy: Share | None = None
    distance: Annotated[Ratio | None, Shown(form=".3f", terminal=True)] = None
    kl: Annotated[Nats | None, Shown(title="KL", terminal=True)] = None
    agreement: Annotated[
        Share | None, Shown(title="agree", drop=1, form="percent", terminal=True)
    ] = None
    train_loss: Nats | None = None
    hidden: tuple[float | None, ...] | None = None
    change: Annotated[Nats | None, Shown()] = None
    change_error: Annotated[Nats | None, Shown(title="± change")] = None
    lost_at_most: Annotated[Nats | None, Shown(title="lost ≤")] = None
    kl_base: Annotated[Nats | None, Shown(title="KL(BASE)", terminal=True, drop=4)] = None
    kl_base_error: Nats | None = None
    confident: Annotated[
        Share | None, Shown(title="p > ½", drop=5, form="percent", terminal=True)
    ] = None
    nll: tuple[Nats, ...] = ()
    predictions: tuple[Count, ...] = ()
    sequences: Count | None = None
    match_norm: bool = False

    @property
    def to_tuned(self) -> float | None:
        """``gap``; None for TUNED itself."""
        return None if self.subject == "tuned" else self.gap

    @property
    def to_base(self) -> float | None:
        """``change``; None for BASE itself."""
        return None if self.subject == "base" else self.change

    @property
    def nats(self) -> float:
        """The loss of a run that has one."""
        assert self.loss is not None
        return self.loss


class LayerInput(Record):
    """Statistics of the inputs of one linear layer on a text.

    Args:
        layer: The weight's name in BASE.
        size: Dimension of an input x.
        rows: Number of inputs.
        square: Mean square of the inputs, E‖x‖², the trace of C = E[xxᵀ].
        directions: Effective number of directions of the inputs, tr(C)²/‖C‖_F², between 1 and
            ``size``.
        shares: An earlier layer with the same input and the same C; null without one.
    """

    layer: str
    size: Annotated[int, Shown(title="in", main=True, pool="each")]
    rows: int
    square: Annotated[float, Shown(title="E‖x‖²", main=True)]
    directions: Annotated[float, Shown(main=True)]
    shares: str | None = None


class Activations(Record):
    """The result of ``probe activations``; printed, not written to a results file.

    Args:
        path: The safetensors file.
        model: The model.
        text: The file that was read.
        about: Description of the reading.
        notes: Notes on the text.
        tokens: Number of tokens.
        gradients: Source of the labels of the loss, if E[ggᵀ] of the output gradients is also in
            the file.
        layers: The recorded layers.
        left_out: Weights of the model that were skipped, each with its reason.
    """

    record: Literal["activations"] = "activations"
    path: str
    model: str
    text: str
    about: str
    notes: tuple[str, ...]
    tokens: int
    gradients: Literal["data", "model"] | None = None
    layers: tuple[LayerInput, ...]
    left_out: dict[str, str]


def set_names(records: Iterable[Any]) -> list[str]:
    """Return the names of the evaluation sets of records with a ``set``, in the order
    of the run.
    """
    return list(dict.fromkeys(record.set for record in records))


def main_sets(records: Sequence[Any]) -> list[str]:
    """Return the deciding sets of records with a ``set``: those not ``shifted``, or all if there is
    no other.
    """
    return set_names(record for record in records if not record.shifted) or set_names(records)
