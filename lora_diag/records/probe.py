"""Records of ``probe``: what a model's loss says of an update."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal, Protocol

from lora_diag.records.base import Record, Share, WholeRecord
from lora_diag.records.shown import Shown

Subject = Literal["base", "tuned", "truncated", "reference", "adapter", "lora", "full", "bitfit"]


class Probe(WholeRecord):
    """One loss measured on one evaluation set: of a truncated update, of an adapter, of a run of a sweep.

    A loss is the mean negative log-likelihood over the predicted tokens (over the examples, for a classifier), in nats.

    Args:
        probe: Which probe measured it.
        set: The evaluation set, by its file's name.
        shifted: Whether the user named it as shifted.
        subject: Whose loss it is: ``base``, ``tuned``, ``truncated``, ``reference``, ``adapter``; of a sweep's
            run ``lora``, or ``full`` and ``bitfit`` for the reference lines.
        name: Of an adapter or a reference, its path; of BASE the grid that it is rounded to, if any; else empty.
        layer: The layer that was truncated alone; null for all together.
        module_type: The module type that was truncated alone; null for all types together.
        rank: r; null where none applies.
        lr: Peak learning rate of a sweep's run; null elsewhere.
        seed: Of the run: of a sweep's factors; elsewhere of nothing random but kept for the reader.
        tokens: Predictions that the loss is the mean of.
        data: Hash of the evaluation file.
        loss: In nats; null where a sweep's run diverged.
        gap: Loss minus that of TUNED (``truncation``, ``outputs``), on the same tokens; null where that is not known.
        gap_error: Standard error of ``gap``, from the paired differences of sequences taken as independent.
        kept: (loss_base − loss) / (loss_base − loss_tuned), the share of TUNED's change of the loss that is there;
            not clamped; null where TUNED's loss is that of BASE.
        energy: Share of ‖ΔW‖² of the truncated layers that rank r keeps, C(r) over all of them; null elsewhere.
        distance: ‖z_tuned − z‖ / ‖z_tuned − z_base‖ over all logits z.
        hidden: The same of the hidden states of every token at each depth: the embeddings, then behind each block, as
            transformers gives them; null at a depth where BASE and TUNED agree, and where none were taken.
        kl: Mean KL(p_tuned ‖ p) over the predictions, in nats.
        agreement: Share of the predictions whose most likely token is TUNED's.
        train_loss: Mean loss over the last tenth of a sweep's steps.
        nll: Of ``outputs`` and ``sweep``: summed negative log-likelihood of each sequence, in nats to 6 decimals, by
            which any two models can be paired; empty elsewhere.
        predictions: Of each sequence; of BASE only, because all models have the same.
    """

    key: ClassVar[tuple[str, ...]] = (
        "probe",
        "set",
        "subject",
        "name",
        "layer",
        "module_type",
        "rank",
        "lr",
        "seed",
    )
    shown: ClassVar[tuple[Shown, ...]] = (
        Shown("loss", "loss", "in nats", main=True, form=".4f"),
        Shown("gap", "gap", "loss minus that of TUNED, on the same tokens", main=True, terminal=False),
        Shown("gap_error", "± gap", "standard error of the gap", main=True, terminal=False),
        Shown(
            "to_tuned",
            "to TUNED",
            "loss minus that of TUNED, of all but TUNED, with its standard error",
            form="+.4f",
            terminal=True,
            error="gap_error",
        ),
        Shown("kept", "kept", "share of TUNED's change of the loss", drop=2, form=".2f", terminal=True),
        Shown("distance", "distance", "‖z_tuned − z‖/‖z_tuned − z_base‖ of logits", form=".3f", terminal=True),
        Shown("kl", "KL", "mean KL(p_tuned ‖ p) in nats", terminal=True),
        Shown(
            "agreement",
            "agree",
            "share of the predictions whose most likely token is TUNED's",
            share=True,
            drop=1,
            form="percent",
            terminal=True,
        ),
    )
    record: Literal["probe"] = "probe"
    probe: Literal["truncation", "outputs", "sweep"]
    set: str
    shifted: bool = False
    subject: Subject
    name: str = ""
    layer: str | None = None
    module_type: str | None = None
    rank: int | None = None
    lr: float | None = None
    seed: int = 0
    tokens: int
    data: str
    loss: float | None
    gap: float | None = None
    gap_error: float | None = None
    kept: float | None = None
    energy: Share | None = None
    distance: float | None = None
    kl: float | None = None
    agreement: Share | None = None
    train_loss: float | None = None
    hidden: tuple[float | None, ...] | None = None
    nll: tuple[float, ...] = ()
    predictions: tuple[int, ...] = ()

    @property
    def to_tuned(self) -> float | None:
        """``gap``; None of TUNED itself."""
        return None if self.subject == "tuned" else self.gap

    @property
    def nats(self) -> float:
        """The loss of a run that has one."""
        assert self.loss is not None
        return self.loss


class LayerInput(Record):
    """What reached one linear layer while a model read a text.

    Args:
        layer: The weight's name in BASE.
        size: How many numbers one input x has.
        rows: How many inputs there were.
        square: E‖x‖², the trace of C = E[xxᵀ].
        directions: tr(C)²/‖C‖_F², between 1 and ``size``: in how many directions the inputs lie, roughly.
        shares: The layer that is given the same input, and has the same C; null if none before it is.
    """

    shown: ClassVar[tuple[Shown, ...]] = (
        Shown("size", "in", "numbers of one input", main=True, pool="each"),
        Shown("square", "E‖x‖²", "mean square of the inputs", main=True),
        Shown("directions", "directions", "in how many directions the inputs lie, roughly", main=True),
    )
    layer: str
    size: int
    rows: int
    square: float
    directions: float
    shares: str | None = None


class Activations(Record):
    """What ``probe activations`` wrote; printed and not kept in a results file.

    Args:
        path: The safetensors file.
        model: Whose inputs these are.
        text: The file that was read.
        about: What it was read as.
        notes: What a careful reader should know.
        tokens: How many tokens were read.
        gradients: Whose labels the loss was taken against, if E[ggᵀ] of the outputs' gradients is in the file, too.
        layers: What is in the file.
        left_out: Weights of the model that are not in it, each with its reason.
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


class OnSet(Protocol):
    """What was measured on one text."""

    @property
    def set(self) -> str:
        """Its name."""
        ...

    @property
    def shifted(self) -> bool:
        """Whether it is of another kind than what was trained on."""
        ...


def set_names(records: Iterable[OnSet]) -> list[str]:
    """Return the names of the sets, in the order of the run."""
    return list(dict.fromkeys(record.set for record in records))


def main_sets(records: Sequence[OnSet]) -> list[str]:
    """Return the sets that decide: those that are not shifted, or all where there is no other."""
    return set_names(record for record in records if not record.shifted) or set_names(records)
