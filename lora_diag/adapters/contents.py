"""The contents of an adapter's file, item by item, as seen by a program that loads it: parts, ranks
and scales.

Also whether the file is complete: PEFT adapts each module of the model that ``target_modules`` of
the config matches, and saves factors for all of them. Missing factors were lost later: PEFT fills
them with zeros without an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from lora_diag.adapters.adapter import Adapter
from lora_diag.adapters.diffusion import METADATA
from lora_diag.adapters.gguf import TABLE, get_fields, reorder_rows
from lora_diag.adapters.names import match_names
from lora_diag.adapters.patterns import Scale, compute_scale, find_targets
from lora_diag.adapters.source import Config, drop_prefix, is_named
from lora_diag.adapters.updates import UpdateSite, WeightUpdate
from lora_diag.adapters.writing_targets import (
    EXPERT_LIKE_NAMES,
    FUSED_MODELS,
    ROUTER,
    MemoryModel,
)
from lora_diag.deltas import Pairing, has_tied_head, is_head, is_table, natural_order
from lora_diag.records.names import RESIZABLE
from lora_diag.storage import Checkpoint

if TYPE_CHECKING:
    import torch

    from lora_diag.adapters.updates import Factors

# ``factors`` of a linear layer; ``residual`` are factors whose base was changed before training
# (PiSSA, OLoRA, KaSA); ``value`` is a weight in full, ``norm`` one of a norm, ``rows`` some rows of
# an embedding; ``other`` are the parts of adapters that are not LoRA.
Part = Literal[
    "factors",
    "embedding",
    "convolution",
    "experts",
    "dora",
    "residual",
    "bias",
    "value",
    "norm",
    "rows",
    "other",
]
_DOWN_BY_UP = {"lora_B": "lora_A", "lora_up": "lora_down", "up": "down"}
# Parts with two factors.
PAIRS = frozenset({"factors", "embedding", "convolution", "experts", "dora", "residual"})

# Forms that ``portability --fix`` writes as a plain LoRA.
LOW_RANK_PARTS = frozenset({"factors", "embedding", "convolution"})


@dataclass(frozen=True, slots=True)
class Item:
    """The change of one weight by an adapter.

    Args:
        layer: The weight's name in BASE; in the adapter without a BASE or a match there, and for
            replicated layers.
        module: The module's name in the adapter; for a fused parameter or an updated bias, its
            path.
        part: Its form in the file.
        key: One of its tensors in the file; empty if none is found.
        rank: r of its factors; None without factors.
        scale: s as read by this package; None without a scale.
        alpha: α from a tensor of the file; None without one.
        shape: ``(out, in)`` or ``(n,)``, without the sizes that only BASE determines; of a weight
            in full, as stored.
        kernel: ``(in, kh, kw)`` of a convolution; else empty.
        load: Loads ``(s·B, A)`` for an ``UpdateSite``; None without factors.
    """

    layer: str
    module: str
    part: Part
    key: str = ""
    rank: int | None = None
    scale: float | None = None
    alpha: float | None = None
    shape: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    load: Callable[[UpdateSite], Factors | torch.Tensor] | None = field(default=None, compare=False)

    @property
    def is_table(self) -> bool:
        """Whether the factors are those of an embedding, for which programs have other layouts."""
        return self.part == "embedding" or (
            self.part in {"dora", "residual"} and is_table(self.layer)
        )

    @property
    def tied_role(self) -> Literal["head", "embedding", ""]:
        """What the weight is to a head that is tied to the token embedding; empty for others."""
        if is_head(self.layer):
            return "head"
        is_token_table = RESIZABLE.search(self.layer) or self.key.startswith(TABLE)
        return "embedding" if self.is_table and is_token_table else ""


@dataclass(frozen=True)
class Contents:
    """The contents of an adapter's file.

    Args:
        form: The layout of the file: ``peft``, ``kohya``, ``diffusers``, ``mlx`` or ``gguf``.
        items: The changes of weights, in natural order of the weights.
        config: ``adapter_config.json``, or the fields of a GGUF file; empty without one, or if the
            user gave its α.
        has_metadata: Whether the file's own metadata have diffusers' settings of the adapter.
        tied: Whether the head of BASE is tied to its embedding; None without a BASE.
    """

    form: str
    items: tuple[Item, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    has_metadata: bool = False
    tied: bool | None = None

    @property
    def pairs(self) -> tuple[Item, ...]:
        """The items with factors."""
        return tuple(item for item in self.items if item.part in PAIRS)

    @cached_property
    def components(self) -> Mapping[str, tuple[Item, ...]]:
        """The items with factors, by component of a pipeline."""
        groups: dict[str, list[Item]] = {}
        for item in self.pairs:
            groups.setdefault(parse_component(item.module), []).append(item)
        return {name: tuple(group) for name, group in groups.items()}

    def first(self, *parts: Part) -> Item | None:
        """Return the first item with one of the given parts; None without one."""
        return next((item for item in self.items if item.part in parts), None)


def parse_component(module: str) -> str:
    """Return the component of a pipeline for a module of a diffusers or kohya file.

    >>> parse_component("unet.mid_block.attn.to_q"), parse_component("lora_te1_text_model_fc1")
    ('unet', 'lora_te1')
    """
    return module.partition(".")[0] if "." in module else "_".join(module.split("_")[:2])


def read_contents(adapter: Adapter, base: Checkpoint | None = None) -> Contents:
    """Return the contents of an adapter.

    Args:
        adapter: The adapter.
        base: Its BASE, for the weights' names there.
    """
    config = adapter.source.config
    values = config.values if config is not None and adapter.source.stored is None else {}
    items = [*_describe_updates(adapter, base), *_describe_values(adapter, base)]
    return Contents(
        adapter.form,
        tuple(sorted(items, key=lambda item: natural_order(item.layer))),
        get_fields(adapter.source) or values,
        METADATA in adapter.source.metadata,
        has_tied_head(base) if base is not None else None,
    )


def _describe_updates(adapter: Adapter, base: Checkpoint | None) -> Iterator[Item]:
    """Yield an item for each weight that an update changes, without optional ones."""
    updates = [
        reorder_rows(update, base) for update in adapter.reading.updates if not update.optional
    ]
    expected = dict(update.expected for update in updates)
    matched = (
        match_names(expected, base, transposed=True, parts=True)[0] if base is not None else {}
    )
    for update in updates:
        index = 0 if update.expert is None else update.expert[0]
        layers = [
            location.layer
            for location in matched.get(update.expected[0], ())
            if location.index == index
        ]
        if update.keeps_name or not layers:
            layers = [update.layer]
        alpha = None
        if update.alpha:
            alpha = float(adapter.checkpoint.read(update.alpha).reshape(-1)[0])
        scale = update.scale
        if scale is None and update.rank is not None and (update.alpha or adapter.form != "peft"):
            scale = compute_scale(adapter.checkpoint, Scale(1.0, update.alpha, update.rank))
        part = _find_part(update, adapter)
        kernel: tuple[int, ...] = ()
        if part == "convolution":
            kernel = _find_kernel(update.zero_if, adapter.checkpoint)
        for layer in layers:
            yield Item(
                layer=layer,
                module=update.weight.removesuffix(".weight"),
                part=part,
                key=_find_key(update, part, adapter),
                rank=update.rank,
                scale=scale,
                alpha=alpha,
                shape=tuple(size for size in update.shape if size is not None),
                kernel=kernel,
                load=update.plain or (update.load if update.factored else None),
            )


def _find_part(update: WeightUpdate, adapter: Adapter) -> Part:
    """Return the form of an update."""
    if update.needs_weight == "trainable tokens":
        return "rows"
    if adapter.form == "peft" and adapter.source.peft_type != "LORA":
        return "other"
    if update.needs_weight:
        return "dora" if update.needs_weight == "DoRA" else "residual"
    if not update.factored:
        return "bias" if update.weight.endswith(".bias") else "other"
    if update.expert is not None:
        return "experts"
    if update.zero_if in adapter.checkpoint:
        is_mlx_table = adapter.form == "mlx" and is_table(update.weight)
        if is_mlx_table or "lora_embedding" in update.zero_if or update.zero_if.startswith(TABLE):
            return "embedding"
        if len(adapter.checkpoint[update.zero_if].shape) > 2:
            return "convolution"
    return "factors"


def _find_kernel(key: str, checkpoint: Checkpoint) -> tuple[int, ...]:
    """Return ``(in, kh, kw)`` of a convolution, given the name of the factor that
    starts at zero.
    """
    down_key = re.sub(r"(lora_B|lora_up|up)(?=\.weight$)", lambda match: _DOWN_BY_UP[match[0]], key)
    mid_key = key.replace("lora_up", "lora_mid")
    if mid_key in checkpoint and mid_key != key:
        return (checkpoint[down_key].shape[1], *checkpoint[mid_key].shape[2:])
    return checkpoint[down_key].shape[1:]


def _find_key(update: WeightUpdate, part: Part, adapter: Adapter) -> str:
    """Return the name of one tensor of an update: its factor that starts at zero, else one of its
    part or module.

    Empty if the file has none.
    """
    if update.zero_if:
        return update.zero_if
    owner = update.weight.removesuffix(".weight").removesuffix(".bias")
    names = [name for name in adapter.checkpoint if drop_prefix(name).startswith(f"{owner}.")]
    dora_suffixes = ("magnitude_vector", "magnitude_vector.weight", "dora_scale", ".m")
    suffixes = {"bias": (".bias",), "dora": dora_suffixes}.get(part, ())
    return next(iter([*(name for name in names if name.endswith(suffixes)), *names]), "")


def _describe_values(adapter: Adapter, base: Checkpoint | None) -> Iterator[Item]:
    """Yield an item for each weight stored in full, copies aside; for a stack, one for each of its
    matrices in BASE.
    """
    values = [value for value in adapter.reading.values if not value.is_copy]
    expected = {value.weight: adapter.checkpoint[value.key].shape for value in values}
    matched = match_names(dict(expected), base)[0] if base is not None else {}
    for value in values:
        module = value.weight.removesuffix(".weight").removesuffix(".bias")
        shape = expected[value.weight]
        part: Part = "value"
        if value.weight.endswith(".bias"):
            part = "bias"
        elif "norm" in value.key and len(shape) == 1:
            part = "norm"
        layers = [location.layer for location in matched.get(value.weight, ())]
        for layer in layers or [value.weight]:
            yield Item(layer, module, part, value.key, shape=shape)


_WORD = re.compile(r"\w+")


def find_missing_targets(
    adapter: Adapter, base: Checkpoint, pairing: Pairing
) -> tuple[int, tuple[str, ...]] | None:
    """Return the number of weights of BASE that an adapter's config targets, and the names of those
    without a change.

    Modules in ``modules_to_save`` are no targets.

    Args:
        adapter: The adapter.
        base: Its BASE.
        pairing: The adapted weights of BASE, selected or not.

    Returns:
        The number and the names in natural order; None if the config does not determine them: there
            is no config or it
        has no ``target_modules``, it names parameters or all linear layers, it replicates layers,
            or none of the
        targeted weights is changed, since modules in memory have other names than in BASE.
    """
    config = adapter.source.config
    if config is None or (config.values.get("target_modules") or "all-linear") == "all-linear":
        return None
    if any(config.values.get(key) for key in ("target_parameters", "layer_replication")):
        return None
    in_memory = pairing.own_names
    layers = (item.layer for item in (*pairing.deltas, *pairing.unpaired))
    adapted = {re.sub(r"\[\d+\]$", "", layer) for layer in layers} | {*in_memory}
    targets = find_targeted(
        config, list_modules(base, config, adapted, MemoryModel(base, in_memory))
    )
    if not any(name in adapted for name in targets):
        return None
    missing = [name for name in targets if name not in adapted]
    return len(targets), tuple(sorted(missing, key=natural_order))


def find_targeted(config: Config, modules: Mapping[str, str]) -> list[str]:
    """Return the weights whose modules a config adapts: its targets without those excluded or saved
    in full.

    Args:
        config: The adapter's config.
        modules: The modules in memory, by the names of their weights.
    """
    targeted = find_targets(config, modules.values())
    targeted -= find_targets(config, targeted, "exclude_modules")
    saved = config.names("modules_to_save")
    names = []
    for name, module in modules.items():
        is_saved = any(is_named(module, key) for key in saved)
        if module in targeted and not is_saved and _is_in_layers(module, config):
            names.append(name)
    return names


def list_modules(
    base: Checkpoint,
    config: Config,
    adapted: Collection[str] = (),
    model: MemoryModel | None = None,
) -> dict[str, str]:
    """Return the modules in memory that PEFT could adapt, by the names of their weights in BASE.

    Args:
        base: BASE.
        config: The adapter's config.
        adapted: Weights that an adapter changes.
        model: The model in memory; default the one derived from BASE alone.
    """
    model = model or MemoryModel(base)
    min_dimensions = 1 if config.text("peft_type").upper() == "LN_TUNING" else 2
    modules: dict[str, str] = {}
    for name in base:
        parameter = model.parameter(name)
        module = parameter.removesuffix(".weight")
        # Experts and routers are parameters in memory, which PEFT does not adapt as modules.
        is_expert = model.type in FUSED_MODELS and module.rpartition(".")[2] in EXPERT_LIKE_NAMES
        is_layer = module != parameter and len(base[name].shape) >= min_dimensions
        if is_layer and (name in adapted or not (ROUTER.match(parameter) or is_expert)):
            modules[name] = module
    return modules


def _is_in_layers(module: str, config: Config) -> bool:
    """Return whether a module is in one of ``layers_to_transform``, by PEFT's rule; True if the
    config has none.
    """
    layers, pattern = config.values.get("layers_to_transform"), config.values.get("layers_pattern")
    if layers is None:
        return True
    given = [pattern] if isinstance(pattern, str) else config.names("layers_pattern")
    patterns = [text for text in given if _WORD.fullmatch(text)] or [r"[^.]*"]
    for pattern in patterns:
        if match := re.match(rf".*\.{pattern}\.(\d+)\.", module):
            return int(match[1]) in (layers if isinstance(layers, list) else [layers])
    return False
