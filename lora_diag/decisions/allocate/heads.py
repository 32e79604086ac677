"""Heads of a fine-tuned model that are trained in full (PEFT's ``modules_to_save``), and their task type.

A task head is new, so BASE has no weight for a low-rank update, and it is small. PEFT itself trains ``classifier`` and
``score`` (sequence and token classification) and ``qa_outputs`` (question answering) in full.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.records import LeftOut, Results
from lora_diag.records.names import depth_of

# Names of heads of transformers 5 classes for classification and question answering; the language-modelling head is a
# vocabulary table (``names.part_of``) and not included.
_HEAD = re.compile(
    r"(?:.*\.)?(?:\w*classifier|score|qa_outputs|\w*pooler|classification_head|multiple_choice_head|sequence_summary"
    r"|logits_proj)(?=\.|$)"
)

# The end of a class name -> PEFT's task type. Other classes (masked language models, multiple choice) have none.
_TASKS = (
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
)
_SEQ_2_SEQ = re.compile(
    r"(T5(Gemma)?|Bart|PegasusX?|LED|ProphetNet|M2M100|Blenderbot(Small)?|NllbMoe|FSMT|SwitchTransformers)"
    r"ForConditionalGeneration$|MarianMTModel$"
)


def head_of(name: str) -> str | None:
    """Return the module of the head that contains a tensor; None outside of heads.

    >>> head_of("classifier.out_proj.weight"), head_of("bert.pooler.dense.bias"), head_of("lm_head.weight")
    ('classifier', 'bert.pooler', None)
    >>> head_of("model.layers.3.score.weight")  # a block's own
    """
    match = _HEAD.match(name)
    return match[0] if match and depth_of(match[0]) is None else None


def heads_to_save(
    records: Sequence[Spectrum],
    left_out: Sequence[LeftOut],
    target: re.Pattern[str] | None,
    exclude: re.Pattern[str] | None,
) -> list[LeftOut]:
    """Return every tensor of the heads to train in full.

    These are the heads that TUNED changed or that only it has, except those with a tensor that matches a pattern:
    a match of ``target`` gives it a rank, one of ``exclude`` leaves it unchanged.

    Args:
        records: Spectra.
        left_out: Tensors without a spectrum.
        target: The user's selection of layers.
        exclude: The user's exclusion of layers.
    """
    heads: dict[str, list[Spectrum | LeftOut]] = {}
    tensors: list[Spectrum | LeftOut] = [*records, *left_out]
    for item in tensors:
        if head := head_of(item.layer):
            heads.setdefault(head, []).append(item)
    return [
        LeftOut(
            layer=item.layer,
            shape=(item.tuned_shape if isinstance(item, LeftOut) else None) or item.shape,
            reason="saved",
            detail=f"in the head {head}, which is trained in full (modules_to_save)",
            fro=item.fro,
            base_fro=item.base_fro,
        )
        for head, items in heads.items()
        if any(map(_is_new_or_moved, items)) and not any(_is_named(item.layer, target, exclude) for item in items)
        for item in items
        if not isinstance(item, LeftOut) or item.reason != "only_in_base"
    ]


def _is_new_or_moved(item: Spectrum | LeftOut) -> bool:
    return bool(item.fro) or (isinstance(item, LeftOut) and item.reason in {"only_in_tuned", "shape_differs"})


def _is_named(name: str, *patterns: re.Pattern[str] | None) -> bool:
    return any(pattern is not None and pattern.search(name) for pattern in patterns)


def size_of(items: Iterable[LeftOut]) -> int:
    """Return the number of parameters of these tensors."""
    return sum(math.prod(item.shape) for item in items)


def task_type_of(results: Results[Any], heads: Collection[str]) -> str | None:
    """Return PEFT's task type of a fine-tune by the class in its config; None if it cannot be determined.

    Args:
        results: Spectra or an allocation of it: the class of TUNED is used, else that of BASE.
        heads: Heads that are trained in full. PEFT always trains the heads of a task type in full, so a task type whose
            head is not among them is not returned.
    """
    sides = [side for role in ("tuned", "base") for side in results.run.inputs if side.role == role]
    architecture = next((side.architecture for side in sides if side.architecture), "")
    if _SEQ_2_SEQ.search(architecture):
        return "SEQ_2_SEQ_LM"
    task = next((task for end, task in _TASKS if architecture.endswith(end)), None)
    return task if heads or task == "CAUSAL_LM" else None
