"""Training runs: LoRA factors on a frozen BASE, all of BASE, or its biases and norms; BASE is
restored after every run.

A run is a cell: method, rank, peak learning rate, seed. All runs have the same batches in the same
order and the same number of steps.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_diag.errors import Given, InputError, UsageError, require
from lora_diag.models.activations import linear_layers
from lora_diag.models.data import Sequence as TokenSequence
from lora_diag.models.data import Texts
from lora_diag.models.losses import Losses, measure, nll, predict
from lora_diag.models.opening import Model
from lora_diag.records import Probe
from lora_diag.records.probe import Subject
from lora_diag.storage import open_checkpoint

ALPHA_OVER_RANK = 2
# rsLoRA scales by alpha/√r with one alpha for all ranks; with 16, r=64 has the scaling 2 of
# ``ALPHA_OVER_RANK``.
RSLORA_ALPHA = 16


@dataclass(frozen=True, slots=True)
class Lora:
    """A kind of LoRA.

    Args:
        targets: Modules as PEFT takes them: names, or a regular expression for whole names; None
            for all linear layers except the head.
        dora: Whether to also train a magnitude per output (Liu et al. 2024).
        rslora: Whether B A is scaled by alpha/√r and not alpha/r (Kalajdzievski 2023).
        config: Content of an ``adapter_config.json``, which replaces ``targets``, ``dora``,
            ``rslora`` and the rank; None to use these.
        vectors: Whether BASE's biases and norms are trained, too.
    """

    targets: tuple[str, ...] | str | None = None
    dora: bool = False
    rslora: bool = False
    config: Mapping[str, Any] | None = None
    vectors: bool = False

    @property
    def description(self) -> str:
        """Name of the method, and its alpha, without a ``config``."""
        names = {
            (0, 0): "LoRA",
            (1, 0): "DoRA",
            (0, 1): "rsLoRA",
            (1, 1): "DoRA with rsLoRA's scaling",
        }
        alpha = f"{RSLORA_ALPHA}" if self.rslora else f"{ALPHA_OVER_RANK}r"
        return f"{names[self.dora, self.rslora]}, alpha = {alpha}"


def layers_without_head(module: Any) -> dict[str, nn.Module]:
    """Return the linear layers outside the head, by the names of their weights.

    The head is the part outside the inner model: ``lm_head``, ``classifier``, ``score``.
    """
    inner, output = getattr(module, "base_model", module), module.get_output_embeddings()
    inside = {id(submodule) for submodule in inner.modules()} - {id(output)}
    return {name: layer for name, layer in linear_layers(module).items() if id(layer) in inside}


@contextmanager
def add_lora(model: Model, rank: int, kind: Lora) -> Iterator[Model]:
    """Yield BASE with fresh factors; remove them at the end of the block.

    With ``kind.vectors`` BASE's biases and norms are also trainable, and restored at the end.

    Args:
        model: BASE.
        rank: r of every factor pair; not used with ``kind.config``.
        kind: The kind of LoRA.

    Raises:
        InputError: PEFT cannot adapt this model, or there are no biases and norms to train.
    """
    with require("training an adapter", "train"):
        import peft
    options = _list_config_arguments(model, rank, kind)
    with train_in_place(model, only_vectors=True) if kind.vectors else nullcontext():
        vectors = [parameter for parameter in model.module.parameters() if parameter.ndim == 1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                wrapped: Any = peft.get_peft_model(model.module, peft.LoraConfig(**options))
            except ValueError as error:
                raise InputError(
                    Given("target_modules"), f"PEFT cannot adapt this model: {error}"
                ) from error
        if kind.vectors:
            for parameter in vectors:
                parameter.requires_grad_(True)
        try:
            yield replace(model, module=wrapped)
        finally:
            wrapped.unload()
            model.module.eval().requires_grad_(False)


def load_factors(model: Model, path: Path) -> None:
    """Load the weights of PEFT's file of an adapter into a model of ``add_lora`` with the same
    configuration.
    """
    with require("reading an adapter", "train"):
        import peft
    stored = open_checkpoint(path)
    weights = {name: stored.read(name).view(stored[name].shape) for name in stored}
    peft.set_peft_model_state_dict(model.module, weights)


def _list_config_arguments(model: Model, rank: int, kind: Lora) -> dict[str, Any]:
    """Return the arguments of PEFT's config: one rank everywhere, or ``kind.config`` without how to
    wrap and save.
    """
    if kind.config is not None:
        dropped = {"peft_type", "task_type", "base_model_name_or_path", "inference_mode"}
        return {key: value for key, value in kind.config.items() if key not in dropped}
    targets = kind.targets
    if targets is None:
        targets = tuple(name.removesuffix(".weight") for name in layers_without_head(model.module))
    return {
        "r": rank,
        "lora_alpha": RSLORA_ALPHA if kind.rslora else ALPHA_OVER_RANK * rank,
        "lora_dropout": 0.0,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "fan_in_fan_out": is_transposed(model.module),
        "use_dora": kind.dora,
        "use_rslora": kind.rslora,
    }


def is_transposed(module: nn.Module) -> bool:
    """Return whether a model stores its matrices as ``(in, out)``, as GPT-2 does: PEFT's
    ``fan_in_fan_out``.
    """
    return any(type(layer).__name__ == "Conv1D" for layer in module.modules())


def check_checkpointing(module: Any) -> None:
    """Refuse a model whose activations transformers cannot recompute.

    Raises:
        UsageError: transformers has no gradient checkpointing for this model.
    """
    if not getattr(module, "supports_gradient_checkpointing", False):
        raise UsageError(
            Given("gradient_checkpointing"),
            f"transformers has none for {type(module).__name__}",
            "remove the option",
        )


@contextmanager
def checkpoint_activations(module: Any) -> Iterator[None]:
    """Recompute the activations of every block in the backward pass of training, instead of keeping
    them.

    Args:
        module: A model of transformers, with or without an adapter in it.
    """
    # The older name is deprecated in transformers 5.24 and the only one in 5.18.
    name = "activation" if hasattr(module, "activation_checkpointing_enable") else "gradient"
    getattr(module, f"{name}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(module, f"{name}_checkpointing_disable")()
        # which enabling enabled, for blocks in front of the first factors
        module.disable_input_require_grads()


@contextmanager
def train_in_place(model: Model, only_vectors: bool) -> Iterator[Model]:
    """Yield BASE with trainable weights; at the end restore them and all buffers bit for bit from
    copies on the CPU.

    Args:
        model: BASE.
        only_vectors: Make only 1-D parameters trainable: biases and norms (BitFit: Ben Zaken et al.
            2022).

    Raises:
        InputError: There is nothing to train.
    """
    trained = [
        weight for weight in model.module.parameters() if weight.ndim == 1 or not only_vectors
    ]
    if not trained:
        raise InputError(
            "BitFit: this model has no biases or norms to train; train other parameters"
        )
    changing = [*trained, *model.module.buffers()]
    originals = [tensor.detach().to("cpu", copy=True) for tensor in changing]
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        yield model
    finally:
        with torch.no_grad():
            for tensor, original in zip(changing, originals, strict=True):
                tensor.copy_(original)
        for parameter in trained:
            parameter.grad = None
        model.module.eval().requires_grad_(False)


# Fraction of the steps over which the learning rate rises; it then decreases to zero along a
# cosine.
WARMUP = 0.05
CLIP_NORM = 1.0
# Description of these settings in a run record.
RECIPE = f"AdamW, no weight decay, gradient norm {CLIP_NORM:g}, warm-up {WARMUP:g}, cosine to 0"


@dataclass(frozen=True, slots=True)
class Cell:
    """One run.

    Args:
        rank: r of every factor pair, or of the ``config`` of the LoRA, whose pairs may differ; None
            for ``full`` and ``bitfit``.
        lr: Peak learning rate.
        seed: Seed of the initial factors and of dropout.
        subject: Method: the factors (``lora``), all of BASE (``full``), its biases and norms
            (``bitfit``).
    """

    rank: int | None
    lr: float
    seed: int
    subject: Subject = "lora"

    @property
    def fields(self) -> dict[str, Any]:
        """Fields that identify its records."""
        return {"subject": self.subject, "rank": self.rank, "lr": self.lr, "seed": self.seed}

    @property
    def label(self) -> str:
        """Label of the run."""
        subject = self.subject if self.rank is None else f"r={self.rank}"
        return f"{subject} lr={self.lr:g} seed {self.seed}"


@dataclass(frozen=True)
class TrainingSettings:
    """Settings shared by all cells.

    Args:
        texts: The training text.
        steps: Number of updates of a run.
        batch: Sequences per update.
        order: Seed of the order of sequences; every sequence is used once before any is repeated.
        kind: Kind of LoRA.
        decay: Weight decay of AdamW.
        checkpointing: Whether activations are recomputed in the backward pass.
    """

    texts: Texts
    steps: int
    batch: int
    order: int
    kind: Lora = field(default_factory=Lora)
    decay: float = 0.0
    checkpointing: bool = False

    @property
    def order_hash(self) -> str:
        """16 hex digits of the SHA-256 of the order: positions in ``texts`` of every step's
        sequences.
        """
        return hashlib.sha256(repr(list(self._locate_batches())).encode()).hexdigest()[:16]

    def batches(self) -> Iterator[list[TokenSequence]]:
        """Yield the batch of every step, the same in every call."""
        for places in self._locate_batches():
            yield [self.texts.sequences[place] for place in places]

    @property
    def used_texts(self) -> Texts:
        """The training text, reduced to the distinct sequences that a run uses, in the order of
        their first use.
        """
        used = dict.fromkeys(sequence for batch in self.batches() for sequence in batch)
        return replace(self.texts, sequences=tuple(used))

    def _locate_batches(self) -> Iterator[list[int]]:
        """Yield the positions in the text of every step's sequences."""
        generator = torch.Generator().manual_seed(self.order)
        pool: list[int] = []
        for _ in range(self.steps):
            while len(pool) < self.batch:
                pool += torch.randperm(len(self.texts.sequences), generator=generator).tolist()
            chosen, pool = pool[: self.batch], pool[self.batch :]
            yield chosen


def rate_at(step: int, steps: int, peak: float) -> float:
    """Return the learning rate of an update, counted from 0: linear warm-up, then a cosine to zero.

    Args:
        step: The update, from 0 to before ``steps``.
        steps: Number of updates of the run.
        peak: The largest learning rate.

    >>> [round(rate_at(step, 4, 1.0), 3) for step in range(4)]
    [1.0, 0.75, 0.25, 0.0]
    """
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step + 1 - warmup) / max(1, steps - warmup)))


def run_cell(
    model: Model,
    cell: Cell,
    training: TrainingSettings,
    sets: Sequence[Texts],
    after: Callable[[], None],
) -> list[Probe]:
    """Train one cell and return one record per set; without a loss if training diverged.

    Args:
        model: BASE; unchanged afterwards.
        cell: The run.
        training: Settings shared by all runs.
        sets: Evaluation sets, in batches of the size of training.
        after: Called after every step and every batch.
    """
    by_set, train_loss = losses_after(model, cell, training, sets, after)
    return [
        record_of(texts, losses, cell, train_loss)
        for texts, losses in zip(sets, by_set, strict=True)
    ]


def losses_after(
    model: Model,
    cell: Cell,
    training: TrainingSettings,
    sets: Sequence[Texts],
    after: Callable[[], None],
    keep: Callable[[Model], None] = lambda tuned: None,
) -> tuple[list[Losses], float]:
    """Train one cell and return its losses on every set, and the mean loss of its last tenth of
    steps.

    Args:
        model: BASE; unchanged afterwards.
        cell: The run.
        training: Settings shared by all runs.
        sets: Evaluation sets.
        after: Called after every step and every batch.
        keep: Called with the trained model.
    """
    torch.manual_seed(cell.seed)
    trainable = (
        train_in_place(model, only_vectors=cell.subject == "bitfit")
        if cell.rank is None
        else add_lora(model, cell.rank, training.kind)
    )
    with trainable as tuned:
        with checkpoint_activations(model.module) if training.checkpointing else nullcontext():
            train_loss = train(tuned, cell, training, after)
        tuned.module.eval()
        losses = [measure(tuned, texts, training.batch, after) for texts in sets]
        keep(tuned)
    return losses, train_loss


def count_trained(model: Model) -> int:
    """Return the number of trainable parameters."""
    return sum(
        parameter.numel() for parameter in model.module.parameters() if parameter.requires_grad
    )


def train(model: Model, cell: Cell, training: TrainingSettings, after: Callable[[], None]) -> float:
    """Train the trainable parameters, and return the mean loss of the last tenth of the steps, at
    least one.

    A step whose loss is not finite changes nothing.

    Args:
        model: The model; left in training mode.
        cell: Gives the peak learning rate.
        training: Texts, batches, number of steps and weight decay.
        after: Called after every step.
    """
    parameters = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=training.decay, fused=True)
    model.module.train()
    step_losses: list[float] = []
    for step, batch in enumerate(training.batches()):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, training.steps, cell.lr)
        optimizer.zero_grad()
        loss = mean_loss(model, batch)
        step_losses.append(float(loss.detach()))
        if math.isfinite(step_losses[-1]):
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
            optimizer.step()
        after()
    last = step_losses[-max(1, len(step_losses) // 10) :]
    return sum(last) / len(last)


def mean_loss(model: Model, batch: list[TokenSequence]) -> Tensor:
    """Return the mean negative log-likelihood over the predictions of a batch."""
    logits, labels = predict(model, batch)
    return torch.stack(list(map(nll, logits, labels))).sum() / sum(map(len, labels))


def record_of(
    texts: Texts,
    losses: Losses,
    cell: Cell | None = None,
    train_loss: float | None = None,
    name: str = "",
) -> Probe:
    """Return the record of a run on one set; without a run, of BASE, or of BASE rounded to the grid
    ``name``.
    """
    fields = cell.fields if cell else {"subject": "base"}
    return Probe(
        probe="sweep",
        name=name,
        **fields,
        **losses.fields_of_run(texts, train_loss),
        **losses.by_sequence(cell is None),
    )
