"""``probe truncation``: measure the loss of an update truncated to each rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

from lora_diag.models.swapping import Swapped
from lora_diag.models.truncating import truncated_layers
from lora_diag.probes.truncation.measure import cells_of, truncation
from lora_diag.probes.truncation.options import TruncationOptions
from lora_diag.records import LeftOut, Results
from lora_diag.running.measuring import check_ranks
from lora_diag.running.options import show_options
from lora_diag.running.probing import ProbeRun, check_files, describe_texts, left_out, pluralize
from lora_diag.running.progress import RunRecords


@show_options
def probe_truncation(
    base: Path | str,
    tuned: Path | str,
    **options: Unpack[TruncationOptions],
) -> Results[Any]:
    r"""Measure the loss of W_0 + ΔW_r for each rank r, ΔW_r the best rank-r approximation of ΔW (Eckart–Young).

    Weights are swapped in place; nothing is trained. Norms, biases, embeddings and head are not truncated.

    Args:
        base: Base model: a folder that transformers can open, or a Hub id.
        tuned: Fine-tuned checkpoint or adapter.
        evaluate: Held-out text or JSONL files from TUNED's training distribution.
        shifted: Files of another distribution.
        ranks: Ranks r; 0 restores the truncated layers of ``base``.
        granularity: ``all`` layers truncated together; or each ``layer`` or module ``type`` alone, the others as in
            TUNED.
        untruncated: Source of the other tensors: ``tuned``, or ``base``, as with an adapter on the matrices only.
        **options: ``TruncationOptions``.

    Returns:
        The records are in ``whole``: the losses of BASE, TUNED and every truncation, set by set.

    Raises:
        UsageError: An option is invalid, or the extra ``train`` is not installed.
        InputError: An input cannot be read, or transformers cannot open BASE.
        NothingComparedError: The checkpoints have no weight in common.

    Reference:
        Eckart and Young 1936, "The approximation of one matrix by another of lower rank".

    Example:
        >>> found = probe_truncation("sample_checkpoints/base",  # doctest: +SKIP
        ...     "sample_checkpoints/full_ft", ranks=[4, 16],
        ...     evaluate=["sample_checkpoints/eval/in_domain.txt"])
        >>> [(record.subject, record.rank, record.loss) for record in found.whole]  # doctest: +SKIP
    """
    run = ProbeRun("probe truncation", options, TruncationOptions)
    evaluate, shifted, per, rest = (run.options[n] for n in ("evaluate", "shifted", "granularity", "untruncated"))
    requested = list(check_ranks(run.options["ranks"], 0))
    check_files([base, tuned], evaluate, *shifted)
    compared = run.compare(base, tuned)
    deltas = compared.pairing.deltas
    chosen = truncated_layers(deltas, **run.selection)
    cells = cells_of(chosen, requested, per)
    model = run.open(base)
    texts = run.read_sets(evaluate, shifted)
    swapped = Swapped(model, deltas, requested[-1])
    sets = [text_set.name for text_set in texts]

    def measure_missing(kept: RunRecords[Any]) -> list[LeftOut]:
        todo = [cell for cell in cells if not kept.has(sets, **cell.fields)]
        run.watch.total = (len(todo) + 2) * run.batches(texts)
        svds = f", and the SVD of {pluralize(len(chosen), 'matrix', 'matrices')}"
        run.estimate(texts[0], f"{len(todo) + 2} losses on {pluralize(len(texts), 'set', 'sets')}", svds)
        for record in truncation(model, swapped, texts, todo, list(chosen), rest, run.batch, run.watch.batch):
            kept.put(record)
        return left_out(compared.pairing, swapped.absent)

    settings = {"ranks": requested, "per": per, "rest": rest, **run.selection}
    return run.over([*compared.inputs, *map(describe_texts, texts)], settings, measure_missing)
