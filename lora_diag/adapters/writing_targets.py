"""Where PEFT would put the factors of a weight of BASE: its module in memory, the kind of layer, the orientation.

PEFT names modules as they are in memory, files name weights as the hub does. Where transformers 5 differs, the rules
below turn one into the other; the names of a PEFT adapter that is compressed again are taken from it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lora_diag.adapters.adapter import Adapter
from lora_diag.adapters.experts import FLIPPED_ON_DISK, TRANSPOSED_MODELS
from lora_diag.adapters.names import EXPERT, match_names
from lora_diag.adapters.orientation import Orientation
from lora_diag.checkpoints import Checkpoint
from lora_diag.deltas import CONVOLUTION, EXPERTS, HEAD, Delta

Kind = Literal["linear", "conv1d", "embedding", "convolution", "parameter"]

# Modules that look their rows up by index: nn.Embedding.
TABLE = re.compile(r"(^|\.)(embed_\w+|tok_embeddings|wte|wpe|\w*embeddings?|shared|relative_attention_bias)\.weight$")

# GPT-2 and its kin, whose Conv1D stores (in, out); asked only where biases do not tell.
CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})

# Models that transformers 5 keeps with fused experts in memory and stores expert by expert:
# ``conversion_mapping`` of transformers 5.24, the types of its patterns "mixtral" and "qwen2_moe".
FUSED_MODELS = frozenset({
    "mixtral", "minimax", "minimax_m2", "qwen2_moe", "qwen3_moe", "qwen3_next", "deepseek_v2", "deepseek_v3",
    "deepseek_v32", "dots1", "ernie4_5_moe", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "longcat_flash",
    "solar_open", "hunyuan_v1_moe", "flex_olmo", "olmoe", "exaone_moe", "afmoe", "cohere2_moe",
})  # fmt: skip

# One expert's matrix on disk -> the fused parameter, and which of its rows: the first or the second half.
FUSED_LEAVES = {
    "w1": ("gate_up_proj", 0), "gate_proj": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1), "up_proj": ("gate_up_proj", 1),
    "w2": ("down_proj", 0), "down_proj": ("down_proj", 0),
}  # fmt: skip
HALVES = {"gate_up_proj": 2, "down_proj": 1}

# A router beside experts, which transformers 5 makes a module of its own; as a parameter it can be reached either way.
ROUTER = re.compile(r"(?P<owner>.+)\.(gate|router)\.weight$")

# What transformers puts before the names of files that were saved from the model without its head.
HEADLESS = {"gpt2": "transformer", "bloom": "transformer", "opt": "model"}
BARE_MODEL = re.compile(r"(?<!Head)Model$")


@dataclass(frozen=True, slots=True)
class Target:
    """What one layer of BASE is to PEFT.

    Args:
        layer: The weight's name in BASE.
        shape: ``(out, in)`` as it is stored.
        module: PEFT's name: the module in memory; of a ``parameter``, its own path.
        kind: What the module is.
        transposed: Whether PEFT's B·A is ΔWᵀ of what is stored: Conv1D, embeddings, experts stored ``(in, out)``.
        kernel: Of a convolution, ``(in, kh, kw)``.
        expert: Of experts, index and number.
        half: Of one expert's matrix that is half of a fused one, which half and of how many.
    """

    layer: str
    shape: tuple[int, int]
    module: str
    kind: Kind
    transposed: bool = False
    kernel: tuple[int, ...] = ()
    expert: tuple[int, int] = (0, 1)
    half: tuple[int, int] = (0, 1)

    @property
    def peft_shape(self) -> tuple[int, int]:
        """``(out, in)`` as PEFT sees it: B is ``(out, r)``, A is ``(r, in)``."""
        return self.shape[::-1] if self.transposed else self.shape


def names_in_memory(adapter: Adapter, base: Checkpoint) -> dict[str, str]:
    """Return the names that a PEFT adapter uses for the weights it changes, by their names in BASE."""
    if not adapter.source.peft_type:
        return {}  # the names of other formats are not those of modules
    found, _ = match_names(dict(update.wanted for update in adapter.reading.updates), base, transposed=True)
    return {places[0].name: name for name, places in found.items() if len(places) == 1}


class Model:
    """What BASE tells of the model in memory.

    Args:
        base: The checkpoint.
        own_names: Names of weights in memory by their names in BASE, as far as they are known.
    """

    def __init__(self, base: Checkpoint, own_names: Mapping[str, str] | None = None) -> None:
        self._base = base
        self._own = own_names or {}
        self.type = str(base.config.get("model_type", ""))
        self._renames = _renames(base, self.type)
        self._orientation = Orientation(base, {}, self.type in CONV1D_MODELS)
        self._experts = _count_experts(base) if self.type in FUSED_MODELS else {}

    def in_memory(self, name: str) -> str:
        """Return the name that a weight has in memory."""
        if name in self._own:
            return self._own[name]
        for pattern, replacement in self._renames:
            name = re.sub(pattern, replacement, name)
        return name

    def target(self, delta: Delta) -> Target | str:
        """Return where the factors of a matrix go, or why nowhere."""
        name = delta.base.name if delta.base is not None else delta.layer
        if HEAD.search(delta.layer) and name != delta.layer:
            return "BASE ties it to the embedding: what PEFT adds to the one is added to both"
        stored = self._base[name].shape
        memory = self.in_memory(name)
        module = memory.removesuffix(".weight")
        if name.endswith("in_proj_weight") or f"{name.rpartition('.out_proj.')[0]}.in_proj_weight" in self._base:
            return "part of an nn.MultiheadAttention, whose update PEFT applies in its own way"
        if len(stored) == 3 and EXPERTS.search(name):
            index = int(delta.layer.rpartition("[")[2].rstrip("]")) if delta.layer.endswith("]") else 0
            in_out = (self.type in TRANSPOSED_MODELS) != (self.type in FLIPPED_ON_DISK)
            return Target(delta.layer, delta.shape, memory, "parameter", in_out, expert=(index, stored[0]))
        if (found := EXPERT.fullmatch(name)) and found["owner"] in self._experts and found["leaf"] in FUSED_LEAVES:
            return self._fused(delta, found)
        if not memory.endswith(".weight"):
            return "a bare parameter, not the weight of a layer"
        if len(stored) > 2:
            return _convolution(delta, module, stored, name)
        if (router := ROUTER.match(name)) and any(n.startswith(f"{router['owner']}.experts.") for n in self._base):
            return Target(delta.layer, delta.shape, memory, "parameter")
        if TABLE.search(name):
            return Target(delta.layer, delta.shape, module, "embedding", transposed=True)
        if self._orientation.in_out(name, (None, None), stored):
            return Target(delta.layer, delta.shape, module, "conv1d", transposed=True)
        return Target(delta.layer, delta.shape, module, "linear")

    def _fused(self, delta: Delta, found: re.Match[str]) -> Target:
        """Return the part of a fused parameter that one expert's own matrix is."""
        leaf, half = FUSED_LEAVES[found["leaf"]]
        owner = found["owner"].replace(".block_sparse_moe.", ".mlp.")
        expert = (int(found["index"]), self._experts[found["owner"]])
        module = self.in_memory(f"{owner}.{leaf}")
        return Target(delta.layer, delta.shape, module, "parameter", expert=expert, half=(half, HALVES[leaf]))


def _convolution(delta: Delta, module: str, stored: tuple[int, ...], name: str) -> Target | str:
    if len(stored) == 3 and not CONVOLUTION.search(name):
        return "a bare parameter of three dimensions, not the weight of a layer"
    if stored[1] == 1 and stored[0] > 1:
        return "a convolution in groups, into which PEFT cannot merge"
    return Target(delta.layer, delta.shape, module, "convolution", kernel=stored[1:])


def _count_experts(base: Checkpoint) -> dict[str, int]:
    """Return how many experts each mixture has that is stored expert by expert."""
    counts: dict[str, int] = {}
    for name in base:
        if found := EXPERT.fullmatch(name):
            counts[found["owner"]] = max(counts.get(found["owner"], 0), int(found["index"]) + 1)
    return counts


def _renames(base: Checkpoint, model_type: str) -> tuple[tuple[str, str], ...]:
    """Return the regular expressions that make names on disk those in memory, in their order."""
    names = list(base)
    if any(name.startswith("language_model.model.") for name in names):  # LLaVA and its kin
        return (
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^language_model\.model\.", "model.language_model."),
            (r"^(vision_tower|multi_modal_projector|vision_model)\.", r"model.\1."),
        )
    if model_type in {"qwen2_vl", "qwen2_5_vl"} and any(name.startswith("visual.") for name in names):
        return (r"^model\.", "model.language_model."), (r"^visual\.", "model.visual.")
    if model_type == "gpt_neox":
        return ((r"^embed_out\.", "lm_head."),)
    if model_type in FUSED_MODELS:
        return ((r"\.block_sparse_moe\.(gate|experts)\.", r".mlp.\1."),)
    prefix = HEADLESS.get(model_type)
    architectures = base.config.get("architectures") or [""]
    if prefix and not BARE_MODEL.search(str(architectures[0])) and not any(n.startswith(f"{prefix}.") for n in names):
        return ((r"^(?!lm_head\.)", f"{prefix}."),)
    return ()
