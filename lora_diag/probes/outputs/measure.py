"""``probe outputs``: measure the losses of models, and the distance of their outputs from those of
a full fine-tune.

Distances are of logits, probabilities, top choices and hidden states. An adapter is applied as ΔW
on the weights of BASE, so adapters of any kind can be compared. Sets are processed in chunks, so
that only the outputs of three models for a few sequences are in memory: logits of predictions, and
hidden states of every token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from lora_diag.adapters import locate
from lora_diag.errors import Given, UsageError
from lora_diag.models.data import Texts
from lora_diag.models.losses import Forgetting, Losses, divergence, forward, nll, select_predictions
from lora_diag.models.opening import Model
from lora_diag.models.swapping import Swapped
from lora_diag.probes.outputs import OutputsOptions
from lora_diag.records import LeftOut, Probe, Results
from lora_diag.records.probe import Subject
from lora_diag.rendering.text import quantity
from lora_diag.running.inputs import refuse_repeated
from lora_diag.running.judging import NamedModel, list_missing
from lora_diag.running.options import show_options
from lora_diag.running.probing import ProbeRun, describe_texts, left_out
from lora_diag.running.progress import RunRecords

# Memory limit of logits and hidden states of two models together.
OUTPUT_BYTES = 2**30


@dataclass(frozen=True)
class _Answer:
    """The outputs of a model for one sequence.

    Args:
        logits: Logits of predictions, ``(n, classes)`` float32.
        labels: Targets, ``(n,)``.
        hidden: Hidden states of every token, one ``(tokens, size)`` for each depth: embeddings,
            then the output of each block.
    """

    logits: Tensor
    labels: Tensor
    hidden: tuple[Tensor, ...]


@dataclass
class _Sums:
    """Running sums of one contender over a set.

    Args:
        nll: Summed negative log-likelihood of each sequence.
        counts: Number of predictions of each sequence.
        squares: ‖z_tuned − z‖² of the logits.
        kl: Σ KL(p_tuned ‖ p) over the predictions.
        same: Number of predictions with the same top choice as TUNED.
        hidden: ‖h_tuned − h‖² of the hidden states, by depth; empty without TUNED.
        forgetting: The comparison with BASE.
    """

    nll: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    squares: float = 0.0
    kl: float = 0.0
    same: int = 0
    hidden: list[float] = field(default_factory=list)
    forgetting: Forgetting = field(default_factory=Forgetting)

    @property
    def losses(self) -> Losses:
        return Losses.of(self.nll, self.counts)

    def add(self, answer: _Answer, base: _Answer, tuned: _Answer | None) -> None:
        """Add the outputs for one sequence; ``tuned`` are those of TUNED, None if there is none to
        compare with.
        """
        self.forgetting.add(answer.logits, base.logits, answer.labels)
        self.nll.append(float(nll(answer.logits, answer.labels)))
        self.counts.append(len(answer.labels))
        if tuned is None:
            return
        self.squares += _sum_squared_differences(tuned.logits, answer.logits)
        self.kl += divergence(tuned.logits, answer.logits)
        self.same += int((tuned.logits.argmax(-1) == answer.logits.argmax(-1)).sum())
        self.hidden = self.hidden or [0.0] * len(answer.hidden)
        for depth, (h, h_tuned) in enumerate(zip(answer.hidden, tuned.hidden, strict=True)):
            self.hidden[depth] += _sum_squared_differences(h_tuned, h)


def _sum_squared_differences(first: Tensor, second: Tensor) -> float:
    return float((first.double() - second.double()).square().sum())


@torch.no_grad()
def measure_outputs(
    model: Model,
    contenders: Sequence[NamedModel],
    texts: Texts,
    size: int,
    after_batch: Callable[[str], None],
) -> Iterator[Probe]:
    """Yield one record for each contender on one set.

    Args:
        model: BASE; its weights are changed and restored.
        contenders: At least two: BASE first, then TUNED if there is one, then the others.
        texts: The set.
        size: Sequences in a batch.
        after_batch: Called after every batch with the name or subject of the model.
    """
    sums = [_Sums() for _ in contenders]
    has_tuned = contenders[1].subject == "tuned"
    for chunk in iterate_chunks(model, texts, size):
        ends = [
            _compute_answers(model, contender, chunk, size, after_batch)
            for contender in contenders[:2]
        ]
        for i, contender in enumerate(contenders):
            answers = (
                ends[i] if i < 2 else _compute_answers(model, contender, chunk, size, after_batch)
            )
            for answer, base, second in zip(answers, *ends, strict=True):
                sums[i].add(answer, base, second if has_tuned else None)
    for contender, own_sums in zip(contenders, sums, strict=True):
        yield _record(contender, own_sums, sums[0], sums[1] if has_tuned else None, texts)


def iterate_chunks(model: Model, texts: Texts, size: int) -> Iterator[Texts]:
    """Yield parts of a set, of at least one batch, whose outputs from two models fit into
    ``OUTPUT_BYTES``.
    """
    config = model.module.config
    classes = len(model.labels) if model.kind == "classifier" else getattr(config, "vocab_size", 1)
    states = (getattr(config, "num_hidden_layers", 0) + 1) * getattr(config, "hidden_size", 0)
    longest = max(len(sequence.ids) for sequence in texts.sequences)
    step = size * max(1, OUTPUT_BYTES // (2 * 4 * longest * max(1, classes + states) * size))
    for first in range(0, len(texts.sequences), step):
        yield replace(texts, sequences=texts.sequences[first : first + step])


def _compute_answers(
    model: Model, contender: NamedModel, chunk: Texts, size: int, after_batch: Callable[[str], None]
) -> list[_Answer]:
    """Return a contender's outputs for every sequence; the model has BASE's weights before and
    afterwards.
    """
    answers = []
    with contender.applied():
        for chosen in chunk.batches(size):
            model_output = forward(model, chosen, hidden=True)
            for i, sequence in enumerate(chosen):
                logits, labels = select_predictions(model, sequence, model_output.logits[i])
                hidden = tuple(
                    states[i, : len(sequence.ids)].float()
                    for states in model_output.hidden_states or ()
                )
                answers.append(_Answer(logits.float(), labels, hidden))
            after_batch(contender.label)
    return answers


def _record(
    contender: NamedModel, own_sums: _Sums, base: _Sums, tuned: _Sums | None, texts: Texts
) -> Probe:
    """Return the record of a contender on a set, compared with TUNED if there is one."""
    losses, base_losses = own_sums.losses, base.losses
    fields: dict[str, Any] = {"loss": losses.mean}
    if tuned is not None:
        fields = losses.between(base_losses, tuned.losses)
        if base_losses.mean <= tuned.losses.mean:
            fields["kept"] = None
        if base.squares:
            fields["distance"] = math.sqrt(own_sums.squares / base.squares)
        fields["kl"] = own_sums.kl / losses.tokens
        fields["agreement"] = own_sums.same / losses.tokens
        depths = zip(own_sums.hidden, base.hidden, strict=True)
        fields["hidden"] = tuple(math.sqrt(x / b) if b else None for x, b in depths) or None
    return Probe(
        probe="outputs",
        **contender.fields,
        **losses.on(texts),
        **losses.by_sequence(is_base=contender.subject == "base"),
        **own_sums.forgetting.compare(losses, base_losses),
        **fields,
    )


@show_options
def probe_outputs(
    base: Path | str,
    tuned: Path | str | None,
    adapters: Sequence[Path | str] = (),
    **options: Unpack[OutputsOptions],
) -> Results[Any]:
    r"""Measure the held-out loss of every model, and the distance of its outputs from those of a
    full fine-tune.

    With z the logits of a model at all predicted positions, the distance of A is ‖z_tuned − z_A‖ /
    ‖z_tuned − z_base‖; likewise with the hidden states h of every token, at each depth.

    Args:
        base: Base model: a folder that transformers can open, or a Hub id.
        tuned: Full fine-tune; may be an adapter. None to compare adapters with each other and with
            BASE: then there are losses only.
        adapters: Adapters of any supported kind, or checkpoints with a merged adapter.
        reference: Another full fine-tune, such as another seed, to show the distance between
            equally good models.
        eval: Held-out texts: text or JSONL files, or folders saved by ``datasets``.
        shifted: Files of another distribution.
        **options: ``OutputsOptions``.

    Returns:
        The records are in ``whole``: one per set and model, including BASE and TUNED.

    Raises:
        UsageError: An option is invalid, BASE is an adapter, there is nothing to compare, an input
            is given twice, the output can be neither replaced nor resumed, or the extra ``train``,
            or ``datasets`` for a data set, is not installed.
        InputError: An input cannot be read or the output written, transformers cannot open BASE, or
            an update or a loss is not finite.
        NothingComparedError: A checkpoint has no weight in common with BASE.

    Example:
        >>> adapters = [
        ...     "sample_checkpoints/lora_r4",
        ...     "sample_checkpoints/lora_r16",
        ... ]  # doctest: +SKIP
        >>> found = probe_outputs(
        ...     "sample_checkpoints/base",  # doctest: +SKIP
        ...     "sample_checkpoints/full_ft",
        ...     adapters,
        ...     eval=["sample_checkpoints/eval/in_domain.txt"],
        ... )
        >>> [(record.subject, record.loss) for record in found.whole]  # doctest: +SKIP
    """
    run = ProbeRun("probe outputs", options, OutputsOptions)
    reference = run.options["reference"]
    models: list[tuple[Path | str, Subject]] = [(path, "adapter") for path in adapters]
    models += [(reference, "reference")] if reference else []
    if not models and tuned is None:
        raise UsageError(
            "probe outputs: nothing to compare with BASE; give TUNED or at least one ADAPTER"
        )
    refuse_repeated([path for path, _ in models], tuned)
    if tuned is not None:
        models.insert(0, (tuned, "tuned"))
    elif reference:
        raise UsageError(
            Given("reference"), "is compared with the full fine-tune", "give that with $tuned"
        )
    run.check_files(base, *(path for path, _ in models))
    compared = [run.compare(base, path) for path, _ in models]
    model = run.open(base)
    sets = run.read_sets()
    # The comparison of logits takes about as long as a forward pass.
    texts = run.fit(sets, lambda: 2 * (len(models) + 1) * run.count_tokens(sets))
    contenders = [NamedModel("base")]
    swaps = [Swapped(model, comparison.pairing.deltas, 0) for comparison in compared]
    inputs = [compared[0].inputs[0]]
    for (_, role), comparison, swapped in zip(models, compared, swaps, strict=True):
        model_input = comparison.inputs[-1]
        inputs.append(
            model_input if role == "tuned" else model_input.model_copy(update={"role": role})
        )
        name = "" if role == "tuned" else model_input.path
        contenders.append(NamedModel(role, name, swapped.applied))

    def measure_missing(run_records: RunRecords[Any]) -> list[LeftOut]:
        todo = [each for each in texts if list_missing(run_records, [each], contenders)]
        run.watch.total = len(contenders) * run.batches(todo)
        run.estimate(
            texts[0],
            f"{len(contenders)} models on {quantity(len(todo), 'set')}",
            on_logits=lambda logits: [divergence(logits, logits) for _ in ("base", "tuned")],
        )
        for text_set in todo:
            for record in measure_outputs(model, contenders, text_set, run.batch, run.watch.batch):
                run_records.put(record)
        skipped: dict[tuple[str, str], LeftOut] = {}  # each tensor once for each reason
        for comparison, swapped in zip(compared, swaps, strict=True):
            for tensor in left_out(comparison.pairing, swapped.absent):
                skipped.setdefault((tensor.layer, tensor.reason), tensor)
        return list(skipped.values())

    return run.over([*inputs, *map(describe_texts, texts)], {}, measure_missing)


def compare_models(
    base: Path | str,
    models: Sequence[str],
    tuned: str | None = None,
    **options: Unpack[OutputsOptions],
) -> Results[Any]:
    """Measure models of which the full fine-tune is ``tuned``, or the first if it is no adapter and
    no step of a run.

    The others are sorted by step within each run: a shell sorts 100 before 20. A step is the number
    at the end of a path; paths that differ only in it are of one run.

    Args:
        base: As in ``probe_outputs``.
        models: Paths of the models, at least one; ``tuned`` may be among them.
        tuned: The full fine-tune; None to take the first of the models, if it qualifies.
        **options: ``OutputsOptions``.

    Returns:
        Results of ``probe_outputs``, which also documents the errors.
    """
    (run, step), *following = map(_split_step, models)
    is_step = step >= 0 and any(other_run == run for other_run, _ in following)
    if tuned is not None:
        others = [path for path in models if path.rstrip("/") != tuned.rstrip("/")]
    elif not is_step and not locate(models[0]).is_adapter:
        tuned, *others = models
    else:
        others = list(models)
    runs = [_split_step(path)[0] for path in others]
    others.sort(key=lambda path: (runs.index(_split_step(path)[0]), _split_step(path)[1]))
    return probe_outputs(base, tuned, others, **options)


def _split_step(path: str) -> tuple[str, int]:
    """Return a path without the number at its end, and that number; -1 without one.

    >>> _split_step("out/checkpoint-100/"), _split_step("out/full")
    (('out/checkpoint-', 100), ('out/full', -1))
    """
    match = re.fullmatch(r"(.*?)(\d{1,18})?", path.rstrip("/"), re.DOTALL)
    assert match is not None
    return match[1], int(match[2] or -1)
