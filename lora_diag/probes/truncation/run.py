"""``probe``: what a model's loss says of an update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_diag.errors import UsageError
from lora_diag.linalg import resolve_device
from lora_diag.models.opening import open_model
from lora_diag.models.swapping import Swapped
from lora_diag.models.truncating import truncated_layers
from lora_diag.probes.truncation.measure import cells_of, truncation
from lora_diag.records import AnyRecord, Results, ResultsWriter
from lora_diag.running.inputs import compare
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

RANKS = (0, 1, 2, 4, 8, 16, 32, 64)
PER = ("all", "layer", "type")
REST = ("tuned", "base")


def probe_truncation(
    base: Path | str,
    tuned: Path | str,
    *,
    evaluate: Sequence[Path | str],
    shifted: Sequence[Path | str] = (),
    ranks: Sequence[int] = RANKS,
    per: str = "all",
    rest: str = "tuned",
    layers: str | None = None,
    exclude: str | None = None,
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
    r"""Measure the loss of W_0 + ΔW_r for each rank r, ΔW_r the best rank-r approximation of ΔW (Eckart–Young).

    Weights are swapped in place; nothing is trained. Norms, biases, embeddings and head are not truncated.

    Args:
        base: The model before: a folder that transformers can open, or a Hub id.
        tuned: The model after, or an adapter.
        evaluate: Text or JSONL files of the kind that TUNED was trained on, but held out.
        shifted: Files of another kind, to see what truncation does there.
        ranks: Ranks r; 0 takes the truncated layers back to ``base``.
        per: ``all`` layers truncated together; or each ``layer`` or module ``type`` alone, the others as in TUNED.
        rest: What the tensors are that are not truncated: as in ``tuned``, or as in ``base``, which is what an adapter
            on the matrices could give.
        layers: Regular expression; only weights whose name contains a match are truncated.
        exclude: Regular expression; weights whose name contains a match are not.
        length: Tokens of a sequence; by default 512 or what the model has room for.
        batch: Sequences in a batch.
        max_sequences: Use the first so many sequences of each file.
        tokenizer: ``auto``, ``bytes`` or a folder.
        dtype: Of the weights while they are measured.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        output: Results file, appended record by record.
        resume: Go on behind what an interrupted run left in ``output``.
        overwrite: Replace a file in the place of ``output`` that loradiag did not write.
        verify: Let ``resume`` compare a SHA-256 of every byte of the models; of texts it does so anyway.
        on_progress: Called with what is being measured, batches done and batches in all.
        on_record: Called with every record, in the order of the file, as it comes.
        on_note: Called with the estimate of what the run will cost, before it begins.

    Returns:
        The records are in ``whole``: the losses of BASE, TUNED and every truncation, set by set.

    Raises:
        UsageError: An option makes no sense, or the extra ``train`` is not installed.
        InputError: An input cannot be read, or transformers cannot open BASE.
        NothingComparedError: The checkpoints have no weight in common.

    Reference:
        Eckart and Young 1936, "The approximation of one matrix by another of lower rank".
    """
    check(batch, max_sequences, per=(per, PER), rest=(rest, REST))
    if not ranks or min(ranks) < 0:
        raise UsageError(f"--ranks {','.join(map(str, ranks))}: ranks must be whole numbers from 0 up")
    check_files(evaluate, *shifted)
    on = resolve_device(device)
    compared = compare(base, tuned, verify=verify)
    deltas = compared.pairing.deltas
    chosen = truncated_layers(deltas, layers, exclude)
    cells = cells_of(chosen, sorted(set(ranks)), per)
    model = open_model(base, on, dtype, length, tokenizer)
    texts = read_sets(model, evaluate, shifted, max_sequences)
    swapped = Swapped(model, deltas, max(ranks))
    settings = {"ranks": sorted(set(ranks)), "per": per, "rest": rest, "layers": layers, "exclude": exclude}
    run = run_of("probe truncation", (*compared.inputs, *map(described, texts)), settings, model, batch, dtype)

    watch = Watch(on_progress, on_record, on_note)
    with ResultsWriter[Any](Path(output) if output is not None else None, run, resume, overwrite) as writer:
        kept = Kept(writer, watch)
        if kept.finished is not None:
            return kept.finished
        todo = [cell for cell in cells if not kept.has(texts, **cell.fields)]
        watch.total = (len(todo) + 2) * batches_of(texts, batch)
        svds = f", and the SVD of {counted(len(chosen), 'matrix', 'matrices')}"
        estimate(model, texts[0], batch, watch, f"{len(todo) + 2} losses on {counted(len(texts), 'set', 'sets')}", svds)
        for record in truncation(model, swapped, texts, todo, list(chosen), rest, batch, watch.batch):
            kept.put(record)
        return kept.end(left_out(compared.pairing, swapped.absent))
