"""PEFT's place for the factors of a weight of BASE: its module in memory, the kind of layer, the
orientation.

PEFT uses names of modules in memory, files use the Hub's names. The rules below convert between
them for transformers 5; a recompressed PEFT adapter keeps its own names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lora_diag.adapters import names
from lora_diag.adapters.adapter import Adapter
from lora_diag.adapters.experts import TRANSPOSED_MODELS
from lora_diag.adapters.placing import Orientation
from lora_diag.deltas import CONVOLUTION, EXPERTS, HEAD, Delta
from lora_diag.storage import Checkpoint

Kind = Literal["linear", "conv1d", "embedding", "convolution", "parameter"]

# Modules with row lookup by index: nn.Embedding.
TABLE = re.compile(
    r"(^|\.)(embed_\w+|pos_embed|tok_embeddings|wte|wpe|\w*embeddings?|shared|relative_attention_bias)\.weight$"
)

# GPT-2 and related models, whose Conv1D stores (in, out); used only if biases do not decide.
CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})

# Models that transformers 5 holds with fused experts in memory and stores expert by expert:
# ``conversion_mapping`` of transformers 5.24, the types of its patterns "mixtral" and "qwen2_moe",
# and three more.
FUSED_MODELS = frozenset({
    "mixtral", "minimax", "minimax_m2", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next",
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "glm4_moe",
    "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "longcat_flash", "solar_open", "hunyuan_v1_moe",
    "flex_olmo", "olmoe", "exaone_moe", "afmoe", "cohere2_moe", "jamba", "lfm2_moe", "nemotron_h",
})  # fmt: skip

# Models that transformers holds transposed in memory with respect to disk, except for square
# experts: it transposes those whose shape differs from the parameter.
FLIPPED_ON_DISK = frozenset({"qwen3_vl_moe", "qwen3_vl_moe_text"})

# Models whose experts have no gate: the up projection is a separate parameter.
UNGATED_MODELS = frozenset({"nemotron_h"})

# One expert's matrix on disk -> the fused parameter, and its rows: the first or the second half.
FUSED_LEAVES = {
    "w1": ("gate_up_proj", 0), "gate_proj": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1), "up_proj": ("gate_up_proj", 1),
    "w2": ("down_proj", 0), "down_proj": ("down_proj", 0),
}  # fmt: skip
HALVES = {"gate_up_proj": 2, "up_proj": 1, "down_proj": 1}

# Names that PEFT 0.21 treats as single experts anywhere in such a model, and converts to targets of
# the fused parameter (``_convert_peft_config_moe``). Dense layers and shared experts can be
# targeted as parameters.
EXPERT_LIKE_NAMES = frozenset({*FUSED_LEAVES, "gate"})

# Modules that PEFT refuses to adapt, by model type (``_check_lora_target_modules_mamba``).
MAMBA_MODELS = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
REFUSED_IN_MAMBA = frozenset({"out_proj", "conv1d"})

# A router next to experts, a separate module in transformers 5; it can be targeted as a parameter
# in all versions.
ROUTER = re.compile(r"(?P<owner>.+)\.(gate|router)\.weight$")
SIBLING_OF_EXPERTS = re.compile(r"(?P<owner>.+)\.experts\.")

# Models that also have ``language_model.model.`` in memory; LLaVA and related models have
# ``model.language_model.`` there.
NESTED_IN_MEMORY = frozenset({"llama4", "blip-2", "instructblip", "instructblipvideo"})

# Models for which PEFT 0.21 loads and merges all written factors, as tested with transformers 5.24.
VERIFIED_MODELS = frozenset({
    "albert", "bamba", "bart", "beit", "bert", "blip-2", "bloom", "clip", "codegen", "cohere2",
    "convnext", "data2vec-vision", "deberta-v2", "deepseek_v3", "deit", "dinov2", "distilbert",
    "electra", "ernie4_5_moe", "falcon", "falcon_h1", "gemma", "gemma2", "gemma3", "gemma3_text",
    "gemma3n_text", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj",
    "granite", "granitemoe", "granitemoehybrid", "hubert", "hunyuan_v1_moe", "idefics3", "internvl",
    "jamba", "jetmoe", "lfm2", "lfm2_moe", "llama", "llama4", "llama4_text", "llava", "llava_next",
    "m2m_100", "mamba", "mamba2", "minimax_m2", "mistral", "mistral3", "mixtral", "mllama",
    "modernbert", "mpnet", "mpt", "nemotron_h", "nllb-moe", "olmo2", "olmo3", "olmoe", "opt",
    "paligemma", "pegasus", "phi", "phi3", "phimoe", "qwen2", "qwen2_5_vl", "qwen2_audio",
    "qwen2_moe", "qwen2_vl", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_vl", "qwen3_vl_moe",
    "recurrent_gemma", "resnet", "roberta", "rwkv", "siglip", "smollm3", "smolvlm", "stablelm",
    "starcoder2", "swin", "swinv2", "switch_transformers", "t5", "vit", "wav2vec2", "whisper",
    "xlm-roberta",
})  # fmt: skip

# Prefixes that transformers adds to the names in files saved from the model without its head.
HEADLESS = {"gpt2": "transformer", "bloom": "transformer", "opt": "model"}
BARE_MODEL = re.compile(r"(?<!Head)Model$")

# A regular expression and its replacement, as in re.sub.
Rename = tuple[str, str]

VISION_MODELS = {
    "dinov2": names.DINOV2, "dinov2_with_registers": names.DINOV2, "swin": names.SWIN,
    **dict.fromkeys(("vit", "deit", "beit", "vit_mae", "vit_msn", "vivit", "ijepa"), names.VIT),
    "audio-spectrogram-transformer": names.VIT,
}  # fmt: skip


def _invert(*dialects: names.Dialect) -> tuple[Rename, ...]:
    """Return the conversion of names on disk to names in memory."""
    return tuple(
        (re.escape(on_disk), in_memory) for dialect in dialects for in_memory, on_disk in dialect
    )


@dataclass(frozen=True, slots=True)
class PeftTarget:
    """PEFT's view of one layer of BASE.

    Args:
        layer: The weight's name in BASE.
        shape: ``(out, in)`` as stored.
        module: PEFT's name: the module in memory; for a ``parameter``, its own path.
        kind: Kind of module.
        transposed: Whether PEFT's B·A is the transpose of the stored ΔW: Conv1D, embeddings,
            experts stored as ``(in, out)``.
        kernel: ``(in, kh, kw)`` of a convolution.
        expert: Index and number of experts.
        half: For one expert's matrix in a fused one, the index and number of parts.
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
        """``(out, in)`` in PEFT: B is ``(out, r)``, A is ``(r, in)``."""
        return self.shape[::-1] if self.transposed else self.shape


def names_in_memory(adapter: Adapter, base: Checkpoint) -> dict[str, str]:
    """Return a PEFT adapter's names of the tensors that it updates, stacks aside, by name in BASE;
    else empty.
    """
    if not adapter.source.peft_type:
        return {}  # names in other formats are not those of modules
    matched, _ = names.match_names(
        dict(update.expected for update in adapter.reading.updates), base, transposed=True
    )
    return names.get_own_names(matched)


class MemoryModel:
    """The model in memory, derived from BASE.

    Args:
        base: The checkpoint.
        own_names: Known names of weights in memory by their names in BASE.
    """

    def __init__(self, base: Checkpoint, own_names: Mapping[str, str] | None = None) -> None:
        self._base = base
        self._own_names = own_names or {}
        self.type = str(base.config.get("model_type", ""))
        self._renames = _find_renames(base, self.type)
        self._orientation = Orientation(base, {}, self.type in CONV1D_MODELS)
        self._experts = _count_experts(base) if self.type in FUSED_MODELS else {}
        self._mixtures = {
            match["owner"]
            for name in base
            if (match := SIBLING_OF_EXPERTS.match(self.parameter(name)))
        }

    @property
    def has_names_in_memory(self) -> bool:
        """Whether an adapter gives names in memory, which then replace the names in the files."""
        return bool(self._own_names)

    def in_memory(self, name: str) -> str:
        """Return the name in memory of a weight, by its name in BASE."""
        if name in self._own_names:
            return self._own_names[name]
        for pattern, replacement in self._renames:
            name = re.sub(pattern, replacement, name)
        return name

    def parameter(self, name: str) -> str:
        """Return the parameter in memory for a tensor of BASE, or for the parameter it
        is part of.
        """
        match = names.EXPERT.fullmatch(name)
        if match and match["owner"] in self._experts and match["leaf"] in FUSED_LEAVES:
            leaf, _ = self._find_fused(match["leaf"])
            return self.in_memory(f"{match['owner']}.{leaf}")
        return self.in_memory(name)

    def _find_fused(self, leaf: str) -> tuple[str, int]:
        """Return the fused parameter of one expert's matrix, and its half."""
        if self.type in UNGATED_MODELS and leaf == "up_proj":
            return leaf, 0
        return FUSED_LEAVES[leaf]

    def _is_transposed(self, leaf: str, stored: tuple[int, ...]) -> bool:
        """Return whether experts are stored transposed with respect to memory.

        transformers transposes them on loading if their shape differs from the parameter: the Hub
        and models saved by transformers 5 have different layouts. Without the width in the config,
        the Hub's layout is assumed.
        """
        text = self._base.config.get("text_config")
        width = (text if isinstance(text, dict) else self._base.config).get("hidden_size")
        if self.type not in FLIPPED_ON_DISK or stored[1] == stored[2]:
            return False
        return bool(stored[2 if leaf == "gate_up_proj" else 1] != width)

    def find_target(self, delta: Delta) -> PeftTarget | str:
        """Return the target of a matrix's factors, or the reason why the matrix has none."""
        name = delta.base.name if delta.base is not None else delta.layer
        if HEAD.search(delta.layer) and name != delta.layer:
            return "BASE ties it to the embedding: what PEFT adds to the one is added to both"
        stored = self._base[name].shape
        parameter = self.parameter(name)
        module = parameter.removesuffix(".weight")
        leaf = module.rpartition(".")[2]
        if (
            name.endswith("in_proj_weight")
            or f"{name.rpartition('.out_proj.')[0]}.in_proj_weight" in self._base
        ):
            return "part of an nn.MultiheadAttention, whose update PEFT applies in its own way"
        if self.type in MAMBA_MODELS and leaf in REFUSED_IN_MAMBA:
            return "PEFT refuses to adapt it in a Mamba model"
        if len(stored) == 3 and EXPERTS.search(parameter):
            index = (
                int(delta.layer.rpartition("[")[2].rstrip("]")) if delta.layer.endswith("]") else 0
            )
            in_out = (self.type in TRANSPOSED_MODELS) != self._is_transposed(leaf, stored)
            return PeftTarget(
                delta.layer, delta.shape, parameter, "parameter", in_out, expert=(index, stored[0])
            )
        if (
            (match := names.EXPERT.fullmatch(name))
            and match["owner"] in self._experts
            and match["leaf"] in FUSED_LEAVES
        ):
            half = self._find_fused(match["leaf"])[1], HALVES[leaf]
            expert = int(match["index"]), self._experts[match["owner"]]
            return PeftTarget(
                delta.layer, delta.shape, parameter, "parameter", expert=expert, half=half
            )
        if not parameter.endswith(".weight"):
            return "a bare parameter, not the weight of a layer"
        if len(stored) > 2:
            return _make_convolution(delta, module, stored, name)
        router = ROUTER.match(parameter)
        if (router and router["owner"] in self._mixtures) or (
            self.type in FUSED_MODELS and leaf in EXPERT_LIKE_NAMES
        ):
            return PeftTarget(delta.layer, delta.shape, parameter, "parameter")
        if TABLE.search(name) and not HEAD.search(parameter):
            return PeftTarget(delta.layer, delta.shape, module, "embedding", transposed=True)
        if self._orientation.in_out(name, (None, None), stored):
            return PeftTarget(delta.layer, delta.shape, module, "conv1d", transposed=True)
        return PeftTarget(delta.layer, delta.shape, module, "linear")


def _make_convolution(
    delta: Delta, module: str, stored: tuple[int, ...], name: str
) -> PeftTarget | str:
    """Return the target of a convolution's factors, or the reason why it has none."""
    if len(stored) == 3 and not CONVOLUTION.search(name):
        return "a bare parameter of three dimensions, not the weight of a layer"
    if stored[1] == 1 and stored[0] > 1:
        return "a convolution in groups, into which PEFT cannot merge"
    return PeftTarget(delta.layer, delta.shape, module, "convolution", kernel=stored[1:])


def _count_experts(base: Checkpoint) -> dict[str, int]:
    """Return the number of experts of each mixture that is stored expert by expert."""
    counts: dict[str, int] = {}
    for name in base:
        if match := names.EXPERT.fullmatch(name):
            counts[match["owner"]] = max(counts.get(match["owner"], 0), int(match["index"]) + 1)
    return counts


def _find_renames(base: Checkpoint, model_type: str) -> tuple[Rename, ...]:
    """Return the regular expressions that convert names on disk to names in memory, in order."""
    if model_type in NESTED_IN_MEMORY:
        return ()
    if any(name.startswith("language_model.model.") for name in base):  # LLaVA and related models
        return (
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^language_model\.model\.", "model.language_model."),
            (r"^(vision_tower|audio_tower|multi_modal_projector|vision_model)\.", r"model.\1."),
        )
    if model_type in {"qwen2_vl", "qwen2_5_vl"} and any(
        name.startswith("visual.") for name in base
    ):
        return (r"^model\.", "model.language_model."), (r"^visual\.", "model.visual.")
    if model_type == "gpt_neox":
        return _invert(names.GPT_NEOX)
    if model_type in VISION_MODELS and any(".query." in name for name in base):
        return _invert(VISION_MODELS[model_type])
    if model_type == "nemotron_h":
        return ((r"^backbone\.", "model."),)
    if any(name.endswith(".block_sparse_moe.input_linear.weight") for name in base):
        return _invert(*names.GRANITE_MOE)
    if model_type == "phimoe":
        return _invert(names.PHI_MOE, names.MIXTRAL)
    if model_type in FUSED_MODELS:
        return ((r"\.block_sparse_moe\.(gate|experts)\.", r".mlp.\1."),)
    prefix = HEADLESS.get(model_type)
    architectures = base.config.get("architectures") or [""]
    if (
        prefix
        and not BARE_MODEL.search(str(architectures[0]))
        and not any(n.startswith(f"{prefix}.") for n in base)
    ):
        return ((r"^(?!lm_head\.)", f"{prefix}."),)
    return ()
