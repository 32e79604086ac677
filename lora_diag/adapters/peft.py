"""PEFT's types of adapters besides LoRA, LoHa and LoKr, and those that are refused.

AdaLoRA:    ΔW = B·diag(E)·A·α/(r + 1e-5), where r is the number of rows remaining in the file.
VeRA:       ΔW = diag(b)·B·diag(d)·A with random B and A shared by all layers, truncated to each
            layer's size.
IA³:        ΔW = (l − 1) ⊙ W: every output of a layer (every input in feed-forward layers) is
            multiplied by a trained number; l is along the rows, or along the columns, and a bias
            follows the rows.
OFT:        W_tuned = W·Rᵀ, with R orthogonal and block-diagonal; for an embedding W·R. Each block
            is made of a skew-symmetric Q, whose upper triangle is stored: the Cayley transform
            (I − Q)(I + Q)⁻¹, or the first terms of the Neumann series I + 2Q + 2Q² + … of its
            inverse (I + Q)(I − Q)⁻¹; PEFT uses both with the same R.
FourierFT:  ΔW = Re ifft2(S)·scaling, where S is zero except at n positions determined by a random
            seed.
LN tuning:  normalization layers are trained in full, and their new values stored.
Trainable tokens: some rows of an embedding are replaced.

The others change no weight, or their change depends on the input, on random numbers that are not in
the file, or on a base that was changed at the start of training.

Reference: ``peft.tuners``; Zhang et al. 2023 (AdaLoRA), https://arxiv.org/abs/2303.10512; Kopiczko
et al. 2023 (VeRA), https://arxiv.org/abs/2310.11454; Liu et al. 2022 (IA³),
https://arxiv.org/abs/2205.05638; Qiu et al. 2023 (OFT), https://arxiv.org/abs/2306.07280; Gao et
al. 2024 (FourierFT), https://arxiv.org/abs/2405.03003; Zhao et al. 2023 (LN tuning),
https://arxiv.org/abs/2312.11420.
"""

from __future__ import annotations

import math
import re
from functools import partial
from typing import TYPE_CHECKING

from lora_diag.adapters import updates
from lora_diag.adapters.source import AdapterFiles, check_ranks, drop_prefix, find_pair, is_named
from lora_diag.adapters.updates import (
    ROWS,
    AdapterReading,
    Family,
    NewValue,
    Shape,
    UpdateSite,
    WeightUpdate,
    read,
    read_modules,
)
from lora_diag.errors import InputError, damaged
from lora_diag.storage import Checkpoint

if TYPE_CHECKING:
    import torch

    from lora_diag.adapters.updates import Factors

MERGE = "merge it with peft (merge_and_unload) and pass the merged checkpoint"
OTHER_BASE = "check that it belongs to this BASE"

CHANGES_NO_WEIGHT = {
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE",
}  # fmt: skip
DEPENDS_ON_INPUT = {"ADAPTION_PROMPT", "XLORA", "POLY", "LILY", "SHADOW"}

IA3 = ("ia3_l",)
VERA = ("vera_lambda_b", "vera_lambda_d")
VERA_SHARED = ("base_model.vera_A", "base_model.vera_B")
# Name of OFT's rotation in a layer and in an embedding.
OFT_LAYER, OFT_TABLE = "oft_R", "oft_embedding_R"
# PEFT's default is 5; each term is a product of all blocks.
MAX_TERMS = 1000
# End of a key of LN tuning, without the tensor's own name.
LN_TUNING = re.compile(r"\.ln_tuning_layers(\.(?!weight$|bias$)[^.]+)?(?=\.(weight|bias)$)")


def read_adalora(source: AdapterFiles) -> AdapterReading:
    """Return the contents of an AdaLoRA adapter."""
    config = source.settings
    kind = (
        f"PEFT AdaLoRA, init_r={config.values.get('init_r')}, "
        f"alpha={config.values.get('lora_alpha')}"
    )
    parts = ("lora_A", "lora_B", "lora_E")
    return read_modules(
        source, parts, _read_adalora, kind, f"lora_alpha / (r + 1e-5), from {config.path.name}"
    )


def _read_adalora(source: AdapterFiles, module: str, parts: dict[str, str]) -> list[WeightUpdate]:
    """Return the update of one module of AdaLoRA."""
    a_key, b_key = find_pair(source, module, parts)
    if "lora_E" not in parts:
        raise damaged(source.checkpoint.path, f"{module} has no lora_E, so the file is incomplete")
    a, b, e = (source.shape(key, 2) for key in (a_key, b_key, parts["lora_E"]))
    if e != (a[0], 1):
        raise damaged(
            source.checkpoint.path, f"{module}: lora_E {list(e)} does not fit lora_A {list(a)}"
        )
    # After the last pruning the removed rows are absent from the file, and rank_pattern has their
    # indices.
    expected_rank = (
        e[0] if source.settings.values.get("rank_pattern") else source.settings.integer("init_r")
    )
    check_ranks(source, module, a[0], expected_rank, b[1])
    alpha = source.settings.number("lora_alpha")
    scale = (alpha if alpha > 0 else a[0]) / (a[0] + 1e-5)
    load = partial(load_adalora_factors, source.checkpoint, b_key, a_key, parts["lora_E"], scale)
    dtype, zero_if, shape = source.checkpoint[b_key].dtype, parts["lora_E"], (b[0], a[1])
    weight = f"{module}.weight"
    return [
        WeightUpdate(
            weight, shape, load, True, dtype, zero_if=zero_if, rank=a[0], scale=scale, diagonal=True
        )
    ]


def load_adalora_factors(
    checkpoint: Checkpoint, b_key: str, a_key: str, e_key: str, scale: float, site: UpdateSite
) -> Factors:
    """Return s·B and diag(E)·A."""
    return read(checkpoint, b_key) * scale, read(checkpoint, a_key) * read(
        checkpoint, e_key
    ).reshape(-1, 1)


def read_vera(source: AdapterFiles) -> AdapterReading:
    """Return the contents of a PEFT VeRA adapter.

    Raises:
        InputError: The shared matrices were not saved, or the parts are inconsistent.
    """
    if any(key not in source.checkpoint for key in VERA_SHARED):
        problem = (
            "VeRA without its shared matrices (save_projection=false), which depend on the "
            "random generator"
        )
        raise damaged(source.path, f"{problem} of the training machine", MERGE)
    kind = f"PEFT VeRA, r={source.shape(VERA_SHARED[0], 2)[0]}"
    return read_modules(source, VERA, _read_vera, kind, ignored=VERA_SHARED)


def _read_vera(source: AdapterFiles, module: str, parts: dict[str, str]) -> list[WeightUpdate]:
    """Return the update of one module of VeRA."""
    if set(parts) != set(VERA):
        problem = f"{module} has only {', '.join(sorted(parts))}, so the file is incomplete"
        raise damaged(source.checkpoint.path, problem)
    (out,), (rank,) = (source.shape(parts[part], 1) for part in VERA)
    a, b = (source.shape(key, 2) for key in VERA_SHARED)
    if rank != a[0] or rank != b[1] or out > b[0]:
        shared = f"the shared A {list(a)} and B {list(b)}"
        raise damaged(
            source.checkpoint.path, f"{module}: lambdas of {out} and {rank} do not fit {shared}"
        )
    key, load = parts[VERA[0]], partial(load_vera_factors, source.checkpoint, parts)
    dtype = source.checkpoint[key].dtype
    return [
        WeightUpdate(
            f"{module}.weight",
            (out, None),
            load,
            True,
            dtype,
            zero_if=key,
            rank=rank,
            diagonal=True,
        )
    ]


def load_vera_factors(checkpoint: Checkpoint, parts: dict[str, str], site: UpdateSite) -> Factors:
    """Return diag(b)·B[:out] and diag(d)·A[:, :in].

    Raises:
        InputError: The weight has more columns than A, or a file cannot be read.
    """
    a, b = (read(checkpoint, key) for key in VERA_SHARED)
    if site.shape[1] > a.shape[1]:
        problem = f"the shared A has {a.shape[1]} columns, but the weight {site.shape[1]}"
        raise damaged(checkpoint.path, problem, OTHER_BASE)
    b_column, d_column = (read(checkpoint, parts[part]).reshape(-1, 1) for part in VERA)
    return b_column * b[: site.shape[0]], d_column * a[:, : site.shape[1]]


def _read_ia3(source: AdapterFiles, module: str, parts: dict[str, str]) -> list[WeightUpdate]:
    """Return the update of a module's weight and, if it is along the rows, an optional one of its
    bias.
    """
    key = parts["ia3_l"]
    info = source.checkpoint[key]
    size = info.numel
    if max(info.shape, default=0) != size or len(info.shape) < 2:
        raise damaged(
            source.checkpoint.path, f"{key} has shape {list(info.shape)}, not that of a vector"
        )
    # PEFT stores (out, 1), feed-forward (1, in); for a convolution (1, out, 1, 1) or (1, in, 1, 1),
    # which are indistinguishable.
    is_feedforward = any(
        is_named(module, name) for name in source.settings.names("feedforward_modules")
    )
    by_row = info.shape[0] == size if len(info.shape) == 2 and size > 1 else not is_feedforward
    expected: Shape = (size, None) if by_row else (None, None if len(info.shape) > 2 else size)
    load = partial(load_ia3, source.checkpoint, key, by_row)
    update = WeightUpdate(f"{module}.weight", expected, load, False, info.dtype, "IA3")
    bias = WeightUpdate(f"{module}.bias", (size,), load, False, info.dtype, "IA3", optional=True)
    return [update, bias] if by_row else [update]


def load_ia3(checkpoint: Checkpoint, key: str, by_row: bool, site: UpdateSite) -> torch.Tensor:
    """Return (l − 1) ⊙ W, of a weight or a bias."""
    change, w = read(checkpoint, key).reshape(-1) - 1, site.weight()
    if by_row:
        return change.reshape(-1, *(1 for _ in w.shape[1:])) * w
    return (w.reshape(w.shape[0], len(change), -1) * change[None, :, None]).reshape(w.shape)


def read_ln_tuning(source: AdapterFiles) -> AdapterReading:
    """Return the contents of a PEFT LN_TUNING adapter."""
    keys = [key for key in source.checkpoint if LN_TUNING.search(key)]
    values = tuple(NewValue(LN_TUNING.sub("", drop_prefix(key)), key) for key in keys)
    unclaimed = [key for key in source.checkpoint if key not in set(keys)]
    return updates.add_stored_values(
        AdapterReading(f"PEFT LN tuning, {len(keys)} tensors", (), values), source, unclaimed
    )


def read_oft(source: AdapterFiles) -> AdapterReading:
    """Return the contents of a PEFT OFT adapter.

    Raises:
        InputError: It uses an unsupported constraint, its config is invalid, or its parts are
            inconsistent.
    """
    config = source.settings
    if config.flag("coft"):
        raise damaged(source.path, "constrained OFT (coft=true) is not supported", MERGE)
    terms = (
        config.integer("num_cayley_neumann_terms", 5)
        if config.values.get("use_cayley_neumann", True)
        else 0
    )
    if terms > MAX_TERMS:
        problem = f"num_cayley_neumann_terms {terms} is above the limit of {MAX_TERMS}"
        raise damaged(config.path, problem, "check the config")
    return read_modules(source, (OFT_LAYER, OFT_TABLE), partial(_read_oft, terms), "PEFT OFT")


def _read_oft(
    terms: int, source: AdapterFiles, module: str, parts: dict[str, str]
) -> list[WeightUpdate]:
    """Return the update of one module of OFT, given the number of Neumann terms; 0 for the exact
    transform.
    """
    (part, key), *_ = parts.items()
    count, entries = source.shape(key, 2)
    size = (1 + math.isqrt(1 + 8 * entries)) // 2
    if size * (size - 1) // 2 != entries:
        problem = (
            f"{key} has shape {[count, entries]} instead of (blocks, b(b-1)/2), possibly "
            "from an older PEFT"
        )
        raise damaged(source.checkpoint.path, problem, MERGE)
    is_shared = source.settings.flag("block_share")
    if is_shared and count != 1:
        problem = f"{key} has {count} blocks, but block_share means a single one"
        raise damaged(source.checkpoint.path, problem, "check the config")
    load = partial(load_oft, source.checkpoint, key, size, terms, part == OFT_TABLE)
    shape: Shape = (None, None if is_shared else count * size)
    return [
        WeightUpdate(f"{module}.weight", shape, load, False, source.checkpoint[key].dtype, "OFT")
    ]


def load_oft(
    checkpoint: Checkpoint, key: str, size: int, terms: int, is_table: bool, site: UpdateSite
) -> torch.Tensor:
    """Return W·Rᵀ − W, or W·R − W for an embedding, block by block of W's columns.

    Raises:
        InputError: The blocks do not divide the columns, or a file cannot be read.
    """
    import torch

    upper = read(checkpoint, key)
    q = torch.zeros(len(upper), size, size, dtype=torch.float64)
    rows, columns = torch.triu_indices(size, size, 1)
    q[:, rows, columns] = upper
    change = _cayley_transform(q - q.transpose(1, 2), terms) - torch.eye(size, dtype=torch.float64)
    if is_table:
        change = change.transpose(1, 2)
    w = site.weight()
    if w.shape[1] % size:
        problem = f"{key}: blocks of {size} do not divide the {w.shape[1]} columns of BASE"
        raise damaged(checkpoint.path, problem, OTHER_BASE)
    blocks = w.reshape(w.shape[0], -1, size)
    rotated: torch.Tensor = torch.einsum(
        "obi,bji->obj", blocks, change.expand(blocks.shape[1], -1, -1)
    )
    return rotated.reshape(w.shape)


def _cayley_transform(q: torch.Tensor, terms: int) -> torch.Tensor:
    """Return R of every block, ``(blocks, b, b)``; ``terms`` of the Neumann series, or 0 for the
    exact transform.
    """
    import torch

    eye = torch.eye(q.shape[-1], dtype=q.dtype).expand_as(q)
    if terms == 0:
        exact: torch.Tensor = torch.linalg.solve(eye + q, eye - q, left=False)
        return exact
    # As summed by PEFT: two terms are I + 2Q, three and four are both I + 2Q + 2Q² + Q³, and so on.
    last = max(terms - 1, 3) if terms > 2 else terms - 1
    result, power = eye.clone(), eye
    for exponent in range(1, last + 1):
        power = power @ q
        result = result + power * (1.0 if exponent == last > 1 else 2.0)
    return result


def read_fourierft(source: AdapterFiles) -> AdapterReading:
    """Return the contents of a PEFT FourierFT adapter.

    Raises:
        InputError: ``scaling`` is missing or invalid, ``random_loc_seed`` is invalid, or the file
            holds several adapters.
    """
    config = source.settings
    scaling, seed = config.number("scaling"), int(config.number("random_loc_seed", 777))
    if not 0 <= seed < 2**63:
        raise damaged(
            config.path, f"random_loc_seed {seed:g} is not a valid seed", "correct the config"
        )
    kind = f"PEFT FourierFT, scaling={scaling:g}"
    read_update = partial(_read_fourierft, scaling, seed)
    return read_modules(
        source, ("fourierft_spectrum",), read_update, kind, f"scaling, from {config.path.name}"
    )


def _read_fourierft(
    scaling: float, seed: int, source: AdapterFiles, module: str, parts: dict[str, str]
) -> list[WeightUpdate]:
    """Return the update of one module of FourierFT."""
    (key,) = parts.values()
    load = partial(load_fourierft, source.checkpoint, key, scaling, seed)
    return [
        WeightUpdate(
            f"{module}.weight",
            (None, None),
            load,
            False,
            source.checkpoint[key].dtype,
            scale=scaling,
        )
    ]


def load_fourierft(
    checkpoint: Checkpoint, key: str, scaling: float, seed: int, site: UpdateSite
) -> torch.Tensor:
    """Return Re ifft2(S)·scaling.

    Raises:
        InputError: There are more frequencies than entries of the weight, or the file cannot be
            read.
    """
    import torch

    values, numel = read(checkpoint, key).reshape(-1), math.prod(site.shape)
    if len(values) > numel:
        raise damaged(
            checkpoint.path, f"{key} has more frequencies than the weight has entries", OTHER_BASE
        )
    positions = torch.randperm(numel, generator=torch.Generator().manual_seed(seed))[: len(values)]
    spectrum = torch.zeros(numel, dtype=torch.float64)
    spectrum[positions] = values
    change: torch.Tensor = torch.fft.ifft2(spectrum.view(site.shape)).real * scaling
    return change


def read_trainable_tokens(source: AdapterFiles) -> AdapterReading:
    """Return the contents of a TRAINABLE_TOKENS adapter."""
    indices = source.settings.values.get("token_indices")

    def read_table(source: AdapterFiles, module: str, parts: dict[str, str]) -> list[WeightUpdate]:
        return [updates.make_rows_update(source, module, parts[ROWS], indices)]

    return read_modules(source, (ROWS,), read_table, "PEFT trainable tokens", unit="tables")


FAMILIES = (
    Family.of_peft("AdaLoRA", "ADALORA", read_adalora, ("lora_E",)),
    Family.of_peft("VeRA", "VERA", read_vera, VERA),
    Family.of_peft(
        "IA3", "IA3", lambda source: read_modules(source, IA3, _read_ia3, "PEFT IA3"), IA3
    ),
    Family.of_peft("OFT", "OFT", read_oft, (OFT_LAYER, OFT_TABLE, "oft_blocks", "oft_diag")),
    Family.of_peft("FourierFT", "FOURIERFT", read_fourierft, ("fourierft_spectrum",)),
    Family.of_peft("LN tuning", "LN_TUNING", read_ln_tuning, ("ln_tuning_layers",)),
    Family.of_peft("trainable tokens", "TRAINABLE_TOKENS", read_trainable_tokens, (ROWS,)),
)


def make_unsupported_error(source: AdapterFiles) -> InputError:
    """Return the error of an adapter that no family reads, with the kind of adapter or what is
    missing, and a fix.
    """
    name = source.peft_type
    if name in CHANGES_NO_WEIGHT | DEPENDS_ON_INPUT:
        problem = (
            f"{name} adds virtual tokens or key-value prefixes and changes no weight, so "
            "there is no ΔW"
        )
        if name in DEPENDS_ON_INPUT:
            problem = (
                f"the change of a weight by {name} depends on the input, so there is no single ΔW"
            )
        return damaged(source.path, problem, "give another adapter")
    if name:
        return damaged(
            source.path, f"the adapter type {name} is not supported", f"if peft reads it, {MERGE}"
        )
    problem = "does not state its type of adapter (no peft_type), so r and alpha are not trusted"
    return damaged(
        source.settings.path, problem, 'if it is a LoRA adapter, add "peft_type": "LORA" to it'
    )
