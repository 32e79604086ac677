"""llama.cpp: one α for all, divided by the rank of each tensor; the converter stops at every other kind of tensor.

Source: ggml-org/llama.cpp, ``convert_lora_to_gguf.py`` (``get_tensors``; ``alpha = lparams["lora_alpha"]``) at commit
0b03adaa632b, and ``src/llama-adapter.h`` (``llama_adapter_lora_weight::get_scale``: ``alpha ? alpha / rank : 1``, rank
from ``lora_b``) at commit 215841fc0178.

- ``alpha_pattern``, ``rank_pattern`` and ``use_rslora`` are not read.
- ``.base_layer.weight`` is skipped, weights of norms are passed through; any other name that is no
  ``lora_A``/``lora_B`` weight or ``lora_embedding_A``/``B`` ends the conversion. The runtime skips norms
  (``src/llama-adapter.cpp``, ``llama_adapter_lora_init_impl``, at commit fdfa89f12e75).
- With a head tied to the embedding, an update of the head has no tensor and is refused, and one of the embedding ends
  the process: it reaches the head, where its shapes do not fit (run with the build b11739).
- A module that the architecture's table of names does not have ends it, too; this check covers stacked experts only.

Date read: 2026-11-27.
"""

from __future__ import annotations

from functools import partial

from lora_diag.adapters.contents import Contents, Item
from lora_diag.adapters.layouts import GGUF
from lora_diag.diagnostics.portability.rules import Consumer, Outcome, Rule, join_reasons, tied_refusal, unjudged_tie


def _refuses(contents: Contents) -> str:
    odd = contents.first("dora", "bias", "value", "rows", "other")
    stack = contents.first("experts", "convolution")
    return join_reasons(
        f"the converter stops at {odd.key}" if odd is not None else "",
        "BD-LoRA" if contents.config.get("use_bdlora") else "",
        "KaSA" if contents.config.get("kasa_config") else "",
        f"the converter has no name for {stack.module}" if stack is not None else "",
        tied_refusal(GGUF, contents) if contents.tied else "",
    )


def _applies(contents: Contents, item: Item) -> Outcome:
    if item.part == "norm":
        return Outcome("dropped", why="the runtime skips norms")
    if contents.form == GGUF:
        return Outcome("intended", item.scale)
    alpha = float(contents.config["lora_alpha"])
    assert item.rank is not None
    why = "lora_alpha / rank of the tensor; patterns and rsLoRA are not read"
    return Outcome("applied", alpha / item.rank if alpha else 1.0, why)


CONSUMER = Consumer(
    "llamacpp",
    "llama.cpp",
    frozenset({"peft", GGUF}),
    (Rule("", "", ("0b03adaa632b",), _refuses, _applies, partial(unjudged_tie, GGUF)),),
)
