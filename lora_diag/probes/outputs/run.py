"""``probe outputs``: adapters held against a full fine-tune by what the models say."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_diag.errors import UsageError
from lora_diag.linalg import resolve_device
from lora_diag.models.opening import open_model
from lora_diag.models.swapping import Swapped
from lora_diag.probes.outputs.measure import Contender, outputs
from lora_diag.records import AnyRecord, LeftOut, Results, ResultsWriter
from lora_diag.records.probe import Subject
from lora_diag.running.inputs import Comparison, compare
from lora_diag.running.probing import (
    Kept,
    Watch,
    batches_of,
    check,
    check_files,
    counted,
    described,
    estimate,
    left_out,
    read_sets,
    run_of,
)


def probe_outputs(
    base: Path | str,
    tuned: Path | str,
    adapters: Sequence[Path | str] = (),
    *,
    reference: Path | str | None = None,
    evaluate: Sequence[Path | str],
    shifted: Sequence[Path | str] = (),
    length: int | None = None,
    batch: int = 8,
    max_sequences: int | None = None,
    tokenizer: str = "auto",
    dtype: str = "float32",
    device: str = "auto",
    output: Path | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
    on_record: Callable[[AnyRecord], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Results[Any]:
    r"""Measure the loss of every model on held-out text, and how far its outputs are from those of a full fine-tune.

    With z the logits of a model at all predicted positions, the distance of A is ‖z_tuned − z_A‖ / ‖z_tuned − z_base‖;
    likewise with the hidden states h of every token, at each depth.

    Args:
        base: The model before: a folder that transformers can open, or a Hub id.
        tuned: The full fine-tune; an adapter will do.
        adapters: Adapters of any kind that ``loradiag`` reads, or checkpoints with one merged in.
        reference: Another full fine-tune, such as another seed: how far equally good models are apart.
        evaluate: Held-out texts: text or JSONL files, or folders that ``datasets`` saved.
        shifted: Files of another kind.
        length: Tokens of a sequence; by default 512 or what the model has room for.
        batch: Sequences in a batch.
        max_sequences: Use the first so many sequences of each file.
        tokenizer: ``auto``, ``bytes`` or a folder.
        dtype: Of the weights while they run.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        output: Results file, appended set by set.
        resume: Go on behind what an interrupted run left in ``output``; finished sets are not run again.
        overwrite: Replace a file in the place of ``output`` that loradiag did not write.
        verify: Let ``resume`` compare a SHA-256 of every byte of the models; of texts it does so anyway.
        on_progress: Called with what is being measured, batches done and batches in all.
        on_record: Called with every record, in the order of the file, as it comes.
        on_note: Called with the estimate of what the run will cost, before it begins.

    Returns:
        The records are in ``whole``: one a set and model, BASE and TUNED among them.

    Raises:
        UsageError: An option makes no sense, nothing is to be held against TUNED, or the extra ``train`` is missing.
        InputError: An input cannot be read, or transformers cannot open BASE.
        NothingComparedError: A checkpoint has no weight in common with BASE.
    """
    check(batch, max_sequences)
    others = [*((path, "adapter") for path in adapters), *([(reference, "reference")] if reference else [])]
    _distinct(tuned, [path for path, _ in others])
    check_files(evaluate, *shifted)
    on = resolve_device(device)
    full, compared = compare(base, tuned, verify=verify), [compare(base, path, verify=verify) for path, _ in others]
    model = open_model(base, on, dtype, length, tokenizer)
    texts = read_sets(model, evaluate, shifted, max_sequences)
    contenders = [Contender("base", "", None), Contender("tuned", "", Swapped(model, full.pairing.deltas, 0))]
    inputs = [*full.inputs]
    for (_, role), other in zip(others, compared, strict=True):
        subject: Subject = "reference" if role == "reference" else "adapter"
        described_as = other.inputs[-1].model_copy(update={"role": role})
        inputs.append(described_as)
        contenders.append(Contender(subject, described_as.path, Swapped(model, other.pairing.deltas, 0)))
    run = run_of("probe outputs", (*inputs, *map(described, texts)), {}, model, batch, dtype)
    watch = Watch(on_progress, on_record, on_note)
    with ResultsWriter[Any](Path(output) if output is not None else None, run, resume, overwrite) as writer:
        kept = Kept(writer, watch)
        if kept.finished is not None:
            return kept.finished
        todo = [each for each in texts if not all(kept.has([each], subject=c.subject, name=c.name) for c in contenders)]
        watch.total = len(contenders) * batches_of(todo, batch)
        estimate(model, texts[0], batch, watch, f"{len(contenders)} models on {counted(len(todo), 'set', 'sets')}")
        for each in todo:
            for record in outputs(model, contenders, each, batch, watch.batch):
                kept.put(record)
        return kept.end(_left_out([full, *compared], contenders[1:]))


def _distinct(tuned: Path | str, others: Sequence[Path | str]) -> None:
    """Refuse to compare nothing, or one thing twice.

    Raises:
        UsageError: That was asked.
    """
    if not others:
        raise UsageError("probe outputs: name at least one ADAPTER, or another full fine-tune with --reference")
    seen = {os.path.realpath(tuned)}
    for path in others:
        if os.path.realpath(path) in seen:
            raise UsageError(f"{path}: is named twice")
        seen.add(os.path.realpath(path))


def _left_out(compared: Sequence[Comparison], contenders: Sequence[Contender]) -> list[LeftOut]:
    """Return what could not be put into the model, each tensor once."""
    found: dict[tuple[str, str], LeftOut] = {}
    for comparison, contender in zip(compared, contenders, strict=True):
        assert contender.swapped is not None
        for item in left_out(comparison.pairing, contender.swapped.absent):
            found.setdefault((item.layer, item.reason), item)
    return list(found.values())
