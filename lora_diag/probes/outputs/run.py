"""``probe outputs``: compare adapters with a full fine-tune by the outputs of the models."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

from lora_diag.errors import UsageError
from lora_diag.models.swapping import Swapped
from lora_diag.probes.outputs.measure import Contender, outputs
from lora_diag.probes.outputs.options import OutputsOptions
from lora_diag.records import LeftOut, Results
from lora_diag.records.probe import Subject
from lora_diag.running.inputs import Comparison
from lora_diag.running.options import show_options
from lora_diag.running.probing import ProbeRun, check_files, describe_texts, left_out, pluralize
from lora_diag.running.progress import RunRecords


@show_options
def probe_outputs(
    base: Path | str,
    tuned: Path | str | None,
    adapters: Sequence[Path | str] = (),
    **options: Unpack[OutputsOptions],
) -> Results[Any]:
    r"""Measure the held-out loss of every model, and the distance of its outputs from those of a full fine-tune.

    With z the logits of a model at all predicted positions, the distance of A is ‖z_tuned − z_A‖ / ‖z_tuned − z_base‖;
    likewise with the hidden states h of every token, at each depth.

    Args:
        base: Base model: a folder that transformers can open, or a Hub id.
        tuned: Full fine-tune; may be an adapter. None to compare adapters with each other and with BASE: then there are
            losses only.
        adapters: Adapters of any supported kind, or checkpoints with a merged adapter.
        reference: Another full fine-tune, such as another seed, to show the distance between equally good models.
        evaluate: Held-out texts: text or JSONL files, or folders saved by ``datasets``.
        shifted: Files of another distribution.
        **options: ``OutputsOptions``.

    Returns:
        The records are in ``whole``: one per set and model, including BASE and TUNED.

    Raises:
        UsageError: An option is invalid, there is nothing to compare, or the extra ``train`` is missing.
        InputError: An input cannot be read, or transformers cannot open BASE.
        NothingComparedError: A checkpoint has no weight in common with BASE.

    Example:
        >>> adapters = ["sample_checkpoints/lora_r4", "sample_checkpoints/lora_r16"]  # doctest: +SKIP
        >>> found = probe_outputs("sample_checkpoints/base",  # doctest: +SKIP
        ...     "sample_checkpoints/full_ft", adapters,
        ...     evaluate=["sample_checkpoints/eval/in_domain.txt"])
        >>> [(record.subject, record.loss) for record in found.whole]  # doctest: +SKIP
    """
    run = ProbeRun("probe outputs", options, OutputsOptions)
    reference, evaluate, shifted = (run.options[name] for name in ("reference", "evaluate", "shifted"))
    others: list[tuple[Path | str, Subject]] = [(path, "adapter") for path in adapters]
    others += [(reference, "reference")] if reference else []
    _refuse_repeated(tuned, [path for path, _ in others])
    if tuned is not None:
        others.insert(0, (tuned, "tuned"))
    elif reference:
        raise UsageError("--reference: is compared with the full fine-tune; give that with --tuned")
    check_files([base, *(path for path, _ in others)], evaluate, *shifted)
    compared = [run.compare(base, path) for path, _ in others]
    model = run.open(base)
    texts = run.read_sets(evaluate, shifted)
    contenders = [Contender("base", "", None)]
    inputs = [compared[0].inputs[0]]
    for (_, role), comparison in zip(others, compared, strict=True):
        given = comparison.inputs[-1]
        inputs.append(given if role == "tuned" else given.model_copy(update={"role": role}))
        name = "" if role == "tuned" else given.path
        contenders.append(Contender(role, name, Swapped(model, comparison.pairing.deltas, 0)))

    def measure_missing(kept: RunRecords[Any]) -> list[LeftOut]:
        todo = [
            text_set
            for text_set in texts
            if not all(
                kept.has([text_set.name], subject=contender.subject, name=contender.name) for contender in contenders
            )
        ]
        run.watch.total = len(contenders) * run.batches(todo)
        run.estimate(texts[0], f"{len(contenders)} models on {pluralize(len(todo), 'set', 'sets')}")
        for text_set in todo:
            for record in outputs(model, contenders, text_set, run.batch, run.watch.batch):
                kept.put(record)
        return _list_left_out(compared, contenders[1:])

    return run.over([*inputs, *map(describe_texts, texts)], {}, measure_missing)


def _refuse_repeated(tuned: Path | str | None, others: Sequence[Path | str]) -> None:
    """Refuse to compare nothing, or an input twice.

    Raises:
        UsageError: There is nothing to compare, or an input is given twice.
    """
    if not others:
        raise UsageError(
            "probe outputs: nothing to compare with TUNED; give at least one ADAPTER, or another full fine-tune with "
            "--reference"
        )
    paths: set[str] = set()
    for path in others if tuned is None else (tuned, *others):
        if os.path.realpath(path) in paths:
            raise UsageError(f"{path}: given twice; give each path once")
        paths.add(os.path.realpath(path))


def _list_left_out(compared: Sequence[Comparison], contenders: Sequence[Contender]) -> list[LeftOut]:
    """Return tensors that could not be put into the model, each once."""
    reasons: dict[tuple[str, str], LeftOut] = {}
    for comparison, contender in zip(compared, contenders, strict=True):
        assert contender.swapped is not None
        for item in left_out(comparison.pairing, contender.swapped.absent):
            reasons.setdefault((item.layer, item.reason), item)
    return list(reasons.values())
