"""PEFT LoRA and its variants by config, with replicated layers and trainable tokens.

ΔW = s·B·A with s = α/r or, with rsLoRA, α/√r.

Reference: Hu et al. 2021, https://arxiv.org/abs/2106.09685; Kalajdzievski 2023 (rsLoRA),
https://arxiv.org/abs/2312.03732; ``peft.tuners.lora``.

DoRA: the direction of W + D, with the length of every row (or column) from a trained vector m. V =
W + D with D = s·B·A, or in LyCORIS that of a LoHa or LoKr; ΔW = (m / ‖V‖) ⊙ V − W. It generally has
full rank, so it is computed in full and needs W. Reference: Liu et al. 2024,
https://arxiv.org/abs/2402.09353; LyCORIS ``weight_decompose``.

With ``layer_replication``, a model repeats some layers of its base, each copy with its own factors.
Layer j of the replicated model is layer ``concat(range(s, e) for s, e in layer_replication)[j]`` of
BASE. Several updates then change one stored weight, and no single checkpoint can hold them all:
each is measured against the weight it acts on, under its own name in the replicated model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, cast

from lora_diag.adapters import experts
from lora_diag.adapters.patterns import Scale, Scaling, describe_scaling
from lora_diag.adapters.peft import MERGE
from lora_diag.adapters.source import AdapterFiles, Config, check_ranks, find_pair, group_by_module
from lora_diag.adapters.thin import StoredFactors, find_thin_factors
from lora_diag.adapters.updates import (
    AdapterReading,
    Family,
    UpdateSite,
    WeightUpdate,
    add_stored_values,
    flatten_shape,
    load_product,
    read,
)
from lora_diag.errors import damaged
from lora_diag.storage import Checkpoint

if TYPE_CHECKING:
    import torch

    from lora_diag.adapters.updates import Factors


PAIR, TABLE = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")
PARTS = (*PAIR, *TABLE, "lora_magnitude_vector", "lora_diag")

# LoRA initializations after which the base differs from the one named by the adapter.
CHANGED_BASE = {
    "corda": "CorDA", "loftq": "LoftQ", "lora_ga": "LoRA-GA",
    "pissa_niter": "PiSSA with a randomised SVD",
}  # fmt: skip

# PEFT merges the update of a MultiheadAttention's out_proj twice, in the forward pass and in the
# merge (peft 0.21.2, since huggingface/peft#1324): measured forward and merged weights agree to
# 6e-8 with a factor of 2.
OUT_PROJ_TIMES = 2.0
OUT_PROJ = ".base_layer.out_proj"


def _find_target(module: str, attentions: set[str]) -> tuple[str, str, str, float]:
    """Return the target of a module's factors.

    Args:
        module: The module in the adapter's keys.
        attentions: The nn.MultiheadAttentions of the adapter.

    Returns:
        The module's name for PEFT's patterns, the names of the weight and the bias, and the number
            of times that PEFT
        adds the update.
    """
    if module.endswith(OUT_PROJ):
        attention = module.removesuffix(OUT_PROJ)
        return (
            attention,
            f"{attention}.out_proj.weight",
            f"{attention}.out_proj.bias",
            OUT_PROJ_TIMES,
        )
    if module in attentions:
        return module, f"{module}.in_proj_weight", f"{module}.in_proj_bias", 1.0
    return module, f"{module}.weight", f"{module}.bias", 1.0


def read_lora(source: AdapterFiles) -> AdapterReading:
    """Return the contents of a PEFT LoRA adapter."""
    config = source.settings
    _refuse_variants(source)
    # Used only in training.
    sampler_names = tuple(name for name in source.checkpoint if "lora_monteclora_sampler" in name)
    names = [name for name in source.checkpoint if name not in sampler_names]
    modules, unclaimed = group_by_module(names, PARTS, source.path)
    stacks, plain = experts.separate_stacks(modules, config)
    paths = [
        *(module.removesuffix(OUT_PROJ) for module in plain),
        *(stack.parameter for stack in stacks),
    ]
    scaling = Scaling.read(config, paths)
    attentions = {module.removesuffix(OUT_PROJ) for module in plain if module.endswith(OUT_PROJ)}
    read_updates = [
        *(
            _read_module(source, scaling, module, attentions, parts)
            for module, parts in plain.items()
        ),
        *(experts.read_stack(source, stack, scaling.rank, scaling.of_module) for stack in stacks),
    ]
    updates, notes = list(chain(*read_updates)), scaling.notes(paths)
    if attentions:
        remark = (
            "PEFT applies the update of a MultiheadAttention's out_proj twice; it is counted "
            "twice here too"
        )
        notes.append(f"{remark} ({len(attentions)} modules)")
    updates, replication_notes = assign_to_base_layers(updates, config)
    kind = f"PEFT {_name_variant(config)}, {describe_scaling(config)}, {len(modules)} modules"
    reading = AdapterReading(
        kind, tuple(updates), (), (*notes, *replication_notes), sampler_names, scaling.describe()
    )
    return add_stored_values(reading, source, unclaimed)


def _refuse_variants(source: AdapterFiles) -> None:
    """Refuse variants of PEFT LoRA without a ΔW, or with one that the files do not determine.

    Raises:
        InputError: The adapter is such a variant.
    """
    config = source.settings
    initialization = config.text("init_lora_weights").lower()
    for prefix, name in CHANGED_BASE.items():
        if initialization.startswith(prefix):
            problem = (
                f"was initialized with {name}, which changes the base weights without recording it"
            )
            fix = (
                "save it with path_initial_model_for_weight_conversion, or pass the merged "
                "checkpoint"
            )
            raise damaged(source.path, f"{problem}, so ΔW relative to BASE is unknown", fix)
    if config.flag("use_qalora"):
        raise damaged(source.path, "QA-LoRA acts on pooled inputs", MERGE)
    if config.flag("arrow_config"):
        problem = "Arrow routes each token over several adapters, so there is no single ΔW"
        raise damaged(source.path, problem, "measure the adapters one by one")


def _name_variant(config: Config) -> str:
    """Return the name of the variant of LoRA: that of its initialization, if that changes W, or of
    its settings.
    """
    name_by_key = {"use_dora": "DoRA", "kasa_config": "KaSA", "use_bdlora": "BD-LoRA"}
    name = next((variant for key, variant in name_by_key.items() if config.flag(key)), "LoRA")
    name = name_start(config) or name
    return f"{name} (rsLoRA)" if config.flag("use_rslora") else name


def _read_module(
    source: AdapterFiles, scaling: Scaling, module: str, attentions: set[str], parts: dict[str, str]
) -> list[WeightUpdate]:
    """Return the updates of one adapted module: its weight, and its bias if ``lora_bias`` trained
    one.
    """
    scaled_as, weight, bias, times = _find_target(module, attentions)
    rank, scale = scaling.rank(scaled_as), scaling.of_module(scaled_as) * times
    is_embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    shape, load, keys = (_read_embedding if is_embedding else _read_linear)(
        source, module, parts, rank, scale
    )
    trains_only_a = scaling.config.text("init_lora_weights").lower() == "mica"
    update = WeightUpdate(
        weight=weight,
        shape=shape,
        load=load,
        factored=True,
        dtype=source.checkpoint[keys[1]].dtype,
        zero_if=keys[0 if trains_only_a else 1],
        rank=rank,
        scale=scale,
        thin=_find_thin_factors(source, module, parts, keys, scale),
    )
    update = make_relative_to_base(update, scaling.config, scale, rank)
    if "lora_magnitude_vector" in parts:
        update = add_magnitude(update, source, parts["lora_magnitude_vector"], is_embedding)
    if (key := parts.get("lora_B.bias")) is None:
        return [update]
    load_bias = partial(load_scaled, source.checkpoint, key, scale)
    return [
        update,
        WeightUpdate(bias, source.shape(key, 1), load_bias, False, source.checkpoint[key].dtype),
    ]


def _find_thin_factors(
    source: AdapterFiles, module: str, parts: dict[str, str], keys: tuple[str, str], scale: float
) -> StoredFactors | None:
    """Return the factors to be read with NumPy; None if their file needs torch, or there are other
    parts or blocks.
    """
    if not parts.keys() <= {*PAIR, *TABLE, "lora_B.bias"} or _count_blocks(source.settings, module):
        return None
    is_table = "lora_embedding_A" in parts  # ΔW = (B·A)ᵀ
    down, up = keys if is_table else keys[::-1]
    return find_thin_factors(source.checkpoint, down, up, Scale(scale), turned=is_table)


# ``(out, in)``, the loader of the factors, and the names of A and B.
LocatedFactors = tuple[tuple[int, int], Callable[[UpdateSite], "Factors"], tuple[str, str]]


def _read_embedding(
    source: AdapterFiles, module: str, parts: dict[str, str], rank: int, scale: float
) -> LocatedFactors:
    """Return the shape, loader and names of the factors of an embedding, ΔW = s·(B·A)ᵀ
    = s·Aᵀ·Bᵀ.
    """
    a_key, b_key = find_pair(source, module, parts, "lora_embedding_")
    a, b = source.shape(a_key, 2), source.shape(b_key, 2)
    check_ranks(source, module, a[0], rank, b[1])
    return (
        (a[1], b[0]),
        partial(load_product, source.checkpoint, a_key, b_key, scale, True),
        (a_key, b_key),
    )


def _read_linear(
    source: AdapterFiles, module: str, parts: dict[str, str], rank: int, scale: float
) -> LocatedFactors:
    """Return the shape, loader and names of the factors of a linear layer or a convolution."""
    a_key, b_key = find_pair(source, module, parts)
    if blocks := _count_blocks(source.settings, module):
        shape, rank_of_a = _read_blocked_shape(
            source, module, source.shape(a_key, 2), source.shape(b_key, 2), blocks
        )
        check_ranks(source, module, rank_of_a, rank, rank_of_a)
        return (
            shape,
            partial(load_blocked_factors, source.checkpoint, b_key, a_key, scale, blocks),
            (a_key, b_key),
        )
    a = flatten_shape(source.checkpoint[a_key].shape)
    b = flatten_shape(source.checkpoint[b_key].shape)
    check_ranks(source, module, a[0], rank, b[1])
    diagonal = parts.get("lora_diag")
    if diagonal is not None and source.shape(diagonal, 1) != (rank,):
        raise damaged(source.checkpoint.path, f"{diagonal} must have {rank} entries")
    return (
        (b[0], a[1]),
        partial(load_linear_factors, source.checkpoint, b_key, a_key, scale, diagonal),
        (a_key, b_key),
    )


def load_linear_factors(
    checkpoint: Checkpoint,
    b_key: str,
    a_key: str,
    scale: float,
    diagonal: str | None,
    site: UpdateSite,
) -> Factors:
    """Return s·B·diag(d) and A; for a convolution, A as the matrix ``(r, in·kh·kw)``."""
    b, a = (read(checkpoint, key).flatten(1) for key in (b_key, a_key))
    if diagonal is not None:
        b = b * read(checkpoint, diagonal)
    return b * scale, a


def load_scaled(checkpoint: Checkpoint, key: str, scale: float, site: UpdateSite) -> torch.Tensor:
    """Return s times a stored change of a weight or bias."""
    return read(checkpoint, key).reshape(site.shape) * scale


def _count_blocks(config: Config, module: str) -> tuple[int, bool, bool] | None:
    """Return the number of blocks of a BD-LoRA module, and whether A and B are stored as blocks;
    None for others.

    Reference: Wang et al. 2025, https://arxiv.org/abs/2510.23346;
    ``peft.tuners.lora.variants.BdLoraLinearVariant``.
    """
    settings = config.table("use_bdlora")
    if not settings:
        return None
    in_a, in_b = (
        any(isinstance(word, str) and word in module for word in settings.get(key) or ())
        for key in ("target_modules_bd_a", "target_modules_bd_b")
    )
    count = Config(config.path, settings).integer("nblocks")
    return (count, in_a, in_b) if in_a or in_b else None


def _read_blocked_shape(
    source: AdapterFiles,
    module: str,
    a: tuple[int, ...],
    b: tuple[int, ...],
    blocks: tuple[int, bool, bool],
) -> tuple[tuple[int, int], int]:
    """Return ``(out, in)`` and the rank of a BD-LoRA module."""
    count, in_a, in_b = blocks
    rank = a[0]
    if (
        (in_a and a[0] % count)
        or (in_b and b[0] % count)
        or (b[1] * (count if in_b else 1)) != rank
    ):
        problem = f"{module}: A {list(a)} and B {list(b)} do not divide into {count} blocks"
        raise damaged(source.checkpoint.path, problem, "check the config")
    return (b[0], a[1] * (count if in_a else 1)), rank


def load_blocked_factors(
    checkpoint: Checkpoint,
    b_key: str,
    a_key: str,
    scale: float,
    blocks: tuple[int, bool, bool],
    site: UpdateSite,
) -> Factors:
    """Return s·B and A; one that is stored as blocks is block-diagonal."""
    import torch

    count, in_a, in_b = blocks
    b, a = read(checkpoint, b_key), read(checkpoint, a_key)
    if in_a:
        a = torch.block_diag(*a.chunk(count))  # type: ignore[no-untyped-call]
    if in_b:
        b = torch.block_diag(*b.chunk(count))  # type: ignore[no-untyped-call]
    return b * scale, a


def add_magnitude(
    update: WeightUpdate, source: AdapterFiles, magnitude: str, by_column: bool
) -> WeightUpdate:
    """Return the DoRA update for an update with a magnitude vector.

    Args:
        update: D.
        source: The adapter.
        magnitude: Name of m in the file.
        by_column: Whether m holds lengths of columns (an embedding's dimensions, a layer's inputs)
            instead of rows. A column of a convolution includes all kernels of an input.

    Raises:
        InputError: The length of m differs from the number of rows (or columns).
    """
    expected = update.shape[1 if by_column else 0]
    shape = source.checkpoint[magnitude].shape
    size = math.prod(shape)
    spans_kernels = (
        by_column and len(shape) > 2 and expected is not None and size and expected % size == 0
    )
    if size != expected and not spans_kernels:
        problem = f"{magnitude} has shape {list(shape)} instead of {expected} entries"
        raise damaged(source.checkpoint.path, problem)
    load = partial(load_dora, update.load, source.checkpoint, magnitude, by_column)
    plain = update.load if update.factored else None
    return replace(
        update, load=load, factored=False, needs_weight="DoRA", zero_if="", plain=plain, thin=None
    )


def load_dora(
    load: Callable[[UpdateSite], Factors | torch.Tensor],
    checkpoint: Checkpoint,
    magnitude: str,
    by_column: bool,
    site: UpdateSite,
) -> torch.Tensor:
    """Return (m / n) ⊙ V − W, where n are the norms of V's rows (columns)."""
    import torch

    w, change = site.weight(), load(site)
    v = w + (change[0] @ change[1] if isinstance(change, tuple) else change)
    m = read(checkpoint, magnitude).reshape(-1)
    if by_column:
        kernels = v.reshape(len(v), len(m), -1)
        ratio = (m / torch.linalg.vector_norm(kernels, dim=(0, 2))).repeat_interleave(
            kernels.shape[2]
        )
    else:
        ratio = (m / torch.linalg.vector_norm(v, dim=1))[:, None]
    tuned: torch.Tensor = ratio * v
    return tuned - w


# Initializations that subtract a part of the base weight before training. The trained update s·B·A
# is relative to W − P, so relative to the original base ΔW = s·B·A − P, with P recomputed from W. P
# has rank r, so ΔW stays in factored form, with rank at most 2r.
#
# - PiSSA: P is the best rank-r approximation of W. Meng et al. 2024,
#   https://arxiv.org/abs/2404.02948
# - OLoRA: P = s·Q_r·R_r of the QR decomposition of W. Büyükakyüz 2024,
#   https://arxiv.org/abs/2406.01775
# - KaSA: P is the part of W in its r smallest singular values. Wang et al. 2024,
#   https://arxiv.org/abs/2412.06071
STARTS = {"pissa": "PiSSA", "olora": "OLoRA"}


def name_start(config: Config) -> str:
    """Return the name of the initialization if it subtracts a part of W from BASE; else an empty
    text.
    """
    if config.values.get("kasa_config") is not None:
        return "KaSA"
    return STARTS.get(config.text("init_lora_weights").lower(), "")


def make_relative_to_base(
    update: WeightUpdate, config: Config, scale: float, rank: int
) -> WeightUpdate:
    """Return the update relative to the original base; unchanged if the initialization did not
    change it.
    """
    name = name_start(config)
    if not name:
        return update
    factors = cast("Callable[[UpdateSite], Factors]", update.load)
    load = partial(subtract_part, factors, name, scale, rank)
    return replace(update, load=load, needs_weight=name, zero_if="", plain=factors, thin=None)


def subtract_part(
    factors: Callable[[UpdateSite], Factors], name: str, scale: float, rank: int, site: UpdateSite
) -> Factors:
    """Return factors of s·B·A − P: ``[sB, −P_left]`` and ``[A; P_right]``."""
    import torch

    b, a = factors(site)
    left, right = _compute_part(site.weight(), name, scale, rank)
    return torch.cat([b, -left], dim=1), torch.cat([a, right])


def _compute_part(w: torch.Tensor, name: str, scale: float, rank: int) -> Factors:
    """Return the factors of P, the part of W that the initialization subtracted."""
    import torch

    if name == "OLoRA":
        q, r = torch.linalg.qr(w)
        return q[:, :rank] * scale, r[:rank]
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    components = slice(0, rank) if name == "PiSSA" else slice(max(0, len(s) - rank), None)
    return u[:, components] * s[components], vh[components]


# The first number between dots is the layer index.
LAYER = re.compile(r"(?<=\.)\d+(?=\.)")

# Limit on the layers of a replicated model, which has hundreds.
MAX_LAYERS = 100_000


def assign_to_base_layers(
    updates: list[WeightUpdate], config: Config
) -> tuple[list[WeightUpdate], list[str]]:
    """Return the updates, each assigned to the layer of BASE that it acts on, and notes.

    Without ``layer_replication`` the updates are unchanged, and there are no notes.
    """
    if "layer_replication" not in config:
        return updates, []
    order = _read_order(config)
    names = (_rename_in_base(update.weight, order, config) for update in updates)
    assigned = [
        replace(update, base_weight=name, keeps_name=True)
        for update, name in zip(updates, names, strict=True)
    ]
    named = (
        "layers are named as in the replicated model, and each is compared with the layer of "
        "BASE that it repeats"
    )
    return assigned, [
        f"layer_replication: {len(order)} layers are made of {len(set(order))}; {named}"
    ]


def _read_order(config: Config) -> list[int]:
    """Return for each layer of the replicated model its layer in BASE.

    Raises:
        InputError: The ranges are invalid.
    """
    ranges = config.values["layer_replication"]
    try:
        pairs = [(int(first), int(last)) for first, last in ranges]
    except (TypeError, ValueError, OverflowError) as error:
        problem = "layer_replication must be a list of [first, last) pairs"
        raise damaged(config.path, problem, "correct the config") from error
    count = sum(last - first for first, last in pairs)
    if not all(0 <= first < last for first, last in pairs) or not 0 < count <= MAX_LAYERS:
        problem = f"layer_replication has an invalid range, or none: {ranges!r:.100}"
        raise damaged(config.path, problem, "correct the config")
    return [layer for first, last in pairs for layer in range(first, last)]


def _rename_in_base(weight: str, order: list[int], config: Config) -> str:
    """Return the weight of BASE that a weight of the replicated model repeats.

    Raises:
        InputError: The weight is beyond the layers of the replicated model.
    """
    if (match := LAYER.search(weight)) is None:
        return weight
    if int(match[0]) >= len(order):
        problem = f"{weight} is beyond the {len(order)} layers of layer_replication"
        raise damaged(config.path, problem, "correct the config")
    return f"{weight[: match.start()]}{order[int(match[0])]}{weight[match.end() :]}"


FAMILY = Family.of_peft("LoRA", "LORA", read_lora, (*PAIR, *TABLE, "lora_magnitude_vector"))
