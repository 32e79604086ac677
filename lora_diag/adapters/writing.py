"""Factors → a PEFT adapter folder: ``adapter_model.safetensors`` and ``adapter_config.json``,
checked by reading them.

s = lora_alpha / r is 1 in every layer, so that B·A is the update itself. Every pattern of the
config is resolved by PEFT's own rules against the modules of BASE before anything is written; a
pattern that would match other modules is written out in full. Ranks can be read from an existing
config.

Tensors without factors are stored in full: norms and other small modules, biases, embeddings with a
resized vocabulary. PEFT keeps whole modules (``modules_to_save``) and, with ``bias: all``, biases
by themselves. It matches saved modules by the end of their names, so full names are given; and it
needs every tensor of a saved module in the file.

Reference: ``peft.tuners.tuners_utils.check_target_module_exists``,
``peft.utils.other.get_pattern_key``, ``peft.tuners.lora.layer.ParamWrapper`` of PEFT 0.21.
"""

from __future__ import annotations

import json
import operator
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diag.adapters.adapter import open_adapter
from lora_diag.adapters.experts import REGISTERED
from lora_diag.adapters.patterns import find_targets, get_rank, read_pattern
from lora_diag.adapters.source import CONFIG, PREFIX, Config, is_named
from lora_diag.adapters.updates import as_float64
from lora_diag.adapters.writing_targets import MemoryModel, PeftTarget
from lora_diag.deltas import Delta, DenseDelta, FactoredDelta, Side, StoredDelta
from lora_diag.errors import damaged
from lora_diag.files import write_whole
from lora_diag.storage import Checkpoint, TensorInfo, open_checkpoint
from lora_diag.storage.safetensors import write_safetensors

if TYPE_CHECKING:
    import torch

    from lora_diag.adapters.updates import Factors


WEIGHTS = "adapter_model.safetensors"

# First version of PEFT with this layout of stacked experts (huggingface/peft#3165).
PEFT_VERSION = "0.19.1"

# Fields of a PEFT config that are the same for every LoRA adapter written here.
LORA_CONFIG = {
    "peft_type": "LORA", "peft_version": PEFT_VERSION, "lora_dropout": 0.0, "use_rslora": False,
    "use_dora": False, "inference_mode": True, "init_lora_weights": True,
}  # fmt: skip

# Classes of transformers whose task is passed to PEFT; for some others it would add modules.
CAUSAL = re.compile(r"(ForCausalLM|LMHeadModel)$")


def read_config_ranks(path: Path, targets: Mapping[str, PeftTarget]) -> dict[str, int]:
    """Return the rank of every layer that ``target_modules`` or ``target_parameters`` of a PEFT
    config match.

    A half of a fused parameter gets half the rank, but at least 1.

    Args:
        path: ``adapter_config.json``.
        targets: PEFT's view of the layers.

    Raises:
        InputError: It cannot be read, a rank or pattern is invalid, or it adapts no layer here.
    """
    config = Config.read(path)
    modules = [target.module for target in targets.values()]
    adapted = find_targets(config, modules)
    parameters = config.names("target_parameters")
    pattern = read_pattern(config, "rank_pattern", modules)
    ranks: dict[str, int] = {}
    for layer, target in targets.items():
        by_name = any(is_named(target.module, name) for name in parameters)
        if not (by_name if target.kind == "parameter" else target.module in adapted):
            continue
        # A fused parameter has one rank; its halves are factored separately and share it.
        ranks[layer] = max(1, get_rank(config, pattern, target.module) // target.half[1])
    if not ranks:
        example = next(iter(targets.values())).module if targets else "(none)"
        problem = (
            f"its target_modules match no layer of this model, which has layers like {example}"
        )
        raise damaged(path, problem, "give the config of this model")
    return ranks


def can_be_saved(name: str, base: Checkpoint, model: MemoryModel) -> bool:
    """Return whether PEFT can store a tensor of BASE in full.

    Args:
        name: Its name in BASE.
        base: The checkpoint.
        model: The names of the model in memory.
    """
    module, _, leaf = name.rpartition(".")
    if name not in base or not module or leaf not in {"weight", "bias"}:
        return False
    if f"{module.rpartition('.')[0]}.in_proj_weight" in base:
        return False  # part of an nn.MultiheadAttention
    names_inside = [other for other in base if other.startswith(f"{module}.")]
    return all("." not in other[len(module) + 1 :] for other in names_inside) and bool(
        model.in_memory(name)
    )


def list_full_values(
    names: Collection[str],
    deltas: Mapping[str, Delta],
    base: Checkpoint,
    model: MemoryModel,
    adapted: Collection[str],
) -> list[Value]:
    """Return the tensors of the adapter file that store some tensors of BASE in full.

    Args:
        names: Tensors of BASE.
        deltas: Their changes, and those of their siblings in a module, by their names in BASE.
        base: The checkpoint.
        model: The names of the model in memory.
        adapted: Modules with factors, whose own tensors PEFT calls ``base_layer``.
    """
    values: dict[str, Value] = {}
    saved_modules = {name.rpartition(".")[0] for name in names if not _is_bias_of_layer(name, base)}
    for name in names:
        disk_module = name.rpartition(".")[0]
        module = model.in_memory(name).rpartition(".")[0]
        if disk_module not in saved_modules:
            key = f"{module}.base_layer.bias" if module in adapted else f"{module}.bias"
            values[key] = _make_value(key, name, deltas.get(name), base)
            continue
        for sibling in base:
            if sibling.rpartition(".")[0] == disk_module:
                key = model.in_memory(sibling)
                values[key] = _make_value(key, sibling, deltas.get(sibling), base, module)
    return list(values.values())


def _is_bias_of_layer(name: str, base: Checkpoint) -> bool:
    """Return whether a tensor is the bias of a layer whose weight is a matrix."""
    weight = f"{name.removesuffix('bias')}weight"
    return name.endswith(".bias") and weight in base and len(base[weight].shape) > 1


def _make_value(
    key: str, name: str, delta: Delta | None, base: Checkpoint, module: str = ""
) -> Value:
    """Return a tensor of BASE as it is after its change, to be stored in full."""
    if delta is not None and not isinstance(delta, StoredDelta):
        read = partial(_compute_changed_value, delta, base, name)
        return Value(key, TensorInfo(key, base[name].shape, "float32"), read, module)
    side = Side(base, name) if delta is None else delta.tuned
    return Value(key, replace(side.info, name=key), partial(_read_whole, side), module)


def _read_whole(side: Side) -> torch.Tensor:
    """Return a tensor in its stored shape."""
    return side.checkpoint.read(side.name).view(side.info.shape)


def _compute_changed_value(
    delta: FactoredDelta | DenseDelta, base: Checkpoint, name: str
) -> torch.Tensor:
    """Return the new value of a tensor that an adapter changes, float32."""
    change = operator.matmul(*delta.load()) if isinstance(delta, FactoredDelta) else delta.load()
    shape = base[name].shape
    return (as_float64(base.read(name)).view(shape) + as_float64(change).reshape(shape)).float()


def check_written(folder: Path, base: Checkpoint, parts: Sequence[LayerFactors]) -> None:
    """Compare an adapter folder with its factors.

    For a stack of experts, only the first and the last are compared, since each reads the whole
    stack.

    Args:
        folder: The adapter.
        base: The checkpoint it belongs to.
        parts: The factors, whose errors were measured.

    Raises:
        InputError: A layer is missing or differs when read back, so that the measured errors are
            not those of the file.
    """
    deltas = _read_deltas(folder, base)
    for part in parts:
        index, count = part.target.expert
        if index not in {0, count - 1}:
            continue
        b, a = as_float64(part.read("B")), as_float64(part.read("A"))
        written = (a.T, b.T) if part.target.transposed else (b, a)
        if not _are_equal(deltas.get(part.target.layer), part.target.shape, written):
            problem = f"the factors of {part.target.layer} differ when read back"
            reason = "since names and shapes of BASE do not determine its layout"
            raise damaged(
                folder, f"{problem}, {reason}", "exclude it with $exclude and report this"
            )


def check_converted(path: Path, written: Path, base: Checkpoint) -> None:
    """Compare an adapter in another layout with the PEFT adapter that it was made from, layer by
    layer.

    Args:
        path: The weights file in the other layout; both have a scale of 1 in every layer.
        written: The folder of the PEFT adapter.
        base: The checkpoint that both belong to.

    Raises:
        InputError: A layer is missing, has no factors, or reads back as other factors.
    """
    actual = _read_deltas(path, base)
    for layer, delta in _read_deltas(written, base).items():
        if not isinstance(delta, FactoredDelta) or not _are_equal(
            actual.get(layer), delta.shape, delta.load()
        ):
            problem = f"{layer} does not read back as it was written"
            raise damaged(path, problem, "do not use the folder, and report this")


def _read_deltas(path: Path, base: Checkpoint) -> dict[str, Delta]:
    """Return the ΔW of an adapter against BASE, by layer."""
    return {delta.layer: delta for delta in open_adapter(path).pair(base)[0].deltas}


def _are_equal(delta: Delta | None, shape: tuple[int, int], factors: Factors) -> bool:
    """Return whether a ΔW has these factors B and A, padding aside."""
    import torch

    if not isinstance(delta, FactoredDelta) or delta.shape != shape:
        return False
    pairs = zip(_select_used(*delta.load()), _select_used(*factors), strict=True)
    return all(torch.equal(ours, theirs) for ours, theirs in pairs)


def _select_used(b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the columns of B and the rows of A without the pairs in which one is zero, such as
    padding.
    """
    used = (b != 0).any(0) & (a != 0).any(1)
    return b[:, used], a[used]


@dataclass(frozen=True, slots=True)
class LayerFactors:
    """The factors of one layer of BASE.

    Args:
        target: Their target.
        rank: Their rank.
        file: A safetensors file that holds ``B`` ``(out, r)`` and ``A`` ``(r, in)`` in PEFT's
            orientation.
    """

    target: PeftTarget
    rank: int
    file: Path

    def read(self, name: str, rank: int | None = None) -> torch.Tensor:
        """Return ``A`` or ``B``, padded with zeros to ``rank`` if it is given."""
        checkpoint = open_checkpoint(self.file)
        return pad_factor(
            checkpoint.read(name).view(checkpoint[name].shape), name, rank or self.rank
        )


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor that the adapter stores in full, because it has no factors.

    Args:
        key: Its name in the adapter file, without PEFT's prefix.
        info: Shape and dtype.
        read: Returns it.
        module: The module to save with it; empty for the bias of a module, which ``bias`` covers.
    """

    key: str
    info: TensorInfo
    read: Callable[[], torch.Tensor]
    module: str = ""


@dataclass(frozen=True, slots=True)
class Described:
    """BASE as the config describes it: its name and class, and the names to resolve patterns
    against.

    Args:
        base_name: The base model's name or path.
        architecture: The class of BASE in transformers; empty if unknown.
        modules: All modules in memory, to resolve patterns against.
        parameters: All parameters that could be targets, likewise.
    """

    base_name: str
    architecture: str
    modules: frozenset[str]
    parameters: frozenset[str]


def write_adapter(
    folder: Path,
    parts: Sequence[LayerFactors],
    values: Sequence[Value],
    described: Described,
    portable: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write both files of a PEFT LoRA adapter.

    Args:
        folder: An existing folder; files with these names are replaced.
        parts: The factors; those of one module have one dtype.
        values: Tensors stored in full.
        described: BASE, for the config.
        portable: Write one rank for all modules, with smaller factors padded with zeros, and plain
            names: every program then uses the same scale. Not for parameters.
        metadata: Metadata of the weights file, besides its format.
    """
    groups: dict[str, list[LayerFactors]] = {}
    for part in parts:
        groups.setdefault(part.target.module, []).append(part)
    prefixes = _make_prefixes([group[0].target for group in groups.values()])
    tensors = {PREFIX + value.key: (value.info, value.read) for value in values}
    common_rank = max(map(compute_module_rank, groups.values()), default=1) if portable else None
    for module, group in groups.items():
        dtype = open_checkpoint(group[0].file)["B"].dtype
        for key, shape, read in _list_tensors(prefixes[module], group, common_rank):
            tensors[key] = TensorInfo(key, shape, dtype), read
    infos = {key: info for key, (info, _) in tensors.items()}
    ranks = {module: common_rank or compute_module_rank(group) for module, group in groups.items()}
    config = make_config(ranks, parts, values, described)
    if portable:  # some programs do not support regular expressions
        names = config["target_modules"]
        config["target_modules"] = names if isinstance(names, list) else sorted(groups)
    write_safetensors(
        folder / WEIGHTS, infos, lambda key: tensors[key][1](), {"format": "pt", **(metadata or {})}
    )
    write_config(folder, config)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write the settings of an adapter."""
    write_whole(
        folder / CONFIG, json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    )


def store_factors(
    file: Path, b: torch.Tensor, a: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the factors of one layer, and return them as stored.

    Args:
        file: The file; replaced if it exists.
        b: B ``(out, r)``.
        a: A ``(r, in)``, of the same dtype.
    """
    from safetensors.torch import save  # deferred: imports torch

    write_whole(file, save({"A": a.contiguous(), "B": b.contiguous()}))
    stored = open_checkpoint(file)
    return stored.read("B").view(b.shape), stored.read("A").view(a.shape)


def compute_module_rank(group: Sequence[LayerFactors]) -> int:
    """Return the rank of a module in PEFT: for stacked experts the largest, for halves
    their sum.
    """
    ranks: Counter[int] = Counter()
    for part in group:
        ranks[part.target.expert[0]] += part.rank
    return max(ranks.values())


def _make_prefixes(targets: Sequence[PeftTarget]) -> dict[str, str]:
    """Return the prefixes of the keys of every module; parameters of one owner are nested, the last
    one outermost.
    """
    prefixes = {
        target.module: PREFIX + target.module for target in targets if target.kind != "parameter"
    }
    owners: dict[str, list[str]] = {}
    for target in targets:
        if target.kind == "parameter":
            owner, _, leaf = target.module.rpartition(".")
            owners.setdefault(owner, []).append(leaf)
    for owner, leaves in owners.items():
        outermost_first = sorted(
            leaves,
            key=lambda leaf: REGISTERED.index(leaf) if leaf in REGISTERED else -1,
            reverse=True,
        )
        for depth, leaf in enumerate(outermost_first):
            prefixes[f"{owner}.{leaf}"] = PREFIX + owner + ".base_layer" * depth
    return prefixes


# Key in the file, shape, and reader.
KeyReader = tuple[str, tuple[int, ...], Callable[[], "torch.Tensor"]]


def _list_tensors(
    prefix: str, group: Sequence[LayerFactors], common_rank: int | None = None
) -> list[KeyReader]:
    """Return name, shape and reader of a module's factors, at its rank or, except a parameter,
    padded to another.
    """
    target, rank = group[0].target, common_rank or group[0].rank
    out, columns = target.peft_shape
    names = f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"
    shapes: tuple[tuple[int, ...], tuple[int, ...]] = (rank, columns), (out, rank)
    a, b = (partial(group[0].read, side, rank) for side in "AB")
    if target.kind == "embedding":
        names = f"{prefix}.lora_embedding_A", f"{prefix}.lora_embedding_B"
    elif target.kind == "convolution":
        shapes = (rank, *target.kernel), (out, rank, *(1 for _ in target.kernel[1:]))
    elif target.kind == "parameter":
        rank, count = compute_module_rank(group), target.expert[1]
        shapes = (rank * count, columns), (out * target.half[1], rank * count)
        a, b = partial(_stack_a, group, rank), partial(_stack_b, group, rank)
    readers = (lambda: a().reshape(shapes[0])), (lambda: b().reshape(shapes[1]))
    return list(zip(names, shapes, readers, strict=True))


def pad_factor(factor: torch.Tensor, name: str, rank: int) -> torch.Tensor:
    """Return A, by the name ``A``, or B padded with zeros to a rank."""
    import torch

    return torch.nn.functional.pad(
        factor, (0, 0, 0, rank - len(factor)) if name == "A" else (0, rank - factor.shape[1])
    )


def _stack_a(group: Sequence[LayerFactors], rank: int) -> torch.Tensor:
    """Return A ``(E·r, in)``: row e·r + k is row k of expert e's A.

    Experts of lower rank are padded with zero rows.
    """
    target = group[0].target
    whole = group[0].read("A").new_zeros(target.expert[1], rank, target.peft_shape[1])
    for part, first in _enumerate_columns(group):
        whole[part.target.expert[0], first : first + part.rank] = part.read("A")
    return whole.reshape(-1, whole.shape[2])


def _stack_b(group: Sequence[LayerFactors], rank: int) -> torch.Tensor:
    """Return B ``(out, r·E)``: column k·E + e is column k of expert e's B; block-diagonal for
    halves.
    """
    target = group[0].target
    rows = target.peft_shape[0]
    whole = group[0].read("B").new_zeros(rows * target.half[1], rank, target.expert[1])
    for part, first in _enumerate_columns(group):
        row = part.target.half[0] * rows
        whole[row : row + rows, first : first + part.rank, part.target.expert[0]] = part.read("B")
    return whole.reshape(len(whole), -1)


def _enumerate_columns(group: Sequence[LayerFactors]) -> Iterable[tuple[LayerFactors, int]]:
    """Yield every part with its first column among those of its expert: columns of halves follow
    each other.
    """
    used_columns: Counter[int] = Counter()
    for part in sorted(group, key=lambda part: (part.target.expert[0], part.target.half[0])):
        yield part, used_columns[part.target.expert[0]]
        used_columns[part.target.expert[0]] += part.rank


def make_config(
    ranks: Mapping[str, int],
    parts: Sequence[LayerFactors],
    values: Sequence[Value],
    described: Described,
) -> dict[str, Any]:
    """Return the content of ``adapter_config.json``, given the rank of every module."""
    kinds = {part.target.module: part.target.kind for part in parts}
    adapted = [module for module in ranks if kinds[module] != "parameter"]
    parameters = [module for module in ranks if kinds[module] == "parameter"]
    rank, pattern = make_rank_pattern(ranks)
    saved = sorted({value.module for value in values if value.module})
    target_modules = None
    if adapted or not parameters:
        target_modules = make_target_modules(adapted, described.modules)
    return {
        "base_model_name_or_path": described.base_name,
        **LORA_CONFIG,
        "task_type": "CAUSAL_LM" if CAUSAL.search(described.architecture) else None,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": target_modules,
        "target_parameters": _find_shortest_names(parameters, described.parameters, 2) or None,
        "modules_to_save": saved or None,
        "fan_in_fan_out": "conv1d" in kinds.values(),
        "bias": "all" if any(not value.module for value in values) else "none",
    }


def make_rank_pattern(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    r"""Return the most common rank, and a pattern for every module with another one.

    PEFT takes the first key k for which ``re.match(rf"(.*\.)?({k})$", module)`` holds. A key is a
    module's whole name, anchored and escaped, so that ``layers.1.`` never matches ``layers.11.``;
    if all modules with one last name have the same rank, it is that name.

    >>> make_rank_pattern({"h.1.up": 8, "h.11.up": 4, "h.1.down": 8, "h.2.down": 8})
    (8, {'^h\\.11\\.up': 4})
    >>> make_rank_pattern({"h.1.up": 8, "h.2.up": 8, "h.1.q": 4, "h.2.q": 4, "h.1.k": 8})
    (8, {'q': 4})
    """
    default_rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    leaves: dict[str, set[int]] = {}
    for module, rank in ranks.items():
        leaves.setdefault(module.rpartition(".")[2], set()).add(rank)

    def make_key(module: str) -> str:
        leaf = module.rpartition(".")[2]
        return re.escape(leaf) if len(leaves[leaf]) == 1 else f"^{re.escape(module)}"

    pattern = {make_key(module): rank for module, rank in ranks.items() if rank != default_rank}
    return default_rank, dict(sorted(pattern.items()))


def make_target_modules(adapted: Collection[str], modules: Iterable[str]) -> list[str] | str:
    r"""Return ``target_modules`` that match these modules and no others in PEFT.

    PEFT targets a module if its name is in the list or ends in ``.`` and a listed name.

    >>> make_target_modules(["h.1.up", "h.2.up", "h.1.q"], ["h.1.up", "h.2.up", "h.1.q", "h.2.q"])
    ['h.1.q', 'up']
    >>> make_target_modules(["h.1.up"], ["h.1.up", "vision.h.1.up"])
    'h\\.1\\.up'
    """
    all_modules = {*modules, *adapted}
    names = _find_shortest_names(adapted, all_modules)
    matched = {module for module in all_modules if any(is_named(module, name) for name in names)}
    return (
        names
        if matched == set(adapted)
        else "|".join(re.escape(module) for module in sorted(adapted))
    )


def _find_shortest_names(
    adapted: Collection[str], modules: Collection[str], parts: int = 1
) -> list[str]:
    """Return the last ``parts`` parts of the names if all modules with these endings are adapted,
    else whole names.
    """
    adapted_names = set(adapted)

    def end(name: str) -> str:
        """Return the last parts of a name."""
        return ".".join(name.split(".")[-parts:])

    other_endings = {end(name) for name in modules if name not in adapted_names}
    return sorted({end(name) if end(name) not in other_endings else name for name in adapted})
