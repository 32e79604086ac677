"""GGUF models, presented under the names and in the row order of transformers.

llama.cpp's converter renames every tensor and, for models of Llama's family, reorders the rows of q
and k: transformers stores the rows of a head as two halves, llama.cpp as pairs, because their
rotary embeddings rotate halves and pairs. Those rows are put back: the rows of each head are read
together. Gemma's converter adds 1 to every norm, which is subtracted.

Names follow the architecture (``ARCHITECTURES``); tensors with unknown names keep them. Stacked
experts appear one by one where transformers stores them so. A model in several files
(``…-00001-of-00003.gguf``) has its settings in the first.

Reference: ``gguf.tensor_mapping`` (gguf 0.19.0); ggml-org/llama.cpp ``conversion/llama.py``
(``LlamaModel.permute``) and the classes that inherit it, and ``convert_hf_to_gguf.py``
(``GemmaModel.modify_tensors``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diag.errors import InputError, damaged
from lora_diag.storage.gguf import GgufFile, Value
from lora_diag.storage.tensors import TensorFile, TensorInfo

if TYPE_CHECKING:
    import torch


_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def _name_gated(
    suffix: str, module: str, leaves: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> dict[str, str]:
    """Return the tensors of a gated MLP, which have a suffix in GGUF -> the leaves of
    its module.
    """
    return {
        f"ffn_{kind}{suffix}": f"{module}.{leaf}"
        for kind, leaf in zip(("gate", "up", "down"), leaves, strict=True)
    }


_ATTENTION = {f"attn_{kind}": f"self_attn.{kind[0]}_proj" for kind in ("q", "k", "v", "output")}
_GATED = _name_gated("", "mlp")
_UNGATED = {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_AFTER = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_AROUND = {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm", **_AFTER}
_LLAMA = {**_ATTENTION, **_GATED, **_NORMS}
_QWEN_MOE = {"ffn_gate_inp": "mlp.gate", **_name_gated("_exps", "mlp.experts.{}")}
_SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    **_name_gated("_shexp", "mlp.shared_expert"),
}
_MIXTRAL_EXPERTS = _name_gated("_exps", "block_sparse_moe.experts.{}", ("w1", "w3", "w2"))
_MIXTRAL = {"ffn_gate_inp": "block_sparse_moe.gate", **_MIXTRAL_EXPERTS}
_PHI3_FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_PHI3 = {"attn_output": "self_attn.o_proj", "ffn_down": "mlp.down_proj", **_PHI3_FUSED, **_NORMS}
_STARCODER2 = {**_ATTENTION, **_NORMS, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}

# Tensors outside of blocks -> modules outside of layers.
OUTSIDE_BLOCKS = {
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    "output_norm": "model.norm",
}

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
# Architectures whose norms are stored with 1 added.
SHIFTED = ("gemma", "gemma2", "gemma3")
HEADS = {"num_attention_heads": "head_count", "num_key_value_heads": "head_count_kv"}


@dataclass(frozen=True)
class Names:
    """The names of an architecture.

    Args:
        architecture: ``general.architecture``.
        model_types: ``model_type`` of the configs that are converted to it.
        block: A tensor of a block -> the module in a layer; ``{}`` for the number of an expert.
        halves_to_pairs: Whether the rows of q and k are reordered.
    """

    architecture: str
    model_types: tuple[str, ...]
    block: Mapping[str, str]
    halves_to_pairs: bool = False

    def in_transformers(self, name: str) -> str | None:
        """Return transformers' name of a tensor, with ``{}`` for the number of a stacked expert;
        None if unknown.

        >>> ARCHITECTURES["llama"].in_transformers("blk.3.attn_q.weight")
        'model.layers.3.self_attn.q_proj.weight'
        """
        stem, _, leaf = name.rpartition(".")
        if match := _BLOCK.fullmatch(stem):
            module = self.block.get(match[2])
            return f"model.layers.{int(match[1])}.{module}.{leaf}" if module is not None else None
        return f"{OUTSIDE_BLOCKS[stem]}.{leaf}" if stem in OUTSIDE_BLOCKS else None

    def in_gguf(self, name: str) -> str | None:
        """Return GGUF's name of a tensor of transformers; None if it is not known.

        >>> ARCHITECTURES["llama"].in_gguf("model.layers.3.self_attn.q_proj.weight")
        'blk.3.attn_q.weight'
        """
        stem, _, leaf = name.rpartition(".")
        match = _LAYER.fullmatch(stem)
        block, module, names = (
            (f"blk.{match[1]}.", match[2], self.block) if match else ("", stem, OUTSIDE_BLOCKS)
        )
        return next(
            (f"{block}{tensor}.{leaf}" for tensor, known in names.items() if known == module), None
        )

    def heads_key(self, name: str) -> str:
        """Return the setting of ``config.json`` with the number of heads whose rows are reordered;
        empty if none are.

        Args:
            name: GGUF's name of a tensor.
        """
        match = _BLOCK.fullmatch(name.rpartition(".")[0])
        if not self.halves_to_pairs or match is None:
            return ""
        return {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(match[2], "")


ARCHITECTURES = {
    names.architecture: names
    for names in (
        Names(
            "llama", ("llama", "mistral", "mixtral"), {**_LLAMA, **_MIXTRAL}, halves_to_pairs=True
        ),
        Names("granite", ("granite",), _LLAMA, halves_to_pairs=True),
        Names("smollm3", ("smollm3",), _LLAMA, halves_to_pairs=True),
        Names("arcee", ("arcee",), {**_ATTENTION, **_NORMS, **_UNGATED}, halves_to_pairs=True),
        Names("olmo", ("olmo",), {**_ATTENTION, **_GATED}, halves_to_pairs=True),
        Names("olmo2", ("olmo2", "olmo3"), {**_ATTENTION, **_GATED, **_QK_NORMS, **_AFTER}),
        Names("qwen2", ("qwen2",), _LLAMA),
        Names("qwen2moe", ("qwen2_moe",), {**_ATTENTION, **_NORMS, **_QWEN_MOE, **_SHARED}),
        Names("qwen3", ("qwen3",), {**_LLAMA, **_QK_NORMS}),
        Names("qwen3moe", ("qwen3_moe",), {**_ATTENTION, **_NORMS, **_QK_NORMS, **_QWEN_MOE}),
        Names("gemma", ("gemma",), _LLAMA),
        Names("gemma2", ("gemma2",), {**_ATTENTION, **_GATED, **_AROUND}),
        Names(
            "gemma3", ("gemma3", "gemma3_text"), {**_ATTENTION, **_GATED, **_AROUND, **_QK_NORMS}
        ),
        Names("phi3", ("phi3",), _PHI3),
        Names("starcoder2", ("starcoder2",), _STARCODER2),
    )
}


def find_names(config: Mapping[str, Any]) -> Names | None:
    """Return the names of the model that a ``config.json`` describes; None if they are
    not known.
    """
    kinds = [settings.get("model_type") for settings in _list_settings(config)]
    return next(
        (names for names in ARCHITECTURES.values() for kind in kinds if kind in names.model_types),
        None,
    )


def _list_settings(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return a ``config.json``, and the settings of its text model if it has them."""
    return [
        config,
        *(settings for settings in (config.get("text_config"),) if isinstance(settings, dict)),
    ]


def heads(config: Mapping[str, Any], key: str) -> int | None:
    """Return a number of heads of a ``config.json``; None if it gives none.

    Args:
        config: The ``config.json``.
        key: The setting; where it is missing, ``num_attention_heads`` is used.
    """
    found = (
        settings.get(name)
        for settings in _list_settings(config)
        for name in (key, "num_attention_heads")
    )
    return next((value for value in found if type(value) is int and value > 0), None)


def to_pairs(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return rows in llama.cpp's order: of each head, row j of the first half, then row j of the
    second.

    Args:
        rows: In transformers' order; the first dimension must be a multiple of twice the number of
            heads.
        count: Number of heads.
    """
    return rows.reshape(count, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def to_halves(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return rows in transformers' order: the inverse of ``to_pairs``."""
    return rows.reshape(count, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


@dataclass(frozen=True, slots=True)
class View:
    """A tensor as presented: a stored one, or a part of it.

    Args:
        stored: Name in the file.
        info: As presented.
        offset: Its first entry in the stored tensor.
        heads: Heads whose rows are reordered; 0 where none are.
        shifted: Whether 1 was added to it.
    """

    stored: str
    info: TensorInfo
    offset: int = 0
    heads: int = 0
    shifted: bool = False


class GgufModel(TensorFile):
    """One GGUF file of a model.

    Args:
        path: The file.
        fields: Settings of the model; default those of the file.

    Raises:
        InputError: The file cannot be read, its header is invalid, it is an adapter, two tensors
            get one name, or the number of heads does not divide the rows of q or k.
    """

    label = "GGUF"
    matches = staticmethod(GgufFile.matches)

    def __init__(self, path: Path, fields: Mapping[str, Value] | None = None) -> None:
        self.path = path
        self._file = GgufFile(path)
        self.fields = self._file.fields if fields is None else fields
        self.metadata = self._file.metadata
        if self.metadata.get("general.type", "model") == "adapter":
            raise InputError(f"{path}: is a GGUF adapter, not a model; give it after BASE")
        architecture = str(self.fields.get("general.architecture"))
        names = ARCHITECTURES.get(architecture)
        self._views: dict[str, View] = {}
        for stored, info in self._file.tensors.items():
            for view in self._make_views(stored, info, names, architecture):
                if self._views.setdefault(view.info.name, view) is not view:
                    problem = f"two tensors have the name {view.info.name}, one is {stored}"
                    raise damaged(path, problem, "convert again")
        self.tensors = {name: view.info for name, view in self._views.items()}
        self.notes = self._file.notes
        if names is None:
            self.notes += (
                f"the names of architecture {architecture!r} are not known, so tensors keep their "
                f"GGUF names and row orders; known are {', '.join(ARCHITECTURES)}",
            )

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return a copy of the entries ``start:stop`` of a tensor (row-major); float32 if decoded
        or shifted.
        """
        values = self._read_range(name, start, stop, self._file.read)
        assert values is not None
        return values.float() - 1 if self._views[name].shifted else values

    def read_bytes(self, name: str) -> bytes:
        """Return the bytes of the stored tensor that holds a small one, as in the file and with all
        experts.
        """
        return self._file.read_bytes(self._views[name].stored)

    def read_steps(self, name: str, start: int, stop: int) -> torch.Tensor | None:
        """Return steps whose half bounds the error of the entries ``start:stop``; None if not
        quantized.
        """
        return self._read_range(name, start, stop, self._file.read_steps)

    def read_scales(self, name: str, start: int, stop: int) -> torch.Tensor | None:
        """Return the scales that multiply the codes of the entries ``start:stop``; None unless they
        are 8-bit codes.
        """
        return self._read_range(name, start, stop, self._file.read_scales)

    def _read_range(
        self, name: str, start: int, stop: int, read: Callable[[str, int, int], torch.Tensor | None]
    ) -> torch.Tensor | None:
        """Return what ``read`` gives for entries, in the presented order of the tensor; None if
        ``read`` gives none.
        """
        view = self._views[name]
        if not view.heads or start >= stop:
            return read(view.stored, view.offset + start, view.offset + stop)
        rows = view.info.shape[0] // view.heads
        size = rows * math.prod(view.info.shape[1:])
        first, last = start // size, -(-stop // size)
        values = read(view.stored, first * size, last * size)
        if values is None:
            return None
        ordered = to_halves(values.view((last - first) * rows, -1), last - first)
        return ordered.reshape(-1)[start - first * size : stop - first * size].clone()

    def _make_views(
        self, stored: str, info: TensorInfo, names: Names | None, architecture: str
    ) -> Iterator[View]:
        """Yield the views of a stored tensor: one, or one per expert of a stack."""
        name = names.in_transformers(stored) if names is not None else None
        if names is None or name is None or ("{}" in name and len(info.shape) != 3):
            yield View(stored, info)
            return
        if "{}" in name:
            size = math.prod(info.shape[1:])
            for expert in range(info.shape[0]):
                expert_info = TensorInfo(
                    name.format(expert), info.shape[1:], info.dtype, info.stored
                )
                yield View(stored, expert_info, expert * size)
            return
        shifted = architecture in SHIFTED and stored.endswith("norm.weight") and info.stored is None
        key = names.heads_key(stored)
        heads = self._count_heads(architecture, key, stored, info) if key else 0
        dtype = "float32" if shifted else info.dtype
        yield View(stored, TensorInfo(name, info.shape, dtype, info.stored), 0, heads, shifted)

    def _count_heads(self, architecture: str, key: str, stored: str, info: TensorInfo) -> int:
        """Return the number of heads whose rows are reordered."""
        block, field = int(stored.split(".")[1]), f"{architecture}.attention.{HEADS[key]}"
        default_field = f"{architecture}.attention.{HEADS['num_attention_heads']}"
        count = self.fields.get(field, self.fields.get(default_field))
        if isinstance(count, list):
            count = count[block] if block < len(count) else None
        rows = info.shape[0] if info.shape else 0
        if type(count) is not int or count <= 0 or rows % (2 * count):
            problem = f"{field} is {count!r}, which does not divide the {rows} rows of {stored}"
            raise damaged(self.path, problem, "convert the model again")
        return count


def open_model(path: Path) -> list[GgufModel]:
    """Return the opened files of a GGUF model: one, or all parts in their order.

    Raises:
        InputError: A file is missing or invalid, or two parts have the same tensor.
    """
    match = PART.fullmatch(path.name)
    if match is None:
        return [GgufModel(path)]
    count = int(match["count"])
    paths = [
        path.parent / f"{match['stem']}-{number:05d}-of-{count:05d}.gguf"
        for number in range(1, count + 1)
    ]
    if missing := next((part for part in paths if not part.is_file()), None):
        raise InputError(f"{path}: the part {missing.name} is missing; copy or download it again")
    if not paths:
        raise InputError(
            f"{path}: is not a part of a split model; name the files as llama.cpp does"
        )
    models = [first := GgufModel(paths[0]), *(GgufModel(part, first.fields) for part in paths[1:])]
    seen: set[str] = set()
    for model in models:
        if twice := seen.intersection(model.tensors):
            raise InputError(
                f"{model.path}: {min(twice)} is in another part, too; copy or download the parts "
                "again"
            )
        seen.update(model.tensors)
    return models


def derive_config(models: list[GgufModel]) -> dict[str, Any]:
    """Return the ``config.json`` of the model: heads and type, where known, and whether the
    embeddings are tied.
    """
    fields = models[0].fields
    architecture = str(fields.get("general.architecture"))
    names = ARCHITECTURES.get(architecture)
    config: dict[str, Any] = {
        "tie_word_embeddings": not any("lm_head.weight" in model.tensors for model in models)
    }
    if names is not None and len(names.model_types) == 1:
        config["model_type"] = names.model_types[0]
    counts = {key: fields.get(f"{architecture}.attention.{field}") for key, field in HEADS.items()}
    return config | {key: count for key, count in counts.items() if type(count) is int}


def list_models(folder: Path) -> list[Path]:
    """Return the first file of every GGUF model in a folder."""
    files = sorted(folder.glob("*.gguf"))
    return [
        file
        for file in files
        if (match := PART.fullmatch(file.name)) is None or int(match["number"]) == 1
    ]
