"""What a PEFT adapter file holds beside its own parts: weights and biases in full, and rows of an embedding.

``modules_to_save``, ``bias="all"`` and resized embeddings are stored as new values under the weight's plain name. The
config is not asked which they are: PEFT matches ``modules_to_save`` by the end of a name without a dot, so that "norm"
also saves every ``input_layernorm``, and only the file tells.
"""

from __future__ import annotations

import re

from lora_diag.adapters.keys import strip
from lora_diag.adapters.source import Source
from lora_diag.adapters.tokens import PART, token_update
from lora_diag.adapters.updates import NewValue, Update

# Names inside PEFT's wrappers, as dumps made by hand have them.
SAVED = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")
ORIGINAL = re.compile(r"\.original_module\.")


def stored_values(source: Source, names: list[str]) -> tuple[tuple[NewValue, ...], list[Update], tuple[str, ...]]:
    """Read what no family claimed.

    Args:
        source: The adapter.
        names: The tensors that belong to no module's factors.

    Returns:
        Weights in full, updates of rows, and tensors that change nothing.

    Raises:
        InputError: Token indices and rows do not fit together.
    """
    values, updates, ignored = [], [], []
    for key in names:
        name = SAVED.sub("", strip(key))
        if name.endswith(f".token_adapter.{PART}"):
            updates.append(token_update(source, key))
        elif ORIGINAL.search(name):
            ignored.append(key)
        else:
            is_copy = name.endswith(".base_layer.weight")
            values.append(NewValue(name.replace(".base_layer.", "."), key, is_copy))
    return tuple(values), updates, tuple(ignored)
